"""Statistics of whole models: of the whole batch however it is mapped, of the sum of several calls, or none at all."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dsb_jax.adapt import adaptation
from dsb_jax.convert import to_dense
from dsb_jax.layout import BlockLayout
from dsb_jax.linen import SparseDense
from dsb_jax.measuring import measure
from dsb_jax.methods import DSB, SET, RigL
from dsb_jax.spec import linear_spec
from dsb_jax.topology import LayerTopology
from tests.topologies import DrawnByNumPy

METHODS = {"PanelGradientNorm": DSB(), "OutputInputNorms": DSB(grow="norm"), "Gradient": DSB(grow="gradient")}
X = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
Y = np.arange(16) % 4
layer = functools.partial(
    SparseDense, 12, num_blocks=6, block_shape=(4, 3), implementation="dense", method=DrawnByNumPy()
)


class Chain(nn.Module):
    """One sparse layer, called `calls` times in a row."""

    calls: int = 1

    @nn.compact
    def __call__(self, x):
        fc = layer(name="fc")
        for _ in range(self.calls):
            x = nn.tanh(fc(x))
        return nn.Dense(4, name="head")(x)


class Loop(nn.Module):
    """The same, in a loop that the trace sees once."""

    @nn.compact
    def __call__(self, x):
        shared = ["params", "topology", "statistics"]
        call = nn.scan(
            lambda fc, x, _: (nn.tanh(fc(x)), None), variable_broadcast=shared, split_rngs={"params": False}, length=3
        )
        return nn.Dense(4, name="head")(call(layer(name="fc"), x, None)[0])


class Block(nn.Module):
    calls: int = 1

    @nn.compact
    def __call__(self, x, _):
        fc = layer(name="fc")
        for _ in range(self.calls):
            x = nn.tanh(fc(x))
        return x, None


class Scanned(nn.Module):
    """A stack of layers, lifted along an axis of their arrays, recomputed in the backward pass."""

    axis: int = 0
    calls: int = 1

    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(("params", "topology", "statistics"), self.axis)
        stack = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=2)
        return nn.Dense(4, name="head")(stack(self.calls, name="stack")(x, None)[0])


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@functools.cache
def begin(model):
    """params, topology, opt_state; in NumPy, where slices and sums compile nothing."""

    @jax.jit
    def begin(key):
        variables = model.init(key, X)
        return variables["params"], variables["topology"], OPTIMIZER.init(variables["params"])

    return jax.device_get(begin(jax.random.key(0)))


# Cached: equal functions compile once.
@functools.cache
def loss_of(model):
    def loss(variables, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, x), y).mean()

    return loss


@functools.cache
def loss_by_example(model):
    """The same loss, one example at a time."""
    one = loss_of(model)
    return lambda variables, x, y: jax.vmap(lambda x, y: one(variables, x[None], y[None]))(x, y).mean()


def values(statistics, path=("fc",)):
    for name in (*path, "blocks"):
        statistics = statistics[name]
    return statistics


def close(result, wanted):
    for a, b in zip(jax.tree.leaves(result.value), jax.tree.leaves(wanted.value), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6 * float(np.abs(b).max()))


@functools.cache
def whole(kind):
    """The statistic of the whole batch on one device."""
    params, topology, _ = begin(Chain())
    return jax.device_get(values(measure(loss_of(Chain()), METHODS[kind])(params, topology, X, Y)))


def test_a_layer_worked_by_hand():
    """y = W x for two examples, loss = (y0 + 10 y1) / 2: dW = mean over examples of (1, 10) x^T."""
    layout = BlockLayout(
        jnp.array([[1, 0]], jnp.int32), jnp.array([[2]], jnp.uint16), jnp.array([0, 1], jnp.int32), (2, 3), (2, 1)
    )
    node = LayerTopology(layout, None, linear_spec(3, 2).with_blocks((2, 1), 1))
    params, topology = {"blocks": jnp.ones((1, 2, 1))}, {"blocks": node}
    model = SparseDense(2, num_blocks=1, block_shape=(2, 1), use_bias=False, implementation="dense")
    x = jnp.array([[3.0, 0.0, 4.0], [1.0, 8.0, -2.0]])

    def loss(variables, x):
        return (model.apply(variables, x) @ jnp.array([1.0, 10.0])).mean()

    def found(method):
        return measure(loss, method)(params, topology, x)["blocks"]

    gradient = np.outer([1, 10], [2, 4, 1])  # the mean of x is (2, 4, 1)
    np.testing.assert_allclose(found(RigL()).value, gradient, rtol=1e-6)
    np.testing.assert_allclose(found(DSB()).value, [np.sqrt(101) * np.array([2, 4, 1])], rtol=1e-6)
    norms = found(DSB(grow="norm")).value
    np.testing.assert_allclose(norms.dy_norm, np.sqrt([2 * 0.5**2, 2 * 5**2]), rtol=1e-6)
    np.testing.assert_allclose(norms.x_norm, np.sqrt([10, 64, 20]), rtol=1e-6)
    assert found(DSB()).calls == 1
    assert measure(loss, SET())(params, topology, x) == {}


@pytest.mark.parametrize("kind", METHODS)
def test_vmap_over_examples_gives_the_statistic_of_the_batch(kind):
    params, topology, _ = begin(Chain())
    found = values(measure(loss_by_example(Chain()), METHODS[kind])(params, topology, X, Y))
    close(found, whole(kind))
    assert found.calls == 1


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("PanelGradientNorm", loss_of), ("OutputInputNorms", loss_by_example), ("Gradient", loss_of),
     ("PanelGradientNorm", loss_by_example)],
)  # fmt: skip
def test_named_axes_give_the_statistic_of_the_whole_batch(kind, loss):
    """On every device alike; `vmap` with a name stands for devices here, tests/test_sharding.py has them."""
    params, topology, _ = begin(Chain())
    of_shard = measure(loss(Chain()), METHODS[kind], axis_name="data")
    shards = X.reshape(4, 4, 12), Y.reshape(4, 4)
    found = jax.device_get(jax.vmap(lambda x, y: of_shard(params, topology, x, y), axis_name="data")(*shards))
    for device in range(4):
        close(jax.tree.map(lambda leaf, i=device: leaf[i], values(found)), whole(kind))


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("PanelGradientNorm", loss_by_example), ("OutputInputNorms", loss_of), ("Gradient", loss_by_example)],
)
def test_vmap_over_models_and_over_batches_keeps_statistics_apart(kind, loss):
    params, topology, _ = begin(Chain())
    of, one_by_one = (measure(loss(Chain()), METHODS[kind]) for loss in (loss, loss_of))
    models = [params, jax.tree.map(lambda leaf: 2 * leaf, params)]
    batches = X.reshape(2, 8, 12), Y.reshape(2, 8)

    @jax.jit
    def mapped(two):
        by_model = jax.vmap(lambda params: of(params, topology, X, Y))(two)
        return values(by_model), values(jax.vmap(lambda x, y: of(params, topology, x, y))(*batches))

    found = jax.device_get(mapped(jax.tree.map(lambda *leaves: np.stack(leaves), *models)))
    np.testing.assert_array_equal(found[0].calls, [1, 1])
    for i in range(2):
        by_model, by_batch = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        close(by_model, values(one_by_one(models[i], topology, X, Y)))
        close(by_batch, values(one_by_one(params, topology, *(part[i] for part in batches))))


@pytest.mark.parametrize(("kind", "calls"), [("PanelGradientNorm", 3), ("OutputInputNorms", 2), ("Gradient", 2)])
def test_several_calls_of_a_layer_give_the_norm_of_the_sum(kind, calls):
    params, topology, _ = begin(Chain(calls))
    found = values(measure(loss_of(Chain(calls)), METHODS[kind])(params, topology, X, Y))

    @jax.jit
    @jax.grad
    def dense(params):
        x = X
        for _ in range(calls):
            x = jnp.tanh(x @ params["fc"]["kernel"] + params["fc"]["bias"][None])
        logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    gradient = np.asarray(dense(jax.jit(to_dense)(params, topology))["fc"]["kernel"]).T
    assert found.calls == calls
    if kind == "OutputInputNorms":
        assert (np.abs(gradient) <= np.outer(*found.value) * (1 + 1e-5)).all()
    elif kind == "Gradient":
        np.testing.assert_allclose(found.value, gradient, rtol=1e-4, atol=1e-6)
    else:
        out_idx = topology["fc"]["blocks"].layout.out_idx
        np.testing.assert_allclose(found.value, np.linalg.norm(gradient[out_idx], axis=1), rtol=1e-4, atol=1e-6)


def adapted(model, method, loss=None, x=X):
    """Parameters, topology and report of one adaptation, and whether anything has changed."""
    params, topology, opt_state = begin(model)
    adapt = adaptation(loss or loss_of(model), method, OPTIMIZER)
    new_params, new_topology, _, report = adapt(params, topology, opt_state, 1, jax.random.key(1), x, Y)
    leaves = zip(jax.tree.leaves((params, topology)), jax.tree.leaves((new_params, new_topology)), strict=True)
    (layer_report,) = report.values()
    return layer_report, any((np.asarray(a) != np.asarray(b)).any() for a, b in leaves)


def test_a_loop_over_a_layer_leaves_it_as_it_is_where_norms_do_not_add_up():
    report, has_changed = adapted(Loop(), METHODS["PanelGradientNorm"])
    assert (int(report.calls), int(report.status), int(report.requested), has_changed) == (3, 4, 0, False)
    report, has_changed = adapted(Loop(), METHODS["Gradient"])  # sums of gradients are gradients
    assert (int(report.calls), int(report.status), has_changed) == (3, 0, True)


def test_a_loss_that_drops_the_statistics_leaves_the_layer_as_it_is():
    def loss(variables, x, y):
        return loss_of(Chain())({name: variables[name] for name in ("params", "topology")}, x, y)

    report, has_changed = adapted(Chain(), DSB(), loss)
    assert (int(report.calls), int(report.status), has_changed) == (0, 3, False)


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_not_finite_changes_nothing(kind):
    for bad in (np.inf, np.nan):
        x = X.copy()
        x[3, 0] = bad
        report, has_changed = adapted(Chain(), METHODS[kind], x=x)
        assert (int(report.calls), int(report.status), int(report.accepted), has_changed) == (1, 5, 0, False)
    report, has_changed = adapted(Chain(), METHODS[kind])
    assert (int(report.status), has_changed) == (0, True)


@pytest.mark.parametrize(("axis", "calls"), [(0, 2), (1, 1)])
def test_stacked_layers_are_observed_each(axis, calls):
    """Each has the norms of its own dense gradient, of the sum if it is called twice."""
    model = Scanned(axis, calls)
    params, topology, _ = begin(model)
    found = jax.device_get(values(measure(loss_of(model), DSB())(params, topology, X, Y), ("stack", "fc")))
    np.testing.assert_array_equal(found.calls, [calls, calls])

    @jax.jit
    @jax.grad
    def dense(params):
        x, stack = X, params["stack"]["fc"]
        for i in range(2):
            for _ in range(calls):
                x = jnp.tanh(x @ stack["kernel"].take(i, axis) + stack["bias"].take(i, axis)[None])
        logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    kernels = np.asarray(dense(jax.jit(to_dense)(params, topology))["stack"]["fc"]["kernel"])
    out_idx = topology["stack"]["fc"]["blocks"].layout.out_idx
    for i in range(2):
        gradient = np.take(kernels, i, axis).T
        wanted = np.linalg.norm(gradient[out_idx.take(i, axis)], axis=1)
        np.testing.assert_allclose(found.value.take(i, axis), wanted, rtol=1e-4, atol=1e-6)
    if axis == 1:  # 0 is adapted in test_method_contract.py
        report, has_changed = adapted(model, DSB())
        np.testing.assert_array_equal(report.calls, [1, 1])
        np.testing.assert_array_equal(report.status, [0, 0])
        assert has_changed


def test_no_dense_gradient_exists_while_norms_are_averaged_over_devices():
    """Of 64 groups of 4 rows, 32 at a time: the program has no array as large as the layer's 256x48 weights."""
    model = nn.Sequential([SparseDense(256, num_blocks=90, block_shape=(4, 4), implementation="xla")])
    x = jnp.ones((4, 48))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(variables, x):
        return jnp.square(model.apply(variables, x)).mean()

    of_shard = measure(loss, DSB(), axis_name="data")
    traced = jax.make_jaxpr(of_shard, axis_env=[("data", 2)])(variables["params"], variables["topology"], x)
    shapes = [[int(n) for n in sizes.split(",")] for sizes in re.findall(r"\w\[(\d[\d,]*)\]", str(traced))]
    assert [32, 4, 48] in shapes
    assert max(map(math.prod, shapes)) < 256 * 48
