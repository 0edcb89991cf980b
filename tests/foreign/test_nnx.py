"""NNX models of other code bases, unmodified: planned, made sparse in place, trained with adaptations, dense again."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import dsb_jax as dsb
from dsb_jax.paths import nodes
from tests.foreign.nnx_models import MODELS, labels

METHOD = dsb.methods.DSB(update_interval=2, update_end_step=100)


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    return request.param


@functools.cache
def planned(name):
    """The plan of a model, the sparse model, split so that each test has its own, and the dense one's names."""
    foreign = MODELS[name]
    model = foreign.make(nnx.Rngs(0))
    names = variables(model)
    plan = dsb.nnx.plan(model, *foreign.inputs(jax.random.key(1)), sparsity=0.75, block_shape=(8, 4), min_blocks=1)
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1), implementation="dense")  # which compiles fastest
    return plan, nnx.split(model), names


def variables(model):
    """{path of a Variable: its type}."""
    return {keys: type(variable) for keys, variable in nnx.to_flat_state(nnx.state(model))}


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def all_but_weights(model):
    """Batch statistics, keys and counters of dropout."""
    state = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, dsb.nnx.Topology))))
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_plan_counts_what_the_model_has(name):
    plan, split, names = planned(name)
    model = nnx.merge(*split, copy=True)
    assert len(plan.sparse) == MODELS[name].num_sparse, str(plan)
    plan.check(dsb.nnx.params(model))
    assert set(nodes(dsb.nnx.topology(model))) == {(*path, "blocks") for path in plan.sparse}
    phantom = sum(spec.num_blocks * 32 - spec.num_active for spec in plan.sparse.values())  # rows of a ragged group
    assert sum(leaf.size for leaf in jax.tree.leaves(dsb.nnx.params(model))) == plan.num_params + phantom
    assert plan.sparsity() == pytest.approx(0.75, abs=0.01)
    made = {tuple(map(str, keys[:-1])): keys[:-1] for keys in names}
    for path in plan.sparse:  # instead of the kernel; all else is called as it was
        names = names | {(*made[path], "blocks"): nnx.Param, (*made[path], "topology"): dsb.nnx.Topology}
        assert names.pop((*made[path], "kernel")) is nnx.Param
    assert variables(model) == names


def test_trained_and_adapted(name):
    """Somebody's loop. What an adaptation calls the model for leaves no trace; the dense model computes the same."""
    foreign = MODELS[name]
    model = nnx.merge(*planned(name)[1], copy=True)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    inputs = foreign.inputs(jax.random.key(3))

    def loss_fn(model, *inputs):
        logits = foreign.logits(model, *inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels(logits)).mean()

    @nnx.jit
    def train_step(model, optimizer, *inputs):
        loss, gradients = nnx.value_and_grad(loss_fn)(model, *inputs)
        optimizer.update(model, gradients)
        return loss

    losses, reports, first = [], [], jax.device_get(dsb.nnx.topology(model))
    for step in range(6):
        before = all_but_weights(model)
        if METHOD.due(step):
            key = jax.random.key(step)
            reports.append(dsb.nnx.adapt(model, optimizer, loss_fn, METHOD, *inputs, step=step, key=key))
            assert_same_bits(before, all_but_weights(model))
        losses.append(float(train_step(model, optimizer, *inputs)))
        with pytest.raises(AssertionError):  # a training step counts what it draws
            assert_same_bits(before, all_but_weights(model))
    assert losses[-1] < losses[0]
    assert len(reports) == 2
    for report in reports:
        assert len(report) == foreign.num_sparse
        assert not any(np.asarray(layer.status).any() for layer in report.values())
    last = jax.device_get(dsb.nnx.topology(model))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True))
    dsb.validate_topology(last)

    dense, loaded = dsb.nnx.to_dense(model), foreign.make(nnx.Rngs(7))
    nnx.update(loaded, nnx.state(dense))  # as the code base would load it
    ours, theirs = (nnx.jit(foreign.logits)(of, *inputs) for of in (nnx.clone(model), loaded))  # same draws of dropout
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
    again = dsb.nnx.from_dense(dense, topology=dsb.nnx.topology(model))
    assert_same_bits(dsb.nnx.params(model), dsb.nnx.params(again))
    assert_same_bits(dsb.nnx.topology(model), dsb.nnx.topology(again))
