"""What DSB and static blocks share: shuffled blocks drawn at random, chosen by a score, and more or fewer of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout, block_group, pack, random_layout, real_rows
from dsb_jax.methods.base import LayerState
from dsb_jax.origins import move
from dsb_jax.reblocking import cut_columns, most_group_blocks, reblock
from dsb_jax.spec import LayerSpec

COLUMNS = ("dealt", "random")  # how the columns of a first layout are drawn

# Worth of the columns in a resize, where the strongest is 1: none that exists is less than `_LEAST`, and a whole block
# of drawn ones, each below `_DRAWN`, is less than that.
_LEAST, _DRAWN = 1e-20, 1e-30


def check_columns(columns: str) -> None:
    """Raises ValueError unless it is one of `COLUMNS`."""
    if columns not in COLUMNS:
        raise ValueError(f"columns={columns!r} is unknown; choose one of {', '.join(COLUMNS)}.")


def reachable_minimum(min_group_blocks: int, layer: LayerSpec | BlockLayout) -> int:
    """`min_group_blocks`, or as many as the layer has for every row group."""
    return min(min_group_blocks, most_group_blocks(layer.shape, layer.block_shape, layer.num_blocks))


def scale_to_fan_in(weights: Float[Array, "out in"], layout: BlockLayout) -> Float[Array, "num_blocks R C"]:
    """The weights at the positions of a layout, times sqrt(in / fan_in) of each row group.

    So a variance-scaling initializer sees the fan-in that each output really has.
    """
    blocks = pack(weights, layout)
    fan_in = jnp.diff(layout.group_start)[block_group(layout)] * layout.block_shape[1]
    scale = jnp.sqrt(layout.shape[1] / fan_in.astype(jnp.float32))[:, None, None]
    dtype = blocks.dtype if jnp.finfo(blocks.dtype).bits > 32 else jnp.dtype(jnp.float32)
    return (blocks.astype(dtype) * scale.astype(dtype)).astype(blocks.dtype)


def column_strength(blocks: Float[Array, "num_blocks R C"], layout: BlockLayout) -> Float[Array, "num_blocks C"]:
    """Mean square of each panel column, float32, over its real rows: those of a ragged group count as much."""
    real = real_rows(layout)
    squares = jnp.square(jnp.where(real, blocks, 0).astype(jnp.float32)).sum(axis=1)
    return squares / jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1).astype(jnp.float32)


def init_blocks(
    key: jax.Array,
    weights: Float[Array, "out in"],
    spec: LayerSpec,
    *,
    score: Float[Array, "out in"] | None,
    min_group_blocks: int,
    columns: str,
) -> LayerState:
    """A layout drawn at random and weights scaled to its fan-in, or the best layout by a score and weights as is."""
    if score is None:
        layout = random_layout(
            key,
            spec.shape,
            block_shape=spec.block_shape,
            num_blocks=spec.num_blocks,
            channels=spec.c_in if columns == "dealt" else None,
        )
        return LayerState(scale_to_fan_in(weights, layout), layout)
    layout = reblock(
        score,
        block_shape=spec.block_shape,
        num_blocks=spec.num_blocks,
        min_group_blocks=reachable_minimum(min_group_blocks, spec),
    )
    return LayerState(pack(weights, layout), layout)


def resize_blocks(key: jax.Array, state: LayerState, spec: LayerSpec, *, min_group_blocks: int) -> LayerState:
    """The strongest blocks, cut anew from the panel columns of each row group, or all and random ones beside them."""
    blocks, layout, _ = state
    strength = jnp.nan_to_num(column_strength(blocks, layout))
    strength = strength / jnp.maximum(strength.max(), jnp.finfo(jnp.float32).tiny)
    drawn = jax.random.uniform(key, (layout.num_groups, layout.shape[1]), jnp.float32, minval=0.5)
    worth = (drawn * _DRAWN).at[block_group(layout)[:, None], layout.in_idx].set(jnp.maximum(strength, _LEAST))
    new = cut_columns(
        worth,
        layout.out_idx,
        shape=spec.shape,
        block_shape=spec.block_shape,
        num_blocks=spec.num_blocks,
        min_group_blocks=reachable_minimum(min_group_blocks, spec),
    )
    return LayerState(move(blocks, layout, new), new)
