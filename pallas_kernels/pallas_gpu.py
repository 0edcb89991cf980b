"""The Pallas implementation (lowered through Triton, NVIDIA GPUs from Ampere on) of the three operations.

    kernels = pallas_kernels(KernelTiles(forward=Tiles(positions=256)))
    y = kernels.forward(x, blocks, index, out=out, geometry=geometry)

float32 multiplies in TF32 unless `precision` is "highest"; bfloat16 and float16 accumulate in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.forward import forward_kernel
from pallas_kernels.input_gradient import SCRATCH_BYTES, input_gradient_kernels
from pallas_kernels.interface import ConvGeometry, Kernels
from pallas_kernels.limits import unservable
from pallas_kernels.reference import Index
from pallas_kernels.runs import ALIGNMENT, Runs, entries_of, from_runs, output_rows, power_of_two, to_runs
from pallas_kernels.tiles import DEFAULT_TILES, KernelTiles, Tiles
from pallas_kernels.weight_gradient import weight_gradient_kernel


def _check(dtype, index: Index, out: int, geometry: ConvGeometry, runs: Runs) -> None:
    block_shape = index[0].shape[1], index[1].shape[1]
    shape = out, geometry.in_features
    reason = unservable(dtype, block_shape, shape, geometry, (runs.height, runs.width), runs.batch)
    if reason is not None:
        raise NotImplementedError(f"no Pallas kernel for {reason}; choose implementation='dense'.")


def _fit(tiles: Tiles, positions: int) -> Tiles:
    """Tiles no wider than a row of positions."""
    width = min(tiles.positions, max(16, power_of_two(positions)))
    return Tiles(width, tiles.columns, tiles.num_warps, tiles.num_stages)


@functools.lru_cache(maxsize=256)
def pallas_kernels(tiles: KernelTiles = DEFAULT_TILES, *, interpret: bool = False) -> Kernels:
    """The kernels with the given tile sizes; equal arguments give the same object, so nothing recompiles.

    Args:
      tiles: tile sizes of each kernel.
      interpret: run the kernels in Pallas' interpreter, on any device: slow, for tests.

    Returns:
      The three operations; see `pallas_kernels.interface.Kernels`. They raise NotImplementedError for what they cannot
      serve (`pallas_kernels.limits`).
    """

    def forward(x: jax.Array, blocks: jax.Array, index: Index, *, out: int, geometry: ConvGeometry,
                precision: lax.PrecisionLike = None) -> jax.Array:  # fmt: skip
        runs = Runs(geometry, x.shape[1], x.shape[2], x.shape[3])
        _check(x.dtype, index, out, geometry, runs)
        y = forward_kernel(
            to_runs(x, runs), entries_of(blocks.astype(x.dtype)), index, None, runs=runs,
            tiles=_fit(tiles.forward, runs.out_run), cols=blocks.shape[2], out=out, precision=precision,
            interpret=interpret,
        )  # fmt: skip
        return y.reshape(out, *runs.out_size, runs.padded_batch)[..., : runs.batch]

    def input_gradient(dy: jax.Array, blocks: jax.Array, index: Index, *, geometry: ConvGeometry,
                       input_size: tuple[int, int], precision: lax.PrecisionLike = None) -> jax.Array:  # fmt: skip
        out, batch = dy.shape[0], dy.shape[3]
        _check(dy.dtype, index, out, geometry, Runs(geometry, *input_size, batch))
        entries = entries_of(blocks.astype(dy.dtype))

        def part(dy: jax.Array) -> jax.Array:
            runs = Runs(geometry, *input_size, dy.shape[3])
            rows = input_gradient_kernels(
                output_rows(dy, runs), entries, index, runs=runs, tiles=_fit(tiles.input_gradient, runs.out_run),
                cols=blocks.shape[2], out=out, precision=precision, interpret=interpret,
            )  # fmt: skip
            return from_runs(rows, runs)

        scratch = entries.shape[0] * dy[0].size * dy.dtype.itemsize
        chunks = min(-(-scratch // SCRATCH_BYTES), -(-batch // ALIGNMENT))
        if chunks <= 1:
            return part(dy)
        size = -(-batch // (chunks * ALIGNMENT)) * ALIGNMENT
        chunks = -(-batch // size)
        dy = jnp.pad(dy, ((0, 0), (0, 0), (0, 0), (0, chunks * size - batch)))
        dx = lax.map(part, jnp.moveaxis(dy.reshape(*dy.shape[:3], chunks, size), 3, 0))
        dx = jnp.moveaxis(dx, 0, 3)
        return dx.reshape(*dx.shape[:3], -1)[..., :batch]

    def weight_gradient(x: jax.Array, dy: jax.Array, index: Index, *, geometry: ConvGeometry, dtype: jnp.dtype,
                        precision: lax.PrecisionLike = None) -> jax.Array:  # fmt: skip
        runs = Runs(geometry, x.shape[1], x.shape[2], x.shape[3])
        _check(x.dtype, index, dy.shape[0], geometry, runs)
        d_entries = weight_gradient_kernel(
            to_runs(x, runs), output_rows(dy.astype(x.dtype), runs), index, runs=runs,
            tiles=_fit(tiles.weight_gradient, runs.out_run), out=dy.shape[0], precision=precision, interpret=interpret,
        )  # fmt: skip
        num_blocks, cols = index[1].shape
        return d_entries.reshape(num_blocks, cols, -1).transpose(0, 2, 1).astype(dtype)

    return Kernels(forward, input_gradient, weight_gradient)
