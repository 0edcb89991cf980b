"""The two faces of Flax, from the same weights on the same data: the same bits, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dsb_jax as dsb
from tests.conftest import always
from tests.nnx_models import BOTH, CLASSES

SIZES = {"sparsity": 0.75, "block_shape": (8, 4), "min_blocks": 1}
METHOD = dsb.methods.DSB(update_interval=20, update_end_step=100)
STEPS = 60  # adapting before 20, 40 and at the end


def batches(shape):
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(3), step)
        x = jax.random.normal(key, shape)
        yield step, x, (x.reshape(shape[0], -1)[:, :CLASSES]).argmax(axis=1)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained_by_linen(model, params, topology, tx, shape):
    def loss_fn(variables, x, labels):
        return cross_entropy(model.apply(variables, x), labels)

    @jax.jit
    def train_step(params, topology, opt_state, x, labels):
        loss, gradients = jax.value_and_grad(lambda p: loss_fn({"params": p, "topology": topology}, x, labels))(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    adapt, opt_state, losses = dsb.adaptation(loss_fn, METHOD, tx), tx.init(params), []
    for step, x, labels in batches(shape):
        params, opt_state, loss = train_step(params, topology, opt_state, x, labels)
        losses.append(loss)
        if METHOD.due(step + 1):
            params, topology, opt_state, _ = adapt(
                params, topology, opt_state, step + 1, jax.random.key(step), x, labels
            )  # fmt: skip
    return params, topology, opt_state, losses


def trained_by_nnx(model, tx, shape):
    def loss_fn(model, x, labels):
        return cross_entropy(model(x), labels)

    @nnx.jit
    def train_step(model, optimizer, x, labels):
        loss, gradients = nnx.value_and_grad(loss_fn)(model, x, labels)
        optimizer.update(model, gradients)
        return loss

    optimizer, losses = nnx.Optimizer(model, tx, wrt=nnx.Param), []
    for step, x, labels in batches(shape):
        losses.append(train_step(model, optimizer, x, labels))
        if METHOD.due(step + 1):
            report = dsb.nnx.adapt(
                model, optimizer, loss_fn, METHOD, x, labels, step=step + 1, key=jax.random.key(step)
            )  # fmt: skip
            assert all(layer.accepted > 0 for layer in report.values())
    return dsb.nnx.params(model), dsb.nnx.topology(model), nnx.as_pure(optimizer.opt_state), losses


@pytest.mark.parametrize("name", always("cnn", of=BOTH))
def test_sixty_steps_and_three_adaptations_give_equal_bits(name):
    linen_class, nnx_class, shape = BOTH[name]
    x, linen, model = jnp.zeros(shape), linen_class(), nnx_class(nnx.Rngs(0))
    plan = dsb.linen.plan(linen, x, **SIZES)
    variables = dsb.linen.sparsify(linen, plan, implementation="dense").init(jax.random.key(1), x)
    params, topology = variables["params"], variables["topology"]
    found = dsb.nnx.plan(model, x, **SIZES)
    assert found.sparse == plan.sparse
    dsb.nnx.load_params(model, params, topology, implementation="dense")
    tx = optax.adamw(3e-3)
    sparse = dsb.linen.sparsify(linen, plan, implementation="dense")
    ours = trained_by_linen(sparse, params, topology, tx, shape)
    theirs = trained_by_nnx(model, tx, shape)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sum(ours[3][-10:]) < sum(ours[3][:10])
    changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(topology), jax.tree.leaves(ours[1]), strict=True)]
    assert any(changed)
