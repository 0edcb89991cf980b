"""The points of the figures that compare runs: which runs belong together, and which of them are missing.

A figure compares on *equal terms*: all runs of a panel have the same config but for what the figure varies (method,
sparsity, the block-aware rule), the seed, and what depends on the data. Settings without effect on a method do not
count, as in `experiments.grid`: a dense run belongs to every block shape, one of `rigl` to every criterion of `dsb`.
Where runs of several terms were found, a panel takes the terms of most of them, and `other_settings` names the rest.
"""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsb_jax.training.config import Config
from experiments import grid
from experiments.flags import with_default_interval
from experiments.grid import Run
from experiments.outcomes import find_summaries, mean_and_std, read_adaptations
from experiments.presets import ALL_METHODS, PRESETS, SPARSITIES

Terms = dict[str, Any]  # fields of a config -> values


class Outcome(NamedTuple):
    """What a finished run left behind: its folder, found below `root`, and its summary."""

    root: Path
    folder: Path
    summary: dict[str, Any]


class Variant(NamedTuple):
    """One curve of a panel: its label, and the fields that it sets on top of the terms."""

    label: str
    settings: dict[str, Any]


class Statistic(NamedTuple):
    """A cell over its seeds: mean and sample standard deviation (None for a single seed) of n shares."""

    mean: float
    std: float | None
    n: int


class Adaptations(NamedTuple):
    """Turnover and exploration over time, means over the seeds: shares at the epoch of each adaptation."""

    epochs: list[float]
    turnover: list[float]
    exploration: list[float]


PANEL_COLUMNS, BLOCKS = "dsb, panel columns", "dsb, blocks"
METHODS = (
    *(Variant(method, {"method": method}) for method in ALL_METHODS if method != "dsb"),
    Variant(BLOCKS, {"method": "dsb", "granularity": "block"}),
    Variant(PANEL_COLUMNS, {"method": "dsb", "granularity": "panel_column"}),
)
_VARIED = {"sparsity"} | {name for variant in METHODS for name in variant.settings}
ADAPTIVE = ("set", "rigl", "topkast", BLOCKS, PANEL_COLUMNS)
WITHOUT_RULE = "dsb, blocks without the block-aware rule"
BLOCK_AWARE = (
    Variant(BLOCKS, {"method": "dsb", "granularity": "block", "block_aware_drop": True}),
    Variant(WITHOUT_RULE, {"method": "dsb", "granularity": "block", "block_aware_drop": False}),
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs of one data set and model on equal terms.

    Attributes:
      terms: the fields of the config that all runs share; those of the preset if nothing was found.
      runs: label of a variant -> sparsity -> seed -> outcome, only what was found. The sparsity is None for a variant
        that has none (dense).
      missing: label of a variant -> runs of the preset's grid, on these terms, that were not found.
    """

    dataset: str
    model: str
    terms: Terms
    runs: dict[str, dict[float | None, dict[int, Outcome]]]
    missing: dict[str, list[Run]]

    @property
    def num_runs(self) -> int:
        """That were found."""
        return sum(len(seeds) for cells in self.runs.values() for seeds in cells.values())

    def root(self, default: str) -> str:
        """The folder below which most of the runs lie, for the commands that make the others."""
        roots = [o.root for cells in self.runs.values() for seeds in cells.values() for o in seeds.values()]
        return str(collections.Counter(roots).most_common(1)[0][0]) if roots else default

    def only(self, labels: Collection[str]) -> "Panel":
        """The panel without its other variants."""
        runs = {label: cells for label, cells in self.runs.items() if label in labels}
        missing = {label: lacking for label, lacking in self.missing.items() if label in labels}
        return dataclasses.replace(self, runs=runs, missing=missing)

    @property
    def sparsities(self) -> list[float]:
        """With at least one run, in order."""
        return sorted({sparsity for cells in self.runs.values() for sparsity in cells if sparsity is not None})

    def accuracy(self, label: str) -> dict[float | None, Statistic]:
        """Test accuracy of a variant by sparsity, in order of the sparsity."""
        cells = self.runs.get(label, {})
        found = {}
        for sparsity in sorted(cells, key=lambda value: value or 0.0):
            values = [outcome.summary["test_accuracy"] for outcome in cells[sparsity].values()]
            found[sparsity] = Statistic(*mean_and_std(values), len(values))
        return found


def run_of(config: Mapping[str, Any]) -> Run:
    """The run that has this config, without the settings that have no effect.

    Raises:
      ValueError: if the config is of another version.
    """
    known = Config.from_json(dict(config))
    settings = {k: v for k, v in dataclasses.asdict(known).items() if k not in (*grid.FROM_DATA, "seed")}
    if known == with_default_interval(known):
        del settings["update_interval"]
    return grid.make_run(settings, known.seed)


def read_runs(roots: Iterable[Path]) -> tuple[dict[Run, Outcome], list[str]]:
    """All finished runs below the folders, and notes on those that cannot be used.

    Raises:
      FileNotFoundError: if a folder does not exist.
    """
    found: dict[Run, Outcome] = {}
    notes = []
    for root in roots:
        for folder, summary in find_summaries(root).items():
            try:
                run = run_of(summary["config"])
            except (ValueError, TypeError) as error:
                notes.append(f"{folder}: left out, {error}")
                continue
            first = found.setdefault(run, Outcome(root, folder, summary))
            if first.folder.resolve() != folder.resolve():
                notes.append(f"{folder}: left out, the same run as {first.folder}")
    return found, notes


def terms_of(run: Run) -> Terms:
    """Every field of the config but method, sparsity, seed and what depends on the data."""
    fields = dataclasses.asdict(run.config)
    return {k: v for k, v in fields.items() if k not in (*grid.FROM_DATA, "method", "sparsity", "seed")}


def _cells(terms: Terms, variants: Sequence[Variant], sparsities: Iterable[float]) -> dict[Any, tuple[str, Any]]:
    """Settings of a run -> (label, sparsity) in a panel; the sparsity is None where it has no effect."""
    cells: dict[Any, tuple[str, Any]] = {}
    for variant in variants:
        for sparsity in sparsities:
            settings = grid.make_run({**terms, **variant.settings, "sparsity": sparsity}, 0).settings
            cells[settings] = (variant.label, sparsity if "sparsity" in dict(settings) else None)
    return cells


def _distinct(terms: Terms, variants: Sequence[Variant]) -> bool:
    """Whether the variants differ on these terms: the block-aware rule has no effect on whole panel columns."""
    return len(_cells(terms, variants, (0.9,))) == len(variants)


def _fullest(candidates: Sequence[Terms], runs: Iterable[Run], variants: Sequence[Variant]) -> Terms | None:
    """The first of the candidates on which most of the runs are; None if there is no candidate."""
    runs = list(runs)
    counts = collections.Counter(run.settings for run in runs)
    sparsities = {run.config.sparsity for run in runs}

    def count(terms: Terms) -> int:
        return sum(counts[settings] for settings in _cells(terms, variants, sparsities))

    return max((terms for terms in candidates if _distinct(terms, variants)), key=count, default=None)


def _distinct_terms(runs: Iterable[Run]) -> list[Terms]:
    kept: list[Terms] = []
    for settings in {run.settings: run for run in runs}.values():
        if (terms := terms_of(settings)) not in kept:
            kept.append(terms)
    return kept


@functools.cache
def _runs_of_presets() -> tuple[Run, ...]:
    return tuple(run for name in PRESETS for run in grid.preset_runs(name))


def preset_runs(dataset: str, model: str) -> list[Run]:
    """The runs of the presets that have this data set and model, each once."""
    return list(dict.fromkeys(run for run in _runs_of_presets() if _place(run) == (dataset, model)))


def _place(run: Run) -> tuple[str, str]:
    settings = dict(run.settings)
    return settings["dataset"], settings["model"]


def places(found: Iterable[Run], variants: Sequence[Variant], *, at_least: int = 1) -> list[tuple[str, str]]:
    """(data set, model) of every panel: where presets and found runs together have `at_least` so many variants."""
    seen: dict[tuple[str, str], set[str]] = {}
    for run in (*_runs_of_presets(), *found):
        config, labels = run.config, seen.setdefault(_place(run), set())
        labels.update(v.label for v in variants if all(getattr(config, k) == x for k, x in v.settings.items()))
    return [place for place, labels in seen.items() if len(labels) >= at_least]


def make_panel(
    found: Mapping[Run, Outcome],
    dataset: str,
    model: str,
    variants: Sequence[Variant],
    fixed: Mapping[str, Any] | None = None,
) -> Panel | None:
    """The panel of a data set and a model.

    Args:
      found: finished runs, of any data set and model.
      dataset: whose runs to take.
      model: whose runs to take.
      variants: the curves.
      fixed: values that the terms must have.

    Returns:
      The panel on the terms that most of the found runs have (of equals those nearest to the preset), or None if
      there is neither a run nor a preset.
    """
    fixed = dict(fixed or {})
    here = [run for run in found if _place(run) == (dataset, model)]
    preset = preset_runs(dataset, model)
    of_preset = _fullest(_distinct_terms(preset), preset, variants)
    candidates = [terms for terms in _distinct_terms(here) if all(terms[k] == v for k, v in fixed.items())]
    if of_preset is not None:
        base = of_preset | fixed
        candidates.sort(key=lambda terms: sum(terms[k] != base[k] for k in terms))
        candidates.insert(0, base)
    terms = _fullest(candidates, here, variants)
    if terms is None:
        return None
    missing: dict[str, list[Run]] = {}
    if of_preset is not None:
        wanted = _cells(of_preset, variants, SPARSITIES)
        settings_of = {variant.label: variant.settings for variant in variants}
        for run in preset:
            if run.settings in wanted:
                label, _ = wanted[run.settings]
                varied = settings_of[label] | {"sparsity": run.config.sparsity}
                expected = grid.make_run(terms | varied, run.seed)
                if expected not in found:
                    missing.setdefault(label, []).append(expected)
    runs: dict[str, dict[float | None, dict[int, Outcome]]] = {}
    cells = _cells(terms, variants, {run.config.sparsity for run in here})
    for run in sorted(here, key=lambda run: run.seed):
        if run.settings in cells:
            label, sparsity = cells[run.settings]
            runs.setdefault(label, {}).setdefault(sparsity, {})[run.seed] = found[run]
    return Panel(dataset, model, terms, runs, missing)


def other_settings(found: Mapping[Run, Outcome], panels: Iterable[Panel]) -> dict[tuple[str, ...], int]:
    """The runs that are in no panel of their data set and model, by what tells them from the first of those panels.

    Returns:
      (data set, model, NAME=VALUE, ...) -> number of runs, such as ("digits", "convnet", "grow=norm") -> 5.
    """
    panels = list(panels)
    drawn = {o.folder for p in panels for cells in p.runs.values() for seeds in cells.values() for o in seeds.values()}
    counts: collections.Counter[tuple[str, ...]] = collections.Counter()
    for run, outcome in found.items():
        panel = next((panel for panel in panels if (panel.dataset, panel.model) == _place(run)), None)
        if outcome.folder in drawn or panel is None:
            continue
        # Only settings with an effect on this run can tell it from the panel's.
        candidate = grid.make_run(panel.terms | {name: getattr(run.config, name) for name in _VARIED}, run.seed)
        own, other = dict(run.settings), dict(candidate.settings)
        config = dataclasses.asdict(run.config)
        names = [name for name in sorted(own.keys() | other.keys()) if own.get(name) != other.get(name)]
        counts[(*_place(run), *(f"{name}={grid.setting_text(config[name])}" for name in names))] += 1
    return dict(counts)


def adaptations(outcomes: Iterable[Outcome]) -> Adaptations | None:
    """Turnover and exploration of a cell over time; None if no run has metrics.

    Only the steps count that all runs with metrics have adapted at.
    """
    by_step: dict[float, list[dict[str, Any]]] = {}
    n = 0
    for outcome in outcomes:
        lines = read_adaptations(outcome.folder)
        config = outcome.summary["config"]
        n += bool(lines)
        for line in lines:
            epoch = line["step"] * config["epochs"] / config["total_steps"]
            by_step.setdefault(epoch, []).append(line)
    common = sorted(epoch for epoch, lines in by_step.items() if len(lines) == n)
    if not common:
        return None
    turnover, exploration = (
        [mean_and_std(line[name] for line in by_step[epoch])[0] for epoch in common]
        for name in ("turnover", "exploration")
    )
    return Adaptations(common, turnover, exploration)
