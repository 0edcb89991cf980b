"""Top-KAST: forward with the largest weights, gradients for a few more, all weights kept.

Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, sections 2.1 to 2.3.
Of the N weights w of a layer of density d,

    A = the Nd of largest |w|         the forward set: the layer computes with these, all others read zero
    B = the Nd + M of largest |w|     the backward set, of which A is a part: only these have a gradient
    penalty = lambda / 2 * (sum over A of w^2  +  1 / d * sum over B without A of w^2)

so that a weight outside of the forward set has to earn its way in before the penalty, stronger there, wears it down
(exploration regularizer). A and B are chosen anew every `update_interval` steps, until the same step as for the other
methods, so that they compare on equal terms. (The paper refreshes to the end; every 100 steps served it as well as 1.)

Storage of a layer: `blocks` holds B as values, and the layout its positions, packed as RigL's are (1x1 blocks): so
gradients and moments exist for Nd + M weights. Beside the layout, in the train state's topology,

    forward_mask   bool[Nd + M, 1, 1]   which of the blocks belong to A
    reserve        float[N - Nd - M]    all other weights in the order of their positions, without gradient

A weight that enters B comes with its value from the reserve and with moments zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout, layout_of_positions, pack, to_mask, unpack
from dsb_jax.methods.base import Beside, LayerReport, Method
from dsb_jax.methods.unstructured import random_positions
from dsb_jax.select import select_largest


def split(
    weights: Float[Array, "out in"], layout: BlockLayout, num_active: int | jax.Array
) -> tuple[jax.Array, Beside]:
    """The weights at the positions of `layout`, and what is kept beside them. `join` is the inverse."""
    blocks = pack(weights, layout)
    return blocks, {
        "forward_mask": select_largest(jnp.abs(blocks), num_active, where=True),
        "reserve": weights.reshape(-1)[_reserved(layout)],
    }


def join(blocks: jax.Array, layout: BlockLayout, reserve: jax.Array) -> Float[Array, "out in"]:
    """All weights of a layer in dense form."""
    weights = unpack(blocks, layout)
    return weights.reshape(-1).at[_reserved(layout)].set(reserve).reshape(layout.shape)


def _reserved(layout: BlockLayout) -> jax.Array:
    """Flat positions, in order, of the weights that the layout does not hold."""
    count = layout.shape[0] * layout.shape[1] - layout.num_blocks
    return jnp.nonzero(~to_mask(layout).reshape(-1), size=count)[0]


def topkast(*, backward_factor: float = 2.0) -> Method:
    """Builds the method.

    Args:
      backward_factor: (Nd + M) / Nd, weights that have a gradient over those that the layer computes with, >= 1. With
        2 and a sparsity of 0.9 it is 0.8 in the backward pass.

    Raises:
      ValueError: if the backward set would be smaller than the forward set.
    """
    if not backward_factor >= 1:
        raise ValueError(f"backward_factor={backward_factor} is below 1; the backward set holds the forward set.")

    def store(weights: jax.Array, num_active: int) -> tuple[BlockLayout, jax.Array, Beside]:
        count = min(round(backward_factor * num_active), weights.size)
        layout = layout_of_positions(select_largest(jnp.abs(weights), count, where=True), count)
        return layout, *split(weights, layout, num_active)

    def update(
        key: jax.Array, step: jax.Array, blocks: jax.Array, layout: BlockLayout, beside: Beside
    ) -> tuple[BlockLayout, LayerReport]:
        del key, step
        magnitude = jnp.abs(join(blocks, layout, beside["reserve"]))
        before = unpack(beside["forward_mask"].astype(jnp.float32), layout) > 0
        num_active = before.sum(dtype=jnp.int32)
        now = select_largest(magnitude, num_active, where=True)
        entered = (now & ~before).sum(dtype=jnp.int32)
        backward = select_largest(magnitude, layout.num_blocks, where=True)
        return layout_of_positions(backward, layout.num_blocks), LayerReport(
            requested=entered,
            accepted=entered,
            turnover=entered / num_active,
            collateral=jnp.zeros(()),
            empty_groups=(~now.any(axis=1)).sum(dtype=jnp.int32),
        )

    def exchange(blocks: jax.Array, old: BlockLayout, new: BlockLayout, beside: Beside) -> tuple[jax.Array, Beside]:
        num_active = beside["forward_mask"].sum(dtype=jnp.int32)
        return split(join(blocks, old, beside["reserve"]), new, num_active)

    return Method(name="topkast", sparse=True, init=random_positions, update=update, statistic=None, unstructured=True,
                  store=store, exchange=exchange, backward_factor=backward_factor)  # fmt: skip
