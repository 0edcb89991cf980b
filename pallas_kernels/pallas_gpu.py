"""The Pallas implementation (lowered through Triton, NVIDIA GPUs from Ampere on) of the three operations.

    kernels = pallas_kernels(KernelTiles(forward=Tiles(positions=256)))
    y = kernels.forward(x, blocks, index, out=out, geometry=geometry)

float32 multiplies in TF32 unless `precision` is "highest"; bfloat16 and float16 accumulate in float32.
"""

import functools
from typing import Any

import jax

from pallas_kernels.forward import forward_kernel
from pallas_kernels.input_gradient import input_gradient_kernels
from pallas_kernels.interface import Index, Kernels
from pallas_kernels.over_rows import RowKernels, over_rows
from pallas_kernels.rows import ImageRows
from pallas_kernels.tiles import DEFAULT_TILES, KernelTiles, Tiles
from pallas_kernels.weight_gradient import weight_gradient_kernel


@functools.lru_cache(maxsize=256)
def pallas_kernels(tiles: KernelTiles = DEFAULT_TILES, *, interpret: bool = False) -> Kernels:
    """The kernels with the given tile sizes; equal arguments give the same object, so nothing recompiles.

    Args:
      tiles: tile sizes of each kernel.
      interpret: compute in Pallas' interpreter, on any device: slow, for tests.

    Returns:
      The three operations; see `pallas_kernels.over_rows`.
    """

    def fit(mine: Tiles, arrays: tuple[Any, ...], image: ImageRows) -> Tiles:
        return mine.fit(image.out_length, arrays[-1].out_idx.shape[1], arrays[0].dtype.itemsize)

    def forward(*arrays: Any, image: ImageRows, **sizes: Any) -> jax.Array:
        fitted = fit(tiles.forward, arrays, image)
        return forward_kernel(*arrays, image=image, tiles=fitted, interpret=interpret, **sizes)

    def input_gradient(*arrays: Any, image: ImageRows, **sizes: Any) -> jax.Array:
        fitted = fit(tiles.input_gradient, arrays, image)
        return input_gradient_kernels(*arrays, image=image, tiles=fitted, interpret=interpret, **sizes)

    def weight_gradient(*arrays: Any, image: ImageRows, **sizes: Any) -> jax.Array:
        index: Index = arrays[-1]
        (num_groups, rows), itemsize = index.out_idx.shape, arrays[0].dtype.itemsize
        fitted = fit(tiles.of_weight_gradient(rows, index.in_idx.size / num_groups, itemsize), arrays, image)
        return weight_gradient_kernel(*arrays, image=image, tiles=fitted, interpret=interpret, **sizes)

    return over_rows("Pallas", RowKernels(forward, input_gradient, weight_gradient))
