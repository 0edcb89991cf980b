"""Losses of classifiers: logits [..., classes] and integer labels [...], of images, tokens, or whatever has classes.

A label outside of 0..classes-1 makes the loss NaN: -1 would else count from the end, and -100, which some frameworks
ignore, would be trained on. To ignore labels, give a loss of your own, or weights to `eval_step`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def losses_of_labels(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], *, smoothing: float = 0.0
) -> Float[Array, "*batch"]:
    """Cross-entropy of each label; NaN for labels that are no class.

    Raises:
      ValueError: if there is not one integer label for each vector of logits.
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype}{list(labels.shape)} for logits {list(logits.shape)}; give one integer for each "
            f"vector of logits, {list(logits.shape[:-1])}, or a loss of your own."
        )
    classes = logits.shape[-1]
    if smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes, dtype=logits.dtype), smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.clip(labels, 0, classes - 1))
    return jnp.where((labels >= 0) & (labels < classes), losses, jnp.nan)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over all labels."""
    return losses_of_labels(logits, labels).mean()


@functools.cache
def smoothed_cross_entropy(smoothing: float) -> Loss:
    """Cross-entropy with label smoothing; cached, so that equal settings compile once."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing} is not in [0, 1); 0.1 is usual.")
    if smoothing == 0:
        return cross_entropy

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return losses_of_labels(logits, labels, smoothing=smoothing).mean()

    return loss
