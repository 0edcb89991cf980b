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
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.grow import grow_gradient
from dsb_jax.methods import schedule
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.single import init_single, resize_single, update_single
from dsb_jax.methods.sizes import check_resize, check_storage, check_weights
from dsb_jax.ops.statistics import Gradient, Statistic
from dsb_jax.spec import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL:
    """The method. See `dsb_jax.methods.base.Method` for the methods, `dsb_jax.methods.schedule` for the fields.

    Raises:
      ValueError: if a setting is invalid.
    """

    drop_fraction: float = 0.3
    update_interval: int = 100
    update_start_step: int = 0
    update_end_step: int | None = None
    anneal_steps: int | None = None

    name: ClassVar[str] = "rigl"
    storage: ClassVar[str] = "single"

    def __post_init__(self) -> None:
        schedule.check_annealing(self)
        object.__setattr__(self, "drop_fraction", float(self.drop_fraction))

    @property
    def statistic(self) -> Statistic:
        return Gradient()

    def stored(self, spec: LayerSpec) -> LayerSpec:
        return spec.with_single(spec.num_active)

    def due(self, step: int) -> bool:
        return schedule.is_due(self, step)

    def init(
        self,
        key: jax.Array,
        weights: Float[Array, "out in"],
        spec: LayerSpec,
        *,
        score: Float[Array, "out in"] | None = None,
    ) -> LayerState:
        check_storage(self.name, self.storage, spec)
        weights, score = check_weights(weights, score, spec)
        return init_single(key, weights, spec, score=score)

    def update(
        self, key: jax.Array, step: jax.Array | int, state: LayerState, statistic: Any
    ) -> tuple[LayerState, LayerReport]:
        def grow(
            k: Int[Array, ""], kept: Bool[Array, "out in"], active: Bool[Array, "out in"]
        ) -> Bool[Array, "out in"]:
            del active
            return grow_gradient(statistic, k, candidate=~kept)

        return update_single(self, step, jax.tree.map(jnp.asarray, state), grow)

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        check_resize(self.name, self.storage, state.layout, spec)
        return resize_single(key, jax.tree.map(jnp.asarray, state), spec)
