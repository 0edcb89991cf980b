"""The adaptation: statistics, new layouts, moved weights and moments, for any model, optimizer and loop.

    adapt = adaptation(loss_fn, method, optimizer)
    params, topology, opt_state, report = adapt(params, topology, opt_state, step, key, *batch)

It lies outside of the gradient path: the batch is used to measure, never to update. Weights that stay active keep their
values and moments bit by bit, wherever their block goes. Layers of equal sizes share one compiled loop and loops follow
each other, so that one layer at a time is scored in dense form; moving values needs no dense form at all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from dsb_jax.filling import check_fill, fill_pairs, move_and_fill, move_leaf, origins_of
from dsb_jax.measuring import LossFn, Measure, Measured, measure
from dsb_jax.methods.base import LayerReport, LayerState, Method
from dsb_jax.methods.identity import identity
from dsb_jax.ops.statistics import AxisName, Statistic
from dsb_jax.optimizer_states import (
    check_storage,
    check_transformation,
    flatten_state,
    followers,
    frozen_layers,
)
from dsb_jax.paths import Path, by_path, layer_path, nodes, path_name, replace_at, weights_at
from dsb_jax.placement import as_placed
from dsb_jax.static_values import as_static, original
from dsb_jax.step_and_key import check_key, check_step
from dsb_jax.topology import LayerTopology, insert_axes, join_stack, like_index, split_stack
from pallas_kernels.kernel_index import KernelIndex

Report = dict[Path, LayerReport]
Where = Callable[[Path], bool]


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """`adaptation(...)`: a hashable value, compiled when it is called; equal ones compile once."""

    measure: Measure
    method: Method
    optimizer: Any
    where: Any = None
    fill: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, params: Any, topology: Any, opt_state: Any, step: Any, key: Any, *batch: Any, **other_collections: Any
    ) -> tuple[Any, Any, Any, Report]:
        trees = (params, topology, opt_state)
        return as_placed(_adapt, self, trees, (step, key, batch, other_collections))

    def adapted(
        self, params: Any, topology: Any, opt_state: Any, step: Any, key: Any, batch: Any, others: Any
    ) -> tuple[Any, Any, Any, Report]:
        """The same inside of a compiled function."""
        check_storage(self.method, topology)
        statistics = self.measure.measured(params, topology, batch, others)
        return updated(
            self.method, original(self.optimizer), params, topology, opt_state, step, key, statistics,
            where=original(self.where), fill=self.fill,
        )  # fmt: skip


def _adapt(how: Adaptation, trees: Any, rest: Any) -> tuple[Any, Any]:
    (params, topology, opt_state), (step, key, batch, others) = trees, rest
    *new, report = how.adapted(params, topology, opt_state, step, key, batch, others)
    return tuple(new), report


def adaptation(
    loss_fn: LossFn,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName = None,
    has_aux: bool = False,
    where: Where | None = None,
    fill: Mapping[str, Any] | None = None,
) -> Adaptation:
    """A function that adapts the topology of every sparse layer of a model.

    Args:
      loss_fn: `(variables, *batch) -> loss`, or `(loss, aux)` with `has_aux`; the mean over this device's examples.
        What its model mutates is thrown away.
      method: one of `dsb_jax.methods`.
      optimizer: the one that `opt_state` belongs to.
      axis_name: of `pmap` or `shard_map`, if this is called inside of one: the replicas then agree.
      has_aux: whether the loss comes with something else.
      where: `(layer path) -> bool`, False for layers that are to stay as they are.
      fill: what the moments of newly active weights begin with, by the name of the optimizer state's field:
        {"nu": "group_mean"}, "zero", or a function `(moved, is_new, layout) -> values`, all [num_blocks, R, C]. Zero
        for every field that is not named.

    Returns:
      A hashable function `(params, topology, opt_state, step, key, *batch, **other_collections) -> (params, topology,
      opt_state, report)`. All sizes stay, so nothing compiles again; outputs keep the shardings of inputs if it is
      called outside of `jit`. The report is {path of the layer: `LayerReport`}.

    Raises:
      ValueError: for what is no method, optimizer or fill. When it is called: if the layers hold another storage than
        the method adapts, if the optimizer's state cannot follow or is of other parameters, if `fill` names a field
        that the state does not have or gives values of another shape, if the loss is not one float, the step no whole
        number or the key no PRNG key.
    """
    check_transformation(optimizer)
    measurement = measure(loss_fn, method, axis_name=axis_name, has_aux=has_aux)
    return Adaptation(measurement, method, as_static(optimizer), as_static(where), fill_pairs(fill))


@dataclasses.dataclass(frozen=True)
class _Update:
    method: Method
    optimizer: Any
    where: Any
    fill: tuple[tuple[str, Any], ...]


def update(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: Any,
    topology: Any,
    opt_state: Any,
    step: Any,
    key: jax.Array,
    statistics: Any,
    *,
    where: Where | None = None,
    fill: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Report]:
    """The second half of an adaptation, from `statistics` as `measure` gives them. Arguments as in `adaptation`."""
    how = _Update(method, as_static(optimizer), as_static(where), fill_pairs(fill))
    *trees, report = as_placed(_update, how, (params, topology, opt_state), (step, key, statistics))
    return (*trees, report)


def _update(how: _Update, trees: Any, rest: Any) -> tuple[Any, Any]:
    *trees, report = updated(
        how.method, original(how.optimizer), *trees, *rest, where=original(how.where), fill=how.fill
    )
    return tuple(trees), report


def updated(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: Any,
    topology: Any,
    opt_state: Any,
    step: Any,
    key: jax.Array,
    statistics: Any,
    *,
    where: Where | None,
    fill: tuple[tuple[str, Any], ...],
) -> tuple[Any, Any, Any, Report]:
    """`update` inside of a compiled function."""
    check_storage(method, topology)
    step, key = check_step(step), check_key(key)
    old = nodes(topology)
    following = followers(optimizer, params, topology)
    check_fill(fill, {follower.field for follower in following.values()})
    leaves, structure = flatten_state(opt_state, following, topology)
    frozen = frozen_layers(optimizer, params, opt_state, topology)
    weights = weights_at(params, old)
    measured = by_path(statistics, leaf=Measured) if method.statistic is not None else {}
    layers = {}
    for path, node in old.items():
        excluded = where is not None and not _is_included(where, layer_path(path))
        status = 1 if excluded else 2 * (path in frozen)
        if method.statistic is not None and not status:
            _check_statistic(method.name, method.statistic, path, node, measured.get(path))
        layers[path] = _layers_of(node, weights[path], measured.get(path), status)
    updates = _update_layers(method, key, step, layers)

    new, moved, report = {}, {}, {}
    for path, node in old.items():
        (blocks, layout, aux), index, layer_report = updates[path]
        axes, sizes = node.stack_axes, node.stack_shape
        moved[path] = join_stack(blocks, axes, sizes)
        layout, aux, index = join_stack((layout, aux, index), axes, sizes)
        new[path] = LayerTopology(layout, aux, node.spec, index)
        report[layer_path(path)] = jax.tree.map(lambda leaf, sizes=sizes: leaf.reshape(sizes), layer_report)
    origin = {path: origins_of(old[path], new[path]) for path in {f.path for f in following.values()}}
    for i, follower in following.items():
        how = dict(fill).get(follower.field, "zero")
        leaves[i] = move_and_fill(leaves[i], origin[follower.path], new[follower.path], how)
    opt_state = jax.tree.unflatten(structure, leaves)
    return replace_at(params, moved), replace_at(topology, new), opt_state, report


def _is_included(where: Where, layer: Path) -> bool:
    answer = where(layer)
    if not isinstance(answer, bool | np.bool_):
        raise ValueError(f"where({layer!r}) is {answer!r}; return True for layers that may change, False for others.")
    return bool(answer)


def _check_statistic(
    name: str, statistic: Statistic, path: Path, node: LayerTopology, measured: Measured | None
) -> None:
    one = jax.eval_shape(lambda: statistic.finish(statistic.zeros(node.spec)))
    wanted = jax.tree.map(lambda leaf: insert_axes(leaf.shape, node.stack_axes, node.stack_shape), one)
    found = jax.tree.map(jnp.shape, measured.value) if isinstance(measured, Measured) else None
    if found != wanted:
        have = "nothing" if found is None else f"{found}"
        raise ValueError(
            f"statistics have {have} for {path_name(layer_path(path))}, where method {name!r} takes {wanted}; "
            "give what measure(loss_fn, method) returns, of this method and model."
        )


class _Layers(NamedTuple):
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


class _Updated(NamedTuple):
    """What became of the layers of a node, or of one of them."""

    state: LayerState
    kernel_index: KernelIndex | None
    report: LayerReport


def _layers_of(node: LayerTopology, blocks: jax.Array, measured: Measured | None, status: int) -> _Layers:
    axes, count = node.stack_axes, node.num_layers
    *state, index = split_stack((blocks, node.layout, node.aux, node.index), axes)
    state = LayerState(*state)
    if measured is None:
        return _Layers(state, index, None, jnp.zeros(count), jnp.full(count, status, jnp.int32), status > 0)
    value, calls = split_stack(measured.value, axes), measured.calls.reshape(count)
    is_finite = jnp.stack([jnp.isfinite(leaf).reshape(count, -1).all(axis=1) for leaf in jax.tree.leaves(value)])
    most = measured.most_calls or jnp.inf
    seen = jnp.select([calls < 1, calls > most, ~is_finite.all(axis=0)], [3, 4, 5], 0)
    status_of_each = jnp.full(count, status) if status else seen
    return _Layers(state, index, value, calls, status_of_each.astype(jnp.int32), status > 0)


def _update_layers(method: Method, key: jax.Array, step: Any, layers: Mapping[Path, _Layers]) -> dict[Path, _Updated]:
    """The new state and the report of every layer. Layers of one signature share one compiled loop."""

    def update(key: jax.Array, state: LayerState, index: Any, value: Any, status: jax.Array) -> _Updated:
        both = method.update(key, step, state, value), identity(state)
        new, report = jax.tree.map(lambda changed, same: jnp.where(status == 0, changed, same), *both)
        return _Updated(new, like_index(new.layout, index), report)

    keys = dict(zip(layers, jax.random.split(key, max(len(layers), 1)), strict=False))
    same: dict[Any, list[Path]] = {}
    results: dict[Path, _Updated] = {}
    for path, layer in layers.items():
        same.setdefault(_signature(layer), []).append(path)
    zero = jnp.minimum(step.astype(jnp.int32), 0)
    for paths in same.values():
        counts = [layers[path].calls.size for path in paths]
        args = [
            (_keys(keys[path], count), *layers[path][:3], layers[path].status)
            for path, count in zip(paths, counts, strict=True)
        ]
        every = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *args)
        if all(layers[path].is_fixed for path in paths):
            updated_layers = _Updated(every[1], every[2], jax.vmap(lambda state: identity(state)[1])(every[1]))
        else:
            updated_layers = _one_by_one(update, every, zero)
            zero = jnp.minimum(updated_layers.state.layout.out_idx[0, 0, 0], 0)
        start = 0
        for path, count in zip(paths, counts, strict=True):
            one = jax.tree.map(lambda leaf, a=start, b=start + count: leaf[a:b], updated_layers)
            calls, status = layers[path].calls.astype(jnp.int32), layers[path].status
            results[path] = one._replace(report=one.report._replace(calls=calls, status=status))
            start += count
    return results


def _keys(key: jax.Array, count: int) -> jax.Array:
    """A key for each layer of a stack, the key itself for a single one."""
    return jax.random.split(key, count) if count > 1 else key[None]


def _signature(layer: _Layers) -> Any:
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


def repack(tree: Any, old_topology: Any, topology: Any, fill: float = 0) -> Any:
    """Moves a tree that is shaped like the parameters along when the topology changes: an average, gradients, moments.

    Bit-identical where a weight is active in both topologies, `fill` where it is new. Jit-able.

    Args:
      tree: with an array [num_blocks, R, C] wherever `old_topology` has a layer.
      old_topology: that it belongs to.
      topology: that it is to belong to; the numbers of blocks may differ.
      fill: value of the newly active weights.

    Raises:
      ValueError: if the trees do not have the same layers.
    """
    old, new = nodes(old_topology), nodes(topology)
    if old.keys() != new.keys():
        odd = sorted(path_name(layer_path(path)) for path in old.keys() ^ new.keys())
        raise ValueError(f"only one of the topologies has a layer {odd[0]}; pass two topologies of one model.")
    leaves = weights_at(tree, old)
    moved = {path: move_leaf(leaves[path], origins_of(old[path], new[path]), new[path], fill) for path in old}
    return replace_at(tree, moved)
