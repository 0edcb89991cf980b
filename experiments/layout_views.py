"""A sparse layer as matrices to look at: as stored in the model, with its rows in groups, and packed into panels.

Every row group has its own columns, so no single order of columns shows the blocks of all groups. The panel view gives
each group an order of its own: its rows are a band, and the columns of its blocks come first, block after block. Of the
4x4 example of `dsb_jax.layout`, with blocks of 2x2,

    as stored, column  0 1 2 3      rows in groups            panels
       row 0           x x x x      row 2   x x x x           row 2   [x x][x x]   columns 3 1, 0 2
       row 1           . x x .      row 0   x x x x           row 0   [x x][x x]
       row 2           x x x x      row 1   . x x .           row 1   [x x]        columns 1 2
       row 3           . x x .      row 3   . x x .           row 3   [x x]

What a band does not reach is inactive. All arrays are on the host.
"""

import dataclasses

import jax
import numpy as np

from dsb_jax.layout import BlockLayout
from dsb_jax.paths import layer_path, nodes, path_name, weights_at
from dsb_jax.train_state import TrainState

BACKWARD_ONLY = 0.4  # how dark a weight is that has a gradient but is not computed with (Top-KAST)


@dataclasses.dataclass(frozen=True)
class LayerView:
    """A sparse layer, its arrays on the host.

    Attributes:
      name: path in the model, joined by slashes.
      shape: `(out, in)` of its weight matrix.
      block_shape: `(R, C)`; (1, 1) for single weights.
      out_idx: int[num_groups, R], rows of each group; phantom rows are `>= out`.
      group: int[num_blocks], the group of each block, ascending.
      in_idx: int[num_blocks, C], columns of each block.
      blocks: float[num_blocks, R, C], the weights.
      forward: bool[num_blocks], the blocks that the layer computes with; all but for Top-KAST.
    """

    name: str
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    out_idx: np.ndarray
    group: np.ndarray
    in_idx: np.ndarray
    blocks: np.ndarray
    forward: np.ndarray

    @property
    def num_groups(self) -> int:
        return self.out_idx.shape[0]

    @property
    def unstructured(self) -> bool:
        """Whether it holds single weights."""
        return self.block_shape == (1, 1)

    @property
    def phantom(self) -> np.ndarray:
        """bool[num_groups, R]: rows that only fill up the last group."""
        return self.out_idx >= self.shape[0]

    @property
    def num_active(self) -> int:
        """Weights that the layer computes with."""
        return int((~self.phantom[self.group[self.forward]]).sum()) * self.block_shape[1]

    @property
    def group_counts(self) -> np.ndarray:
        """int[num_groups]: blocks that each group computes with."""
        return np.bincount(self.group[self.forward], minlength=self.num_groups)


def view(
    name: str, layout: BlockLayout, blocks: jax.Array | np.ndarray, forward: jax.Array | np.ndarray | None = None
) -> LayerView:
    """The view of a layout and its `blocks` [num_blocks, R, C]; `forward` says which are computed with."""
    out_idx, in_idx, start = (np.asarray(array).astype(np.int64) for array in layout.index[:3])
    group = np.repeat(np.arange(layout.num_groups), np.diff(start))
    computed = np.ones(layout.num_blocks, bool) if forward is None else np.asarray(forward).reshape(-1)
    return LayerView(name, layout.shape, layout.block_shape, out_idx, group, in_idx, np.asarray(blocks), computed)


def views(state: TrainState) -> dict[str, LayerView]:
    """Name -> view of every sparse layer of a train state; empty for a dense model."""
    found = nodes(state.topology)
    blocks = weights_at(state.params, found)
    names = {path: path_name(layer_path(path)) for path in found}
    return {
        names[path]: view(names[path], node.layout, blocks[path], None if node.aux is None else node.aux.active)
        for path, node in found.items()
    }


def as_stored(layer: LayerView) -> np.ndarray:
    """float[out, in]: 1 where a weight is active, 0 where none is; `BACKWARD_ONLY` where it only has a gradient."""
    rows, cols = np.broadcast_arrays(layer.out_idx[layer.group][:, :, None], layer.in_idx[:, None, :])
    shade = np.broadcast_to(np.where(layer.forward, 1.0, BACKWARD_ONLY)[:, None, None], rows.shape)
    real = rows < layer.shape[0]
    picture = np.zeros(layer.shape)
    picture[rows[real], cols[real]] = shade[real]
    return picture


def rows_in_groups(picture: np.ndarray, layer: LayerView) -> np.ndarray:
    """The rows of `picture` [out, in] group after group: float[num_groups * R, in]; phantom rows are nan."""
    order = layer.out_idx.reshape(-1)
    sorted_ = picture[np.minimum(order, layer.shape[0] - 1)].astype(float)
    sorted_[order >= layer.shape[0]] = np.nan
    return sorted_


def panel_columns(layer: LayerView) -> np.ndarray:
    """int[num_groups, width]: the column at each place of the panel view, -1 where there is none."""
    kept, slots = _slots(layer)
    columns = np.full((layer.num_groups, _width(slots), layer.block_shape[1]), -1)
    columns[layer.group[kept], slots] = layer.in_idx[kept]
    return columns.reshape(layer.num_groups, -1)


def panels(layer: LayerView) -> np.ndarray:
    """float[num_groups * R, width]: |w| of the weights that the layer computes with, nan where there is none.

    `width` is that of the widest group: C times its number of blocks.
    """
    kept, slots = _slots(layer)
    rows, cols = layer.block_shape
    picture = np.full((layer.num_groups, rows, _width(slots), cols), np.nan)
    magnitude = np.abs(layer.blocks[kept].astype(float))
    picture[layer.group[kept], :, slots] = magnitude
    picture[layer.phantom] = np.nan
    return picture.reshape(layer.num_groups * rows, -1)


def _slots(layer: LayerView) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that are computed with, and the place of each in its group."""
    kept = np.flatnonzero(layer.forward)
    group = layer.group[kept]
    return kept, np.arange(kept.size) - np.searchsorted(group, group)


def _width(slots: np.ndarray) -> int:
    return int(slots.max(initial=0)) + 1


def occupancy(picture: np.ndarray, most: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture of at most so many rows and columns: means over tiles, nan left out.

    Returns:
      The means, and the rows and columns of a tile (fewer at the far edges): (1, 1) for a picture that is small enough.
    """
    tile = tuple(-(-size // limit) for size, limit in zip(picture.shape, most, strict=True))
    known = np.isfinite(picture)
    edges = [np.arange(0, size, step) for size, step in zip(picture.shape, tile, strict=True)]

    def tile_sums(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(values, edges[0], axis=0), edges[1], axis=1)

    counts = tile_sums(known.astype(float))
    sums = tile_sums(np.where(known, picture, 0.0))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), (tile[0], tile[1])
