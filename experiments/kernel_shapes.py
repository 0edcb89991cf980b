"""The layer shapes that kernels are measured at: written by hand, square matrices, or the layers of a model.

    4096x4096x8192            a matrix: out x in, times [in, N]; here N = 8192
    512x512x3x3@4x4x512       a convolution: out x channels x kernel, at image height x width x N
    128x64x3x3/2@32x32x512    the same with stride 2

Convolutions are padded as the models of this library pad: with stride 1, height and width stay as they are.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.distributions import to_blocks
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from dsb_jax.training import models
from dsb_jax.training.config import KEEP_DENSE
from pallas_kernels import ConvGeometry, matmul_geometry

IMAGE_SIZE = 32  # of the CIFAR models
VIT_TOKENS = 197  # ViT-B/16 at 224x224: 14 * 14 patches and the class token
VIT_LAYERS = {"attention": (768, 768), "mlp_in": (3072, 768), "mlp_out": (768, 3072)}  # (out, in)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer at one input; equal sizes are equal whatever their names.

    Attributes:
      out: output features.
      geometry: input channels, kernel size, strides, padding; of a matrix: `matmul_geometry(in)`.
      input_size: height and width of the input; (1, 1) for a matrix.
      batch: N, the innermost size of the feature-major input `[C, H, W, N]`.
      names: where the layer comes from, such as `resnet18/block_0_0/conv_0`.
    """

    out: int
    geometry: ConvGeometry
    input_size: tuple[int, int]
    batch: int
    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def is_matmul(self) -> bool:
        return self.geometry.is_matmul(self.input_size)

    @property
    def in_features(self) -> int:
        return self.geometry.in_features

    @property
    def output_size(self) -> tuple[int, int]:
        return self.geometry.output_size(*self.input_size)

    @property
    def positions(self) -> int:
        """Output positions that every weight meets: OH * OW * N."""
        return math.prod(self.output_size) * self.batch

    @property
    def input_elements(self) -> int:
        return self.geometry.in_channels * math.prod(self.input_size) * self.batch

    @property
    def output_elements(self) -> int:
        return self.out * self.positions

    @property
    def spec(self) -> LayerSpec:
        """The dense layer."""
        if self.is_matmul:
            return linear_spec(self.in_features, self.out)
        return conv_spec(self.geometry.kernel_size, self.geometry.in_channels, self.out)

    def num_blocks(self, sparsity: float, block_shape: tuple[int, int]) -> int:
        """Blocks at a sparsity.

        Raises:
          ValueError: if the block or the sparsity does not fit the layer.
        """
        (count,) = to_blocks([self.spec], [1 - sparsity], [block_shape])
        return count

    def call(self, sparsity: float, block_shape: tuple[int, int], dtype: str) -> LayerCall:
        """The layer in blocks, as "auto" sees it; ValueError as in `num_blocks`."""
        return LayerCall.of(
            self.out,
            self.geometry,
            block_shape=block_shape,
            num_blocks=self.num_blocks(sparsity, block_shape),
            input_size=self.input_size,
            batch=self.batch,
            dtype=dtype,
        )

    def __str__(self) -> str:
        """The text that `parse_layer` reads, if the padding is that of the models."""
        if self.is_matmul:
            return f"{self.out}x{self.in_features}x{self.batch}"
        (kernel_h, kernel_w), (height, width) = self.geometry.kernel_size, self.input_size
        stride = "" if self.geometry.strides == (1, 1) else f"/{self.geometry.strides[0]}"
        sizes = f"{self.out}x{self.geometry.in_channels}x{kernel_h}x{kernel_w}{stride}"
        return f"{sizes}@{height}x{width}x{self.batch}"


def matmul_layer(out: int, in_features: int, batch: int, *names: str) -> Layer:
    """`W[out, in] @ X[in, N]`."""
    return Layer(out, matmul_geometry(in_features), (1, 1), batch, names)


def parse_layer(text: str) -> Layer:
    """A layer from the text of a flag; the module docstring has the two forms.

    Raises:
      ValueError: if the text is neither, or its sizes make no layer.
    """
    size = r"([1-9]\d*)"
    if match := re.fullmatch(f"{size}x{size}x{size}", text.strip()):
        out, in_features, batch = (int(part) for part in match.groups())
        return matmul_layer(out, in_features, batch)
    match = re.fullmatch(f"{size}x{size}x{size}x{size}(?:/{size})?@{size}x{size}x{size}", text.strip())
    if not match:
        raise ValueError(
            f"shapes: {text!r} is neither out x in x N, as in 4096x4096x8192, nor out x channels x kernel height x "
            "kernel width @ height x width x N, as in 512x512x3x3@4x4x512 (stride 2: 512x256x3x3/2@8x8x512)."
        )
    out, channels, kernel_h, kernel_w, stride, height, width, batch = (int(part or 1) for part in match.groups())
    padding = ((kernel_h - 1) // 2, kernel_h // 2), ((kernel_w - 1) // 2, kernel_w // 2)
    return Layer(
        out, ConvGeometry(channels, (kernel_h, kernel_w), (stride, stride), padding), (height, width), batch
    )  # fmt: skip


def model_layers(name: str, batch: int) -> list[Layer]:
    """The layers of a model that a plan may make sparse, each with its input in the model, in order.

    Args:
      name: a model of `dsb_jax.training.models`, over 32x32 images; or `vit-b`, whose linear layers are listed here.
      batch: images.

    Raises:
      ValueError: if there is no such model.
    """
    if name == "vit-b":
        return [matmul_layer(out, in_, VIT_TOKENS * batch, f"vit-b/{part}") for part, (out, in_) in VIT_LAYERS.items()]
    layers: list[Layer] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_layer = context.method_name == "__call__" and isinstance(module, nn.Conv)
        if is_layer and not set(module.path) & set(KEEP_DENSE):
            path = "/".join((name, *module.path))
            images, height, width, channels = args[0].shape
            geometry = ConvGeometry(channels, module.kernel_size, module.strides, module.padding)
            layers.append(Layer(module.features, geometry, (height, width), images, (path,)))
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((batch, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(models.create(name, num_classes=10).init, jax.random.key(0), images)
    return layers


def unique(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of equal sizes become one, which carries all their names; the order stays."""
    names: dict[Layer, list[str]] = {}
    for layer in layers:
        names.setdefault(layer, []).extend(layer.names)
    return [dataclasses.replace(layer, names=tuple(all_names)) for layer, all_names in names.items()]


def layers_of(shapes: Sequence[str], gemms: Sequence[str], model_names: Sequence[str], batch: int) -> list[Layer]:
    """What three flags ask for, in this order: shapes, square matrices `n x n x n`, models.

    Raises:
      ValueError: for a text that is no shape, no size or no model.
    """
    layers = [parse_layer(text) for text in shapes]
    for text in gemms:
        if not re.fullmatch(r"[1-9]\d*", text.strip()):
            raise ValueError(f"gemms: {text!r} is not a size; give such as 1024,4096.")
        layers.append(matmul_layer(int(text), int(text), int(text), f"gemm-{text.strip()}"))
    for name in model_names:
        layers += model_layers(name, batch)
    return unique(layers)
