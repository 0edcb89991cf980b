"""Checkpoints: any tree of arrays on disk with Orbax, and back bit by bit, or an error that says what is damaged.

    workdir/
      config.json            the config of the run, from the moment it begins
      checkpoints/
        40/                  one step: complete as soon as it has this name
          state/             the tree, a stock Orbax pytree; of a TrainState params, opt_state, topology, ...
          extra/             telemetry arrays of the host (absent if there are none)
          config/, host/     JSON: the config, scalars of the host
          keys/              JSON: which arrays are data of PRNG keys, and of which implementation
          checksums/         JSON: CRC-32 of every array and of the other JSON
          metrics/           JSON: test_accuracy, by which the best step is kept

    with Checkpoints(workdir, {"width": 64}) as checkpoints:
        checkpoints.save(state, step=40, test_accuracy=0.97)
    state, stored = restore(workdir, jax.eval_shape(make_state))

Only host arrays are stored, copied off before `save` returns: the caller may donate the state at once, and a
checkpoint names no device, so one from a GPU restores on a machine without. A checkpoint is read onto the host and
checked there (structure, shapes, dtypes, checksums, every layout) before the first array goes to a device: an index
out of range is an error here, where a gather would clamp it.
"""

import functools
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from dsb_jax.paths import validate_topology
from dsb_jax.stored_step import CheckpointError as CheckpointError
from dsb_jax.stored_step import (
    StoredStep,
    brief,
    by_name,
    check_readable,
    checksums,
    config_item,
    fill,
    is_key,
    key_impls,
    missing_file,
    read_json,
    read_step,
)
from dsb_jax.topology import index_as, without_index

CHECKPOINTS = "checkpoints"
CONFIG_FILES = ("config.json", "recipe.json")  # the second was its name until version 0.1


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Orbax looks for what it has to merge by a glob of epath, which takes a `[` in the path for a pattern.

    The glob of pathlib, by which it is replaced, knows that only its argument is one.
    """

    def finalize(self, directory: Any) -> None:
        super().finalize(Path(directory))  # type: ignore[arg-type]


class Checkpoints:
    """The checkpoints of one run, written in the background; the last few and the best by test accuracy are kept.

    Open it before writing anything else into `workdir`, which otherwise holds files of no known run.
    """

    def __init__(self, workdir: str | os.PathLike[str], config: Mapping[str, Any], *, keep_last: int = 2):
        """Opens `workdir` for writing, creates it if need be and notes the config in it.

        Steps that are not whole, as a process leaves them that is killed while it removes an old one, are removed.

        Args:
          workdir: new, empty, or holding a run. Whether it is the same run is for the caller to know, as
            `dsb_jax.training.checkpoints.check_workdir` does.
          config: values that JSON can hold, saved with every step.
          keep_last: how many of the latest steps stay on disk, besides the best one.

        Raises:
          CheckpointError: if the directory holds anything else, no whole step among broken ones, or cannot be written.
          ValueError: if `keep_last` is below 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} keeps nothing to resume from; give 1 or more.")
        root = workdir_root(workdir)
        check_foreign(root)
        find_latest(root)
        whole, broken = steps(root / CHECKPOINTS)
        for directory in whole.values():
            _step_accuracy(directory)  # Orbax reads them too, but does not say which one is damaged
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,
            preservation_policy=AnyPreservationPolicy([LatestN(keep_last), BestN(get_metric_fn=_accuracy, n=1)]),
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
        )
        self._config = json.loads(json.dumps(dict(config)))
        try:
            (root / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            for directory in broken:
                shutil.rmtree(directory)
            if not (root / CONFIG_FILES[0]).exists():
                draft = root / f".{CONFIG_FILES[0]}"
                draft.write_text(json.dumps(self._config, indent=1) + "\n")
                draft.replace(root / CONFIG_FILES[0])
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            for item in ("state", "extra"):
                registry.add(item, ocp.args.StandardSave, _ArraysHandler())
            self._orbax = ocp.CheckpointManager(root / CHECKPOINTS, options=options, handler_registry=registry)
        except (OSError, ValueError) as error:
            what = "cannot be written" if isinstance(error, OSError) else "holds a damaged step"
            raise CheckpointError(f"{root} {what} ({brief(error)}); give another --workdir.") from error
        self._directory = root / CHECKPOINTS

    def save(
        self,
        state: Any,
        *,
        step: int,
        test_accuracy: float,
        extra: Mapping[str, Any] | None = None,
        host: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state` as `step`; returns when everything is copied, before it is written.

        The caller may donate the state and change `extra` and `host` at once. A save waits for the one before it.

        Args:
          state: a tree of arrays, typed PRNG keys and `LayerTopology` nodes.
          step: steps done; above that of the save before.
          test_accuracy: by which the best step is kept; nan counts as the worst.
          extra: nested dicts of numpy arrays.
          host: values that JSON can hold.

        Raises:
          CheckpointError: if there is a checkpoint of this step or a later one already.
          TypeError: if `host` holds what JSON cannot. And whatever stopped the save before this one, say a full disk.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self._directory} has a checkpoint of step {latest} already, so step {step} cannot be saved; "
                "compare with latest_step() before saving."
            )
        state = without_index(state)  # made anew where the state is restored
        arrays, telemetry = _copy_to_host(state), _copy_to_host(dict(extra or {}))
        texts = {"config": self._config, "host": json.loads(json.dumps(dict(host or {}))), "keys": key_impls(state)}
        items = {
            "state": ocp.args.StandardSave(arrays),
            **{name: ocp.args.JsonSave(values) for name, values in texts.items()},
            "checksums": ocp.args.JsonSave(checksums(by_name({"state": arrays, "extra": telemetry}), **texts)),
        }
        if jax.tree.leaves(telemetry):  # Orbax does not store a tree without leaves
            items["extra"] = ocp.args.StandardSave(telemetry)
        self._orbax.save(step, args=ocp.args.Composite(**items), metrics={"test_accuracy": float(test_accuracy)})

    def latest_step(self) -> int | None:
        """The last step that was saved or is being written; None if there is none."""
        return self._orbax.latest_step()

    def wait(self) -> None:
        """Returns when everything is on disk, or raises what stopped it."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Waits, ends the background threads, and sees to it that the last step can be read.

        Raises:
          CheckpointError: if it cannot, say because someone removed files of it.
        """
        latest = self.latest_step()
        self._orbax.close()
        if latest is not None:
            check_readable(self._directory / str(latest), "Nothing can be resumed from it; train anew elsewhere.")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._orbax.close()  # what went wrong already is the news


def workdir_root(workdir: str | os.PathLike[str]) -> Path:
    """The absolute path of a working directory, `~` expanded."""
    return Path(workdir).expanduser().absolute()


def check_foreign(root: Path) -> bool:
    """Whether a working directory holds a run already; files that are of no run are a CheckpointError."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give a directory as --workdir.")
    if any((root / name).exists() for name in CONFIG_FILES) or any(steps(root / CHECKPOINTS)):
        return True
    drafts = [root / f".{name}" for name in CONFIG_FILES]  # of a run that was killed while it noted its config
    foreign = next((file for file in root.rglob("*") if not file.is_dir() and file not in drafts), None)
    if foreign is None:
        return False
    name = str(foreign.relative_to(root))
    raise CheckpointError(f"{root} holds {name!r} but no run of dsb_jax; give a new or empty --workdir.")


def steps(directory: Path) -> tuple[dict[int, Path], list[Path]]:
    """The whole steps in a `checkpoints` directory, and the directories of steps that are not whole."""
    if not directory.is_dir():
        return {}, []
    try:
        named = sorted((int(e.name), e) for e in directory.iterdir() if e.name.isdecimal() and e.is_dir())
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({brief(error)}); check its permissions.") from error
    whole = {number: path for number, path in named if missing_file(path) is None}
    return whole, [path for number, path in named if number not in whole]


def find_latest(root: Path) -> Path | None:
    """The directory of the latest whole step of a run; None if no step was ever finished.

    Steps that are not whole are skipped, as those that were being removed when the process was killed.

    Raises:
      CheckpointError: if there are steps, but none that is whole.
    """
    checkpoints = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    whole, broken = steps(checkpoints)
    if broken and not whole:
        raise CheckpointError(
            f"{checkpoints} holds no whole checkpoint: {broken[-1].name} lacks {missing_file(broken[-1])}; "
            "restore another run, or train anew in another --workdir."
        )
    return whole[max(whole)] if whole else None


def find_step(path: str | os.PathLike[str], *, step: int | None = None, best: bool = False) -> Path:
    """The directory of the step that is meant, by default the latest whole one.

    Args:
      path: a working directory, its `checkpoints` directory, or the directory of one step, wherever it lies.
      step: which one.
      best: the one of highest test accuracy instead (of equals the latest).

    Raises:
      CheckpointError: if there is none, or the one that is named is not whole.
      ValueError: if `step` and `best` are both given.
    """
    if step is not None and best:
        raise ValueError(f"step={step} and best=True exclude each other; give one of them.")
    root = workdir_root(path)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise CheckpointError(f"{root} {what}; give the --workdir of a run, its {CHECKPOINTS}, or one step in there.")
    if (root / "state").exists() or (root / config_item(root)).exists():
        if step is not None or best:
            raise CheckpointError(f"{root} is one step; give {root.parent} to choose among steps.")
        return _whole(root)
    latest = find_latest(root)
    if latest is None:
        raise CheckpointError(
            f"{root} holds no checkpoint; give the --workdir of a run that has saved one, or the directory of a step."
        )
    whole, broken = steps(latest.parent)
    if step is not None:
        if (latest.parent / str(step)) in broken:
            return _whole(latest.parent / str(step))
        if step not in whole:
            raise CheckpointError(f"{root} has no checkpoint of step {step}; it has {', '.join(map(str, whole))}.")
        return whole[step]
    if broken:
        warnings.warn(
            f"{latest.parent}: skipped {', '.join(f'{b.name} (lacks {missing_file(b)})' for b in broken)}, which "
            "is not whole; a resumed run removes it.",
            stacklevel=3,
        )
    return whole[max(whole, key=lambda number: (_step_accuracy(whole[number]), number))] if best else latest


def restore(
    path: str | os.PathLike[str], like: Any, *, step: int | None = None, best: bool = False
) -> tuple[Any, StoredStep]:
    """Restores a tree, all of it checked.

    Args:
      path: a working directory, its `checkpoints` directory, or the directory of one step, wherever it lies.
      like: the tree, of arrays or of `jax.ShapeDtypeStruct`, as `jax.eval_shape` makes it.
      step: which one; by default the latest.
      best: the one of highest test accuracy instead (of equals the latest).

    Returns:
      The tree on the default device, and what else was saved with it.

    Raises:
      CheckpointError: if there is none, or what is there is damaged, foreign, or of another tree.
      ValueError: if `step` and `best` are both given.
    """
    directory = find_step(path, step=step, best=best)
    stored = read_step(directory, cure(directory))
    return to_device(fill(like, stored, cure(directory)), directory, like), stored


def to_device(state: Any, directory: Path, like: Any) -> Any:
    """A restored tree on the default device, after its layouts were validated, with the indexes that `like` has."""
    try:
        validate_topology(getattr(state, "topology", state))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error} {cure(directory)}") from error
    # Copied: a buffer that belongs to numpy cannot be donated.
    state = jax.tree.map(lambda leaf: leaf if is_key(leaf) else jnp.array(leaf, copy=True), state)
    return index_as(state, like)


def cure(directory: Path) -> str:
    """What to do about a damaged step: fall back on the one before it, if there is one."""
    whole = steps(directory.parent)[0] if directory.name.isdecimal() else {}
    earlier = [number for number in whole if number < int(directory.name)]
    if not earlier:
        return "Restore another checkpoint, or train anew in another --workdir."
    return f"Restore with step={max(earlier)}, or delete this step to resume from there."


def _whole(directory: Path) -> Path:
    if file := missing_file(directory):
        raise CheckpointError(f"{directory / file} is missing, so the step is not whole. {cure(directory)}")
    return directory


def _step_accuracy(directory: Path) -> float:
    metrics = read_json(directory / "metrics" / "metrics", cure(directory))
    if not isinstance(metrics.get("test_accuracy"), int | float):
        raise CheckpointError(f"{directory / 'metrics'} holds {metrics}, no test_accuracy. {cure(directory)}")
    return _accuracy(metrics)


def _accuracy(metrics: Mapping[str, float]) -> float:
    accuracy = metrics["test_accuracy"]
    return -math.inf if math.isnan(accuracy) else accuracy


def _copy_to_host(tree: Any) -> Any:
    """Numpy copies of all leaves; `device_get` alone may return views of buffers that are about to be donated."""
    data = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
    return jax.tree.map(functools.partial(np.array, copy=True), jax.device_get(data))
