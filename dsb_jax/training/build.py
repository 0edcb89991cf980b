"""From a config to objects: model, plan, method, optimizer, loss.

"dense" and "small_dense" are models without sparse layers, so there is neither a plan nor a method then.
"""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dsb_jax.gradual import GradualDensity, stage_after
from dsb_jax.linen import SparseConv, SparseDense, find_layers
from dsb_jax.losses import Loss, smoothed_cross_entropy
from dsb_jax.methods import DSB, METHODS, Method
from dsb_jax.ops.convolution import conv_general_dilated
from dsb_jax.ops.dispatch import A_DENSE_LAYER, record_choices
from dsb_jax.paths import KERNEL, WEIGHTS
from dsb_jax.plan import FoundModel, SparsityPlan, make_plan
from dsb_jax.rules import Rule
from dsb_jax.spec import LayerSpec
from dsb_jax.training import models
from dsb_jax.training.config import DENSE_METHODS, Config, check_config

KEY_IMPL = "threefry2x32"  # of new runs; never that of the environment, which would decide what a seed means


class Stage(NamedTuple):
    """Steps of constant density; a run without `initial_density` is one stage.

    Attributes:
      step: the first one of it.
      plan: what its layers hold; None for the models without sparse layers.
      model: that begins with this plan.
    """

    step: int
    plan: SparsityPlan | None
    model: nn.Module


class Components(NamedTuple):
    """The objects of a config; hashable, so that they can be static arguments of the steps.

    Attributes:
      model: of the first stage; it is applied in all of them, since sizes are read from the topology.
      plan, method: None for the models without sparse layers; the plan is that of the last stage.
      stages: of density, in order; one for most runs.
      fill: what the moments of newly active weights begin with, as `dsb_jax.adaptation` takes it.
    """

    model: nn.Module
    plan: SparsityPlan | None
    method: Method | None
    optimizer: optax.GradientTransformation
    loss: Loss
    learning_rate: optax.Schedule
    stages: tuple[Stage, ...]
    fill: tuple[tuple[str, str], ...] = ()

    def stage_after(self, done: int) -> Stage:
        """The stage of a state after `done` steps, see `dsb_jax.gradual.stage_after`."""
        return stage_after(self.stages, done)


def build(config: Config) -> Components:
    """Builds everything. Configs that are equal but for the seed give the same objects, so nothing recompiles.

    Raises:
      ValueError: for an invalid value, with the value and the cure.
    """
    check_config(config)
    return _build(dataclasses.replace(config, seed=0))


def make_key(seed: int) -> jax.Array:
    """The PRNG key of a seed, of the same generator whatever `jax_default_prng_impl` says."""
    return jax.random.key(seed, impl=KEY_IMPL)


def make_method(config: Config) -> Method | None:
    """The method with its settings; None for a model without sparse layers.

    Raises:
      ValueError: if a setting is invalid or has no effect.
    """
    if config.method in DENSE_METHODS:
        return None
    method: Any = METHODS[config.method]
    values = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(method)}
    return method(**{name: value for name, value in values.items() if value is not None})


def make_gradual(config: Config) -> GradualDensity | None:
    """How the density falls; None if it is constant.

    Raises:
      ValueError: if the run has too few steps for its stages.
    """
    if config.initial_density is None:
        return None
    end_step = min(round(config.density_end_fraction * config.total_steps), config.total_steps - 1)
    if end_step < config.density_stages:
        raise ValueError(
            f"density_stages={config.density_stages} are more than the {end_step} steps in which the density falls "
            f"(density_end_fraction={config.density_end_fraction} of {config.total_steps} steps); give fewer."
        )
    return GradualDensity(config.initial_density, end_step, config.density_stages)


def default_grow(optimizer: str) -> str:
    """How DSB grows where nothing else is said, by the optimizer."""
    return (DSB.for_adam() if optimizer == "adamw" else DSB()).grow


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate by step. SGD's weight decay is L2, AdamW's decoupled."""
    base, total = config.learning_rate, config.total_steps
    warmup = round(config.warmup_fraction * total)
    rigl_steps = {round(i * 30_000 / 97_656 * total): 0.2 for i in (1, 2, 3)}
    schedule = {
        "cosine": lambda: optax.cosine_decay_schedule(base, total),
        "step": lambda: optax.piecewise_constant_schedule(base, {total // 2: 0.1, total * 3 // 4: 0.1}),
        "rigl_step": lambda: optax.piecewise_constant_schedule(base, rigl_steps),
        "constant": lambda: optax.constant_schedule(base),
    }[config.learning_rate_schedule]()
    if warmup:
        schedule = _warmed_up(schedule, warmup)
    mask = decayed_kernels if config.decay_kernels_only else None
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay, mask=mask), schedule
    sgd = optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov)
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask), sgd), schedule


def _warmed_up(schedule: optax.Schedule, warmup: int) -> optax.Schedule:
    """The schedule times a factor that rises to 1 within `warmup` steps."""

    def warmed_up(step: Any) -> Any:
        return schedule(step) * jnp.minimum((step + 1) / warmup, 1)

    return warmed_up


def decayed_kernels(params: Any) -> Any:
    """True for kernels and blocks: what weight decay reaches if it spares all else."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in (WEIGHTS, KERNEL), params)


def decide_feature_major(config: Config, *, tuned: bool = False) -> bool:
    """Whether shuffled-block products, which read feature-major, see most of the sparse layers' activations.

    The others would have to transpose theirs, at a cost that grows with the activations, not with the weights. A
    function of the config and of the kind of device alone: what was tuned on this machine has no part in it, unless
    `tuned` says so.
    """
    if models.takes_text(config.model) or config.method in DENSE_METHODS:
        return False
    _, _, model = _stages(dataclasses.replace(config, feature_major=False))[-1]
    images = config.abstract_inputs()
    with record_choices(tuned=tuned) as choices:
        jax.eval_shape(model.init, make_key(0), images)
    sparse = [choice for choice in choices.values() if choice.reason != A_DENSE_LAYER]
    products = sum(choice.elements for choice in sparse if choice.implementation != "dense")
    return 2 * products > sum(choice.elements for choice in sparse)


def equal_width(
    create: Callable[..., nn.Module], inputs: jax.ShapeDtypeStruct, make: Callable[..., SparsityPlan]
) -> float:
    """The width multiplier at which the dense model has about as many weights as the sparse model of the plan stores.

    Widths are whole numbers, so the nearest that bisection finds; weights of linear layers and convolutions count.
    """
    plan = make(_layers(create(width_multiplier=1.0), inputs))
    wanted = sum(
        planned.num_active if isinstance(planned, LayerSpec) else plan.sizes[path].size
        for path, planned in plan.items()
    )

    def excess(width: float) -> int:
        layers = _layers(create(width_multiplier=width), inputs).layers
        return sum(found.spec.size for found in layers.values()) - wanted

    low, high = 1 / 64, 1.0
    for _ in range(10):  # to a thousandth of the width
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return min((low, high), key=lambda width: abs(excess(width)))


@functools.lru_cache(maxsize=32)
def _build(config: Config) -> Components:
    if config.feature_major is None:
        config = dataclasses.replace(config, feature_major=decide_feature_major(config))
    stages = _stages(config)
    optimizer, schedule = make_optimizer(config)
    loss = smoothed_cross_entropy(config.label_smoothing)
    fill = (("nu", config.fill),) if config.fill is not None and config.optimizer == "adamw" else ()
    model, plan = stages[0].model, stages[-1].plan
    return Components(model, plan, make_method(config), optimizer, loss, schedule, stages, fill)


def _stages(config: Config) -> tuple[Stage, ...]:
    method = make_method(config)
    create = functools.partial(
        models.create,
        config.model,
        num_classes=config.num_classes,
        dtype=jnp.dtype(config.dtype),
        dropout_rate=config.dropout_rate,
    )
    make = functools.partial(
        make_plan,
        sparsity=config.sparsity,
        distribution=config.distribution,
        block_shape=config.block_shape,
        rules=dense_rules(config.keep_dense),
        min_blocks=config.min_blocks,
        min_group_blocks=config.min_group_blocks,
    )
    if config.method == "small_dense":
        create = functools.partial(create, width_multiplier=equal_width(create, config.abstract_inputs(1), make))
    dense = create(conv=functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated))
    if method is None:
        return (Stage(0, None, dense),)
    plan = make(_layers(dense, config.abstract_inputs(1)))

    def with_plan(plan: SparsityPlan) -> nn.Module:
        sparse: dict[str, Any] = {"plan": plan, "implementation": config.implementation, "method": method}
        return create(
            conv=functools.partial(SparseConv, **sparse),
            dense=functools.partial(SparseDense, **sparse),
            feature_major=bool(config.feature_major),
        )

    gradual = make_gradual(config)
    plans = ((0, plan),) if gradual is None else gradual.stages(plan)
    return tuple(Stage(step, plan, with_plan(plan)) for step, plan in plans)


def dense_rules(keep_dense: tuple[str, ...]) -> tuple[Rule, ...]:
    """What keeps the layers dense whose path, or one part of it, matches a pattern as in a shell."""
    texts = [re.sub(r"\\[Zz]$", "", fnmatch.translate(pattern)) for pattern in keep_dense]
    return (Rule(f"(.*/)?({'|'.join(texts)})(/.*)?", dense=True),) if texts else ()


def _layers(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> FoundModel:
    return find_layers(model, inputs, rngs=make_key(0))
