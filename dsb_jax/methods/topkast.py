"""Top-KAST: forward with the largest weights, gradients for a few more, all weights kept.

Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, sections 2.1 to 2.3.
Of the N weights w of a layer of density d,

    A = the Nd of largest |w|         the forward set: the layer computes with these, all others read zero
    B = the Nd + M of largest |w|     the backward set, of which A is a part: only these have a gradient
    penalty = lambda / 2 * (sum over A of w^2  +  1 / d * sum over B without A of w^2)

so that a weight outside of the forward set has to earn its way in before the penalty, stronger there, wears it down
(exploration regularizer). A and B are chosen anew every `update_interval` steps, until the same step as for the other
methods, so that they compare on equal terms. (The paper refreshes to the end; every 100 steps served it as well as 1.)

Storage of a layer: `blocks` holds B as values, and the layout its positions, packed as RigL's are (1x1 blocks): so
gradients and moments exist for Nd + M weights. Beside the layout, in `ForwardSet`, lie which of them belong to A and
all other weights. A weight that enters B comes with its value from there and with moments zero.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsb_jax.layout import BlockLayout, layout_of_positions, pack, to_mask, unpack
from dsb_jax.methods import schedule
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.identity import count_empty_groups, identity_outside
from dsb_jax.methods.sizes import check_init, check_resize
from dsb_jax.select import select_largest
from dsb_jax.spec import LayerSpec
from dsb_jax.static_json import register_for_export


@register_for_export
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardSet:
    """What Top-KAST keeps beside the layout (a `dsb_jax.topology.Aux`).

    Attributes:
      forward_mask: bool[num_blocks, 1, 1], which of the stored weights belong to the forward set.
      reserve: float[out * in - num_blocks], all weights that are not stored, in the order of their positions.
      penalty: of the stored weights outside of the forward set, in units of the loss over the weight's square; static.
    """

    forward_mask: jax.Array
    reserve: jax.Array
    penalty: float = dataclasses.field(metadata={"static": True})

    @property
    def active(self) -> Bool[Array, "num_blocks 1 1"]:
        return self.forward_mask

    def forward(self, blocks: Float[Array, "num_blocks 1 1"]) -> Float[Array, "num_blocks 1 1"]:
        """The blocks with zeros outside of the forward set.

        The weights there read zero, yet get the gradient that they would have if they were active (straight-through),
        and beside it that of the exploration regularizer. It is added to the gradient of whatever is differentiated,
        so that any training loop has it; with a loss that is scaled before it is differentiated (mixed precision in
        float16) it has to be scaled alike.
        """
        return _straight_through(jnp.asarray(blocks), jnp.asarray(self.forward_mask), self.penalty)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _straight_through(blocks: jax.Array, forward_mask: jax.Array, penalty: float) -> jax.Array:
    return jnp.where(forward_mask, blocks, 0)


def _forward(blocks, forward_mask, penalty):
    return jnp.where(forward_mask, blocks, 0), (blocks, forward_mask)


def _backward(penalty, residuals, gradient):
    blocks, forward_mask = residuals
    return gradient + jnp.where(forward_mask, 0, penalty * blocks), None


_straight_through.defvjp(_forward, _backward)


def join(state: LayerState) -> Float[Array, "out in"]:
    """All weights of a layer in dense form."""
    weights = unpack(state.blocks, state.layout)
    return weights.reshape(-1).at[_reserved(state.layout)].set(state.aux.reserve).reshape(weights.shape)


def _split(
    weights: Float[Array, "out in"],
    score: Float[Array, "out in"],
    *,
    num_stored: int,
    num_active: int | jax.Array,
    penalty: float,
) -> LayerState:
    """The weights in two sets, those of largest score; `join` is the inverse."""
    layout = layout_of_positions(select_largest(score, num_stored, where=True), num_stored)
    forward_mask = select_largest(pack(score, layout), num_active, where=True)
    aux = ForwardSet(forward_mask, weights.reshape(-1)[_reserved(layout)], penalty)
    return LayerState(pack(weights, layout), layout, aux)


def _reserved(layout: BlockLayout) -> jax.Array:
    """Flat positions, in order, of the weights that the layout does not hold."""
    count = layout.shape[0] * layout.shape[1] - layout.num_blocks
    return jnp.nonzero(~to_mask(layout).reshape(-1), size=count)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAST:
    """The method. See `dsb_jax.methods.base.Method` for the methods.

    Attributes:
      backward_factor: (Nd + M) / Nd, weights that have a gradient over those that the layer computes with, >= 1. With
        2 and a sparsity of 0.9 it is 0.8 in the backward pass.
      exploration: lambda, the weight decay of the active weights, which the optimizer applies to all that are stored;
        the others get lambda * (1 / d - 1) beside it.
      update_interval, update_start_step, update_end_step: see `dsb_jax.methods.schedule.Scheduled`.

    Raises:
      ValueError: if a setting is invalid.
    """

    backward_factor: float = 2.0
    exploration: float = 0.0
    update_interval: int = 100
    update_start_step: int = 0
    update_end_step: int | None = None

    name: ClassVar[str] = "topkast"
    storage: ClassVar[str] = "backward_set"

    def __post_init__(self) -> None:
        schedule.check_schedule(self)
        schedule.check_number(
            "backward_factor", self.backward_factor, 1, 1e6, hint="the backward set holds the forward set"
        )
        schedule.check_number("exploration", self.exploration, 0, 1e6, hint="it is a weight decay, such as 1e-4")
        for name in ("backward_factor", "exploration"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def statistic(self) -> None:
        return None

    def stored(self, spec: LayerSpec) -> LayerSpec:
        count = round(min(self.backward_factor * spec.num_active, spec.size))
        return spec.with_single(count, num_computed=spec.num_active)

    def due(self, step: int) -> bool:
        return schedule.is_due(self, step)

    def _penalty(self, spec: LayerSpec) -> float:
        return self.exploration * (spec.size / spec.num_active - 1)  # the optimizer's weight decay is the 1

    def init(
        self,
        key: jax.Array,
        weights: Float[Array, "out in"],
        spec: LayerSpec,
        *,
        score: Float[Array, "out in"] | None = None,
    ) -> LayerState:
        """Magnitudes decide on the first sets, so nothing is drawn and weights are as they are, scored or not."""
        weights, score = check_init(self.name, self.storage, weights, score, spec)
        return _split(
            weights,
            jnp.abs(weights) if score is None else score,
            num_stored=spec.num_blocks,
            num_active=spec.num_active,
            penalty=self._penalty(spec),
        )

    def update(
        self, key: jax.Array, step: jax.Array | int, state: LayerState, statistic: Any
    ) -> tuple[LayerState, LayerReport]:
        state = jax.tree.map(jnp.asarray, state)
        layout, aux = state.layout, state.aux
        num_active = aux.forward_mask.sum(dtype=jnp.int32)
        weights = join(state)
        new = _split(
            weights, jnp.abs(weights), num_stored=layout.num_blocks, num_active=num_active, penalty=aux.penalty
        )
        before, now = (unpack(s.aux.forward_mask.astype(jnp.float32), s.layout) > 0 for s in (state, new))
        entered = (now & ~before).sum(dtype=jnp.int32)
        report = LayerReport(
            requested=entered,
            accepted=entered,
            turnover=entered.astype(jnp.float32) / num_active.astype(jnp.float32),
            collateral=jnp.zeros((), jnp.float32),
            empty_groups=count_empty_groups(new),
        )
        return identity_outside(self, step, state, new, report)

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        """All weights are joined and split anew, so that what comes in has its value of before."""
        check_resize(self.name, self.storage, state.layout, spec)
        weights = join(jax.tree.map(jnp.asarray, state))
        return _split(
            weights,
            jnp.abs(weights),
            num_stored=spec.num_blocks,
            num_active=spec.num_active,
            penalty=self._penalty(spec),
        )
