"""DSB: dynamic sparse training with shuffled blocks.

Jiang, Hu, Song, "Exposing and Exploiting Fine-Grained Block Structures for Fast and Accurate Sparse Training",
NeurIPS 2022, section 4. `granularity="block"` is the paper's adaptation (`dsb_jax.methods.dsb_reblocking`): drop single
weights by magnitude and the block-aware rule, grow as many, block the whole layer anew. The default,
`granularity="panel_column"`, is this library's (`dsb_jax.methods.dsb_panel_columns`); experiments/RESULTS.md compares
the two.

Deviations from the authors' public code, all deliberate: weights that leave are forgotten (nothing comes back to life
when a block moves), linear layers are blocked too, the block-wise criterion `norm` is the one the paper describes, in
whole row groups of the current layout, and a dropped position may not be grown again in the same adaptation.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsb_jax.methods import schedule
from dsb_jax.methods.base import LayerReport, LayerState
from dsb_jax.methods.blocks import check_columns, init_blocks, resize_blocks
from dsb_jax.methods.dsb_growth import GROW, STATISTICS
from dsb_jax.methods.dsb_panel_columns import adapt_panel_columns
from dsb_jax.methods.dsb_reblocking import adapt_blocks, either
from dsb_jax.methods.identity import identity_outside
from dsb_jax.methods.sizes import check_init, check_resize, check_storage
from dsb_jax.ops.statistics import Statistic
from dsb_jax.spec import LayerSpec

GRANULARITIES = ("block", "panel_column")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSB:
    """The method. See `dsb_jax.methods.base.Method` for the methods.

    Attributes:
      drop_fraction, update_interval, update_start_step, update_end_step, anneal_steps: see
        `dsb_jax.methods.schedule.Annealed`.
      grow: growth criterion, one of `GROW`.
      granularity: "panel_column", or "block", the paper's.
      block_aware_drop: the paper's rule; False for the ablation of its Figures 14 and 15. For "block" only.
      min_group_blocks: blocks that every row group keeps, or as many as a layer has for each; 0 is the paper's rule,
        under which outputs can die.
      growth_score: score of a grown position in units of the mean of the kept |w|; 1 is the paper's. Below 1, growth
        displaces only blocks that are worth less, so that fewer kept weights are lost to it. For "block" only.
      regroup_interval: steps; rows may change groups at adaptations whose step is a multiple of it, 0 for never. None
        is 1 for "block", as in the paper, and 0 for "panel_column", of which such an adaptation is one of "block".
      columns: how the first layout is drawn: "dealt" so that every input channel, and then every column, is read as
        often as any other; "random" for each row group on its own.
      keep_grouping: where rows may change groups, whether the groups of before stay unless the new ones retain more of
        the score; False is the paper's way, under which more is grown and more is displaced.

    Raises:
      ValueError: if a setting is invalid, or has no effect.
    """

    drop_fraction: float = 0.3
    update_interval: int = 100
    update_start_step: int = 0
    update_end_step: int | None = None
    anneal_steps: int | None = None
    grow: str = "block_gradient"
    granularity: str = "panel_column"
    block_aware_drop: bool = True
    min_group_blocks: int = 1
    growth_score: float = 1.0
    regroup_interval: int | None = None
    keep_grouping: bool = True
    columns: str = "dealt"

    name: ClassVar[str] = "dsb"
    storage: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        schedule.check_annealing(self)
        for name, known in (("grow", GROW), ("granularity", GRANULARITIES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
        check_columns(self.columns)
        for name in ("block_aware_drop", "keep_grouping"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} is neither True nor False.")
        schedule.check_steps("min_group_blocks", self.min_group_blocks, least=0)
        schedule.check_number(
            "growth_score", self.growth_score, 1e-6, 1e6, hint="1 is the paper's, below 1 growth is meeker"
        )
        if self.regroup_interval is not None:
            schedule.check_steps("regroup_interval", self.regroup_interval, least=0)
        for name in ("drop_fraction", "growth_score"):
            object.__setattr__(self, name, float(getattr(self, name)))
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        if self.granularity == "panel_column" and not self.regroup_interval:
            for name, default in (("block_aware_drop", True), ("growth_score", 1.0)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name}={value} has no effect on granularity=panel_column; add granularity=block."
                    )
        if not self.keep_grouping and not self._regroup_interval:
            raise ValueError(
                f"keep_grouping=False has no effect with granularity={self.granularity}, "
                f"regroup_interval={self.regroup_interval}, where rows never change groups; add granularity=block."
            )

    @classmethod
    def paper(cls, **changes: Any) -> "DSB":
        """The authors' method and the schedule of their CIFAR runs, as near as this library comes to their simulation.

        Single weights are dropped by the block-aware rule, blocks are grown by the norms of outputs and inputs, the
        layer is blocked anew without regard to the groups of before, and outputs may be left without weights; the
        drop fraction is annealed over 75,000 steps and adapting stops at 37,500 of 62,560 (`schedule.AUTHORS`).

        Args:
          **changes: other values of fields, such as the steps of another schedule.
        """
        paper: dict[str, Any] = {
            **schedule.AUTHORS,
            "granularity": "block",
            "grow": "norm",
            "min_group_blocks": 0,
            "keep_grouping": False,
            "columns": "random",
        }
        return cls(**{**paper, **changes})

    @classmethod
    def for_adam(cls, **changes: Any) -> "DSB":
        """The defaults for optimizers that normalize gradients, such as Adam: growth is random.

        A large gradient is no sign of a useful weight there. In a language model it is level with static blocks at 0.9
        and worse at 0.97: `Static()` is the choice unless something else speaks for adapting (experiments/RESULTS.md).

        Args:
          **changes: other values of fields.
        """
        return cls(**{"grow": "random", **changes})

    @property
    def _regroup_interval(self) -> int:
        if self.regroup_interval is None:
            return 1 if self.granularity == "block" else 0
        return self.regroup_interval

    @property
    def statistic(self) -> Statistic | None:
        return STATISTICS[self.grow]

    def stored(self, spec: LayerSpec) -> LayerSpec:
        check_storage(self.name, self.storage, spec)
        return spec

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
        weights, score = check_init(self.name, self.storage, weights, score, spec)
        return init_blocks(
            key, weights, spec, score=score, min_group_blocks=self.min_group_blocks, columns=self.columns
        )

    def update(
        self, key: jax.Array, step: jax.Array | int, state: LayerState, statistic: Any
    ) -> tuple[LayerState, LayerReport]:
        state, statistic, step = jax.tree.map(jnp.asarray, (state, statistic, step))
        fraction = schedule.drop_fraction(self, step)
        interval = self._regroup_interval
        regroup = step % interval == 0 if interval > 1 else interval == 1

        def by_blocks(regroup: bool | jax.Array) -> tuple[LayerState, LayerReport]:
            return adapt_blocks(
                key,
                fraction,
                state,
                statistic,
                grow=self.grow,
                block_aware_drop=self.block_aware_drop,
                growth_score=self.growth_score,
                min_group_blocks=self.min_group_blocks,
                keep_grouping=self.keep_grouping,
                regroup=regroup,
            )

        def by_panel_columns() -> tuple[LayerState, LayerReport]:
            return adapt_panel_columns(
                key, fraction, state, statistic, grow=self.grow, min_group_blocks=self.min_group_blocks
            )

        if self.granularity == "block":
            new, report = by_blocks(regroup)
        else:
            new, report = either(regroup, lambda: by_blocks(True), by_panel_columns)
        return identity_outside(self, step, state, new, report)

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        check_resize(self.name, self.storage, state.layout, spec)
        return resize_blocks(key, jax.tree.map(jnp.asarray, state), spec, min_group_blocks=self.min_group_blocks)
