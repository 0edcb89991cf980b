"""Models of `transformers`, unmodified: planned, made sparse, trained on two devices with adaptations, dense again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import dsb_jax as dsb
from dsb_jax.paths import nodes
from tests.foreign.models import BATCH, CLASSES, MODELS

METHOD = dsb.methods.DSB(update_interval=2, update_end_step=100)


class TrainState(train_state.TrainState):
    """Flax's own, with a field more, and one for what models with batch norm have."""

    topology: dict
    batch_stats: dict


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    return request.param


@functools.cache
def planned(name):
    """The dense model, the plan, the sparse model and its variables."""
    foreign = MODELS[name]
    dense = foreign.make()
    inputs, rngs = foreign.inputs(jax.random.key(1)), {"params": jax.random.key(0), "dropout": jax.random.key(2)}
    plan = dsb.linen.plan(
        dense, *inputs, kwargs=foreign.options, rngs=rngs, sparsity=0.75, block_shape=(8, 4), min_blocks=1
    )
    sparse = dsb.linen.sparsify(dense, plan, implementation="dense")  # which compiles fastest
    init = jax.jit(lambda rngs, *inputs: sparse.init(rngs, *inputs, **foreign.options))
    return dense, plan, sparse, init(rngs, *inputs)


def test_the_plan_counts_what_the_model_has(name):
    dense, plan, _, variables = planned(name)
    assert len(plan.sparse) == MODELS[name].num_sparse, str(plan)
    plan.check(variables["params"])
    assert set(nodes(variables["topology"])) == {(*path, "blocks") for path in plan.sparse}
    phantom = sum(spec.num_blocks * 32 - spec.num_active for spec in plan.sparse.values())  # rows of a ragged group
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == plan.num_params + phantom
    assert plan.sparsity() == pytest.approx(0.75, abs=0.01)
    assert type(dense).__name__ in str(type(planned(name)[2]))


def loss_fn(name, model, variables, inputs, labels, key):
    logits, updated = MODELS[name].outputs(model, variables, inputs, key)
    labels = jnp.broadcast_to(labels.reshape(-1, *[1] * (logits.ndim - 2)), logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated


def test_trained_and_adapted_on_two_devices(name):
    """Somebody's `pmap` loop, state and optimizer. Replicas agree bit by bit; the dense model computes the same."""
    dense, _, sparse, variables = planned(name)
    optimizer = optax.adamw(3e-3)
    state = TrainState.create(
        apply_fn=sparse.apply, params=variables["params"], tx=optimizer, topology=variables["topology"],
        batch_stats=variables.get("batch_stats", {}),
    )  # fmt: skip
    loss = functools.partial(loss_fn, name, sparse)
    adaptation = dsb.adaptation(loss, METHOD, optimizer, axis_name="batch", has_aux=True)

    @functools.partial(jax.pmap, axis_name="batch")
    def train_step(state, inputs, labels, key):
        collections = {"topology": state.topology, "batch_stats": state.batch_stats}

        def of(params):
            return loss({"params": params, **collections}, inputs, labels, key)

        (value, updated), gradients = jax.value_and_grad(of, has_aux=True)(state.params)
        gradients, value, updated = jax.lax.pmean((gradients, value, updated), "batch")
        return state.apply_gradients(grads=gradients, batch_stats=updated.get("batch_stats", {})), value

    @functools.partial(jax.pmap, axis_name="batch", in_axes=(0, None, 0, 0, 0))
    def adapt(state, key, inputs, labels, dropout_key):
        params, topology, opt_state, report = adaptation(
            state.params, state.topology, state.opt_state, state.step, key, inputs, labels, dropout_key,
            batch_stats=state.batch_stats,
        )  # fmt: skip
        return state.replace(params=params, topology=topology, opt_state=opt_state), report

    def shard(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(2, BATCH // 2, *leaf.shape[1:]), tree)

    inputs, labels = shard(MODELS[name].inputs(jax.random.key(3))), shard(jnp.arange(BATCH) % CLASSES)
    keys = jax.random.split(jax.random.key(4), 2)
    state = jax.pmap(lambda _: state, axis_name="batch")(jnp.arange(2))  # sharded as the steps give it
    losses, before = [], jax.device_get(state.topology)
    for step in range(6):
        if METHOD.due(step):
            state, report = adapt(state, jax.random.key(step), inputs, labels, keys)
        state, value = train_step(state, inputs, labels, keys)
        losses.append(float(value[0]))
    assert losses[-1] < losses[0]
    assert not any(np.asarray(layer.status).any() for layer in report.values())
    for leaf in jax.tree.leaves(jax.device_get(state)):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    params, topology, batch_stats = jax.tree.map(
        lambda leaf: leaf[0], jax.device_get((state.params, state.topology, state.batch_stats))
    )
    after = jax.device_get(state.topology)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    dsb.validate_topology(topology)

    rest = {"batch_stats": batch_stats} if batch_stats else {}
    inputs, key = MODELS[name].inputs(jax.random.key(5)), jax.random.key(6)
    dense_params = dsb.to_dense(params, topology)
    ours, theirs = (
        jax.jit(functools.partial(MODELS[name].outputs, model))({**variables, **rest}, inputs, key)[0]
        for model, variables in ((sparse, {"params": params, "topology": topology}), (dense, {"params": dense_params}))
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)
