"""Checkpoints: bits survive, a resumed run is the same run, and damage of any kind ends in one clear error."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsb_jax.adapt import adapt_step
from dsb_jax.checkpoint import CheckpointError, Checkpoints, check_workdir, restore
from dsb_jax.layout import random_layout
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state, layouts, with_layouts
from dsb_jax.training.config import Recipe, assemble

# Two sparse layers are enough, and random growth compiles fastest.
RECIPE = Recipe(
    batch_size=4, total_steps=40, grow="random", implementation="xla", keep_dense=("stem", "head", "conv_1")
)
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(4, dtype=np.int32)


def abstract_state(recipe):
    assembly = assemble(recipe)
    images = jax.ShapeDtypeStruct((1, *recipe.image_shape), jnp.float32)
    return jax.eval_shape(
        lambda key: create_train_state(assembly.model, assembly.optimizer, key, images), jax.random.key(0)
    )


def make_state(recipe, *, any_bits=False, step=0):
    """A state of random weights, or with `any_bits` of random bits: every nan, infinity and subnormal there is."""
    rng = np.random.default_rng(1)

    def fill(leaf):
        if any_bits:
            return np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape)
        values = rng.normal(size=leaf.shape) * 0.05 if jnp.issubdtype(leaf.dtype, jnp.floating) else rng.integers(0, 2)
        return np.broadcast_to(values, leaf.shape).astype(leaf.dtype)

    abstract = abstract_state(recipe)
    state = dataclasses.replace(jax.tree.map(fill, abstract), step=np.array(step, np.int32))
    new = {
        path: random_layout(jax.random.key(2), old.shape, block_shape=old.block_shape, num_blocks=old.num_blocks)
        for path, old in layouts(abstract.topology).items()
    }
    return jax.tree.map(jnp.array, dataclasses.replace(state, topology=with_layouts(state.topology, new)))


def train(state, steps):
    a = assemble(RECIPE)
    for _ in range(steps):
        state, _ = train_step(state, IMAGES, LABELS, model=a.model, optimizer=a.optimizer, loss=a.loss)
    return state


def adapt(state):
    a = assemble(RECIPE)
    return adapt_step(state, IMAGES, LABELS, model=a.model, method=a.method, optimizer=a.optimizer, loss=a.loss)[0]


def bits(tree):
    """Every leaf as dtype, shape and bytes, and the structure with its static parts."""
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)], jax.tree.structure(tree)


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


@pytest.fixture(scope="module")
def state():
    return make_state(RECIPE)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run with checkpoints of steps 2 and 5, the first the better; copied before it is damaged."""
    workdir = tmp_path_factory.mktemp("runs") / "saved"
    with Checkpoints(workdir, RECIPE) as checkpoints:
        for step, accuracy in ((2, 0.75), (5, 0.5)):
            extra = {"a/b": np.arange(9, dtype=np.uint8)}
            checkpoints.save(at_step(state, step), test_accuracy=accuracy, extra=extra, host={"n": step})
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_save_copies_before_the_state_is_donated_and_a_resumed_run_has_the_same_bits(state, tmp_path):
    state = adapt(train(jax.tree.map(jnp.copy, state), 2))
    extra, host = {"conv_3": np.arange(5, dtype=np.uint8)}, {"seconds": 0.1, "list": [1]}
    expected = bits((state, extra))
    with Checkpoints(tmp_path, RECIPE) as checkpoints:
        checkpoints.save(state, test_accuracy=0.5, extra=extra, host=host)
        donated, state = state, train(state, 1)  # while the save is being written
        assert donated.params["conv_3"]["blocks"].is_deleted()
        extra["conv_3"] += 1
        host["list"].append(2)
        state = adapt(train(state, 1))
    restored = restore(tmp_path)
    assert bits((restored.state, restored.extra)) == expected
    assert restored.host == {"seconds": 0.1, "list": [1]}
    assert (restored.recipe, restored.assembly, restored.step) == (RECIPE, assemble(RECIPE), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that cannot be donated
        resumed = train(restored.state, 1)
    assert restored.state.params["conv_3"]["blocks"].is_deleted()
    assert bits(adapt(train(resumed, 1))) == bits(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_bit_survives_and_nothing_is_printed(optimizer, dtype, tmp_path, capfd, caplog):
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, dtype=dtype)
    state = make_state(recipe, any_bits=True, step=7)
    extra = {"half": np.arange(-3, 3).astype(jnp.bfloat16), "nested": {"a.b/c": np.array([[-0.0, np.nan]])}}
    host = {"accuracy": 0.1 + 0.2, "best": None, "name": "\u00e4"}
    with Checkpoints(tmp_path / "new" / "run", recipe) as checkpoints:
        checkpoints.save(state, test_accuracy=0.5, extra=extra, host=host)
    restored = restore(tmp_path / "new" / "run")
    assert bits(restored.state) == bits(state)
    assert bits(restored.extra) == bits(extra)
    assert restored.host == host
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(restored.state))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_dense_run_without_telemetry(tmp_path):
    recipe = dataclasses.replace(RECIPE, method="dense")
    state = make_state(recipe)
    with Checkpoints(tmp_path, recipe) as checkpoints:
        checkpoints.save(state, test_accuracy=0.5)
    restored = restore(tmp_path)
    assert bits(restored.state) == bits(state)
    assert (restored.extra, restored.host, restored.state.topology) == ({}, {}, {})


def test_the_last_and_the_best_stay(state, tmp_path):
    accuracies = {1: 0.3, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1, 6: 0.2}
    with Checkpoints(tmp_path, RECIPE, keep_last=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step, accuracy in accuracies.items():
            checkpoints.save(at_step(state, step), test_accuracy=accuracy)
            assert checkpoints.latest_step() == step
        checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5", "6"]
    assert restore(tmp_path).step == 6
    assert restore(tmp_path, best=True).step == 3  # of equals the later
    with Checkpoints(tmp_path, RECIPE, keep_last=1) as checkpoints:  # the best is known after reopening
        assert checkpoints.latest_step() == 6
        checkpoints.save(at_step(state, 7), test_accuracy=0.8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "7"]


def test_restores_from_any_path_into_a_run(run, tmp_path):
    lone = shutil.copytree(run / "checkpoints" / "2", tmp_path / "sent_by_mail")
    steps = {run: 5, str(run): 5, run / "checkpoints": 5, run / "checkpoints" / "2": 2, lone: 2}
    assert {path: restore(path).step for path in steps} == steps
    assert restore(run, step=2).host == {"n": 2}
    assert restore(run / "checkpoints", best=True).step == 2


def test_restores_with_another_implementation(run):
    restored = restore(run, implementation="dense")
    assert restored.recipe == dataclasses.replace(RECIPE, implementation="dense")
    assert restored.assembly == assemble(restored.recipe)
    with pytest.raises(ValueError, match="implementation='fast'"):
        restore(run, implementation="fast")


def test_stock_orbax_reads_the_state(run, state):
    stock = ocp.StandardCheckpointer().restore(run / "checkpoints" / "5" / "state", abstract_state(RECIPE))
    assert bits(stock) == bits(at_step(state, 5))


def test_a_save_that_was_killed_is_ignored_and_cleaned_away(run, state):
    for step in (7, 9):
        shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / f"{step}.orbax-checkpoint-tmp")
    assert check_workdir(run, RECIPE, resume=True) == 5
    assert restore(run).step == 5
    with Checkpoints(run, RECIPE) as checkpoints:
        checkpoints.save(at_step(state, 7), test_accuracy=0.1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "5", "7"]


def test_refuses_to_save_what_cannot_be_restored(run, state, tmp_path):
    with pytest.raises(ValueError, match=r"keep_last=0.*give 1 or more"):
        Checkpoints(tmp_path / "new", RECIPE, keep_last=0)
    assert not (tmp_path / "new").exists()
    with Checkpoints(run, RECIPE) as checkpoints:
        with pytest.raises(CheckpointError, match=r"of step 5 already, so step 0 cannot be saved; compare with latest"):
            checkpoints.save(state, test_accuracy=0.5)
        with pytest.raises(TypeError, match="int64"):
            checkpoints.save(at_step(state, 6), test_accuracy=0.5, host={"n": np.int64(1)})
    assert restore(run).step == 5


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_workdir_that_is_new_or_empty(tmp_path):
    for resume in (False, True):
        assert check_workdir(tmp_path / "new", RECIPE, resume=resume) is None
        assert check_workdir(tmp_path, RECIPE, resume=resume) is None
    assert not (tmp_path / "new").exists()


def test_workdir_of_the_same_run(run):
    before = contents(run)
    assert check_workdir(run, RECIPE, resume=True) == 5
    with pytest.raises(CheckpointError, match=r"run of this recipe already, at step 5; add --resume .* --workdir"):
        check_workdir(run, RECIPE, resume=False)
    assert contents(run) == before


def test_workdir_of_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path):
    Checkpoints(tmp_path, RECIPE).close()
    assert Recipe.from_json(json.loads((tmp_path / "recipe.json").read_text())) == RECIPE
    assert check_workdir(tmp_path, RECIPE, resume=True) is None
    with pytest.raises(CheckpointError, match="at step 0; add --resume"):
        check_workdir(tmp_path, RECIPE, resume=False)
    with pytest.raises(CheckpointError, match="seed is 0 there and 1 here"):
        check_workdir(tmp_path, dataclasses.replace(RECIPE, seed=1), resume=True)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"recipe.json is damaged \(JSONDecodeError.*another --workdir"):
        check_workdir(tmp_path, RECIPE, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_workdir_of_another_recipe_is_left_alone(run, resume):
    other = dataclasses.replace(RECIPE, sparsity=0.5, learning_rate=1.0)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"sparsity is 0.9 there and 0.5 here.\nNothing was changed.*--workdir"):
        check_workdir(run, other, resume=resume)
    with pytest.raises(CheckpointError, match=r"sparsity is 0\.9 there"):
        Checkpoints(run, other)
    assert contents(run) == before


def test_only_the_implementation_may_differ_when_resuming(run):
    for field in dataclasses.fields(Recipe):
        other = dataclasses.replace(RECIPE, **{field.name: "other"})
        if field.name == "implementation":
            assert check_workdir(run, other, resume=True) == 5
        else:
            with pytest.raises(CheckpointError, match=rf"{field.name} is (?s:.*)only implementation may differ"):
                check_workdir(run, other, resume=True)


def test_workdir_with_files_of_something_else(tmp_path):
    file = tmp_path / "notes" / "thesis.tex"
    file.parent.mkdir()
    file.write_text("x")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"holds 'notes/thesis.tex' but no run .*new or empty --workdir"):
            check_workdir(tmp_path, RECIPE, resume=resume)
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        check_workdir(file, RECIPE, resume=False)
    with pytest.raises(CheckpointError, match=r"cannot be written.*another --workdir"):
        Checkpoints(file / "run", RECIPE)


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


INDICES = "state/topology/conv_3/layout/in_idx"
DAMAGE = {
    "recipe deleted": (lambda s: shutil.rmtree(s / "recipe"), r"/5/recipe/metadata is missing"),
    "recipe cut": (lambda s: cut(s / "recipe" / "metadata"), r"/5/recipe/metadata is damaged \(JSONDecodeError"),
    "recipe a list": (lambda s: (s / "recipe" / "metadata").write_text("[]"), r"recipe/metadata holds '\[\]', not"),
    "recipe field unknown": (lambda s: edit(s, "recipe", depth=3), r"no recipe of this version .*\['depth'\]"),
    "recipe field missing": (lambda s: edit(s, "recipe", seed="removed"), r"no recipe of this version .*\['seed'\]"),
    "recipe value unknown": (lambda s: edit(s, "recipe", model="vgg"), r"/5/recipe makes no model .*model='vgg'"),
    "recipe value of another type": (lambda s: edit(s, "recipe", sparsity="0.9"), r"/5/recipe makes no model"),
    "recipe value out of range": (lambda s: edit(s, "recipe", seed=2**70), r"/5/recipe makes no model"),
    "recipe of another width": (
        lambda s: edit(s, "recipe", block_shape=[32, 8]),
        r"params/conv_2/blocks is float32\[29, 16, 16\], but float32\[29, 32, 8\] in the model.*another model",
    ),
    "recipe of another model": (lambda s: edit(s, "recipe", method="dense"), r"conv_2/kernel is absent, but float32"),
    "recipe of another optimizer": (lambda s: edit(s, "recipe", optimizer="adamw"), r"0/count is absent, but int32"),
    "recipe edited": (lambda s: edit(s, "recipe", momentum=0.5), r"recipe has checksum \d+, but \d+ was saved"),
    "host edited": (lambda s: edit(s, "host", n=6), r"host has checksum"),
    "checksum edited": (lambda s: edit(s, "checksums", **{INDICES: 1}), rf"/5: {INDICES} has checksum \d+, but 1 was"),
    "checksums deleted": (lambda s: shutil.rmtree(s / "checksums"), r"/5/checksums/metadata is missing"),
    "state deleted": (lambda s: shutil.rmtree(s / "state"), r"/5/state is missing or incomplete"),
    "tree deleted": (lambda s: (s / "state" / "_METADATA").unlink(), r"/5/state is missing or incomplete"),
    "manifest cut": (lambda s: cut(s / "state" / "manifest.ocdbt"), r"/5/state is damaged .*DATA_LOSS"),
    "arrays deleted": (lambda s: largest(s).unlink(), r"/5/state is damaged"),
    "arrays cut": (lambda s: cut(largest(s)), r"/5/state is damaged .*OUT_OF_RANGE"),
    "one bit flipped": (lambda s: flip_a_bit(largest(s)), r"/5: state/.* has checksum|/5/state is damaged"),
    "extra deleted": (lambda s: shutil.rmtree(s / "extra"), r"/5/extra is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_ends_in_one_error_and_nothing_else_on_the_terminal(name, run, capfd):
    damage, words = DAMAGE[name]
    damage(run / "checkpoints" / "5")
    with pytest.raises(CheckpointError, match=words) as caught:
        restore(run)
    message = str(caught.value).replace(str(run), "")
    assert len(message.splitlines()) <= 2
    assert len(message) < 500
    assert "Restore with step=2, or delete this step to resume from there." in message
    assert capfd.readouterr() == ("", "")
    assert restore(run, step=2).step == 2  # the cure works


def test_no_file_can_be_deleted_or_cut_without_an_error_or_the_same_bits(run, saved):
    expected = restore(run)
    step = run / "checkpoints" / "5"
    files = [path.relative_to(step) for path in step.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    for damage in (Path.unlink, cut):
        for file in files:
            damage(step / file)
            try:
                restored = restore(run)
            except CheckpointError:
                pass
            else:
                assert bits((restored.state, restored.extra)) == bits((expected.state, expected.extra))
                assert (restored.recipe, restored.host) == (expected.recipe, expected.host)
            shutil.copy2(saved / "checkpoints" / "5" / file, step / file)


def test_nothing_to_restore(run, tmp_path):
    for path, words in (
        (tmp_path / "typo", r"typo does not exist; give the --workdir of a run"),
        (run / "recipe.json", r"recipe.json is a file; give the --workdir"),
        (tmp_path, r"holds no checkpoint; give the --workdir of a run that has saved one"),
    ):
        with pytest.raises(CheckpointError, match=words):
            restore(path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has 2, 5\."):
        restore(run, step=3)
    with pytest.raises(CheckpointError, match=r"/5 is one step; give .*checkpoints to choose"):
        restore(run / "checkpoints" / "5", step=2)
    with pytest.raises(ValueError, match="step=2 and best=True exclude"):
        restore(run, step=2, best=True)


def test_metrics_that_are_damaged(run):
    file = run / "checkpoints" / "2" / "metrics" / "metrics"
    for text, words in (("{", r"/2/metrics/metrics is damaged"), ('{"a": 1}', r"/2/metrics holds {.*no test_accuracy")):
        file.write_text(text)
        for use in (lambda: restore(run, best=True), lambda: Checkpoints(run, RECIPE)):
            with pytest.raises(CheckpointError, match=words):
                use()
    assert restore(run).step == 5


@pytest.mark.parametrize(
    ("field", "index", "value", "words"),
    [
        ("in_idx", (0, 0), 128 * 9, r"in_idx holds 1152, outside 0..1151"),
        ("in_idx", (0, 0), 65535, r"in_idx holds 65535"),
        ("in_idx", (0, 1), "repeat", r"in_idx repeats a column"),
        ("out_idx", (0, 0), 128, r"out_idx is not a permutation"),
        ("group_start", 1, 1000, r"group_start=.*does not cut"),
    ],
)
def test_a_bad_layout_is_found_before_an_index_is_used(field, index, value, words, state, tmp_path):
    layout = layouts(state.topology)[("conv_3",)]
    value = layout.in_idx[0, 0] if value == "repeat" else value
    bad = dataclasses.replace(layout, **{field: getattr(layout, field).at[index].set(value)})
    state = dataclasses.replace(state, topology=with_layouts(state.topology, {("conv_3",): bad}))
    with Checkpoints(tmp_path, RECIPE) as checkpoints:
        checkpoints.save(state, test_accuracy=0.5)
    with pytest.raises(CheckpointError, match=rf"/0: topology/conv_3: {words}.*train anew in another --workdir"):
        restore(tmp_path)
