"""The specification: each operation in a few readable lines, for any shape, without regard to speed."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.interface import ConvGeometry, Index, Kernels, accumulator_dtype, patches


def rows_of_blocks(index: Index) -> jax.Array:
    """[num_blocks, R]: the output rows of each block."""
    group = jnp.searchsorted(index.group_start, jnp.arange(index.in_idx.shape[0]), side="right") - 1
    return index.out_idx[group]


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, precision: lax.PrecisionLike) -> jax.Array:
    """In the dtype of sums: a CPU has no batched product of bfloat16 that accumulates in float32."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision)


def forward(
    x: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    out: int,
    geometry: ConvGeometry,
    precision: lax.PrecisionLike = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Y[rows(b)] += blocks[b] @ X[in_idx[b]] for every block b (SpMM), then Y[i] += bias[i]."""
    wide, panels = accumulator_dtype(x.dtype), patches(x, geometry)[index.in_idx]
    partial = _einsum("brc,bchwn->brhwn", blocks, panels, wide, precision)
    y = jnp.zeros((out, *partial.shape[2:]), wide).at[rows_of_blocks(index)].add(partial, mode="drop")
    if bias is not None:
        y += bias.astype(wide)[:, None, None, None]
    return y.astype(x.dtype)


def input_gradient(
    dy: jax.Array,
    blocks: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """dX[in_idx[b]] += blocks[b]^T @ dY[rows(b)] (transposed SpMM), then the taps are summed back."""
    wide, rows = accumulator_dtype(dy.dtype), dy.at[rows_of_blocks(index)].get(mode="fill", fill_value=0)
    partial = _einsum("brc,brhwn->bchwn", blocks, rows, wide, precision)
    d_patches = jnp.zeros((geometry.in_features, *dy.shape[1:]), wide).at[index.in_idx].add(partial)
    x_spec = jax.ShapeDtypeStruct((geometry.in_channels, *input_size, dy.shape[-1]), wide)
    (dx,) = jax.linear_transpose(lambda x: patches(x, geometry), x_spec)(d_patches)
    return dx.astype(dy.dtype)


def weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    index: Index,
    *,
    geometry: ConvGeometry,
    dtype: jnp.dtype,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """dblocks[b] = dY[rows(b)] @ X[in_idx[b]]^T (SDDMM sampled at the stored blocks)."""
    rows = dy.at[rows_of_blocks(index)].get(mode="fill", fill_value=0)
    panels = patches(x, geometry)[index.in_idx]
    return _einsum("brhwn,bchwn->brc", rows, panels, accumulator_dtype(x.dtype), precision).astype(dtype)


REFERENCE = Kernels(forward, input_gradient, weight_gradient)
