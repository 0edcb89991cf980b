"""The steps under settings of jax that people train with: 64 bits, NaN and leak checks; forward mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dsb_jax.adapt import adaptation
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import DSB
from dsb_jax.paths import validate_topology
from dsb_jax.train import adapt_step, eval_step, train_step
from dsb_jax.train_state import create_train_state

IMAGES = np.random.default_rng(0).normal(size=(6, 4, 4, 4)).astype(np.float32)
LABELS = np.arange(6, dtype=np.int32) % 3


class Net(nn.Module):
    implementation: str
    sparse_head: bool = False  # left out where a program runs: compiling is what these tests cost

    @nn.compact
    def __call__(self, x):
        sparse = {"block_shape": (4, 3), "implementation": self.implementation}
        x = nn.relu(SparseConv(8, (3, 3), num_blocks=7, **sparse)(x)).mean(axis=(1, 2))
        sparse |= {"block_shape": (3, 2), "num_blocks": 3}
        return SparseDense(3, **sparse)(x) if self.sparse_head else nn.Dense(3)(x)


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def trained(implementation):
    """A state after a step, an adaptation and another step."""
    model, optimizer = Net(implementation), OPTIMIZER
    options = {"model": model, "optimizer": optimizer}
    state = jax.jit(functools.partial(create_train_state, model, optimizer))(jax.random.key(0), IMAGES)
    state, _ = train_step(state, IMAGES, LABELS, **options)
    state, report = adapt_step(state, IMAGES, LABELS, method=DSB(), **options)
    assert all(layer.accepted > 0 for layer in report.values())
    state, metrics = train_step(state, IMAGES, LABELS, **options)
    assert np.isfinite(metrics["loss"])
    assert eval_step(state, IMAGES, LABELS, model=model)["count"] == 6
    validate_topology(state.topology)
    return state


SETTINGS = {
    "64 bits": (functools.partial(jax.enable_x64, True), "xla"),
    "NaN checks": (functools.partial(jax.debug_nans, True), "dense"),
}


@functools.cache
def ordinary():
    return jax.device_get(trained("dense"))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_steps_under(name):
    """Sizes and dtypes of an ordinary training, and its numbers but for rounding."""
    setting, implementation = SETTINGS[name]
    with setting():
        state = trained(implementation)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(ordinary()), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(ordinary().params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def traced(implementation):
    """Shapes and dtypes of the state after the same steps; nothing is compiled."""
    model = Net(implementation, sparse_head=True)
    options = {"model": model, "optimizer": OPTIMIZER}
    first = jax.eval_shape(functools.partial(create_train_state, model, OPTIMIZER), jax.random.key(0), IMAGES)
    state, _ = jax.eval_shape(functools.partial(train_step, **options), first, IMAGES, LABELS)
    state, _ = jax.eval_shape(functools.partial(adapt_step, method=DSB(), **options), state, IMAGES, LABELS)
    jax.eval_shape(functools.partial(eval_step, model=model), state, IMAGES, LABELS)
    return first, state


@pytest.mark.parametrize("implementation", ["xla", "dense"])
@pytest.mark.parametrize("setting", [jax.checking_leaks, functools.partial(jax.enable_x64, True)])
def test_tracing_leaks_nothing_and_widens_nothing(implementation, setting):
    wanted, _ = traced(implementation)
    with setting():
        states = traced(implementation)
    for state in states:
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_forward_mode_through_a_model_of_dense_products():
    """A product of the Hessian with a vector, forward over reverse, is that of reverse over reverse."""
    model = Net("dense", sparse_head=True)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)

    def loss(params):
        logits = model.apply({**variables, "params": params}, IMAGES)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    params = variables["params"]
    ones = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def both(params):
        forward = jax.jvp(jax.grad(loss), (params,), (ones,))[1]
        reverse = jax.grad(lambda p: sum(leaf.sum() for leaf in jax.tree.leaves(jax.grad(loss)(p))))(params)
        return forward, reverse

    for a, b in zip(*map(jax.tree.leaves, both(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_strict_promotion():
    """What is ours promotes nothing by itself (optax' learning rates do): initialization, gradients, adapting."""
    model = Net("dense", sparse_head=True)

    def loss(variables, x):
        return jnp.square(model.apply(variables, x)).mean()

    with jax.numpy_dtype_promotion("strict"):
        variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
        params, topology = variables["params"], variables["topology"]
        jax.eval_shape(lambda v: jax.grad(lambda p: loss({**v, "params": p}, IMAGES))(v["params"]), variables)
        identity = optax.identity()
        adapt = adaptation(loss, DSB(update_end_step=100), identity)
        new = jax.eval_shape(adapt, params, topology, identity.init(params), 10, jax.random.key(0), IMAGES)
    assert jax.tree.structure(new[0]) == jax.tree.structure(params)
