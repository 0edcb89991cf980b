"""Runs -> the fewest commands of `experiments.sweep` that were found to make them, and no other runs.

A command is tried on the grid itself before it is given out: `expand` and `select` of `experiments.grid`, as the sweep
calls them, must return these runs and no more. What no single command makes is cut along one setting and tried again;
a single run always has a command.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from experiments import grid
from experiments.flags import default_values
from experiments.grid import Run
from experiments.presets import PRESETS
from experiments.sweep import AXES

_SEED = "seed"
Lists = Mapping[str, Sequence[Any]]  # fields of a config, or the seed -> values

_FREE = tuple(AXES.values())  # the fields that the sweep has a list for


def commands(runs: Collection[Run], root: str) -> list[str]:
    """Command lines that together make exactly these runs, each once.

    Args:
      runs: any runs.
      root: folder of the sweep.
    """
    wanted = frozenset(runs)
    if not wanted:
        return []
    arguments = _with_preset(wanted) or _without_preset(wanted)
    if arguments is not None:
        return [shlex.join(["python", "-m", "experiments.sweep", f"--root={root}", *arguments])]
    return [line for part in _cut(wanted) for line in commands(part, root)]


def _values(runs: Collection[Run], name: str) -> list[Any]:
    """The values of a field over the runs, seed included, in order; None comes first."""
    values = {getattr(run.config, name) for run in runs}
    return sorted(values, key=lambda value: (value is not None, isinstance(value, str), value))


def _shared(runs: Collection[Run]) -> dict[str, Any]:
    """The fields without a list of their own in which all runs agree."""
    fields = [name for name in dataclasses.asdict(next(iter(runs)).config) if name not in (*grid.FROM_DATA, _SEED)]
    values = {name: _values(runs, name) for name in fields if name not in _FREE}
    return {name: found[0] for name, found in values.items() if len(found) == 1}


@functools.cache
def _preset_runs(name: str, override: tuple[tuple[str, Any], ...]) -> tuple[Run, ...]:
    return tuple(grid.preset_runs(name, override=dict(override)))


@functools.cache
def _selected(name: str, override: tuple[tuple[str, Any], ...], field: str, values: tuple[Any, ...]) -> frozenset[Run]:
    """What one list alone selects from a preset; several lists select what each of them does."""
    try:
        return frozenset(grid.select(_preset_runs(name, override), {field: values}))
    except ValueError:  # nothing is left
        return frozenset()


def _with_preset(wanted: frozenset[Run]) -> list[str] | None:
    """Arguments that select the runs from a preset; None if none does."""
    datasets = set(_values(wanted, "dataset"))
    for name in PRESETS:
        own = [run for run in _preset_runs(name, ()) if run.config.dataset in datasets]
        if not own:
            continue
        # In what the runs agree, but with no run of the preset, is set for all.
        override = {field: v for field, v in _shared(wanted).items() if v not in _values(own, field)}
        key = tuple(override.items())

        def make(lists: Lists, name: str = name, key: tuple[tuple[str, Any], ...] = key) -> frozenset[Run]:
            found = frozenset(_preset_runs(name, key))
            for field, values in lists.items():
                found &= _selected(name, key, field, tuple(values))
            return found

        if (lists := _fewest_lists(make, wanted)) is not None:
            return [f"--preset={name}", *_list_flags(lists), *_set_flags(override)]
    return None


def _without_preset(wanted: frozenset[Run]) -> list[str] | None:
    """Arguments of a grid that is these runs; None if there is none."""
    defaults = default_values(_values(wanted, "dataset")[0])
    override = {field: v for field, v in _shared(wanted).items() if v != defaults[field]}

    def make(lists: Lists) -> frozenset[Run]:
        parts = {field: values for field, values in lists.items() if field != _SEED}
        return frozenset(grid.expand([parts], seeds=lists.get(_SEED, [0]), common={}, override=override))

    lists = _fewest_lists(make, wanted)
    return None if lists is None else [*_list_flags(lists), *_set_flags(override)]


def _fewest_lists(make: Callable[[Lists], frozenset[Run]], wanted: frozenset[Run]) -> Lists | None:
    """The values of the runs by field, without fields that need not be given; None if `make` gives other runs."""
    lists = {field: _values(wanted, field) for field in (*_FREE, _SEED)}
    if make(lists) != wanted:
        return None
    for field in list(lists):
        fewer = {name: values for name, values in lists.items() if name != field}
        told = field in ("method", "sparsity", _SEED) or len(lists[field]) > 1  # so that a command says what it makes
        if not told and make(fewer) == wanted:
            lists = fewer
    return lists


def _cut(wanted: frozenset[Run]) -> list[frozenset[Run]]:
    """The runs in parts: values of one setting stay together where they have the same runs in everything else."""
    names = [*_FREE, _SEED]
    names += [name for name in dataclasses.asdict(next(iter(wanted)).config) if name not in (*names, *grid.FROM_DATA)]
    several = [name for name in names if len(_values(wanted, name)) > 1]
    for name in several:
        parts: dict[frozenset[Any], set[Run]] = {}
        for value in _values(wanted, name):
            nothing: dict[str, Any] = {name: None}
            same = [run for run in wanted if getattr(run.config, name) == value]
            blank = frozenset(dataclasses.replace(run.config, **nothing) for run in same)
            parts.setdefault(blank, set()).update(same)
        if len(parts) > 1:
            return [frozenset(part) for part in parts.values()]
    values = _values(wanted, several[0])
    return [frozenset(run for run in wanted if getattr(run.config, several[0]) == value) for value in values]


def _list_flags(lists: Lists) -> list[str]:
    names = {field: flag for flag, field in AXES.items()} | {_SEED: "seeds"}
    return [f"--{names[field]}={','.join(map(grid.setting_text, values))}" for field, values in lists.items()]


def _set_flags(override: Mapping[str, Any]) -> list[str]:
    return [f"--set={name}={grid.setting_text(value)}" for name, value in override.items()]
