"""The adaptation of an NNX model: the core's, over `nnx.split` and `nnx.merge`; results are written into the model.

    report = adapt(model, optimizer, loss_fn, method, x, y, step=step, key=key)

Statistics are measured on a copy, so whatever `loss_fn` does to its model (batch statistics, counters of dropout) is
thrown away. Call it outside of `nnx.jit`, where equal layers share what is compiled, or inside.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsb_jax import adapt as core_adapt
from dsb_jax import measuring, optimizer_states, stages
from dsb_jax.adapt import Report, Where
from dsb_jax.methods.base import Method
from dsb_jax.nnx.variables import (
    TOPOLOGY,
    Keys,
    Observed,
    Topology,
    check_model,
    names,
    sparse_modules,
    topology,
)
from dsb_jax.ops.statistics import AxisName, Zero
from dsb_jax.paths import WEIGHTS, by_path, key_name, nested, nodes, path_name, weights_at
from dsb_jax.plan import SparsityPlan
from dsb_jax.topology import is_node


def adapt(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    loss_fn: Callable[..., Any],
    method: Method,
    *batch: Any,
    step: Any,
    key: jax.Array,
    axis_name: AxisName = None,
    has_aux: bool = False,
    where: Where | None = None,
    fill: Mapping[str, Any] | None = None,
) -> Report:
    """Adapts the topology of every sparse layer, in place: new layouts, moved weights and moments.

    All sizes stay, so no step compiles again. Weights that stay active keep their values and moments bit by bit.

    Args:
      model: with sparse layers.
      optimizer: made of this model after it became sparse. Layers that its `wrt` leaves out stay as they are.
      loss_fn: `(model, *batch) -> loss`, or `(loss, aux)` with `has_aux`: the mean over this device's examples. Give
        the same function every time: a new one (a lambda within the loop) is compiled anew.
      method: one of `dsb_jax.methods`.
      *batch: passed on to `loss_fn`; what is measured on.
      step: the number of the training step.
      key: a PRNG key, another one for each adaptation.
      axis_name, has_aux, where, fill: as in `dsb_jax.adaptation`.

    Returns:
      {path of the layer: `LayerReport`} of the layers that the optimizer trains.

    Raises:
      ValueError: as `dsb_jax.adaptation`; if the model has no sparse layers, or the optimizer was made before it had.
        The model is then what it was.
    """
    trees = _Trees.of(model, optimizer)
    optimizer_states.check_storage(method, trees.topology)
    statistics = measure(model, loss_fn, method, *batch, axis_name=axis_name, has_aux=has_aux)
    return trees.update(optimizer.tx, method, statistics, step=step, key=key, where=where, fill=fill)


def measure(
    model: nnx.Module,
    loss_fn: Callable[..., Any],
    method: Method,
    *batch: Any,
    axis_name: AxisName = None,
    has_aux: bool = False,
) -> Any:
    """The first half of an adaptation: what `method` must know of the backward pass, on a copy of the model.

    Arguments as in `adapt`.

    Returns:
      Statistics for `update`, a tree like `dsb_jax.nnx.topology(model)`; they may be averaged over steps.
    """
    check_model(model)
    graphdef, *states = nnx.split(model, Topology, ...)
    measured = measuring.measure(_Loss(loss_fn, graphdef), method, axis_name=axis_name, has_aux=has_aux)
    return measured(nnx.as_pure(states[1]), topology(model), *batch)


def update(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    method: Method,
    statistics: Any,
    *,
    step: Any,
    key: jax.Array,
    where: Where | None = None,
    fill: Mapping[str, Any] | None = None,
) -> Report:
    """The second half of an adaptation, in place. Arguments, result and errors as in `adapt`."""
    trees = _Trees.of(model, optimizer)
    return trees.update(optimizer.tx, method, statistics, step=step, key=key, where=where, fill=fill)


def restage(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    plan: SparsityPlan,
    method: Method,
    key: jax.Array,
    *,
    fill: Mapping[str, Any] | None = None,
) -> None:
    """Brings every sparse layer to the number of blocks of a plan, in place: see `dsb_jax.restage`.

    Between steps, outside of `nnx.jit`; the steps after it compile anew, since sizes have changed.

    Raises:
      ValueError: as `dsb_jax.restage` and `adapt`.
    """
    trees = _Trees.of(model, optimizer)
    trees.write(
        *stages.restage(
            trees.params, trees.topology, trees.opt_state, plan, method, optimizer.tx, key, fill=fill
        )
    )  # fmt: skip


def check_optimizer(optimizer: nnx.Optimizer, model: nnx.Module, method: Method | None = None) -> None:
    """Checks before the first step whether an optimizer's state can follow the weights of a model.

    Args:
      optimizer: of this model.
      model: with sparse layers.
      method: as in `dsb_jax.check_optimizer`.

    Raises:
      ValueError: if the optimizer was made before the model became sparse, or as `dsb_jax.check_optimizer`.
    """
    trees = _Trees.of(model, optimizer)
    optimizer_states.check_optimizer(optimizer.tx, trees.params, trees.topology, method)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of variables, as the core differentiates it, by the loss of a model; hashable.

    Attributes:
      loss_fn: `(model, *batch)`.
      graphdef: of the model.
    """

    loss_fn: Callable[..., Any]
    graphdef: Any

    def __call__(self, variables: Mapping[str, Any], *batch: Any) -> Any:
        zeros = by_path(variables["statistics"], leaf=Zero)
        held = {}
        for keys, node in jax.tree_util.tree_leaves_with_path(variables["topology"], is_leaf=is_node):
            held[(*(key.key for key in keys[:-1]), TOPOLOGY)] = Observed(node, zeros[tuple(map(key_name, keys))])
        topologies = nnx.from_flat_state(held)
        return self.loss_fn(nnx.merge(self.graphdef, topologies, variables["params"], copy=True), *batch)


class _Trees(NamedTuple):
    """A model and its optimizer as the core sees them: pure trees, of the layers that the optimizer trains.

    Attributes:
      layers: the sparse ones, by their keys.
      moments: the Variables of the optimizer's state, in the order of its leaves.
      params, topology, opt_state: their arrays.
    """

    layers: Mapping[Keys, Any]
    moments: list[nnx.Variable]
    params: Any
    topology: Any
    opt_state: Any

    @classmethod
    def of(cls, model: nnx.Module, optimizer: nnx.Optimizer) -> "_Trees":
        check_model(model)
        if not isinstance(optimizer, nnx.Optimizer):
            raise ValueError(
                f"optimizer={optimizer!r} is no nnx.Optimizer; make one: nnx.Optimizer(model, tx, wrt=nnx.Param)."
            )
        state = nnx.state(model, optimizer.wrt)
        trained = {keys for keys, _ in nnx.to_flat_state(state)}
        layers = {keys: m for keys, m in sparse_modules(model).items() if (*keys, WEIGHTS) in trained}
        if not layers:
            raise ValueError(
                f"this {type(model).__name__} has no sparse layers that the optimizer trains; make it sparse by "
                "dsb_jax.nnx.sparsify, and the optimizer after it."
            )
        params = nnx.as_pure(state)
        where = nested({(*keys, WEIGHTS): module.topology.get_value() for keys, module in layers.items()})
        moments = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        trees = cls(layers, moments, params, where, nnx.as_pure(optimizer.opt_state))
        _check_made_after(optimizer, trees)
        return trees

    def update(
        self, tx: optax.GradientTransformation, method: Method, statistics: Any, *, step: Any, key: jax.Array,
        **options: Any,
    ) -> Report:  # fmt: skip
        """The core's update, written into the model and the optimizer."""
        *new, report = core_adapt.update(
            method, tx, self.params, self.topology, self.opt_state, step, key, statistics, **options
        )
        self.write(*new)
        return report

    def write(self, params: Any, topology: Any, opt_state: Any) -> None:
        """Into the model and the optimizer."""
        found = nodes(topology)
        weights = weights_at(params, found)
        for keys, module in self.layers.items():
            path = names((*keys, WEIGHTS))
            module.blocks.set_value(weights[path])
            module.topology.set_value(found[path])
        for variable, leaf in zip(self.moments, jax.tree.leaves(opt_state), strict=True):
            variable.set_value(leaf)


def _check_made_after(optimizer: nnx.Optimizer, trees: _Trees) -> None:
    """Raises ValueError for an optimizer of other parameters: that of the dense model."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), trees.params)
    wanted, have = (set(by_path(tree)) for tree in (jax.eval_shape(optimizer.tx.init, abstract), trees.opt_state))
    if wanted != have:
        missing, extra = (sorted(map(path_name, paths)) for paths in (wanted - have, have - wanted))
        odd = f"nothing for {missing[0]}" if missing else f"{extra[0]}, which the model has not"
        raise ValueError(
            f"the optimizer was made before the model became sparse: its state has {odd}; make it after sparsify: "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )
