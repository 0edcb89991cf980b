"""The update that changes nothing, which every update is outside of its schedule."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsb_jax.layout import block_group
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.schedule import Scheduled, is_within


def count_empty_groups(state: LayerState) -> Int[Array, ""]:
    """Row groups without any weight that the layer computes with."""
    layout, aux = state.layout, state.aux
    counts = jnp.diff(layout.group_start)
    if aux is not None:
        active = jnp.any(aux.active, axis=(1, 2)).astype(jnp.int32)
        counts = jnp.zeros(layout.num_groups, jnp.int32).at[block_group(layout)].add(active)
    return (counts == 0).sum(dtype=jnp.int32)


def identity(state: LayerState) -> tuple[LayerState, LayerReport]:
    """The state as it is, and a report of no change."""
    none, share = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    report = LayerReport(
        requested=none, accepted=none, turnover=share, collateral=share, empty_groups=count_empty_groups(state)
    )
    return state, report


def identity_outside(
    method: Scheduled, step: jax.Array | int, state: LayerState, new: LayerState, report: LayerReport
) -> tuple[LayerState, LayerReport]:
    """The new state and its report at a step within the schedule, `identity(state)` at any other; dtypes of `state`."""
    within = is_within(method, step)
    return jax.tree.map(
        lambda changed, same: jnp.where(within, changed.astype(same.dtype), same), (new, report), identity(state)
    )
