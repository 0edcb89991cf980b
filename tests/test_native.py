"""The native kernels beside the contract that all implementations share: every size, both sets of instructions."""

import contextlib
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import max_blocks, random_layout
from dsb_jax.ops import choose, sparse_matmul
from dsb_jax.ops.native import NATIVE, NATIVE_BATCH_MAJOR, loading
from dsb_jax.ops.xla import XLA
from pallas_kernels import ConvGeometry, matmul_geometry
from tests.conftest import always, make_layout

pytestmark = pytest.mark.skipif(loading.unavailable_reason() is not None, reason=str(loading.unavailable_reason()))
INSTRUCTIONS = [name for name, width in loading.VECTORS.items() if width <= loading.vector()]


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    """Compiled programs call whatever is in use when they run, so nothing compiles twice."""
    before = loading.vector()
    loading.use(request.param)
    yield request.param
    loading.use(next(name for name, width in loading.VECTORS.items() if width == before))


def arrays_of(geometry, size, batch, layout, dtype="float32", seed=0):
    """x, blocks, bias, dy, feature-major, of the values that the dtype has."""
    rng = np.random.default_rng(seed)
    shapes = (
        (geometry.in_channels, *size, batch),
        (layout.num_blocks, *layout.block_shape),
        (layout.shape[0],),
        (layout.shape[0], *geometry.output_size(*size), batch),
    )
    x, blocks, bias, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x.astype(jnp.dtype(dtype)), blocks.astype(jnp.dtype(dtype)), bias, dy.astype(jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def three_passes(kernels, geometry, x, blocks, bias, dy, index):
    """y, dx and the gradient of the blocks."""
    return (
        kernels.forward(x, blocks, index, out=dy.shape[0], geometry=geometry, bias=bias),
        kernels.input_gradient(dy, blocks, index, geometry=geometry, input_size=x.shape[1:3]),
        kernels.weight_gradient(x, dy, index, geometry=geometry, dtype=blocks.dtype),
    )


def three_passes_batch_major(geometry, x, blocks, bias, dy, index):
    """The same of a matrix, with activations that go and come as [N, 1, 1, features]; d_x is turned back."""

    def turned(a):
        return np.asarray(a).transpose(3, 1, 2, 0)

    x, dy = turned(x), turned(dy)
    results = (
        NATIVE_BATCH_MAJOR.forward(x, blocks, index, out=dy.shape[3], geometry=geometry, bias=bias),
        NATIVE_BATCH_MAJOR.input_gradient(dy, blocks, index, geometry=geometry, input_size=(1, 1)),
        NATIVE_BATCH_MAJOR.weight_gradient(x, dy, index, geometry=geometry, dtype=blocks.dtype),
    )
    return turned(results[0]), turned(results[1]), results[2]


def assert_near(results, wanted, tolerance=1e-5):
    for result, value in zip(results, wanted, strict=True):
        result, value = np.asarray(result, np.float32), np.asarray(value, np.float32)
        np.testing.assert_allclose(result, value, rtol=0, atol=tolerance * max(np.abs(value).max(), 1e-30))


def dense_passes(geometry, x, blocks, bias, dy, layout):
    """The same in NumPy, in float64: patches times the unpacked matrix."""
    x, blocks, dy = (np.asarray(a, np.float64) for a in (x, blocks, dy))
    group = np.repeat(np.arange(layout.num_groups), np.diff(layout.group_start))
    at = np.asarray(layout.out_idx)[group][:, :, None], np.asarray(layout.in_idx).astype(int)[:, None, :]
    weight = np.zeros((layout.out_idx.size, layout.shape[1]))
    weight[at] = blocks
    weight = weight[: layout.shape[0]]
    (top, _), (left, _) = geometry.padding
    (stride_h, stride_w), (kernel_h, kernel_w) = geometry.strides, geometry.kernel_size
    out_h, out_w = dy.shape[1:3]
    columns, d_x = np.zeros((layout.shape[1], out_h, out_w, x.shape[3])), np.zeros_like(x)
    d_columns = np.tensordot(weight, dy, (0, 0))
    for tap in range(kernel_h * kernel_w):
        own = slice(tap * x.shape[0], (tap + 1) * x.shape[0])
        for oh in range(out_h):
            for ow in range(out_w):
                h, w = oh * stride_h + tap // kernel_w - top, ow * stride_w + tap % kernel_w - left
                if 0 <= h < x.shape[1] and 0 <= w < x.shape[2]:
                    columns[own, oh, ow] = x[:, h, w]
                    d_x[:, h, w] += d_columns[own, oh, ow]
    y = np.tensordot(weight, columns, (1, 0)) + bias[:, None, None, None]
    d_weight = np.tensordot(dy, columns, ((1, 2, 3), (1, 2, 3)))
    grown = np.zeros((layout.out_idx.size, layout.shape[1]))
    grown[: layout.shape[0]] = d_weight
    return y, d_x, grown[at]


@st.composite
def cases(draw):
    """A geometry, an image, a batch and a layout of any sizes, remainders and all; one in three is a matrix."""
    small = st.integers(1, 3)
    is_matrix = draw(st.integers(0, 2)) == 0
    kernel = draw(st.tuples(small, small))
    strides = draw(st.tuples(small, small))
    padding = tuple(draw(st.tuples(st.integers(-1, 3), st.integers(-1, 3))) for _ in range(2))
    size = tuple(draw(st.integers(max(1, k - low - high), 7)) for k, (low, high) in zip(kernel, padding, strict=True))
    geometry = ConvGeometry(draw(st.integers(1, 9)), kernel, strides, padding)
    if is_matrix:
        geometry, size = matmul_geometry(draw(st.integers(1, 37))), (1, 1)
    shape = draw(st.integers(1, 21)), geometry.in_features
    block_shape = draw(st.integers(1, shape[0])), draw(st.integers(1, min(5, shape[1])))
    num_blocks = draw(st.integers(1, max_blocks(shape, block_shape)))
    layout = random_layout(
        jax.random.key(draw(st.integers(0, 99))), shape, block_shape=block_shape, num_blocks=num_blocks
    )
    batch = draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 48, 64, 100])))
    return geometry, size, batch, layout, draw(st.sampled_from(["float32", "float32", "bfloat16"]))


def check_case(case):
    geometry, size, batch, layout, dtype = case
    arrays = arrays_of(geometry, size, batch, layout, dtype)
    wanted = dense_passes(geometry, *arrays, layout)
    for name in INSTRUCTIONS:
        loading.use(name)
        results = three_passes(NATIVE, geometry, *arrays, layout.index)
        assert {result.dtype for result in results} == {jnp.dtype(dtype)}
        assert_near(results, wanted, 1e-5 if dtype == "float32" else 2**-8)
        if geometry.is_matmul(size):
            others = three_passes_batch_major(geometry, *arrays, layout.index)
            assert {result.dtype for result in others} == {jnp.dtype(dtype)}
            assert_near(others, wanted, 1e-5 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("examples", always(15, of=[15, 1000]))
def test_any_sizes(examples):
    settings(max_examples=examples)(given(cases())(check_case))()
    loading.use(INSTRUCTIONS[0])


def test_a_product_by_hand(instructions):
    """Rows (2, 0) read columns (3, 1), row 1 reads none: y2 = 5 x3 + 6 x1 + 30, y0 = 7 x3 + 8 x1 + 10, y1 = 20."""
    layout = make_layout(0, (3, 4), (2, 2), (1, 0))
    layout = jax.tree.map(np.asarray, layout)
    index = layout.index._replace(out_idx=np.array([[2, 0], [1, 3]], np.int32), in_idx=np.array([[3, 1]], np.uint16))
    x = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)[:, None, None, :]
    blocks = np.array([[[5, 6], [7, 8]]], np.float32)
    dy = np.array([[1, 0], [0, 1], [2, 1]], np.float32)[:, None, None, :]
    bias = np.array([10, 20, 30], np.float32)
    arrays = matmul_geometry(4), x, blocks, bias, dy, index
    for y, dx, d_blocks in (three_passes(NATIVE, *arrays), three_passes_batch_major(*arrays)):
        np.testing.assert_array_equal(y[:, 0, 0], [[83, 98], [20, 20], [83, 94]])
        np.testing.assert_array_equal(dx[:, 0, 0], [[0, 0], [20, 6], [0, 0], [17, 5]])
        np.testing.assert_array_equal(d_blocks, [[[22, 10], [7, 3]]])


# Larger than what fits a tile, so cut along rows, along columns and along the batch; kernels as large as the image.
LARGE = {
    "rows": (ConvGeometry(64, (3, 3), (1, 1), ((1, 1), (1, 1))), (32, 32), 40, (24, 576), (8, 8), 40),
    "columns": (ConvGeometry(512, (3, 3), (1, 1), ((1, 1), (1, 1))), (3, 64), 33, (16, 4608), (16, 4), 100),
    "columns, stride 2": (ConvGeometry(256, (2, 3), (1, 2), ((0, 1), (1, 0))), (5, 90), 16, (16, 1536), (4, 4), 200),
    "a matrix": (matmul_geometry(3000), (1, 1), 300, (200, 3000), (40, 8), 700),
    "many weights of a panel": (matmul_geometry(2000), (1, 1), 64, (32, 2000), (32, 1), 1900),
    "as large as the image": (ConvGeometry(8, (5, 5), (1, 1), ((2, 2), (2, 2))), (5, 5), 32, (16, 200), (16, 2), 60),
}


def large(name):
    """geometry, size, layout and arrays of one of them."""
    geometry, size, batch, shape, block_shape, num_blocks = LARGE[name]
    groups = -(-shape[0] // block_shape[0])
    counts = tuple(num_blocks * (g + 1) // groups - num_blocks * g // groups for g in range(groups))
    layout = make_layout(0, shape, block_shape, counts)
    return geometry, size, layout, arrays_of(geometry, size, batch, layout)


@pytest.mark.parametrize("name", LARGE)
def test_many_tiles(instructions, name):
    geometry, size, layout, arrays = large(name)
    results = three_passes(NATIVE, geometry, *arrays, layout.index)
    wanted = three_passes(XLA, geometry, *arrays, layout.index)
    assert_near(results, wanted, 2e-5)
    if geometry.is_matmul(size):
        assert_near(three_passes_batch_major(geometry, *arrays, layout.index), wanted, 2e-5)


_BITS = """
import hashlib, os
import jax, numpy as np
from tests import test_native as t
print(os.environ["NPROC"], end="", flush=True)
for name in t.LARGE:
    geometry, size, layout, arrays = t.large(name)
    results = t.three_passes(t.NATIVE, geometry, *arrays, layout.index)
    if geometry.is_matmul(size):
        results += t.three_passes_batch_major(geometry, *arrays, layout.index)
    print("", *(hashlib.sha256(np.ascontiguousarray(r)).hexdigest() for r in results), end="", flush=True)
"""


def test_bits_do_not_depend_on_the_number_of_threads():
    """NPROC is how many threads XLA's pool has, on however many cores."""
    run = functools.partial(subprocess.run, [sys.executable, "-c", _BITS], capture_output=True, text=True, check=True)
    outputs = [run(env=os.environ | {"NPROC": str(count)}).stdout.split() for count in (1, 2, 7)]
    assert [output[0] for output in outputs] == ["1", "2", "7"]
    assert len(outputs[0]) == 1 + 3 * (len(LARGE) + 2)  # two matrices, in both orders of activations
    assert outputs[0][1:] == outputs[1][1:] == outputs[2][1:]


def test_bfloat16_rounds_to_even_and_keeps_what_is_no_number(instructions):
    """Sums of 1 + 2^-8 and 1 + 3 * 2^-8 lie between two bfloat16 numbers; infinity and NaN stay."""
    layout = make_layout(0, (1, 2), (1, 2), (1,))
    columns = np.argsort(np.asarray(layout.in_idx)[0])  # of x, in the order of the block
    x = np.array([[1, 1, np.inf, np.nan], [2**-8, 3 * 2**-8, 1, 1]], jnp.bfloat16)[:, None, None, :]
    blocks = np.ones((1, 1, 2), jnp.bfloat16)[..., columns]
    y = NATIVE.forward(x, blocks, layout.index, out=1, geometry=matmul_geometry(2))
    np.testing.assert_array_equal(np.asarray(y, np.float32).ravel(), [1, 1 + 2**-6, np.inf, np.nan])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("wrong", [12, 60000, -1])
def test_a_wrong_column_is_an_error_of_the_call_with_its_sizes(dtype, wrong):
    if wrong < 0 and dtype == np.uint16:
        return
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    in_idx = np.asarray(layout.in_idx).astype(dtype)
    in_idx[2, 1] = wrong
    index = layout.index._replace(in_idx=in_idx)
    arrays = arrays_of(matmul_geometry(12), (1, 1), 5, layout)
    message = r"in_idx holds an index outside 0\.\.11 in block 2 of a 8x12 matrix in 3 blocks of 4x3"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(three_passes(NATIVE, matmul_geometry(12), *arrays, index))


@pytest.mark.parametrize(
    ("name", "at", "wrong", "message"),
    [("group_start", 1, 7, "group_start does not cut"), ("group_start", 2, 4, "group_start does not cut"),
     ("group_start", 0, -1, "group_start does not cut"), ("out_idx", (0, 1), -3, "out_idx holds -3 of a 8x12"),
     ("out_idx", (1, 1), 8, "out_idx holds 8 of a 8x12"), ("out_idx", (0, 1), (1, 2), "out_idx holds . twice of a")],
)  # fmt: skip
def test_wrong_rows_and_groups_are_errors_of_the_call(name, at, wrong, message):
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    array = np.array(getattr(layout, name))
    array[at] = array[wrong] if isinstance(wrong, tuple) else wrong
    index = layout.index._replace(**{name: array})
    arrays = arrays_of(matmul_geometry(12), (1, 1), 5, layout)
    x, blocks, _, dy = arrays
    calls = (
        lambda: NATIVE.forward(x, blocks, index, out=8, geometry=matmul_geometry(12)),
        lambda: NATIVE.input_gradient(dy, blocks, index, geometry=matmul_geometry(12), input_size=(1, 1)),
        lambda: NATIVE.weight_gradient(x, dy, index, geometry=matmul_geometry(12), dtype=jnp.float32),
    )
    only_written = name == "out_idx" and wrong != -3  # the weight gradient is also taken of some of the groups
    for call in calls[:2] if only_written else calls:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call())


def test_a_serialized_program_names_what_it_would_need():
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    call = jax.jit(lambda x, blocks: sparse_matmul(x, blocks, layout, implementation="native"))
    exported = functools.partial(jax.export.export(call), jnp.ones((5, 12)), jnp.ones((3, 4, 3)))
    with pytest.raises(ValueError, match="dsb_jax_native_forward"):
        exported()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"DSB_JAX_NATIVE": "off"}, "DSB_JAX_NATIVE=off"),
        ({"DSB_JAX_NATIVE": "sse2"}, "DSB_JAX_NATIVE=sse2 is unknown; set avx512, avx2 or off, or unset it"),
        ({"DSB_JAX_NATIVE_LIBRARY": "/nowhere.so"}, "DSB_JAX_NATIVE_LIBRARY=/nowhere.so is not a file"),
    ],
)
def test_without_them_auto_goes_on_and_says_why(monkeypatch, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for cached in (cache := (loading.unavailable_reason, loading._load, loading.register, loading.tell_missing)):
        cached.cache_clear()
    try:
        assert loading.unavailable_reason() == reason
        assert loading.vector() == 0
        layout = random_layout(jax.random.key(0), (256, 2304), block_shape=(16, 16), num_blocks=230)
        sizes = {"geometry": ConvGeometry(256, (3, 3)), "input_size": (8, 8), "batch": 64}
        told = contextlib.nullcontext() if reason.endswith("=off") else pytest.warns(UserWarning, match=reason)
        with told:
            choice = choose("auto", layout, **sizes)
        choose("auto", layout, **sizes)  # warns no more
        assert choice.implementation == "xla"
        assert choice.reason.endswith(f"; native: {reason.split(';')[0]}")
        with pytest.raises(NotImplementedError, match=f"implementation='native' cannot .*: {reason}"):
            choose("native", layout, **sizes)
        with pytest.raises(NotImplementedError, match="the native kernels cannot be used: "):
            loading.register()
    finally:
        monkeypatch.undo()
        for cached in cache:
            cached.cache_clear()
        assert loading.unavailable_reason() is None


def test_other_dtypes_are_refused_by_name():
    layout = random_layout(jax.random.key(0), (256, 2304), block_shape=(16, 16), num_blocks=230)
    sizes = {"geometry": ConvGeometry(256, (3, 3)), "input_size": (8, 8), "batch": 64}
    with pytest.raises(NotImplementedError, match="it computes float32 and bfloat16, not float16; use auto, xla or"):
        choose("native", layout, dtype="float16", **sizes)
    with pytest.raises(NotImplementedError, match="it needs a CPU and this process computes on the gpu"):
        choose("native", layout, backend="gpu", **sizes)
    assert choose("auto", layout, dtype="float16", **sizes).implementation == "xla"
