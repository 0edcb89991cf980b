"""How an array that is shaped like a layer's blocks follows them, and what newly active weights begin with in it.

A second moment of zero is not neutral: the first updates of a weight that has it are as large as the learning rate.
So the moments of an optimizer may begin with something else, by the name of their field; what they begin with where
nothing is said is `dsb_jax.optimizer_states.choose_fills`:

    "zero"          0
    "group_mean"    the mean over the weights of the same row group that stay active (of the layer if none does)
    a function      `(moved, is_new, layout) -> values`, all [num_blocks, R, C]; only what is new is taken of it
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.layout import BlockLayout, block_group, real_rows
from dsb_jax.origins import origins, take
from dsb_jax.topology import LayerTopology, by_layer

FILLS = ("zero", "group_mean")


def fill_pairs(fill: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """The mapping as sorted pairs, which have a hash.

    Raises:
      ValueError: for what is no mapping, and a value that is neither in `FILLS` nor a function.
    """
    if fill is not None and not isinstance(fill, Mapping):
        raise ValueError(f"fill={fill!r} is no dictionary; name the state's field, as in {{'nu': 'group_mean'}}.")
    for field, how in (fill or {}).items():
        if not callable(how) and how not in FILLS:
            raise ValueError(f"fill={{{field!r}: {how!r}}} is unknown; give {' or '.join(FILLS)}, or a function.")
    return tuple(sorted((fill or {}).items(), key=lambda pair: pair[0]))


def check_fill(fill: tuple[tuple[str, Any], ...], fields: Iterable[str]) -> None:
    """Raises ValueError if a field is filled that no optimizer state has."""
    known = sorted(set(fields) - {""})
    for field, _ in fill:
        if field not in known:
            have = f"its fields are {', '.join(known)}" if known else "it keeps nothing for the sparse layers"
            raise ValueError(f"fill names {field!r}, but the optimizer's state has no such field: {have}.")


def origins_of(old: LayerTopology, new: LayerTopology) -> Int[Array, "..."]:
    """`dsb_jax.origins.origins` of every layer of a node."""
    return by_layer(lambda layout, _, new_layout: origins(layout, new_layout), old, new.layout)


def move_leaf(leaf: jax.Array, origin: jax.Array, new: LayerTopology, fill: float) -> jax.Array:
    """An array shaped like the blocks of the old node, moved to the new one; `fill` where weights are new."""

    def move(layout: BlockLayout, _: Any, leaf: jax.Array, origin: jax.Array) -> jax.Array:
        moved = take(leaf, origin, fill=fill)
        return moved if fill == 0 else jnp.where(real_rows(layout), moved, 0).astype(leaf.dtype)

    return by_layer(move, new, leaf, origin)


def move_and_fill(leaf: jax.Array, origin: jax.Array, new: LayerTopology, how: str | Callable[..., Any]) -> jax.Array:
    """The same for a moment of an optimizer, of which new weights have what `how` says."""
    if how == "zero":
        return move_leaf(leaf, origin, new, 0)
    values_of = _group_mean if how == "group_mean" else how
    assert callable(values_of)

    def move(layout: BlockLayout, _: Any, leaf: jax.Array, origin: jax.Array) -> jax.Array:
        moved, is_new = take(leaf, origin), (origin >= leaf.size) & real_rows(layout)
        values = values_of(moved, is_new, layout)
        if not _is_broadcastable(values, moved.shape):
            have = f"shape {list(values.shape)}" if hasattr(values, "shape") else repr(values)
            raise ValueError(f"the fill function gave {have}; return numbers for {list(moved.shape)} weights.")
        return jnp.where(is_new, values, moved).astype(leaf.dtype)

    return by_layer(move, new, leaf, origin)


def _is_broadcastable(values: Any, shape: tuple[int, ...]) -> bool:
    if isinstance(values, str | None) or not jnp.issubdtype(jnp.result_type(values), jnp.number):
        return False
    try:
        return np.broadcast_shapes(jnp.shape(values), shape) == shape
    except ValueError:
        return False


def _group_mean(
    moved: Float[Array, "num_blocks R C"], is_new: Bool[Array, "num_blocks R C"], layout: BlockLayout
) -> Float[Array, "num_blocks 1 1"]:
    """The mean of what stays active in each row group, for each of its blocks; in float32."""
    stays = real_rows(layout) & ~is_new
    group = block_group(layout)

    def by_group(values: jax.Array) -> jax.Array:
        sums = values.sum(axis=(1, 2))
        return jnp.zeros(layout.num_groups, jnp.float32).at[group].add(sums)

    total = by_group(jnp.where(stays, moved.astype(jnp.float32), 0))
    count = by_group(stays.astype(jnp.float32))
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1), total.sum() / jnp.maximum(count.sum(), 1))
    return mean[group][:, None, None]
