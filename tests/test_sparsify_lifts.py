"""Sparse models under whatever Flax lifts layers by, and their adaptation."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.methods import DSB, LayerState, Static
from dsb_jax.ops.dispatch import record_choices
from dsb_jax.paths import nodes
from dsb_jax.topology import LayerTopology
from tests.conftest import always
from tests.linen_models import (
    KEY,
    Block,
    Layer,
    X,
    assert_close,
    assert_like_dense,
    plan_of,
    sparse,
    squares,
)
from tests.topologies import assert_same_bits

FLAG = "--xla_force_host_platform_device_count=2"
HAS_DEVICES = FLAG in os.environ["XLA_FLAGS"]
DSB_ = DSB(update_end_step=100)


def scan(block, axis, length=3):
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)


def mapped(axis, in_axes=None, size=2):
    return nn.vmap(
        Layer, variable_axes={"params": axis}, split_rngs={"params": True}, in_axes=in_axes, axis_size=size
    )  # fmt: skip


class Ensemble(nn.Module):
    """Layers under nn.vmap, for nn.scan."""

    axis: int = 0

    @nn.compact
    def __call__(self, x, _):
        return mapped(self.axis, in_axes=0, size=4)()(x), None


class Scanned(nn.Module):
    block: object = Block
    axis: int = 0
    length: int = 3

    @nn.compact
    def __call__(self, x):
        return scan(self.block, self.axis, self.length)(name="layers")(x, None)[0]


class Called(nn.Module):
    """One call of a lifted class."""

    made: object

    @nn.compact
    def __call__(self, x):
        y = self.made()(x)
        return y[0] if isinstance(y, tuple) else y


class Broadcast(nn.Module):
    """One layer, in every step of a loop."""

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            return module(x)

        return nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=3)(Block(), x, None)[0]


class Loop(nn.Module):
    """A while loop, whose body is called once to be initialized."""

    @nn.compact
    def __call__(self, x):
        def body(module, carry):
            return carry[0] + 1, nn.tanh(nn.Dense(16, name="dense")(carry[1]))

        start = (0, x)
        if self.is_mutable_collection("params"):
            return body(self, start)[1]
        return nn.while_loop(lambda _, carry: carry[0] < 3, body, self, start)[1]


LIFTED = {
    # model, kernel's shape, lifted axes
    "scan": (Scanned(), (3, 16, 16), (0,)),
    "scan along 1": (Scanned(axis=1), (16, 3, 16), (1,)),
    "scan of remat": (Scanned(nn.remat(Block)), (3, 16, 16), (0,)),
    "scan along 1 of vmap": (Scanned(Ensemble, axis=1), (4, 3, 16, 16), (0, 1)),
    "remat_scan": (Called(lambda: nn.remat_scan(Layer, lengths=(2, 3))()), (2, 3, 16, 16), (0, 1)),
    "broadcast scan": (Broadcast(), (16, 16), ()),
    "remat": (Called(nn.remat(Layer)), (16, 16), ()),
    "jit": (Called(nn.jit(Block)), (16, 16), ()),
    "vmap itself": (mapped(0)(), (2, 16, 16), (0,)),
    "jit of remat itself": (nn.jit(nn.remat(Layer))(), (16, 16), ()),
}


@pytest.mark.parametrize(
    "name", always("scan", "scan along 1 of vmap", "broadcast scan", "jit of remat itself", of=LIFTED)
)
def test_lifted_layers(name):
    model, kernel_shape, axes = LIFTED[name]
    model.init(KEY, X)  # caches of nn.jit must not leak into the sparse model
    plan = plan_of(model, X)
    variables = assert_like_dense(sparse(model, plan=plan), model, X)
    plan.check(variables["params"])
    (node,) = nodes(variables["topology"]).values()
    assert (node.kernel_shape, node.stack_axes) == (kernel_shape, axes)
    assert node.num_layers * 128 == plan.num_params - plan.num_other


def test_a_while_loop():
    model = sparse(Loop(), X)
    variables = model.init(KEY, X)
    dense = dsb.to_dense(variables["params"], variables["topology"])
    assert_close(model.apply(variables, X), Loop().apply({"params": dense}, X))


def test_each_layer_of_a_stack_draws_its_own():
    """Layout, and the weights that the dense model draws for it."""
    model = Scanned(axis=1)
    variables = sparse(model, X, method=Static()).init(KEY, X)
    kernel = np.asarray(model.init(KEY, X)["params"]["layers"]["Dense_0"]["kernel"])
    kept = np.asarray(dsb.to_dense(variables["params"], variables["topology"])["layers"]["Dense_0"]["kernel"])
    scale = np.sqrt(16 / (kept != 0).sum(axis=0, keepdims=True))
    np.testing.assert_allclose(kept, np.where(kept != 0, kernel * scale, 0), rtol=1e-6)
    patterns = {(kept[:, i] != 0).tobytes() for i in range(3)}
    assert len(patterns) == 3


def test_what_no_node_can_stack_stays_dense():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(16)(Scanned(functools.partial(Block, use_bias=False), axis=-1)(x))

    plan = plan_of(Model(), X)
    assert (
        plan["Scanned_0", "layers", "Dense_0"] == "lifted along axis -1; blocks and layouts have axes 0 and 1 in common"
    )
    assert plan.num_dense_params == 4 * 256 + 16
    variables = sparse(Model(), plan=plan).init(KEY, X)
    assert list(variables["topology"]) == ["Dense_0"]
    plan.check(variables["params"])


def test_one_jitted_layer_in_several_sparse_models():
    """In one process: two plans, and two implementations of each; each computes its own."""
    model = Called(nn.jit(Block))
    dense = model.init(KEY, X)
    before, seen = model.apply(dense, X), []
    for sparsity in (0.5, 0.75):
        plan = plan_of(model, X, sparsity=sparsity, min_group_blocks=0)
        for name in ("dense", "reference"):
            made = sparse(model, plan=plan, implementation=name)
            variables = made.init(KEY, X)
            with record_choices() as choices:
                y = made.apply(variables, X)
            assert [choice.implementation for choice in choices.values()] == [name]
            kept = dsb.to_dense(variables["params"], variables["topology"])
            assert_close(y, model.apply({"params": kept}, X))
            seen.append(np.asarray(y))
    np.testing.assert_array_equal(model.apply(dense, X), before)
    assert np.abs(seen[0] - seen[2]).max() > 0.1
    assert_close(*seen[:2])


def layers_of(tree, axis, count):
    return [jax.tree.map(lambda leaf, i=i: np.take(leaf, i, axis), tree) for i in range(count)]


NAMES = [f"layer_{i}" for i in range(12)]
SINGLE = sparse(nn.Dense(16), X)
UPDATE = jax.jit(DSB_.update)


def looped(variables, x):
    """The loss of twelve layers that follow each other, each with variables of its own."""
    for name in NAMES:
        x = nn.tanh(SINGLE.apply({collection: tree[name] for collection, tree in variables.items()}, x))
    return jnp.square(x).mean()


@pytest.mark.parametrize("axis", always(1, of=[0, 1]))
def test_a_stack_of_twelve_is_adapted_as_twelve_layers(axis):
    """Statistics of each layer, and its new layout and weights, are those of a loop with the same weights."""
    model = sparse(Scanned(axis=axis, length=12), X)
    variables = jax.device_get(model.init(KEY, X))
    params, topology = variables["params"], variables["topology"]
    node, blocks = (tree["layers"]["Dense_0"]["blocks"] for tree in (topology, params))
    spec = plan_of(nn.Dense(16), X).sparse[()]
    parts = layers_of((blocks, node.layout, node.index), axis, 12)
    each = [LayerTopology(layout, None, spec, index) for _, layout, index in parts]

    loss = functools.partial(squares, model)
    measured = jax.device_get(dsb.measure(loss, DSB_)(params, topology, X))["layers"]["Dense_0"]["blocks"]
    weights = {name: tree["Dense_0"] for name, tree in zip(NAMES, layers_of(params["layers"], axis, 12), strict=True)}
    apart = {name: {"blocks": one} for name, one in zip(NAMES, each, strict=True)}
    wanted = jax.device_get(dsb.measure(looped, DSB_)(weights, apart, X))
    statistics = layers_of(measured.value, axis, 12)
    assert measured.calls.tolist() == [1] * 12
    for name, statistic in zip(NAMES, statistics, strict=True):
        value = wanted[name]["blocks"].value
        assert value.max() > 0
        np.testing.assert_allclose(statistic, value, rtol=1e-4, atol=1e-6 * value.max())
    assert len({statistic.tobytes() for statistic in statistics}) == 12

    new, new_topology, _, report = jax.device_get(
        dsb.adaptation(loss, DSB_, optax.sgd(0.1))(params, topology, optax.sgd(0.1).init(params), 3, KEY, X)
    )
    dsb.validate_topology(new_topology)
    assert report["layers", "Dense_0"].accepted.min() > 0
    new_node = new_topology["layers"]["Dense_0"]["blocks"]
    got = layers_of((new["layers"]["Dense_0"]["blocks"], new_node.layout), axis, 12)
    keys = jax.random.split(jax.random.split(KEY, 1)[0], 12)
    for key, statistic, part, result in zip(keys, statistics, parts, got, strict=True):
        state, _ = UPDATE(key, 3, LayerState(part[0], part[1]), statistic)
        assert_same_bits(result, jax.device_get((state.blocks, state.layout)))
    assert len({layout.in_idx.tobytes() for _, layout in got}) == 12
    assert all((a.in_idx != b.layout.in_idx).any() for (_, a), b in zip(got, each, strict=True))


OPTIMIZER = optax.adam(1e-2)
TWO = Scanned(length=2)
LOSS = functools.partial(squares, sparse(TWO, X))


def train_and_adapt(params, topology, opt_state, x, axis_name=None):
    gradients = jax.grad(lambda params: LOSS({"params": params, "topology": topology}, x))(params)
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients, axis_name)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    adapt = dsb.adaptation(LOSS, DSB_, OPTIMIZER, axis_name=axis_name)
    return adapt(params, topology, opt_state, 3, KEY, x)


@pytest.mark.skipif(not HAS_DEVICES, reason="runs in a process with two devices")
def test_training_and_adapting_in_one_compiled_function_and_under_pmap():
    model = sparse(TWO, X)
    variables = jax.device_get(model.init(KEY, X))
    params, topology = variables["params"], variables["topology"]
    trees = params, topology, jax.device_get(OPTIMIZER.init(params))
    *new, report = jax.device_get(jax.jit(train_and_adapt)(*trees, X))
    assert report["layers", "Dense_0"].accepted.min() > 0
    assert jax.tree.structure(new) == jax.tree.structure(list(trees))
    dsb.validate_topology(new[1])
    dense = dsb.to_dense(*new[:2])
    assert_close(model.apply({"params": new[0], "topology": new[1]}, X), TWO.apply({"params": dense}, X))

    replicated = jax.tree.map(lambda leaf: np.stack([leaf] * 2), trees)
    run = jax.pmap(functools.partial(train_and_adapt, axis_name="batch"), axis_name="batch")
    *replicas, _ = jax.device_get(run(*replicated, X.reshape(2, 2, 16)))
    for replica in layers_of(replicas, 0, 2):
        assert_close(replica[0], new[0], 1e-4)
        assert_same_bits(replica[1], new[1])


@pytest.mark.skipif(HAS_DEVICES, reason="this is the process with two devices")
def test_the_same_with_two_devices():
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "pmap", __file__],
        env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {FLAG}", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-8000:]
    assert "1 passed" in child.stdout, child.stdout
