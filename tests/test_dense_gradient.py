"""The dense gradient by groups of outputs: every way in which it is computed, beside XLA's gradient of the product."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsb_jax.ops import compiling_for
from dsb_jax.ops.dense_gradient import PANEL_ROWS, map_groups
from pallas_kernels import ConvGeometry, matmul_geometry

GEOMETRIES = {
    "stride 2, uneven": (ConvGeometry(5, (3, 2), (2, 1), ((1, 0), (0, 2))), (7, 6)),
    "image as large as the kernel": (ConvGeometry(4, (3, 3), (1, 1), ((1, 1), (1, 1))), (3, 3)),
    "a matrix": (matmul_geometry(9), (1, 1)),
}
WAYS = {  # all run on the CPU here
    "kernels": (contextlib.nullcontext, True),
    "XLA on a CPU": (contextlib.nullcontext, False),
    "elsewhere": (lambda: compiling_for("gpu", "NVIDIA H200"), True),
}


def wanted(geometry, x, dy):
    """[out, in]: the gradient of a convolution that XLA computes in one piece."""

    def convolve(kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, geometry.strides, geometry.padding, dimension_numbers=numbers)

    kernel = jnp.zeros((*geometry.kernel_size, geometry.in_channels, dy.shape[3]))
    (gradient,) = jax.vjp(convolve, kernel)[1](dy)
    return np.asarray(gradient).reshape(-1, dy.shape[3]).T


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("feature_major", [True, False], ids=["CHWN", "NHWC"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rows_of_every_group(name, feature_major, way):
    """Outputs in any order, in groups of which not all fit one product; one that does not exist is zero."""
    geometry, size = GEOMETRIES[name]
    rows, batch, groups = 40, 33, 4
    out = groups * rows - 1
    assert groups * rows > PANEL_ROWS
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *size, geometry.in_channels)).astype(np.float32)
    dy = rng.standard_normal((batch, *geometry.output_size(*size), out)).astype(np.float32)
    out_idx = rng.permutation(groups * rows).astype(np.int32).reshape(groups, rows)
    given = [a.transpose(3, 1, 2, 0) if feature_major else a for a in (x, dy)]
    context, with_kernels = WAYS[way]
    with context():
        gradient = jax.jit(
            lambda *given: map_groups(
                lambda some: some * 2, *given, geometry, feature_major=feature_major, with_kernels=with_kernels
            )
        )(*given, out_idx)
    whole = np.concatenate([wanted(geometry, x, dy), np.zeros((1, geometry.in_features), np.float32)])
    np.testing.assert_allclose(gradient, 2 * whole[out_idx], rtol=0, atol=2e-5 * np.abs(whole).max())
