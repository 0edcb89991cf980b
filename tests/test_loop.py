"""A whole small run: what it writes, that it learns, and that an interrupted one ends with the same bits."""

import dataclasses
import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from dsb_jax.methods.base import LayerReport
from dsb_jax.paths import validate_topology
from dsb_jax.telemetry import Explored, count_active, count_bytes
from dsb_jax.training import data, json_files, loop, metrics
from dsb_jax.training.checkpoints import restore
from dsb_jax.training.config import Config
from experiments import curves

# One sparse layer compiles in half the time of three.
CONFIG = Config(
    epochs=3, batch_size=48, update_interval=4, update_end_fraction=0.8, learning_rate=0.1, block_shape=(8, 8),
    keep_dense=("stem", "head", "conv_1", "conv_2"),
)  # fmt: skip


class Silent:
    """Tells nobody; interrupts the run at the end of an epoch if asked to."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.interrupt_after = interrupt_after
        self.steps: list[int] = []
        self.notes: list[str] = []

    def begin(self, config, components, state, done):
        self.steps.append(done)

    def advance(self, step, values):
        self.steps.append(step)
        if self.interrupt_after is not None and step > self.interrupt_after:
            raise KeyboardInterrupt

    def epoch(self, epoch, values):
        pass

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def digits():
    full = data.load("digits")
    return dataclasses.replace(
        full,
        train_inputs=full.train_inputs[:480],
        train_labels=full.train_labels[:480],
        test_inputs=full.test_inputs[:100],
        test_labels=full.test_labels[:100],
    )


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    config = loop.for_dataset(CONFIG, digits)
    summary = loop.run(config, digits, workdir, resume=False, progress=Silent())
    return config, workdir, summary


def test_the_summary_holds_what_is_promised(finished):
    config, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["test_accuracy"] > 0.2  # chance is 0.1
    assert abs(summary["sparsity"] - 0.9) < 0.005
    assert set(summary["bytes"]) == {"params", "grads", "opt_state", "topology", "index"}
    assert summary["step_time_s"] > 0
    assert summary["adapt_time_s"] > 0
    assert 0 < summary["accepted_growth"] <= 1
    assert 0 <= summary["collateral"] < 1
    assert 0.1 < summary["exploration"] < 1
    # Multiply-adds of an image: the dense layers (stem, conv_1, conv_2, head), and conv_3 of 230 blocks of 64 weights.
    rest, sparse, dense = 64 * (288 + 18432) + 16 * 73728 + 1280, 16 * 230 * 64, 16 * 128 * 1152
    inference = (rest + sparse) / (rest + dense)
    assert summary["flops"]["inference_ratio"] == pytest.approx(inference)
    # Training costs more for 5 adaptations in 30 steps, each forward, back to the inputs, and with
    # one dense weight gradient.
    adaptation = (2 * inference + dense / (rest + dense)) / 3
    assert summary["flops"]["train_ratio"] == pytest.approx(inference + 5 / 30 * adaptation)
    assert summary["adaptations"] == 5  # steps 4, 8, ..., 20 of 30, T_end = 24
    assert Config.from_json(summary["config"]) == dataclasses.replace(config, feature_major=True)


def test_metrics_are_one_object_a_line(finished):
    _, workdir, _ = finished
    lines = metrics.read_metrics(workdir / "metrics.jsonl")
    assert [e["step"] for e in lines if e["kind"] == "eval"] == [10, 20, 30]
    assert [e["step"] for e in lines if e["kind"] == "train"] == [10, 20, 30]
    adapts = [e for e in lines if e["kind"] == "adapt"]
    assert [e["step"] for e in adapts] == [4, 8, 12, 16, 20]
    assert set(adapts[0]["layers"]) == {"conv_3"}
    assert adapts[-1]["exploration"] >= adapts[0]["exploration"]


def test_the_curves_are_drawn(finished):
    _, workdir, _ = finished
    assert curves.draw(workdir, "title").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_resumes_to_the_same_bits(finished, digits, tmp_path):
    config, workdir, _ = finished
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, digits, broken, resume=False, progress=Silent(interrupt_after=20))
    progress = Silent()
    summary = loop.run(config, digits, broken, resume=True, progress=progress)
    assert progress.steps[0] in (10, 20)  # a checkpoint is written in the background: the last may not be complete
    assert summary["resumed_at_step"] == progress.steps[0]
    ours, theirs = restore(broken), restore(workdir)
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, ours.extra, theirs.extra)

    def without_times(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in e.items() if k != "seconds"} for e in lines]

    assert without_times(broken) == without_times(workdir)


def test_a_finished_run_is_not_trained_again(finished, digits):
    config, workdir, summary = finished
    progress = Silent()
    again = loop.run(config, digits, workdir, resume=True, progress=progress)
    assert progress.steps == [30]
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert again["step_time_s"] == summary["step_time_s"]


def test_a_finished_run_without_its_metrics_is_evaluated(finished, digits, tmp_path):
    config, workdir, summary = finished
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (copy / "metrics.jsonl").unlink()
    again = loop.run(config, digits, copy, resume=True, progress=Silent())
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert again["train_loss"] is None


def test_another_configuration_is_refused_and_nothing_overwritten(finished, digits):
    config, workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    other = dataclasses.replace(config, sparsity=0.8)
    with pytest.raises(ValueError, match="sparsity"):
        loop.run(other, digits, workdir, resume=True, progress=Silent())
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


def test_a_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size=1000 is more than the 480 images"):
        loop.for_dataset(dataclasses.replace(CONFIG, batch_size=1000), digits)


def test_telemetry_counts_the_arrays(finished):
    _, workdir, summary = finished
    restored = restore(workdir)
    state = restored.state
    validate_topology(state.topology)
    assert sum(count_active(state.topology).values()) == summary["num_active"]
    nbytes = count_bytes(state.params, state.opt_state, state.topology)
    assert nbytes["params"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert nbytes["grads"] == nbytes["params"]
    explored = Explored(restored.extra)
    explored.update(state.topology)
    assert explored.share() == summary["exploration"]


# Runs of as many steps as the others: what they compile is then in the cache already.
def test_dense_and_static_runs(digits, tmp_path):
    for method in ("dense", "ssb"):
        config = loop.for_dataset(dataclasses.replace(CONFIG, method=method), digits)
        summary = loop.run(config, digits, tmp_path / method, resume=False, progress=Silent())
        assert summary["accepted_growth"] is None
        assert np.isclose(summary["sparsity"], 0.9 if method == "ssb" else 0.0, atol=0.005)
        curves.draw(tmp_path / method, method)


def test_without_sparse_layers_there_is_no_mean_of_nothing(digits, tmp_path):
    config = loop.for_dataset(dataclasses.replace(CONFIG, sparsity=0.0), digits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = loop.run(config, digits, tmp_path, resume=False, progress=Silent())
    assert (summary["sparsity"], summary["adaptations"], summary["turnover"], summary["layers"]) == (0, 0, None, {})
    assert summary["flops"] == {"train_ratio": 1, "inference_ratio": 1}
    for file in ("summary.json", "metrics.jsonl"):
        assert "NaN" not in (tmp_path / file).read_text()
    assert metrics.report_totals({})["turnover"] == 0


def test_a_layer_that_stays_as_it_is_is_named():
    report = LayerReport(*np.float32([3, 2, 0.5, 0, 1]), calls=1, status=0)
    skipped = report._replace(requested=np.int32(0), accepted=np.int32(0), turnover=np.float32(0), status=np.int32(5))
    totals = metrics.report_totals({("a/b",): report, ("c",): skipped})
    assert totals["skipped"] == {"c": "its statistic is not finite"}
    assert (totals["turnover"], totals["accepted_growth"]) == (0.25, 2 / 3)
    by_layer = metrics.report_by_layer({("a/b",): report, ("c",): skipped})
    assert {name: layer["turnover"] for name, layer in by_layer.items()} == {"a%2Fb": 0.5, "c": 0}


def test_no_number_that_json_does_not_know():
    value = {"a": [float("nan"), 1.5, float("-inf")], "b": {"c": float("inf")}, "d": None}
    assert json_files.finite(value) == {"a": [None, 1.5, None], "b": {"c": None}, "d": None}
