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
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from dsb_jax.distributions import to_blocks
from dsb_jax.layout import check_sizes, count_groups
from dsb_jax.methods import Static
from dsb_jax.methods.base import Method, check_method
from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.ops.convolution import add_bias, conv_general_dilated, convolve
from dsb_jax.ops.dispatch import A_DENSE_LAYER, Choice, check_implementation, record
from dsb_jax.ops.statistics import observe
from dsb_jax.paths import path_name
from dsb_jax.plan import SparsityPlan
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from dsb_jax.topology import LayerTopology, kernel_index
from pallas_kernels import ConvGeometry, matmul_geometry

WEIGHTS = "blocks"  # the name of the parameter, and of what belongs to it in other collections


def _name(layer: nn.Module) -> str:
    return path_name(layer.path) or "the layer"


def _planned(layer: "SparseDense | SparseConv", dense: LayerSpec) -> LayerSpec | None:
    """What the layer is to hold, in blocks, by its plan or its own arguments; None if it stays dense."""
    check_implementation(layer.implementation)
    given = [name for name in ("density", "num_blocks", "plan") if getattr(layer, name) is not None]
    where = _name(layer)
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
    if layer.density is not None and layer.density != 1:
        if not 0 < layer.density < 1:
            raise ValueError(f"density={layer.density} is not in (0, 1]; density is 1 - sparsity.")
        return at_density(dense, layer.density, layer.block_shape, layer.min_group_blocks)
    return None if layer.num_blocks is None else dense.with_blocks(layer.block_shape, layer.num_blocks)


def at_density(dense: LayerSpec, density: float, block_shape: tuple[int, int], min_group_blocks: int) -> LayerSpec:
    """A layer of a density, or of more if that leaves less than `min_group_blocks` blocks for each row group."""
    check_sizes(dense.shape, block_shape, 1)
    if min_group_blocks > 0:
        most = dense.in_ // block_shape[1]
        least = count_groups(dense.out, block_shape[0]) * min(min_group_blocks, most)
        density = max(density, dense.with_blocks(block_shape, least).density)
    (count,) = to_blocks([dense], [density], block_shape, min_group_blocks=min_group_blocks)
    return dense.with_blocks(block_shape, count)


def _weights(layer: Any, dense: LayerSpec) -> tuple[jax.Array, LayerTopology] | None:
    """The layer's parameter and topology, drawn by its method at initialization; None if the layer is dense."""
    if layer.has_variable("topology", WEIGHTS):
        # Read before an initializer is named: `Module.param` would trace it at every call.
        blocks, node = meta.unbox(layer.get_variable("params", WEIGHTS)), layer.get_variable("topology", WEIGHTS)
        if node.spec.shape != dense.shape:
            raise ValueError(
                f"{_name(layer)} holds a matrix of {node.spec.out} outputs x {node.spec.in_} inputs, but its features "
                f"and its input make it {dense.out} x {dense.in_}; pass the variables and the input of one model."
            )
        return blocks, node
    if layer.has_variable("params", WEIGHTS):
        raise ValueError(
            f"{_name(layer)} has sparse weights but no topology; pass all collections, "
            "model.apply(variables, ...), not the parameters alone."
        )
    planned = _planned(layer, dense)
    if planned is None:
        return None
    check_method(layer.method)
    spec = layer.method.stored(planned)
    key, draw_key = jax.random.split(layer.make_rng("params"))
    kernel = meta.unbox(layer.kernel_init(draw_key, dense.kernel_shape, layer.param_dtype))
    state = layer.method.init(key, dense.to_matrix(kernel), spec)
    node = LayerTopology(state.layout, state.aux, spec, kernel_index(state.layout, spec))
    blocks = layer.param(WEIGHTS, lambda _: state.blocks.astype(layer.param_dtype))
    return blocks, layer.variable("topology", WEIGHTS, lambda: node).value


def _computed_with(blocks: jax.Array, node: LayerTopology) -> jax.Array:
    return blocks if node.aux is None else node.aux.forward(blocks)


def _observed(layer: Any, y: jax.Array, x: jax.Array, node: LayerTopology, geometry: ConvGeometry) -> jax.Array:
    """y, seen by whoever measures a statistic of this layer."""
    if not layer.has_variable("statistics", WEIGHTS):
        return y
    zero: Any = layer.get_variable("statistics", WEIGHTS)
    if isinstance(layer, nn.Conv):
        return observe(y, x, zero, node.layout, geometry=geometry, feature_major=layer.feature_major)
    # A linear layer is a convolution over images of one pixel.
    flat_y, flat_x = (a[:, None, None, :] if layer.feature_major else a.reshape(-1, 1, 1, a.shape[-1]) for a in (y, x))
    seen = observe(flat_y, flat_x, zero, node.layout, geometry=geometry, feature_major=layer.feature_major)
    return seen.reshape(y.shape)


class SparseDense(nn.Dense):
    """`nn.Dense` with shuffled-block weights.

    Attributes (beside those of `nn.Dense`):
      density: fraction of the weights that exist, in (0, 1]; None for a dense layer.
      num_blocks: the number of blocks, instead of `density`.
      block_shape: `(R, C)`.
      plan: takes both from a `SparsityPlan` by the module's path, instead of `density`.
      implementation: "auto", "pallas", "triton", "xla", "dense" or "reference"; see `dsb_jax.ops.dispatch`.
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

    @nn.compact
    def __call__(self, inputs: Float[Array, "... in"]) -> Float[Array, "... out"]:
        in_features = inputs.shape[0 if self.feature_major else -1]
        weights = _weights(self, linear_spec(in_features, self.features))
        if weights is None:
            record(self.path, Choice.all("dense", A_DENSE_LAYER))
            y = super().__call__(inputs.T if self.feature_major else inputs)
            return y.T if self.feature_major else y
        if self.dot_general is not None or self.dot_general_cls is not None:
            raise NotImplementedError("dot_general cannot replace the shuffled-block product; leave it None.")
        blocks, node = _computed_with(*weights), weights[1]
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, blocks, bias = promote_dtype(inputs, blocks, bias, dtype=self.dtype)
        y = sparse_matmul(
            x,
            blocks,
            node.layout,
            bias=bias,
            implementation=self.implementation,
            feature_major=self.feature_major,
            precision=self.precision,
            kernel_index=node.index,
            path=self.path,
        )
        return _observed(self, y, x, node, matmul_geometry(in_features))


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

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch H W C"]) -> Float[Array, "*batch OH OW out"]:
        kernel_size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        channels = inputs.shape[0 if self.feature_major else -1]
        weights = _weights(self, conv_spec(kernel_size, channels // self.feature_group_count, self.features))
        if weights is None:
            record(self.path, Choice.all("dense", A_DENSE_LAYER))
            if not self.feature_major:
                return super().__call__(inputs)
            self._refuse_what_is_not_served(kernel_size)
            geometry, x = self._geometry(inputs, kernel_size, channels)
            kernel = self.param("kernel", self.kernel_init, (*kernel_size, channels, self.features), self.param_dtype)
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
            y = convolve(x, kernel, geometry=geometry, feature_major=True, precision=self.precision)
            return add_bias(y, bias, 0)
        self._refuse_what_is_not_served(kernel_size)
        geometry, x = self._geometry(inputs, kernel_size, channels)
        blocks, node = _computed_with(*weights), weights[1]
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, blocks, bias = promote_dtype(x, blocks, bias, dtype=self.dtype)
        lead = () if self.feature_major else x.shape[:-3]
        if not self.feature_major:
            x = x.reshape(-1, *x.shape[-3:])
        y = sparse_conv(
            x,
            blocks,
            node.layout,
            geometry=geometry,
            bias=bias,
            implementation=self.implementation,
            feature_major=self.feature_major,
            precision=self.precision,
            kernel_index=node.index,
            path=self.path,
        )
        y = _observed(self, y, x, node, geometry)
        return y if self.feature_major else y.reshape(*lead, *y.shape[1:])

    def _refuse_what_is_not_served(self, kernel_size: tuple[int, ...]) -> None:
        """NotImplementedError for arguments of nn.Conv that the sparse product has no answer to."""

        def ones(value: Any) -> bool:
            return value is None or all(v == 1 for v in (value if isinstance(value, tuple | list) else (value,)))

        for name, fine in (
            ("kernel_size", len(kernel_size) == 2),
            ("kernel_dilation", ones(self.kernel_dilation)),
            ("input_dilation", ones(self.input_dilation)),
            ("feature_group_count", self.feature_group_count == 1),
            ("mask", self.mask is None),
            (
                "conv_general_dilated",
                self.conv_general_dilated in (None, conv_general_dilated) and self.conv_general_dilated_cls is None,
            ),
        ):
            if not fine:
                raise NotImplementedError(
                    f"{name}={getattr(self, name)} of {_name(self)} has no sparse form (2-D, dilation 1, one "
                    "feature group); keep this layer dense."
                )

    def _geometry(self, x: jax.Array, kernel_size: tuple[int, ...], channels: int) -> tuple[ConvGeometry, jax.Array]:
        """Explicit strides and padding; circular and reflecting padding are applied to x here."""
        strides = self.strides if self.strides is not None else 1
        stride_h, stride_w = (strides, strides) if isinstance(strides, int) else strides
        first = 1 if self.feature_major else x.ndim - 3
        height, width = x.shape[first], x.shape[first + 1]
        padding: Any = self.padding
        if isinstance(padding, str) and padding in ("CIRCULAR", "REFLECT"):
            around = [(0, 0)] * x.ndim
            for axis, size in enumerate(kernel_size):
                around[first + axis] = ((size - 1) // 2, size // 2)
            x = jnp.pad(x, around, mode="wrap" if padding == "CIRCULAR" else "reflect")
            padding = "VALID"
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads((height, width), kernel_size, (stride_h, stride_w), padding)
        elif isinstance(padding, int):
            padding = [(padding, padding)] * 2
        pairs = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)
        geometry = ConvGeometry(channels, (kernel_size[0], kernel_size[1]), (stride_h, stride_w), (pairs[0], pairs[1]))
        return geometry, x
