"""A recipe: everything that determines a run, as plain values; `assemble` makes the objects of it.

A recipe goes to JSON and back without loss, so that a checkpoint can hold the one it was made by.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dsb_jax import methods
from dsb_jax.distributions import LayerShape
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import Method
from dsb_jax.ops.convolution import conv_general_dilated
from dsb_jax.ops.dispatch import A_DENSE_LAYER, check_implementation, record_choices
from dsb_jax.plan import (
    KEEP_DENSE,
    MIN_BLOCKS,
    MIN_GROUP_BLOCKS,
    Path,
    SparsityPlan,
    find_layers,
    make_plan,
    unstructured,
)
from dsb_jax.train import Loss, smoothed_cross_entropy
from dsb_jax.training import models

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step", "constant")
DTYPES = ("float32", "bfloat16")

# Fields added after the first release of checkpoints. Their defaults must stay what was done before there was a choice.
_YOUNGER = ("backward_factor", "growth_score", "regroup_interval")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The values that determine a run. Defaults are those of `make train`: digits, DSB, 90 % sparse.

    The paper's CIFAR protocol (160 epochs, WRN-22-2): optimizer sgd, momentum 0.9, weight_decay 1e-4, batch_size
    128, learning_rate 0.1, learning_rate_schedule step, distribution erk, update_interval 100, drop_fraction 0.3,
    update_end_fraction 0.5, dropout_rate 0.3, block_shape 16x16.

    Attributes:
      image_shape, num_classes: of the data; filled in from the data set.
      update_end_fraction: T_end as a fraction of all training steps.
      backward_factor: of Top-KAST, weights that have a gradient over active ones.
      adapt_batch_size: images of the batch that an adaptation measures its statistics on, at most.
      keep_dense: patterns of paths that stay dense, see `dsb_jax.plan`.
      min_group_blocks: blocks that every row group has, in the plan and, with DSB, after every adaptation; 0 is the
        paper's rule, under which outputs can be without weights.
      learning_rate_schedule: "cosine" to zero, "step" (times 0.1 at 50 % and 75 %), or "constant".
      total_steps: training steps of the whole run.
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
    drop_fraction: float = 0.3
    update_interval: int = 40
    update_end_fraction: float = 0.75
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

    @property
    def update_end_step(self) -> int:
        """T_end in steps."""
        return round(self.update_end_fraction * self.total_steps)

    def to_json(self) -> dict[str, Any]:
        """Plain values: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_json`. Fields that are younger than the JSON have their defaults, as it was then.

        Raises:
          ValueError: if a name is unknown, or one is missing that always was there.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if odd := sorted((set(values) ^ names) - (set(_YOUNGER) - set(values))):
            raise ValueError(f"the recipe has unknown or missing fields {odd}; it was made by another version.")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


class Assembly(NamedTuple):
    """The objects of a recipe; hashable, so that they can be static arguments of the steps."""

    model: nn.Module
    plan: SparsityPlan | None
    method: Method
    optimizer: optax.GradientTransformation
    loss: Loss
    learning_rate: optax.Schedule


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError for the first value that cannot be."""
    for name, value, known in (
        ("method", recipe.method, methods.METHODS),
        ("optimizer", recipe.optimizer, OPTIMIZERS),
        ("learning_rate_schedule", recipe.learning_rate_schedule, SCHEDULES),
        ("dtype", recipe.dtype, DTYPES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    check_implementation(recipe.implementation)
    if min(recipe.block_shape) < 1:
        raise ValueError(f"block_shape={recipe.block_shape} has a side below 1; give positive sizes such as 16x16.")
    if not 0 <= recipe.seed < 2**32:
        raise ValueError(f"seed={recipe.seed} is not in [0, 2**32).")
    for name, low, high in (
        ("sparsity", 0.0, 1.0),
        ("drop_fraction", 0.0, 1.0),
        ("update_end_fraction", 0.0, 1.0),
        ("weight_decay", 0.0, float("inf")),
        ("dropout_rate", 0.0, 1.0),
        ("label_smoothing", 0.0, 1.0),
        ("momentum", 0.0, 1.0),
    ):
        value = getattr(recipe, name)
        open_end = name not in ("drop_fraction", "update_end_fraction")
        if not (low <= value < high or (value == high and not open_end)):
            raise ValueError(f"{name}={value} is not in [{low:g}, {high:g}{')' if open_end else ']'}.")
    for name in ("update_interval", "epochs", "total_steps", "batch_size", "adapt_batch_size", "learning_rate"):
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name}={getattr(recipe, name)} is not positive.")


def make_method(recipe: Recipe) -> Method:
    """The method with its settings."""
    if recipe.method == "dsb":
        return methods.dsb(
            update_end_step=max(recipe.update_end_step, 1),
            alpha=recipe.drop_fraction,
            grow=recipe.grow,
            block_aware_drop=recipe.block_aware_drop,
            granularity=recipe.granularity,
            min_group_blocks=recipe.min_group_blocks,
            growth_score=recipe.growth_score,
            regroup_interval=recipe.regroup_interval,
        )
    if recipe.method in ("rigl", "set"):
        adaptive = {"rigl": methods.rigl, "set": methods.set_}[recipe.method]
        return adaptive(update_end_step=max(recipe.update_end_step, 1), alpha=recipe.drop_fraction)
    if recipe.method == "topkast":
        return methods.topkast(backward_factor=recipe.backward_factor)
    return {"ssb": methods.ssb, "dense": methods.dense, "small_dense": methods.small_dense}[recipe.method]()


def make_optimizer(recipe: Recipe) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate by step. SGD's weight decay is L2, AdamW's decoupled."""
    base, total = recipe.learning_rate, recipe.total_steps
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(base, total),
        "step": lambda: optax.piecewise_constant_schedule(base, {total // 2: 0.1, total * 3 // 4: 0.1}),
        "constant": lambda: optax.constant_schedule(base),
    }[recipe.learning_rate_schedule]()
    if recipe.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=recipe.weight_decay), schedule
    sgd = optax.sgd(schedule, momentum=recipe.momentum or None)
    return optax.chain(optax.add_decayed_weights(recipe.weight_decay), sgd), schedule


def equal_width(
    create: Callable[..., nn.Module], image_shape: tuple[int, int, int], make: Callable[..., SparsityPlan]
) -> float:
    """The width multiplier at which the dense model has about as many weights as the sparse model of the plan stores.

    Widths are whole numbers, so the nearest that bisection finds; weights of linear layers and convolutions count.
    """

    def layers(width: float) -> dict[Path, LayerShape]:
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return find_layers(jax.eval_shape(create(width_multiplier=width).init, jax.random.key(0), images)["params"])

    plan = make(layers(1.0))
    wanted = sum(plan.num_active(layer) for layer in plan.layers)

    def excess(width: float) -> int:
        return sum(shape.size for shape in layers(width).values()) - wanted

    low, high = 1 / 64, 1.0
    for _ in range(10):  # to a thousandth of the width
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return min((low, high), key=lambda width: abs(excess(width)))


def reads_feature_major(model: nn.Module, recipe: Recipe) -> bool:
    """Whether shuffled-block products, which read feature-major, see most of the sparse layers' activations.

    The others would have to transpose theirs, at a cost that grows with the activations, not with the weights.
    """
    images = jax.ShapeDtypeStruct((recipe.batch_size, *recipe.image_shape), jnp.float32)
    with record_choices() as choices:
        jax.eval_shape(model.init, jax.random.key(0), images)
    sparse = [choice for choice in choices.values() if choice.reason != A_DENSE_LAYER]
    products = sum(choice.elements for choice in sparse if choice.implementation != "dense")
    return 2 * products > sum(choice.elements for choice in sparse)


def assemble(recipe: Recipe) -> Assembly:
    """Builds model, plan, method, optimizer and loss.

    Recipes that are equal but for the seed give the same objects, so nothing recompiles.

    Raises:
      ValueError: for a value that cannot be, with the value and the cure.
    """
    check_recipe(recipe)
    return _assemble(dataclasses.replace(recipe, seed=0))


@functools.lru_cache(maxsize=32)
def _assemble(recipe: Recipe) -> Assembly:
    method = make_method(recipe)
    conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
    create = functools.partial(
        models.create, recipe.model, num_classes=recipe.num_classes, dtype=jnp.dtype(recipe.dtype),
        dropout_rate=recipe.dropout_rate,
    )  # fmt: skip
    make = functools.partial(
        make_plan,
        sparsity=recipe.sparsity,
        distribution=recipe.distribution,
        block_shape=recipe.block_shape,
        keep_dense=recipe.keep_dense,
        min_blocks=recipe.min_blocks,
        min_group_blocks=recipe.min_group_blocks,
    )
    plan = None
    if method.equal_width:
        create = functools.partial(create, width_multiplier=equal_width(create, recipe.image_shape, make))
    model = create(conv=conv)
    if method.sparse:
        images = jax.ShapeDtypeStruct((1, *recipe.image_shape), jnp.float32)
        plan = make(find_layers(jax.eval_shape(model.init, jax.random.key(0), images)["params"]))
        if method.unstructured:
            plan = unstructured(plan)
        sparse: dict[str, Any] = {"plan": plan, "implementation": recipe.implementation, "init_layout": method.init}
        if method.store is not None:
            sparse |= {"store": method.store, "exploration": recipe.weight_decay}
        create = functools.partial(
            create, conv=functools.partial(SparseConv, **sparse), dense=functools.partial(SparseDense, **sparse)
        )
        model = create(feature_major=reads_feature_major(create(), recipe))
    optimizer, schedule = make_optimizer(recipe)
    return Assembly(model, plan, method, optimizer, smoothed_cross_entropy(recipe.label_smoothing), schedule)
