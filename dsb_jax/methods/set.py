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
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.methods import schedule
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.single import init_single, resize_single, update_single
from dsb_jax.methods.sizes import check_resize, check_storage, check_weights
from dsb_jax.select import select_largest
from dsb_jax.spec import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class SET:
    """The method. See `dsb_jax.methods.base.Method` for the methods, `dsb_jax.methods.schedule` for the fields.

    Raises:
      ValueError: if a setting is invalid.
    """

    drop_fraction: float = 0.3
    update_interval: int = 100
    update_start_step: int = 0
    update_end_step: int | None = None
    anneal_steps: int | None = None

    name: ClassVar[str] = "set"
    storage: ClassVar[str] = "single"

    def __post_init__(self) -> None:
        schedule.check_annealing(self)
        object.__setattr__(self, "drop_fraction", float(self.drop_fraction))

    @property
    def statistic(self) -> None:
        return None

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
            # Inactive ones first; a dropped one only where there are fewer than k of them, above a density of 1 / 2.
            rank = jax.random.uniform(key, kept.shape, jnp.float32) + (~active).astype(jnp.float32)
            return select_largest(rank, k, where=~kept)

        return update_single(self, step, jax.tree.map(jnp.asarray, state), grow)

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        check_resize(self.name, self.storage, state.layout, spec)
        return resize_single(key, jax.tree.map(jnp.asarray, state), spec)
