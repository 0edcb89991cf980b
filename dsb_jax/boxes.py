"""Parameters in boxes of Flax (`nn.with_partitioning`): what becomes of them when kernels become blocks, or back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from dsb_jax.topology import insert_axes

BOX = meta.AxisMetadata


def is_box(leaf: Any) -> bool:
    return isinstance(leaf, BOX)


def unboxed(leaf: Any) -> Any:
    """The array in a box, or the leaf itself; no sharding constraint is applied."""
    return unboxed(leaf.value) if is_box(leaf) and hasattr(leaf, "value") else meta.unbox(leaf)


def boxed_as(box: Any, array: jax.Array, stack_axes: tuple[int, ...]) -> Any:
    """An array in a box like another one, or as it is if that is no box; its axes are named by `other_names`."""
    if not is_box(box):
        return array
    if hasattr(box, "names"):
        box = dataclasses.replace(box, names=other_names(box.names, jnp.ndim(array), stack_axes))
    return box.replace_boxed(array)


def other_names(names: Sequence[Any], rank: int, stack_axes: tuple[int, ...]) -> tuple[Any, ...]:
    """Names of the axes of blocks by those of a kernel, or the other way.

    Lifted axes keep their names. Those of the layer itself have none, for no axis of blocks is an input or an output:
    what was sharded by such a name is replicated.
    """
    own: tuple[Any, ...] = (None,) * (rank - len(stack_axes))
    return insert_axes(own, stack_axes, tuple(names[axis] for axis in stack_axes))
