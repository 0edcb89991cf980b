"""A picture of a checkpoint's masks: layers as stored, with their rows in groups, and with the blocks of every group.

    python -m experiments.show_layout --checkpoint=PATH [--layers=NAME,...] [--step=N] --out=FILE.png

For each layer, from above: the mask of its weight matrix as the model has it; its rows permuted so that those of a row
group are neighbours; and each group as a band of its own columns, block after block, in which the blocks are the solid
rectangles that the kernels read (`experiments.layout_views`). The strip on the left gives every row the colour of its
group. At the bottom, the turnover of every layer at each adaptation, if there is a metrics.jsonl beside the checkpoint.
Layers of single weights (rigl, set, topkast) have no groups to permute: their rows are shown side by side. The file is
a PNG or a PDF by its ending.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure

from dsb_jax.checkpoint import CHECKPOINTS
from dsb_jax.paths import path_name
from dsb_jax.training.checkpoints import restore
from experiments import layout_views, program
from experiments.layout_views import LayerView
from experiments.outcomes import read_adaptations

FLAGS = flags.FLAGS

SHOWN = 3  # layers by default
WIDTH = 12.0  # inches
DPI = 130
# Pixels of a matrix: more are averaged, so that a single weight does not vanish between two of them.
MOST = (400, 1300)
NARROWEST = 0.06  # inches between two lines that are still drawn apart
MASK, MAGNITUDE, GROUPS = "Greys", "cividis", "turbo"


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("checkpoint", None, "A workdir, its checkpoints folder, or one step's folder.", required=True)
    flags.DEFINE_integer("step", None, "Which checkpoint; by default the latest.")
    flags.DEFINE_list("layers", None, f"Names or patterns such as '*conv_1'; by default {SHOWN} over the whole depth.")
    flags.DEFINE_string("out", None, "The picture: a file that ends in .png or .pdf.", required=True)


def choose(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """The layers to show, in the order of the model.

    Raises:
      ValueError: if a pattern fits none.
    """
    if patterns is None:
        places = np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int)
        return [names[place] for place in places]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"layers={pattern!r} is none of the sparse layers {', '.join(names)}.")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def caption(layer: LayerView) -> str:
    """Shape, density, blocks and groups in words."""
    out, in_ = layer.shape
    density = layer.num_active / (out * in_)
    text = f"{layer.name}: {out} x {in_} (out x in), density {density:.4f}"
    counts = layer.group_counts
    some = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.max()}"
    empty = int((counts == 0).sum())
    if layer.unstructured:
        if not layer.forward.all():
            text += f", with a gradient {len(layer.forward) / (out * in_):.4f}"
        return f"{text}, {layer.num_active:,} single weights, {some} in a row, {empty} empty rows"
    size = "x".join(map(str, layer.block_shape))
    groups = f"{layer.num_groups} row groups of {some}, {empty} empty groups"
    if phantom := int(layer.phantom.sum()):
        groups += f", {phantom} phantom rows in the last"
    return f"{text}, {len(layer.group):,} blocks of {size} in {groups}"


def find_metrics(path: Path) -> Path:
    """The folder whose metrics.jsonl belongs to a checkpoint: a workdir, its checkpoints folder, or one step of it."""
    path = path.expanduser().absolute()
    for folder, below in ((path, path), (path.parent, path), (path.parent.parent, path.parent)):
        if folder != below and below.name == CHECKPOINTS:
            return folder
    return path


def draw(layers: Sequence[LayerView], turnover: Sequence[Mapping[str, Any]], names: Sequence[str], title: str,
         step: int) -> Figure:  # fmt: skip
    """The whole picture.

    Args:
      layers: to show.
      turnover: entries of kind "adapt" of the run's metrics; none are drawn if it is empty.
      names: all sparse layers, in the order of the model.
      title: of the picture.
      step: of the checkpoint.
    """
    heights = [sum(_heights(layer)) + 0.9 for layer in layers]
    if turnover:
        heights.append(1.2 + 0.2 * len(names))
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    parts = np.atleast_1d(np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.02)))
    for part, layer in zip(parts, layers, strict=False):
        draw_layer(part, layer)
    if turnover:
        draw_turnover(parts[-1], turnover, names, step)
    return figure


def _heights(layer: LayerView) -> list[float]:
    """Inches of the pictures of a layer, by its rows."""
    height = float(np.clip(layer.num_groups * layer.block_shape[0] / 80, 1.0, 2.6))
    return [height] * (2 if layer.unstructured else 3)


def draw_layer(part: SubFigure, layer: LayerView) -> None:
    """The pictures of one layer, one above the other."""
    part.suptitle(caption(layer), fontsize=10, x=0.01, ha="left", weight="bold")
    heights = _heights(layer)
    axes = list(part.subplots(len(heights), 1, height_ratios=heights))
    rows = layer.block_shape[0]
    stored, group = layout_views.as_stored(layer), np.repeat(np.arange(layer.num_groups), rows)
    group_of_row = np.empty(group.size)
    group_of_row[layer.out_idx.reshape(-1)] = group
    out, in_ = layer.shape
    note = "" if layer.forward.all() else ", grey where a weight has a gradient but is not computed with"
    _draw_mask(axes[0], stored, f"mask as stored{note}", "row")
    if not layer.unstructured:
        _mark_groups(axes[0], group_of_row[:out])
        _draw_mask(axes[1], layout_views.rows_in_groups(stored, layer), "mask, rows in groups", "row group")
        _mark_groups(axes[1], group)
        _draw_group_lines(axes[1], layer, heights[1], "#D55E00")
    axes[-2].set_xlabel("input column", fontsize=8, labelpad=1)
    packed = layout_views.panels(layer)
    what = "single weights of each row" if layer.unstructured else "blocks of each group on the group's own columns"
    limit = float(np.nanquantile(packed, 0.99)) or 1.0
    shown, tile = layout_views.occupancy(packed, MOST)
    image = _show(axes[-1], shown, packed.shape, cmap=MAGNITUDE, vmin=0, vmax=limit)
    axes[-1].set_title(f"{what}: |w|{_tell_tile(tile, 'mean over')}", fontsize=8, loc="left", pad=3)
    axes[-1].set_ylabel("row" if layer.unstructured else "row group", fontsize=8)
    rest = in_ - packed.shape[1]
    axes[-1].set_xlabel(
        f"place among the active columns of the {'row' if layer.unstructured else 'group'}; the other {rest:,} or more "
        f"of {in_:,} columns are inactive" if rest else "place among the active columns",
        fontsize=8, labelpad=1,
    )  # fmt: skip
    if not layer.unstructured:
        _mark_groups(axes[-1], group)
        _draw_group_lines(axes[-1], layer, heights[-1], "white")
        _draw_block_lines(axes[-1], layer, packed.shape[1])
    part.colorbar(image, ax=axes[-1], pad=0.01, aspect=12, extend="max").ax.tick_params(labelsize=7)


def _show(axes: Axes, picture: np.ndarray, shape: tuple[int, ...], **how: Any) -> Any:
    """A matrix of `shape` whose picture may have fewer pixels; row 0 is above."""
    axes.set_facecolor("#ffffff")
    axes.tick_params(labelsize=7)
    extent = (0, shape[1], shape[0], 0)
    return axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent, **how)


def _draw_mask(axes: Axes, mask: np.ndarray, what: str, ylabel: str) -> None:
    shown, tile = layout_views.occupancy(mask, MOST)
    # Averages are scaled to the fullest tile: at a density of 0.1 they would all be pale.
    _show(axes, shown, mask.shape, cmap=MASK, vmin=0, vmax=np.nanmax(shown))
    axes.set_title(f"{what}{_tell_tile(tile, 'share of active weights in')}", fontsize=8, loc="left", pad=3)
    axes.set_ylabel(ylabel, fontsize=8)


def _tell_tile(tile: tuple[int, int], what: str) -> str:
    return "" if tile == (1, 1) else f" (a pixel is the {what} {tile[0]} x {tile[1]} positions)"


def _mark_groups(axes: Axes, group: np.ndarray) -> None:
    """A strip on the left that gives each row the colour of its group, and ticks at groups where they are sorted."""
    strip = axes.inset_axes((-0.012, 0, 0.008, 1))
    strip.imshow(group[:, None], aspect="auto", interpolation="nearest", cmap=GROUPS)
    strip.set_axis_off()
    axes.tick_params(axis="y", left=False, pad=12)


def _draw_group_lines(axes: Axes, layer: LayerView, height: float, color: str) -> None:
    """Lines between the row groups where there is room for them, and the numbers of some groups."""
    rows, groups = layer.block_shape[0], layer.num_groups
    every = -(-groups // max(1, int(height / 0.16)))
    axes.set_yticks([(g + 0.5) * rows for g in range(0, groups, every)], [str(g) for g in range(0, groups, every)])
    if height / groups >= NARROWEST:
        for g in range(1, groups):
            axes.axhline(g * rows, color=color, linewidth=0.6)


def _draw_block_lines(axes: Axes, layer: LayerView, width: int) -> None:
    """Lines between the blocks of each group, as far as it reaches, where there is room for them."""
    rows, cols = layer.block_shape
    if WIDTH * cols / width < NARROWEST:
        return
    lines = [
        [(slot * cols, g * rows), (slot * cols, (g + 1) * rows)]
        for g, count in enumerate(layer.group_counts)
        for slot in range(1, count + 1)
    ]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.8))


def draw_turnover(part: SubFigure, entries: Sequence[Mapping[str, Any]], names: Sequence[str], step: int) -> None:
    """The share of a layer's active weights that each adaptation replaced, a row for each layer."""
    axes = part.subplots()
    steps = [entry["step"] for entry in entries]
    last = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    shares = [[100 * entry["layers"].get(name, {}).get("turnover", np.nan) for entry in entries] for name in names]
    mesh = axes.pcolormesh([*steps, last], np.arange(len(names) + 1), shares, cmap=MAGNITUDE, vmin=0)
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("training step of the adaptation", fontsize=8)
    axes.set_title("turnover of each layer: active weights replaced (%)", fontsize=10, loc="left", weight="bold")
    if step <= steps[-1]:
        axes.axvline(step, color="#D55E00")
        axes.set_title(f"line: this checkpoint, step {step}", fontsize=8, loc="right", color="#D55E00")
    part.colorbar(mesh, ax=axes, pad=0.01, aspect=12).ax.tick_params(labelsize=7)


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    out = Path(FLAGS.out)
    if out.suffix.lower() not in (".png", ".pdf"):
        raise ValueError(f"out={out} ends in neither .png nor .pdf; name such as layout.png.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out={out}: there is no folder {out.parent}; make it first.")
    restored = restore(FLAGS.checkpoint, step=FLAGS.step)
    config, plan = restored.config, restored.components.plan
    found = layout_views.views(restored.state)
    if plan is None or not found:
        raise ValueError(f"checkpoint={FLAGS.checkpoint} is of a dense model (method={config.method}), which has no "
                         "masks; give one of dsb, ssb, rigl, set or topkast.")  # fmt: skip
    names = [path_name(path) for path in plan.sparse]
    shown = choose(names, FLAGS.layers)
    entries = read_adaptations(find_metrics(Path(FLAGS.checkpoint)))
    title = f"{config.dataset}, {config.model}, {config.method}, sparsity {config.sparsity:g}, step {restored.step:,}"
    picture = draw([found[name] for name in shown], entries, names, title, restored.step)
    picture.savefig(out, dpi=DPI, metadata={"CreationDate": None} if out.suffix.lower() == ".pdf" else None)
    for name in shown:
        console.print(caption(found[name]), soft_wrap=True, highlight=False)
    if len(shown) < len(names):
        others = ", ".join(name for name in names if name not in shown)
        console.print(f"not shown: {others}; --layers='*' shows all", soft_wrap=True, highlight=False)
    if not entries:
        console.print("no adaptations are noted beside the checkpoint, so there is no picture of turnover")
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    program.start(main)
