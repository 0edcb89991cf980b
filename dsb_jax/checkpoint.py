"""Checkpoints: a run on disk with Orbax, and back bit by bit, or an error that says what is damaged.

    workdir/
      recipe.json            the recipe, from the moment the run begins
      checkpoints/
        40/                  one step: complete as soon as it has this name
          state/             the TrainState, a stock Orbax pytree: params, batch_stats, opt_state, topology, step, key
          extra/             telemetry arrays of the host (absent if there are none)
          recipe/, host/     JSON: the recipe, scalars of the host
          checksums/         JSON: CRC-32 of every array, of the recipe and of the host's scalars
          metrics/           JSON: test_accuracy, by which the best step is kept

Only host arrays are stored, copied off before `save` returns: the caller may donate the state at once, and a
checkpoint names no device, so one from a GPU restores on a machine without. A checkpoint is read onto the host and
checked there (structure, shapes, dtypes, checksums, every layout) before the first array goes to a device: an index
out of range is an error here, where a gather would clamp it. The checksums are needed: Orbax notices files that are
gone or cut short, but reads flipped bits of a weight or of an index without a word.
"""

import dataclasses
import functools
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from dsb_jax.layout import validate
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.train_state import TrainState, create_train_state, layouts
from dsb_jax.training.config import Assembly, Recipe, assemble

CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.json"
_JSON = "metadata"  # Orbax's name for the file of a JSON item
RESUMABLE_FIELDS = ("implementation",)  # how a layer is computed, not what


class CheckpointError(ValueError):
    """A checkpoint or a working directory that cannot be used: its path, what is wrong with it, and the cure."""


class Restored(NamedTuple):
    """What `restore` returns: `state` on the default device, `extra` as saved (nested dicts of numpy arrays)."""

    recipe: Recipe
    assembly: Assembly
    state: TrainState
    extra: dict[str, Any]
    host: dict[str, Any]
    step: int


class Checkpoints:
    """The checkpoints of one run, written in the background; the last few and the best by test accuracy are kept.

    with Checkpoints(workdir, recipe) as checkpoints:
        checkpoints.save(state, test_accuracy=0.97, extra={"conv_1": bits}, host={"seconds": 12.5})

    Open it before writing anything else into `workdir`, which otherwise holds files of no known run.
    """

    def __init__(self, workdir: str | os.PathLike[str], recipe: Recipe, *, keep_last: int = 2):
        """Opens `workdir` for writing, creates it if need be and notes the recipe in it.

        Args:
          workdir: new, empty, or holding a run of this recipe (`check_workdir` says which).
          recipe: saved with every step.
          keep_last: how many of the latest steps stay on disk, besides the best one.

        Raises:
          CheckpointError: if the directory holds anything else or cannot be written.
          ValueError: if `keep_last` is below 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} keeps nothing to resume from; give 1 or more.")
        check_workdir(workdir, recipe, resume=True)
        root = Path(workdir).expanduser().absolute()
        for directory in _steps(root / CHECKPOINTS).values():
            _step_accuracy(directory)  # Orbax reads them too, but does not say which one is damaged
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,
            preservation_policy=AnyPreservationPolicy([LatestN(keep_last), BestN(get_metric_fn=_accuracy, n=1)]),
            cleanup_tmp_directories=True,  # of a run that was killed while it saved
        )
        try:
            (root / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            if not (root / RECIPE_FILE).exists():
                draft = root / f".{RECIPE_FILE}"
                draft.write_text(json.dumps(recipe.to_json(), indent=1) + "\n")
                draft.replace(root / RECIPE_FILE)
            self._orbax = ocp.CheckpointManager(root / CHECKPOINTS, options=options)
        except (OSError, ValueError) as error:
            what = "cannot be written" if isinstance(error, OSError) else "holds a damaged step"
            raise CheckpointError(f"{root} {what} ({_brief(error)}); give another --workdir.") from error
        self._recipe = recipe
        self._directory = root / CHECKPOINTS

    def save(
        self,
        state: TrainState,
        *,
        test_accuracy: float,
        extra: Mapping[str, Any] | None = None,
        host: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state` under its own `state.step`; returns when everything is copied, before it is written.

        The caller may donate the state and change `extra` and `host` at once. A save waits for the one before it.

        Args:
          state: of the run's recipe.
          test_accuracy: by which the best step is kept; nan counts as the worst.
          extra: nested dicts of numpy arrays.
          host: values that JSON can hold.

        Raises:
          CheckpointError: if there is a checkpoint of this step or a later one already.
          TypeError: if `host` holds what JSON cannot. And whatever stopped the save before this one, say a full disk.
        """
        step = int(state.step)
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self._directory} has a checkpoint of step {latest} already, so step {step} cannot be saved; "
                "compare with latest_step() before saving."
            )
        arrays, telemetry = _copy_to_host(state), _copy_to_host(dict(extra or {}))
        scalars, recipe = json.loads(json.dumps(dict(host or {}))), self._recipe.to_json()
        items = {
            "state": ocp.args.StandardSave(arrays),
            "recipe": ocp.args.JsonSave(recipe),
            "host": ocp.args.JsonSave(scalars),
            "checksums": ocp.args.JsonSave(_checksums(arrays, telemetry, recipe, scalars)),
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
        """Waits, then ends the background threads."""
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_workdir(workdir: str | os.PathLike[str], recipe: Recipe, *, resume: bool) -> int | None:
    """Decides whether a run may use `workdir`, before anything is written there.

    Args:
      workdir: any path; fresh if there is no file in it.
      recipe: of the run that is about to begin. Only `implementation` may differ from the one there: a run may go on
        with another, which continues it, though not with the bits that the first would have given.
      resume: whether to continue what is there.

    Returns:
      The step to resume from, or None to begin at step 0 (also if a run was stopped before its first checkpoint).

    Raises:
      CheckpointError: if it holds the same run and `resume` is False, another run, or files of something else.
    """
    root = Path(workdir).expanduser().absolute()
    if not root.exists():
        return None
    if not root.is_dir():
        raise CheckpointError(f"{root} is a file; give a directory as --workdir.")
    steps = _steps(root / CHECKPOINTS)
    latest = max(steps, default=None)
    if latest is not None:
        saved = _read_recipe(steps[latest] / "recipe" / _JSON, _cure(steps[latest]))
    elif (root / RECIPE_FILE).exists():
        saved = _read_recipe(root / RECIPE_FILE, "Give another --workdir.")
    else:
        draft = root / f".{RECIPE_FILE}"  # of a run that was killed while it noted its recipe
        foreign = next((file for file in root.rglob("*") if not file.is_dir() and file != draft), None)
        if foreign is None:
            return None
        name = str(foreign.relative_to(root))
        raise CheckpointError(f"{root} holds {name!r} but no run of dsb_jax; give a new or empty --workdir.")
    for field in dataclasses.fields(Recipe):
        old, new = getattr(saved, field.name), getattr(recipe, field.name)
        if old != new and field.name not in RESUMABLE_FIELDS:
            raise CheckpointError(
                f"{root} holds a run of another recipe: {field.name} is {old!r} there and {new!r} here.\n"
                f"Nothing was changed. Give another --workdir, or {field.name}={old!r} to resume that run "
                f"(only {', '.join(RESUMABLE_FIELDS)} may differ)."
            )
    if not resume:
        raise CheckpointError(
            f"{root} holds a run of this recipe already, at step {latest or 0}; "
            "add --resume to continue it, or give another --workdir."
        )
    return latest


def restore(
    path: str | os.PathLike[str], *, step: int | None = None, best: bool = False, implementation: str | None = None
) -> Restored:
    """Restores a checkpoint from its path alone: recipe, model, state and telemetry, all of it checked.

    Args:
      path: a working directory, its `checkpoints` directory, or the directory of one step, wherever it lies.
      step: which one; by default the latest.
      best: the one of highest test accuracy instead (of equals the latest).
      implementation: of the sparse layers, in place of the recipe's, say if this machine cannot run that one.

    Raises:
      CheckpointError: if there is none, or what is there is damaged, foreign, or of another model.
      ValueError: if `step` and `best` are both given, or `implementation` is unknown.
    """
    if implementation is not None:
        check_implementation(implementation)
    directory = _find_step(path, step=step, best=best)
    cure = _cure(directory)
    saved = _read_recipe(directory / "recipe" / _JSON, cure)
    recipe = dataclasses.replace(saved, implementation=implementation or saved.implementation)
    try:
        assembly = assemble(recipe)
        images = jax.ShapeDtypeStruct((1, *recipe.image_shape), jnp.float32)
        create = functools.partial(create_train_state, assembly.model, assembly.optimizer, images=images)
        abstract = jax.eval_shape(create, jax.random.key(recipe.seed))
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{directory / 'recipe'} makes no model ({_brief(error)}). {cure}") from error
    state = _in_place_of(abstract, _read_arrays(directory / "state", cure), directory, cure)
    host, expected = (_read_json(directory / item / _JSON, cure) for item in ("host", "checksums"))
    has_extra = any(name.startswith("extra/") for name in expected)
    extra = _read_arrays(directory / "extra", cure) if has_extra else {}
    found = _checksums(state, extra, saved.to_json(), host)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{directory}: {name} has checksum {found.get(name)}, but {expected.get(name)} was saved; "
                f"its bits have changed. {cure}"
            )
    for layer, layout in layouts(state.topology).items():
        try:
            validate(layout)
        except ValueError as error:
            raise CheckpointError(f"{directory}: topology/{'/'.join(layer)}: {error} {cure}") from error
    # Copied: a buffer that belongs to numpy cannot be donated.
    state = jax.tree.map(functools.partial(jnp.array, copy=True), state)
    return Restored(recipe, assembly, state, extra, host, int(state.step))


def _accuracy(metrics: Mapping[str, float]) -> float:
    accuracy = metrics["test_accuracy"]
    return -math.inf if math.isnan(accuracy) else accuracy


def _brief(error: BaseException) -> str:
    """One line of at most 200 characters; Orbax's messages run to thousands."""
    text = str(error).split(" [tensorstore_spec", 1)[0].split("\n", 1)[0]
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"


def _copy_to_host(tree: Any) -> Any:
    """Numpy copies of all leaves; `device_get` alone may return views of buffers that are about to be donated."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by names such as `params/conv_1/blocks`: equal for a TrainState and for the dicts that Orbax returns."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksums(state: Any, extra: Any, recipe: Any, host: Any) -> dict[str, int]:
    """CRC-32 by name of all that a checkpoint holds."""
    arrays = _by_name({"state": state, "extra": extra})
    sums = {name: zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)) for name, leaf in arrays.items()}
    texts = {"recipe": recipe, "host": host}
    return sums | {name: zlib.crc32(json.dumps(value, sort_keys=True).encode()) for name, value in texts.items()}


def _in_place_of(abstract: TrainState, arrays: Any, directory: Path, cure: str) -> TrainState:
    """The arrays in the structure of `abstract`, after names, shapes and dtypes were compared."""
    stored, wanted = _by_name(arrays), _by_name(abstract)
    for name in wanted | stored:
        have, want = (f"{x[name].dtype}{list(x[name].shape)}" if name in x else "absent" for x in (stored, wanted))
        if have != want:
            raise CheckpointError(
                f"{directory}: {name} is {have}, but {want} in the model of the recipe beside it; "
                f"the state is of another model. {cure}"
            )
    return jax.tree.unflatten(jax.tree.structure(abstract), [stored[name] for name in wanted])


def _steps(directory: Path) -> dict[int, Path]:
    """The complete steps in a `checkpoints` directory; Orbax gives a step its number as a name only when it is."""
    if not directory.is_dir():
        return {}
    try:
        return {int(entry.name): entry for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir()}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({_brief(error)}); check its permissions.") from error


def _find_step(path: str | os.PathLike[str], *, step: int | None, best: bool) -> Path:
    """The directory of the step that is meant."""
    if step is not None and best:
        raise ValueError(f"step={step} and best=True exclude each other; give one of them.")
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise CheckpointError(f"{root} {what}; give the --workdir of a run, its {CHECKPOINTS}, or one step in there.")
    if (root / "state").exists() or (root / "recipe").exists():
        if step is not None or best:
            raise CheckpointError(f"{root} is one step; give {root.parent} to choose among steps.")
        return root
    steps = _steps(root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root)
    if not steps:
        raise CheckpointError(
            f"{root} holds no checkpoint; give the --workdir of a run that has saved one, or the directory of a step."
        )
    if best:
        return steps[max(steps, key=lambda number: (_step_accuracy(steps[number]), number))]
    if step is None:
        return steps[max(steps)]
    if step not in steps:
        raise CheckpointError(f"{root} has no checkpoint of step {step}; it has {', '.join(map(str, sorted(steps)))}.")
    return steps[step]


def _step_accuracy(directory: Path) -> float:
    metrics = _read_json(directory / "metrics" / "metrics", _cure(directory))
    if not isinstance(metrics.get("test_accuracy"), int | float):
        raise CheckpointError(f"{directory / 'metrics'} holds {metrics}, no test_accuracy. {_cure(directory)}")
    return _accuracy(metrics)


def _cure(directory: Path) -> str:
    """What to do about a damaged step: fall back on the one before it, if there is one."""
    steps = _steps(directory.parent) if directory.name.isdecimal() else {}
    earlier = [number for number in steps if number < int(directory.name)]
    if not earlier:
        return "Restore another checkpoint, or train anew in another --workdir."
    return f"Restore with step={max(earlier)}, or delete this step to resume from there."


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Reads arrays in turn: of concurrent reads, those pending at the first error print tracebacks of their own."""

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        arrays: list[np.ndarray] = []
        for info, arg in zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True):
            arrays += await super().deserialize([info], [arg])
        return arrays


def _read_arrays(directory: Path, cure: str) -> Any:
    """Nested dicts of numpy arrays. The exceptions are those of Orbax for files deleted, cut short or overwritten."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _OneByOne()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is saved, but Orbax warns of a registry without
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        return ocp.Checkpointer(handler).restore(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = "missing or incomplete" if isinstance(error, FileNotFoundError) else "damaged"
        raise CheckpointError(f"{directory} is {what} ({_brief(error)}). {cure}") from error


def _read_json(file: Path, cure: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise CheckpointError(f"{file} is {what} ({_brief(error)}). {cure}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {str(values)[:40]!r}, not named values. {cure}")
    return values


def _read_recipe(file: Path, cure: str) -> Recipe:
    values = _read_json(file, cure)
    try:
        return Recipe.from_json(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} holds no recipe of this version ({_brief(error)}). {cure}") from error
