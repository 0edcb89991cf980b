"""The contract of every implementation of the sparse product: what the dense product of the unpacked weights gives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.ops.native import NATIVE
from dsb_jax.ops.xla import XLA
from pallas_kernels import REFERENCE, ConvGeometry, matmul_geometry
from tests.conftest import make_layout

IMPLEMENTATIONS = ("native", "xla", "dense", "reference")

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
    "11 examples of 8 columns": (ConvGeometry(3, (3, 3)), (11, 10, 10), 8, (4, 3), (5, 2)),
    "negative padding": (ConvGeometry(8, (3, 3), (1, 1), ((-1, 0), (1, -1))), (2, 6, 6), 8, (8, 8), (5,)),
}  # fmt: skip


def to_major(x):
    """[N, H, W, C] -> [C, H, W, N], and back."""
    return np.asarray(x).transpose(3, 1, 2, 0)


@functools.cache
def conv_case(name, dtype="float32"):
    """x[NHWC], blocks, layout, dy, geometry."""
    geometry, (batch, height, width), out, block_shape, counts = CONVS[name]
    layout = make_layout(sum(map(ord, name)), (out, geometry.in_features), block_shape, counts)
    shapes = (
        (batch, height, width, geometry.in_channels),
        (layout.num_blocks, *block_shape),
        (batch, *geometry.output_size(height, width), out),
    )
    rng = np.random.default_rng(len(name))
    x, blocks, dy = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return x, blocks, layout, dy, geometry


# What is wanted is computed in NumPy: it needs no compilation, and none of what it is compared with.


def positions(layout):
    """Where the weights of the blocks lie, in a matrix that has the phantom rows as well."""
    groups = np.repeat(np.arange(layout.num_groups), np.diff(layout.group_start))
    return np.asarray(layout.out_idx)[groups][:, :, None], np.asarray(layout.in_idx)[:, None, :]


def unpacked(blocks, layout):
    grown = np.zeros((layout.out_idx.size, layout.shape[1]), np.float32)
    grown[positions(layout)] = blocks
    return grown[: layout.shape[0]]


def packed(weight, layout):
    """Phantom weights are zero."""
    return np.pad(weight, ((0, layout.out_idx.size - layout.shape[0]), (0, 0)))[positions(layout)]


def taps(canvas, margin, geometry, size):
    """Views of what each tap of the kernel reads of images that have a margin on all sides."""
    (stride_h, stride_w), ((top, _), (left, _)) = geometry.strides, geometry.padding
    return [
        canvas[:, margin - top + kh :: stride_h, margin - left + kw :: stride_w][:, : size[0], : size[1]]
        for kh in range(geometry.kernel_size[0])
        for kw in range(geometry.kernel_size[1])
    ]


@functools.cache
def expected(name, dtype="float32"):
    """y, dx and the packed dW of the dense convolution in float32."""
    x, blocks, layout, dy, geometry = conv_case(name, dtype)
    x, dy, weight = x.astype(np.float32), dy.astype(np.float32), unpacked(blocks, layout)
    margin, size = 8, dy.shape[1:3]
    canvas = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    columns = np.concatenate(taps(canvas, margin, geometry, size), axis=3)
    d_canvas = np.zeros_like(canvas)
    for view, d_columns in zip(
        taps(d_canvas, margin, geometry, size), np.split(dy @ weight, np.prod(geometry.kernel_size), 3), strict=True
    ):
        view += d_columns
    d_weight = np.tensordot(dy, columns, ((0, 1, 2), (0, 1, 2)))
    return columns @ weight.T, d_canvas[:, margin:-margin, margin:-margin], packed(d_weight, layout)


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


def assert_phantom_weights_stay(d_blocks, layout):
    phantom = np.broadcast_to(positions(layout)[0] >= layout.shape[0], d_blocks.shape)
    assert not np.asarray(d_blocks)[phantom].any()


# "native" and "xla" cut and copy in their own ways, and the tests from here to the biases show them every case. "dense"
# sees those in which it takes another way (patches, the output put in order), "reference" those of geometry; both see
# all biases.
@pytest.mark.parametrize(
    ("implementation", "name", "feature_major"),
    [
        *(("native", name, i % 2 == 0) for i, name in enumerate(CONVS)),
        ("xla", "1x1", False),
        ("xla", "3x3 stride 2, an empty group", True),
        ("xla", "3x2 stride (2, 3), asymmetric", False),
        ("xla", "stride > kernel", False),
        ("xla", "columns", True),
        ("xla", "negative padding", False),
        ("dense", "3x3 stride 2, an empty group", False),
        ("dense", "3x2 stride (2, 3), asymmetric", True),
        ("dense", "5x5 valid, C not dividing in", False),
        ("dense", "ragged out", False),
        ("dense", "very uneven, many pieces", False),
        ("dense", "negative padding", True),
        ("reference", "3x2 stride (2, 3), asymmetric", False),
        ("reference", "stride > kernel", True),
        ("reference", "negative padding", False),
    ],
)
def test_conv_equals_the_dense_one(implementation, name, feature_major):
    x, blocks, layout, dy, geometry = conv_case(name)
    order = to_major if feature_major else np.asarray
    y, dx, d_blocks = with_gradients(
        lambda x, blocks: sparse_conv(
            x, blocks, layout, geometry=geometry, implementation=implementation, feature_major=feature_major
        ),
        order(dy), order(x), blocks,
    )  # fmt: skip
    assert_all_close((order(y), order(dx), d_blocks), expected(name), 1e-5)
    assert_phantom_weights_stay(d_blocks, layout)


@pytest.mark.parametrize("kernels", [REFERENCE, XLA, NATIVE], ids=["reference", "xla", "native"])
def test_kernels_at_array_level(kernels):
    """`Kernels`: feature-major arrays and an index in, arrays out, phantom weights never read."""
    name = "ragged out"
    x, blocks, layout, dy, geometry = conv_case(name)
    poisoned = np.where(positions(layout)[0] < layout.shape[0], blocks, np.float32(1e30))

    @jax.jit
    def run(x, blocks, dy, index):
        y = kernels.forward(x, blocks, index, out=dy.shape[0], geometry=geometry)
        dx = kernels.input_gradient(dy, blocks, index, geometry=geometry, input_size=x.shape[1:3])
        return y, dx, kernels.weight_gradient(x, dy, index, geometry=geometry, dtype=jnp.bfloat16)

    y, dx, d_blocks = run(to_major(x), poisoned, to_major(dy), layout.index)
    assert d_blocks.dtype == jnp.bfloat16  # of its own
    assert_all_close((to_major(y), to_major(dx)), expected(name)[:2], 1e-5)
    assert_all_close((d_blocks,), expected(name)[2:], 1e-2)
    assert_phantom_weights_stay(d_blocks, layout)


@pytest.mark.parametrize("implementation", ["native", "xla", "dense"])  # all, with a bias: below
def test_bfloat16_accumulates_in_float32(implementation):
    name = "3x3 same"
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
    bias = np.random.default_rng(5).standard_normal(layout.shape[0], np.float32)
    order = to_major if feature_major else np.asarray
    y, dx, d_blocks, d_bias = with_gradients(
        lambda x, blocks, bias: sparse_conv(
            x, blocks, layout, geometry=geometry, bias=bias, implementation=implementation, feature_major=feature_major
        ),
        order(dy), order(x), blocks, bias,
    )  # fmt: skip
    assert (y.dtype, d_bias.dtype) == (x.dtype, bias.dtype)
    wanted_y, *wanted = expected(name, dtype)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    assert_all_close((order(y), order(dx), d_blocks), (wanted_y + bias, *wanted), tolerance)
    assert_all_close((d_bias,), (dy.astype(np.float32).sum((0, 1, 2)),), 1e-5)


# name: shape of x, out, (R, C), blocks of each row group
MATMULS = {
    "ragged batch and in": ((7, 30), 16, (8, 4), (3, 1)),
    "more dimensions, ragged out": ((2, 3, 20), 21, (8, 4), (4, 0, 2)),
    "one vector": ((24,), 8, (4, 8), (1, 3)),
}


@pytest.mark.parametrize(
    ("name", "implementation", "feature_major"),
    [
        ("ragged batch and in", "native", True),
        ("more dimensions, ragged out", "native", False),
        ("one vector", "native", False),
        ("ragged batch and in", "xla", True),
        ("ragged batch and in", "dense", True),
        ("ragged batch and in", "reference", False),
        ("more dimensions, ragged out", "xla", False),
        ("more dimensions, ragged out", "dense", False),
        ("one vector", "dense", False),
        ("one vector", "reference", False),
    ],
)
def test_matmul_equals_the_dense_one(name, implementation, feature_major):
    shape, out, block_shape, counts = MATMULS[name]
    layout = make_layout(1, (out, shape[-1]), block_shape, counts)
    rng = np.random.default_rng(0)
    x, dy, blocks = (
        rng.standard_normal(size, np.float32) for size in (shape, (*shape[:-1], out), (layout.num_blocks, *block_shape))
    )
    bias = np.arange(1.0, out + 1, dtype=np.float32)

    def multiply(x, blocks, bias):
        return sparse_matmul(x, blocks, layout, bias=bias, implementation=implementation, feature_major=feature_major)

    order = np.transpose if feature_major else np.asarray
    y, dx, d_blocks, d_bias = with_gradients(multiply, order(dy), order(x), blocks, bias)
    weight, rows_of_x, rows_of_dy = unpacked(blocks, layout), x.reshape(-1, shape[-1]), dy.reshape(-1, out)
    wanted = x @ weight.T + bias, dy @ weight, packed(rows_of_dy.T @ rows_of_x, layout), rows_of_dy.sum(axis=0)
    assert_all_close((order(y), order(dx), d_blocks, d_bias), wanted, 1e-5)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("11 examples of 8 columns", 32),  # batch tiles, the last of them ragged
        ("11 examples of 8 columns", 8 * 11 * 5),  # tiles of four rows
        ("5x5 valid, C not dividing in", 1),  # shorter than one row of one example
    ],
)
def test_more_than_one_tile(monkeypatch, name, run):
    """Output positions are cut into tiles of at most RUN, and no less than one row of one example."""
    monkeypatch.setattr("dsb_jax.ops.xla.TILE_POSITIONS", run)
    x, blocks, layout, dy, geometry = conv_case(name)
    results = with_gradients(
        lambda x, blocks: sparse_conv(x, blocks, layout, geometry=geometry, implementation="xla"), dy, x, blocks
    )
    assert_all_close(results, expected(name), 1e-5)


zeros = functools.partial(np.zeros, dtype=np.float32)


@pytest.mark.parametrize("call", ["conv", "matmul"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
def test_errors_name_what_does_not_fit(implementation, call):
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))

    def run(x=(2, 12), blocks=(3, 4, 3), bias=None, implementation=implementation):
        blocks, bias = zeros(blocks), None if bias is None else zeros(bias)
        if call == "matmul":
            return sparse_matmul(zeros(x), blocks, layout, bias=bias, implementation=implementation)
        x = zeros((x[0], 2, 2, x[1]))
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
    with pytest.raises(ValueError, match="implementation='cuda' is unknown; choose one of auto, native, xla, dense, "):
        run(implementation="cuda")


def test_a_kernel_larger_than_its_input_is_refused():
    layout = make_layout(0, (8, 27), (4, 3), (2, 1))
    with pytest.raises(ValueError, match=r"a 3-wide kernel does not fit an input of 2 padded by 0\+0; pad more"):
        sparse_conv(zeros((1, 2, 4, 3)), zeros((3, 4, 3)), layout, geometry=ConvGeometry(3, (3, 3)))
    with pytest.raises(ValueError, match=r"x has 3 input channels and the kernel \(2, 2\) taps"):
        sparse_conv(zeros((1, 4, 4, 3)), zeros((3, 4, 3)), layout, geometry=ConvGeometry(3, (2, 2)))


def with_entry(value, *at):
    """A function of an array: a copy with one other entry."""

    def edit(array):
        array = array.copy()
        array[at] = value
        return array

    return edit


def broken(change):
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    return dataclasses.replace(
        layout, **{name: edit(np.asarray(getattr(layout, name))) for name, edit in change.items()}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_idx": with_entry(12, 0, 0)}, "in_idx holds 12, outside 0..11"),
        ({"out_idx": with_entry(99, 0, 0)}, "not a permutation"),
        ({"group_start": with_entry(7, 1)}, "group_start"),
    ],
)
def test_wrong_indices_are_refused_before_a_kernel_runs(change, message):
    with pytest.raises(ValueError, match=message):
        sparse_matmul(zeros((2, 12)), zeros((3, 4, 3)), broken(change), implementation="xla")


@pytest.mark.parametrize(
    "change", [{"in_idx": lambda a: a.astype(np.int16)}, {"out_idx": lambda a: a.T}, {"group_start": lambda a: a[1:]}]
)
def test_layouts_of_the_wrong_shape_are_refused_while_traced(change):
    call = jax.jit(lambda x, blocks, layout: sparse_matmul(x, blocks, layout, implementation="xla"))
    with pytest.raises(ValueError, match="does not belong to this layer"):
        call(zeros((2, 12)), zeros((3, 4, 3)), broken(change))
