"""SET: unstructured dynamic sparse training with random growth.

Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 2018, algorithm 1. The paper drops the weights closest
to zero of either sign, a fixed share of them after every epoch; here the share follows the same cosine schedule and the
same interval as for all methods, so that they compare on equal terms, and magnitude alone decides.
"""

import jax

from dsb_jax.methods.base import Method
from dsb_jax.methods.unstructured import random_positions, update_positions
from dsb_jax.ops.statistics import Probe
from dsb_jax.select import select_largest


def set_(*, update_end_step: int, alpha: float = 0.3) -> Method:
    """Builds the method; the name has an underscore because `set` is Python's.

    Args:
      update_end_step: T_end of the cosine schedule, in steps.
      alpha: drop fraction at step 0, in [0, 1].

    Raises:
      ValueError: if `alpha` is out of range.
    """

    def grow(key: jax.Array, statistic: Probe, k: jax.Array, kept: jax.Array, active: jax.Array) -> jax.Array:
        del statistic
        # Inactive ones first; a dropped one only where there are fewer than k of them, below a density of 1 / 2.
        rank = jax.random.uniform(key, kept.shape) + ~active
        return select_largest(rank, k, where=~kept)

    update = update_positions(grow, update_end_step=update_end_step, alpha=alpha)
    return Method(name="set", sparse=True, init=random_positions, update=update, statistic=None, unstructured=True)
