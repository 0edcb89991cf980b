"""Checkpoints of whole runs: a config is all that is needed to make the model they belong to."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsb_jax.checkpoint import (
    CONFIG_FILES,
    CheckpointError,
    check_foreign,
    cure,
    find_latest,
    find_step,
    to_device,
    workdir_root,
)
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.stored_step import JSON_FILE, brief, config_item, fill, read_json, read_step
from dsb_jax.train_state import TrainState, create_train_state
from dsb_jax.training import old_checkpoints
from dsb_jax.training.build import KEY_IMPL, Components, build, decide_feature_major
from dsb_jax.training.config import Config

RESUMABLE_FIELDS = ("implementation",)  # how a layer is computed, not what


class Restored(NamedTuple):
    """What `restore` returns: `state` on the default device, `extra` as saved (nested dicts of numpy arrays)."""

    config: Config
    components: Components
    state: TrainState
    extra: dict[str, Any]
    host: dict[str, Any]
    step: int


def check_workdir(workdir: str | os.PathLike[str], config: Config, *, resume: bool) -> tuple[Config, int | None]:
    """Decides whether a run may use `workdir`, before anything is written there.

    Args:
      workdir: any path; fresh if there is no file in it.
      config: of the run that is about to begin. Only `implementation` may differ from the one there: a run may go on
        with another, which continues it, though not with the bits that the first would have given.
      resume: whether to continue what is there.

    Returns:
      The config to go on with, in which `feature_major` is decided, and the step to resume from, or None to begin at
      step 0 (also if a run was stopped before its first checkpoint).

    Raises:
      CheckpointError: if it holds the same run and `resume` is False, another run, or files of something else.
    """
    root = workdir_root(workdir)
    latest = find_latest(root) if check_foreign(root) else None
    if latest is not None:
        saved = _read_config(latest / config_item(latest) / JSON_FILE, cure(latest))
    else:
        file = next((root / name for name in CONFIG_FILES if (root / name).exists()), None)
        if file is None:
            return _decided(config), None
        saved = _read_config(file, "Give another --workdir.")
    if differing := _differing(saved, config):
        told = ", ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differing.items())
        cures = ", ".join(f"{name}={old!r}" for name, (old, _) in differing.items())
        raise CheckpointError(
            f"{root} holds a run of another config: {told}.\n"
            f"Nothing was changed. Give another --workdir, or {cures} to resume that run "
            f"(only {', '.join(RESUMABLE_FIELDS)} may differ)."
        )
    step = None if latest is None else int(latest.name)
    if not resume:
        raise CheckpointError(
            f"{root} holds a run of this config already, at step {step or 0}; "
            "add --resume to continue it, or give another --workdir."
        )
    if config.feature_major is None:  # of an old run decided by the implementation that it began with
        config = dataclasses.replace(config, feature_major=_decided(saved, tuned=True).feature_major)
    return config, step


def _differing(saved: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two runs differ that may not: values of both. What follows from `steps` is not told of."""
    pairs = {f.name: (getattr(saved, f.name), getattr(config, f.name)) for f in dataclasses.fields(Config)}
    differing = {name: (old, new) for name, (old, new) in pairs.items() if old != new and name not in RESUMABLE_FIELDS}
    if None in differing.get("feature_major", ()):  # not decided yet
        del differing["feature_major"]
    if "steps" in differing:
        differing = {name: pair for name, pair in differing.items() if name not in ("epochs", "total_steps")}
    return differing


def restore(
    path: str | os.PathLike[str], *, step: int | None = None, best: bool = False, implementation: str | None = None
) -> Restored:
    """Restores a checkpoint from its path alone: config, model, state and telemetry, all of it checked.

    Args:
      path: a working directory, its `checkpoints` directory, or the directory of one step, wherever it lies.
      step: which one; by default the latest.
      best: the one of highest test accuracy instead (of equals the latest).
      implementation: of the sparse layers, in place of the config's, say if this machine cannot run that one.

    Raises:
      CheckpointError: if there is none, or what is there is damaged, foreign, or of another model.
      ValueError: if `step` and `best` are both given, or `implementation` is unknown.
    """
    if implementation is not None:
        check_implementation(implementation)
    directory = find_step(path, step=step, best=best)
    stored = read_step(directory, cure(directory))
    if old_checkpoints.is_old(directory):
        stored = old_checkpoints.renamed(stored)
    file = directory / config_item(directory)
    saved = _read_config(file / JSON_FILE, cure(directory))
    try:
        saved = _decided(saved, tuned=True)
        config = dataclasses.replace(saved, implementation=implementation or saved.implementation)
        components = build(config)
        done, key_impl = int(stored.arrays.get("step", 0)), stored.key_impls.get("key", KEY_IMPL)
        abstract = abstract_state(config, components, done=done, key_impl=key_impl)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(f"{file} makes no model ({brief(error)}). {cure(directory)}") from error
    state = to_device(fill(abstract, stored, cure(directory)), directory, abstract)
    return Restored(config, components, state, stored.extra, stored.host, int(state.step))


def abstract_state(config: Config, components: Components, *, done: int = 0, key_impl: str = KEY_IMPL) -> TrainState:
    """Shapes and dtypes of the train state of a config after `done` steps."""
    images, model = config.abstract_inputs(1), components.stage_after(done).model
    create = functools.partial(create_train_state, model, components.optimizer, inputs=images)
    return jax.eval_shape(create, jax.random.key(config.seed, impl=key_impl))


def _decided(config: Config, *, tuned: bool = False) -> Config:
    """The config with `feature_major`; in version 0.1 it was decided at each start, by the tuned tables, too."""
    if config.feature_major is not None:
        return config
    return dataclasses.replace(config, feature_major=decide_feature_major(config, tuned=tuned))


def _read_config(file: Path, cure: str) -> Config:
    values = read_json(file, cure)
    try:
        return Config.from_json(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} holds no config of this version ({brief(error)}). {cure}") from error
