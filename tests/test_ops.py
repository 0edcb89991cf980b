"""The contract of every implementation of the sparse product: what the dense product of the unpacked weights gives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsb_jax.layout import pack, real_rows, unpack
from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.ops.xla import XLA
from pallas_kernels import REFERENCE, ConvGeometry, matmul_geometry
from tests.conftest import make_layout

IMPLEMENTATIONS = ("xla", "dense", "reference")

PAD_1 = ((1, 1), (1, 1))

# name: geometry, (batch, height, width), out, (R, C), blocks of each row group
CONVS = {
    "1x1": (ConvGeometry(12), (4, 5, 5), 16, (8, 4), (2, 1)),
    "3x3 same": (ConvGeometry(8, (3, 3), (1, 1), PAD_1), (3, 6, 5), 16, (8, 8), (5, 2)),
    "3x3 stride 2, an empty group": (ConvGeometry(8, (3, 3), (2, 2), PAD_1), (5, 7, 6), 24, (8, 4), (3, 0, 6)),
    "5x5 valid, C not dividing in": (ConvGeometry(3, (5, 5)), (2, 8, 7), 16, (8, 4), (1, 7)),
    "3x2 stride (2, 3), asymmetric": (ConvGeometry(6, (3, 2), (2, 3), ((0, 2), (3, 1))), (3, 6, 8), 8, (4, 4), (4, 3)),
    "stride > kernel": (ConvGeometry(8, (2, 1), (3, 2)), (3, 8, 7), 8, (4, 4), (3, 2)),
    "ragged out": (ConvGeometry(5, (3, 3), (1, 1), PAD_1), (3, 4, 4), 21, (8, 4), (8, 2, 5)),
    "columns": (ConvGeometry(8, (3, 3), (2, 1), ((0, 1), (1, 0))), (2, 5, 5), 32, (32, 1), (19,)),
    "very uneven, many pieces": (ConvGeometry(32, (3, 3), (1, 1), PAD_1), (2, 4, 4), 24, (8, 8), (36, 1, 0)),
    "negative padding": (ConvGeometry(8, (3, 3), (1, 1), ((-1, 0), (1, -1))), (2, 6, 6), 8, (8, 8), (5,)),
}  # fmt: skip


@functools.cache
def conv_case(name, dtype="float32"):
    """x[NHWC], blocks (phantom ones NaN: nobody may read them), layout, dy, geometry."""
    geometry, (batch, height, width), out, block_shape, counts = CONVS[name]
    layout = make_layout(sum(map(ord, name)), (out, geometry.in_features), block_shape, counts)
    keys = jax.random.split(jax.random.key(len(name)), 3)
    x = jax.random.normal(keys[0], (batch, height, width, geometry.in_channels), dtype)
    blocks = jax.random.normal(keys[1], (layout.num_blocks, *block_shape), dtype)
    dy = jax.random.normal(keys[2], (batch, *geometry.output_size(height, width), out), dtype)
    return x, blocks, layout, dy, geometry


def dense_results(x, blocks, layout, dy, geometry):
    """y, dx and the packed dW of the dense convolution in float32."""

    def conv(x, weight):
        kernel = weight.T.reshape(*geometry.kernel_size, geometry.in_channels, -1)
        return lax.conv_general_dilated(
            x, kernel, geometry.strides, geometry.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    f32 = jnp.float32
    y, pullback = jax.vjp(conv, x.astype(f32), unpack(blocks.astype(f32), layout))
    dx, d_weight = pullback(dy.astype(f32))
    return y, dx, pack(d_weight, layout)


@functools.cache
def expected(name, dtype="float32"):
    *arrays, geometry = conv_case(name, dtype)
    return jax.jit(functools.partial(dense_results, geometry=geometry))(*arrays)


def with_gradients(function, dy, *args):
    """The result and the gradients of all arguments, in one compilation."""

    def run(dy, *args):
        y, pullback = jax.vjp(function, *args)
        return y, *pullback(dy)

    return jax.jit(run)(dy, *args)


def assert_all_close(results, wanted, tolerance):
    for result, value in zip(results, wanted, strict=True):
        assert result.shape == value.shape
        result, value = (np.asarray(array, np.float32) for array in (result, value))
        np.testing.assert_allclose(result, value, rtol=tolerance, atol=tolerance * np.abs(value).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_equals_the_dense_one(name, implementation):
    x, blocks, layout, dy, geometry = conv_case(name)
    y, dx, d_blocks = with_gradients(
        lambda x, blocks: sparse_conv(x, blocks, layout, geometry=geometry, implementation=implementation),
        dy, x, blocks,
    )  # fmt: skip
    assert_all_close((y, dx, d_blocks), expected(name), 1e-5)
    assert not np.asarray(jnp.where(real_rows(layout), 0, d_blocks)).any()  # phantom weights stay as they are


@pytest.mark.parametrize("kernels", [REFERENCE, XLA], ids=["reference", "xla"])
@pytest.mark.parametrize("name", ["3x3 stride 2, an empty group", "ragged out"])
def test_kernels_at_array_level(name, kernels):
    """`Kernels`: feature-major arrays and an index in, arrays out, phantom weights never read."""
    x, blocks, layout, dy, geometry = conv_case(name)
    index = layout.index
    poisoned = jnp.where(real_rows(layout), blocks, 1e30)
    x, dy = x.transpose(3, 1, 2, 0), dy.transpose(3, 1, 2, 0)

    @jax.jit
    def run(x, blocks, dy, index):
        y = kernels.forward(x, blocks, index, out=dy.shape[0], geometry=geometry)
        dx = kernels.input_gradient(dy, blocks, index, geometry=geometry, input_size=x.shape[1:3])
        d_blocks = kernels.weight_gradient(x, dy, index, geometry=geometry, dtype=jnp.bfloat16)
        return y.transpose(3, 1, 2, 0), dx.transpose(3, 1, 2, 0), d_blocks

    y, dx, d_blocks = run(x, poisoned, dy, index)
    assert d_blocks.dtype == jnp.bfloat16  # of its own
    assert_all_close((y, dx), expected(name)[:2], 1e-5)
    assert_all_close((d_blocks,), expected(name)[2:], 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["3x3 same", "ragged out"])
def test_bfloat16_accumulates_in_float32(name, implementation):
    x, blocks, layout, dy, geometry = conv_case(name, "bfloat16")
    results = with_gradients(
        lambda x, blocks: sparse_conv(x, blocks, layout, geometry=geometry, implementation=implementation),
        dy, x, blocks,
    )  # fmt: skip
    assert {r.dtype for r in results} == {jnp.dtype("bfloat16")}
    # One rounding of the result; the scale of the tolerance is the largest entry.
    assert_all_close(results, expected(name, "bfloat16"), 2**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype", "feature_major"),
    [("very uneven, many pieces", "float32", True), ("ragged out", "bfloat16", False)],
)
def test_bias_of_each_output(name, dtype, feature_major, implementation):
    """Added once to every position, those of an empty group, too; its gradient is a sum in float32."""
    x, blocks, layout, dy, geometry = conv_case(name, dtype)
    bias = jax.random.normal(jax.random.key(5), layout.shape[:1])
    if feature_major:
        x, dy = x.transpose(3, 1, 2, 0), dy.transpose(3, 1, 2, 0)
    y, dx, d_blocks, d_bias = with_gradients(
        lambda x, blocks, bias: sparse_conv(
            x, blocks, layout, geometry=geometry, bias=bias, implementation=implementation, feature_major=feature_major
        ),
        dy, x, blocks, bias,
    )  # fmt: skip
    assert (y.dtype, d_bias.dtype) == (x.dtype, bias.dtype)
    if feature_major:
        y, dx, dy = (array.transpose(3, 1, 2, 0) for array in (y, dx, dy))
    wanted = expected(name, dtype)
    wanted_y = wanted[0] + bias[None, None, None]
    assert_all_close((y, dx, d_blocks), (wanted_y, *wanted[1:]), 1e-5 if dtype == "float32" else 2**-8)
    assert_all_close((d_bias,), (dy.astype(jnp.float32).sum((0, 1, 2)),), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["3x3 stride 2, an empty group", "3x2 stride (2, 3), asymmetric"])
def test_feature_major_is_the_same_product(name, implementation):
    x, blocks, layout, dy, geometry = conv_case(name)
    y, dx, d_blocks = with_gradients(
        lambda x, blocks: sparse_conv(
            x, blocks, layout, geometry=geometry, implementation=implementation, feature_major=True
        ),
        dy.transpose(3, 1, 2, 0), x.transpose(3, 1, 2, 0), blocks,
    )  # fmt: skip
    assert_all_close((y.transpose(3, 1, 2, 0), dx.transpose(3, 1, 2, 0), d_blocks), expected(name), 1e-5)


# name: shape of x, out, (R, C), blocks of each row group
MATMULS = {
    "ragged batch and in": ((7, 30), 16, (8, 4), (3, 1)),
    "more dimensions, ragged out": ((2, 3, 20), 21, (8, 4), (4, 0, 2)),
    "one vector": ((24,), 8, (4, 8), (1, 3)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MATMULS)
def test_matmul_equals_the_dense_one(name, implementation):
    shape, out, block_shape, counts = MATMULS[name]
    layout = make_layout(1, (out, shape[-1]), block_shape, counts)
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (*shape[:-1], out))
    blocks = jax.random.normal(keys[2], (layout.num_blocks, *block_shape))
    bias = jnp.arange(1.0, out + 1)

    def dense(x, weight, bias):
        return x @ weight.T + jnp.expand_dims(bias, range(x.ndim - 1))

    y, dx, d_weight, d_bias = with_gradients(dense, dy, x, unpack(blocks, layout), bias)
    wanted = y, dx, pack(d_weight, layout), d_bias

    def multiply(x, blocks, bias, feature_major=False):
        return sparse_matmul(x, blocks, layout, bias=bias, implementation=implementation, feature_major=feature_major)

    assert_all_close(with_gradients(multiply, dy, x, blocks, bias), wanted, 1e-5)
    if x.ndim == 2:
        of_features = functools.partial(multiply, feature_major=True)
        y, dx, d_blocks, d_bias = with_gradients(of_features, dy.T, x.T, blocks, bias)
        assert_all_close((y.T, dx.T, d_blocks, d_bias), wanted, 1e-5)


@pytest.mark.parametrize("run", [32, 8 * 11 * 2, 8 * 11 * 5, 1])
def test_more_than_one_tile(monkeypatch, run):
    """Positions are cut into tiles of RUN: 11 examples of 8 columns into batch tiles (ragged) and tiles of rows."""
    monkeypatch.setattr("dsb_jax.ops.xla.RUN", run)
    layout, geometry = make_layout(0, (8, 27), (4, 3), (5, 2)), ConvGeometry(3, (3, 3))
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], (11, 10, 10, 3)), jax.random.normal(keys[1], (11, 8, 8, 8))
    blocks = jax.random.normal(keys[2], (7, 4, 3))
    results = with_gradients(
        lambda x, blocks: sparse_conv(x, blocks, layout, geometry=geometry, implementation="xla"), dy, x, blocks
    )
    assert_all_close(results, dense_results(x, blocks, layout, dy, geometry), 1e-5)


@pytest.mark.parametrize("call", ["conv", "matmul"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
def test_errors_name_what_does_not_fit(implementation, call):
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))

    def run(x=(2, 12), blocks=(3, 4, 3), bias=None, implementation=implementation):
        blocks, bias = jnp.zeros(blocks), None if bias is None else jnp.zeros(bias)
        if call == "matmul":
            return sparse_matmul(jnp.zeros(x), blocks, layout, bias=bias, implementation=implementation)
        x = jnp.zeros((x[0], 2, 2, x[1]))
        return sparse_conv(x, blocks, layout, geometry=matmul_geometry(12), bias=bias, implementation=implementation)

    with pytest.raises(ValueError, match=r"blocks has shape \(2, 4, 3\), but the layout holds 3 blocks of 4x3"):
        run(blocks=(2, 4, 3))
    with pytest.raises(ValueError, match=r"blocks has shape \(3, 3, 4\)"):
        run(blocks=(3, 3, 4))
    with pytest.raises(ValueError, match=r"x has 11 input channels .* the layout has 12 columns"):
        run(x=(2, 11))
    for bias in ((7,), (8, 1), ()):
        with pytest.raises(ValueError, match=rf"bias has shape {re.escape(str(bias))}.* 8 outputs; pass bias\[8\]"):
            run(bias=bias)
    with pytest.raises(ValueError, match="implementation='cuda' is unknown; choose one of auto, xla, dense, reference"):
        run(implementation="cuda")


def test_a_kernel_larger_than_its_input_is_refused():
    layout = make_layout(0, (8, 27), (4, 3), (2, 1))
    with pytest.raises(ValueError, match=r"a 3-wide kernel does not fit an input of 2 padded by 0\+0; pad more"):
        sparse_conv(jnp.zeros((1, 2, 4, 3)), jnp.zeros((3, 4, 3)), layout, geometry=ConvGeometry(3, (3, 3)))
    with pytest.raises(ValueError, match=r"x has 3 input channels and the kernel \(2, 2\) taps"):
        sparse_conv(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 4, 3)), layout, geometry=ConvGeometry(3, (2, 2)))


def broken(change):
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    return dataclasses.replace(layout, **{name: edit(getattr(layout, name)) for name, edit in change.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_idx": lambda a: a.at[0, 0].set(12)}, "in_idx holds 12, outside 0..11"),
        ({"out_idx": lambda a: a.at[0, 0].set(99)}, "not a permutation"),
        ({"group_start": lambda a: a.at[1].set(7)}, "group_start"),
    ],
)
def test_wrong_indices_are_refused_before_a_kernel_runs(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_matmul(jnp.zeros((2, 12)), jnp.zeros((3, 4, 3)), broken(change), implementation="xla")


@pytest.mark.parametrize(
    "change", [{"in_idx": lambda a: a.astype(jnp.int16)}, {"out_idx": lambda a: a.T}, {"group_start": lambda a: a[1:]}]
)
def test_layouts_of_the_wrong_shape_are_refused_while_traced(change):
    call = jax.jit(lambda x, blocks, layout: sparse_matmul(x, blocks, layout, implementation="xla"))
    with pytest.raises(ValueError, match="does not belong to this layer"):
        call(jnp.zeros((2, 12)), jnp.zeros((3, 4, 3)), broken(change))
