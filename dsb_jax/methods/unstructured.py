"""What RigL and SET share: single weights stored as values and indices, dropped by magnitude, grown one by one.

Packed unstructured storage is the case R = C = 1 of shuffled blocks: `group_start` are the row pointers and `in_idx`
the columns of a compressed sparse row matrix. So Nd weights, gradients and moments exist, as for DSB, and repacking,
checkpoints and telemetry are the same code. The product is the dense one, one layer at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsb_jax.drop import magnitude_drop
from dsb_jax.layout import BlockLayout, layout_of_positions, to_mask, unpack
from dsb_jax.methods.base import LayerReport
from dsb_jax.methods.schedule import drop_fraction
from dsb_jax.ops.statistics import Probe
from dsb_jax.select import select_largest


def random_positions(
    key: jax.Array, shape: tuple[int, int], *, block_shape: tuple[int, int], num_blocks: int
) -> BlockLayout:
    """`num_blocks` positions drawn from all `out * in` alike.

    Raises:
      ValueError: if `block_shape` is not 1x1.
    """
    if block_shape != (1, 1):
        raise ValueError(f"block_shape={block_shape[0]}x{block_shape[1]}: single weights are stored as 1x1 blocks.")
    return layout_of_positions(select_largest(jax.random.uniform(key, shape), num_blocks, where=True), num_blocks)


def update_positions(
    grow: Callable[[jax.Array, Probe, jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    update_end_step: int,
    alpha: float,
) -> Callable[..., tuple[BlockLayout, LayerReport]]:
    """The `update` of a `Method`: drops the weakest round(drop_fraction(t) * num_active), grows as many.

    Args:
      grow: `(key, statistic, k, kept, active) -> bool[out, in]`, k positions outside of `kept`.
      update_end_step: T_end of the cosine schedule, in steps.
      alpha: drop fraction at step 0.

    Raises:
      ValueError: if `alpha` is not in [0, 1].
    """
    drop_fraction(0, alpha=alpha, update_end_step=update_end_step)  # refuses at once what cannot be

    def update(
        key: jax.Array, step: jax.Array, blocks: jax.Array, layout: BlockLayout, statistic: Probe
    ) -> tuple[BlockLayout, LayerReport]:
        fraction = drop_fraction(step, alpha=alpha, update_end_step=update_end_step)
        k = jnp.round(fraction * layout.num_active).astype(jnp.int32)
        dropped = magnitude_drop(blocks, k)
        active = to_mask(layout)
        kept = unpack((~dropped).astype(jnp.float32), layout) > 0
        now = kept | grow(key, statistic, k, kept, active)
        new = layout_of_positions(now, layout.num_blocks)
        return new, LayerReport(
            requested=k,
            accepted=(now & ~kept).sum(dtype=jnp.int32),
            turnover=(now & ~active).sum() / layout.num_active,
            collateral=jnp.zeros(()),
            empty_groups=(jnp.diff(new.group_start) == 0).sum(dtype=jnp.int32),
        )

    return update
