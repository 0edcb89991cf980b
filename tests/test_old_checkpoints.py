"""Checkpoints of version 0.1: restored bit by bit, adapted to the same layouts, trained to the same losses.

`fixtures/write_checkpoints_8cce860.py` wrote the archive with the code of then, and what that code made of it.
"""

import json
import shutil
import tarfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.checkpoint import CheckpointError, Checkpoints
from dsb_jax.stored_step import by_name, read_step
from dsb_jax.topology import without_index
from dsb_jax.train import adapt_step, train_step
from dsb_jax.training import data
from dsb_jax.training.checkpoints import check_workdir, restore
from dsb_jax.training.old_checkpoints import renamed
from tests.conftest import always

ARCHIVE = Path(__file__).parent / "fixtures" / "checkpoints_8cce860.tar.xz"
RUNS = ("dsb", "dsb_block", "ssb", "rigl", "set", "dense")
GOING_ON = ("dsb_block", "rigl", "dense")  # the others share their code


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="module")
def expected(old):
    return json.loads((old / "expected.json").read_text())


@pytest.fixture(scope="module")
def batches():
    digits = data.load("digits")
    images = data.normalize(digits.train_inputs[:96], digits.mean, digits.std).reshape(3, 32, 8, 8, 1)
    return images, jnp.asarray(digits.train_labels[:96]).reshape(3, 32)


def old_name(name):
    if name.startswith("topology/"):
        return name.replace("/blocks/layout/", "/layout/")
    return name.removeprefix("collections/")


def checksums(state):
    """CRC-32 of every array by the name that it had."""
    return {
        old_name(name): zlib.crc32(np.asarray(leaf).tobytes()) for name, leaf in by_name(without_index(state)).items()
    }


def go_on(restored, batches):
    """What `expected.json` says of one run, made by the code of today."""
    state, built = restored.state, restored.components
    found = {"adapted": {}, "losses": []}
    objects = {"model": built.model, "optimizer": built.optimizer, "loss": built.loss}
    images, labels = batches
    if built.method is not None and built.method.due(restored.step):
        state, _ = adapt_step(state, images[0], labels[0], method=built.method, **objects)
        found["adapted"] = checksums(state)
    for batch in zip(images, labels, strict=True):
        state, metrics = train_step(state, *batch, **objects)
        found["losses"].append(float(metrics["loss"]))
    return found | {"final_same_machine": checksums(state)}


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_restored(name, old, expected):
    restored = restore(old / name)
    assert (restored.step, restored.host, restored.config.feature_major) == (80, {"seconds": 12.5}, name != "dense")
    assert restored.state.key_impl == "threefry2x32"
    assert set(restored.extra) == ({"conv_1", "conv_2", "conv_3"} if name in ("dsb", "set") else set())
    assert checksums(restored.state) == expected[name]["restored"]


@pytest.mark.parametrize("name", always(GOING_ON[0], of=GOING_ON))
def test_an_old_run_goes_on(name, old, expected, batches):
    found, want = go_on(restore(old / name), batches), expected[name]
    assert (found["adapted"] != {}) == (name != "dense")
    assert found["adapted"] == want["adapted"]
    np.testing.assert_allclose(found["losses"], want["losses"], rtol=1e-4)


def test_an_old_run_is_resumed_and_its_next_step_has_the_names_of_today(old, tmp_path):
    run = Path(shutil.copytree(old / "dsb", tmp_path / "run"))
    config, step = check_workdir(run, restore(run).config, resume=True)
    state = restore(run).state
    with Checkpoints(run, config.to_json()) as checkpoints:
        checkpoints.save(state, step=81, test_accuracy=0.5)
    assert (step, restore(run).step, restore(run, step=80).step) == (80, 80, 80)  # state.step
    assert (run / "config.json").exists()
    assert (run / "checkpoints" / "81" / "config").exists()
    assert checksums(restore(run).state) == checksums(state)


def test_what_a_method_kept_beside_a_layout_is_refused(old):
    stored = read_step(old / "ssb" / "checkpoints" / "80", "")
    beside = {**stored.arrays, "topology/conv_1/forward_mask": np.ones((7, 1, 1), bool)}
    with pytest.raises(CheckpointError, match="topology/conv_1/forward_mask lies beside a layout as version 0"):
        renamed(stored._replace(arrays=beside))
    assert "topology/conv_1/blocks/layout/out_idx" in renamed(stored).arrays
