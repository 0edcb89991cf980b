"""Checkpoints of any tree: bits survive, and the newest whole step is found whatever was killed."""

import contextlib
import itertools
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsb_jax.checkpoint import CheckpointError, Checkpoints, find_step, restore
from tests.checkpoint_examples import CONFIG, LIKE, bits, make_state, save_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "saved")


@pytest.fixture
def run(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_every_bit_survives_and_nothing_is_printed(tmp_path, capfd, caplog):
    rng = np.random.default_rng(1)

    def any_bits(leaf):  # every nan, infinity and subnormal there is
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.array(np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape))
        return leaf

    state = jax.tree.map(any_bits, make_state(7))
    expected = bits(state)
    extra = {"half": np.arange(-3, 3).astype(jnp.bfloat16), "nested": {"a.b/c": np.array([[-0.0, np.nan]])}}
    host = {"accuracy": 0.1 + 0.2, "best": None, "name": "\u00e4"}
    with Checkpoints(tmp_path / "new" / "run", CONFIG) as checkpoints:
        checkpoints.save(state, step=7, test_accuracy=0.5, extra=extra, host=host)
        want_extra = bits(extra)
        extra["half"] += 1  # what is written was copied
        jax.tree.map(lambda leaf: leaf.delete(), state["params"])
    restored, stored = restore(tmp_path / "new" / "run", LIKE)
    assert bits(restored) == expected
    assert (bits(stored.extra), stored.host, stored.config) == (want_extra, host, CONFIG)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(restored))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that cannot be donated
        jax.jit(lambda x: x + 1, donate_argnums=0)(restored["params"]["fc"]["blocks"])
    assert restored["params"]["fc"]["blocks"].is_deleted()
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "q?", "{x}", "[!a]", "50%20", "a#b", "\u00e4 b"])
def test_any_name_of_a_folder(name, tmp_path):
    for decoy in ("lr0", "lr1", "aXb", "qX", "x", "b"):  # what the name means as a pattern
        (tmp_path / decoy).mkdir()
    with Checkpoints(tmp_path / name, CONFIG) as checkpoints:
        checkpoints.save(make_state(1), step=1, test_accuracy=0.5)
    assert bits(restore(tmp_path / name, LIKE)[0]) == bits(make_state(1))


def test_the_last_and_the_best_stay(tmp_path):
    accuracies = {1: 0.3, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1, 6: 0.2}
    with Checkpoints(tmp_path, CONFIG, keep_last=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step, accuracy in accuracies.items():
            checkpoints.save(make_state(step), step=step, test_accuracy=accuracy)
            assert checkpoints.latest_step() == step
        checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5", "6"]
    assert find_step(tmp_path).name == "6"
    assert find_step(tmp_path, best=True).name == "3"  # of equals the later
    with Checkpoints(tmp_path, CONFIG, keep_last=1) as checkpoints:  # the best is known after reopening
        assert checkpoints.latest_step() == 6
        checkpoints.save(make_state(7), step=7, test_accuracy=0.8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "7"]


def test_restores_from_any_path_into_a_run(run, tmp_path):
    lone = shutil.copytree(run / "checkpoints" / "2", tmp_path / "sent_by_mail")
    steps = {run: 5, str(run): 5, run / "checkpoints": 5, run / "checkpoints" / "2": 2, lone: 2}
    assert {path: int(restore(path, LIKE)[0]["step"]) for path in steps} == steps
    assert restore(run, LIKE, step=2)[1].host == {"n": 2}
    assert find_step(run / "checkpoints", best=True).name == "2"


def test_stock_orbax_reads_the_state(run):
    like = {name: LIKE[name] for name in ("params", "topology", "step")}
    stock = ocp.PyTreeCheckpointer().restore(
        run / "checkpoints" / "5" / "state", args=ocp.args.PyTreeRestore(like, partial_restore=True)
    )
    assert bits(stock) == bits({name: make_state(5)[name] for name in like})


def test_a_save_that_was_killed_is_ignored_and_cleaned_away(run):
    for step in (7, 9):
        shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / f"{step}.orbax-checkpoint-tmp")
    assert find_step(run).name == "5"
    with Checkpoints(run, CONFIG) as checkpoints:
        checkpoints.save(make_state(7), step=7, test_accuracy=0.1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "5", "7"]


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def names(step):
    return sorted(path.name for path in step.iterdir())


def test_whatever_is_left_of_an_old_step_the_newest_whole_one_is_found(run):
    """Orbax removes the files of an old step in any order, and a process can be killed in between."""
    old, aside = run / "checkpoints" / "2", run / "aside"
    items = ["checksums", "config", "extra", "host", "keys", "metrics", "state"]
    old.rename(aside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in range(len(items)):
            for left in itertools.combinations(items, count):
                old.mkdir()
                for name in left:
                    (aside / name).rename(old / name)
                assert find_step(run).name == "5"
                assert find_step(run, best=True).name == "5"
                for name in left:
                    (old / name).rename(aside / name)
                old.rmdir()


@pytest.mark.parametrize("item", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_a_step_is_whole_without_what_orbax_notes_for_itself(item, run):
    (run / "checkpoints" / "2" / item).unlink(missing_ok=True)
    with Checkpoints(run, CONFIG) as checkpoints:
        checkpoints.save(make_state(6), step=6, test_accuracy=0.1)
    assert [int(restore(run, LIKE, step=step)[0]["step"]) for step in (2, 5, 6)] == [2, 5, 6]


@pytest.mark.parametrize("item", ["state", "config", "host", "keys", "checksums", "metrics", "extra", "all"])
def test_what_is_left_of_a_step_is_told_and_removed(item, run):
    old, expected = run / "checkpoints" / "2", bits(make_state(5))
    for name in names(old) if item == "all" else (item,):
        remove(old / name)
    with pytest.warns(UserWarning, match=rf"skipped 2 \(lacks {'config' if item == 'all' else item}/"):
        assert bits(restore(run, LIKE)[0]) == expected
    with pytest.raises(CheckpointError, match=r"/2/.* is missing, so the step is not whole.*Restore another"):
        restore(run, LIKE, step=2)
    with Checkpoints(run, CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert not old.exists()
        checkpoints.save(make_state(6), step=6, test_accuracy=0.9)
    assert bits(restore(run, LIKE)[0]) == bits(make_state(6))


def test_a_newest_step_that_is_not_whole_gives_way_to_the_one_before(run):
    remove(run / "checkpoints" / "5" / "checksums")
    with pytest.warns(UserWarning, match=r"skipped 5 \(lacks checksums/metadata\)"):
        assert int(restore(run, LIKE)[0]["step"]) == 2
    with Checkpoints(run, CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(make_state(4), step=4, test_accuracy=0.9)
    assert names(run / "checkpoints") == ["2", "4"]


def test_without_a_whole_step_there_is_an_error(run):
    remove(run / "checkpoints" / "2")
    remove(run / "checkpoints" / "5" / "metrics")
    for use in (lambda: restore(run, LIKE), lambda: Checkpoints(run, CONFIG)):
        with pytest.raises(CheckpointError, match=r"no whole checkpoint: 5 lacks metrics/metrics; .*train anew"):
            use()
    assert (run / "checkpoints" / "5").exists()


def test_closing_reads_back_what_was_written(run):
    checkpoints = Checkpoints(run, CONFIG)
    checkpoints.save(make_state(8), step=8, test_accuracy=0.1)
    checkpoints.wait()
    remove(run / "checkpoints" / "8" / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=r"/8 lacks state/manifest.ocdbt; it was not written to the end"):
        checkpoints.close()
    stack = contextlib.ExitStack()
    checkpoints = stack.enter_context(Checkpoints(run, CONFIG))
    checkpoints.save(make_state(9), step=9, test_accuracy=0.1)
    checkpoints.wait()
    remove(run / "checkpoints" / "9" / "state" / "manifest.ocdbt")
    interrupt = KeyboardInterrupt()
    assert not stack.__exit__(KeyboardInterrupt, interrupt, None)  # what one wants to see is the first exception


def test_refuses_to_save_what_cannot_be_restored(run, tmp_path):
    with pytest.raises(ValueError, match=r"keep_last=0.*give 1 or more"):
        Checkpoints(tmp_path / "new", CONFIG, keep_last=0)
    assert not (tmp_path / "new").exists()
    with Checkpoints(run, CONFIG) as checkpoints:
        with pytest.raises(CheckpointError, match=r"of step 5 already, so step 5 cannot be saved; compare with latest"):
            checkpoints.save(make_state(5), step=5, test_accuracy=0.5)
        with pytest.raises(TypeError, match="int64"):
            checkpoints.save(make_state(6), step=6, test_accuracy=0.5, host={"n": np.int64(1)})
    assert find_step(run).name == "5"


def test_workdir_with_files_of_something_else(tmp_path):
    file = tmp_path / "notes" / "thesis.tex"
    file.parent.mkdir()
    file.write_text("x")
    with pytest.raises(CheckpointError, match=r"holds 'notes/thesis.tex' but no run .*new or empty --workdir"):
        Checkpoints(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"cannot be written.*another --workdir|is a file"):
        Checkpoints(file / "run", CONFIG)


def test_nothing_to_restore(run, tmp_path):
    for path, words in (
        (tmp_path / "typo", r"typo does not exist; give the --workdir of a run"),
        (run / "config.json", r"config.json is a file; give the --workdir"),
        (tmp_path, r"holds no checkpoint; give the --workdir of a run that has saved one"),
    ):
        with pytest.raises(CheckpointError, match=words):
            restore(path, LIKE)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has 2, 5\."):
        restore(run, LIKE, step=3)
    with pytest.raises(CheckpointError, match=r"/5 is one step; give .*checkpoints to choose"):
        restore(run / "checkpoints" / "5", LIKE, step=2)
    with pytest.raises(ValueError, match="step=2 and best=True exclude"):
        restore(run, LIKE, step=2, best=True)
