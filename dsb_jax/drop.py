"""Which active weights to drop: exactly k of the smallest magnitude, then the block-aware rule.

Jiang, Hu, Song, NeurIPS 2022: a weight is only worth dropping where that frees structure, because a row or
a column of a block that stays half full must stay stored whatever else goes. So of the marked weights, those
stay dropped whose row of the block holds at least C/2 marks or whose column of the block at least R/2.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.select import select_smallest


def magnitude_drop(
    blocks: Float[Array | np.ndarray, "num_blocks R C"],
    k: Int[Array, ""] | int,
    *,
    real: Bool[Array | np.ndarray, "..."] | None = None,
) -> Bool[Array, "num_blocks R C"]:
    """Marks exactly the k active weights of smallest magnitude, ties by flat index.

    Args:
      blocks: the active weights.
      k: how many to mark; may be traced.
      real: broadcastable to `blocks`, False at the weights of phantom rows (`layout.real_rows`), which exist only
        in storage and are never marked. None if R divides `out`.
    """
    return select_smallest(jnp.abs(blocks), k, where=True if real is None else real)


def block_aware_drop(marked: Bool[Array | np.ndarray, "num_blocks R C"]) -> Bool[Array, "num_blocks R C"]:
    """Keeps a mark only where dropping can free structure (paper, section "block-aware drop").

    A mark survives if its row of the block holds at least C/2 marks, or its column of the block at least R/2.
    Odd sizes are exact: of C = 5 it takes 3, since 2 * 3 >= 5.
    """
    marked = jnp.asarray(marked)
    _, rows, cols = marked.shape
    in_row = jnp.sum(marked, axis=2, keepdims=True, dtype=jnp.int32)
    in_column = jnp.sum(marked, axis=1, keepdims=True, dtype=jnp.int32)
    return marked & ((2 * in_row >= cols) | (2 * in_column >= rows))
