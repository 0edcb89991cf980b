"""What RigL and SET share: single weights stored as values and indices, dropped by magnitude, grown one by one.

Packed unstructured storage is the case R = C = 1 of shuffled blocks: `group_start` are the row pointers and `in_idx`
the columns of a compressed sparse row matrix. So Nd weights, gradients and moments exist, as for DSB, and repacking,
checkpoints and telemetry are the same code. The product is the dense one, one layer at a time.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsb_jax.drop import magnitude_drop
from dsb_jax.layout import BlockLayout, layout_of_positions, pack, to_mask, unpack
from dsb_jax.methods import schedule
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.blocks import scale_to_fan_in
from dsb_jax.methods.identity import count_empty_groups, identity_outside
from dsb_jax.methods.sizes import check_init, check_resize
from dsb_jax.origins import move
from dsb_jax.select import select_largest
from dsb_jax.spec import LayerSpec


def random_positions(key: jax.Array, shape: tuple[int, int], *, num_blocks: int) -> BlockLayout:
    """`num_blocks` positions drawn from all `out * in` alike."""
    noise = jax.random.uniform(key, shape, jnp.float32)
    return layout_of_positions(select_largest(noise, num_blocks, where=True), num_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleWeights:
    """All of a method but what it measures and where it grows.

    See `dsb_jax.methods.base.Method` for the methods, `dsb_jax.methods.schedule` for the fields.

    Raises:
      ValueError: if a setting is invalid.
    """

    drop_fraction: float = 0.3
    update_interval: int = 100
    update_start_step: int = 0
    update_end_step: int | None = None
    anneal_steps: int | None = None

    name: ClassVar[str]
    storage: ClassVar[str] = "single"

    def __post_init__(self) -> None:
        schedule.check_annealing(self)
        object.__setattr__(self, "drop_fraction", float(self.drop_fraction))

    def grow(
        self,
        key: jax.Array,
        statistic: Any,
        k: Int[Array, ""],
        kept: Bool[Array, "out in"],
        active: Bool[Array, "out in"],
    ) -> Bool[Array, "out in"]:
        """The k positions that become active, outside of `kept`; `active` are those of before."""
        raise NotImplementedError

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
        """Random positions, weights scaled to the fan-in of each row; or the largest scores, weights as they are."""
        weights, score = check_init(self.name, self.storage, weights, score, spec)
        if score is None:
            layout = random_positions(key, spec.shape, num_blocks=spec.num_blocks)
            return LayerState(scale_to_fan_in(weights, layout), layout)
        layout = layout_of_positions(select_largest(score, spec.num_blocks, where=True), spec.num_blocks)
        return LayerState(pack(weights, layout), layout)

    def update(
        self, key: jax.Array, step: jax.Array | int, state: LayerState, statistic: Any
    ) -> tuple[LayerState, LayerReport]:
        """Drops the weakest round(drop_fraction(t) * num_active), grows as many."""
        state = jax.tree.map(jnp.asarray, state)
        blocks, layout, _ = state
        k = jnp.round(schedule.drop_fraction(self, step) * layout.num_active).astype(jnp.int32)
        dropped = magnitude_drop(blocks, k)
        active = to_mask(layout)
        kept = unpack((~dropped).astype(jnp.float32), layout) > 0
        now = kept | self.grow(key, statistic, k, kept, active)
        new = layout_of_positions(now, layout.num_blocks)
        new_state = LayerState(move(blocks, layout, new), new)
        report = LayerReport(
            requested=k,
            accepted=(now & ~kept).sum(dtype=jnp.int32),
            turnover=(now & ~active).sum(dtype=jnp.int32).astype(jnp.float32) / layout.num_active,
            collateral=jnp.zeros((), jnp.float32),
            empty_groups=count_empty_groups(new_state),
        )
        return identity_outside(self, step, state, new_state, report)

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        """The weights of largest magnitude, or all of them and random positions beside them."""
        check_resize(self.name, self.storage, state.layout, spec)
        blocks, layout, _ = jax.tree.map(jnp.asarray, state)
        active = to_mask(layout)
        kept = select_largest(jnp.abs(blocks), spec.num_blocks, where=True)
        noise = jax.random.uniform(key, spec.shape, jnp.float32)
        grown = select_largest(noise, spec.num_blocks - layout.num_blocks, where=~active)
        new = layout_of_positions((unpack(kept.astype(jnp.float32), layout) > 0) | grown, spec.num_blocks)
        return LayerState(move(blocks, layout, new), new)
