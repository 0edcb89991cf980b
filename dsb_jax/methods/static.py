"""Static shuffled blocks: a random layout that never changes. The companion that tells what adapting brings."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.blocks import check_columns, init_blocks, resize_blocks
from dsb_jax.methods.identity import identity
from dsb_jax.methods.sizes import check_init, check_resize, check_storage
from dsb_jax.spec import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """Nd weights, gradients and moments; no adaptation. Where a score decides, every row group has a block if it can.

    DSB takes the layers that it makes. See `dsb_jax.methods.base.Method` for the methods.

    Attributes:
      columns: see `dsb_jax.methods.DSB`.

    Raises:
      ValueError: if a setting is invalid.
    """

    columns: str = "dealt"

    name: ClassVar[str] = "ssb"
    storage: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        check_columns(self.columns)

    @property
    def statistic(self) -> None:
        return None

    def stored(self, spec: LayerSpec) -> LayerSpec:
        check_storage(self.name, self.storage, spec)
        return spec

    def due(self, step: int) -> bool:
        return False

    def init(
        self,
        key: jax.Array,
        weights: Float[Array, "out in"],
        spec: LayerSpec,
        *,
        score: Float[Array, "out in"] | None = None,
    ) -> LayerState:
        weights, score = check_init(self.name, self.storage, weights, score, spec)
        return init_blocks(key, weights, spec, score=score, min_group_blocks=1, columns=self.columns)

    def update(
        self, key: jax.Array, step: jax.Array | int, state: LayerState, statistic: Any
    ) -> tuple[LayerState, LayerReport]:
        return identity(jax.tree.map(jnp.asarray, state))

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        check_resize(self.name, self.storage, state.layout, spec)
        return resize_blocks(key, jax.tree.map(jnp.asarray, state), spec, min_group_blocks=1)
