"""Grids of runs as plain data: what a sweep runs, under which names, by which commands.

A *cell* is a config without its seed, given by the settings in which it differs from the defaults of its data set; a
*run* is a cell with a seed. Settings without effect on a method are left out, so that two parts of a grid that ask for
the same run ask for it once: `dense` has no sparsity, only `dsb` has a growth criterion.
"""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsb_jax.training import models
from dsb_jax.training.build import default_grow, make_method
from dsb_jax.training.config import DENSE_METHODS, Config, check_config
from experiments.flags import default_values, parse_block_shape_or_auto, with_default_interval
from experiments.presets import PRESETS

# Filled in when a run begins, from the data set and for the device, hence not part of a cell.
FROM_DATA = ("input_shape", "num_classes", "total_steps", "feature_major")
_FIRST = ("dataset", "model", "method", "sparsity", "block_shape")  # in names by their values alone
_OF_SPARSITY = ("sparsity", "distribution", "block_shape", "keep_dense", "min_blocks", "min_group_blocks")
_OF_GRADUAL = ("density_stages", "density_end_fraction")
_OF_ADAPTING = (
    "drop_fraction", "update_interval", "update_end_fraction", "anneal_fraction", "adapt_batch_size", "fill",
)  # fmt: skip
_OF_DSB = ("grow", "granularity", "block_aware_drop", "growth_score", "regroup_interval", "keep_grouping")
_OF_BLOCKS = ("block_aware_drop", "growth_score", "keep_grouping")  # of dsb where it moves blocks


def _without_effect(settings: Mapping[str, Any]) -> set[str]:
    """Names of the settings that the method does not look at."""
    method = settings["method"]
    idle: set[str] = set()
    if method not in ("dsb", "ssb"):
        idle.add("columns")
    if method != "dsb":
        idle.update(_OF_DSB)
    elif settings.get("granularity", Config.granularity) == "panel_column" and not settings.get("regroup_interval"):
        idle.update(_OF_BLOCKS)
    if method in ("dense", "small_dense", "ssb"):
        idle.update(_OF_ADAPTING)
    if method == "topkast":
        idle.update(("drop_fraction", "anneal_fraction", "adapt_batch_size"))
    else:
        idle.add("backward_factor")
    if method == "dense":
        idle.update(_OF_SPARSITY)
    if settings.get("steps") is not None:
        idle.add("epochs")
    if method in DENSE_METHODS:
        idle.add("initial_density")
    if method in DENSE_METHODS or settings.get("initial_density") is None:
        idle.update(_OF_GRADUAL)
    return idle


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell and a seed; `settings` are sorted (name, value) pairs of config fields, seed excluded."""

    settings: tuple[tuple[str, Any], ...]
    seed: int

    @functools.cached_property
    def config(self) -> Config:
        """The config, but for what depends on the data (`FROM_DATA`)."""
        values = dict(self.settings)
        return Config(**{**_defaults_beside(values), **values, "seed": self.seed})

    def __lt__(self, other: "Run") -> bool:
        """By texts: a block shape may be a word or two sizes."""
        mine, theirs = ([(name, setting_text(value)) for name, value in run.settings] for run in (self, other))
        return (mine, self.seed) < (theirs, other.seed)

    @property
    def cell(self) -> str:
        """Readable and unique: digits-convnet-dsb-0.9-16x16-grow=norm."""
        values = dict(self.settings)
        first = [_text(values[name]) for name in _FIRST if name in values]
        return "-".join(first + [f"{name}={_text(value)}" for name, value in self.settings if name not in _FIRST])

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.cell}-seed{self.seed}"

    def arguments(self) -> list[str]:
        """Flags of `experiments.train` that make this run."""
        return [_flag(name, value) for name, value in (*self.settings, ("seed", self.seed))]

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a summary's config is this run's, up to what depends on the data or has no effect on the method."""
        own = self.config.to_json()
        try:
            known = Config.from_json(dict(config))
        except ValueError:
            return False
        config = known.to_json()  # with the fields that are younger than the summary
        unknown = set(FROM_DATA) | _without_effect(own)
        if "update_interval" not in dict(self.settings) and known == with_default_interval(known):
            unknown.add("update_interval")
        if own["steps"] is not None:
            unknown.add("epochs")
        return {k: v for k, v in own.items() if k not in unknown} == {
            k: v for k, v in config.items() if k not in unknown
        }


def setting_text(value: Any) -> str:
    """A value as `parse_value` reads it, to the last digit: 0.9, 16x16, a,b, false."""
    if isinstance(value, tuple):
        return ("x" if all(isinstance(v, int) for v in value) else ",").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(value: Any) -> str:
    """A value in a name, where floats are rounded."""
    if isinstance(value, bool):
        return str(value)
    return f"{value:g}" if isinstance(value, float) else setting_text(value)


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={setting_text(value)}"


# The type of each field that is one number or text, whether or not it may be None.
_TYPES: dict[str, Any] = {
    field.name: next((kind for kind in (int, float, str) if kind in (field.type, *typing.get_args(field.type))), None)
    for field in dataclasses.fields(Config)
}


def parse_value(name: str, text: Any) -> Any:
    """Text of a flag -> value of the config's field; values that are no text are taken as they are.

    Raises:
      ValueError: if there is no such field, it is not for a user to set, or the text is no value of its type.
    """
    defaults = default_values("digits")
    if name not in defaults or name in (*FROM_DATA, "seed"):
        known = ", ".join(field for field in defaults if field not in (*FROM_DATA, "seed"))
        raise ValueError(f"{name!r} is not a setting of the runs; choose of {known}.")
    default = defaults[name]
    if not isinstance(text, str):
        return float(text) if isinstance(default, float) else text
    if name == "block_shape":
        return parse_block_shape_or_auto(text)
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={text!r} is neither true nor false.")
        return text.lower() == "true"
    if isinstance(default, tuple):
        return tuple(filter(None, text.split(",")))
    kind = _TYPES[name]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number; give such as {default or 0}.") from None


def _defaults_beside(values: Mapping[str, Any]) -> dict[str, Any]:
    """What holds where `values` say nothing: how DSB grows depends on the optimizer, all else on the data set."""
    defaults = dict(default_values(values["dataset"]))
    return defaults | {"grow": default_grow(values.get("optimizer", defaults["optimizer"]))}


def make_run(settings: Mapping[str, Any], seed: int) -> Run:
    """The run of these settings (text or values), without those that are defaults or have no effect."""
    values = {"dataset": "digits", "method": "dsb"} | {k: parse_value(k, v) for k, v in settings.items()}
    defaults = _defaults_beside(values)
    idle = _without_effect(values)
    kept = {name: defaults[name] for name in _FIRST} | values
    kept = {k: v for k, v in kept.items() if k not in idle and (k in _FIRST or v != defaults[k])}
    return Run(tuple(sorted(kept.items())), seed)


def expand(
    parts: Iterable[Mapping[str, Sequence[Any]]],
    *,
    seeds: Sequence[int],
    common: Mapping[str, Any],
    override: Mapping[str, Any] | None = None,
) -> list[Run]:
    """All runs of the products, each once: every cell with the first seed, then every cell with the second, ...

    `common` is set where a part does not say otherwise, `override` whatever it says.
    """
    runs: dict[Run, None] = {}
    cells = [
        {**common, **dict(zip(part, values, strict=True)), **(override or {})}
        for part in parts
        for values in itertools.product(*part.values())
    ]
    for seed, cell in itertools.product(seeds, cells):
        runs.setdefault(make_run(cell, seed))
    return list(runs)


def preset_runs(name: str, *, override: Mapping[str, Any] | None = None) -> list[Run]:
    """The runs of a preset, with `override` set for all of them.

    Raises:
      ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    return expand(preset["parts"], seeds=preset["seeds"], common=preset["common"], override=override)


def select(runs: Iterable[Run], allowed: Mapping[str, Sequence[Any]]) -> list[Run]:
    """The runs whose config has one of the allowed values in every field named; fields without effect let pass.

    Raises:
      ValueError: if none is left.
    """
    wanted = {name: [v if name == "seed" else parse_value(name, v) for v in vs] for name, vs in allowed.items()}

    def fits(run: Run) -> bool:
        idle = _without_effect(dict(run.settings))
        return all(name in idle or getattr(run.config, name) in values for name, values in wanted.items())

    chosen = [run for run in runs if fits(run)]
    if not chosen:
        given = ", ".join(f"{name} in {list(values)}" for name, values in allowed.items())
        raise ValueError(f"no run of the grid has {given}; --dry_run without these flags lists the grid.")
    return chosen


def check_effects(runs: Iterable[Run], values: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError for the first value that is in none of the runs, because it has no effect on their methods."""
    runs = list(runs)
    for name, texts in values.items():
        for value in (parse_value(name, text) for text in texts):
            if all(getattr(run.config, name) != value for run in runs):
                methods = ", ".join(sorted({run.config.method for run in runs}))
                why = "; it is for granularity=block" if name in _OF_BLOCKS else ""
                raise ValueError(f"{name}={setting_text(value)} has no effect on {methods}{why}.")


def check_runs(runs: Iterable[Run]) -> None:
    """Raises ValueError for the first method, model or other value that cannot be, before anything is trained."""
    seen: set[tuple[tuple[str, Any], ...]] = set()
    for run in runs:
        if run.settings not in seen:
            seen.add(run.settings)
            config = run.config
            check_config(config)
            make_method(config)
            models.create(config.model, num_classes=config.num_classes, dropout_rate=config.dropout_rate)


def workdir(root: Path, run: Run) -> Path:
    """Where a run lives."""
    return root / run.name
