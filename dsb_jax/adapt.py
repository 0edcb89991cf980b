"""The adaptation: statistics, new layouts, moved weights and moments, for any model, optimizer and loop.

    adapt = adaptation(loss_fn, method, optimizer)
    params, topology, opt_state, report = adapt(params, topology, opt_state, step, key, *batch)

It lies outside of the gradient path: the batch is used to measure, never to update. Weights that stay active keep their
values and moments bit by bit, wherever their block goes. One layer at a time is scored in dense form
(`dsb_jax.layer_updates`); moving values needs no dense form at all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsb_jax.filling import fill_pairs, move_leaf, origins_of
from dsb_jax.layer_updates import NodeArrays, NodeUpdate, update_nodes
from dsb_jax.measuring import LossFn, Measure, Measured, measure
from dsb_jax.methods.base import LayerReport, Method
from dsb_jax.ops.statistics import AxisName, Statistic
from dsb_jax.optimizer_states import (
    check_storage,
    check_transformation,
    choose_fills,
    flatten_state,
    followers,
    frozen_layers,
)
from dsb_jax.paths import Path, by_path, layer_path, nodes, path_name, replace_at, weights_at
from dsb_jax.static_values import as_static, original
from dsb_jax.step_and_key import check_key, check_step
from dsb_jax.topology import LayerTopology, insert_axes

Report = dict[Path, LayerReport]
Where = Callable[[Path], bool]


@dataclasses.dataclass(frozen=True)
class _Update:
    """All that an update is made of but arrays; hashable."""

    method: Method
    optimizer: Any
    where: Any = None
    fill: tuple[tuple[str, Any], ...] = ()


def _update_by(method: Method, optimizer: Any, where: Where | None, fill: Mapping[str, Any] | None) -> _Update:
    if where is not None and not callable(where):
        raise ValueError(f"where={where!r} cannot be called; give a function (path of a layer) -> bool.")
    return _Update(method, as_static(optimizer), as_static(where), fill_pairs(fill))


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """`adaptation(...)`: a hashable value, compiled when it is called; equal ones compile once.

    Outside of `jit` the statistics are one compiled function and the update of a layer is another, which equal layers
    share. Inside of somebody's `jit` everything becomes a part of that.
    """

    measure: Measure
    how: _Update

    def __call__(
        self, params: Any, topology: Any, opt_state: Any, step: Any, key: Any, *batch: Any, **other_collections: Any
    ) -> tuple[Any, Any, Any, Report]:
        return self.adapted(params, topology, opt_state, step, key, batch, other_collections)

    def adapted(
        self, params: Any, topology: Any, opt_state: Any, step: Any, key: Any, batch: Any, others: Any,
        *, donate: bool = False,
    ) -> tuple[Any, Any, Any, Report]:  # fmt: skip
        """The same; with `donate` the buffers of the trees may be used for the results."""
        check_storage(self.how.method, topology)
        statistics = self.measure(params, topology, *batch, **others)
        return _updated(self.how, (params, topology, opt_state), step, key, statistics, donate=donate)


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
        {"nu": "group_mean"}, "zero", or a function `(moved, is_new, layout) -> values`, all [num_blocks, R, C]. By
        default second moments are "group_mean" and all others zero.

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
    return Adaptation(measurement, _update_by(method, optimizer, where, fill))


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
    how = _update_by(method, optimizer, where, fill)
    return _updated(how, (params, topology, opt_state), step, key, statistics)


def _updated(
    how: _Update, trees: tuple[Any, Any, Any], step: Any, key: Any, statistics: Any, *, donate: bool = False
) -> tuple[Any, Any, Any, Report]:
    params, topology, opt_state = trees
    step, key = check_step(step), check_key(key)
    everything = (params, topology, opt_state, statistics)
    prepared = _prepare(how, jax.tree.structure(everything), tuple(map(_abstract, jax.tree.leaves(everything))))
    leaves, structure = jax.tree.flatten(opt_state)
    old, measured = nodes(topology), by_path(statistics, leaf=Measured) if how.method.statistic is not None else {}
    weights = weights_at(params, old)
    arrays = {
        path: NodeArrays(weights[path], node, measured.get(path), tuple(leaves[i] for i in prepared[path].moments))
        for path, node in old.items()
    }
    keys = dict(zip(old, jax.random.split(key, max(len(old), 1)), strict=False))
    new = update_nodes(how.method, {path: prepared[path].how for path in old}, keys, step, arrays, donate=donate)
    for path, (moved, _) in new.items():
        for i, leaf in zip(prepared[path].moments, moved[2], strict=True):
            leaves[i] = leaf
    return (
        replace_at(params, {path: trees[0] for path, (trees, _) in new.items()}),
        replace_at(topology, {path: trees[1] for path, (trees, _) in new.items()}),
        jax.tree.unflatten(structure, leaves),
        {layer_path(path): report for path, (_, report) in new.items()},
    )


class _PreparedNode(NamedTuple):
    """What is known of a layer without its arrays.

    Attributes:
      how: how it is updated.
      moments: numbers of the leaves of the optimizer's state that follow it.
    """

    how: NodeUpdate
    moments: tuple[int, ...]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


@functools.lru_cache(maxsize=64)  # a loop adapts the same model again and again
def _prepare(how: _Update, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> dict[Path, _PreparedNode]:
    """All checks, and what follows each layer; by shapes alone."""
    params, topology, opt_state, statistics = jax.tree.unflatten(structure, leaves)
    method, optimizer, where = how.method, original(how.optimizer), original(how.where)
    check_storage(method, topology)
    old = nodes(topology)
    following = followers(optimizer, params, topology)
    fills = choose_fills(following, how.fill)
    flatten_state(opt_state, following, topology)
    frozen = frozen_layers(optimizer, params, opt_state, topology)
    measured = by_path(statistics, leaf=Measured) if method.statistic is not None else {}
    prepared = {}
    for path, node in old.items():
        excluded = where is not None and not _is_included(where, layer_path(path))
        status = 1 if excluded else 2 * (path in frozen)
        if method.statistic is not None and not status:
            _check_statistic(method.name, method.statistic, path, node, measured.get(path))
        moments = tuple(i for i, follower in following.items() if follower.path == path)
        prepared[path] = _PreparedNode(NodeUpdate(status, tuple(fills[i] for i in moments)), moments)
    return prepared


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
