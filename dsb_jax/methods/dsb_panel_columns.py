"""DSB by panel columns, a variant of this library's: what is dropped and grown is one column of one panel, R weights.

Row groups stay as they are, and no kept weight is ever displaced, so collateral is zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.layout import block_group
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.blocks import column_strength, reachable_minimum
from dsb_jax.methods.dsb_growth import panel_scores
from dsb_jax.methods.identity import count_empty_groups
from dsb_jax.origins import move
from dsb_jax.reblocking import cut_columns
from dsb_jax.select import select_smallest


def adapt_panel_columns(
    key: jax.Array, fraction: Float[Array, ""], state: LayerState, statistic: Any, *, grow: str, min_group_blocks: int
) -> tuple[LayerState, LayerReport]:
    """One adaptation of one layer.

    Args:
      key: a PRNG key, for random growth.
      fraction: share of the panel columns to drop.
      state: of the layer.
      statistic: what the criterion must know.
      grow, min_group_blocks: see `dsb_jax.methods.DSB`.
    """
    blocks, layout, _ = state
    num_blocks, _, cols = blocks.shape
    count = jnp.round(fraction * (num_blocks * cols)).astype(jnp.int32)
    dropped = select_smallest(column_strength(blocks, layout), count, where=True)
    at = block_group(layout)[:, None], layout.in_idx
    shape = (layout.num_groups, layout.shape[1])
    active = jnp.zeros(shape, jnp.bool_).at[at].set(True)
    kept = jnp.zeros(shape, jnp.bool_).at[at].set(~dropped)
    growth = panel_scores(grow, key, statistic, layout)
    growth = jnp.where(active, 0, growth / jnp.maximum(growth.max(), jnp.finfo(jnp.float32).tiny))
    # C columns with a kept one among them outweigh any without, so no kept column is ever left out.
    new = cut_columns(
        jnp.where(kept, cols + 1.0, growth),
        layout.out_idx,
        shape=layout.shape,
        block_shape=layout.block_shape,
        num_blocks=layout.num_blocks,
        min_group_blocks=reachable_minimum(min_group_blocks, layout),
    )
    now = jnp.zeros(shape, jnp.bool_).at[block_group(new)[:, None], new.in_idx].set(True)
    weights = (layout.out_idx < layout.shape[0]).sum(axis=1, dtype=jnp.int32)[:, None]  # real ones in a column

    def count_weights(mask: Bool[Array, "num_groups in"]) -> Int[Array, ""]:
        return jnp.where(mask, weights, 0).sum(dtype=jnp.int32)

    grown, num_kept = count_weights(now & ~active), jnp.maximum(count_weights(kept), 1).astype(jnp.float32)
    new_state = LayerState(move(blocks, layout, new), new)
    report = LayerReport(
        requested=count_weights(active & ~kept),
        accepted=grown,
        turnover=grown.astype(jnp.float32) / layout.num_active,
        collateral=count_weights(kept & ~now).astype(jnp.float32) / num_kept,
        empty_groups=count_empty_groups(new_state),
    )
    return new_state, report
