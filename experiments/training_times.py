"""What the training benchmarks time: a whole training step, and each linear layer or convolution alone.

A layer's time is that of its forward and backward pass at the input it meets in the model. Backward gives the gradients
of weights and input; the first layer reads the images, whose gradient no training computes, and none is timed.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.block_shapes import BlockShape, shape_text
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.ops import record_choices
from dsb_jax.paths import Path
from dsb_jax.spec import LayerSpec
from dsb_jax.train import train_step
from dsb_jax.training import models
from dsb_jax.training.build import Components, build
from dsb_jax.training.config import Config
from dsb_jax.training.loop import create
from experiments import timing
from experiments.torch_process import TorchProcess

DENSE = "dense"  # the name of the dense candidate, beside those of the configs
TORCH = "torch"  # of the same model in PyTorch, where there is such a process


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """One layer of a model at one sparsity.

    Attributes:
      path: of the module in the model.
      shape: `(out, in)` of its weight matrix; a convolution's is flattened.
      input_shape: `[N, H, W, C]`, `[N, T, C]` or `[N, C]`, whatever order of activations the model has.
      spec: of the sparse layer; None if it stays dense.
      dense: seconds of the dense layer, round by round.
      sparse: of the sparse layer, in the same rounds; None if it stays dense.
      implementation: what computes it, "dense" if it stays dense.
    """

    path: Path
    shape: tuple[int, int]
    input_shape: tuple[int, ...]
    spec: LayerSpec | None
    dense: Sequence[float]
    sparse: Sequence[float] | None
    implementation: str

    @property
    def blocks(self) -> dict[str, Any]:
        """For a table of results: `block_shape` and `num_blocks`, None if it stays dense."""
        names = ("block_shape", "num_blocks")
        return {name: None if self.spec is None else getattr(self.spec, name) for name in names}

    @property
    def dense_s(self) -> float:
        """The median."""
        return statistics.median(self.dense)

    @property
    def sparse_s(self) -> float | None:
        """The median; None if the layer stays dense."""
        return None if self.sparse is None else statistics.median(self.sparse)

    @property
    def speedup(self) -> float | None:
        """Dense over sparse, the median over the rounds; None if the layer stays dense."""
        return None if self.sparse is None else timing.median_ratio([*self.dense], [*self.sparse])


def sparse_configs(
    dense: Config, sparsities: Sequence[str], block_shapes: Sequence[BlockShape], distribution: str
) -> dict[str, Config]:
    """The sparse candidates of a dense config, by sparsity and block shape as text.

    Raises:
      ValueError: if a sparsity is not a number.
    """
    try:
        values = [float(text) for text in sparsities]
    except ValueError:
        raise ValueError(f"sparsities={','.join(sparsities)} are not all numbers; give such as 0.8,0.9.") from None
    return {
        f"{value} in {shape_text(shape)}": dataclasses.replace(
            dense, method="dsb", sparsity=value, block_shape=shape, distribution=distribution
        )
        for value in values
        for shape in block_shapes
    }


def stepper(config: Config) -> Callable[[], Any]:
    """A call that makes one training step on fixed random images or tokens, carrying its state along."""
    components, state = create(config)
    input_key, label_key = jax.random.split(jax.random.key(config.seed))
    shape: tuple[int, ...] = (config.batch_size, *config.input_shape)
    if models.takes_text(config.model):
        inputs = jax.random.randint(input_key, shape, 0, config.num_classes)
    else:
        inputs, shape = jax.random.normal(input_key, shape), shape[:1]
    labels = jax.random.randint(label_key, shape, 0, config.num_classes)
    held = [state]

    def step() -> Any:
        held[0], metrics = train_step(
            held[0], inputs, labels, model=components.model, optimizer=components.optimizer, loss=components.loss
        )
        return held[0].step, metrics

    return step


def time_steps(
    dense: Config, configs: Mapping[str, Config], rounds: int, torch: TorchProcess | None
) -> dict[str, list[float]]:
    """Seconds of the training steps in turns: of `DENSE`, of each config by its name, of `TORCH` if it is there."""
    steps = {DENSE: stepper(dense)} | {name: stepper(config) for name, config in configs.items()}
    return timing.in_turns(steps, rounds, self_timed={} if torch is None else {TORCH: torch.step})


def beside_torch(times: Mapping[str, list[float]], name: str) -> dict[str, float | None]:
    """What the step of a config is beside PyTorch's, for a table of results; None where there was no PyTorch.

    Returns:
      `torch_step_s`, the median; `speedup_over_fastest`, the faster of XLA's and PyTorch's dense step over this one,
      the median over the rounds.
    """
    if TORCH not in times:
        return {"torch_step_s": None, "speedup_over_fastest": None}
    fastest = [min(pair) for pair in zip(times[DENSE], times[TORCH], strict=True)]
    ratio = timing.median_ratio(fastest, times[name])
    return {"torch_step_s": statistics.median(times[TORCH]), "speedup_over_fastest": ratio}


def find_inputs(config: Config, components: Components) -> dict[Path, tuple[nn.Module, tuple[int, ...]]]:
    """Path of each linear layer and convolution of a sparse model -> (module, shape of its input).

    Seen while the model is traced, in the order of the forward pass. Inputs are [N, H, W, C], [N, T, C] or [N, C].
    """
    seen: dict[Path, tuple[nn.Module, tuple[int, ...]]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, SparseConv | SparseDense):
            shape = args[0].shape
            if context.module.feature_major:
                shape = (shape[-1], *shape[1:-1], shape[0])
            seen.setdefault(context.module.path, (context.module, shape))
        return call(*args, **kwargs)

    images = config.abstract_inputs()
    with nn.intercept_methods(watch):
        jax.eval_shape(components.model.init, jax.random.key(0), images)
    return seen


def layer_candidates(
    modules: Mapping[str, Any],
    shape: tuple[int, ...],
    specs: Mapping[str, LayerSpec | None],
    config: Config,
    *,
    input_gradient: bool = True,
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Forward and backward of one layer in its blocks (None: dense), and what "auto" chose for it.

    Each takes its input in the order of activations that its model has: feature-major or not.

    Args:
      modules: by the name of the candidate.
      shape: of the input, [N, H, W, C], [N, T, C] or [N, C].
      specs: of the sparse layer, by the name of the candidate.
      config: gives the dtype.
      input_gradient: whether backward computes the gradient of the input, too.

    Returns:
      Calls that return output and gradients, and names of implementations, both by the name of the candidate.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, shape, jnp.dtype(config.dtype))
    calls: dict[str, Callable[[], Any]] = {}
    chosen: dict[str, str] = {}
    for name, spec in specs.items():
        blocks = {} if spec is None else {"block_shape": spec.block_shape, "num_blocks": spec.num_blocks}
        clone = modules[name].clone(parent=None, name=None, plan=None, **blocks)
        given = jnp.moveaxis(x, (0, -1), (-1, 0)) if clone.feature_major else x
        with record_choices() as choices:
            variables = jax.jit(clone.init)(key, given)
        chosen[name] = choices[()].implementation
        rest = {k: v for k, v in variables.items() if k != "params"}

        def both(params: Any, x: jax.Array, clone: Any = clone, rest: Any = rest) -> Any:
            def apply(params: Any, x: jax.Array) -> Any:
                return clone.apply({"params": params, **rest}, x)

            if input_gradient:
                y, backward = jax.vjp(apply, params, x)
            else:
                y, backward = jax.vjp(lambda params: apply(params, x), params)
            return y, backward(y)

        calls[name] = functools.partial(jax.jit(both), variables["params"], given)
    return calls, chosen


def time_layers(
    configs: Mapping[str, Config], rounds: int, *, dense_layers: bool = False
) -> dict[str, list[LayerTime]]:
    """Times of the layers of every config; the configs differ in sparsity and block shape alone.

    Dense and all candidates of a layer take turns; layers of equal sizes are measured once.

    Args:
      configs: of sparse models, by name.
      rounds: turns that each layer takes.
      dense_layers: time the layers that stay dense, too.

    Returns:
      By the name of the config: its layers in the order of the forward pass.
    """
    built = {name: build(config) for name, config in configs.items()}
    plans = {name: a.plan for name, a in built.items() if a.plan is not None}
    first = next(iter(configs))
    inputs = {name: find_inputs(config, built[name]) for name, config in configs.items()}
    measured: dict[Any, Any] = {}
    rows: dict[str, list[LayerTime]] = {name: [] for name in configs}
    for position, (path, (module, shape)) in enumerate(inputs[first].items()):
        specs = {name: plan.sparse[path] for name, plan in plans.items() if path in plan.sparse}
        if not specs and not dense_layers:
            continue
        sizes = plans[first].sizes[path]
        how = tuple(str(getattr(module, name, None)) for name in ("strides", "padding", "use_bias"))
        same = (shape, sizes, tuple(specs.items()), how, position == 0)
        if same not in measured:
            modules: dict[str, Any] = {DENSE: module.clone(feature_major=False)}
            modules |= {name: inputs[name][path][0] for name in specs}
            calls, chosen = layer_candidates(
                modules, shape, {DENSE: None, **specs}, configs[first], input_gradient=position > 0
            )
            measured[same] = timing.in_turns(calls, rounds), chosen
        times, chosen = measured[same]
        for name in configs:
            if name in specs or dense_layers:
                spec, time, choice = specs.get(name), times.get(name), chosen.get(name, DENSE)
                rows[name].append(LayerTime(path, sizes.shape, shape, spec, times[DENSE], time, choice))
    return rows
