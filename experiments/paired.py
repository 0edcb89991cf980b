"""Differences between cells that share seeds: mean and standard error over the seeds, which cancel much of the noise.

    python -m experiments.paired --tables=ROOT/table.json,OTHER/table.json --against=CELL [--markdown]

Seeds are pairs: the same seed means the same batches in the same order and, for equal layers, the same dense weights.
Differences are in points of test accuracy; for text, in nats of test loss, where less is better.
"""

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.table import Table

from dsb_jax.training.data import text
from experiments import program

FLAGS = flags.FLAGS


class Difference(NamedTuple):
    """A cell minus another, over the seeds that both have.

    Attributes:
      mean: of the differences.
      error: standard error of the mean; None for a single seed.
      num_seeds: over how many.
    """

    mean: float
    error: float | None
    num_seeds: int

    def text(self, digits: int) -> str:
        """With so many digits after the point."""
        return f"{self.mean:+.{digits}f}" + ("" if self.error is None else f" ± {self.error:.{digits}f}")


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Difference | None:
    """Of values by seed; None without a common seed."""
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not differences:
        return None
    count = len(differences)
    error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Difference(statistics.fmean(differences), error, count)


def _is_text(row: Mapping[str, Any]) -> bool:
    return bool(row["settings"]["dataset"] == text.NAME)


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """What a row is compared by, by seed: accuracy in points, of text the loss."""
    if _is_text(row):
        return dict(row["losses"])
    return {seed: 100 * value for seed, value in row["values"].items()}


def check_against(cell: str | None, cells: Collection[str]) -> None:
    """Raises ValueError for a cell that is not there; None is the first."""
    if cell is not None and cell not in cells:
        raise ValueError(f"against={cell!r} is no cell; choose one of {', '.join(cells)}.")


def find_row(rows: Sequence[Mapping[str, Any]], cell: str | None) -> Mapping[str, Any]:
    """The row of a cell; None is the first.

    Raises:
      ValueError: if there is none, or no row at all.
    """
    if not rows:
        raise ValueError("there is nothing to compare: no run has finished.")
    check_against(cell, [row["cell"] for row in rows])
    return next(row for row in rows if cell in (None, row["cell"]))


def paired_rows(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(cell, seeds, mean, difference to the base) of every cell of the same data set, as texts."""
    own, digits, shown = measures(base), 4 if _is_text(base) else 2, []
    for row in rows:
        if row["settings"]["dataset"] == base["settings"]["dataset"]:
            values = measures(row)
            found = None if row is base else difference(values, own)
            mean = f"{statistics.fmean(values.values()):.{digits}f}"
            shown.append((row["cell"], str(len(values)), mean, "-" if found is None else found.text(digits)))
    return shown


def _unit(base: Mapping[str, Any]) -> str:
    return "test loss, nats" if _is_text(base) else "test accuracy, %"


def paired_table(rows: Sequence[Mapping[str, Any]], against: str | None) -> Table:
    """Every cell against one of them, for the terminal; only cells that are compared by the same measure are shown."""
    base = find_row(rows, against)
    table = Table(title=f"difference to {base['cell']}, paired by seed, ± standard error")
    table.add_column("cell", overflow="fold")
    for name in ("n", _unit(base), "difference"):
        table.add_column(name, justify="right")
    for shown in paired_rows(rows, base):
        table.add_row(*shown)
    return table


def markdown(rows: Sequence[Mapping[str, Any]], against: str | None) -> str:
    """The same for a page; what all cells have in common is left out of their names."""
    base = find_row(rows, against)
    shown = paired_rows(rows, base)
    common = set.intersection(*(set(cell.split("-")) for cell, *_ in shown)) if len(shown) > 1 else set()

    def short(cell: str) -> str:
        return " ".join(part for part in cell.split("-") if part not in common) or cell

    lines = [f"| | n | {_unit(base)} | minus {short(base['cell'])} |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {short(cell)} | {n} | {mean} | {found} |" for cell, n, mean, found in shown])


def read_rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of several table.json, in order.

    Raises:
      ValueError: if a file is none.
    """
    rows = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"tables={path} is no file; give the table.json of a sweep.")
        try:
            rows += json.loads(path.read_text())["rows"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} holds no rows; give the table.json of a sweep.") from None
    return rows


def main() -> None:
    """Flags -> library calls."""
    rows = read_rows(map(Path, FLAGS.tables))
    if FLAGS.markdown:
        print(markdown(rows, FLAGS.against))
    else:
        program.console().print(paired_table(rows, FLAGS.against))


if __name__ == "__main__":
    flags.DEFINE_list("tables", None, "Files table.json of sweeps.", required=True)
    flags.DEFINE_string("against", None, "Name of the cell that is subtracted; by default the first.")
    flags.DEFINE_bool("markdown", False, "Print a table for a page.")
    program.start(main)
