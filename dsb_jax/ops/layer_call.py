"""One call of a layer: its sizes, its input and its dtype, which is what the speed of a product depends on."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dsb_jax.layout import max_blocks
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from pallas_kernels.interface import ConvGeometry, matmul_geometry


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """The static sizes of one call of a layer.

    Attributes:
      spec: the layer: a matrix `[in, out]` or a 2-D convolution, in blocks or dense.
      strides, padding: as in `ConvGeometry`.
      input_size: height and width of the input; (1, 1) for a linear layer.
      batch: N.
      dtype: name of the dtype of activations and blocks.
    """

    spec: LayerSpec
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    input_size: tuple[int, int]
    batch: int
    dtype: str

    @classmethod
    def of(
        cls,
        out: int,
        geometry: ConvGeometry,
        *,
        block_shape: tuple[int, int],
        num_blocks: int,
        input_size: tuple[int, int],
        batch: int,
        dtype: Any,
    ) -> "LayerCall":
        """The call of a product; a 1x1 convolution of one position is a linear layer.

        Raises:
          ValueError: if the blocks do not fit the layer.
        """
        if geometry.is_matmul(input_size):
            dense = linear_spec(geometry.in_channels, out)
        else:
            dense = conv_spec(geometry.kernel_size, geometry.in_channels, out)
        spec = dense.with_blocks(block_shape, num_blocks)
        return cls(spec, geometry.strides, geometry.padding, input_size, batch, jnp.dtype(dtype).name)

    @property
    def is_linear(self) -> bool:
        """A matrix product without any image."""
        return not self.spec.kernel_size

    @property
    def geometry(self) -> ConvGeometry:
        if self.is_linear:
            return matmul_geometry(self.spec.in_)
        kernel_h, kernel_w = self.spec.kernel_size
        return ConvGeometry(self.spec.c_in, (kernel_h, kernel_w), self.strides, self.padding)

    @property
    def positions_per_example(self) -> int:
        """Output positions of one image; 1 for a linear layer."""
        return math.prod(self.geometry.output_size(*self.input_size))

    @property
    def positions(self) -> int:
        """Output positions of the whole batch: how many products each weight takes part in."""
        return self.positions_per_example * self.batch

    @property
    def input_elements(self) -> int:
        return self.spec.c_in * math.prod(self.input_size) * self.batch

    @property
    def output_elements(self) -> int:
        return self.spec.out * self.positions

    @property
    def density(self) -> float:
        """Stored weights over `out * in`. Those of phantom rows count, because they take as long as others."""
        return self.spec.num_blocks * math.prod(self.spec.block_shape) / self.spec.size

    @property
    def rounded_density(self) -> float:
        """Two digits, so that a block more or less is the same layer."""
        return float(f"{self.density:.2g}")

    def with_density(self, density: float) -> "LayerCall":
        """The same call of a layer with as many whole blocks as are nearest to a density, at least one."""
        spec = self.spec
        count = round(density * spec.size / math.prod(spec.block_shape))
        count = min(max(count, 1), max_blocks(spec.shape, spec.block_shape))
        return dataclasses.replace(self, spec=spec.with_blocks(spec.block_shape, count))

    def rounded(self) -> "LayerCall":
        """The key in a table of measurements: that of all layers with the same `rounded_density`."""
        return self.with_density(self.rounded_density)

    def __str__(self) -> str:
        spec, stride = self.spec, max(self.strides)
        kernel, size = ("x".join(map(str, sizes)) for sizes in (spec.kernel_size, self.input_size))
        image = "" if self.is_linear else f", {kernel}/{stride} over {size}"
        rows, cols = spec.block_shape
        return (
            f"{spec.out}x{spec.in_}{image}, batch {self.batch}, {self.dtype}, {rows}x{cols} blocks, "
            f"density {self.density:.2g}"
        )
