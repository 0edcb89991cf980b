"""Training, evaluation and adaptation steps of classifiers, on top of what serves any model (`dsb_jax.adapt`).

    state, metrics = train_step(state, inputs, labels, model=model, optimizer=optimizer)
    state, report = adapt_step(state, inputs, labels, model=model, method=method, optimizer=optimizer)

Weights, gradients and moments of sparse layers are `[num_blocks, R, C]` throughout. The steps take any model with
`init` and `apply` as Linen modules have them, hashable or not, with or without an argument for training mode; inputs
are whatever it takes (`dsb_jax.calling`), and it may draw from any PRNG stream.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsb_jax.adapt import Report, Where, adaptation
from dsb_jax.calling import call_model
from dsb_jax.losses import Loss, cross_entropy, losses_of_labels
from dsb_jax.methods.base import Method
from dsb_jax.ops.statistics import AxisName
from dsb_jax.static_values import as_static, original
from dsb_jax.train_state import TrainState, step_key


def forward(model: Any, variables: dict[str, Any], inputs: Any, key: jax.Array) -> tuple[Any, dict[str, Any]]:
    """Outputs in training mode, and the new values of all collections but params, topology and statistics."""
    mutable = [name for name in variables if name not in ("params", "topology", "statistics")]
    rngs = {"dropout": key, "params": jax.random.fold_in(key, 2)}  # a stream without a key of its own takes params'
    outputs, updates = call_model(model, variables, inputs, train=True, mutable=mutable, rngs=rngs)
    return outputs, dict(updates)


@dataclasses.dataclass(frozen=True)
class _TrainStep:
    model: Any
    optimizer: Any
    loss: Loss
    axis_name: AxisName


def train_step(
    state: TrainState,
    inputs: Any,
    labels: jax.Array,
    *,
    model: Any,
    optimizer: optax.GradientTransformation,
    loss: Loss = cross_entropy,
    axis_name: AxisName = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates weights by one batch. The state is donated.

    Args:
      state: the train state.
      inputs: what the model takes: an array, a dictionary of arguments, a tuple of arguments.
      labels: integers, one for each vector of logits: [N] for images, [N, T] for tokens. With a `loss` of your own
        whatever that takes.
      model: with `apply` as a Linen module has it.
      optimizer: any optax transformation.
      loss: `(outputs of the model, labels) -> scalar`, the mean over the batch.
      axis_name: of `pmap` or `shard_map`, inside of one: gradients, metrics and collections are averaged over it.

    Returns:
      The new state and `{"loss", "accuracy"}` of the batch; accuracy where outputs are logits for these labels.

    Raises:
      ValueError: if labels and logits do not belong together.
    """
    return _train_step(_TrainStep(as_static(model), as_static(optimizer), loss, axis_name), state, inputs, labels)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _train_step(how: _TrainStep, state: TrainState, inputs: Any, labels: Any) -> tuple[TrainState, dict[str, Any]]:
    model, optimizer = original(how.model), original(how.optimizer)

    def objective(params: Any) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        outputs, collections = forward(model, {**state.variables, "params": params}, inputs, step_key(state))
        return how.loss(outputs, labels), (outputs, collections)

    (value, (outputs, collections)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    metrics = {"loss": value}
    is_logits = isinstance(outputs, jax.Array) and isinstance(labels, jax.Array) and outputs.ndim > 0
    if is_logits and outputs.shape[:-1] == labels.shape:
        metrics["accuracy"] = jnp.mean(jnp.argmax(outputs, -1) == labels)
    if how.axis_name is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), how.axis_name)
        collections = jax.tree.map(lambda leaf: _mean_if_float(leaf, how.axis_name), collections)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    new = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        collections={**state.collections, **collections},
        opt_state=opt_state,
        step=state.step + 1,
    )
    return new, metrics


def _mean_if_float(leaf: jax.Array, axis_name: AxisName) -> jax.Array:
    return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def eval_step(
    state: TrainState, inputs: Any, labels: jax.Array, weight: jax.Array | None = None, *, model: Any
) -> dict[str, jax.Array]:
    """Sums over one batch of examples or tokens.

    Args:
      state: the train state.
      inputs: as in `train_step`.
      labels: integers, one for each vector of logits.
      weight: of each label, or of each example with all its labels, [N]; 0 for padding, which may hold anything. None
        counts every label once.
      model: with `apply` as a Linen module has it.

    Returns:
      `{"correct", "loss", "count"}`: sums of right answers, losses and weights. NaN loss where a label is no class.
    """
    if weight is None:
        weight = jnp.ones(jnp.shape(labels), jnp.float32)
    return _eval_step(as_static(model), state, inputs, labels, weight)


@functools.partial(jax.jit, static_argnums=0)
def _eval_step(model: Any, state: TrainState, inputs: Any, labels: Any, weight: Any) -> dict[str, jax.Array]:
    logits = call_model(original(model), state.variables, inputs, train=False)
    losses = losses_of_labels(logits, labels)
    weight = jnp.asarray(weight)
    if weight.shape != labels.shape[: weight.ndim]:
        raise ValueError(
            f"weight has shape {weight.shape} for labels {labels.shape}; give one for each label, or for each example."
        )
    weight = jnp.broadcast_to(weight.reshape(*weight.shape, *(1,) * (labels.ndim - weight.ndim)), labels.shape)

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(weight == 0, 0, values * weight).sum()  # 0 * NaN is NaN

    return {"correct": total(jnp.argmax(logits, -1) == labels), "loss": total(losses), "count": weight.sum()}


@dataclasses.dataclass(frozen=True)
class _BatchLoss:
    """The loss of a classifier as an adaptation takes it; equal for equal models."""

    model: Any
    loss: Loss

    def __call__(self, variables: dict[str, Any], inputs: Any, labels: Any, key: jax.Array) -> jax.Array:
        outputs, _ = forward(original(self.model), variables, inputs, key)
        return self.loss(outputs, labels)


def adapt_step(
    state: TrainState,
    inputs: Any,
    labels: jax.Array,
    *,
    model: Any,
    method: Method,
    optimizer: optax.GradientTransformation,
    loss: Loss = cross_entropy,
    axis_name: AxisName = None,
    where: Where | None = None,
    fill: Mapping[str, Any] | None = None,
) -> tuple[TrainState, Report]:
    """Adapts the topology of every sparse layer. The state is donated.

    Args:
      state: the train state.
      inputs, labels: the adaptation batch, used for the statistics that growing needs.
      model: the model that `state` belongs to.
      method: the one that its layers were made with, or one of the same storage.
      optimizer: the one whose state is to follow the weights.
      loss: as in training.
      axis_name, where, fill: as in `dsb_jax.adaptation`.

    Returns:
      The new state (same shapes, same number of active weights) and a report for each layer by its path.

    Raises:
      ValueError: as `dsb_jax.adaptation`.
    """
    adapt = adaptation(
        _BatchLoss(as_static(model), loss), method, optimizer, axis_name=axis_name, where=where, fill=fill
    )
    rest = dataclasses.replace(state, params=None, topology=None, opt_state=None, collections={})
    key, adapt_key = _adaptation_keys(rest)
    *trees, report = adapt.adapted(
        state.params, state.topology, state.opt_state, state.step, adapt_key, (inputs, labels, key), state.collections,
        donate=True,
    )  # fmt: skip
    params, topology, opt_state = trees
    return dataclasses.replace(state, params=params, topology=topology, opt_state=opt_state), report


@jax.jit
def _adaptation_keys(state: TrainState) -> tuple[jax.Array, jax.Array]:
    """The key of the training step, and one apart from it."""
    key = step_key(state)
    return key, jax.random.fold_in(key, 1)
