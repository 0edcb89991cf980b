"""Draws the paper's figures from the results of runs and profiles, and says how to make the points that are missing.

    python -m experiments.figures --root=DIR[,DIR...] --profile=FILE.json[,FILE...] --out=DIR

Jiang, Hu, Song, NeurIPS 2022, appendix A.1 and A.2, from files of `experiments.layer_profile` and from `summary.json`
files anywhere below the roots, with the `metrics.jsonl` beside them; each as OUT/NAME.png and OUT/NAME.pdf:

    figure12_time_cifar10           time of an epoch by sparsity: dense, estimated as in the paper, and measured;
    figure13_time_cifar100          from profiles of models with 100 classes only
    figure14_block_aware_cifar10    accuracy with and without the block-aware rule by sparsity;
    figure15_block_aware_cifar100   the same on digits is block_aware_digits
    accuracy_DATASET                accuracy of all methods by sparsity
    adaptation_DATASET_MODEL        turnover and exploration of the adaptive methods over time

A figure without any point is not drawn. The points that the paper's figure, or the preset of `experiments.grid`, would
have beside those found are counted, with the commands that make them. A panel compares runs of equal settings, those of
most runs (`experiments.figure_data`); --set=grow=norm, say, chooses others.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from matplotlib.figure import Figure
from rich.console import Console

from experiments import epoch_times, figure_data, grid, program, sweep_commands
from experiments import figure_drawings as drawings
from experiments.figure_data import Outcome, Panel, Variant
from experiments.grid import Run

FLAGS = flags.FLAGS

NUMBERS = {"cifar10": 14, "cifar100": 15}  # of the paper's figures of the block-aware rule


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_list("root", [], "Folders of runs, such as the --root of a sweep; summaries are found at any depth.")
    flags.DEFINE_list("profile", [], "Files of experiments.layer_profile.")
    flags.DEFINE_string("out", None, "Folder for the figures; made if there is none.", required=True)
    flags.DEFINE_multi_string("set", [], "NAME=VALUE that the runs must have, such as block_shape=32x8; repeatable.")


class Planned(NamedTuple):
    """A figure: what it has and lacks, in `unit`s; commands that make what it lacks; how to draw it, if it has any."""

    name: str
    unit: str
    have: int
    missing: int
    commands: list[str]
    draw: Callable[[], Figure | None] | None


def fixed_from_flags() -> dict[str, Any]:
    """The values of --set.

    Raises:
      ValueError: if one is no value of a setting that a figure holds fixed.
    """
    fixed: dict[str, Any] = {}
    for text in FLAGS.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"set={text!r} is not NAME=VALUE; write such as --set=block_shape=32x8.")
        if name in ("dataset", "model", "method", "sparsity"):
            raise ValueError(f"set={text!r}: the figures show every {name}; set what runs are to have in common.")
        fixed[name] = grid.parse_value(name, value)
    return fixed


def plan_times(panels: Sequence[epoch_times.TimePanel], out: Path) -> tuple[list[Planned], list[str]]:
    """Figures 12 and 13, and notes on profiles left out."""
    figures, notes = [], []
    for number, num_classes in ((12, 10), (13, 100)):
        rows, left_out = epoch_times.rows_of(panels, num_classes)
        notes += left_out
        commands = [line for row in rows or [[]] for line in epoch_times.commands(row, num_classes, out)]
        have = sum(len(panel.times) for row in rows for panel in row)
        missing = sum(len(gaps) for row in rows or [[]] for gaps in epoch_times.missing_points(row).values())
        title = f"Figure {number}: training time of an epoch, CIFAR-{num_classes}"
        draw = functools.partial(drawings.draw_times, rows, title) if rows else None
        figures.append(Planned(f"figure{number}_time_cifar{num_classes}", "point", have, missing, commands, draw))
    return figures, notes


def make_panels(
    found: Mapping[Run, Outcome], fixed: Mapping[str, Any], variants: Sequence[Variant], *, at_least: int = 1
) -> dict[str, list[Panel]]:
    """The panels of each data set, whether they have runs or not."""
    by_dataset: dict[str, list[Panel]] = {}
    for dataset, model in figure_data.places(found, variants, at_least=at_least):
        if (panel := figure_data.make_panel(found, dataset, model, variants, fixed)) is not None:
            by_dataset.setdefault(dataset, []).append(panel)
    return by_dataset


def plan_figure(name: str, panels: Sequence[Panel], draw: Callable[[], Figure | None], root: str) -> Planned:
    """A figure of runs; what is missing is made below the root that a panel's other runs are in, by default `root`."""
    missing: dict[str, list[Run]] = {}
    for panel in panels:
        missing.setdefault(panel.root(root), []).extend(run for runs in panel.missing.values() for run in runs)
    commands = [line for where, runs in missing.items() for line in sweep_commands.commands(runs, where)]
    have = sum(panel.num_runs for panel in panels)
    return Planned(name, "run", have, sum(map(len, missing.values())), commands, draw if have else None)


def plan_runs(found: Mapping[Run, Outcome], fixed: Mapping[str, Any], root: str) -> tuple[list[Planned], list[str]]:
    """All figures of runs, and notes on runs that are in none of them."""
    aware = make_panels(found, fixed, figure_data.BLOCK_AWARE, at_least=2)
    every = make_panels(found, fixed, figure_data.METHODS)
    figures = []

    def accuracy(
        panels: Sequence[Panel], variants: Sequence[Variant], title: str, varied: str = ""
    ) -> Callable[[], Any]:
        drawn, labels = [panel for panel in panels if panel.runs], [variant.label for variant in variants]
        return functools.partial(drawings.draw_accuracy, drawn, labels, title, varied=(varied,))

    for dataset in sorted(aware, key=lambda name: NUMBERS.get(name, 99)):
        name, title = f"block_aware_{dataset}", f"DSB with and without the block-aware rule, {told(dataset)}"
        if dataset in NUMBERS:
            name, title = f"figure{NUMBERS[dataset]}_{name}", f"Figure {NUMBERS[dataset]}: {title}"
        draw = accuracy(aware[dataset], figure_data.BLOCK_AWARE, title, "block_aware_drop")
        figures.append(plan_figure(name, aware[dataset], draw, root))
    for dataset, panels in every.items():
        draw = accuracy(panels, figure_data.METHODS, f"Test accuracy by sparsity, {told(dataset)}", "granularity")
        figures.append(plan_figure(f"accuracy_{dataset}", panels, draw, root))
    for panel in (panel.only(figure_data.ADAPTIVE) for panels in every.values() for panel in panels):
        title = f"Turnover and exploration, {told(panel.dataset)}, {panel.model}"
        draw = functools.partial(drawings.draw_adaptations, panel, title)
        figures.append(plan_figure(f"adaptation_{panel.dataset}_{panel.model}", [panel], draw, root))
    others = figure_data.other_settings(
        found, [panel for group in (every, aware) for panels in group.values() for panel in panels]
    )
    notes = []
    for (dataset, model, *settings), count in others.items():
        chosen = " ".join(f"--set={text}" for text in settings)
        notes.append(f"{count} runs of {dataset}, {model} are in no figure; draw them with {chosen}")
    return figures, notes


def told(dataset: str) -> str:
    """The name of a data set in titles."""
    return {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}.get(dataset, dataset)


def show(console: Console, figure: Planned, out: Path) -> None:
    """Draws one figure, if it can be, and says what it lacks."""
    picture = figure.draw() if figure.draw is not None else None
    said = f"{figure.have} {figure.unit}s"
    if picture is not None:
        said += "; " + ", ".join(map(str, drawings.save(picture, out, figure.name)))
    else:
        said += ", not drawn" + ("" if figure.draw is None else ": there is no metrics.jsonl beside the summaries")
    console.print(f"{figure.name}: {said}", soft_wrap=True, highlight=False, markup=False)
    if figure.missing:
        console.print(f"  missing: {figure.missing} {figure.unit}{'s' * (figure.missing > 1)}", highlight=False)
    for command in figure.commands:
        console.print(f"    {command}", soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    if not FLAGS.root and not FLAGS.profile:
        raise ValueError(
            "neither --root nor --profile is given; give folders of runs, files of layer_profile, or both."
        )
    out = Path(FLAGS.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder.")
    fixed = fixed_from_flags()
    found, notes = figure_data.read_runs(map(Path, FLAGS.root))
    panels = [panel for file in FLAGS.profile for panel in epoch_times.read_profile(Path(file))]
    times, of_profiles = plan_times(panels, out)
    of_runs, of_settings = plan_runs(found, fixed, FLAGS.root[0] if FLAGS.root else "runs")
    out.mkdir(parents=True, exist_ok=True)
    for figure in (*times, *of_runs):
        show(console, figure, out)
    for note in (*notes, *of_profiles, *of_settings):
        console.print(note, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    define_flags()
    program.start(main)
