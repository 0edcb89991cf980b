"""The forward set of Top-KAST: a layer computes with part of the weights that have a gradient.

Jayakumar et al., NeurIPS 2020, sections 2.2 and 2.3 (see `dsb_jax.methods.topkast`). The weights outside of the forward
set read zero, yet get the gradient that they would have if they were active (straight-through), and beside it that of
the exploration regularizer, `penalty / 2 * w^2` each.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def forward_set(
    blocks: Float[Array, "num_blocks R C"], forward_mask: Bool[Array, "num_blocks R C"], penalty: float
) -> Float[Array, "num_blocks R C"]:
    """The blocks with zeros outside of the mask.

    The penalty is added to the gradient of whatever is differentiated, so that any training loop has it; with a loss
    that is scaled before it is differentiated (mixed precision in float16) it has to be scaled alike.

    Args:
      blocks: weights of the backward set.
      forward_mask: True for those of the forward set.
      penalty: of the others, in units of the loss over the weight's square.
    """
    return jnp.where(forward_mask, blocks, 0)


def _forward(blocks, forward_mask, penalty):
    return jnp.where(forward_mask, blocks, 0), (blocks, forward_mask)


def _backward(penalty, residuals, gradient):
    blocks, forward_mask = residuals
    return gradient + jnp.where(forward_mask, 0, penalty * blocks), None


forward_set.defvjp(_forward, _backward)
