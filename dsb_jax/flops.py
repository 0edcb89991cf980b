"""Floating-point operations of training and inference relative to the dense model, by the accounting of the field.

Evci et al., "Rigging the Lottery", ICML 2020, appendix H: a linear layer or convolution of density d, in units of its
dense forward product, takes per training step

    forward          d
    input gradient   d
    weight gradient  d, or more where more weights have a gradient than are computed with

of which the dense model takes 1 + 1 + 1. An adaptation runs on `adapt_batch_size` images of a batch, every
`update_interval` steps until `update_end_step`, and is spread over all steps. It
takes by what the method measures (`dsb_jax.ops.statistics`)

    nothing                         0           the batch is not looked at
    OutputInputNorms                2 d         a forward pass and the input gradients
    PanelGradientNorm, Gradient     2 d + 1     and one product of the size of the dense weight gradient

Deviations from the paper: RigL there adapts *instead of* training in that step, here besides. Not counted, as usual:
normalization, activations, biases, the optimizer, the choice of positions (sorting), and that the first layer needs no
input gradient. A ratio of operations is no speed: that is measured (`experiments.benchmark_training`).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from dsb_jax.methods.base import Method
from dsb_jax.ops.statistics import Statistic
from dsb_jax.paths import Path, by_path, layer_path, nodes
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec


class LayerFlops(NamedTuple):
    """One layer, for one image and one training step, in multiply-adds; `adaptation` spread over all steps.

    Attributes:
      dense: of the dense forward product, `out * in * positions`.
      forward, input_gradient, weight_gradient, adaptation: of the layer as it is.
    """

    dense: float
    forward: float
    input_gradient: float
    weight_gradient: float
    adaptation: float = 0.0

    @property
    def train_ratio(self) -> float:
        """Training against dense training of the same layer."""
        return self.train / (3 * self.dense)

    @property
    def train(self) -> float:
        """All of a training step."""
        return self.forward + self.input_gradient + self.weight_gradient + self.adaptation

    @property
    def inference_ratio(self) -> float:
        """Inference against dense inference of the same layer: its density."""
        return self.forward / self.dense


@functools.lru_cache(maxsize=16)  # the seeds of a run, and its stages, have the same dense model
def find_calls(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> dict[Path, tuple[LayerSpec, int]]:
    """The linear layers and convolutions of a model and where they are applied, seen while it is traced.

    Args:
      model: hashable, of any class of layers in any order of activations.
      inputs: shape and dtype of one example, such as float32[1, H, W, C].

    Returns:
      Path -> sizes of the layer as it is, and outputs of one example over output features: height * width of a
      convolution's output, the tokens of a linear layer, 1 for the classifier of an image; summed if a layer is called
      more than once.
    """
    found: dict[Path, int] = {}
    inside: set[Path] = set()  # a subclass that calls nn.Conv's own __call__ is one layer, not two

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Conv | nn.Dense) or module.path in inside:
            return call(*args, **kwargs)
        inside.add(module.path)
        y = call(*args, **kwargs)
        inside.remove(module.path)
        found[module.path] = found.get(module.path, 0) + y.size // module.features
        return y

    with nn.intercept_methods(watch):
        variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    kernels = {path[:-1]: leaf for path, leaf in by_path(variables["params"]).items() if path[-1] == "kernel"}
    specs = {path: _kernel_spec(kernel.shape) for path, kernel in kernels.items() if path in found}
    specs |= {layer_path(path): node.spec for path, node in nodes(variables.get("topology", {})).items()}
    return {path: (specs[path], positions) for path, positions in found.items()}


def _kernel_spec(shape: tuple[int, ...]) -> LayerSpec:
    """Of a linear layer or a convolution, one group."""
    *kernel_size, c_in, out = shape
    return conv_spec(tuple(kernel_size), c_in, out) if kernel_size else linear_spec(c_in, out)


def count(
    calls: Mapping[Path, tuple[LayerSpec, int]], *, statistic: Statistic | None = None, adapt_share: float = 0.0
) -> dict[Path, LayerFlops]:
    """Every layer with the weights that it has.

    Args:
      calls: as `find_calls` gives them.
      statistic: what adaptations measure; None for nothing.
      adapt_share: images that adaptations measure on over images trained on, see `share_of_adaptations`.

    Raises:
      ValueError: if the share is not in [0, 1].
    """
    if not 0 <= adapt_share <= 1:
        raise ValueError(f"adapt_share={adapt_share} is not a share; give 0 to 1.")
    counted = {}
    for path, (spec, positions) in calls.items():
        dense = float(spec.size * positions)
        adaptation = 0.0
        if statistic is not None:
            products = 0.0 if spec.storage == "dense" else statistic.dense_products
            adaptation = adapt_share * (2 * spec.density + products)
        gradient = spec.num_stored / spec.size
        counted[path] = LayerFlops(
            dense, spec.density * dense, spec.density * dense, gradient * dense, adaptation * dense
        )
    return counted


def share_of_adaptations(
    method: Method | None,
    *,
    total_steps: int,
    batch_size: int,
    adapt_batch_size: int | None = None,
    first_step: int = 0,
) -> float:
    """Examples that the adaptations of a training measure on, over those that it trains on.

    Args:
      method: None for no adaptations.
      total_steps: where the training ends.
      batch_size: of a training step.
      adapt_batch_size: of an adaptation; None is a whole batch.
      first_step: the first one that counts.
    """
    if method is None:
        return 0.0
    due = sum(method.due(step) for step in range(first_step, total_steps))
    return due / (total_steps - first_step) * min(adapt_batch_size or batch_size, batch_size) / batch_size


def compare(own: Mapping[Path, LayerFlops], dense: Mapping[Path, LayerFlops]) -> dict[str, float]:
    """`train_ratio` and `inference_ratio` of a whole model against the dense one, which may have other layers."""
    return {
        "train_ratio": math.fsum(layer.train for layer in own.values()) / sum(layer.train for layer in dense.values()),
        "inference_ratio": math.fsum(layer.forward for layer in own.values())
        / math.fsum(layer.forward for layer in dense.values()),
    }


def measure(
    model: nn.Module,
    reference: nn.Module,
    inputs: jax.ShapeDtypeStruct,
    *,
    statistic: Statistic | None = None,
    adapt_share: float = 0.0,
) -> dict[str, float]:
    """The two ratios of a model, sparse or not, against a dense reference.

    Args:
      model: may be narrower than the reference.
      reference: the dense model that 1 stands for.
      inputs: of one example.
      statistic, adapt_share: as in `count`.
    """
    own = count(find_calls(model, inputs), statistic=statistic, adapt_share=adapt_share)
    return compare(own, count(find_calls(reference, inputs)))
