"""The examples as a user runs them, in a small size: what they print is what they say they show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))


def rows(*command):
    """The words of each printed line, by the first of them, with numbers as floats: 98.61% is 0.9861."""
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines() if line]
    return {first: [_number(word) for word in rest] for first, *rest in lines}


def _number(word):
    if re.fullmatch(r"[\d,.]+%?", word):
        return float(word.strip("%").replace(",", "")) / (100 if word.endswith("%") else 1)
    return word


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_on_a_page_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"    python examples/{path.name} [--" in text


def test_own_linen_model():
    table = rows("examples/own_linen_model.py", "--steps=80")
    for name in ("dense", "masked", "sparse"):
        accuracy, _, milliseconds = table[name]
        assert accuracy > 0.9, table
        assert milliseconds > 0
    assert table["dense"][1] == table["masked"][1] > 8 * table["sparse"][1]


def test_own_nnx_model():
    table = rows("-m", "examples.own_nnx_model", "--steps=140")  # adapts at 50, before it is saved, and at 100
    accuracy, *_, weights, _ = table["sparse"]
    assert accuracy > 0.9, table
    assert table["restored"] == table["sparse"]
    assert table["equal"] == ["bits:", "True"]
    assert table["dense"][-2] > 8 * weights


def test_transformer():
    table = rows("examples/transformer.py", "--steps=20", "--width=64", "--layers=1")
    dense, *sparse = models = [table[sparsity] for sparsity in ("0", "0.8", "0.9")]
    assert dense[:3] == [0, "of", 9]
    for *counts, parameters, _, _, _ in sparse:
        assert counts == [6, "of", 9]  # query, key, value, out, up and down
        assert parameters < dense[3] / 2
    for *_, parameters, megabytes, bits, seconds in models:
        assert abs(megabytes - 12 * parameters / 1e6) < 0.1  # weights and two moments, and where they lie
        assert bits < 6  # of 6.6, the logarithm of 97 characters
        assert seconds > 0


@pytest.mark.campaign
def test_finetune_dense():
    table = rows("examples/finetune_dense.py", "--steps=150", "--seeds=0")
    dense, pruned, finetuned, gradual, kept, _, planned = table["0"]
    assert kept == planned == table["parameters:"][0]  # none changed, none lost
    assert dense > 0.95
    assert pruned < dense
    assert min(finetuned, gradual) > max(pruned, dense - 0.03), table
    assert table["mean"] == [dense, pruned, finetuned, gradual]
