"""What the GPU compiler makes of the kernels, for three architectures and on any machine: no GPU is needed or used."""

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec as P

from dsb_jax.layout import BlockLayout
from dsb_jax.ops import compiling_for, sparse_conv
from pallas_kernels import ConvGeometry, Index, matmul_geometry
from pallas_kernels.aot import compile_for, find_gpu, unavailable
from pallas_kernels.kernel_index import derive, entries_for
from pallas_kernels.pallas_gpu import pallas_kernels
from tests.conftest import always

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

ARCHS = ("sm_80", "sm_89", "sm_90")
TILE = 64


def shape(*sizes, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(sizes, dtype)


# Compiling itself: a plain product, a small kernel, four GPUs, layouts.


def _tile_kernel(a_ref, b_ref, o_ref):
    def step(i, acc):
        k = pl.ds(i * TILE, TILE)
        return acc + jnp.dot(a_ref[:, k], b_ref[k, :], preferred_element_type=jnp.float32)

    acc = jax.lax.fori_loop(0, a_ref.shape[1] // TILE, step, jnp.zeros(o_ref.shape, jnp.float32))
    o_ref[...] = acc.astype(o_ref.dtype)


def tiled_matmul(a, b, positions=TILE):
    """A product that XLA cannot look into."""
    (m, k), n = a.shape, b.shape[1]
    return pl.pallas_call(
        _tile_kernel,
        grid=(m // TILE, n // positions),
        in_specs=[pl.BlockSpec((TILE, k), lambda i, j: (i, 0)), pl.BlockSpec((k, positions), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((TILE, positions), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), a.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="tiled_matmul",
    )(a, b)


def test_nothing_is_printed_and_no_device_is_added():
    program = """
import jax, jax.numpy as jnp
from pallas_kernels.aot import compile_for
before = jax.devices()
compile_for("H200", jnp.add, jax.ShapeDtypeStruct((8,), "float32"), jax.ShapeDtypeStruct((8,), "float32"))
assert jax.devices() == before and "NVIDIA H200" not in [device.device_kind for device in before]
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("arch", ARCHS)
def test_plain_product(arch):
    compiled = compile_for(arch, jnp.matmul, shape(1024, 1024), shape(1024, 512))
    # XLA either calls cuBLAS or writes the kernel itself.
    assert compiled.count("custom-call") or any(kernel.tensor_cores for kernel in compiled.kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_small_kernel(arch):
    kernel = compile_for(arch, tiled_matmul, shape(1024, 1024), shape(1024, 1024)).kernel("tiled_matmul")
    assert kernel.tensor_cores > 0
    assert kernel.spill_bytes == 0
    assert 16 < kernel.registers < 255
    assert 2 * TILE * TILE * 2 <= kernel.shared_bytes <= find_gpu(arch).shared_memory_per_block
    assert set(kernel.async_copies) == {16}
    assert ("wgmma" in kernel.ptx) == (arch == "sm_90")


def test_spills_are_seen():
    kernel = compile_for("sm_80", functools.partial(tiled_matmul, positions=512), shape(64, 64), shape(64, 512))
    assert kernel.kernel("tiled_matmul").spill_bytes > 0


def test_four_gpus_reduce_once():
    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    weights = [shape(512, 512)] * 3
    compiled = compile_for("sm_90", jax.grad(loss), weights, shape(256, 512), specs=(P(), P("batch")), devices=4)
    assert (compiled.count("all-reduce"), compiled.count("all-gather")) == (1, 0)


def test_four_gpus_gather_around_a_kernel_unless_mapped():
    specs = (P(), P(None, "batch"))
    mapped = jax.shard_map(tiled_matmul, in_specs=specs, out_specs=P(None, "batch"), check_vma=False)
    for function, gathers in ((tiled_matmul, 1), (mapped, 0)):
        compiled = compile_for("sm_90", function, shape(256, 256), shape(256, 1024), specs=specs, devices=4)
        assert compiled.count("all-gather") == gathers


@pytest.mark.parametrize("manner", ["jit", "shard_map"])
def test_four_gpus_share_the_batch_of_a_layer(manner):
    """Forward and backward of a sparse convolution: one reduction, of the weight gradient, and no gathering."""
    geometry, block_shape, num_blocks = ConvGeometry(64, (3, 3), (1, 1), ((1, 1), (1, 1))), (32, 8), 14
    index = shape(4, 32, dtype="int32"), shape(num_blocks, 8, dtype="int32"), shape(5, dtype="int32")

    def gradients(weights, x, index):
        layout = BlockLayout(*index, (128, geometry.in_features), block_shape)

        def loss(weights, x):
            blocks, bias = weights
            y = sparse_conv(
                x, blocks, layout, geometry=geometry, bias=bias, implementation="pallas", feature_major=True
            )
            return jnp.sum(y.astype(jnp.float32) ** 2)

        d_weights, dx = jax.grad(loss, (0, 1))(weights, x)
        return (jax.lax.psum(d_weights, "batch") if manner == "shard_map" else d_weights), dx

    batch = P(None, None, None, "batch")
    specs = P(), batch, P()
    if manner == "shard_map":
        gradients = jax.shard_map(gradients, in_specs=specs, out_specs=(P(), batch), check_vma=False)
    arguments = (shape(num_blocks, *block_shape), shape(128)), shape(64, 16, 16, 256), index
    with compiling_for("gpu", "NVIDIA H200"):
        compiled = compile_for("sm_90", gradients, *arguments, specs=specs, devices=4)
    assert (compiled.count("all-reduce"), compiled.count("all-gather")) == (1, 0)


def reduced_bytes(hlo):
    """Of the operands of all reductions over devices."""
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    found = re.findall(r"= (\([^=]*?\)|\S+) all-reduce(?:-start)?\(", hlo)
    arrays = [match for result in found for match in re.findall(r"(\w+)\[([\d,]*)\]", result)]
    return sum(sizes[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)


def test_eight_gpus_sum_as_many_bytes_of_dense_layers_as_of_sparse_ones():
    """The gradient of a dense product is packed before it is summed: Nd numbers of the dtype of sums, not N."""
    geometry, block_shape, num_blocks = ConvGeometry(64, (3, 3), (1, 1), ((1, 1), (1, 1))), (32, 8), 14
    index = shape(4, 32, dtype="int32"), shape(num_blocks, 8, dtype="uint16"), shape(5, dtype="int32")

    def gradients(blocks, x, index, implementation):
        layout = BlockLayout(*index, (128, geometry.in_features), block_shape)

        def loss(blocks):
            return jnp.sum(sparse_conv(x, blocks, layout, geometry=geometry, implementation=implementation) ** 2)

        return jax.grad(loss)(blocks)

    counted = {}
    for name in ("dense", "pallas"):
        with compiling_for("gpu", "NVIDIA H200"):
            compiled = compile_for(
                "sm_90", functools.partial(gradients, implementation=name), shape(num_blocks, *block_shape),
                shape(256, 16, 16, 64), index, specs=(P(), P("batch"), P()), devices=8,
            )  # fmt: skip
        counted[name] = reduced_bytes(compiled.hlo)
        assert compiled.count("all-gather") == 0
    assert counted == dict.fromkeys(("dense", "pallas"), 4 * num_blocks * math.prod(block_shape))


def test_nhwc_layers_transpose_at_most_once():
    """Layout assignment turns the transposes around feature-major kernels into bitcasts."""
    channels, blocks = 64, 3

    def layer(x, weight):  # x[N, H, W, C]
        features = x.transpose(3, 1, 2, 0)
        y = tiled_matmul(weight, features.reshape(channels, -1))
        return y.reshape(features.shape).transpose(3, 1, 2, 0)

    def normalize(x):
        axes = (0, 1, 2)
        mean, variance = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5).astype(x.dtype)

    def network(x, stem, weights):
        x = jax.nn.relu(normalize(layer(x, stem)))
        for first, second in weights:
            branch = jax.nn.relu(normalize(layer(x, first)))
            x = jax.nn.relu(x + normalize(layer(branch, second)))
        return jnp.mean(x, (1, 2))

    weights = [(shape(channels, channels),) * 2] * blocks
    stem = shape(channels, channels)
    compiled = compile_for("sm_90", network, shape(128, 16, 16, channels), stem, weights)
    assert compiled.count("custom-call") == 2 * blocks + 1
    assert compiled.count("transpose") <= 1


# The shuffled-block kernels at the sizes of real layers, 10 % dense.


def conv(channels, stride=1):
    return ConvGeometry(channels, (3, 3), (stride, stride), ((1, 1), (1, 1)))


# name: geometry, out, height and width of the input, batch
LAYERS = {
    "64 at 32x32": (conv(64), 64, 32, 512),
    "64 at 32x32 stride 2": (conv(64, 2), 128, 32, 512),
    "128 at 16x16": (conv(128), 128, 16, 512),
    "256 at 8x8": (conv(256), 256, 8, 512),
    "512 at 4x4": (conv(512), 512, 4, 512),
    "gemm 4096": (matmul_geometry(4096), 4096, 1, 4096),
}
BLOCKS = ((16, 16), (32, 8), (64, 4), (128, 4))
# What each architecture is tried with: every layer, block shape and dtype somewhere, and on each architecture the
# shapes that come nearest to its limits (the tallest blocks, float32). A compilation takes seconds, so not all of them.
CASES = [
    *(("sm_90", "64 at 32x32", block_shape, "bfloat16") for block_shape in BLOCKS),
    *(("sm_90", name, (32, 8), "bfloat16") for name in LAYERS if name not in ("64 at 32x32", "512 at 4x4")),
    ("sm_90", "512 at 4x4", (128, 4), "bfloat16"),
    *(("sm_90", "128 at 16x16", block_shape, "float32") for block_shape in ((32, 8), (128, 4))),
    ("sm_80", "64 at 32x32", (16, 16), "bfloat16"),
    ("sm_80", "512 at 4x4", (128, 4), "bfloat16"),
    ("sm_80", "128 at 16x16", (16, 16), "float32"),
    ("sm_89", "512 at 4x4", (64, 4), "bfloat16"),
    ("sm_89", "128 at 16x16", (128, 4), "float32"),
]
INPUT_GRADIENT_CASES = [
    ("sm_90", "64 at 32x32", (32, 8), "bfloat16"),
    ("sm_90", "256 at 8x8", (128, 4), "bfloat16"),
    ("sm_90", "64 at 32x32", (128, 4), "float32"),
    ("sm_80", "64 at 32x32 stride 2", (32, 8), "bfloat16"),
    ("sm_80", "64 at 32x32", (64, 4), "bfloat16"),
    ("sm_89", "64 at 32x32", (16, 16), "bfloat16"),
    ("sm_89", "64 at 32x32", (32, 8), "float32"),
]


def arguments(layer, block_shape, dtype):
    """x, blocks, dy and index of a layer."""
    geometry, out, size, batch = LAYERS[layer]
    rows, cols = block_shape
    num_groups = -(-out // rows)
    num_blocks = round(0.1 * out * geometry.in_features / (rows * cols))
    index = Index(
        shape(num_groups, rows, dtype="int32"), shape(num_blocks, cols, dtype="uint16"),
        shape(num_groups + 1, dtype="int32"),
    )  # fmt: skip
    derived = jax.eval_shape(lambda index: derive(index, geometry.in_features, entries_for("gpu")), index)
    return (
        shape(geometry.in_channels, size, size, batch, dtype=dtype),
        shape(num_blocks, rows, cols, dtype=dtype),
        shape(out, *geometry.output_size(size, size), batch, dtype=dtype),
        index._replace(derived=derived),
    )


def check(arch, kernel, *, product=True, gathers=False):
    """No spills, no more shared memory than there is, tensor cores, 16-byte copies where the inner loop gathers.

    With indices of 2 bytes, and two steps of the gather under way (`wait_group 2`), where those of 4 leave one.
    """
    facts = f"{kernel.registers} registers, {kernel.shared_bytes} bytes shared, copies {kernel.async_copies}"
    assert kernel.spill_bytes == 0, f"{kernel.name} spills {kernel.spill_bytes} bytes: {facts}"
    assert kernel.shared_bytes <= find_gpu(arch).shared_memory_per_block, f"{kernel.name}: {facts}"
    assert (kernel.tensor_cores > 0) == product, f"{kernel.name} has {kernel.tensor_cores} tensor-core instructions"
    assert not gathers or kernel.async_copies.get(16, 0) > 0, f"{kernel.name}: {facts}"
    assert not gathers or re.search(r"cp\.async\.wait_group\s+[1-9]", kernel.ptx), f"{kernel.name} waits for each load"


def case_name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


FORWARD = [  # of CASES, in each run of the tests
    ("sm_90", "64 at 32x32", (32, 8), "bfloat16"), ("sm_90", "512 at 4x4", (128, 4), "bfloat16"),
    ("sm_90", "128 at 16x16", (128, 4), "float32"), ("sm_80", "64 at 32x32", (16, 16), "bfloat16"),
    ("sm_89", "512 at 4x4", (64, 4), "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "layer", "block_shape", "dtype"), always(*FORWARD, of=CASES), ids=case_name)
def test_forward_and_weight_gradient(arch, layer, block_shape, dtype):
    geometry, out, _, _ = LAYERS[layer]
    kernels = pallas_kernels()

    def products(x, blocks, dy, index):
        y = kernels.forward(x, blocks, index, out=out, geometry=geometry)
        return y, kernels.weight_gradient(x, dy, index, geometry=geometry, dtype=dtype)

    compiled = compile_for(arch, products, *arguments(layer, block_shape, dtype))
    check(arch, compiled.kernel("shuffled_block_forward"), gathers=True)
    check(arch, compiled.kernel("shuffled_block_weight_gradient"), gathers=True)
    assert compiled.count("sort") == compiled.count("while") == 0


@pytest.mark.parametrize(
    ("arch", "layer", "block_shape", "dtype"),
    [("sm_80", "64 at 32x32", (64, 4), "bfloat16"), ("sm_90", "128 at 16x16", (128, 4), "float32")],
    ids=case_name,
)
def test_forward_with_bias(arch, layer, block_shape, dtype):
    geometry, out, _, _ = LAYERS[layer]

    def product(x, blocks, index, bias):
        return pallas_kernels().forward(x, blocks, index, out=out, geometry=geometry, bias=bias)

    x, blocks, _, index = arguments(layer, block_shape, dtype)
    compiled = compile_for(arch, product, x, blocks, index, shape(out, dtype=dtype))
    check(arch, compiled.kernel("shuffled_block_forward"), gathers=True)
    assert compiled.count("add") == 0  # nothing adds the bias but the kernel


@pytest.mark.parametrize(("arch", "layer", "block_shape", "dtype"), INPUT_GRADIENT_CASES, ids=case_name)
def test_input_gradient(arch, layer, block_shape, dtype):
    geometry, _, size, _ = LAYERS[layer]

    def product(blocks, dy, index):
        return pallas_kernels().input_gradient(dy, blocks, index, geometry=geometry, input_size=(size, size))

    compiled = compile_for(arch, product, *arguments(layer, block_shape, dtype)[1:])
    check(arch, compiled.kernel("shuffled_block_scatter"))
    collect = compiled.kernel("shuffled_block_collect")
    check(arch, collect, product=False)
    assert "bar.sync" not in collect.ptx
    assert collect.shared_bytes == 0
    for access in ("ld.global.v4.b32", "st.global.v4.b32"):  # 16 bytes a thread
        assert access in collect.ptx
    assert compiled.count("sort") == 0
