"""The three array-level operations, each with its gradients.

    forward          Y[out_idx[g]] = sum over blocks b of g of blocks[b] @ X[in_idx[b]]  (+ bias[out_idx[g]])
    input gradient   dX[in_idx[b]] += blocks[b]^T @ dY[out_idx[g]]
    weight gradient  dblocks[b] = dY[out_idx[g]] @ X[in_idx[b]]^T
    bias gradient    dbias = sum over positions and examples of dY

(Jiang et al. 2022, section 3.) The gradient of the blocks exists at the stored blocks only. Each operation is linear in
both operands, and its gradients are the other two: derivatives of any order follow. The bias is added by the product
that was asked for; products inside of derivatives have none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsb_jax.ops.partitioning import Operation, Product, apply
from pallas_kernels.interface import Index, accumulator_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(
    product: Product, x: jax.Array, blocks: jax.Array, index: Index, bias: jax.Array | None = None
) -> jax.Array:
    """x[C, H, W, N], blocks[num_blocks, R, C'] -> y[out, OH, OW, N]."""
    operands = (x, blocks, *index) if bias is None else (x, blocks, *index, bias)
    return apply(Operation(product, "forward", has_bias=bias is not None), *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def input_gradient(product: Product, dy: jax.Array, blocks: jax.Array, index: Index) -> jax.Array:
    """dy[out, OH, OW, N], blocks[num_blocks, R, C'] -> dx[C, H, W, N]."""
    return apply(Operation(product, "input_gradient"), dy, blocks, *index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weight_gradient(product: Product, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, index: Index) -> jax.Array:
    """x[C, H, W, N], dy[out, OH, OW, N] -> dblocks[num_blocks, R, C'] of `dtype`."""
    return apply(Operation(product, "weight_gradient", dtype), x, dy, *index)


def _forward_fwd(
    product: Product, x: jax.Array, blocks: jax.Array, index: Index, bias: jax.Array | None = None
) -> tuple[jax.Array, Any]:
    return forward(product, x, blocks, index, bias), (x, blocks, index, bias)


def _forward_bwd(product: Product, residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, blocks, index, bias = residuals
    dx = input_gradient(product, dy, blocks, index)
    d_blocks = weight_gradient(product, blocks.dtype, x, dy, index)
    return dx, d_blocks, None, None if bias is None else _bias_gradient(dy, bias.dtype)


def _bias_gradient(dy: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """dy[out, OH, OW, N] -> [out], summed in float32 and rounded once."""
    return dy.sum(axis=(1, 2, 3), dtype=accumulator_dtype(dy.dtype)).astype(dtype)


def _input_gradient_fwd(product: Product, dy: jax.Array, blocks: jax.Array, index: Index) -> tuple[jax.Array, Any]:
    return input_gradient(product, dy, blocks, index), (dy, blocks, index)


def _input_gradient_bwd(product: Product, residuals: Any, d_dx: jax.Array) -> tuple[Any, ...]:
    dy, blocks, index = residuals
    d_dy = forward(product, d_dx, blocks, index)
    return d_dy, weight_gradient(product, blocks.dtype, d_dx, dy, index), None


def _weight_gradient_fwd(
    product: Product, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, index: Index
) -> tuple[jax.Array, Any]:
    return weight_gradient(product, dtype, x, dy, index), (x, dy, index)


def _weight_gradient_bwd(product: Product, dtype: jnp.dtype, residuals: Any, d_blocks: jax.Array) -> tuple[Any, ...]:
    del dtype
    x, dy, index = residuals
    return input_gradient(product, dy, d_blocks, index), forward(product, x, d_blocks, index), None


forward.defvjp(_forward_fwd, _forward_bwd)
input_gradient.defvjp(_input_gradient_fwd, _input_gradient_bwd)
weight_gradient.defvjp(_weight_gradient_fwd, _weight_gradient_bwd)
