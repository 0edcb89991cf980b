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

from dsb_jax.adapt import adaptation
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.measuring import measure
from dsb_jax.methods import DSB, RigL
from dsb_jax.ops import sparse_conv, sparse_matmul
from dsb_jax.train import adapt_step, train_step
from dsb_jax.train_state import create_train_state
from pallas_kernels import ConvGeometry
from tests.classifiers import by_numpy
from tests.conftest import make_layout
from tests.topologies import DrawnByNumPy

FLAG = "--xla_force_host_platform_device_count=8"
HAS_DEVICES = FLAG in os.environ["XLA_FLAGS"]
eight_devices = pytest.mark.skipif(not HAS_DEVICES, reason="runs in a process with eight devices")

GEOMETRY = ConvGeometry(4, (2, 1), (2, 1), ((1, 1), (0, 1)))
LAYOUT = make_layout(0, (12, 8), (4, 4), (2, 0, 1))


def operands(batch=16):
    """x, blocks, bias."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, np.float32) for shape in ((batch, 5, 5, 4), (3, 4, 4), (12,)))


def loss(x, blocks, bias=None, implementation="xla"):
    y = sparse_conv(x, blocks, LAYOUT, geometry=GEOMETRY, bias=bias, implementation=implementation)
    return jnp.square(jnp.sin(y)).sum()


dense_loss = functools.partial(loss, implementation="dense")  # compiles soonest: what is wanted comes from it


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
    return jax.jit(jax.value_and_grad(dense_loss, (0, 1)))(*operands()[:2])


@functools.cache
def gradient_with_bias_on_one_device():
    return jax.jit(jax.value_and_grad(dense_loss, (0, 1, 2)))(*operands())


SUM_OF_GRADIENTS = {"all-reduce": ["f32[3,4,4]", "f32[]"]}  # of the blocks, and the loss


@eight_devices
@pytest.mark.parametrize("implementation", ["native", "xla", "reference", "dense"])
def test_jit_sums_the_weight_gradient_and_gathers_nothing(implementation):
    x, blocks, _ = operands()
    gradient = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1))
    mesh = mesh_of(data=8)
    result, found = run(gradient, put(mesh, x, "data"), put(mesh, blocks))
    assert_trees_close(result, gradient_on_one_device())
    assert result[1][0].sharding.spec == P("data")
    assert "all-gather" not in found
    assert found == SUM_OF_GRADIENTS


@eight_devices
@pytest.mark.parametrize(
    ("mesh_type", "spec"), [(AxisType.Auto, "data"), (AxisType.Auto, ("data", "model")), (AxisType.Explicit, "data")]
)
def test_meshes_of_two_axes_and_shardings_in_types(mesh_type, spec):
    x, blocks, _ = operands()
    gradient = jax.value_and_grad(loss, (0, 1))
    mesh = mesh_of(mesh_type, data=2, model=4)
    result, found = run(gradient, put(mesh, x, spec), put(mesh, blocks))
    assert_trees_close(result, gradient_on_one_device())
    assert found == SUM_OF_GRADIENTS


@eight_devices
@pytest.mark.parametrize(
    ("implementation", "mesh_type"),
    [("native", AxisType.Explicit), ("xla", AxisType.Explicit), ("dense", AxisType.Auto)],
)
def test_bias_is_replicated_and_its_gradient_summed(implementation, mesh_type):
    x, blocks, bias = operands()
    gradient = jax.value_and_grad(functools.partial(loss, implementation=implementation), (0, 1, 2))
    mesh = mesh_of(mesh_type, data=8)
    result, found = run(gradient, put(mesh, x, "data"), put(mesh, blocks), put(mesh, bias))
    assert_trees_close(result, gradient_with_bias_on_one_device())
    assert "all-gather" not in found
    assert found == {"all-reduce": sorted(["f32[12]", *SUM_OF_GRADIENTS["all-reduce"]])}


@eight_devices
@pytest.mark.parametrize("manual", [{"data"}, {"data", "model"}])
def test_shard_map_with_all_or_some_axes_manual(manual):
    x, blocks, _ = operands()

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
    _, blocks, bias = operands()
    x, bias = np.random.default_rng(1).standard_normal((8, 3, 12), np.float32), bias[:8]

    def gradient(implementation):
        def loss(x, blocks, bias):
            return jnp.sin(sparse_matmul(x, blocks, layout, bias=bias, implementation=implementation)).sum()

        return jax.grad(loss, (0, 1, 2))

    mesh = mesh_of(data=8)
    result, found = run(gradient("xla"), put(mesh, x, "data"), put(mesh, blocks), put(mesh, bias))
    assert_trees_close(result, jax.jit(gradient("dense"))(x, blocks, bias))
    assert found == {"all-reduce": ["f32[3,4,4]", "f32[8]"]}


@eight_devices
def test_a_batch_that_the_devices_do_not_divide_counts_no_padding():
    x, blocks, _ = operands()

    def gradient(loss):
        return jax.value_and_grad(lambda x, blocks: loss(x[:12], blocks), (0, 1))

    mesh = mesh_of(data=8)
    result, _ = run(gradient(loss), put(mesh, x, "data"), put(mesh, blocks))
    assert_trees_close(result, jax.jit(gradient(dense_loss))(x, blocks))


@eight_devices
@pytest.mark.parametrize("spec", [("data",), (None, "data")], ids=["mapped axis", "batch"])
def test_vmap_keeps_the_sharding_of_the_mapped_axis_or_of_the_batch(spec):
    x, blocks, _ = operands(64)
    x = x.reshape(8, 8, *x.shape[1:])
    mesh = mesh_of(data=8)
    gradient, wanted = (jax.vmap(jax.grad(f, (0, 1)), (0, None)) for f in (loss, dense_loss))
    result, found = run(gradient, put(mesh, x, *spec), put(mesh, blocks))
    assert_trees_close(result, jax.jit(wanted)(x, blocks))
    assert found == ({} if spec == ("data",) else {"all-reduce": ["f32[8,3,4,4]"]})


@eight_devices
def test_gradients_accumulated_in_a_scan_with_remat():
    x, blocks, _ = operands(32)

    def accumulated(x, blocks):
        def step(total, x):
            return total + jax.grad(jax.checkpoint(loss), 1)(x, blocks), None

        return jax.lax.scan(step, jnp.zeros_like(blocks), x)[0]

    mesh = mesh_of(data=8)
    stacked = x.reshape(2, 16, *x.shape[1:])
    result, found = run(accumulated, put(mesh, stacked, None, "data"), put(mesh, blocks))
    assert_trees_close(result, jax.jit(jax.grad(dense_loss, 1))(x, blocks))
    assert found == {"all-reduce": ["f32[3,4,4]"]}


class ConvNet(nn.Module):
    """Layers as the models have them: a dense and a sparse convolution, batch norm, a mean, a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (3, 3), use_bias=False, kernel_init=by_numpy)(x)))
        sparse = functools.partial(SparseConv, density=0.25, block_shape=(4, 4), method=DrawnByNumPy())
        x = sparse(8, (3, 3), 2, use_bias=False, kernel_init=by_numpy, implementation="xla")(x)
        return nn.Dense(10, kernel_init=by_numpy)(nn.relu(nn.BatchNorm(not train)(x)).mean((1, 2)))


@eight_devices
def test_a_train_step_gathers_nothing():
    model, optimizer = ConvNet(), optax.sgd(0.1)
    images = np.random.default_rng(0).standard_normal((16, 8, 8, 4), np.float32)
    labels = np.arange(16, dtype=np.int32) % 10
    state = jax.jit(functools.partial(create_train_state, model, optimizer))(jax.random.key(1), images)
    state = jax.device_get(state)  # buffers on devices would be donated
    mesh = mesh_of(data=8)
    args = put(mesh, state), put(mesh, images, "data"), put(mesh, labels, "data")
    step = functools.partial(train_step, model=model, optimizer=optimizer)
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    assert set(collectives(compiled)) == {"all-reduce"}
    result = compiled(*args)
    wanted = train_step(state, images, labels, model=model, optimizer=optimizer)
    assert_trees_close(result, wanted, 1e-4)


class Layers(nn.Module):
    """Sparse layers, of blocks or, for RigL, of single weights."""

    method: object
    sizes: tuple[int, ...] = (12,)

    @nn.compact
    def __call__(self, x, train=False):
        sparse = functools.partial(SparseDense, num_blocks=8, block_shape=(4, 3), implementation="dense")
        for size in self.sizes:
            x = nn.tanh(sparse(size, kernel_init=by_numpy, method=self.method)(x))
        return nn.Dense(4, kernel_init=by_numpy)(x)


METHODS = {"dsb": DSB(), "norm": DSB(grow="norm"), "rigl": RigL()}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
X, Y = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32), np.arange(16, dtype=np.int32) % 4


def model_of(name):
    return Layers(RigL() if name == "rigl" else DrawnByNumPy())


@functools.cache
def loss_fn(name):
    def mean_loss(variables, x, y):
        logits = model_of(name).apply(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return mean_loss


@functools.cache
def begin(name):
    """params, topology, opt_state."""

    @jax.jit
    def begin(key):
        variables = model_of(name).init(key, X)
        return variables["params"], variables["topology"], OPTIMIZER.init(variables["params"])

    return begin(jax.random.key(0))


@functools.cache
def adapted_on_one_device(name):
    return adaptation(loss_fn(name), METHODS[name], OPTIMIZER)(*begin(name), 7, jax.random.key(1), X, Y)


def assert_adapted_alike(name, result):
    """The same topology, exactly; weights and moments moved alike, bit by bit."""
    for a, b in zip(jax.tree.leaves(result[:3]), jax.tree.leaves(adapted_on_one_device(name)[:3]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in
               zip(jax.tree.leaves(result[1]), jax.tree.leaves(begin(name)[1]), strict=True))  # fmt: skip


@eight_devices
@pytest.mark.parametrize(
    ("name", "shards", "check_vma"), [("dsb", 1, False), ("dsb", 8, True), ("norm", 8, False), ("rigl", 2, True)]
)
def test_shard_map_measures_the_whole_batch_and_replicas_agree(name, shards, check_vma):
    mesh = jax.make_mesh((shards,), ("data",), devices=jax.devices()[:shards], axis_types=(AxisType.Auto,))
    adapt = adaptation(loss_fn(name), METHODS[name], OPTIMIZER, axis_name="data")
    of_shard = measure(loss_fn(name), METHODS[name], axis_name="data")

    def local(params, topology, opt_state, x, y):
        statistics = of_shard(params, topology, x, y)
        *new, _ = adapt(params, topology, opt_state, 7, jax.random.key(1), x, y)
        return tuple(new), statistics

    specs = P(), P(), P(), P("data"), P("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    result, statistics = jax.jit(mapped)(*begin(name), X, Y)
    assert_adapted_alike(name, result)
    params, topology, _ = begin(name)
    assert_trees_close(statistics, measure(loss_fn(name), METHODS[name])(params, topology, X, Y), 1e-4)


@eight_devices
def test_pmap_leaves_every_replica_with_the_same_topology():
    """Of two devices; the steps of a classifier below, of all eight."""
    name, shards = "norm", 2
    adapt = adaptation(loss_fn(name), METHODS[name], OPTIMIZER, axis_name="batch")
    mapped = jax.pmap(
        lambda params, topology, opt_state, x, y: adapt(params, topology, opt_state, 7, jax.random.key(1), x, y),
        axis_name="batch",
        devices=jax.devices()[:shards],
    )
    result = mapped(*replicated(begin(name), shards), X.reshape(shards, -1, 12), Y.reshape(shards, -1))
    for replica in replicas(result[:3], range(shards)):
        assert_adapted_alike(name, replica)


# In NumPy: on the devices every leaf of another shape would be a compilation of its own.
def replicated(tree, shards):
    return jax.tree.map(lambda leaf: np.stack([leaf] * shards), jax.device_get(tree))


def replicas(tree, devices):
    tree = jax.device_get(tree)
    return [jax.tree.map(lambda leaf, i=device: leaf[i], tree) for device in devices]


@eight_devices
@pytest.mark.parametrize(
    ("name", "mesh_type"), [("dsb", AxisType.Auto), ("dsb", AxisType.Explicit), ("rigl", AxisType.Auto)]
)
def test_an_adaptation_keeps_shardings(name, mesh_type):
    """Blocks and moments over the devices, as the batch is; they come back as they went in."""
    mesh = mesh_of(mesh_type, data=8)
    sharded = mesh_type == AxisType.Auto

    def place(leaf):
        return put(mesh, leaf, *(["data"] if sharded and leaf.ndim == 3 and leaf.shape[0] % 8 == 0 else []))

    trees = jax.tree.map(place, begin(name))
    with jax.set_mesh(mesh):
        adapt = adaptation(loss_fn(name), METHODS[name], OPTIMIZER)
        result = adapt(*trees, 7, jax.random.key(1), put(mesh, X, "data"), put(mesh, Y, "data"))
    assert_adapted_alike(name, result)
    placed = [leaf.sharding for leaf in jax.tree.leaves(trees)]
    assert [leaf.sharding for leaf in jax.tree.leaves(result[:3])] == placed
    assert sharded == any(sharding.spec == P("data") for sharding in placed)


@eight_devices
def test_the_steps_of_a_classifier_keep_shardings_and_replicas_agree_under_pmap():
    model = Layers(DrawnByNumPy(), (16, 12))  # two loops, one after the other
    options = {"model": model, "optimizer": OPTIMIZER}
    state = jax.device_get(jax.jit(functools.partial(create_train_state, model, OPTIMIZER))(jax.random.key(0), X))
    want, _ = train_step(state, X, Y, **options)
    want, report = adapt_step(want, X, Y, method=METHODS["dsb"], **options)
    assert all(layer.accepted > 0 for layer in report.values())

    mesh = mesh_of(data=8)
    placed = jax.tree.map(lambda leaf: put(mesh, leaf, *["data"] * (leaf.ndim == 3)), state)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(placed.params)]
    new, _ = train_step(placed, put(mesh, X, "data"), put(mesh, Y, "data"), **options)
    new, _ = adapt_step(new, put(mesh, X, "data"), put(mesh, Y, "data"), method=METHODS["dsb"], **options)
    assert [leaf.sharding for leaf in jax.tree.leaves(new.params)] == shardings
    assert_trees_close(new.params, want.params, 1e-4)
    for a, b in zip(jax.tree.leaves(new.topology), jax.tree.leaves(want.topology), strict=True):
        np.testing.assert_array_equal(a, b)

    def both(state, x, y):
        state, _ = train_step(state, x, y, axis_name="batch", **options)
        return adapt_step(state, x, y, method=METHODS["dsb"], axis_name="batch", **options)[0]

    result = jax.pmap(both, axis_name="batch")(replicated(state, 8), X.reshape(8, 2, 12), Y.reshape(8, 2))
    for one in replicas(result, (0, 7)):
        assert_trees_close(one.params, want.params, 1e-4)
        for a, b in zip(jax.tree.leaves(one.topology), jax.tree.leaves(want.topology), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(HAS_DEVICES, reason="this is the process with eight devices")
def test_all_of_this_file_with_eight_devices():
    # NPROC: threads of XLA's pool. A collective holds one for each device, and two that do not wait for one another may
    # run at once: with as few threads as cores, all of them waited, and XLA ended the process.
    several = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAG}", "JAX_PLATFORMS": "cpu", "NPROC": "64"}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", __file__],
        env=os.environ | several,
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-8000:]
