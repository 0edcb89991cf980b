"""summary.json: what can be said of a finished run.

"bytes" and the ratio of inference are those of the last stage, which is what a run leaves behind. What it took is in
"average", over its steps, and "peak"; both are the same numbers again if the density is constant.
"""

import math
import os
import platform
from typing import Any

import flax
import jax
import optax

from dsb_jax import flops
from dsb_jax.paths import nodes
from dsb_jax.spec import LayerSpec
from dsb_jax.telemetry import Explored, count_active, count_bytes
from dsb_jax.train_state import TrainState
from dsb_jax.training import models
from dsb_jax.training.build import Components, Stage
from dsb_jax.training.checkpoints import abstract_state
from dsb_jax.training.config import Config
from dsb_jax.training.metrics import Metrics, mean_or_none


def summarize(
    config: Config, components: Components, state: TrainState, metrics: Metrics, explored: Explored
) -> dict[str, Any]:
    """The outcome of a finished run from its state and its metrics.

    What there is no number of is None: of a run without adaptations what they did, of one whose metrics.jsonl was
    removed the losses.
    """
    evals, adapts, trains = (metrics.of_kind(kind) for kind in ("eval", "adapt", "train"))

    def last(entries: list[dict[str, Any]], name: str) -> Any:
        return entries[-1][name] if entries else None

    def mean(name: str) -> float | None:
        return mean_or_none(entry[name] for entry in adapts)

    layers: dict[str, dict[str, list[float]]] = {}
    for entry in adapts:
        for name, values in entry["layers"].items():
            for key, value in values.items():
                layers.setdefault(name, {}).setdefault(key, []).append(value)
    nbytes = count_bytes(state.params, state.opt_state, state.topology)
    stages = measure_stages(config, components, nbytes)
    requested, accepted = (sum(entry[name] for entry in adapts) for name in ("requested", "accepted"))
    return {
        "test_accuracy": last(evals, "test_accuracy"),
        "test_loss": last(evals, "test_loss"),
        "train_loss": last(trains, "loss"),
        **measure_sparsity(components, state),
        "bytes": nbytes,
        "flops": {
            "train_ratio": stages["average"]["train_ratio"],
            "inference_ratio": stages["stages"][-1]["inference_ratio"],
        },
        **stages,
        "adaptations": len(adapts),
        "accepted_growth": accepted / max(1, requested) if adapts else None,
        "turnover": mean("turnover"),
        "collateral": mean("collateral"),
        "empty_groups": last(adapts, "empty_groups"),
        "exploration": explored.share() if nodes(state.topology) else None,
        "layers": {name: {k: mean_or_none(v) for k, v in values.items()} for name, values in layers.items()},
        "step_time_s": metrics.median_seconds("train"),
        "adapt_time_s": metrics.median_seconds("adapt"),
        "config": config.to_json(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
    }


def measure_stages(config: Config, components: Components, nbytes: dict[str, int]) -> dict[str, Any]:
    """`stages`, each with its first step, density, bytes and ratios; `average` of these over the steps, and `peak`.

    Args:
      config: of the run.
      components: of the config.
      nbytes: what the last stage holds; those before are counted from the shapes of their arrays.
    """
    ends = [stage.step for stage in components.stages[1:]] + [config.total_steps]
    stages: list[dict[str, Any]] = []
    for stage, end in zip(components.stages, ends, strict=True):
        if end < config.total_steps:
            state = abstract_state(config, components, done=end)
            held = count_bytes(state.params, state.opt_state, state.topology)
        else:
            held = nbytes
        density = 1.0 if stage.plan is None else 1 - stage.plan.sparsity()
        ratios = measure_flops(config, components, stage, end)
        stages.append({"step": stage.step, "density": density, "bytes": held, **ratios})
    shares = [(end - stage.step) / config.total_steps for stage, end in zip(components.stages, ends, strict=True)]

    def mean(values: list[Any]) -> float:
        return math.fsum(value * share for value, share in zip(values, shares, strict=True))

    most = max((each["bytes"] for each in stages), key=lambda held: sum(held.values()))
    numbers = {name: [each[name] for each in stages] for name in ("density", "train_ratio")}
    return {
        "stages": stages,
        "average": {
            **{name: mean(values) for name, values in numbers.items()},
            "bytes": {name: round(mean([each["bytes"][name] for each in stages])) for name in nbytes},
        },
        "peak": {**{name: max(values) for name, values in numbers.items()}, "bytes": most},
    }


def measure_flops(config: Config, components: Components, stage: Stage, end: int) -> dict[str, float]:
    """`train_ratio` and `inference_ratio` of a stage, see `dsb_jax.flops`: against the dense model of the config.

    The first of these is over its steps, of which `end` is the first that is of it no more.
    """
    plan, method = stage.plan, components.method
    if plan is not None and not any(isinstance(planned, LayerSpec) for _, planned in plan.items()):
        method = None  # at sparsity 0 there is nothing to adapt
    return flops.measure(
        stage.model,
        models.create(config.model, num_classes=config.num_classes),
        config.abstract_inputs(1),
        statistic=None if method is None else method.statistic,
        adapt_share=flops.share_of_adaptations(
            method,
            first_step=stage.step,
            total_steps=end,
            batch_size=config.batch_size,
            adapt_batch_size=config.adapt_batch_size,
        ),
    )


def measure_sparsity(components: Components, state: TrainState) -> dict[str, Any]:
    """`sparsity` over the eligible layers and `sparsity_all` over all linear layers, counted from the arrays."""
    kernels = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "kernel"
    )
    plan, active = components.plan, count_active(state.topology)
    if plan is None:
        return {"sparsity": 0.0, "sparsity_all": 0.0, "num_active": kernels}
    eligible = {path: spec.size for path, spec in plan.eligible.items()}
    stored = sum(active.get(path, size) for path, size in eligible.items())
    everything = sum(spec.size for spec in plan.sizes.values())
    return {
        "sparsity": 1 - stored / sum(eligible.values()),
        "sparsity_all": 1 - (sum(active.values()) + kernels) / everything,
        "num_active": sum(active.values()),
    }
