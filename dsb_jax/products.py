"""What a sparse layer computes in place of the dense one, for layers of either Flax API.

A face hands over what the dense layer's attributes say (`Call`), the weights as they are stored, and the bias. Here
are the shapes in between, the geometry of a convolution, and what a layer observes while a statistic is measured.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsb_jax.equations import Equation
from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.ops.convolution import add_bias, convolve
from dsb_jax.ops.statistics import Zero, observe
from dsb_jax.refusals import as_tuple
from dsb_jax.topology import LayerTopology
from pallas_kernels import ConvGeometry, matmul_geometry


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


class Call(NamedTuple):
    """What a product must know of the layer that it stands for.

    Attributes:
      name: of the layer, in messages.
      path: under which the choice of an implementation is noted.
      promote: `(x, blocks, bias)` -> the same in the dtype of the computation; a bias of None stays None.
      precision: as in `jax.lax.dot`.
    """

    name: str
    path: tuple[str, ...]
    promote: Callable[..., Any]
    precision: Any


def linear(
    call: Call, x: jax.Array, weights: Weights, bias: jax.Array | None, *, out: int, feature_major: bool = False
) -> jax.Array:
    """x[..., in] -> [..., out], or [in, N] -> [out, N] if `feature_major`; `out` is what the dense layer has."""
    check_sizes(call, weights.node, (out, x.shape[0 if feature_major else -1]))
    x, blocks, bias = call.promote(x, weights.computed_with, bias)
    y = sparse_matmul(
        x, blocks, weights.node.layout, bias=bias, implementation=weights.implementation, feature_major=feature_major,
        precision=call.precision, kernel_index=weights.node.index, path=call.path,
    )  # fmt: skip
    if weights.zero is None:
        return y
    # A linear layer is a convolution over images of one pixel.
    flat_y, flat_x = (a[:, None, None, :] if feature_major else a.reshape(-1, 1, 1, a.shape[-1]) for a in (y, x))
    geometry = matmul_geometry(weights.node.spec.in_)
    seen = observe(flat_y, flat_x, weights.zero, weights.node.layout, geometry=geometry, feature_major=feature_major)
    return seen.reshape(y.shape)


def general(
    call: Call, x: jax.Array, weights: Weights, bias: jax.Array | None, *, axis: Any, features: Any
) -> jax.Array:
    """The contraction of some axes of x with all of them in the kernel; the others stay in front, in their order."""
    axes, features = as_tuple(axis), as_tuple(features)
    last = tuple(range(x.ndim - len(axes), x.ndim))
    x = jnp.moveaxis(x, axes, last)
    rest, sizes = x.shape[: last[0]], x.shape[last[0] :]
    flat_bias = None if bias is None else bias.reshape(-1)
    y = linear(call, x.reshape(*rest, math.prod(sizes)), weights, flat_bias, out=math.prod(features))
    return y.reshape(*rest, *features)


def einsum(
    call: Call, x: jax.Array, weights: Weights, bias: jax.Array | None,
    *, equation: Equation, kernel_shape: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """The result of an equation that is a matrix product; `kernel_shape` is that of the dense layer."""
    sizes = tuple(kernel_shape[equation.kernel.index(letter)] for letter in equation.features)
    flat_bias = None if bias is None else bias.reshape(-1)
    return equation.product(x, sizes, lambda x: linear(call, x, weights, flat_bias, out=math.prod(sizes)))


def convolution(
    call: Call, x: jax.Array, weights: Weights, bias: jax.Array | None,
    *, out: int, kernel_size: Any, strides: Any, padding: Any, feature_major: bool = False,
) -> jax.Array:  # fmt: skip
    """x[..., H, W, C] -> [..., OH, OW, out], or [C, H, W, N] -> [out, OH, OW, N] if `feature_major`."""
    channels = x.shape[0 if feature_major else -1]
    check_sizes(call, weights.node, (out, math.prod(as_tuple(kernel_size)) * channels))
    geometry, x = conv_geometry(x, kernel_size, strides, padding, feature_major=feature_major)
    x, blocks, bias = call.promote(x, weights.computed_with, bias)
    lead = x.shape[:-3]
    if not feature_major:
        x = x.reshape(-1, *x.shape[-3:])
    y = sparse_conv(
        x, blocks, weights.node.layout, geometry=geometry, bias=bias, implementation=weights.implementation,
        feature_major=feature_major, precision=call.precision, kernel_index=weights.node.index, path=call.path,
    )  # fmt: skip
    if weights.zero is not None:
        y = observe(y, x, weights.zero, weights.node.layout, geometry=geometry, feature_major=feature_major)
    return y if feature_major else y.reshape(*lead, *y.shape[1:])


def feature_major_convolution(
    call: Call, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, strides: Any, padding: Any
) -> jax.Array:
    """That of a layer which stays dense: x[C, H, W, N], kernel[kh, kw, C, out] -> [out, OH, OW, N]."""
    geometry, x = conv_geometry(x, kernel.shape[:2], strides, padding, feature_major=True)
    x, kernel, bias = call.promote(x, kernel, bias)
    y = convolve(x, kernel, geometry=geometry, feature_major=True, precision=call.precision)
    return add_bias(y, bias, 0)


def check_sizes(call: Call, node: LayerTopology, shape: tuple[int, int]) -> None:
    """Raises ValueError if a layer and its input are not of the topology's sizes."""
    if node.spec.shape != shape:
        raise ValueError(
            f"{call.name} holds a matrix of {node.spec.out} outputs x {node.spec.in_} inputs, but its features and its "
            f"input make it {shape[0]} x {shape[1]}; pass the variables and the input of one model."
        )


def conv_geometry(
    x: jax.Array, kernel_size: Any, strides: Any, padding: Any, *, feature_major: bool = False
) -> tuple[ConvGeometry, jax.Array]:
    """Explicit strides and padding of a 2-D convolution; circular and reflecting padding are applied to x here.

    Args:
      x: [..., H, W, C], or [C, H, W, N] if `feature_major`.
      kernel_size, strides, padding: in any form that `nn.Conv` takes.
      feature_major: the order of x.
    """
    kernel_size = as_tuple(kernel_size)
    strides = (1, 1) if strides is None else as_tuple(strides)
    stride_h, stride_w = strides * 2 if len(strides) == 1 else strides
    first = 1 if feature_major else x.ndim - 3
    size = (x.shape[first], x.shape[first + 1])
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
