"""RigL: unstructured dynamic sparse training that grows where the dense gradient is largest.

Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3:

    k     = round(alpha / 2 * (1 + cos(pi * t / T_end)) * num_active)
    drop  = the k active weights of smallest magnitude                          (3, "drop criterion")
    grow  = the k positions of largest |dL/dW| among all that are not kept      (4, "grow criterion")

As in the authors' code, a weight that is dropped and at once regrown keeps its value; every other grown one starts at
zero. Weights, gradients and moments are Nd in training; an adaptation needs the N gradients of its layers.
"""

import jax

from dsb_jax.grow import grow_gradient
from dsb_jax.methods.base import Method
from dsb_jax.methods.unstructured import random_positions, update_positions
from dsb_jax.ops.statistics import Probe


def rigl(*, update_end_step: int, alpha: float = 0.3) -> Method:
    """Builds the method.

    Args:
      update_end_step: T_end of the cosine schedule, in steps.
      alpha: drop fraction at step 0, in [0, 1].

    Raises:
      ValueError: if `alpha` is out of range.
    """

    def grow(key: jax.Array, statistic: Probe, k: jax.Array, kept: jax.Array, active: jax.Array) -> jax.Array:
        del key, active
        return grow_gradient(statistic["gradient"], k, candidate=~kept)

    update = update_positions(grow, update_end_step=update_end_step, alpha=alpha)
    return Method(name="rigl", sparse=True, init=random_positions, update=update, statistic="gradient",
                  unstructured=True)  # fmt: skip
