"""The config of a run: everything that determines it, as plain values; `dsb_jax.training.build` makes objects of it.

A config goes to JSON and back without loss, so that a checkpoint can hold the one it was made by.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from dsb_jax import methods
from dsb_jax.block_shapes import AUTO, BlockShape
from dsb_jax.filling import FILLS
from dsb_jax.methods import schedule
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.plan import MIN_BLOCKS, MIN_GROUP_BLOCKS

DENSE_METHODS = ("dense", "small_dense")  # no methods of a layer, but models without sparse layers
METHODS = (*methods.METHODS, *DENSE_METHODS)
OPTIMIZERS = ("sgd", "adamw")
LEARNING_RATE_SCHEDULES = ("cosine", "step", "rigl_step", "constant")
DTYPES = ("float32", "bfloat16")
KEEP_DENSE = ("stem", "head")  # the first convolution and the classifier of our models
LEAST_ADAPTATIONS = 6  # of a short run: more gain nothing, in 300 steps or 1,200 (experiments/RESULTS.md)

# Published protocols for WRN-22-2 on CIFAR, by name; steps scale with the length of a run.
_AUTHORS_STEPS = 62_560  # 160 epochs
PROTOCOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Jiang, Hu, Song, NeurIPS 2022, and the authors' code: the drop fraction is annealed over more steps than the
        # training has, and half of it is left where adapting stops.
        "authors": {
            "model": "wrn-22-2",
            "dropout_rate": 0.3,
            "distribution": "erk",
            "epochs": 160,
            "batch_size": 128,
            "learning_rate": 0.1,
            "learning_rate_schedule": "step",
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "drop_fraction": schedule.AUTHORS["drop_fraction"],
            "update_interval": schedule.AUTHORS["update_interval"],
            "update_end_fraction": schedule.AUTHORS["update_end_step"] / _AUTHORS_STEPS,
            "anneal_fraction": schedule.AUTHORS["anneal_steps"] / _AUTHORS_STEPS,
        },
        # Evci et al., ICML 2020, section 4.2 and appendix: Nesterov, weight decay on kernels alone.
        "rigl": {
            "model": "wrn-22-2",
            "distribution": "erk",
            "epochs": 250,
            "batch_size": 128,
            "learning_rate": 0.1,
            "learning_rate_schedule": "rigl_step",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "decay_kernels_only": True,
            "drop_fraction": 0.3,
            "update_interval": 100,
            "update_end_fraction": 0.75,
        },
    }
)

# Fields added after the first release of checkpoints, and what was done before there was a choice.
_YOUNGER: Mapping[str, Any] = MappingProxyType(
    {
        "backward_factor": 2.0,
        "growth_score": 1.0,
        "regroup_interval": None,
        "anneal_fraction": None,
        "keep_grouping": True,
        "feature_major": None,
        "steps": None,
        "warmup_fraction": 0.0,
        "nesterov": False,
        "decay_kernels_only": False,
        "fill": "zero",
        "columns": "random",
        "initial_density": None,
        "density_stages": 5,
        "density_end_fraction": 0.5,
    }
)
_OLD_NAMES = {"image_shape": "input_shape"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that determine a run. Defaults are those of `make train`: digits, DSB, 90 % sparse.

    `PROTOCOLS` has the values of published ones.

    Attributes:
      input_shape, num_classes: of the data, (H, W, C) or of text (T,); filled in from the data set.
      method: one of `METHODS`; "dense" and "small_dense" (as many weights as the sparse model stores, by a smaller
        width) have no sparse layers.
      update_end_fraction: where adapting ends, as a fraction of all training steps.
      anneal_fraction: where the drop fraction is 0, as a fraction of all training steps, which may be above 1; None
        for where adapting ends.
      backward_factor: of Top-KAST, weights that have a gradient over active ones.
      adapt_batch_size: examples of the batch that an adaptation measures its statistics on; None for all of them.
      keep_dense: patterns as in a shell; a layer whose path, or one part of it, matches stays dense.
      min_group_blocks: blocks that every row group has, in the plan and, with DSB, after every adaptation; 0 is the
        paper's rule, under which outputs can be without weights.
      grow: growth criterion of DSB; the programs take that of `DSB.for_adam()` where the optimizer is AdamW.
      columns: how first layouts are drawn, see `dsb_jax.methods.DSB`.
      keep_grouping: of DSB where rows change groups, see `dsb_jax.methods.DSB`.
      fill: what the second moments of newly active weights begin with, "group_mean" or "zero"; None for the default of
        `dsb_jax.adaptation`.
      initial_density: at step 0, over the layers that `sparsity` counts over, from which the density falls to the
        target, see `dsb_jax.GradualDensity`; None for the target from the first step to the last.
      density_stages: before the target is reached; each compiles the steps once.
      density_end_fraction: where it is reached, as a fraction of all training steps, in (0, 1).
      steps: training steps of the whole run, instead of `epochs`; None for whole epochs.
      total_steps: training steps of the whole run; filled in from the data set.
      learning_rate_schedule: "cosine" to zero, "step" (times 0.1 at 50 % and 75 %), "rigl_step" (times 0.2 after every
        30,000 of 97,656 steps), or "constant".
      warmup_fraction: of all steps, in which the learning rate rises from 0 in proportion.
      nesterov: of SGD.
      decay_kernels_only: whether weight decay spares biases, normalization and embeddings.
      feature_major: whether hidden activations are [C, H, W, N]; None until it is decided, by the cost model, when the
        run begins.
    """

    dataset: str = "digits"
    input_shape: tuple[int, ...] = (8, 8, 1)
    num_classes: int = 10
    model: str = "convnet"
    method: str = "dsb"
    sparsity: float = 0.9
    distribution: str = "uniform"
    block_shape: BlockShape = AUTO
    keep_dense: tuple[str, ...] = KEEP_DENSE
    min_blocks: int = MIN_BLOCKS
    grow: str = "block_gradient"
    granularity: str = "panel_column"
    block_aware_drop: bool = True
    min_group_blocks: int = MIN_GROUP_BLOCKS
    growth_score: float = 1.0
    regroup_interval: int | None = None
    keep_grouping: bool = True
    columns: str = "dealt"
    drop_fraction: float = 0.3
    update_interval: int = 40
    update_end_fraction: float = 0.75
    anneal_fraction: float | None = None
    backward_factor: float = 2.0
    adapt_batch_size: int | None = None
    fill: str | None = None
    initial_density: float | None = None
    density_stages: int = 5
    density_end_fraction: float = 0.5
    epochs: int = 24
    steps: int | None = None
    total_steps: int = 1056
    batch_size: int = 32
    learning_rate: float = 0.05
    learning_rate_schedule: str = "cosine"
    warmup_fraction: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_kernels_only: bool = False
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

    def with_adaptations(self, least: int = LEAST_ADAPTATIONS) -> "Config":
        """The same with a shorter `update_interval`, if it is so long that there would be fewer adaptations."""
        return dataclasses.replace(
            self, update_interval=max(1, min(self.update_interval, self.update_end_step // least))
        )

    def abstract_inputs(self, batch_size: int | None = None) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what the model takes: float images, int32 characters."""
        dtype = jnp.int32 if len(self.input_shape) == 1 else jnp.float32
        return jax.ShapeDtypeStruct((batch_size or self.batch_size, *self.input_shape), dtype)

    def to_json(self) -> dict[str, Any]:
        """Plain values: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_json`. Fields that are younger than the JSON say what was done then.

        Raises:
          ValueError: if a name is unknown, or one is missing that always was there.
        """
        values = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
        names = {field.name for field in dataclasses.fields(cls)}
        values = {**_YOUNGER, **values}
        if odd := sorted(set(values) ^ names):
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
    if not isinstance(config.block_shape, str) and min(config.block_shape) < 1:
        raise ValueError(f"block_shape={config.block_shape} has a side below 1; give positive sizes such as 16x16.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} is not in [0, 2**32).")
    for name, low, high in (
        ("sparsity", 0.0, 1.0),
        ("drop_fraction", 0.0, 1.0),
        ("update_end_fraction", 0.0, 1.0),
        ("weight_decay", 0.0, math.inf),
        ("warmup_fraction", 0.0, 1.0),
        ("dropout_rate", 0.0, 1.0),
        ("label_smoothing", 0.0, 1.0),
        ("momentum", 0.0, 1.0),
    ):
        value = getattr(config, name)
        open_end = name not in ("drop_fraction", "update_end_fraction")
        if not (low <= value < high or (value == high and not open_end)):
            raise ValueError(f"{name}={value} is not in [{low:g}, {high:g}{')' if open_end else ']'}.")
    for name in ("update_interval", "epochs", "total_steps", "batch_size", "learning_rate"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not a positive number.")
    for name, otherwise in (("steps", "whole epochs"), ("adapt_batch_size", "whole batches")):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} is not a positive number; leave it out for {otherwise}.")
    _check_density(config)
    if config.fill is not None and config.fill not in FILLS:
        raise ValueError(f"fill={config.fill!r} is unknown; choose one of {', '.join(FILLS)}.")
    if config.nesterov and not config.momentum:
        raise ValueError("nesterov=True has no effect with momentum=0; give a momentum such as 0.9.")
    if config.anneal_fraction is not None and not 0 < config.anneal_fraction < math.inf:
        raise ValueError(
            f"anneal_fraction={config.anneal_fraction} is not a positive number; 1 is all of the training."
        )


def _check_density(config: Config) -> None:
    """What can be said of the stages of density without the plan and the number of steps."""
    if config.initial_density is None:
        for name in ("density_stages", "density_end_fraction"):
            if (value := getattr(config, name)) != getattr(Config, name):
                raise ValueError(f"{name}={value} has no effect without an initial_density; give one, such as 0.4.")
        return
    if config.method in DENSE_METHODS:
        raise ValueError(
            f"initial_density={config.initial_density} has no effect on method={config.method}, which has no sparse "
            "layers; leave it out."
        )
    if not 1 - config.sparsity <= config.initial_density <= 1:
        raise ValueError(
            f"initial_density={config.initial_density} is not in [{1 - config.sparsity:g}, 1]: it falls to "
            f"{1 - config.sparsity:g}, the density of sparsity={config.sparsity:g}."
        )
    if config.density_stages < 1:
        raise ValueError(f"density_stages={config.density_stages} is not a positive number; give such as 5.")
    if not 0 < config.density_end_fraction < 1:
        raise ValueError(
            f"density_end_fraction={config.density_end_fraction} is not in (0, 1); the target is reached before the "
            "training ends."
        )
