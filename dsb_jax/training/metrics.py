"""metrics.jsonl: one object a line, of kind "train" (every few steps), "adapt", "eval" (every epoch) or "stage".

Entries of the last kind are those of a run whose density falls; "adapt" and "stage" come before the training step that
they name, the others after it.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsb_jax.adapt import Report
from dsb_jax.drafts import write_text
from dsb_jax.methods.base import STATUS
from dsb_jax.paths import path_name
from dsb_jax.training.json_files import finite

BEFORE_A_STEP = ("adapt", "stage")


class Metrics:
    """The file of one run, cut back to the restored step when the run resumes.

    Attributes:
      lines: all entries.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if resumed_at and path.exists():
            self.lines = [
                entry
                for entry in read_metrics(path)
                if entry["step"] < resumed_at or (entry["step"] == resumed_at and entry["kind"] not in BEFORE_A_STEP)
            ]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in self.lines))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Adds an entry."""
        self.lines.append(finite({"kind": kind, "step": step, **values}))
        with self._path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The entries of a kind, in order of the step."""
        return [entry for entry in self.lines if entry["kind"] == kind]

    def median_seconds(self, kind: str) -> float | None:
        """Of one step or adaptation; None if none was timed."""
        seconds = [entry["seconds"] for entry in self.of_kind(kind) if "seconds" in entry]
        return statistics.median(seconds) if seconds else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, without the line that a killed run was writing, if there is one.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers among the values; None without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def report_totals(report: Report) -> dict[str, Any]:
    """One adaptation over all layers, on the host: growth accepted, turnover and collateral as means over layers.

    Layers that were left as they were count with what they are; `skipped` gives the reason of each by its name.
    """
    layers = list(report.values())
    requested = sum(int(layer.requested) for layer in layers)
    accepted = sum(int(layer.accepted) for layer in layers)
    return {
        "requested": requested,
        "accepted": accepted,
        "accepted_growth": accepted / max(requested, 1),
        "turnover": mean_or_none(float(layer.turnover) for layer in layers) or 0.0,
        "collateral": mean_or_none(float(layer.collateral) for layer in layers) or 0.0,
        "empty_groups": sum(int(layer.empty_groups) for layer in layers),
        "skipped": {path_name(path): STATUS[int(layer.status)] for path, layer in report.items() if int(layer.status)},
    }


def report_by_layer(report: Report) -> dict[str, dict[str, float]]:
    """All numbers of an adaptation by the name of the layer."""
    return {
        path_name(path): {name: float(value) for name, value in layer._asdict().items()}
        for path, layer in report.items()
    }
