"""Damage of any kind to a step ends in one clear error, or in the same bits."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsb_jax.checkpoint import CheckpointError, Checkpoints, find_step, restore
from dsb_jax.topology import LayerTopology
from tests.checkpoint_examples import CONFIG, LIKE, SPEC, bits, make_state, save_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "saved")


@pytest.fixture
def run(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def largest(step):
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def edit(step, item, **changes):
    file = step / item / "metadata"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "removed"}))


INDICES = "state/topology/fc/blocks/layout/in_idx"
DAMAGE = {
    "config cut": (lambda s: cut(s / "config" / "metadata"), r"/5/config/metadata is damaged \(JSONDecodeError"),
    "config a list": (lambda s: (s / "config" / "metadata").write_text("[]"), r"config/metadata holds '\[\]', not"),
    "config too deep": (
        lambda s: (s / "config" / "metadata").write_text("[" * 100_000),
        r"config/metadata is damaged \(RecursionError",
    ),
    "config edited": (lambda s: edit(s, "config", width=32), r"config has checksum \d+, but \d+ was saved"),
    "host edited": (lambda s: edit(s, "host", n=6), r"host has checksum"),
    "keys edited": (lambda s: edit(s, "keys", key="unsafe_rbg"), r"keys has checksum"),
    "checksum edited": (lambda s: edit(s, "checksums", **{INDICES: 1}), rf"/5: {INDICES} has checksum \d+, but 1 was"),
    "manifest cut": (lambda s: cut(s / "state" / "manifest.ocdbt"), r"/5/state is damaged .*DATA_LOSS"),
    "arrays deleted": (lambda s: largest(s / "state" / "ocdbt.process_0").unlink(), r"/5/state is damaged"),
    "arrays cut": (lambda s: cut(largest(s)), r"/5/state is damaged .*OUT_OF_RANGE"),
    "one bit flipped": (lambda s: flip_a_bit(largest(s)), r"/5: state/.* has checksum|/5/state is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_ends_in_one_error_and_nothing_else_on_the_terminal(name, run, capfd):
    damage, words = DAMAGE[name]
    damage(run / "checkpoints" / "5")
    with pytest.raises(CheckpointError, match=words) as caught:
        restore(run, LIKE)
    message = str(caught.value).replace(str(run), "")
    assert len(message.splitlines()) <= 2
    assert len(message) < 500
    assert "Restore with step=2, or delete this step to resume from there." in message
    assert capfd.readouterr() == ("", "")
    assert int(restore(run, LIKE, step=2)[0]["step"]) == 2  # the cure works


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": jnp.zeros((), jnp.int16)}, r"step is int32\[\], but int16\[\] in the model to be restored"),
        ({"more": jnp.zeros(3)}, r"more is absent, but float32\[3\]"),
        ({"params": {}}, r"params/fc/b.* is float32\[.*\], but absent"),
        ({"key": jax.random.key(0, impl="unsafe_rbg")}, r"key is a key of 'rbg', not of 'unsafe_rbg'; restore with"),
        ({"key": jax.random.key(0, impl="threefry2x32")}, r"key is uint32\[4\], but uint32\[2\]"),
    ],
)
def test_another_tree_is_refused(change, words, run):
    with pytest.raises(CheckpointError, match=words):
        restore(run, {**make_state(), **change})


def test_no_file_can_be_deleted_or_cut_without_an_error_or_the_same_bits(run, saved):
    expected, stored = restore(run, LIKE)
    step = run / "checkpoints" / "5"
    files = [path.relative_to(step) for path in step.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    for damage in (Path.unlink, cut):
        for file in files:
            damage(step / file)
            try:
                restored, again = restore(step, LIKE)
            except CheckpointError:
                pass
            else:
                assert bits((restored, again.extra)) == bits((expected, stored.extra))
                assert (again.config, again.host) == (stored.config, stored.host)
            shutil.copy2(saved / "checkpoints" / "5" / file, step / file)


def test_metrics_that_are_damaged(run):
    file = run / "checkpoints" / "2" / "metrics" / "metrics"
    for text, words in (("{", r"/2/metrics/metrics is damaged"), ('{"a": 1}', r"/2/metrics holds {.*no test_accuracy")):
        file.write_text(text)
        for use in (lambda: find_step(run, best=True), lambda: Checkpoints(run, CONFIG)):
            with pytest.raises(CheckpointError, match=words):
                use()
    assert find_step(run).name == "5"


@pytest.mark.parametrize(
    ("field", "index", "value", "words"),
    [
        ("in_idx", (0, 0), 128, r"in_idx holds 128, outside 0..127"),
        ("in_idx", (0, 0), 65535, r"in_idx holds 65535"),
        ("in_idx", (0, 1), "repeat", r"in_idx repeats a column"),
        ("out_idx", (0, 0), 64, r"out_idx is not a permutation"),
        ("group_start", 1, 1000, r"group_start=.*does not cut"),
    ],
)
def test_a_bad_layout_is_found_before_an_index_is_used(field, index, value, words, tmp_path):
    state = make_state()
    layout = state["topology"]["fc"]["blocks"].layout
    value = layout.in_idx[0, 0] if value == "repeat" else value
    bad = dataclasses.replace(layout, **{field: getattr(layout, field).at[index].set(value)})
    state["topology"]["fc"]["blocks"] = LayerTopology(bad, None, SPEC)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state, step=0, test_accuracy=0.5)
    with pytest.raises(CheckpointError, match=rf"/0: topology/.*fc/blocks: {words}.*train anew in another --workdir"):
        restore(tmp_path, LIKE)
