"""A whole small run: what it writes, that it learns, and that an interrupted one ends with the same bits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dsb_jax import checkpoint
from dsb_jax.layout import validate
from dsb_jax.telemetry import Explored, active_positions, count_active, count_bytes
from dsb_jax.train_state import layouts
from dsb_jax.training import data
from dsb_jax.training.config import Config
from experiments import curves, run

CONFIG = Config(
    epochs=3, batch_size=48, update_interval=4, update_end_fraction=0.8, learning_rate=0.1, block_shape=(8, 8)
)


class Silent:
    """Tells nobody; interrupts the run at the end of an epoch if asked to."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.interrupt_after = interrupt_after
        self.steps: list[int] = []

    def begin(self, config, components, state, done):
        self.steps.append(done)

    def advance(self, step, values):
        self.steps.append(step)
        if self.interrupt_after is not None and step > self.interrupt_after:
            raise KeyboardInterrupt

    def epoch(self, epoch, values):
        pass


@pytest.fixture(scope="module")
def digits():
    full = data.load("digits")
    return dataclasses.replace(
        full,
        train_images=full.train_images[:480],
        train_labels=full.train_labels[:480],
        test_images=full.test_images[:100],
        test_labels=full.test_labels[:100],
    )


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    config = run.for_dataset(CONFIG, digits)
    summary = run.run(config, digits, workdir, resume=False, progress=Silent())
    return config, workdir, summary


def test_the_summary_holds_what_is_promised(finished):
    config, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["test_accuracy"] > 0.2  # chance is 0.1
    assert abs(summary["sparsity"] - 0.9) < 0.005
    assert set(summary["bytes"]) == {"params", "grads", "opt_state", "topology"}
    assert summary["step_time_s"] > 0
    assert summary["adapt_time_s"] > 0
    assert 0 < summary["accepted_growth"] <= 1
    assert 0 <= summary["collateral"] < 1
    assert 0.1 < summary["exploration"] < 1
    # Training costs more than inference for 5 adaptations in 30 steps, each with one dense weight gradient.
    assert 0.1 < summary["flops"]["inference_ratio"] < summary["flops"]["train_ratio"] < 0.3
    assert summary["adaptations"] == 5  # steps 4, 8, ..., 20 of 30, T_end = 24
    assert Config.from_json(summary["config"]) == config


def test_metrics_are_one_object_a_line(finished):
    _, workdir, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in lines if e["kind"] == "eval"] == [10, 20, 30]
    adapts = [e for e in lines if e["kind"] == "adapt"]
    assert [e["step"] for e in adapts] == [4, 8, 12, 16, 20]
    assert set(adapts[0]["layers"]) == {"conv_1", "conv_2", "conv_3"}
    assert adapts[-1]["exploration"] >= adapts[0]["exploration"]


def test_the_curves_are_drawn(finished):
    _, workdir, _ = finished
    assert curves.draw(workdir, "title").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_resumes_to_the_same_bits(finished, digits, tmp_path):
    config, workdir, _ = finished
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run.run(config, digits, broken, resume=False, progress=Silent(interrupt_after=20))
    progress = Silent()
    summary = run.run(config, digits, broken, resume=True, progress=progress)
    assert progress.steps[0] in (10, 20)  # a checkpoint is written in the background: the last may not be complete
    assert summary["resumed_at_step"] == progress.steps[0]
    ours, theirs = checkpoint.restore(broken), checkpoint.restore(workdir)
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, ours.extra, theirs.extra)

    def without_times(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in e.items() if k != "seconds"} for e in lines if e["kind"] in ("adapt", "eval")]

    assert without_times(broken) == without_times(workdir)


def test_a_finished_run_is_not_trained_again(finished, digits):
    config, workdir, summary = finished
    progress = Silent()
    again = run.run(config, digits, workdir, resume=True, progress=progress)
    assert progress.steps == [30]
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert again["step_time_s"] == summary["step_time_s"]


def test_another_configuration_is_refused_and_nothing_overwritten(finished, digits):
    config, workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    other = dataclasses.replace(config, sparsity=0.8)
    with pytest.raises(ValueError, match="sparsity"):
        run.run(other, digits, workdir, resume=True, progress=Silent())
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


def test_a_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(ValueError, match="batch_size=1000 is more than the 480 images"):
        run.for_dataset(dataclasses.replace(CONFIG, batch_size=1000), digits)


def test_telemetry_counts_the_arrays(finished):
    _, workdir, summary = finished
    restored = checkpoint.restore(workdir)
    active = count_active(restored.state)
    assert sum(active.values()) == summary["num_active"]
    for path, layout in layouts(restored.state.topology).items():
        validate(layout)
        assert active[path] == layout.num_active == active_positions(layout).size
    nbytes = count_bytes(restored.state)
    assert nbytes["params"] == sum(leaf.nbytes for leaf in jax.tree.leaves(restored.state.params))
    assert nbytes["grads"] == nbytes["params"]
    explored = Explored(restored.extra)
    explored.update(restored.state)
    assert explored.share() == summary["exploration"]


def test_dense_and_static_runs(digits, tmp_path):
    for method in ("dense", "ssb"):
        config = run.for_dataset(dataclasses.replace(CONFIG, method=method, epochs=1), digits)
        summary = run.run(config, digits, tmp_path / method, resume=False, progress=Silent())
        assert summary["accepted_growth"] is None
        assert np.isclose(summary["sparsity"], 0.9 if method == "ssb" else 0.0, atol=0.005)
        curves.draw(tmp_path / method, method)
