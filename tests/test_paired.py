"""Paired differences: of cells that share seeds, by the measure that their data has."""

import io
import json
import math

import pytest
from rich.console import Console

from experiments.paired import difference, find_row, markdown, measures, paired_table, read_rows


def row(cell, values, dataset="digits", losses=None):
    return {
        "cell": cell,
        "settings": {"dataset": dataset},
        "values": values,
        "losses": losses or dict.fromkeys(values, 1.0),
    }


def test_a_difference_by_hand():
    found = difference({"0": 3.0, "1": 5.0, "2": 9.0}, {"0": 2.0, "1": 2.0, "7": 0.0})
    # The seeds 0 and 1 are shared: differences 1 and 3, their standard deviation is sqrt(2), its error 1.
    assert found == pytest.approx((2.0, math.sqrt(2) / math.sqrt(2), 2))
    assert found.text(2) == "+2.00 ± 1.00"
    assert difference({"0": 1.0}, {"0": 4.0}).text(1) == "-3.0"
    assert difference({"0": 1.0}, {"1": 1.0}) is None


def test_what_seeds_share_cancels():
    noise = [0.3, -2.0, 7.5, 1.1]
    one, other = ({str(i): value + shift for i, value in enumerate(noise)} for shift in (0.25, 0.0))
    assert difference(one, other) == pytest.approx((0.25, 0.0, 4))


def test_text_is_compared_by_loss():
    assert measures(row("a", {"0": 0.5})) == {"0": 50.0}
    assert measures(row("a", {"0": 0.5}, "python_text", {"0": 2.25})) == {"0": 2.25}


def test_the_table_and_its_base(tmp_path):
    rows = [
        row("first", {"0": 0.5, "1": 0.6}),
        row("second", {"0": 0.55, "1": 0.65}),
        row("text", {"0": 1}, "python_text"),
    ]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    assert read_rows([tmp_path / "table.json"]) == rows
    console = Console(file=io.StringIO(), width=150)
    console.print(paired_table(rows, "second"))
    shown = console.file.getvalue()
    assert "difference to second" in shown
    assert "-5.00 ± 0.00" in shown
    assert "text" not in shown.replace("test", "")
    assert markdown(rows[:2], None).splitlines()[2:] == [
        "| first | 2 | 55.00 | - |",
        "| second | 2 | 60.00 | +5.00 ± 0.00 |",
    ]
    with pytest.raises(ValueError, match="against='third' is no cell; choose one of first, second"):
        find_row(rows, "third")
    with pytest.raises(ValueError, match="no run has finished"):
        find_row([], None)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows([tmp_path / "other.json"])
