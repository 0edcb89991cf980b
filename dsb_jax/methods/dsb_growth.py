"""By which criterion DSB grows: single positions for re-blocking, or scores of whole panel columns.

Jiang, Hu, Song, NeurIPS 2022, section 4, and `dsb_jax.grow`. `norm` takes outputs in whole row groups of the current
layout, by the norm over the group; `norm_unaligned` takes strips of the R strongest outputs, as the paper words it,
which cut across the groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.grow import grow_block_gradient, grow_gradient, grow_norm, grow_random
from dsb_jax.layout import BlockLayout
from dsb_jax.ops.statistics import Gradient, OutputInputNorms, PanelGradientNorm, Statistic

# What each criterion must know.
STATISTICS: dict[str, Statistic | None] = {
    "norm": OutputInputNorms(),
    "norm_unaligned": OutputInputNorms(),
    "block_gradient": PanelGradientNorm(),
    "gradient": Gradient(),
    "random": None,
}
GROW = tuple(STATISTICS)


def grown_positions(
    grow: str,
    key: jax.Array,
    statistic: Any,
    k: Int[Array, ""],
    candidate: Bool[Array, "out in"],
    layout: BlockLayout,
) -> Bool[Array, "out in"]:
    """The k candidates to grow."""
    if grow in ("norm", "norm_unaligned"):
        dy_norm = statistic.dy_norm
        if grow == "norm":  # every row gets the norm of its group, so that the strips are whole groups
            by_group = jnp.broadcast_to(_group_norms(dy_norm, layout)[:, None], layout.out_idx.shape)
            dy_norm = jnp.zeros_like(dy_norm).at[layout.out_idx].set(by_group, mode="drop")
        return grow_norm(dy_norm, statistic.x_norm, k, candidate=candidate, block_shape=layout.block_shape)
    if grow == "block_gradient":
        return grow_block_gradient(statistic, k, candidate=candidate, out_idx=layout.out_idx)
    if grow == "gradient":
        return grow_gradient(statistic, k, candidate=candidate)
    return grow_random(key, k, candidate=candidate, out_idx=layout.out_idx)


def panel_scores(grow: str, key: jax.Array, statistic: Any, layout: BlockLayout) -> Float[Array, "num_groups in"]:
    """The (bound on the) gradient norm of each panel column by the same criteria."""
    if grow in ("norm", "norm_unaligned"):
        return _group_norms(statistic.dy_norm, layout)[:, None] * statistic.x_norm[None]
    if grow == "block_gradient":
        return statistic
    if grow == "gradient":
        return _group_norms(statistic, layout)
    return jax.random.uniform(key, (layout.num_groups, layout.shape[1]), jnp.float32, minval=0.01)


def _group_norms(rows: Float[Array, "out ..."], layout: BlockLayout) -> Float[Array, "num_groups ..."]:
    """The norm over the rows of each group."""
    rows = rows.at[layout.out_idx].get(mode="fill", fill_value=0)
    return jnp.sqrt(jnp.square(rows).sum(axis=1))
