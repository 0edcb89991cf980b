"""What the GPU kernels can serve, decided on the host from static sizes alone, before any kernel image."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import ConvGeometry

DTYPES = ("float32", "bfloat16", "float16")
MOST_ROWS = 128
MOST_EXACT_ROWS = 64  # float32 in IEEE arithmetic needs the registers that tensor cores spare; beyond, they spill
MOST_ELEMENTS = 2**31 - 1  # offsets are int32


def is_exact(precision: Any) -> bool:
    """Whether float32 is to be multiplied in IEEE arithmetic, not in TF32; None stands for jax's own default."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision
    if isinstance(precision, tuple):
        return any(is_exact(of_operand) for of_operand in precision)
    return precision in (lax.Precision.HIGHEST, "highest", "float32")


def unsupported_reason(
    dtype: str | jnp.dtype,
    block_shape: tuple[int, int],
    num_blocks: int,
    shape: tuple[int, int],
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    batch: int,
    precision: lax.PrecisionLike = None,
    of: str = "forward",
) -> str | None:
    """The reason why the GPU kernels cannot serve a pass of a layer, or None if they can.

    Args:
      dtype: of activations and blocks.
      block_shape: (R, C).
      num_blocks: that the layer stores.
      shape: (out, in).
      geometry: kernel size, strides, padding.
      input_size: height and width of the input.
      batch: N.
      precision: of the products, as in `jax.lax.dot`.
      of: the pass: "forward", "input_gradient" or "weight_gradient".
    """
    if jnp.dtype(dtype).name not in DTYPES:
        return f"dtype {jnp.dtype(dtype).name}; the GPU kernels take {', '.join(DTYPES)}"
    if block_shape[0] > MOST_ROWS:
        return f"R={block_shape[0]} rows in a block; the GPU kernels take {MOST_ROWS} at the most"
    if jnp.dtype(dtype) == jnp.float32 and is_exact(precision) and block_shape[0] > MOST_EXACT_ROWS:
        return f"float32 at highest precision with R={block_shape[0]}, more than {MOST_EXACT_ROWS}"
    positions = math.prod(geometry.output_size(*input_size))
    padded = math.prod(size + sum(pad) for size, pad in zip(input_size, geometry.padding, strict=True))
    largest = max(geometry.in_channels * padded, shape[0] * positions) * -(-batch // 8) * 8
    stored = num_blocks * math.prod(block_shape)
    if stored > MOST_ELEMENTS:
        return f"{stored} stored weights; the GPU kernels address {MOST_ELEMENTS} at the most"
    # The batch is cut into parts where that is large, but into none smaller than 8 examples.
    scratch = num_blocks * block_shape[1] * positions * 8
    if of == "input_gradient" and scratch > MOST_ELEMENTS:
        return (
            f"an input gradient whose scratch has {scratch} elements for 8 examples; the GPU kernels address "
            f"{MOST_ELEMENTS} at the most"
        )
    if largest > MOST_ELEMENTS:
        return f"an activation of {largest} elements; the GPU kernels address {MOST_ELEMENTS} at the most"
    return None
