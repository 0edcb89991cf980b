"""One training step and one evaluation step, for any Flax model with or without sparse layers.

    state, metrics = train_step(state, images, labels, model=model, optimizer=optimizer)

Weights, gradients and moments of sparse layers are `[num_blocks, R, C]` throughout; the topology is read, never
written (that is `dsb_jax.adapt`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dsb_jax.train_state import TrainState

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch; labels are int32[N]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def smoothed_cross_entropy(smoothing: float) -> Loss:
    """Cross-entropy with label smoothing; cached, so that equal settings compile once."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing} is not in [0, 1); 0.1 is usual.")
    if smoothing == 0:
        return cross_entropy

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    return loss


def forward(
    model: nn.Module, variables: dict[str, Any], images: jax.Array, *, dropout_key: jax.Array
) -> tuple[jax.Array, Any]:
    """Logits and new batch statistics in training mode."""
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key})
    return logits, updates.get("batch_stats", {})


def step_key(state: TrainState) -> jax.Array:
    """The PRNG key of the current step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "loss"), donate_argnums=0)
def train_step(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss: Loss = cross_entropy,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates weights by one batch. The state is donated.

    Args:
      state: the train state.
      images: [N, H, W, C] or whatever the model takes.
      labels: int32[N].
      model: called as `model(images, train=True)`.
      optimizer: any optax transformation.
      loss: `(logits, labels) -> scalar`.

    Returns:
      The new state and `{"loss", "accuracy"}` of the batch.
    """

    def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, batch_stats = forward(model, {**state.variables, "params": params}, images, dropout_key=step_key(state))
        return loss(logits, labels), (logits, batch_stats)

    (value, (logits, batch_stats)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics = {"loss": value, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}
    new = TrainState(
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        topology=state.topology,
        step=state.step + 1,
        key=state.key,
    )
    return new, metrics


@functools.partial(jax.jit, static_argnames=("model",))
def eval_step(
    state: TrainState, images: jax.Array, labels: jax.Array, weight: jax.Array, *, model: nn.Module
) -> dict[str, jax.Array]:
    """Sums over one batch, each example counted `weight` (0 for padding): `correct`, `loss`, `count`."""
    logits: Any = model.apply(state.variables, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = jnp.argmax(logits, -1) == labels
    return {"correct": (correct * weight).sum(), "loss": (losses * weight).sum(), "count": weight.sum()}
