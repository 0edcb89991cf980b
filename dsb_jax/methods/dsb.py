"""DSB: dynamic sparse training with shuffled blocks.

Jiang, Hu, Song, "Exposing and Exploiting Fine-Grained Block Structures for Fast and Accurate Sparse Training",
NeurIPS 2022, section 4. One adaptation of one layer at step t:

    k       = round(alpha / 2 * (1 + cos(pi * t / T_end)) * num_active)
    marked  = the k active weights of smallest magnitude
    dropped = the marks that can free structure (block-aware rule), or all of them
    grown   = as many inactive positions, chosen by `grow`
    score   = |w| where kept, the mean of the kept |w| where grown, 0 elsewhere
    layout  = reblock(score), exactly num_blocks blocks

Deviations from the authors' public code, all deliberate: weights that leave are forgotten (nothing comes back to life
when a block moves), linear layers are blocked too, the block-wise criterion `norm` is the one the paper describes,
and a dropped position may not be grown again in the same adaptation. `norm` takes outputs in whole row groups of
the current layout, by the norm over the group: a strip of the R strongest outputs, as the paper words it, cuts
across the groups, and re-blocking accepts none of it (digits, 0.9: 0 %). The literal form is `norm_unaligned`.

That is `granularity="block"`. The default, `granularity="panel_column"`, is a variant of this library's: the unit that
is dropped and grown is one column of one panel (R weights), row groups stay as they are, and no kept weight is ever
displaced, so collateral is zero. experiments/RESULTS.md compares the two.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsb_jax.drop import block_aware_drop as keep_structural_drops
from dsb_jax.drop import magnitude_drop
from dsb_jax.grow import grow_block_gradient, grow_gradient, grow_norm, grow_random
from dsb_jax.layout import BlockLayout, block_group, pack, random_layout, real_rows, unpack
from dsb_jax.methods.base import LayerReport, Method
from dsb_jax.methods.schedule import drop_fraction
from dsb_jax.ops.statistics import Probe
from dsb_jax.reblocking import cut_columns, most_group_blocks, reblock
from dsb_jax.select import select_smallest

GROW = ("norm", "norm_unaligned", "block_gradient", "gradient", "random")
GRANULARITIES = ("block", "panel_column")

# Among magnitudes, which are not negative: positions without a kept weight.
_DROPPED, _INACTIVE, _GROWN = -1.0, -2.0, -3.0


def dsb(
    *,
    update_end_step: int,
    alpha: float = 0.3,
    grow: str = "block_gradient",
    block_aware_drop: bool = True,
    granularity: str = "panel_column",
    min_group_blocks: int = 1,
    growth_score: float = 1.0,
    regroup_interval: int | None = None,
) -> Method:
    """Builds the method.

    Args:
      update_end_step: T_end of the cosine schedule, in steps.
      alpha: drop fraction at step 0, in [0, 1].
      grow: growth criterion, one of `GROW`.
      block_aware_drop: the paper's rule; False for the ablation of its Figures 14 and 15. For "block" only.
      granularity: "panel_column", or "block", the paper's.
      min_group_blocks: blocks that every row group keeps, or as many as a layer has for each; 0 is the paper's rule,
        under which outputs can die.
      growth_score: score of a grown position in units of the mean of the kept |w|; 1 is the paper's. Below 1, growth
        displaces only blocks that are worth less, so that fewer kept weights are lost to it. For "block" only.
      regroup_interval: steps; rows may change groups at adaptations whose step is a multiple of it, 0 for never. None
        is 1 for "block", as in the paper, and 0 for "panel_column", of which such an adaptation is one of "block".

    Raises:
      ValueError: if a name is unknown or a number out of range.
    """
    if grow not in GROW:
        raise ValueError(f"grow={grow!r} is unknown; choose one of {', '.join(GROW)}.")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is unknown; choose one of {', '.join(GRANULARITIES)}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"drop_fraction={alpha} is not in [0, 1]; the paper uses 0.3.")
    if min_group_blocks < 0:
        raise ValueError(f"min_group_blocks={min_group_blocks} is negative; give 0 or more.")
    if not 0 < growth_score < float("inf"):
        raise ValueError(f"growth_score={growth_score} is not positive; 1 is the paper's, below 1 growth is meeker.")
    if regroup_interval is not None and regroup_interval < 0:
        raise ValueError(f"regroup_interval={regroup_interval} is negative; give steps, or 0 for never.")
    if granularity == "panel_column" and not regroup_interval:
        for name, value, default in (("block_aware_drop", block_aware_drop, True), ("growth_score", growth_score, 1.0)):
            if value != default:
                raise ValueError(f"{name}={value} has no effect on granularity=panel_column; add granularity=block.")

    def sizes(layout: BlockLayout) -> dict[str, Any]:
        """What re-blocking keeps of a layout."""
        most = most_group_blocks(layout.shape, layout.block_shape, layout.num_blocks)
        return {
            "block_shape": layout.block_shape,
            "num_blocks": layout.num_blocks,
            "min_group_blocks": min(min_group_blocks, most),
        }

    def update_blocks(
        key: jax.Array,
        step: jax.Array,
        blocks: jax.Array,
        layout: BlockLayout,
        statistic: Probe,
        regroup: bool | jax.Array,
    ) -> tuple[BlockLayout, LayerReport]:
        fraction = drop_fraction(step, alpha=alpha, update_end_step=update_end_step)
        real = real_rows(layout)
        marked = magnitude_drop(blocks, jnp.round(fraction * layout.num_active).astype(jnp.int32), real=real)
        dropped = keep_structural_drops(marked) if block_aware_drop else marked
        requested = dropped.sum(dtype=jnp.int32)
        kept = real & ~dropped
        num_kept = kept.sum(dtype=jnp.int32)
        magnitude = jnp.where(kept, jnp.abs(blocks), 0)
        mean = magnitude.sum() / jnp.maximum(num_kept, 1)
        # One dense matrix tells all: what is kept (its magnitude), was dropped, or is not active.
        before = unpack(jnp.where(kept, magnitude, _DROPPED), layout, fill=_INACTIVE)
        grown = _grown_positions(grow, key, statistic, requested, before == _INACTIVE, layout)
        score = jnp.where(grown, growth_score * mean, jnp.maximum(before, 0))
        new = _either(
            regroup,
            lambda: reblock(score, previous=layout, **sizes(layout)),
            lambda: cut_columns(_group_sums(score, layout), layout.out_idx, shape=layout.shape, **sizes(layout)),
        )
        # What the active weights of the new layout were before.
        were = jnp.where(real_rows(new), pack(jnp.where(grown, _GROWN, before), new), _DROPPED)
        still_kept = (~(were < 0)).sum(dtype=jnp.int32)  # a NaN is kept, too
        report = LayerReport(
            requested=requested,
            accepted=(were == _GROWN).sum(dtype=jnp.int32),
            turnover=(were <= _INACTIVE).sum(dtype=jnp.int32) / layout.num_active,
            collateral=(num_kept - still_kept) / jnp.maximum(num_kept, 1),
            empty_groups=_empty_groups(new),
        )
        return new, report

    def update_panel_columns(
        key: jax.Array, step: jax.Array, blocks: jax.Array, layout: BlockLayout, statistic: Probe
    ) -> tuple[BlockLayout, LayerReport]:
        num_blocks, _, cols = blocks.shape
        fraction = drop_fraction(step, alpha=alpha, update_end_step=update_end_step)
        count = jnp.round(fraction * (num_blocks * cols)).astype(jnp.int32)
        real = real_rows(layout)
        # Mean square over the real rows: the columns of a ragged group are not weaker for being shorter.
        strength = jnp.square(jnp.where(real, blocks, 0)).sum(axis=1) / jnp.maximum(real.sum(axis=1), 1)
        dropped = select_smallest(strength, count, where=jnp.ones(strength.shape, jnp.bool_))
        at = block_group(layout)[:, None], layout.in_idx
        shape = (layout.num_groups, layout.shape[1])
        active = jnp.zeros(shape, jnp.bool_).at[at].set(True)
        kept = jnp.zeros(shape, jnp.bool_).at[at].set(~dropped)
        growth = _panel_scores(grow, key, statistic, layout)
        growth = jnp.where(active, 0, growth / jnp.maximum(growth.max(), jnp.finfo(jnp.float32).tiny))
        # A run of C columns with a kept one outweighs any run without, so no kept column is ever left out.
        new = cut_columns(
            jnp.where(kept, cols + 1.0, growth),
            layout.out_idx,
            shape=layout.shape,
            **sizes(layout),
        )
        now = jnp.zeros(shape, jnp.bool_).at[block_group(new)[:, None], new.in_idx].set(True)
        weights = (layout.out_idx < layout.shape[0]).sum(axis=1, dtype=jnp.int32)[:, None]  # real ones in a column

        def count_weights(mask: jax.Array) -> jax.Array:
            return (mask * weights).sum(dtype=jnp.int32)

        grown = count_weights(now & ~active)
        return new, LayerReport(
            requested=count_weights(active & ~kept),
            accepted=grown,
            turnover=grown / layout.num_active,
            collateral=count_weights(kept & ~now) / jnp.maximum(count_weights(kept), 1),
            empty_groups=_empty_groups(new),
        )

    interval = {"block": 1, "panel_column": 0}[granularity] if regroup_interval is None else regroup_interval

    def update(
        key: jax.Array, step: jax.Array, blocks: jax.Array, layout: BlockLayout, statistic: Probe
    ) -> tuple[BlockLayout, LayerReport]:
        due = step % interval == 0 if interval > 1 else interval == 1
        if granularity == "block":
            return update_blocks(key, step, blocks, layout, statistic, due)
        return _either(
            due,
            lambda: update_blocks(key, step, blocks, layout, statistic, True),
            lambda: update_panel_columns(key, step, blocks, layout, statistic),
        )

    return Method(
        name="dsb",
        sparse=True,
        init=random_layout,
        update=update,
        statistic={"random": None, "norm_unaligned": "norm"}.get(grow, grow),
    )


def _grown_positions(
    grow: str, key: jax.Array, statistic: Probe, k: jax.Array, candidate: jax.Array, layout: BlockLayout
) -> jax.Array:
    """bool[out, in]: the k candidates to grow."""
    if grow in ("norm", "norm_unaligned"):
        dy_norm = statistic["dy_norm"]
        if grow == "norm":  # every row gets the norm of its group, so that the strips are whole groups
            by_group = jnp.broadcast_to(_group_norms(dy_norm, layout)[:, None], layout.out_idx.shape)
            dy_norm = jnp.zeros_like(dy_norm).at[layout.out_idx].set(by_group, mode="drop")
        return grow_norm(dy_norm, statistic["x_norm"], k, candidate=candidate, block_shape=layout.block_shape)
    if grow == "block_gradient":
        return grow_block_gradient(statistic["panel_norm"], k, candidate=candidate, out_idx=layout.out_idx)
    if grow == "gradient":
        return grow_gradient(statistic["gradient"], k, candidate=candidate)
    return grow_random(key, k, candidate=candidate, out_idx=layout.out_idx)


def _panel_scores(grow: str, key: jax.Array, statistic: Probe, layout: BlockLayout) -> jax.Array:
    """[num_groups, in]: the (bound on the) gradient norm of each panel column by the same criteria."""
    if grow in ("norm", "norm_unaligned"):
        return _group_norms(statistic["dy_norm"], layout)[:, None] * statistic["x_norm"][None]
    if grow == "block_gradient":
        return statistic["panel_norm"]
    if grow == "gradient":
        return _group_norms(statistic["gradient"], layout)
    return jax.random.uniform(key, (layout.num_groups, layout.shape[1]), minval=0.01)


def _either(condition: bool | jax.Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """`yes()` or `no()`, of which only one is compiled where the condition is known."""
    if isinstance(condition, bool):
        return yes() if condition else no()
    return jax.lax.cond(condition, yes, no)


def _group_sums(score: jax.Array, layout: BlockLayout) -> jax.Array:
    """[out, in] -> [num_groups, in]: the sum over the rows of each group."""
    return score.at[layout.out_idx].get(mode="fill", fill_value=0).sum(axis=1)


def _group_norms(rows: jax.Array, layout: BlockLayout) -> jax.Array:
    """[out, ...] -> [num_groups, ...]: the norm over the rows of each group."""
    rows = rows.at[layout.out_idx].get(mode="fill", fill_value=0)
    return jnp.sqrt(jnp.square(rows).sum(axis=1))


def _empty_groups(layout: BlockLayout) -> jax.Array:
    return (jnp.diff(layout.group_start) == 0).sum(dtype=jnp.int32)
