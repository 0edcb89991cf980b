"""Measuring a statistic on one batch: `loss_fn` is differentiated with respect to zeros in the collection `statistics`.

Nothing of a model is known here but the trees `params` and `topology`. What a layer observes is in
`dsb_jax.ops.statistics`; here is which zero each layer gets, and how the observations become statistics.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from dsb_jax.dataflow import count_uses
from dsb_jax.methods.base import check_method
from dsb_jax.ops.statistics import AxisName, Gradient, Statistic, Zero
from dsb_jax.paths import Path, nodes, replace_at
from dsb_jax.static_values import as_static, original
from dsb_jax.step_and_key import shown
from dsb_jax.topology import LayerTopology, by_layer, insert_axes

LossFn = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """The statistic of one layer.

    Attributes:
      value: what `Method.update` takes; lifted axes in their places.
      calls: float32[*stack], how often the layer was observed.
      most_calls: static; more calls than that are no statistic (a loop over the layer), 0 for any number.
    """

    value: Any
    calls: jax.Array
    most_calls: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Measure:
    """`measure(loss_fn, method)`: a hashable value, compiled when it is called."""

    loss_fn: Any
    statistic: Statistic | None
    axis_name: AxisName = None
    has_aux: bool = False

    def __call__(self, params: Any, topology: Any, *batch: Any, **other_collections: Any) -> Any:
        return _measure_jit(self, params, topology, batch, other_collections)

    def measured(self, params: Any, topology: Any, batch: tuple[Any, ...], others: Mapping[str, Any]) -> Any:
        """The tree of statistics, inside of a compiled function."""
        if self.statistic is None:
            return {}
        found = nodes(topology)
        loss_fn, statistic = original(self.loss_fn), self.statistic
        untouched = _zero_of((params, topology, batch, dict(others)), self.axis_name)

        def objective(zeros: Mapping[Path, Zero]) -> jax.Array:
            variables = {**others, "params": params, "topology": topology, "statistics": replace_at(topology, zeros)}
            return self._loss(loss_fn(variables, *batch))

        kinds: dict[Path, Any] = dict.fromkeys(found, statistic)
        zeros = {path: self._zero(node, statistic, untouched) for path, node in found.items()}
        places = dict.fromkeys(found, 0)
        if not statistic.is_additive:
            traced = jax.make_jaxpr(objective)(zeros)
            places = _count_places(traced, zeros)
            for path, count in places.items():
                if count > 1:  # norms of several calls do not add up, gradients do
                    kinds[path], places[path] = Gradient(), 0
                    zeros[path] = self._zero(found[path], Gradient(), untouched)
        seen = jax.grad(objective)(zeros)
        return replace_at(topology, {p: self._finish(seen[p], kinds[p], node, places[p]) for p, node in found.items()})

    def _loss(self, result: Any) -> jax.Array:
        """Of what `loss_fn` returned."""
        is_pair = isinstance(result, tuple) and len(result) == 2
        if self.has_aux != is_pair:
            have, cure = ("(loss, aux)", "pass has_aux=True") if is_pair else ("a loss alone", "leave has_aux away")
            raise ValueError(f"loss_fn returned {have}, with has_aux={self.has_aux}; {cure}.")
        loss = result[0] if self.has_aux else result
        if not hasattr(loss, "dtype") or jnp.shape(loss) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(f"the loss is {shown(loss)}, not one float; return the mean over the examples.")
        return loss

    def _zero(self, node: LayerTopology, statistic: Statistic, untouched: jax.Array) -> Zero:
        """Zeros of all layers of a node; lifted axes where the node has them, also of `calls`."""
        axes, sizes = node.stack_axes, node.stack_shape

        def stacked(leaf: jax.Array) -> jax.Array:
            shape = insert_axes(leaf.shape, axes, sizes)
            return jnp.broadcast_to(jnp.expand_dims(leaf, axes), shape) + untouched

        calls = jnp.zeros((1,) * max(axes, default=0), jnp.float32)  # of the rank that a lift along `axes` needs
        return Zero(jax.tree.map(stacked, statistic.zeros(node.spec)), stacked(calls), statistic, self.axis_name)

    def _finish(self, seen: Zero, kind: Any, node: LayerTopology, places: int) -> Measured:
        value = kind.finish(seen.value, self.axis_name)
        if kind != self.statistic:
            statistic: Any = self.statistic
            value = by_layer(lambda layout, _, gradient: statistic.from_gradient(gradient, layout), node, value)
        calls = seen.calls.reshape(node.stack_shape)
        return Measured(value, calls if self.axis_name is None else jax.lax.pmax(calls, self.axis_name), places)


@functools.partial(jax.jit, static_argnums=0)
def _measure_jit(how: Measure, params: Any, topology: Any, batch: Any, others: Any) -> Any:
    return how.measured(params, topology, batch, others)


def measure(loss_fn: LossFn, method: Any, *, axis_name: AxisName = None, has_aux: bool = False) -> Measure:
    """What `method` must know of the backward pass before it updates.

    Args:
      loss_fn: `(variables, *batch) -> loss`, or `(loss, aux)` with `has_aux`. `variables` holds params, topology,
        statistics and whatever other collections are passed; the loss is the mean over this device's part of the batch.
      method: one of `dsb_jax.methods`.
      axis_name: of `pmap` or `shard_map`, where this is called inside of one.

    Returns:
      A function `(params, topology, *batch, **other_collections) -> statistics`, a tree with one `Measured` for each
      sparse layer; `update` takes it, also averaged over steps.
    """
    check_method(method)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn={loss_fn!r} cannot be called; give (variables, *batch) -> loss.")
    return Measure(as_static(loss_fn), method.statistic, axis_name, has_aux)


def _zero_of(tree: Any, axis_name: AxisName) -> jax.Array:
    """float32 zero that is mapped wherever anything in the tree is, by any `vmap`, `pmap` or `shard_map`."""

    @custom_vmap
    def zero(*leaves: Any) -> jax.Array:
        return jnp.zeros((), jnp.float32)

    @zero.def_vmap
    def map_once_more(size: int, is_mapped: Any, *leaves: Any) -> Any:
        inner = zero(*(leaf[0] if mapped else leaf for leaf, mapped in zip(leaves, is_mapped, strict=True)))
        return jnp.broadcast_to(inner, (size,)), True

    result = zero(*(leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)))
    for name in () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name:
        result += 0.0 * lax.axis_index(name).astype(jnp.float32)
    return result


def _count_places(traced: Any, zeros: Mapping[Path, Zero]) -> dict[Path, int]:
    """At how many places of the traced loss each layer observes."""
    numbered = jax.tree.unflatten(jax.tree.structure(zeros), range(len(jax.tree.leaves(zeros))))
    calls = {path: zero.calls for path, zero in numbered.items()}
    uses = count_uses(traced, calls.values())
    return {path: uses[number] for path, number in calls.items()}
