"""DSB as in the paper: single weights are dropped and grown, and the whole layer is blocked anew.

marked  = the k active weights of smallest magnitude, k = round(drop_fraction(t) * num_active)
dropped = the marks that can free structure (block-aware rule), or all of them
grown   = as many inactive positions, chosen by a criterion
score   = |w| where kept, the mean of the kept |w| where grown, 0 elsewhere
layout  = reblock(score), exactly num_blocks blocks
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsb_jax.drop import block_aware_drop as keep_structural_drops
from dsb_jax.drop import magnitude_drop
from dsb_jax.layout import BlockLayout, pack, real_rows, unpack
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.blocks import reachable_minimum
from dsb_jax.methods.dsb_growth import grown_positions
from dsb_jax.methods.identity import count_empty_groups
from dsb_jax.origins import move
from dsb_jax.reblocking import cut_columns, reblock

# Among magnitudes, which are not negative: positions without a kept weight.
_DROPPED, _INACTIVE, _GROWN = -1.0, -2.0, -3.0


def adapt_blocks(
    key: jax.Array,
    fraction: Float[Array, ""],
    state: LayerState,
    statistic: Any,
    *,
    grow: str,
    block_aware_drop: bool,
    growth_score: float,
    min_group_blocks: int,
    keep_grouping: bool,
    regroup: bool | Bool[Array, ""],
) -> tuple[LayerState, LayerReport]:
    """One adaptation of one layer.

    Args:
      key: a PRNG key, for random growth.
      fraction: share of the active weights to mark.
      state: of the layer.
      statistic: what the criterion must know.
      grow, block_aware_drop, growth_score, min_group_blocks, keep_grouping: see `dsb_jax.methods.DSB`.
      regroup: whether rows may change groups; may be traced.
    """
    blocks, layout, _ = state
    sizes: dict[str, Any] = {
        "block_shape": layout.block_shape,
        "num_blocks": layout.num_blocks,
        "min_group_blocks": reachable_minimum(min_group_blocks, layout),
    }
    real = real_rows(layout)
    marked = magnitude_drop(blocks, jnp.round(fraction * layout.num_active).astype(jnp.int32), real=real)
    dropped = keep_structural_drops(marked) if block_aware_drop else marked
    requested = dropped.sum(dtype=jnp.int32)
    kept = real & ~dropped
    num_kept = kept.sum(dtype=jnp.int32)
    num_kept_or_one = jnp.maximum(num_kept, 1).astype(jnp.float32)
    magnitude = jnp.where(kept, jnp.abs(blocks).astype(jnp.float32), 0)
    mean = magnitude.sum() / num_kept_or_one
    # One dense matrix tells all: what is kept (its magnitude), was dropped, or is not active.
    before = unpack(jnp.where(kept, magnitude, _DROPPED), layout, fill=_INACTIVE)
    grown = grown_positions(grow, key, statistic, requested, before == _INACTIVE, layout)
    score = jnp.where(grown, growth_score * mean, jnp.maximum(before, 0))
    new = either(
        regroup,
        lambda: reblock(score, previous=layout if keep_grouping else None, **sizes),
        lambda: cut_columns(_group_sums(score, layout), layout.out_idx, shape=layout.shape, **sizes),
    )
    # What the active weights of the new layout were before.
    were = jnp.where(real_rows(new), pack(jnp.where(grown, _GROWN, before), new), _DROPPED)
    still_kept = (~(were < 0)).sum(dtype=jnp.int32)  # a NaN is kept, too
    new_state = LayerState(move(blocks, layout, new), new)
    report = LayerReport(
        requested=requested,
        accepted=(were == _GROWN).sum(dtype=jnp.int32),
        turnover=(were <= _INACTIVE).sum(dtype=jnp.int32).astype(jnp.float32) / layout.num_active,
        collateral=(num_kept - still_kept).astype(jnp.float32) / num_kept_or_one,
        empty_groups=count_empty_groups(new_state),
    )
    return new_state, report


def either(condition: bool | jax.Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """`yes()` or `no()`, of which only one is compiled where the condition is known."""
    if isinstance(condition, bool):
        return yes() if condition else no()
    return jax.lax.cond(condition, yes, no)


def _group_sums(score: Float[Array, "out in"], layout: BlockLayout) -> Float[Array, "num_groups in"]:
    """The sum over the rows of each group."""
    return score.at[layout.out_idx].get(mode="fill", fill_value=0).sum(axis=1)
