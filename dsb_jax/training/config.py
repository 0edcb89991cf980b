"""The config of a run: everything that determines it, as plain values; `dsb_jax.training.build` makes objects of it.

A config goes to JSON and back without loss, so that a checkpoint can hold the one it was made by.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dsb_jax import methods
from dsb_jax.methods import schedule
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.plan import MIN_BLOCKS, MIN_GROUP_BLOCKS

DENSE_METHODS = ("dense", "small_dense")  # no methods of a layer, but models without sparse layers
METHODS = (*methods.METHODS, *DENSE_METHODS)
OPTIMIZERS = ("sgd", "adamw")
LEARNING_RATE_SCHEDULES = ("cosine", "step", "constant")
DTYPES = ("float32", "bfloat16")
KEEP_DENSE = ("stem", "head")  # the first convolution and the classifier of our models

# Fields by the name of a schedule of the drop fraction. The authors' own, scaled from their 62,560 steps to any number:
# it ends while half of the drop fraction is left.
DROP_SCHEDULES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "authors": {
            "drop_fraction": schedule.AUTHORS["drop_fraction"],
            "update_interval": schedule.AUTHORS["update_interval"],
            "update_end_fraction": schedule.AUTHORS["update_end_step"] / 62_560,
            "anneal_fraction": schedule.AUTHORS["anneal_steps"] / 62_560,
        }
    }
)

# Fields added after the first release of checkpoints. Their defaults must stay what was done before there was a choice.
_YOUNGER = (
    "backward_factor",
    "growth_score",
    "regroup_interval",
    "anneal_fraction",
    "keep_grouping",
    "feature_major",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that determine a run. Defaults are those of `make train`: digits, DSB, 90 % sparse.

    The paper's CIFAR protocol (160 epochs, WRN-22-2): optimizer sgd, momentum 0.9, weight_decay 1e-4, batch_size
    128, learning_rate 0.1, learning_rate_schedule step, distribution erk, update_interval 100, drop_fraction 0.3,
    update_end_fraction 0.5, dropout_rate 0.3, block_shape 16x16.

    Attributes:
      image_shape, num_classes: of the data; filled in from the data set.
      method: one of `METHODS`; "dense" and "small_dense" (as many weights as the sparse model stores, by a smaller
        width) have no sparse layers.
      update_end_fraction: where adapting ends, as a fraction of all training steps.
      anneal_fraction: where the drop fraction is 0, as a fraction of all training steps, which may be above 1; None
        for where adapting ends.
      backward_factor: of Top-KAST, weights that have a gradient over active ones.
      adapt_batch_size: images of the batch that an adaptation measures its statistics on, at most.
      keep_dense: patterns as in a shell; a layer whose path, or one part of it, matches stays dense.
      min_group_blocks: blocks that every row group has, in the plan and, with DSB, after every adaptation; 0 is the
        paper's rule, under which outputs can be without weights.
      keep_grouping: of DSB where rows change groups, see `dsb_jax.methods.DSB`.
      learning_rate_schedule: "cosine" to zero, "step" (times 0.1 at 50 % and 75 %), or "constant".
      total_steps: training steps of the whole run.
      feature_major: whether hidden activations are [C, H, W, N]; None until it is decided, by the cost model, when the
        run begins.
    """

    dataset: str = "digits"
    image_shape: tuple[int, int, int] = (8, 8, 1)
    num_classes: int = 10
    model: str = "convnet"
    method: str = "dsb"
    sparsity: float = 0.9
    distribution: str = "uniform"
    block_shape: tuple[int, int] = (16, 16)
    keep_dense: tuple[str, ...] = KEEP_DENSE
    min_blocks: int = MIN_BLOCKS
    grow: str = "block_gradient"
    granularity: str = "panel_column"
    block_aware_drop: bool = True
    min_group_blocks: int = MIN_GROUP_BLOCKS
    growth_score: float = 1.0
    regroup_interval: int | None = None
    keep_grouping: bool = True
    drop_fraction: float = 0.3
    update_interval: int = 40
    update_end_fraction: float = 0.75
    anneal_fraction: float | None = None
    backward_factor: float = 2.0
    adapt_batch_size: int = 32
    epochs: int = 24
    total_steps: int = 1056
    batch_size: int = 32
    learning_rate: float = 0.05
    learning_rate_schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    label_smoothing: float = 0.0
    dropout_rate: float = 0.0
    dtype: str = "float32"
    seed: int = 0
    implementation: str = "auto"
    feature_major: bool | None = None

    @property
    def exploration(self) -> float:
        """Of Top-KAST: the weight decay, from which its exploration regularizer follows."""
        return self.weight_decay

    @property
    def update_end_step(self) -> int:
        """The first step without adaptation, at least 1; nothing is adapted before step 1."""
        return max(round(self.update_end_fraction * self.total_steps), 1)

    @property
    def anneal_steps(self) -> int | None:
        """The step at which the drop fraction is 0; None for where adapting ends."""
        return None if self.anneal_fraction is None else max(round(self.anneal_fraction * self.total_steps), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_json`. Fields that are younger than the JSON have their defaults, as it was then.

        Raises:
          ValueError: if a name is unknown, or one is missing that always was there.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if odd := sorted((set(values) ^ names) - (set(_YOUNGER) - set(values))):
            raise ValueError(f"the config has unknown or missing fields {odd}; it was made by another version.")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


def check_config(config: Config) -> None:
    """Raises ValueError for the first invalid value; what only a method or a model knows is for them to check."""
    for name, value, known in (
        ("method", config.method, METHODS),
        ("optimizer", config.optimizer, OPTIMIZERS),
        ("learning_rate_schedule", config.learning_rate_schedule, LEARNING_RATE_SCHEDULES),
        ("dtype", config.dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    check_implementation(config.implementation)
    if min(config.block_shape) < 1:
        raise ValueError(f"block_shape={config.block_shape} has a side below 1; give positive sizes such as 16x16.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} is not in [0, 2**32).")
    for name, low, high in (
        ("sparsity", 0.0, 1.0),
        ("drop_fraction", 0.0, 1.0),
        ("update_end_fraction", 0.0, 1.0),
        ("weight_decay", 0.0, math.inf),
        ("dropout_rate", 0.0, 1.0),
        ("label_smoothing", 0.0, 1.0),
        ("momentum", 0.0, 1.0),
    ):
        value = getattr(config, name)
        open_end = name not in ("drop_fraction", "update_end_fraction")
        if not (low <= value < high or (value == high and not open_end)):
            raise ValueError(f"{name}={value} is not in [{low:g}, {high:g}{')' if open_end else ']'}.")
    for name in ("update_interval", "epochs", "total_steps", "batch_size", "adapt_batch_size", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not a positive number.")
    if config.anneal_fraction is not None and not 0 < config.anneal_fraction < math.inf:
        raise ValueError(
            f"anneal_fraction={config.anneal_fraction} is not a positive number; 1 is all of the training."
        )
