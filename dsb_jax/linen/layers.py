"""`SparseDense` and `SparseConv`: subclasses of `nn.Dense` and `nn.Conv` with shuffled-block weights.

Every argument of the dense class means what it means there. Without `density`, `num_blocks` or `plan` the layer
*is* the dense one. With one of them, the parameter `kernel` gives way to

    params/.../blocks     float[num_blocks, R, C]   the weights that exist
    topology/.../layout   BlockLayout               where they are: integers, no gradient, carried beside

and, while the topology adapts, to a variable of the collection `probes` (see `dsb_jax.ops.statistics`).

Initial weights are drawn by `kernel_init` as for the dense kernel and scaled by sqrt(in / fan_in) of each row
group, so that a variance-scaling initializer sees the fan-in that each output really has.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from dsb_jax.distributions import LayerShape, to_blocks
from dsb_jax.layout import BlockLayout, block_group, pack, random_layout
from dsb_jax.linen.forward_set import forward_set
from dsb_jax.ops import choose, sparse_conv, sparse_matmul
from dsb_jax.ops.convolution import add_bias, conv_general_dilated, convolve
from dsb_jax.ops.dispatch import A_DENSE_LAYER, Choice, check_implementation, record
from dsb_jax.ops.statistics import observe
from dsb_jax.plan import SparsityPlan
from pallas_kernels import ConvGeometry, matmul_geometry


def _num_blocks(layer: "SparseDense | SparseConv", shape: LayerShape) -> tuple[int | None, tuple[int, int]]:
    """Number of blocks (None: dense) and block shape, by the plan or the layer's own arguments."""
    check_implementation(layer.implementation)
    given = [name for name in ("density", "num_blocks", "plan") if getattr(layer, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given for {'/'.join(layer.path)}; give one of them.")
    if layer.plan is not None and len(shape.kernel_size) not in (0, 2):
        return None, layer.block_shape  # plans know linear layers and 2-D convolutions
    if layer.plan is not None:
        planned = layer.plan[layer.path]
        if planned.shape != shape:
            raise ValueError(f"{'/'.join(layer.path)} is {shape}, but the plan was made for {planned.shape}.")
        return planned.num_blocks, layer.plan.block_shape
    if layer.density is not None and layer.density != 1:
        if not 0 < layer.density < 1:
            raise ValueError(f"density={layer.density} is not in (0, 1]; density is 1 - sparsity.")
        return to_blocks([shape], [layer.density], layer.block_shape)[0], layer.block_shape
    return layer.num_blocks, layer.block_shape


def _blocks_and_layout(
    layer: Any, shape: LayerShape, num_blocks: int, block_shape: tuple[int, int], channels: int
) -> tuple[jax.Array, BlockLayout]:
    """The layer's parameter and topology, drawn at initialization; the blocks as the layer computes with them."""
    matrix = (shape.out, shape.in_)
    if layer.store is not None:
        return _stored(layer, shape, num_blocks, channels)
    layout = layer.variable(
        "topology",
        "layout",
        lambda: layer.init_layout(layer.make_rng("params"), matrix, block_shape=block_shape, num_blocks=num_blocks),
    ).value

    def init(key: jax.Array) -> jax.Array:
        kernel = layer.kernel_init(key, (*shape.kernel_size, channels, shape.out), layer.param_dtype)
        fan_in = jnp.diff(layout.group_start)[block_group(layout)] * block_shape[1]
        blocks = pack(kernel.reshape(-1, shape.out).T, layout)  # phantom rows read zero
        return (blocks * jnp.sqrt(shape.in_ / fan_in)[:, None, None]).astype(layer.param_dtype)

    return layer.param("blocks", init), layout


def _stored(layer: Any, shape: LayerShape, num_active: int, channels: int) -> tuple[jax.Array, BlockLayout]:
    """As `_blocks_and_layout` for a layer that keeps more weights than it computes with (Top-KAST).

    All weights are drawn together, as dense ones, because their magnitudes decide on the first topology.
    """
    drawn: list[Any] = []

    def draw(key: jax.Array) -> Any:
        kernel = layer.kernel_init(key, (*shape.kernel_size, channels, shape.out), layer.param_dtype)
        return layer.store(kernel.reshape(-1, shape.out).T, num_active)

    if not layer.has_variable("topology", "layout"):
        drawn.append(draw(layer.make_rng("params")))
        for name, value in drawn[0][2].items():
            layer.variable("topology", name, lambda value=value: value)
    layout = layer.variable("topology", "layout", lambda: drawn[0][0]).value
    blocks = layer.param("blocks", lambda key: (drawn[0] if drawn else draw(key))[1])
    penalty = layer.exploration * (shape.size / num_active - 1)  # the optimizer's weight decay is the 1
    return forward_set(blocks, layer.get_variable("topology", "forward_mask"), penalty), layout


class SparseDense(nn.Dense):
    """`nn.Dense` with shuffled-block weights.

    Attributes (beside those of `nn.Dense`):
      density: fraction of the weights that exist, in (0, 1]; None for a dense layer.
      num_blocks: the number of blocks, instead of `density`.
      block_shape: `(R, C)`.
      plan: takes both from a `SparsityPlan` by the module's path, instead of `density`.
      implementation: "auto", "pallas", "triton", "xla", "dense" or "reference"; see `dsb_jax.ops.dispatch`.
      feature_major: inputs and outputs are [in, N] and [out, N].
      init_layout: `(key, shape, *, block_shape, num_blocks) -> BlockLayout`, the first topology.
      store: of a method that keeps more than the active weights, `Method.store`; instead of `init_layout`.
      exploration: with `store`, the weight decay of active weights, from which that of the others follows.
    """

    density: float | None = None
    num_blocks: int | None = None
    block_shape: tuple[int, int] = (16, 16)
    plan: SparsityPlan | None = None
    implementation: str = "auto"
    feature_major: bool = False
    init_layout: Callable[..., BlockLayout] = random_layout
    store: Callable[..., Any] | None = None
    exploration: float = 0.0

    @nn.compact
    def __call__(self, inputs: Float[Array, "... in"]) -> Float[Array, "... out"]:
        in_features = inputs.shape[0 if self.feature_major else -1]
        shape = LayerShape(out=self.features, in_=in_features, kernel_size=())
        num_blocks, block_shape = _num_blocks(self, shape)
        if num_blocks is None:
            record(self.path, Choice("dense", A_DENSE_LAYER))
            y = super().__call__(inputs.T if self.feature_major else inputs)
            return y.T if self.feature_major else y
        if self.dot_general is not None or self.dot_general_cls is not None:
            raise NotImplementedError("dot_general cannot replace the shuffled-block product; leave it None.")
        blocks, layout = _blocks_and_layout(self, shape, num_blocks, block_shape, in_features)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, blocks, bias = promote_dtype(inputs, blocks, bias, dtype=self.dtype)
        choice = choose(
            self.implementation,
            layout,
            geometry=matmul_geometry(in_features),
            input_size=(1, 1),
            batch=x.size // in_features,
            dtype=x.dtype,
            precision=self.precision,
        )
        record(self.path, choice)
        y = sparse_matmul(
            x, blocks, layout, bias=bias, implementation=choice.implementation, feature_major=self.feature_major,
            precision=self.precision, tiles=choice.tiles,
        )  # fmt: skip
        if self.has_variable("probes", "statistic"):
            flat_y, flat_x = (a if self.feature_major else a.reshape(-1, a.shape[-1]).T for a in (y, x))
            flat_y = observe(
                flat_y[:, None, None, :], flat_x[:, None, None, :], self.get_variable("probes", "statistic"), layout,
                geometry=matmul_geometry(in_features), feature_major=True,
            )[:, 0, 0, :]  # fmt: skip
            y = flat_y if self.feature_major else flat_y.T.reshape(y.shape)
        return y


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
    init_layout: Callable[..., BlockLayout] = random_layout
    store: Callable[..., Any] | None = None
    exploration: float = 0.0
    conv_general_dilated: Any = staticmethod(conv_general_dilated)  # of a layer that stays dense

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch H W C"]) -> Float[Array, "*batch OH OW out"]:
        kernel_size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        channels = inputs.shape[0 if self.feature_major else -1]
        in_features = channels
        for size in kernel_size:
            in_features *= size
        shape = LayerShape(out=self.features, in_=in_features // self.feature_group_count, kernel_size=kernel_size)
        num_blocks, block_shape = _num_blocks(self, shape)
        if num_blocks is None:
            record(self.path, Choice("dense", A_DENSE_LAYER))
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
        blocks, layout = _blocks_and_layout(self, shape, num_blocks, block_shape, channels)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, blocks, bias = promote_dtype(x, blocks, bias, dtype=self.dtype)
        lead = () if self.feature_major else x.shape[:-3]
        if not self.feature_major:
            x = x.reshape(-1, *x.shape[-3:])
        input_size, batch = (x.shape[1], x.shape[2]), x.shape[3 if self.feature_major else 0]
        choice = choose(
            self.implementation, layout, geometry=geometry, input_size=input_size, batch=batch, dtype=x.dtype,
            precision=self.precision,
        )  # fmt: skip
        record(self.path, choice, x.size + self.features * math.prod(geometry.output_size(*input_size)) * batch)
        y = sparse_conv(
            x, blocks, layout, geometry=geometry, bias=bias, implementation=choice.implementation,
            feature_major=self.feature_major, precision=self.precision, tiles=choice.tiles,
        )  # fmt: skip
        if self.has_variable("probes", "statistic"):
            statistic: Any = self.get_variable("probes", "statistic")
            y = observe(y, x, statistic, layout, geometry=geometry, feature_major=self.feature_major)
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
                    f"{name}={getattr(self, name)} of {'/'.join(self.path)} has no sparse form (2-D, dilation 1, one "
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
