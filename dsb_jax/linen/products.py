"""What a sparse layer computes, from the attributes of the Flax module that it stands for.

`SparseDense` and `SparseConv` call these, and so do `nn.Dense`, `nn.Conv` and `nn.DenseGeneral` in a model that
`sparsify` made sparse. A module gives its sizes, dtype, precision and path; weights and bias come as they are stored.
"""

import math
from typing import Any, NamedTuple

import flax.linen.module
import jax
import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.ops.convolution import conv_general_dilated
from dsb_jax.ops.statistics import Zero, observe
from dsb_jax.paths import path_name
from dsb_jax.topology import LayerTopology
from pallas_kernels import ConvGeometry, matmul_geometry

REWRITE_KERNELS = (nn.WeightNorm, nn.SpectralNorm)


class Weights(NamedTuple):
    """The weights of one sparse layer.

    Attributes:
      blocks: the parameter, float[num_blocks, R, C].
      node: where they lie.
      zero: what a statistic is observed with, or None.
      implementation: of the product, see `dsb_jax.ops.dispatch`.
    """

    blocks: jax.Array
    node: LayerTopology
    zero: Zero | None
    implementation: str

    @property
    def computed_with(self) -> jax.Array:
        """The blocks as the layer's method lets it read them."""
        return self.blocks if self.node.aux is None else self.node.aux.forward(self.blocks)


def linear(
    module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None,
    *, feature_major: bool = False,
) -> jax.Array:  # fmt: skip
    """x[..., in] -> [..., out], or [in, N] -> [out, N] if `feature_major`."""
    check_spec(module, weights.node, (weights.node.spec.out, x.shape[0 if feature_major else -1]))
    x, blocks, bias = module.promote_dtype(x, weights.computed_with, bias, dtype=module.dtype)
    y = sparse_matmul(
        x, blocks, weights.node.layout, bias=bias, implementation=weights.implementation, feature_major=feature_major,
        precision=module.precision, kernel_index=weights.node.index, path=module.path,
    )  # fmt: skip
    if weights.zero is None:
        return y
    # A linear layer is a convolution over images of one pixel.
    flat_y, flat_x = (a[:, None, None, :] if feature_major else a.reshape(-1, 1, 1, a.shape[-1]) for a in (y, x))
    geometry = matmul_geometry(weights.node.spec.in_)
    seen = observe(flat_y, flat_x, weights.zero, weights.node.layout, geometry=geometry, feature_major=feature_major)
    return seen.reshape(y.shape)


def general(module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None) -> jax.Array:
    """The contraction of some axes of x with all of them in the kernel; the others stay in front, in their order."""
    axes, features = (as_tuple(value) for value in (module.axis, module.features))
    last = tuple(range(x.ndim - len(axes), x.ndim))
    x = jnp.moveaxis(x, axes, last)
    rest, sizes = x.shape[: last[0]], x.shape[last[0] :]
    check_spec(module, weights.node, (math.prod(features), math.prod(sizes)))
    flat_bias = None if bias is None else bias.reshape(-1)
    return linear(module, x.reshape(*rest, math.prod(sizes)), weights, flat_bias).reshape(*rest, *features)


def convolution(
    module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None, *, feature_major: bool = False
) -> jax.Array:
    """x[..., H, W, C] -> [..., OH, OW, out], or [C, H, W, N] -> [out, OH, OW, N] if `feature_major`."""
    kernel_size = as_tuple(module.kernel_size)
    channels = x.shape[0 if feature_major else -1]
    check_spec(module, weights.node, (module.features, math.prod(kernel_size) * channels))
    geometry, x = conv_geometry(module, x, feature_major=feature_major)
    x, blocks, bias = module.promote_dtype(x, weights.computed_with, bias, dtype=module.dtype)
    lead = x.shape[:-3]
    if not feature_major:
        x = x.reshape(-1, *x.shape[-3:])
    y = sparse_conv(
        x, blocks, weights.node.layout, geometry=geometry, bias=bias, implementation=weights.implementation,
        feature_major=feature_major, precision=module.precision, kernel_index=weights.node.index, path=module.path,
    )  # fmt: skip
    if weights.zero is not None:
        y = observe(y, x, weights.zero, weights.node.layout, geometry=geometry, feature_major=feature_major)
    return y if feature_major else y.reshape(*lead, *y.shape[1:])


def check_spec(module: Any, node: LayerTopology, shape: tuple[int, int]) -> None:
    """Raises ValueError if the layer and its input are not of the topology's sizes."""
    if node.spec.shape != shape:
        raise ValueError(
            f"{layer_name(module)} holds a matrix of {node.spec.out} outputs x {node.spec.in_} inputs, but its "
            f"features and its input make it {shape[0]} x {shape[1]}; pass the variables and the input of one model."
        )


def layer_name(module: nn.Module) -> str:
    """The path of a module as text, for messages."""
    return path_name(module.path) or "the layer"


def without_topology(module: nn.Module) -> str:
    """What is wrong with variables whose topology was left behind."""
    return (
        f"{layer_name(module)} has sparse weights but no topology; pass all collections, model.apply(variables, ...), "
        "not the parameters alone."
    )


def as_tuple(value: Any) -> tuple[int, ...]:
    """Sizes or axes that Flax also takes as one number."""
    return (value,) if isinstance(value, int) else tuple(value)


def unserved(module: nn.Dense | nn.DenseGeneral | nn.Conv) -> str | None:
    """The first attribute of a module that the sparse product has no answer to, as `name=value`; None if it has."""

    def ones(value: Any) -> bool:
        return value is None or all(v == 1 for v in as_tuple(value))

    if isinstance(module, nn.Conv):
        served = {
            "kernel_size": len(as_tuple(module.kernel_size)) == 2,
            "kernel_dilation": ones(module.kernel_dilation),
            "input_dilation": ones(module.input_dilation),
            "feature_group_count": module.feature_group_count == 1,
            "mask": module.mask is None,
            "conv_general_dilated": module.conv_general_dilated in (None, conv_general_dilated),
            "conv_general_dilated_cls": module.conv_general_dilated_cls is None,
        }
    else:
        served = {"dot_general": module.dot_general is None, "dot_general_cls": module.dot_general_cls is None}
    if isinstance(module, nn.DenseGeneral):
        served["batch_dims"] = not as_tuple(module.batch_dims)
    return next((f"{name}={_shown(getattr(module, name))}" for name, fine in served.items() if not fine), None)


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or (f"an array {value.shape}" if hasattr(value, "shape") else str(value))


def refuse_normalized(module: nn.Module) -> None:
    """NotImplementedError inside of a wrapper that rewrites kernels: blocks are none, so it would do nothing."""
    for outer in flax.linen.module._context.module_stack:
        if isinstance(outer, REWRITE_KERNELS):
            raise NotImplementedError(
                f"{type(outer).__name__} cannot normalize {layer_name(module)}, whose weights are sparse; keep this "
                "layer dense."
            )


def refuse_unserved(module: nn.Dense | nn.Conv) -> None:
    """NotImplementedError for a module with an attribute that the sparse product has no answer to."""
    if why := unserved(module):
        raise NotImplementedError(
            f"{why} of {layer_name(module)} has no sparse form (2-D, dilation 1, one feature group, the product of "
            "this library); keep this layer dense."
        )


def conv_geometry(module: nn.Conv, x: jax.Array, *, feature_major: bool = False) -> tuple[ConvGeometry, jax.Array]:
    """Explicit strides and padding of a 2-D convolution; circular and reflecting padding are applied to x here."""
    kernel_size = as_tuple(module.kernel_size)
    strides = (1, 1) if module.strides is None else as_tuple(module.strides)
    stride_h, stride_w = strides * 2 if len(strides) == 1 else strides
    first = 1 if feature_major else x.ndim - 3
    size = (x.shape[first], x.shape[first + 1])
    padding: Any = module.padding
    if isinstance(padding, str) and padding in ("CIRCULAR", "REFLECT"):
        around = [(0, 0)] * x.ndim
        for axis, width in enumerate(kernel_size):
            around[first + axis] = ((width - 1) // 2, width // 2)
        x = jnp.pad(x, around, mode="wrap" if padding == "CIRCULAR" else "reflect")
        padding = "VALID"
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(size, kernel_size, (stride_h, stride_w), padding)
    elif isinstance(padding, int):
        padding = [(padding, padding)] * 2
    pairs = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)
    channels = x.shape[0 if feature_major else -1]
    geometry = ConvGeometry(channels, (kernel_size[0], kernel_size[1]), (stride_h, stride_w), (pairs[0], pairs[1]))
    return geometry, x
