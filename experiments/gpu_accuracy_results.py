"""The file and the table of `experiments.gpu_accuracy`."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dsb_jax.training.config import Config
from dsb_jax.training.json_files import write_json
from experiments.gpu_accuracy_arms import Arm
from experiments.outcomes import mean_and_std
from experiments.paired import difference
from experiments.scanned_training import Outcome


class Results:
    """The file of results.

    Attributes:
      path: None to keep nothing.
      environment: device and versions, a part of what makes two results comparable.
      beside: what else is written.
      arms: name -> record, in `seeds` the seeds that are done.
      left_out: name of an arm -> which seeds there was no time for.
    """

    def __init__(self, path: Path | None, environment: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        """Reads the file if there is one; raises ValueError if it is not of this program."""
        self.path, self.environment, self.beside = path, dict(environment), dict(beside)
        self.arms: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                self.arms = dict(json.loads(path.read_text())["arms"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                raise ValueError(f"json={path} holds no results of this program; move it away.") from None

    def record(self, arm: Arm, config: Config) -> dict[str, Any]:
        """What is known of an arm, if it is of this config, device and versions; else a new record in its place."""
        known = self.arms.get(arm.name, {})
        if known.get("config") != config.to_json() or known.get("environment") != self.environment:
            known = {"config": config.to_json(), "environment": self.environment, "against": arm.against, "seeds": {}}
        self.arms[arm.name] = known
        return known

    def write(self) -> None:
        """Writes all of it at one stroke, without arms of which nothing is known."""
        if self.path is None:
            return
        told = {name: record for name, record in self.arms.items() if record["seeds"] or "error" in record}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**self.beside, "left_out": self.left_out, "arms": told})


def seed_records(config: Config, group: Sequence[int], outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What is kept of each seed of a group, by seed as text.

    Args:
      config: of the arm.
      group: the seeds that were trained together; one that fills the group up counts once.
      outcome: of the group.
      seconds: of the whole group.
    """
    records = {}
    for i, seed in enumerate(dict.fromkeys(group)):
        curve = [[step, accuracy[i], loss[i]] for step, accuracy, loss in outcome.evaluations]
        losses = [values[i] for values in outcome.train_losses]
        records[str(seed)] = {
            "test_accuracy": curve[-1][1], "test_loss": curve[-1][2],
            "train_loss": statistics.fmean(losses[-max(1, len(losses) // 20) :]),
            "curve": [[step, round(accuracy, 6), round(loss, 6)] for step, accuracy, loss in curve],
            "group_s": seconds, "seeds_together": len(group),
            "step_s": statistics.median(outcome.segment_s) / config.update_interval / len(group),
            "adapt_s": statistics.median(outcome.adapt_s) / len(group) if outcome.adapt_s else None,
            "eval_s": statistics.median(outcome.eval_s) / len(group),
        }  # fmt: skip
    return records


def outcome_table(known: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Arms with a seed: mean and standard deviation over the seeds, differences paired by seed, all in per cent."""
    table = Table(title=title)
    table.add_column("arm")
    for name in ("n", "mean", "std", "test loss", "difference, paired", "sparsity", "ms a step", "compile s", "MiB"):
        table.add_column(name, justify="right")

    def accuracies(name: str) -> dict[str, float]:
        return {seed: 100 * values["test_accuracy"] for seed, values in known.get(name, {"seeds": {}})["seeds"].items()}

    for name, record in known.items():
        if not record["seeds"]:
            continue
        values, seeds = accuracies(name), list(record["seeds"].values())
        mean, std = mean_and_std(values.values())
        against = difference(values, accuracies(record["against"])) if record["against"] != name else None
        loss = statistics.fmean(math.nan if seed["test_loss"] is None else seed["test_loss"] for seed in seeds)
        table.add_row(
            name, str(len(values)), f"{mean:.2f}", "-" if std is None else f"{std:.2f}", f"{loss:.4f}",
            "-" if against is None else f"{against.text(2)} to {record['against']}", f"{record['sparsity']:.1%}",
            f"{1e3 * statistics.median(seed['step_s'] for seed in seeds):.2f}", f"{record['compile_s']['arm']:.0f}",
            f"{sum(record['bytes'].values()) / 2**20:.1f}",
        )  # fmt: skip
    return table
