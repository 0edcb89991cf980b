"""`dsb.nnx.adapt`, `restage`, `check_optimizer`, and checkpoints of NNX models with plain Orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import dsb_jax as dsb
from dsb_jax.checkpoint import Checkpoints, restore
from dsb_jax.methods import DSB, SET
from tests.nnx_models import MLP, WIDTH
from tests.test_nnx_sparsify import SIZES, arrays, assert_same_bits, sparse

KEY = jax.random.key(0)
X, LABELS = jax.random.normal(KEY, (8, WIDTH)), jnp.arange(8) % 4
METHOD = DSB(update_interval=2, update_end_step=100)


class Square(MLP):
    """Two equal layers, which share what is compiled for them."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.first, self.second = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))


class Net(Square):
    """With everything that counts in a forward pass."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm, self.dropout = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.third(self.dropout(nnx.relu(self.norm(self.second(nnx.relu(self.first(x)))))))


def loss_fn(model, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def with_aux(model, x, labels):
    return loss_fn(model, x, labels), {"anything": x}


@nnx.jit
def train_step(model, optimizer, x, labels):
    loss, gradients = nnx.value_and_grad(loss_fn)(model, x, labels)
    optimizer.update(model, gradients)
    return loss


def made(cls=Net, tx=None, **options):
    """A sparse model and its optimizer, after a step."""
    model = sparse(cls(nnx.Rngs(0)), X, implementation="dense", **options)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3) if tx is None else tx, wrt=nnx.Param)
    train_step(model, optimizer, X, LABELS)
    return model, optimizer


def adapt(model, optimizer, loss=loss_fn, method=METHOD, **options):
    return dsb.nnx.adapt(model, optimizer, loss, method, X, LABELS, step=2, key=jax.random.key(1), **options)


@pytest.fixture(scope="module")
def before():
    """Split, so that tests make models of their own."""
    return nnx.split(made())


def test_it_moves_weights_and_moments_and_nothing_else(before):
    model, optimizer = nnx.merge(*before, copy=True)
    old = nnx.clone((model, optimizer))
    report = adapt(model, optimizer)
    assert set(report) == {("first",), ("second",)}
    assert all(layer.accepted > 0 and layer.status == 0 for layer in report.values())
    dsb.validate_topology(dsb.nnx.topology(model))
    moved = dsb.repack(
        dsb.nnx.params(old[0]), dsb.nnx.topology(old[0]), dsb.nnx.topology(model)
    )  # the weights that stay, bit by bit; those that are new are 0
    assert_same_bits(dsb.nnx.params(model), moved)
    mean = dsb.repack(
        nnx.to_pure_dict(nnx.state(old[1].opt_state[0].mu)), dsb.nnx.topology(old[0]), dsb.nnx.topology(model)
    )
    assert_same_bits(nnx.to_pure_dict(nnx.state(optimizer.opt_state[0].mu)), mean)
    for kind in (nnx.BatchStat, nnx.RngState):  # measured on a copy
        assert_same_bits(nnx.state(model, kind), nnx.state(old[0], kind))
    assert int(optimizer.step[...]) == int(old[1].step[...])
    assert np.any(model.first.topology.layout.in_idx != old[0].first.topology.layout.in_idx)
    assert nnx.graphdef((model, optimizer)) == nnx.graphdef(old)  # all sizes stay: nothing compiles again
    assert jax.tree.map(jnp.shape, arrays(nnx.state(model))) == jax.tree.map(jnp.shape, arrays(nnx.state(old[0])))


def test_inside_of_nnx_jit_and_of_jit_over_a_split(before):
    outside, inside = nnx.merge(*before, copy=True), nnx.merge(*before, copy=True)
    adapt(*outside)
    nnx.jit(lambda model, optimizer: adapt(model, optimizer))(*inside)
    graphdef, state = before

    @jax.jit
    def compiled(state):
        both = nnx.merge(graphdef, state, copy=True)
        adapt(*both)
        return nnx.state(both)

    wanted = nnx.state(outside)
    for other in (nnx.state(inside), compiled(state)):
        for a, b in zip(arrays(other), arrays(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_options_of_the_core(before):
    model, optimizer = nnx.merge(*before, copy=True)
    assert set(adapt(model, optimizer, with_aux, has_aux=True)) == {("first",), ("second",)}
    report = adapt(model, optimizer, where=lambda path: path == ("second",), fill={"nu": "zero"})
    assert [int(layer.status) for layer in report.values()] == [1, 0]


def test_methods_without_statistics_call_no_loss():
    model, optimizer = made(method=SET(update_end_step=100))
    report = adapt(model, optimizer, loss=lambda *_: 1 / 0, method=SET(update_end_step=100))
    assert all(layer.accepted > 0 for layer in report.values())


def test_layers_that_the_optimizer_does_not_train_stay(before):
    model, _ = nnx.merge(*before, copy=True)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.All(nnx.Param, nnx.PathContains("second")))
    first = nnx.state(model.first)
    assert set(adapt(model, optimizer)) == {("second",)}
    assert_same_bits(nnx.state(model.first), first)


def test_a_layer_that_is_called_twice():
    """The norm of the sum, not the sum of the norms: as the core counts it, whatever the face."""

    class Twice(Square):
        def __call__(self, x):
            return self.third(self.second(nnx.relu(self.first(nnx.relu(self.second(nnx.relu(self.first(x))))))))

    report = adapt(*made(Twice))
    assert [int(layer.calls) for layer in report.values()] == [2, 2]
    assert not any(int(layer.status) for layer in report.values())


def test_replicas_agree_over_a_named_axis(before):
    def on_each(x, labels):
        both = nnx.merge(*before, copy=True)
        dsb.nnx.adapt(*both, loss_fn, METHOD, x, labels, step=2, key=KEY, axis_name="replicas")
        return nnx.state(both, (nnx.Param, dsb.nnx.Topology))

    halves = jax.vmap(on_each, axis_name="replicas")(X.reshape(2, 4, WIDTH), LABELS.reshape(2, 4))
    for leaf in jax.tree.leaves(halves):
        np.testing.assert_array_equal(leaf[0], leaf[1])


def test_in_tree_mode(before):
    with nnx.set_graph_mode(False):
        model = sparse(Square(nnx.Rngs(0)), X, implementation="dense")
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        assert all(layer.accepted > 0 for layer in adapt(model, optimizer).values())


def test_an_optimizer_of_the_dense_model_is_refused_by_name():
    model = Square(nnx.Rngs(0))
    plan, optimizer = dsb.nnx.plan(model, X, **SIZES), nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1))
    state = nnx.state(model)
    message = "made before the model became sparse: its state has nothing for 0/mu/first/blocks; make it after sparsify"
    for call in (
        lambda: dsb.nnx.check_optimizer(optimizer, model),
        lambda: adapt(model, optimizer),
        lambda: dsb.nnx.restage(model, optimizer, plan, METHOD, KEY),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same_bits(nnx.state(model), state)
    dsb.nnx.check_optimizer(nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), model)
    with pytest.raises(ValueError, match="cannot follow the blocks of a sparse layer"):
        dsb.nnx.check_optimizer(nnx.Optimizer(model, optax.sm3(0.1), wrt=nnx.Param), model)
    with pytest.warns(UserWarning, match="DSB grows by gradients"):
        dsb.nnx.check_optimizer(nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), model, METHOD)


ERRORS = {
    "no model": (lambda m, o: adapt(m.first.blocks, o), "is no nnx.Module"),
    "no optimizer": (lambda m, o: adapt(m, o.tx), "is no nnx.Optimizer; make one"),
    "a dense model": (
        lambda m, o: adapt(dsb.nnx.to_dense(m), o), "this Net has no sparse layers that the optimizer trains",
    ),
    "another storage": (
        lambda m, o: adapt(m, o, method=dsb.methods.RigL()),
        "RigL adapts layers with storage 'single'",
    ),
    "no method": (lambda m, o: adapt(m, o, method="dsb"), "method='dsb' is no method"),
    "no loss": (lambda m, o: adapt(m, o, loss=lambda model, x, labels: model(x)), r"the loss is float32\[8, 4\]"),
    "a pair": (lambda m, o: adapt(m, o, loss=with_aux), r"loss_fn returned \(loss, aux\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_change_nothing(case, before):
    call, message = ERRORS[case]
    model, optimizer = nnx.merge(*before, copy=True)
    with pytest.raises(ValueError, match=message):
        call(model, optimizer)
    assert_same_bits(nnx.state((model, optimizer)), before[1])


def test_density_in_stages(before):
    model, optimizer = nnx.merge(*before, copy=True)
    plan = dsb.nnx.plan(Net(nnx.Rngs(0)), X, **SIZES | {"sparsity": 0.9})
    old, layout = model.first.blocks[...], dsb.nnx.topology(model)
    dsb.nnx.restage(model, optimizer, plan, METHOD, KEY)
    plan.check(dsb.nnx.params(model))
    assert optimizer.opt_state[0].mu["first"]["blocks"].shape == model.first.blocks.shape
    kept = dsb.to_dense(dsb.nnx.params(model), dsb.nnx.topology(model))["first"]["kernel"]
    was = dsb.to_dense({"first": {"blocks": old}}, {"first": layout["first"]})["first"]["kernel"]
    mask = dsb.masks(dsb.nnx.topology(model))["first"]["kernel"]
    np.testing.assert_array_equal(kept, jnp.where(mask, was, 0))
    train_step(model, optimizer, X, LABELS)


def trained(model, optimizer, steps):
    for step in steps:
        if METHOD.due(step):
            dsb.nnx.adapt(model, optimizer, loss_fn, METHOD, X, LABELS, step=step, key=jax.random.key(step))
        train_step(model, optimizer, X, LABELS)
    return nnx.state((model, optimizer))


def test_a_checkpoint_goes_on_with_equal_bits(tmp_path):
    """Plain Orbax against shapes, and our own; then the same steps."""
    plan = dsb.nnx.plan(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), X, **SIZES)

    def make():
        model = dsb.nnx.sparsify(Net(nnx.Rngs(0)), plan, rngs=nnx.Rngs(1), implementation="dense")
        return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    both = make()
    saved = trained(*both, range(5))
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", saved)
    with ocp.StandardCheckpointer() as checkpointer:
        by_orbax = checkpointer.restore(tmp_path / "orbax", abstract)
    with Checkpoints(tmp_path / "ours", {}) as checkpoints:
        checkpoints.save(saved, step=5, test_accuracy=0.5)
    ours, _ = restore(tmp_path / "ours", abstract)
    wanted = trained(*both, range(5, 10))
    for restored in (by_orbax, ours):
        assert_same_bits(trained(*nnx.merge(graphdef, restored), range(5, 10)), wanted)
