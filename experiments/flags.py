"""Flags that make a config, shared by the programs that train."""

import dataclasses
import functools
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from dsb_jax.block_shapes import AUTO, BlockShape
from dsb_jax.filling import FILLS
from dsb_jax.methods import COLUMNS, GRANULARITIES, GROW
from dsb_jax.ops import IMPLEMENTATIONS
from dsb_jax.plan import DISTRIBUTIONS, MIN_GROUP_BLOCKS
from dsb_jax.training.build import default_grow
from dsb_jax.training.config import (
    DTYPES,
    KEEP_DENSE,
    LEARNING_RATE_SCHEDULES,
    METHODS,
    OPTIMIZERS,
    PROTOCOLS,
    Config,
)
from dsb_jax.training.data import text
from dsb_jax.training.models import MODELS

FLAGS = flags.FLAGS

# What differs from the config's defaults for photographs: the authors' protocol without dropout, at uniform densities,
# and annealed to 0 where adapting stops.
PHOTOGRAPHS: dict[str, Any] = {
    "model": "wrn-22-2",
    "epochs": 160,
    "batch_size": 128,
    "learning_rate": 0.1,
    "learning_rate_schedule": "step",
    "update_interval": 100,
    "update_end_fraction": 0.5,
}
# For photographs averaged down, and for text: proxies that tell methods apart in seconds (experiments/RESULTS.md).
SMALL_PHOTOGRAPHS: dict[str, Any] = {
    "model": "narrow_convnet",
    "epochs": 3,
    "batch_size": 128,
    "learning_rate": 0.4,
    "update_interval": 150,
}
TEXT: dict[str, Any] = {
    "model": "transformer-2-128",
    "epochs": 1,
    "batch_size": 6,
    "optimizer": "adamw",
    "learning_rate": 0.012,
    "warmup_fraction": 0.05,
    "update_interval": 100,
}


def parse_block_shape(text: str, or_word: str = "") -> tuple[int, int]:
    """'32x8' -> (32, 8).

    Raises:
      ValueError: if the text is no such thing; `or_word` is what else could be given.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if not match:
        raise ValueError(f"block_shape={text!r} is not rows x columns; give {or_word}sizes such as 16x16 or 32x8.")
    return int(match[1]), int(match[2])


def parse_block_shape_or_auto(text: str) -> BlockShape:
    """The same, but 'auto' is itself."""
    return AUTO if text.strip() == AUTO else parse_block_shape(text, f"{AUTO} or ")


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """['0', '1'] -> [0, 1].

    Raises:
      ValueError: if one is no integer.
    """
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ValueError(f"seeds={','.join(texts)} are not all integers; give such as 0,1,2.") from None


def define() -> None:
    """Defines one flag for each field of the config that a user sets. Unset flags take the data set's default."""
    flags.DEFINE_string(
        "dataset", "digits",
        "digits or python_text (both bundled), any tfds image classification set such as cifar10, or cifar10@8x8.",
    )  # fmt: skip
    flags.DEFINE_string("data_dir", None, "Where tfds finds or prepares data sets.")
    flags.DEFINE_string("model", None, f"{', '.join(MODELS)}, such as wrn-22-2.")
    flags.DEFINE_enum("method", "dsb", METHODS, "How the topology is trained.")
    flags.DEFINE_float("sparsity", 0.9, "Fraction of zeros over the sparse layers, in [0, 1).")
    flags.DEFINE_enum("distribution", None, sorted(DISTRIBUTIONS), "Densities over the layers.")
    flags.DEFINE_string("block_shape", AUTO, "Rows x columns of a block: 16x16, 32x8, ...; auto chooses by the layer.")
    flags.DEFINE_list("keep_dense", list(KEEP_DENSE), "Patterns of layer paths that stay dense.")
    flags.DEFINE_enum("grow", None, GROW, "Growth criterion of dsb; by default that of the optimizer.")
    flags.DEFINE_enum("granularity", None, GRANULARITIES, "What dsb drops and grows.")
    flags.DEFINE_bool("block_aware_drop", True, "Drop only weights whose loss can free structure.")
    flags.DEFINE_integer(
        "min_group_blocks", MIN_GROUP_BLOCKS, "Blocks that every row group has, at first and after adapting."
    )
    flags.DEFINE_float("growth_score", 1.0, "Score of grown positions over the mean of the kept; 1 is the paper's.")
    flags.DEFINE_integer("regroup_interval", None, "Steps between regroupings of rows; 0 for never.")
    flags.DEFINE_enum("columns", None, COLUMNS, "How the columns of first layouts are drawn; dealt by default.")
    flags.DEFINE_bool("keep_grouping", True, "Whether groups stay unless new ones retain more; no is the paper's way.")
    flags.DEFINE_enum("protocol", None, sorted(PROTOCOLS), "Sets the flags of a published training; others stand.")
    flags.DEFINE_enum("fill", None, FILLS, "What second moments of new weights begin with.")
    flags.DEFINE_float("initial_density", None, "At step 0, falling to 1 - sparsity; by default constant.")
    flags.DEFINE_integer("density_stages", None, "Of constant density before the target; 5 by default.")
    flags.DEFINE_float("density_end_fraction", None, "The target is reached at this fraction of all steps; 0.5.")
    flags.DEFINE_float("drop_fraction", None, "Share of the weights dropped at first, in [0, 1]; 0.3 by default.")
    flags.DEFINE_float("anneal_fraction", None, "Nothing is dropped from this fraction of all steps on.")
    flags.DEFINE_float("backward_factor", 2.0, "Of topkast: weights that have a gradient over active ones, at least 1.")
    flags.DEFINE_integer(
        "update_interval",
        None,
        "Steps between adaptations; by default 40 for digits and 100 for photographs, fewer in a short run.",
    )
    flags.DEFINE_integer(
        "adapt_batch_size", None, "Examples of a batch that an adaptation measures on; by default all of them."
    )
    flags.DEFINE_float("update_end_fraction", None, "Adaptations end after this fraction of all steps.")
    flags.DEFINE_integer("epochs", None, "Passes over the training examples.")
    flags.DEFINE_integer("steps", None, "Training steps, instead of epochs.")
    flags.DEFINE_integer("batch_size", None, "Images in a step.")
    flags.DEFINE_float("learning_rate", None, "Base learning rate.")
    flags.DEFINE_enum("learning_rate_schedule", None, LEARNING_RATE_SCHEDULES, "How the learning rate falls.")
    flags.DEFINE_float("warmup_fraction", None, "Of all steps, in which the learning rate rises.")
    flags.DEFINE_float("momentum", None, "Of SGD; 0.9 by default.")
    flags.DEFINE_bool("nesterov", None, "Of SGD.")
    flags.DEFINE_float("weight_decay", None, "L2 for SGD, decoupled for AdamW; 1e-4 by default.")
    flags.DEFINE_bool("decay_kernels_only", None, "Whether weight decay spares biases and normalization.")
    flags.DEFINE_enum("optimizer", None, OPTIMIZERS, "Optimizer.")
    flags.DEFINE_float("label_smoothing", 0.0, "In [0, 1).")
    flags.DEFINE_float("dropout_rate", None, "Inside the blocks of wrn models; the paper uses 0.3.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the computation; parameters are float32.")
    flags.DEFINE_integer("seed", 0, "Of everything random.")
    flags.DEFINE_enum("implementation", "auto", IMPLEMENTATIONS, "Of the sparse products.")


def with_default_interval(config: Config) -> Config:
    """The config with the steps between adaptations that hold where nothing is said.

    A data set's default is for a run of the default length: a short one adapts a few times all the same.
    """
    longest = default_values(config.dataset)["update_interval"]
    return dataclasses.replace(config, update_interval=longest).with_adaptations()


@functools.cache
def default_values(dataset: str) -> Mapping[str, Any]:
    """Values of all fields of a config for a data set: those of `Config` with those of its kind of data."""
    own = {"digits": {}, text.NAME: TEXT}.get(dataset, SMALL_PHOTOGRAPHS if "@" in dataset else PHOTOGRAPHS)
    return types.MappingProxyType(dataclasses.asdict(Config()) | own | {"dataset": dataset})


def config_from_flags() -> Config:
    """The config of the parsed flags; sizes that depend on the data set are filled in by `dsb_jax.training.loop`."""
    if FLAGS.steps is not None and FLAGS.epochs is not None:
        raise ValueError(f"steps={FLAGS.steps} and epochs={FLAGS.epochs} both say how long to train; give one of them.")
    values = dict(default_values(FLAGS.dataset))
    if FLAGS.protocol is not None:
        values |= PROTOCOLS[FLAGS.protocol]
    for name in values:
        if name in FLAGS and FLAGS[name].value is not None:
            values[name] = FLAGS[name].value
    if FLAGS.grow is None:
        values["grow"] = default_grow(values["optimizer"])
    values["block_shape"] = parse_block_shape_or_auto(FLAGS.block_shape)
    values["keep_dense"] = tuple(FLAGS.keep_dense)
    return Config(**values)
