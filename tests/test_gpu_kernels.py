"""The GPU kernels on a GPU against the reference: `pytest -m gpu`. Without one they are collected and skipped."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.layout import BlockLayout, count_groups, max_blocks, real_rows
from pallas_kernels import REFERENCE, ConvGeometry, matmul_geometry
from tests.conftest import make_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

PAD_1 = ((1, 1), (1, 1))
# Of the largest entry: TF32 has 10 bits, bfloat16 8 (its results are rounded once).
TOLERANCES = {("float32", None): 5e-3, ("float32", "highest"): 2e-5, ("bfloat16", None): 1e-2}
ROWS, COLUMNS = (16, 32, 64, 128), (16, 8, 4, 3)

# name: geometry, (batch, height, width), out, (R, C), blocks of each row group
CONVS = {
    "1x1, N=5": (ConvGeometry(48), (5, 6, 6), 32, (16, 8), (6, 2)),
    "3x3 same, N=100": (ConvGeometry(32, (3, 3), (1, 1), PAD_1), (100, 8, 7), 64, (32, 8), (30, 4)),
    "3x3 stride 2": (ConvGeometry(24, (3, 3), (2, 2), PAD_1), (16, 9, 8), 64, (32, 4), (40, 11)),
    "3x3 stride 2, padded as SAME": (ConvGeometry(16, (3, 3), (2, 2), ((0, 1), (0, 1))), (8, 8, 8), 64, (64, 4), (20,)),
    "1x1 stride 2": (ConvGeometry(64, (1, 1), (2, 2)), (32, 8, 8), 128, (64, 4), (12, 5)),
    "5x5 valid, 3 channels": (ConvGeometry(3, (5, 5)), (12, 9, 8), 32, (16, 4), (2, 17)),
    "3x2 stride (2, 3)": (ConvGeometry(6, (3, 2), (2, 3), ((0, 2), (3, 1))), (10, 6, 8), 32, (16, 3), (7, 4)),
    "stride > kernel": (ConvGeometry(16, (2, 1), (3, 2)), (9, 8, 7), 32, (16, 4), (3, 2)),
    "negative padding": (ConvGeometry(8, (3, 3), (1, 1), ((-1, 0), (1, -1))), (8, 6, 6), 16, (16, 8), (8,)),
    "3x3 over 2x2": (ConvGeometry(64, (3, 3), (1, 1), PAD_1), (64, 2, 2), 128, (64, 4), (50, 1)),
    "empty groups": (ConvGeometry(16, (3, 3), (1, 1), PAD_1), (16, 6, 6), 96, (16, 16), (0, 3, 0, 9, 1, 0)),
    "phantom rows": (ConvGeometry(16, (3, 3), (1, 1), PAD_1), (20, 5, 5), 75, (32, 8), (5, 9, 7)),
    "phantom rows, R = 128": (ConvGeometry(16, (3, 3), (1, 1), PAD_1), (20, 5, 5), 200, (128, 8), (9, 9)),
    "one column": (ConvGeometry(16, (3, 3), (1, 1), PAD_1), (16, 4, 4), 64, (64, 1), (37,)),
}  # fmt: skip


def kernels(name):
    """The implementation of that name, or a skipped test."""
    module = pytest.importorskip(f"pallas_kernels.{name}_gpu")
    try:
        return getattr(module, f"{name}_kernels")()
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def passes(implementation, x, blocks, dy, layout, geometry, precision, bias=None):
    """Output and both gradients in float32, the gradient of phantom weights as it is."""
    index = layout.index

    @jax.jit
    def run(x, blocks, dy, index, bias):
        options = {"geometry": geometry, "precision": precision}
        y = implementation.forward(x, blocks, index, out=dy.shape[0], bias=bias, **options)
        dx = implementation.input_gradient(dy, blocks, index, input_size=x.shape[1:3], **options)
        return y, dx, implementation.weight_gradient(x, dy, index, dtype=blocks.dtype, **options)

    return run(x, blocks, dy, index, bias)


def assert_equals_reference(name, layout: BlockLayout, geometry, batch, size, dtype, precision=None, has_bias=False):
    """Compares the three passes; phantom weights hold a large number that nobody may read."""
    seed = zlib.crc32(repr((layout.shape, layout.block_shape, batch, size)).encode())
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (geometry.in_channels, *size, batch), dtype)
    dy = jax.random.normal(keys[1], (layout.shape[0], *geometry.output_size(*size), batch), dtype)
    blocks = jax.random.normal(keys[2], (layout.num_blocks, *layout.block_shape), dtype)
    bias = jnp.linspace(-2, 2, layout.shape[0], dtype=dtype) if has_bias else None
    poisoned = jnp.where(real_rows(layout), blocks, jnp.asarray(1e30, dtype))
    results = passes(kernels(name), x, poisoned, dy, layout, geometry, precision, bias)
    assert {result.dtype for result in results} == {jnp.dtype(dtype)}
    assert not np.asarray(jnp.where(real_rows(layout), 0, results[2])).any()
    # On the CPU: it compiles faster there, and knows nothing of TF32.
    with jax.default_device(jax.devices("cpu")[0]):
        f32 = [np.asarray(a, np.float32) for a in (x, jnp.where(real_rows(layout), blocks, 0), dy)]
        on_host = jax.tree.map(np.asarray, layout)
        bias = None if bias is None else jnp.asarray(np.asarray(bias, np.float32))
        wanted = passes(REFERENCE, *map(jnp.asarray, f32), on_host, geometry, "highest", bias)
    tolerance = TOLERANCES[dtype, precision]
    for what, result, value in zip(("y", "dx", "dW"), results, wanted, strict=True):
        assert result.shape == value.shape
        result, value = (np.asarray(array, np.float32) for array in (result, value))
        error = np.abs(result - value).max() / max(np.abs(value).max(), 1e-30)
        assert error <= tolerance, f"{what}: {error:.1e} of the largest entry"


@pytest.mark.parametrize("name", ["pallas", "triton"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_matrix_blocks_of_all_shapes(rows, cols, dtype, name):
    out, in_ = 3 * rows - 5, 150  # phantom rows, and columns that no C here but 3 divides
    groups = count_groups(out, rows)
    most = max_blocks((out, in_), (rows, cols)) // groups
    counts = most, 1, round((most + 1) / 2)  # the last holds the phantom rows and the mean
    layout = make_layout(rows * cols, (out, in_), (rows, cols), counts)
    assert_equals_reference(name, layout, matmul_geometry(in_), 72, (1, 1), dtype)


@pytest.mark.parametrize("name", ["pallas", "triton"])
@pytest.mark.parametrize("batch", [1, 5, 100, 1000])
@pytest.mark.parametrize("rows", [16, 64])
def test_matrix_with_ragged_batch(rows, batch, name):
    layout = make_layout(batch, (2 * rows, 96), (rows, 8), (9, 3))
    assert_equals_reference(name, layout, matmul_geometry(96), batch, (1, 1), "bfloat16")


@pytest.mark.parametrize("name", ["pallas", "triton"])
@pytest.mark.parametrize(("dtype", "precision"), TOLERANCES)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case, dtype, precision, name):
    geometry, (batch, height, width), out, block_shape, counts = CONVS[case]
    layout = make_layout(zlib.crc32(case.encode()), (out, geometry.in_features), block_shape, counts)
    assert_equals_reference(name, layout, geometry, batch, (height, width), dtype, precision, has_bias=True)


@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_every_pass_gives_the_same_bits_again(name):
    geometry = ConvGeometry(64, (3, 3), (1, 1), PAD_1)
    layout = make_layout(0, (128, geometry.in_features), (64, 4), (40, 25))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 8, 8, 64), "bfloat16")
    dy = jax.random.normal(keys[1], (128, 8, 8, 64), "bfloat16")
    blocks = jax.random.normal(keys[2], (layout.num_blocks, 64, 4), "bfloat16")
    implementation = kernels(name)
    first, second = (passes(implementation, x, blocks, dy, layout, geometry, None) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (np.asarray(a, np.float32) == np.asarray(b, np.float32)).all()
