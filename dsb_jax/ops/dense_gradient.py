"""The dense weight gradient of a layer by groups of its outputs, a few at a time: what growing looks at.

    gradient[g, r] = sum over positions and examples of dY[out_idx[g, r]] * patches(X)          float32[groups, R, in]

On a CPU it is the weight gradient of the sparse product, of panels that hold every column: by the native kernels, or by
XLA (`dsb_jax.ops.cpu_convolution`) where there are none. Elsewhere it is one product for each tap of the kernel.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.ops import cpu_convolution, primitive
from dsb_jax.ops.implementations import kernels_of, take_batch_major
from dsb_jax.ops.native import loading
from dsb_jax.ops.partitioning import Product
from pallas_kernels.interface import ConvGeometry, Index, read_by_taps

PANEL_ROWS = 128  # output rows in one product: fewer waste a CPU's or GPU's matrix units, more hold more scratch


def map_groups(
    reduce: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    dy: jax.Array,
    out_idx: jax.Array,
    geometry: ConvGeometry,
    *,
    feature_major: bool,
    with_kernels: bool = True,
) -> jax.Array:
    """`reduce(gradient[some groups, R, in])` of all groups, one after the other along the first axis of its result.

    Args:
      reduce: keeps the groups apart.
      x: the layer's input, [N, H, W, C], or [C, H, W, N] if `feature_major`.
      dy: the gradient of its output, [N, OH, OW, out] or [out, OH, OW, N].
      out_idx: int32[num_groups, R], the outputs of each group; those of `out` and more are zero.
      geometry: kernel size, strides, padding.
      feature_major: the order of both activations.
      with_kernels: False for products of XLA alone.
    """
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)  # not every backend multiplies bfloat16 into float32
    num_groups, rows = out_idx.shape
    out = dy.shape[0 if feature_major else 3]
    on_cpu = cpu_convolution.serves(x, dy)
    if on_cpu and with_kernels and loading.unavailable_reason() is None:
        gradient = _native(x, dy, geometry, feature_major)
    else:
        gradient = _of_rows(x, dy, geometry, feature_major, on_cpu)
    together = min(num_groups, max(1, PANEL_ROWS // rows))
    chunks = -(-num_groups // together)
    spare = jnp.full((chunks * together - num_groups, rows), out, out_idx.dtype)
    index = jnp.concatenate([out_idx, spare]).reshape(chunks, together, rows)
    results = lax.map(lambda some: reduce(gradient(some)), index)
    return results.reshape(chunks * together, *results.shape[2:])[:num_groups]


def _native(
    x: jax.Array, dy: jax.Array, geometry: ConvGeometry, feature_major: bool
) -> Callable[[jax.Array], jax.Array]:
    out, size = dy.shape[0 if feature_major else 3], (x.shape[1], x.shape[2])
    batch = x.shape[3 if feature_major else 0]
    if not feature_major and not take_batch_major(["native"], geometry, size, batch):
        x, dy, feature_major = x.transpose(3, 1, 2, 0), dy.transpose(3, 1, 2, 0), True
    kernels = kernels_of("native", feature_major=feature_major)
    product = Product(kernels, geometry, out, size, feature_major=feature_major)

    def gradient(some: jax.Array) -> jax.Array:
        columns = lax.broadcasted_iota(jnp.int32, (some.shape[0], geometry.in_features), 1)
        index = Index(some, columns, jnp.arange(some.shape[0] + 1, dtype=jnp.int32))
        return primitive.weight_gradient(product, x, dy, index, jnp.float32)

    return gradient


def _of_rows(
    x: jax.Array, dy: jax.Array, geometry: ConvGeometry, feature_major: bool, on_cpu: bool
) -> Callable[[jax.Array], jax.Array]:
    def gradient(some: jax.Array) -> jax.Array:
        rows = some.reshape(-1)
        own = dy.at[rows if feature_major else (..., rows)].get(mode="fill", fill_value=0)
        if on_cpu:
            of_rows = cpu_convolution.weight_gradient(x, own, geometry, feature_major, None)
        else:
            over = (3, 1, 2) if feature_major else (0, 1, 2)
            taps = read_by_taps(x, geometry)
            of_rows = jnp.concatenate([lax.dot_general(tap, own, ((over, over), ((), ()))) for tap in taps])
        return of_rows.T.reshape(*some.shape, -1)

    return gradient
