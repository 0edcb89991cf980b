"""Floating-point operations of training and inference relative to the dense model, by the accounting of the field.

Evci et al., "Rigging the Lottery", ICML 2020, appendix H: a linear layer or convolution of density d, in units of its
dense forward product, takes per training step

    forward          d
    input gradient   d
    weight gradient  d; Top-KAST has d + M/N (Jayakumar et al. 2020: more weights have a gradient)

of which the dense model takes 1 + 1 + 1. An adaptation runs on `adapt_batch_size` images of a batch, every
`update_interval` steps until `update_end_step`, and is spread over all steps. It takes by what the method measures

    nothing (SET, random growth)             0           the batch is not looked at
    `norm`                                   2 d         a forward pass and the input gradients
    `block_gradient`, `gradient` (RigL)      2 d + 1     and one product of the size of the dense weight gradient

Deviations from the paper: RigL there adapts *instead of* training in that step, here besides. Not counted, as usual:
normalization, activations, biases, the optimizer, the choice of positions (sorting), and that the first layer needs no
input gradient. A ratio of operations is no speed: that is measured (`experiments.benchmark_training`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.distributions import LayerShape
from dsb_jax.methods.schedule import update_due
from dsb_jax.plan import Path, SparsityPlan, find_layers

# Products of the size of the dense weight gradient that a statistic of `dsb_jax.ops.statistics` takes.
STATISTIC_PRODUCTS = {"norm": 0.0, "block_gradient": 1.0, "gradient": 1.0}


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


def find_positions(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[dict[Path, int], Any]:
    """Where the linear layers and convolutions of a model are applied, seen while it is traced.

    Args:
      model: `__call__(x[N, H, W, C])`, of any class of layers in any order of activations.
      image_shape: `(H, W, C)`.

    Returns:
      Path -> outputs of one image over output features: height * width of a convolution's output, 1 for the classifier;
      summed if a layer is called more than once. And the shapes of the model's parameters.
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

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(watch):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return found, variables["params"]


def count_dense(layers: Mapping[Path, LayerShape], positions: Mapping[Path, int]) -> dict[Path, LayerFlops]:
    """Every layer with all of its weights."""
    sizes = {path: float(shape.size * positions[path]) for path, shape in layers.items()}
    return {path: LayerFlops(size, size, size, size) for path, size in sizes.items()}


def count_sparse(
    plan: SparsityPlan,
    positions: Mapping[Path, int],
    *,
    statistic: str | None = None,
    adapt_share: float = 0.0,
    backward_factor: float = 1.0,
) -> dict[Path, LayerFlops]:
    """Every layer of a plan with the weights that it stores.

    Args:
      plan: gives sizes and densities.
      positions: as `find_positions` gives them.
      statistic: what adaptations measure, a name of `STATISTIC_PRODUCTS`; None for nothing.
      adapt_share: images that adaptations run on over images trained on, see `share_of_adaptations`.
      backward_factor: weights that have a gradient over active ones, more than 1 for Top-KAST.

    Raises:
      ValueError: if a share is not in [0, 1], or the statistic is unknown.
    """
    if not 0 <= adapt_share <= 1:
        raise ValueError(f"adapt_share={adapt_share} is not a share; give 0 to 1.")
    if not backward_factor >= 1:
        raise ValueError(f"backward_factor={backward_factor} is below 1; active weights have a gradient.")
    if statistic is not None and statistic not in STATISTIC_PRODUCTS:
        raise ValueError(f"statistic={statistic!r} is unknown; choose one of {', '.join(STATISTIC_PRODUCTS)}.")
    counted = {}
    for layer in plan.layers:
        dense = float(layer.shape.size * positions[layer.path])
        density = plan.num_active(layer) / layer.shape.size
        sparse = layer.num_blocks is not None
        gradient = min(1.0, density * backward_factor) if sparse else 1.0
        adaptation = 0.0
        if statistic is not None:
            adaptation = adapt_share * (2 * density + (STATISTIC_PRODUCTS[statistic] if sparse else 0.0))
        counted[layer.path] = LayerFlops(
            dense, density * dense, density * dense, gradient * dense, adaptation * dense
        )  # fmt: skip
    return counted


def share_of_adaptations(
    *, total_steps: int, update_interval: int, update_end_step: int, batch_size: int, adapt_batch_size: int
) -> float:
    """Images that the adaptations of a run measure on, over the images it trains on."""
    due = sum(
        update_due(step, update_interval=update_interval, update_end_step=update_end_step)
        for step in range(min(total_steps, update_end_step))
    )
    return due / total_steps * min(adapt_batch_size, batch_size) / batch_size


def compare(own: Mapping[Path, LayerFlops], dense: Mapping[Path, LayerFlops]) -> dict[str, float]:
    """`train_ratio` and `inference_ratio` of a whole model against the dense one, which may have other layers."""
    return {
        "train_ratio": math.fsum(layer.train for layer in own.values()) / sum(layer.train for layer in dense.values()),
        "inference_ratio": math.fsum(layer.forward for layer in own.values())
        / math.fsum(layer.forward for layer in dense.values()),
    }


def measure(
    model: nn.Module, plan: SparsityPlan | None, reference: nn.Module, image_shape: tuple[int, int, int], **costs: Any
) -> dict[str, float]:
    """The two ratios of a model, sparse by its plan or dense without one, against a dense reference.

    Args:
      model: may be narrower than the reference (`small_dense`).
      plan: of the model.
      reference: the dense model that 1 stands for.
      image_shape: `(H, W, C)`.
      **costs: of `count_sparse`.
    """
    positions, params = find_positions(model, image_shape)
    own = count_dense(find_layers(params), positions) if plan is None else count_sparse(plan, positions, **costs)
    positions, params = find_positions(reference, image_shape)
    return compare(own, count_dense(find_layers(params), positions))
