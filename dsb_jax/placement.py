"""Compiled functions whose results lie where their arguments lay, on one device or many."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def as_placed(function: Callable[..., Any], how: Any, trees: Any, rest: Any, *, donate: bool = False) -> Any:
    """`function(how, trees, rest) -> (new trees, more)`, compiled; the new trees are sharded as `trees` are.

    XLA chooses where results lie, and after gathers by computed indices it chooses replication: a sharding would be
    lost at the first adaptation. Inside of somebody's `jit` that choice is theirs.

    Args:
      function: pure; `how` is static and hashable.
      trees: a tuple of trees, results in the same structure.
      rest: further arguments.
      donate: whether the buffers of `trees` may be used for the results.
    """
    leaves, structure = jax.tree.flatten(trees)
    shardings = tuple(_sharding(leaf) for leaf in leaves)
    if not any(shardings):
        structure, shardings = None, ()
    new, more = _compiled(function, structure, shardings, donate)(how, trees, rest)
    return (*new, more)


def _sharding(leaf: Any) -> Any:
    """Where a concrete array lies, if that is more than one device."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or len(leaf.sharding.device_set) == 1:
        return None
    return leaf.sharding


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], structure: Any, shardings: tuple[Any, ...], donate: bool) -> Any:
    placed = jax.tree.unflatten(structure, shardings) if shardings else None
    return jax.jit(
        function,
        static_argnums=0,
        donate_argnums=(1,) if donate else (),
        out_shardings=(placed, None),
    )
