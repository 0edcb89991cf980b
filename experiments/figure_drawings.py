"""The figures as pictures: panels of points in, a matplotlib figure out; a method has the same colour everywhere."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import grid
from experiments.epoch_times import IMAGE_SIZE, TRAIN_IMAGES, ProfileTerms, TimePanel
from experiments.figure_data import (
    ADAPTIVE,
    BLOCKS,
    PANEL_COLUMNS,
    WITHOUT_RULE,
    Panel,
    Statistic,
    adaptations,
)
from experiments.flags import default_values

# The palette of Okabe and Ito, "Color Universal Design", 2008: colour-blind readers tell it apart. Markers differ, too.
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#000000", "linestyle": "--"},
    "small_dense": {"color": "#7f7f7f", "marker": "v"},
    "ssb": {"color": "#E69F00", "marker": "s"},
    "set": {"color": "#56B4E9", "marker": "^"},
    "rigl": {"color": "#0072B2", "marker": "D"},
    "topkast": {"color": "#CC79A7", "marker": "P"},
    BLOCKS: {"color": "#D55E00", "marker": "o"},
    PANEL_COLUMNS: {"color": "#009E73", "marker": "X"},
    WITHOUT_RULE: {"color": "#D55E00", "marker": "o", "linestyle": ":", "markerfacecolor": "white"},
}
ESTIMATE: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "hatch": "////", "linewidth": 1}
SIDE_BY_SIDE = 0.06  # from one point to the next at the same sparsity, in ticks

# Settings that every figure of runs tells; of the others it tells those that are not the data set's defaults.
_TOLD = ("epochs", "batch_size", "distribution", "block_shape", "grow")


def place_of(sparsity: float) -> float:
    """Where a sparsity is on the axis: by the logarithm of the density, so 0.8, 0.9, 0.95 are at equal distances."""
    return float(-np.log2(1 - sparsity))


def draw_times(rows: Sequence[Sequence[TimePanel]], title: str) -> Figure:
    """Seconds of an epoch: bars for dense, by XLA and PyTorch, the paper's estimate, and the measured step.

    A row for each set of terms. Ratios are to the faster of the dense steps.
    """
    figure, grid = _panels(len(rows), max(map(len, rows)), width=3.8, height=3.2)
    names = [field.name for field in dataclasses.fields(ProfileTerms)]
    differ = [name for name in names if len({getattr(row[0].terms, name) for row in rows}) > 1]
    shared = [name for name in names if name not in differ]
    legend: dict[str, Any] = {}
    for row, line in zip(rows, grid, strict=True):
        for axes in line[len(row) :]:
            axes.remove()
        for panel, axes in zip(row, line, strict=False):
            fastest = panel.fastest_dense_s
            if panel.torch_s is None:
                legend["dense"] = axes.bar([0], [panel.dense_s], 0.5, color="#7f7f7f")
            else:
                legend["dense, XLA"] = axes.bar([-0.21], [panel.dense_s], 0.36, color="#7f7f7f")
                legend["dense, PyTorch"] = axes.bar([0.21], [panel.torch_s], 0.36, color="#bfbfbf")
            axes.axhline(fastest, color="#7f7f7f", linestyle="--", linewidth=0.8)
            for i, time in enumerate(panel.times, start=1):
                if time.estimated_s is not None:
                    bar = axes.bar([i - 0.21], [time.estimated_s], 0.36, **ESTIMATE)
                    legend["sparse, estimated as in the paper"] = bar
                    _tell_ratio(axes, i - 0.21, time.estimated_s, fastest)
                bar = axes.bar([i + 0.21], [time.measured_s], 0.36, color=STYLES[BLOCKS]["color"])
                legend["sparse, training step measured"] = bar
                _tell_ratio(axes, i + 0.21, time.measured_s, fastest)
            axes.set_xticks(range(len(panel.times) + 1), ["dense", *(f"{time.sparsity:g}" for time in panel.times)])
            highest = max(
                [panel.dense_s, panel.torch_s or 0, *(max(t.measured_s, t.estimated_s or 0) for t in panel.times)]
            )
            axes.set(xlabel="sparsity of the sparse layers", ylim=(0, 1.1 * highest))
            own = textwrap.fill(_told_profile(panel, differ), 46)
            axes.set_title(f"{panel.model}\n{own}" if own else panel.model, fontsize=10)
        line[0].set_ylabel("seconds an epoch")
    note = f"{_told_profile(rows[0][0], shared)}. An epoch is {TRAIN_IMAGES:,} // batch size training steps of "
    note += f"{IMAGE_SIZE}x{IMAGE_SIZE} images: its time is steps x step time, without data loading, evaluation and "
    over = "dense, the faster of the two," if any(panel.torch_s for row in rows for panel in row) else "dense"
    _finish(figure, title, f"{note}adaptations. Above the bars: {over} over sparse.", legend)
    return figure


def _tell_ratio(axes: Axes, place: float, seconds: float, dense_s: float) -> None:
    axes.annotate(f"{dense_s / seconds:.1f}x", (place, seconds), (0, 2.5), textcoords="offset points",
                  ha="center", va="bottom", fontsize=7, bbox={"color": "white", "pad": 0.5})  # fmt: skip


def _told_profile(panel: TimePanel, names: Sequence[str]) -> str:
    """These terms of a profile in words; `implementation` only if it was chosen by hand."""
    words = {
        "device": "on {}", "block_shape": "blocks of {}", "distribution": "{} densities", "batch_size": "batch {}",
        "dtype": "{}", "implementation": "implementation {}",
    }  # fmt: skip
    values = {name: getattr(panel.terms, name) for name in words if name in names}
    told = [name for name, value in values.items() if (name, value) != ("implementation", "auto")]
    return ", ".join(words[name].format(values[name]) for name in told)


def draw_accuracy(panels: Sequence[Panel], labels: Sequence[str], title: str, *, varied: Sequence[str] = ()) -> Figure:
    """Test accuracy by sparsity, a panel for each model: a curve for each label, dense as a horizontal line.

    Args:
      panels: of one data set, each with at least one run.
      labels: of the curves.
      title: of the figure.
      varied: fields of the terms that the curves set themselves.
    """
    figure, (line,) = _panels(1, len(panels), width=4.4, height=3.8)
    legend: dict[str, Any] = {}
    statistics: list[Statistic] = []
    curves = [label for label in labels if label != "dense"]
    for panel, axes in zip(panels, line, strict=True):
        for label in labels:
            found = panel.accuracy(label)
            statistics += found.values()
            if None in found:
                legend[label] = _draw_level(axes, found[None], STYLES[label])
            elif found:
                shift = SIDE_BY_SIDE * (curves.index(label) - (len(curves) - 1) / 2)
                legend[label] = _draw_curve(axes, found, shift, STYLES[label])
        places = [place_of(sparsity) for sparsity in panel.sparsities]
        axes.set_xticks(places, [f"{sparsity:g}" for sparsity in panel.sparsities])
        if places:
            axes.set_xlim(min(places) - 0.5, max(places) + 0.5)
        axes.set_xlabel("sparsity of the sparse layers")
        own = textwrap.fill(_own_terms(panel, panels, varied), 46)
        axes.set_title(f"{panel.model}\n{own}" if own else panel.model, fontsize=10)
    line[0].set_ylabel("test accuracy (%)")
    in_order = {label: legend[label] for label in labels if label in legend}
    _finish(figure, title, f"{_seeds(statistics)}; {_shared_terms(panels, varied)}", in_order)
    return figure


def _draw_level(axes: Axes, level: Statistic, style: dict[str, Any]) -> Any:
    """A horizontal line with a band of one standard deviation."""
    mean, std = 100 * level.mean, 100 * (level.std or 0.0)
    axes.axhspan(mean - std, mean + std, color=style["color"], alpha=0.1, linewidth=0)
    return axes.axhline(mean, linewidth=1.2, **style)


def _draw_curve(axes: Axes, found: dict[Any, Statistic], shift: float, style: dict[str, Any]) -> Any:
    """Means joined by a line, with one standard deviation as error bars where there are several seeds."""
    return axes.errorbar(
        [place_of(sparsity) + shift for sparsity in found],
        [100 * statistic.mean for statistic in found.values()],
        yerr=[np.nan if statistic.std is None else 100 * statistic.std for statistic in found.values()],
        capsize=2.5, markersize=5, linewidth=1.3, elinewidth=1, **style,
    )  # fmt: skip


def draw_adaptations(panel: Panel, title: str) -> Figure | None:
    """Turnover above, exploration below, by epoch: a column for each sparsity; None if no run has metrics."""
    columns: dict[float, dict[str, Any]] = {}
    statistics = []
    for sparsity in panel.sparsities:
        for method in ADAPTIVE:
            outcomes = panel.runs.get(method, {}).get(sparsity, {})
            if (curve := adaptations(outcomes.values())) is not None:
                columns.setdefault(sparsity, {})[method] = curve
                statistics.append(Statistic(0.0, None, len(outcomes)))
    if not columns:
        return None
    figure, grid = _panels(2, len(columns), width=4.0, height=2.6)
    legend: dict[str, Any] = {}
    for line, name, what in zip(
        grid, ("turnover", "exploration"), ("active weights replaced (%)", "positions ever active (%)"), strict=True
    ):
        for axes, (sparsity, curves) in zip(line, columns.items(), strict=True):
            for method, curve in curves.items():
                style = STYLES[method] | ({} if len(curve.epochs) <= 30 else {"marker": ""})
                shares = [100 * share for share in getattr(curve, name)]
                (legend[method],) = axes.plot(curve.epochs, shares, markersize=4, linewidth=1.3, **style)
            axes.set_title(f"{name}, sparsity {sparsity:g}", fontsize=10)
            axes.sharey(line[0])
        line[0].set_ylabel(what)
        line[0].set_ylim(bottom=0)
    for axes in grid[1]:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (axes for line in grid for axes in line[1:]):
        axes.tick_params(labelleft=False)
    in_order = {method: legend[method] for method in ADAPTIVE if method in legend}
    _finish(figure, title, f"{_seeds(statistics, spread=False)}; {_shared_terms([panel])}", in_order)
    return figure


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes the figure as PNG and as PDF; the same points give the same bytes."""
    paths = [folder / f"{name}.{ending}" for ending in ("png", "pdf")]
    figure.savefig(paths[0], dpi=130)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Rows of axes, each so many inches, with room for a title and a legend."""
    figure = Figure(figsize=(max(width * columns, 5.6), height * rows + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
    for axes in (axes for row in grid for axes in row):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _columns(labels: Sequence[str], width: float) -> int:
    """As many columns of a legend as go into so many inches, at about 0.07 for a character and 0.55 for its sign."""

    def inches(columns: int) -> float:
        return sum(0.55 + 0.07 * max(map(len, column)) for column in np.array_split(labels, columns))

    return max((n for n in range(1, len(labels) + 1) if inches(n) <= width), default=1)


def _finish(figure: Figure, title: str, note: str, legend: dict[str, Any]) -> None:
    """Title above the panels, note and legend below them, where they cover nothing."""
    width = figure.get_size_inches()[0]
    columns = _columns([*legend], width)
    figure.suptitle(title, fontsize=12)
    figure.legend(
        [*legend.values()], [*legend], loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        title=textwrap.fill(note, round(15.5 * width)), title_fontsize=8,
    )  # fmt: skip


def _shared_terms(panels: Sequence[Panel], varied: Sequence[str] = ()) -> str:
    """What all panels have in common, in words; what differs is told by their titles."""
    terms, defaults = panels[0].terms, default_values(panels[0].dataset)
    shared = [
        name for name in terms
        if name not in ("dataset", "model", *varied) and all(panel.terms[name] == terms[name] for panel in panels)
    ]  # fmt: skip
    told = [name for name in shared if name in _TOLD or terms[name] != defaults[name]]
    return ", ".join(_tell(name, terms[name]) for name in sorted(told, key=lambda name: name not in _TOLD))


def _own_terms(panel: Panel, panels: Sequence[Panel], varied: Sequence[str] = ()) -> str:
    """In what a panel differs from others, in words."""
    names = [name for name in panel.terms if name not in ("dataset", "model", *varied)]
    own = [name for name in names if any(panel.terms[name] != other.terms[name] for other in panels)]
    return ", ".join(_tell(name, panel.terms[name]) for name in own)


def _tell(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {grid.setting_text(value)}"


def _seeds(statistics: Sequence[Statistic], *, spread: bool = True) -> str:
    counts = sorted({statistic.n for statistic in statistics})
    if counts[-1] == 1:
        return "One seed"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean {'and standard deviation ' if spread else ''}over {number} seeds"
