"""Updates of all layers of a model, one layer at a time.

Outside of `jit`, nodes are updated one after the other, by one compiled function for all that are equal. Inside, layers
of equal sizes share one compiled loop, and loops follow each other. Either way one layer at a time is scored in dense
form, and values are moved without any.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.filling import move_and_fill, origins_of
from dsb_jax.measuring import Measured
from dsb_jax.methods.base import LayerReport, LayerState, Method
from dsb_jax.methods.identity import identity
from dsb_jax.paths import Path
from dsb_jax.placement import as_placed
from dsb_jax.topology import LayerTopology, join_stack, like_index, split_stack
from pallas_kernels.kernel_index import KernelIndex


class Layers(NamedTuple):
    """The layers of one node; every array has one axis more, in front, for the layers of the stack.

    Attributes:
      state: blocks, layout, aux.
      kernel_index: derived from the layout, or None.
      value: the statistic; None for methods without.
      calls: float32, how often each was observed.
      status: int32, a number in `STATUS`; only those with 0 are updated.
      is_fixed: static, whether none of them is, whatever the statistics say.
    """

    state: LayerState
    kernel_index: KernelIndex | None
    value: Any
    calls: jax.Array
    status: jax.Array
    is_fixed: bool


class Updated(NamedTuple):
    """What became of the layers of a node, or of one of them."""

    state: LayerState
    kernel_index: KernelIndex | None
    report: LayerReport


def layers_of(node: LayerTopology, blocks: jax.Array, measured: Measured | None, status: int) -> Layers:
    """The layers of a node, one after the other; `status` is not 0 if none of them is to be updated."""
    axes, count = node.stack_axes, node.num_layers
    *state, index = split_stack((blocks, node.layout, node.aux, node.index), axes)
    state = LayerState(*state)
    if measured is None:
        return Layers(state, index, None, jnp.zeros(count), jnp.full(count, status, jnp.int32), status > 0)
    value, calls = split_stack(measured.value, axes), measured.calls.reshape(count)
    is_finite = jnp.stack([jnp.isfinite(leaf).reshape(count, -1).all(axis=1) for leaf in jax.tree.leaves(value)])
    most = measured.most_calls or jnp.inf
    seen = jnp.select([calls < 1, calls > most, ~is_finite.all(axis=0)], [3, 4, 5], 0)
    status_of_each = jnp.full(count, status) if status else seen
    return Layers(state, index, value, calls, status_of_each.astype(jnp.int32), status > 0)


class NodeUpdate(NamedTuple):
    """How a node is updated, but for the method; hashable.

    Attributes:
      status: a number in `STATUS`; not 0 if it stays as it is, whatever its statistic says.
      fill: what each of its moments begins with where a weight is new.
    """

    status: int
    fill: tuple[Any, ...]


class NodeArrays(NamedTuple):
    """Everything that belongs to a node.

    Attributes:
      blocks: the parameter.
      node: its topology.
      measured: its statistic, or None.
      moments: arrays of the optimizer's state that are shaped like the parameter.
    """

    blocks: jax.Array
    node: LayerTopology
    measured: Measured | None
    moments: tuple[jax.Array, ...]


def update_nodes(
    method: Method,
    how: Mapping[Path, NodeUpdate],
    keys: Mapping[Path, jax.Array],
    step: jax.Array,
    arrays: Mapping[Path, NodeArrays],
    *,
    donate: bool,
) -> dict[Path, Any]:
    """For each node its new (blocks, node, moments), and its report.

    Concrete arrays are updated node by node, by a compiled function that equal ones share; traced ones all together.
    """
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((keys, step, arrays)))
    results: dict[Path, Any] = {}
    for paths in [list(arrays)] if is_traced else [[path] for path in arrays]:
        trees = tuple((arrays[path].blocks, arrays[path].node, arrays[path].moments) for path in paths)
        rest = [keys[path] for path in paths], step, [arrays[path].measured for path in paths]
        static = method, tuple(how[path] for path in paths)
        *new, reports = as_placed(_update_together, static, trees, rest, donate=donate)
        results.update(zip(paths, zip(new, reports, strict=True), strict=True))
    return results


def _update_together(static: tuple[Method, tuple[NodeUpdate, ...]], trees: Any, rest: Any) -> Any:
    """Some nodes, without their names: equal ones are the same program."""
    (method, updates_of), (keys, step, measured) = static, rest
    layers = [layers_of(node, blocks, measured[i], updates_of[i].status) for i, (blocks, node, _) in enumerate(trees)]
    updates = update_layers(method, keys, step, layers)
    results, reports = [], []
    for (_, old, moments), (_, fill), ((blocks, layout, aux), index, report) in zip(
        trees, updates_of, updates, strict=True
    ):
        axes, sizes = old.stack_axes, old.stack_shape
        blocks, layout, aux, index = join_stack((blocks, layout, aux, index), axes, sizes)
        new = LayerTopology(layout, aux, old.spec, index)
        if moments:
            origin = origins_of(old, new)
            moments = tuple(move_and_fill(leaf, origin, new, how) for leaf, how in zip(moments, fill, strict=True))
        results.append((blocks, new, moments))
        reports.append(jax.tree.map(lambda leaf, sizes=sizes: leaf.reshape(sizes), report))
    return tuple(results), reports


def update_layers(method: Method, keys: Sequence[jax.Array], step: Any, layers: Sequence[Layers]) -> list[Updated]:
    """The new state and the report of every node's layers. Layers of one signature share one compiled loop."""

    def update(key: jax.Array, state: LayerState, index: Any, value: Any, status: jax.Array) -> Updated:
        both = method.update(key, step, state, value), identity(state)
        new, report = jax.tree.map(lambda changed, same: jnp.where(status == 0, changed, same), *both)
        return Updated(new, like_index(new.layout, index), report)

    same: dict[Any, list[int]] = {}
    results: dict[int, Updated] = {}
    for node, layer in enumerate(layers):
        same.setdefault(_signature(layer), []).append(node)
    zero = jnp.minimum(step.astype(jnp.int32), 0)
    for equal in same.values():
        counts = [layers[node].calls.size for node in equal]
        args = [
            (_keys(keys[node], count), *layers[node][:3], layers[node].status)
            for node, count in zip(equal, counts, strict=True)
        ]
        every = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *args)
        if all(layers[node].is_fixed for node in equal):
            updated_layers = Updated(every[1], every[2], jax.vmap(lambda state: identity(state)[1])(every[1]))
        else:
            updated_layers = _one_by_one(update, every, zero)
            zero = jnp.minimum(updated_layers.state.layout.out_idx[0, 0, 0], 0)
        start = 0
        for node, count in zip(equal, counts, strict=True):
            one = jax.tree.map(lambda leaf, a=start, b=start + count: leaf[a:b], updated_layers)
            calls, status = layers[node].calls.astype(jnp.int32), layers[node].status
            results[node] = one._replace(report=one.report._replace(calls=calls, status=status))
            start += count
    return [results[node] for node in range(len(layers))]


def _keys(key: jax.Array, count: int) -> jax.Array:
    """A key for each layer of a stack, the key itself for a single one."""
    return jax.random.split(key, count) if count > 1 else key[None]


def _signature(layer: Layers) -> Any:
    """What layers that share a loop have in common."""
    arrays = (layer.state, layer.kernel_index, layer.value)
    shapes = tuple((leaf.shape[1:], str(leaf.dtype)) for leaf in jax.tree.leaves(arrays))
    return layer.is_fixed, jax.tree.structure(arrays), shapes


def _one_by_one(update: Callable[..., Any], every: Any, zero: jax.Array) -> Any:
    """Stacked results of `update(*args)`, computed so that no two of them hold their dense scratch at the same time.

    XLA assigns memory by data dependencies, when optimization barriers are gone already. So two numbers here are 0 and
    XLA does not know: `zero`, which comes out of the loop before, keeps this loop from being unrolled or starting
    early; `min(i, 0)`, added to the layout, keeps the update of a single layer from being moved out of the loop.
    """
    count = every[-1].shape[0]

    def update_one(i: jax.Array) -> Any:
        key, state, *rest = jax.tree.map(lambda leaf: leaf[i], every)
        start = state.layout.group_start + jnp.minimum(i, 0).astype(jnp.int32)
        layout = dataclasses.replace(state.layout, group_start=start)
        return update(key, state._replace(layout=layout), *rest)

    def update_next(i: jax.Array, results: Any) -> Any:
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), results, update_one(i))

    shapes = jax.eval_shape(update_one, jnp.int32(0))
    empty = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)
    return lax.fori_loop(0, count + zero, update_next, empty)
