"""`SparseDense` and `SparseConv`: subclasses of `nn.Dense` and `nn.Conv` with shuffled-block weights.

Every argument of the dense class means what it means there. Without `density`, `num_blocks` or `plan` the layer
*is* the dense one. With one of them, the parameter `kernel` gives way to

    params/.../blocks        float[num_blocks, R, C]   the weights that exist
    topology/.../blocks      LayerTopology             where they are: integers, no gradient, carried beside

and, while the topology adapts, to a zero in the collection `statistics` (see `dsb_jax.ops.statistics`).

The arguments decide at initialization alone; after that a layer reads its sizes from its topology, whose number of
blocks may change between the stages of a training. How a layer begins and what it stores is up to its method.
"""

from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Float

from dsb_jax.boxes import boxed_as, unboxed
from dsb_jax.distributions import by_arguments
from dsb_jax.initialization import initialize
from dsb_jax.linen.products import (
    convolution,
    feature_major_convolution,
    layer_name,
    linear,
    refuse_normalized,
    without_topology,
)
from dsb_jax.methods import Static
from dsb_jax.methods.base import Method, check_method
from dsb_jax.ops.convolution import conv_general_dilated
from dsb_jax.ops.dispatch import A_DENSE_LAYER, Choice, check_implementation, record
from dsb_jax.paths import WEIGHTS
from dsb_jax.plan import SparsityPlan
from dsb_jax.products import Weights
from dsb_jax.refusals import as_tuple, refuse_unserved
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec


@property  # type: ignore[misc]
def _has_weights_of_its_own(layer: "SparseDense | SparseConv") -> bool:
    """Whether its arguments alone make it sparse; else it is dense, and `sparsify` may make it sparse by a plan."""
    return any(value is not None for value in (layer.density, layer.num_blocks, layer.plan))


def _planned(layer: "SparseDense | SparseConv", dense: LayerSpec) -> LayerSpec | None:
    """What the layer is to hold, in blocks, by its plan or its own arguments; None if it stays dense."""
    check_implementation(layer.implementation)
    given = [name for name in ("density", "num_blocks", "plan") if getattr(layer, name) is not None]
    where = layer_name(layer)
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given for {where}; give one of them.")
    if layer.plan is not None:
        if len(dense.kernel_size) not in (0, 2):
            return None  # plans know linear layers and 2-D convolutions
        planned = layer.plan[layer.path]
        sizes = layer.plan.sizes[layer.path]
        if sizes.kernel_shape != dense.kernel_shape:
            raise ValueError(
                f"{where} has a kernel of {dense.kernel_shape}, but its plan was made for {sizes.kernel_shape}."
            )
        return planned if isinstance(planned, LayerSpec) else None
    return by_arguments(
        dense, density=layer.density, num_blocks=layer.num_blocks, block_shape=layer.block_shape,
        min_group_blocks=layer.min_group_blocks,
    )  # fmt: skip


def _weights(layer: Any, dense: LayerSpec) -> Weights | None:
    """The layer's parameter and topology, drawn by its method at initialization; None if the layer is dense."""
    if layer.has_variable("topology", WEIGHTS):
        # Read before an initializer is named: `Module.param` would trace it at every call.
        blocks, node = meta.unbox(layer.get_variable("params", WEIGHTS)), layer.get_variable("topology", WEIGHTS)
        return Weights(blocks, node, layer.get_variable("statistics", WEIGHTS), layer.implementation)
    if layer.has_variable("params", WEIGHTS):
        raise ValueError(without_topology(layer))
    planned = _planned(layer, dense)
    if planned is None:
        return None
    refuse_normalized(layer)
    check_method(layer.method)
    key, draw_key = jax.random.split(layer.make_rng("params"))
    kernel = layer.kernel_init(draw_key, dense.kernel_shape, layer.param_dtype)
    (state,) = initialize(layer.method, key, {(): unboxed(kernel)}, {(): planned}).values()
    blocks = layer.param(WEIGHTS, lambda _: boxed_as(kernel, state[0], ()))
    return Weights(blocks, layer.variable("topology", WEIGHTS, lambda: state[1]).value, None, layer.implementation)


class SparseDense(nn.Dense):
    """`nn.Dense` with shuffled-block weights.

    Attributes (beside those of `nn.Dense`):
      density: fraction of the weights that exist, in (0, 1]; None for a dense layer.
      num_blocks: the number of blocks, instead of `density`.
      block_shape: `(R, C)`.
      plan: takes both from a `SparsityPlan` by the module's path, instead of `density`.
      implementation: one of `dsb_jax.ops.IMPLEMENTATIONS`; see `dsb_jax.ops.dispatch`.
      feature_major: inputs and outputs are [in, N] and [out, N].
      method: how the layer begins and what it stores; by default shuffled blocks, which `DSB` adapts.
      min_group_blocks: blocks that each row group has at the least, with `density`; 0 lets outputs be without weights.
    """

    density: float | None = None
    num_blocks: int | None = None
    block_shape: tuple[int, int] = (16, 16)
    plan: SparsityPlan | None = None
    implementation: str = "auto"
    feature_major: bool = False
    method: Method = Static()
    min_group_blocks: int = 1
    has_weights_of_its_own = _has_weights_of_its_own

    @nn.compact
    def __call__(self, inputs: Float[Array, "... in"]) -> Float[Array, "... out"]:
        in_features = inputs.shape[0 if self.feature_major else -1]
        weights = _weights(self, linear_spec(in_features, self.features))
        if weights is None:
            record(self.path, Choice.all("dense", A_DENSE_LAYER))
            y = super().__call__(inputs.T if self.feature_major else inputs)
            return y.T if self.feature_major else y
        refuse_unserved(self, layer_name(self))
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return linear(self, inputs, weights, bias, feature_major=self.feature_major)


class SparseConv(nn.Conv):
    """`nn.Conv` with shuffled-block weights: 2-D, any kernel size, stride and padding, dilation 1, one group.

    Attributes (beside those of `nn.Conv`): as in `SparseDense`; `feature_major` activations are [C, H, W, N].
    """

    density: float | None = None
    num_blocks: int | None = None
    block_shape: tuple[int, int] = (16, 16)
    plan: SparsityPlan | None = None
    implementation: str = "auto"
    feature_major: bool = False
    method: Method = Static()
    min_group_blocks: int = 1
    conv_general_dilated: Any = staticmethod(conv_general_dilated)  # of a layer that stays dense
    has_weights_of_its_own = _has_weights_of_its_own

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch H W C"]) -> Float[Array, "*batch OH OW out"]:
        kernel_size = as_tuple(self.kernel_size)
        channels = inputs.shape[0 if self.feature_major else -1]
        weights = _weights(self, conv_spec(kernel_size, channels // self.feature_group_count, self.features))
        if weights is None:
            record(self.path, Choice.all("dense", A_DENSE_LAYER))
            if not self.feature_major:
                return super().__call__(inputs)
            refuse_unserved(self, layer_name(self))
            kernel = self.param("kernel", self.kernel_init, (*kernel_size, channels, self.features), self.param_dtype)
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
            return feature_major_convolution(self, inputs, kernel, bias)
        refuse_unserved(self, layer_name(self))
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return convolution(self, inputs, weights, bias, feature_major=self.feature_major)
