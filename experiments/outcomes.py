"""The outcomes of many runs: summaries below a folder, and their mean and standard deviation over the seeds."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from dsb_jax.training.metrics import mean_or_none, read_metrics
from experiments.grid import Run, workdir

# Means over the seeds that a row of the table holds beside the accuracy; None where no run has a number.
# (Not the training loss: its last window of steps depends on where a run was resumed.)
MEANS = (
    "test_loss", "sparsity", "sparsity_all", "accepted_growth", "collateral", "turnover", "exploration", "empty_groups",
)  # fmt: skip
FLOPS = ("train_ratio", "inference_ratio")
BYTES = ("last", "average", "peak")  # of a training whose density changes; without that they are the same


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if it has not finished, or the file is no summary."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return summary if isinstance(summary, dict) and "config" in summary and "test_accuracy" in summary else None


def find_summaries(root: Path) -> dict[Path, dict[str, Any]]:
    """Folder -> summary of every finished run below `root`, at any depth, in order of the path.

    Raises:
      FileNotFoundError: if there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root={root} is no folder; give the --root of a sweep, or a folder of runs.")
    found = {file.parent: read_summary(file.parent) for file in sorted(root.rglob("summary.json"))}
    return {folder: summary for folder, summary in found.items() if summary is not None}


def read_adaptations(folder: Path) -> list[dict[str, Any]]:
    """The adaptations that a run noted in its metrics.jsonl, in order of the step; none if there is no such file.

    Each holds `step`, `turnover`, `exploration`, ... and by layer `layers`. The line that a killed run was writing
    does not count.
    """
    try:
        entries = read_metrics(folder / "metrics.jsonl")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if entry.get("kind") == "adapt"]


def finished(root: Path, run: Run) -> dict[str, Any] | None:
    """The summary of a run of a sweep, if it has one and the one it has is of this config."""
    summary = read_summary(workdir(root, run))
    return summary if summary is not None and run.matches(summary["config"]) else None


def mean_and_std(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no deviation of a single value."""
    known = list(values)
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def count_all_bytes(summary: Mapping[str, Any], when: str) -> int | None:
    """Bytes of all arrays that training holds, `when` being one of `BYTES`; None in summaries without them."""
    nbytes = summary.get("bytes") if when == "last" else summary.get(when, {}).get("bytes")
    return None if nbytes is None else sum(nbytes.values())


def make_row(cell: str, settings: Mapping[str, Any], summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One cell over its seeds, as plain values; accuracies are shares of the test images.

    Args:
      cell: its name.
      settings: its settings.
      summaries: seed -> summary, at least one.
    """
    values = {seed: summaries[seed]["test_accuracy"] for seed in sorted(summaries)}
    mean, std = mean_and_std(values.values())
    every = list(summaries.values())
    flops = {name: mean_or_none(s.get("flops", {}).get(name) for s in every) for name in FLOPS}
    return {
        "cell": cell,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        "n": len(values),
        "mean": mean,
        "std": std,
        "values": {str(seed): value for seed, value in values.items()},
        "losses": {str(seed): summaries[seed].get("test_loss") for seed in values},
        **{name: mean_or_none(s.get(name) for s in every) for name in MEANS},
        "flops": flops,
        "bytes": {when: mean_or_none(count_all_bytes(s, when) for s in every) for when in BYTES},
    }


def make_rows(root: Path, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for each cell of which at least one run has finished, in the order of the grid."""
    cells: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    names: dict[tuple[Any, ...], str] = {}
    for run in runs:
        names[run.settings] = run.cell
        found = cells.setdefault(run.settings, {})
        if (summary := finished(root, run)) is not None:
            found[run.seed] = summary
    return [make_row(names[key], dict(key), found) for key, found in cells.items() if found]


def outcome_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows for the terminal: test accuracy in per cent, sparsity over the sparse layers, FLOPs against dense."""
    table = Table(title="test accuracy, mean and standard deviation over the seeds")
    table.add_column("cell", overflow="fold")
    for name in ("n", "accuracy %", "std", "test loss", "sparsity", "train", "infer", "accepted", "collateral",
                 "exploration"):  # fmt: skip
        table.add_column(name, justify="right")

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            row["cell"], str(row["n"]), f"{100 * row['mean']:.2f}",
            text(None if row["std"] is None else 100 * row["std"], ".2f"), text(row["test_loss"], ".4f"),
            text(row["sparsity"], ".1%"),
            text(row["flops"]["train_ratio"], ".3f"), text(row["flops"]["inference_ratio"], ".3f"),
            *(text(row[name], ".1%") for name in ("accepted_growth", "collateral", "exploration")),
        )  # fmt: skip
    return table
