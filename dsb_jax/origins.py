"""Where weights come from when a layout changes: values move without a dense matrix.

Whatever stays active keeps its bits, wherever its block goes; what is newly active gets a fill value. Phantom rows
hold zeros. A weight finds its old place through `[num_groups, in]` integers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsb_jax.layout import BlockLayout, block_group, block_rows, real_rows
from pallas_kernels.kernel_index import row_places


def origins(old: BlockLayout, new: BlockLayout) -> Int[Array, "num_blocks R C"]:
    """Where each weight of `new` is stored in `old`: a flat index into its blocks, past their end if nowhere.

    Nothing of size `out * in` is made. Row i is found by its place among the rows in the order of the groups, column j
    by its place in the panel of that row's group. The two layouts may differ in their number of blocks.
    """
    rows, cols = old.block_shape
    num_columns = old.in_idx.size
    place = row_places(old.out_idx)
    column = jnp.full((old.num_groups, old.shape[1]), -1, jnp.int32)
    numbers = jnp.arange(num_columns, dtype=jnp.int32).reshape(old.in_idx.shape)
    column = column.at[block_group(old)[:, None], old.in_idx].set(numbers)
    row = place[block_rows(new)][:, :, None]
    column = column[row // rows, new.in_idx[:, None, :]]
    index = (column // cols * rows + row % rows) * cols + column % cols
    return jnp.where((column >= 0) & real_rows(new), index, num_columns * rows)


def take(values: jax.Array, origin: Int[Array, "num_blocks R C"], *, fill: float = 0) -> jax.Array:
    """Values of the old blocks at their new places; `fill`, which phantom rows would get too, where they are new."""
    return jnp.asarray(values).reshape(-1).at[origin].get(mode="fill", fill_value=fill)


def move(values: jax.Array, old: BlockLayout, new: BlockLayout) -> jax.Array:
    """`take` by `origins`: bit-identical if active in both layouts, 0 if newly active."""
    return take(values, origins(old, new))
