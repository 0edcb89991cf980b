"""Activations sharded over eight devices, weights replicated: equal results, and no device gathers the batch.

A process has as many devices as it was started with: all tests but the last run in a process that the last starts.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsb_jax import SparseConv, create_train_state, train_step
from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.training import models
from pallas_kernels import ConvGeometry
from tests.conftest import make_layout

FLAG = "--xla_force_host_platform_device_count=8"
HAS_DEVICES = FLAG in os.environ["XLA_FLAGS"]
eight_devices = pytest.mark.skipif(not HAS_DEVICES, reason="runs in a process with eight devices")

GEOMETRY = ConvGeometry(4, (3, 3), (2, 1), ((1, 1), (0, 1)))
LAYOUT = make_layout(0, (12, 36), (4, 4), (3, 0, 5))


def operands(batch=16):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (batch, 5, 5, 4)), jax.random.normal(keys[1], (8, 4, 4))


def loss(x, blocks, implementation="xla"):
    y = sparse_conv(x, blocks, LAYOUT, geometry=GEOMETRY, implementation=implementation)
    return jnp.square(jnp.sin(y)).sum()


def mesh_of(axis_type=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))


def put(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def collectives(compiled):
    """Of the compiled program: {operation: the sorted shapes of its results}."""
    found = re.findall(
        r"= (\([^=]*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    shapes = {}
    for result, kind in found:
        shapes.setdefault(kind, []).extend(re.findall(r"\w+\[[\d,]*\]", result))
    return {kind: sorted(shapes) for kind, shapes in shapes.items()}


def assert_trees_close(result, wanted, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(b).max()))


def run(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled(*args), collectives(compiled)


@functools.cache
def gradient_on_one_device():
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(*operands())


SUM_OF_GRADIENTS = {"all-reduce": ["f32[8,4,4]", "f32[]"]}  # of the blocks, and the loss


@eight_devices
@pytest.mark.parametrize("implementation", ["xla", "reference", "dense"])
def test_jit_sums_the_weight_gradient_and_gathers_nothing(implementation):
    x, blocks = operands()
    gradient = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1))
    mesh = mesh_of(data=8)
    result, found = run(gradient, put(mesh, x, "data"), put(mesh, blocks))
    assert_trees_close(result, gradient_on_one_device())
    assert result[1][0].sharding.spec == P("data")
    assert "all-gather" not in found
    if implementation != "dense":  # that one sums the dense gradient
        assert found == SUM_OF_GRADIENTS


@eight_devices
@pytest.mark.parametrize(
    ("mesh_type", "spec"),
    [(AxisType.Auto, "data"), (AxisType.Auto, ("data", "model")), (AxisType.Explicit, "data")],
)
def test_meshes_of_two_axes_and_shardings_in_types(mesh_type, spec):
    x, blocks = operands()
    gradient = jax.value_and_grad(loss, (0, 1))
    mesh = mesh_of(mesh_type, data=2, model=4)
    result, found = run(gradient, put(mesh, x, spec), put(mesh, blocks))
    assert_trees_close(result, gradient_on_one_device())
    assert found == SUM_OF_GRADIENTS


@eight_devices
@pytest.mark.parametrize("mesh_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_bias_is_replicated_and_its_gradient_summed(mesh_type, implementation):
    def loss(x, blocks, bias):
        y = sparse_conv(x, blocks, LAYOUT, geometry=GEOMETRY, bias=bias, implementation=implementation)
        return jnp.square(jnp.sin(y)).sum()

    args = *operands(), jnp.linspace(-1.0, 1.0, 12)
    gradient = jax.value_and_grad(loss, (0, 1, 2))
    mesh = mesh_of(mesh_type, data=8)
    x, blocks, bias = args
    result, found = run(gradient, put(mesh, x, "data"), put(mesh, blocks), put(mesh, bias))
    assert_trees_close(result, jax.jit(gradient)(*args))
    assert "all-gather" not in found
    if implementation != "dense":  # that one sums the dense gradient
        assert found == {"all-reduce": sorted(["f32[12]", *SUM_OF_GRADIENTS["all-reduce"]])}


@eight_devices
@pytest.mark.parametrize("manual", [{"data"}, {"data", "model"}])
def test_shard_map_with_all_or_some_axes_manual(manual):
    x, blocks = operands()

    def local(x, blocks):
        value, (dx, d_blocks) = jax.value_and_grad(loss, (0, 1))(x, blocks)
        return jax.lax.psum(value, "data"), (dx, jax.lax.psum(d_blocks, "data"))

    mesh = mesh_of(data=4, model=2)
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P(), (P("data"), P())), axis_names=manual,
        check_vma=False,
    )  # fmt: skip
    result, found = run(mapped, put(mesh, x, "data"), put(mesh, blocks))
    assert_trees_close(result, gradient_on_one_device())
    assert found == SUM_OF_GRADIENTS


@eight_devices
def test_linear_layers_of_any_rank():
    layout = make_layout(1, (8, 12), (4, 4), (2, 1))
    x, blocks = jax.random.normal(jax.random.key(0), (8, 3, 12)), jax.random.normal(jax.random.key(1), (3, 4, 4))

    def loss(x, blocks, bias):
        return jnp.sin(sparse_matmul(x, blocks, layout, bias=bias, implementation="xla")).sum()

    gradient, bias = jax.grad(loss, (0, 1, 2)), jnp.linspace(-1.0, 1.0, 8)
    mesh = mesh_of(data=8)
    result, found = run(gradient, put(mesh, x, "data"), put(mesh, blocks), put(mesh, bias))
    assert_trees_close(result, jax.jit(gradient)(x, blocks, bias))
    assert found == {"all-reduce": ["f32[3,4,4]", "f32[8]"]}


@eight_devices
def test_a_batch_that_the_devices_do_not_divide_counts_no_padding():
    x, blocks = operands()
    gradient = jax.value_and_grad(lambda x, blocks: loss(x[:12], blocks), (0, 1))
    mesh = mesh_of(data=8)
    result, _ = run(gradient, put(mesh, x, "data"), put(mesh, blocks))
    assert_trees_close(result, jax.jit(gradient)(x, blocks))


@eight_devices
@pytest.mark.parametrize("spec", [("data",), (None, "data")], ids=["mapped axis", "batch"])
def test_vmap_keeps_the_sharding_of_the_mapped_axis_or_of_the_batch(spec):
    x, blocks = operands(64)
    x = x.reshape(8, 8, *x.shape[1:])
    gradient = jax.vmap(jax.grad(loss, (0, 1)), (0, None))
    mesh = mesh_of(data=8)
    result, found = run(gradient, put(mesh, x, *spec), put(mesh, blocks))
    assert_trees_close(result, jax.jit(gradient)(x, blocks))
    assert found == ({} if spec == ("data",) else {"all-reduce": ["f32[8,8,4,4]"]})


@eight_devices
def test_gradients_accumulated_in_a_scan_with_remat():
    x, blocks = operands(32)
    x = x.reshape(2, 16, *x.shape[1:])

    def accumulated(x, blocks):
        def step(total, x):
            return total + jax.grad(jax.checkpoint(loss), 1)(x, blocks), None

        return jax.lax.scan(step, jnp.zeros_like(blocks), x)[0]

    mesh = mesh_of(data=8)
    result, found = run(accumulated, put(mesh, x, None, "data"), put(mesh, blocks))
    assert_trees_close(result, jax.jit(accumulated)(x, blocks))
    assert found == {"all-reduce": ["f32[8,4,4]"]}


@eight_devices
def test_a_train_step_gathers_nothing():
    sparse = functools.partial(SparseConv, density=0.25, block_shape=(4, 4), implementation="xla")

    def conv(*args, name, **options):
        return (sparse if name in ("conv_2", "conv_3") else nn.Conv)(*args, name=name, **options)

    model = models.create("convnet", num_classes=10, conv=conv, width_multiplier=0.25)
    optimizer = optax.sgd(0.1)
    images = jax.random.normal(jax.random.key(0), (16, 8, 8, 4))
    labels = jnp.arange(16, dtype=jnp.int32) % 10
    state = jax.jit(functools.partial(create_train_state, model, optimizer))(jax.random.key(1), images)
    mesh = mesh_of(data=8)
    args = put(mesh, jax.tree.map(jnp.copy, state)), put(mesh, images, "data"), put(mesh, labels, "data")
    compiled = train_step.lower(*args, model=model, optimizer=optimizer).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    result = compiled(*args)
    wanted = train_step(state, images, labels, model=model, optimizer=optimizer)
    assert_trees_close(result, wanted, 1e-4)


@pytest.mark.skipif(HAS_DEVICES, reason="this is the process with eight devices")
def test_all_of_this_file_with_eight_devices():
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAG}", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-8000:]
