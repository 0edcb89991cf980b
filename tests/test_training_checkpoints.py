"""Checkpoints of whole runs: a resumed run is the same run, and a workdir of anything else is left alone."""

import dataclasses
import json
import shutil
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.checkpoint import CheckpointError, Checkpoints
from dsb_jax.methods import DSB
from dsb_jax.train import adapt_step, train_step
from dsb_jax.train_state import create_train_state
from dsb_jax.training.build import build, make_key
from dsb_jax.training.checkpoints import RESUMABLE_FIELDS, check_workdir, restore
from dsb_jax.training.config import Config
from tests.checkpoint_examples import bits

# Two sparse layers are enough, and random growth compiles fastest.
CONFIG = Config(
    batch_size=4,
    total_steps=40,
    grow="random",
    implementation="xla",
    keep_dense=("stem", "head", "conv_1"),
    feature_major=True,
)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(4, dtype=np.int32)


def make_state(config):
    built = build(config)
    key = jax.random.key(config.seed, impl="threefry2x32")
    return jax.jit(lambda key: create_train_state(built.model, built.optimizer, key, jnp.asarray(IMAGES)))(key)


def train(state, steps):
    a = build(CONFIG)
    for _ in range(steps):
        state, _ = train_step(state, IMAGES, LABELS, model=a.model, optimizer=a.optimizer, loss=a.loss)
    return state


def adapt(state):
    a = build(CONFIG)
    return adapt_step(state, IMAGES, LABELS, model=a.model, method=a.method, optimizer=a.optimizer, loss=a.loss)[0]


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


@pytest.fixture(scope="module")
def state():
    return make_state(CONFIG)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run with checkpoints of steps 2 and 5, the first the better."""
    workdir = tmp_path_factory.mktemp("runs") / "saved"
    with Checkpoints(workdir, CONFIG.to_json()) as checkpoints:
        for step, accuracy in ((2, 0.75), (5, 0.5)):
            checkpoints.save(at_step(state, step), step=step, test_accuracy=accuracy, host={"n": step})
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_save_copies_before_the_state_is_donated_and_a_resumed_run_has_the_same_bits(state, tmp_path):
    state = adapt(train(jax.tree.map(jnp.copy, state), 2))
    expected = bits(state)
    with Checkpoints(tmp_path, CONFIG.to_json()) as checkpoints:
        checkpoints.save(state, step=2, test_accuracy=0.5)
        donated, state = state, train(state, 1)  # while the save is being written
        assert donated.params["conv_3"]["blocks"].is_deleted()
        state = adapt(train(state, 1))
    restored = restore(tmp_path)
    assert bits(restored.state) == expected
    assert (restored.config, restored.components, restored.step) == (CONFIG, build(CONFIG), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that cannot be donated
        resumed = train(restored.state, 1)
    assert restored.state.params["conv_3"]["blocks"].is_deleted()
    assert bits(adapt(train(resumed, 1))) == bits(state)


@pytest.mark.parametrize("method", ["dense", "topkast", "rigl"])
def test_other_methods_come_back(method, tmp_path):
    config = dataclasses.replace(CONFIG, method=method, feature_major=method != "dense", weight_decay=0.01)
    state = make_state(config)
    with Checkpoints(tmp_path, config.to_json()) as checkpoints:
        checkpoints.save(state, step=0, test_accuracy=0.5)
    restored = restore(tmp_path)
    assert bits(restored.state) == bits(state)
    assert (restored.extra, restored.host) == ({}, {})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_no_setting_of_the_environment_decides_what_a_key_is(impl, state, saved, tmp_path):
    key = jax.random.key_data(jax.random.key(0, impl=impl))
    other = dataclasses.replace(state, key=key, key_impl=impl)
    with jax.default_prng_impl("rbg"):
        assert make_key(0).dtype == jax.random.key(0, impl="threefry2x32").dtype
        assert bits(restore(saved, step=2).state) == bits(at_step(state, 2))
        with Checkpoints(tmp_path, CONFIG.to_json()) as checkpoints:
            checkpoints.save(other, step=0, test_accuracy=0.5)
        restored = restore(tmp_path).state
    assert restored.key_impl == impl
    assert bits(restored) == bits(other)


def test_restores_with_another_implementation(run):
    restored = restore(run, implementation="dense")
    assert restored.config == dataclasses.replace(CONFIG, implementation="dense")
    assert restored.components == build(restored.config)
    with pytest.raises(ValueError, match="implementation='fast'"):
        restore(run, implementation="fast")


def edit_config(step, **changes):
    """Another config with a checksum that fits, as by somebody who means it."""
    file, sums = (step / item / "metadata" for item in ("config", "checksums"))
    values = {**json.loads(file.read_text()), **changes}
    values = {name: value for name, value in values.items() if value != "removed"}
    file.write_text(json.dumps(values))
    crc = zlib.crc32(json.dumps(values, sort_keys=True).encode())
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {"config": crc}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, r"no config of this version .*\['depth'\]"),
        ({"seed": "removed"}, r"no config of this version .*\['seed'\]"),
        ({"model": "vgg"}, r"/5/config makes no model .*model='vgg'"),
        ({"sparsity": "0.9"}, r"/5/config makes no model"),
        ({"seed": 2**70}, r"/5/config makes no model"),
        ({"block_shape": [32, 8]}, r"conv_2/blocks is float32\[29, 16, 16\], but float32\[29, 32, 8\] .*another model"),
        ({"method": "dense"}, r"conv_2/kernel is absent, but float32"),
        ({"optimizer": "adamw"}, r"0/count is absent, but int32"),
    ],
)
def test_a_config_of_another_model_is_refused(changes, words, run):
    edit_config(run / "checkpoints" / "5", **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        restore(run)
    assert "Restore with step=2, or delete this step to resume from there." in str(caught.value)
    assert restore(run, step=2).step == 2  # the cure works


def test_a_younger_field_may_be_missing(run):
    for field in ("anneal_fraction", "keep_grouping", "feature_major"):
        edit_config(run / "checkpoints" / "5", **{field: "removed"})
    assert restore(run).config == CONFIG  # implementation="xla" decides for feature-major
    assert isinstance(restore(run).components.method, DSB)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_workdir_that_is_new_or_empty(tmp_path):
    for resume in (False, True):
        assert check_workdir(tmp_path / "new", CONFIG, resume=resume) == (CONFIG, None)
        assert check_workdir(tmp_path, CONFIG, resume=resume) == (CONFIG, None)
    assert not (tmp_path / "new").exists()


def test_workdir_of_the_same_run(run):
    before = contents(run)
    assert check_workdir(run, CONFIG, resume=True) == (CONFIG, 5)
    with pytest.raises(CheckpointError, match=r"run of this config already, at step 5; add --resume .* --workdir"):
        check_workdir(run, CONFIG, resume=False)
    assert contents(run) == before


def test_workdir_of_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path):
    Checkpoints(tmp_path, CONFIG.to_json()).close()
    assert Config.from_json(json.loads((tmp_path / "config.json").read_text())) == CONFIG
    assert check_workdir(tmp_path, CONFIG, resume=True) == (CONFIG, None)
    with pytest.raises(CheckpointError, match="at step 0; add --resume"):
        check_workdir(tmp_path, CONFIG, resume=False)
    with pytest.raises(CheckpointError, match="seed is 0 there and 1 here"):
        check_workdir(tmp_path, dataclasses.replace(CONFIG, seed=1), resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged \(JSONDecodeError.*another --workdir"):
        check_workdir(tmp_path, CONFIG, resume=True)


TWO_DIFFER = (
    r"config: sparsity is 0.9 there and 0.5 here, learning_rate is 0.05 there and 1.0 here.\nNothing was changed. "
    "Give another --workdir, or sparsity=0.9, learning_rate=0.05 to resume that run"
)


def test_what_follows_from_the_number_of_steps_is_no_difference_of_its_own(run):
    other = dataclasses.replace(CONFIG, steps=7, epochs=1, total_steps=7)
    with pytest.raises(CheckpointError, match=r"config: steps is None there and 7 here.\nNothing"):
        check_workdir(run, other, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_workdir_of_another_config_is_left_alone(run, resume):
    other = dataclasses.replace(CONFIG, sparsity=0.5, learning_rate=1.0)
    before = contents(run)
    with pytest.raises(CheckpointError, match=TWO_DIFFER):
        check_workdir(run, other, resume=resume)
    assert contents(run) == before


def test_only_the_implementation_may_differ_when_resuming(run):
    assert RESUMABLE_FIELDS == ("implementation",)
    for field in dataclasses.fields(Config):
        other = dataclasses.replace(CONFIG, **{field.name: "other"})
        if field.name == "implementation":
            assert check_workdir(run, other, resume=True) == (other, 5)
        else:
            with pytest.raises(CheckpointError, match=rf"{field.name} is (?s:.*)only implementation may differ"):
                check_workdir(run, other, resume=True)


def test_the_order_of_activations_is_decided_once(run, tmp_path):
    undecided = dataclasses.replace(CONFIG, feature_major=None)
    assert check_workdir(tmp_path / "new", undecided, resume=False) == (CONFIG, None)
    for implementation in ("xla", "dense"):  # the second would decide otherwise
        config = dataclasses.replace(undecided, implementation=implementation)
        assert check_workdir(run, config, resume=True)[0].feature_major
    dense = dataclasses.replace(undecided, implementation="dense")
    assert not check_workdir(tmp_path / "new", dense, resume=False)[0].feature_major


def test_workdir_with_files_of_something_else(tmp_path):
    file = tmp_path / "notes" / "thesis.tex"
    file.parent.mkdir()
    file.write_text("x")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"holds 'notes/thesis.tex' but no run .*new or empty --workdir"):
            check_workdir(tmp_path, CONFIG, resume=resume)
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        check_workdir(file, CONFIG, resume=False)
