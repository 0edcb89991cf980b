"""RigL: unstructured dynamic sparse training that grows where the dense gradient is largest.

Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3:

    k     = round(drop_fraction(t) * num_active)                                (`dsb_jax.methods.schedule`)
    drop  = the k active weights of smallest magnitude                          (3, "drop criterion")
    grow  = the k positions of largest |dL/dW| among all that are not kept      (4, "grow criterion")

As in the authors' code, a weight that is dropped and at once regrown keeps its value; every other grown one starts at
zero. Weights, gradients and moments are Nd in training; an adaptation needs the N gradients of its layers.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Bool, Int

from dsb_jax.grow import grow_gradient
from dsb_jax.methods.single import SingleWeights
from dsb_jax.ops.statistics import Gradient, Statistic


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(SingleWeights):
    """The method; fields and errors as of `SingleWeights`."""

    name: ClassVar[str] = "rigl"

    @property
    def statistic(self) -> Statistic:
        return Gradient()

    def grow(
        self,
        key: jax.Array,
        statistic: Any,
        k: Int[Array, ""],
        kept: Bool[Array, "out in"],
        active: Bool[Array, "out in"],
    ) -> Bool[Array, "out in"]:
        return grow_gradient(statistic, k, candidate=~kept)
