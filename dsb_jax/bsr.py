"""Sparse layers as block sparse rows (BSR), the format of scipy, PyTorch and the libraries of vendors.

The R rows of a row group read the same columns. So with the rows in the order of the groups, blocks of R x 1 hold a
layer exactly: one for each column of each panel, none of it padding (but the zeros of phantom rows, in the last group).
With R = 2, C = 2 and the layout of `dsb_jax.layout`:

    rows       2 0 1 3                  the output that each row of the matrix is
    indptr     0 4 6                    group_start * C
    indices    0 1 2 3   1 2            in_idx, ascending in each group
    data       [6, 2, 1]                one column of a panel each

    y = to_bsr(params, topology)["Dense_0",].product(x)                     x[in, N] -> y[out, N]
    torch.sparse_bsr_tensor(*map(torch.from_numpy, (m.indptr, m.indices, m.data)), size=m.shape)     m = layer.matrix
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from dsb_jax.layout import BlockLayout
from dsb_jax.paths import layer_path, nodes, path_name, weights_at
from dsb_jax.topology import by_layer, split_stack


class BSRLayer(NamedTuple):
    """One layer, on the host.

    Attributes:
      matrix: scipy.sparse.bsr_array of [num_groups * R, in] in blocks of R x 1; columns in the order of the kernel's
        inputs (of a convolution: kernel height, width, channel).
      rows: int[num_groups * R], the output that each row is; phantom rows, which are zero, are `>= out`.
      out: outputs of the layer.
    """

    matrix: Any
    rows: np.ndarray
    out: int

    def product(self, x: np.ndarray) -> np.ndarray:
        """`W x` in the order of the model's outputs: x[in] or [in, N] -> [out] or [out, N]."""
        y = self.matrix @ x
        real = self.rows < self.out
        result = np.empty((self.out, *y.shape[1:]), y.dtype)
        result[self.rows[real]] = y[real]
        return result


def to_bsr(params: Any, topology: Any) -> dict[tuple[Any, ...], BSRLayer]:
    """Every sparse layer as a BSR matrix of what it computes with.

    Args:
      params: nested dictionaries, or anything that holds blocks at the paths of the topology.
      topology: that belongs to them.

    Returns:
      Layers by their paths. Those of a stack (`nn.scan`, `nn.vmap`) have their place in it, one number for each stack
      axis, at the end of the path. Weights of 2 bytes come as float32, for scipy has no products of others.

    Raises:
      ValueError: if the topology does not belong to the parameters.
    """
    found = nodes(topology)
    weights = weights_at(params, found)
    layers: dict[tuple[Any, ...], BSRLayer] = {}
    for path, node in found.items():
        if np.shape(weights[path]) != node.blocks_shape:
            raise ValueError(
                f"{path_name(path)} has shape {np.shape(weights[path])}, its topology is of {node.blocks_shape}; pass "
                "the topology that belongs to these parameters."
            )
        computed_with = by_layer(lambda _, aux, b: b if aux is None else aux.forward(b), node, weights[path])
        stack = jax.tree.map(np.asarray, split_stack((node.layout, computed_with), node.stack_axes))
        for number, place in enumerate(np.ndindex(node.stack_shape)):
            layer = _to_bsr(*jax.tree.map(lambda leaf, number=number: leaf[number], stack))
            if node.aux is not None:
                layer.matrix.eliminate_zeros()  # weights that are kept, but not computed with
            layers[*layer_path(path), *place] = layer
    return layers


def _to_bsr(layout: BlockLayout, blocks: np.ndarray) -> BSRLayer:
    import scipy.sparse  # takes half a second, of nobody who does not come here

    (out, in_), (rows, columns) = layout.shape, layout.block_shape
    group = np.repeat(np.arange(layout.num_groups), np.diff(layout.group_start))
    real = (np.asarray(layout.out_idx)[group] < out)[:, :, None]
    values = np.where(real, blocks.astype(np.float32) if blocks.dtype.itemsize < 4 else blocks, 0)
    indices = np.asarray(layout.in_idx, np.int32).reshape(-1)
    order = np.lexsort((indices, np.repeat(group, columns)))  # by group, then by column
    panels = values.transpose(0, 2, 1).reshape(-1, rows, 1)[order]
    starts = np.asarray(layout.group_start, np.int32) * columns
    shape = layout.num_groups * rows, in_
    matrix = scipy.sparse.bsr_array((panels, indices[order], starts), shape=shape, blocksize=(rows, 1))
    return BSRLayer(matrix, np.asarray(layout.out_idx).reshape(-1), out)
