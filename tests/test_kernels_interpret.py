"""The Pallas and the Triton kernels against the reference, each in its interpreter: no GPU, the same code as on one."""

import dataclasses
import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.layout import BlockLayout, real_rows
from pallas_kernels import REFERENCE, ConvGeometry, Index, matmul_geometry
from pallas_kernels.kernel_index import derive, entries_for
from pallas_kernels.pallas_gpu import pallas_kernels
from pallas_kernels.tiles import KernelTiles, Tiles
from pallas_kernels.triton_gpu import triton_kernels
from tests import triton_interpreter
from tests.conftest import always, make_layout

SAME = ((1, 1), (1, 1))
SMALL = Tiles(positions=32, columns=16)
SMALL_TILES = KernelTiles(SMALL, SMALL, SMALL)
KERNELS = pallas_kernels(SMALL_TILES, interpret=True)
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

# in_channels, kernel, strides, padding; height, width, batch; out, block shape, blocks of each row group
CASES = {
    "3x3": (ConvGeometry(5, (3, 3), (1, 1), SAME), (4, 6, 9), 32, (16, 4), (7, 2)),
    "tallest block": (ConvGeometry(3, (1, 1)), (2, 2, 8), 128, (128, 2), (1,)),
    "stride 2": (ConvGeometry(5, (3, 3), (2, 2), SAME), (6, 6, 5), 16, (16, 4), (5,)),
    "1x1, stride 2": (ConvGeometry(6, (1, 1), (2, 2)), (4, 4, 20), 32, (32, 2), (2,)),
    "uneven everything": (ConvGeometry(5, (3, 2), (2, 3), ((0, 1), (1, 1))), (7, 6, 9), 22, (8, 3), (1, 4, 3)),
    "5x5 and wide blocks": (ConvGeometry(3, (5, 5), (2, 2), ((2, 2), (2, 2))), (7, 7, 4), 8, (4, 16), (2, 4)),
    "no padding": (ConvGeometry(4, (3, 3)), (5, 5, 3), 16, (16, 5), (3,)),
    "linear": (matmul_geometry(40), (1, 1, 33), 20, (8, 1), (15, 5, 10)),
    "linear, long": (matmul_geometry(24), (1, 1, 100), 32, (32, 8), (2,)),
}


def make(case, dtype, layout=None):
    geometry, size, out, block_shape, counts = CASES[case]
    rng = np.random.default_rng(0)
    if layout is None:
        layout = make_layout(0, (out, geometry.in_features), block_shape, counts)
    out = layout.shape[0]
    x, blocks, dy = (
        rng.standard_normal(shape).astype(np.float32).astype(dtype)
        for shape in (
            (geometry.in_channels, *size),
            (layout.num_blocks, *block_shape),
            (out, *geometry.output_size(*size[:2]), size[2]),
        )
    )
    return geometry, layout, x, np.where(real_rows(layout), blocks, 0).astype(dtype), dy


def all_three(kernels, geometry, layout, x, blocks, dy):
    """As one program: the interpreter, operation by operation, would compile a hundred."""

    @jax.jit
    def run(layout, x, blocks, dy):
        index = layout.index
        return (
            kernels.forward(x, blocks, index, out=layout.shape[0], geometry=geometry),
            kernels.input_gradient(dy, blocks, index, geometry=geometry, input_size=x.shape[1:3]),
            kernels.weight_gradient(x, dy, index, geometry=geometry, dtype=jnp.float32),
        )

    return run(layout, x, blocks, dy)


def assert_same(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.fixture
def interpreted(request, monkeypatch):
    """`(tiles) -> Kernels` of the implementation that the test is run for."""
    if request.param == "pallas":
        return functools.partial(pallas_kernels, interpret=True)
    if importlib.util.find_spec("triton") is None:  # not imported here: how it is imported decides what it does
        pytest.skip("Triton is for Linux only")
    triton_interpreter.install(monkeypatch)
    return triton_kernels


both_implementations = pytest.mark.parametrize("interpreted", ["pallas", "triton"], indirect=True)


@pytest.mark.parametrize(
    ("interpreted", "case"),
    always(
        *(("pallas", case) for case in ("3x3", "uneven everything", "linear")),
        *(("triton", case) for case in ("uneven everything", "linear")),
        of=[("pallas", case) for case in CASES if case != "linear, long"]
        + [("triton", case) for case in ("stride 2", "uneven everything", "5x5 and wide blocks", "linear")],
    ),
    indirect=["interpreted"],
)
def test_equal_to_the_reference(interpreted, case):
    arrays = make(case, "float32")
    assert_same(all_three(interpreted(SMALL_TILES), *arrays), all_three(REFERENCE, *arrays), TOLERANCE["float32"])


def test_equal_to_the_reference_in_bfloat16():
    arrays = make("1x1, stride 2", "bfloat16")
    assert_same(all_three(KERNELS, *arrays), all_three(REFERENCE, *arrays), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("interpreted", "case", "dtype", "bias_dtype"),
    [
        ("pallas", "uneven everything", "float32", "float32"),
        ("triton", "uneven everything", "float32", "float32"),
        ("pallas", "linear", "bfloat16", "float32"),
    ],
    indirect=["interpreted"],
)
def test_bias(interpreted, case, dtype, bias_dtype):
    """Added before the sum is rounded, so no further from the reference than without; phantom rows have none."""
    geometry, layout, x, blocks, _ = make(case, dtype)
    bias = np.random.default_rng(1).standard_normal(layout.shape[0]).astype(bias_dtype)

    @jax.jit
    def both(x, blocks, bias):
        options = {"index": layout.index, "out": layout.shape[0], "geometry": geometry, "bias": bias}
        return tuple(kernels.forward(x, blocks, **options) for kernels in (interpreted(SMALL_TILES), REFERENCE))

    got, wanted = both(x, blocks, bias)
    assert_same((got,), (wanted,), TOLERANCE[dtype])


def test_without_jax_triton_its_kernels_are_refused_when_they_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(NotImplementedError, match=r"no Triton kernel: .*triton cannot be imported .*; pip install"):
        triton_kernels(KernelTiles(Tiles(512)))  # tiles that no other test has made kernels of


@both_implementations
def test_empty_groups(interpreted):
    """Groups 0 and 2 are empty: their outputs are zero (or their bias), and nothing is read for them."""
    geometry, _, _, block_shape, _ = CASES["3x3"]
    in_idx = np.arange(8, dtype=np.int32).reshape(2, 4)
    out_idx = np.arange(48, dtype=np.int32).reshape(3, 16)[:, ::-1]
    layout = BlockLayout(out_idx, in_idx, np.array([0, 0, 2, 2], np.int32), (48, geometry.in_features), block_shape)
    kernels, arrays = interpreted(SMALL_TILES), make("3x3", "float32", layout)
    got = all_three(kernels, *arrays)
    assert_same(got, all_three(REFERENCE, *arrays), 2e-5)
    assert not got[0][:16].any()
    assert not got[0][32:].any()
    _, _, x, blocks, _ = arrays
    bias = np.arange(1, 49, dtype=np.float32)
    y = jax.jit(functools.partial(kernels.forward, out=48, geometry=geometry))(x, blocks, layout.index, bias=bias)
    assert_same((y,), (got[0] + bias[:, None, None, None],), 2e-5)


@pytest.mark.parametrize(
    ("interpreted", "case"),
    [("pallas", "linear, long"), ("pallas", "3x3"), ("triton", "1x1, stride 2")],
    indirect=["interpreted"],
)
def test_the_batch_is_cut_into_parts_where_scratch_would_be_large(interpreted, case, monkeypatch):
    """Parts of 8 examples, or of 40 where the last of three overlaps the one before (104 examples)."""
    arrays = make(case, "float32")
    wanted = all_three(REFERENCE, *arrays)[1]
    scratch = {"linear, long": 40 * 16 * 4}.get(case, 1)
    monkeypatch.setattr("pallas_kernels.over_rows.SCRATCH_BYTES", scratch)
    assert_same(all_three(interpreted(SMALL_TILES), *arrays)[1:2], (wanted,), 2e-5)


@both_implementations
def test_no_index_reads_or_writes_foreign_memory(interpreted):
    """Wrong ones are clamped, in the layout and in what is derived from it: a wrong number, and no other harm."""
    geometry, layout, x, blocks, dy = make("linear, long", "float32")
    in_idx, start = np.array(layout.in_idx), np.array(layout.group_start)
    in_idx[0, :3] = 24, 60_000, -1
    clipped = dataclasses.replace(layout, in_idx=np.clip(in_idx, 0, 23))
    kernels, wrong = interpreted(SMALL_TILES), dataclasses.replace(layout, in_idx=in_idx)
    found, wanted = (all_three(kernels, geometry, one, x, blocks, dy) for one in (wrong, clipped))
    for i in (0, 2):  # forward and weight gradient, which read the columns
        np.testing.assert_array_equal(found[i], wanted[i])

    @jax.jit
    def run(index, x, blocks, dy):
        return (
            kernels.forward(x, blocks, index, out=32, geometry=geometry),
            kernels.input_gradient(dy, blocks, index, geometry=geometry, input_size=(1, 1)),
            kernels.weight_gradient(x, dy, index, geometry=geometry, dtype=jnp.float32),
        )

    start[1:] = 70_000
    derived = derive(layout.index, 24, entries_for("gpu"))
    huge = jax.tree.map(lambda leaf: np.full(leaf.shape, 65_000, leaf.dtype), derived)
    index = Index(np.full_like(layout.out_idx, -5), in_idx, start, huge)
    for result in run(index, x, blocks, dy):
        assert not np.isinf(result).any()


@both_implementations
def test_gradients_through_the_product_of_several_programs(interpreted):
    """More splits of the positions than one, and a tile that no dimension divides."""
    arrays = make("linear", "float32")
    tiles = Tiles(positions=16, columns=32)
    kernels = interpreted(KernelTiles(tiles, tiles, tiles))
    assert_same(all_three(kernels, *arrays), all_three(REFERENCE, *arrays), 2e-5)


def test_input_gradient_is_deterministic():
    arrays = make("stride 2", "float32")
    for a, b in zip(all_three(KERNELS, *arrays), all_three(KERNELS, *arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.int32}, "dtype int32"),
        ({"rows": 256}, "R=256 rows"),
    ],
)
def test_refuses_what_it_cannot_serve(change, message):
    rows = change.get("rows", 16)
    layout = make_layout(0, (256, 8), (rows, 4), (1,) + (0,) * (256 // rows - 1))
    x = jnp.zeros((8, 1, 1, 8), change.get("dtype", jnp.float32))
    index = layout.index
    with pytest.raises(NotImplementedError, match=message):
        KERNELS.forward(x, jnp.zeros((1, rows, 4)), index, out=256, geometry=matmul_geometry(8))


def test_refuses_more_elements_than_it_can_address():
    layout = make_layout(0, (16, 4096), (16, 4), (1,))
    index = layout.index
    forward = functools.partial(KERNELS.forward, index=index, out=16, geometry=matmul_geometry(4096))
    with pytest.raises(NotImplementedError, match="elements"):
        jax.eval_shape(forward, jax.ShapeDtypeStruct((4096, 1, 1, 2**20), jnp.bfloat16), jnp.zeros((1, 16, 4)))
