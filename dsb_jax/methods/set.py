"""SET: unstructured dynamic sparse training with random growth.

Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science", Nature Communications 2018, algorithm 1. The paper drops the weights closest
to zero of either sign, a fixed share of them after every epoch; here the share follows the same cosine schedule and the
same interval as for all methods, so that they compare on equal terms, and magnitude alone decides.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dsb_jax.methods.single import SingleWeights
from dsb_jax.select import select_largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SET(SingleWeights):
    """The method; fields and errors as of `SingleWeights`."""

    name: ClassVar[str] = "set"

    @property
    def statistic(self) -> None:
        return None

    def grow(
        self,
        key: jax.Array,
        statistic: Any,
        k: Int[Array, ""],
        kept: Bool[Array, "out in"],
        active: Bool[Array, "out in"],
    ) -> Bool[Array, "out in"]:
        # Inactive ones first; a dropped one only where there are fewer than k of them, above a density of 1 / 2.
        rank = jax.random.uniform(key, kept.shape, jnp.float32) + (~active).astype(jnp.float32)
        return select_largest(rank, k, where=~kept)
