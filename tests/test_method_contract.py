"""One contract for all methods, on a convolution and a linear layer: equal terms, sizes that stay, the same bits."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from dsb_jax import methods
from dsb_jax.adapt import adapt_step
from dsb_jax.layout import validate
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import METHODS
from dsb_jax.plan import find_layers, make_plan, unstructured
from dsb_jax.telemetry import count_active
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state, dense_params, layouts

MAKERS = {
    "dsb": lambda: methods.dsb(update_end_step=100),
    "dsb, blocks": lambda: methods.dsb(update_end_step=100, granularity="block"),
    "ssb": methods.ssb,
    "rigl": lambda: methods.rigl(update_end_step=100),
    "set": lambda: methods.set_(update_end_step=100),
    "topkast": methods.topkast,
    "dense": methods.dense,
    "small_dense": methods.small_dense,
}
IMAGES = np.random.default_rng(0).normal(size=(6, 5, 5, 3)).astype(np.float32)
LABELS = np.arange(6, dtype=np.int32) % 4
OPTIMIZER = optax.adamw(0.05)
SPARSITY = 0.6


class Net(nn.Module):
    conv: type[nn.Module]
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(self.conv(8, (3, 3), name="conv")(x))
        x = nn.relu(self.dense(12, name="hidden")(x.mean(axis=(1, 2))))
        return nn.Dense(4, name="head")(x)


@functools.cache
def plan():
    params = jax.eval_shape(Net(nn.Conv, nn.Dense).init, jax.random.key(0), IMAGES)["params"]
    return make_plan(find_layers(params), sparsity=SPARSITY, block_shape=(4, 2), min_blocks=1)


def build(name):
    method = MAKERS[name]()
    if not method.sparse:
        return method, Net(nn.Conv, nn.Dense)
    how = {"plan": unstructured(plan()) if method.unstructured else plan(), "init_layout": method.init}
    if method.store is not None:
        how |= {"store": method.store, "exploration": 1e-4}
    return method, Net(functools.partial(SparseConv, **how), functools.partial(SparseDense, **how))


@functools.partial(jax.jit, static_argnums=0)
def create(model, key):
    return create_train_state(model, OPTIMIZER, key, IMAGES)


def history(name, seed):
    """States of a short training, before and after an adaptation if there is one, and its report."""
    method, model = BUILT[name]
    state = create(model, jax.random.key(seed))
    states, report = [jax.device_get(state)], {}
    for step in range(4):
        if step == 2 and method.update is not None:
            state, report = adapt_step(state, IMAGES, LABELS, model=model, method=method, optimizer=OPTIMIZER)
            states.append(jax.device_get(state))
        state, metrics = train_step(state, IMAGES, LABELS, model=model, optimizer=OPTIMIZER)
        assert np.isfinite(metrics["loss"])
    return [*states, jax.device_get(state)], jax.device_get(report)


BUILT = {name: build(name) for name in MAKERS}


def test_the_contract_holds_every_method():
    assert {BUILT[name][0].name for name in MAKERS} == set(METHODS)
    assert set(METHODS) <= set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_the_contract(name):
    method, model = BUILT[name]
    states, report = history(name, seed=0)
    first = states[0]
    wanted = {layer.path: plan().num_active(layer) for layer in plan().sparse_layers} if method.sparse else {}
    for state in states:
        assert count_active(state) == wanted
        # Sizes and dtypes never change, so nothing recompiles.
        assert jax.tree.structure(state) == jax.tree.structure(first)
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(state)] == [
            (a.shape, a.dtype) for a in jax.tree.leaves(first)
        ]
        for layout in layouts(state.topology).values():
            validate(layout)
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(states[-1].params))  # it learns

    # What a layer computes is what its dense form says, with exactly as many weights.
    final = states[-1]
    dense = jax.tree.map(np.asarray, jax.jit(dense_params)(final))
    for layer, params in dense.items():
        params["kernel"] = params["kernel"].reshape(3, 3, 3, -1) if layer == "conv" else params["kernel"]
    np.testing.assert_allclose(
        jax.jit(model.apply)(final.variables, IMAGES),
        jax.jit(Net(nn.Conv, nn.Dense).apply)({"params": dense}, IMAGES),
        atol=2e-5,
    )
    for (layer,), count in wanted.items():
        assert 0 < np.count_nonzero(dense[layer]["kernel"]) <= count

    if method.update is None:
        with pytest.raises(ValueError, match=f"method '{method.name}' never adapts"):
            adapt_step(first, IMAGES, LABELS, model=model, method=method, optimizer=OPTIMIZER)
    else:
        assert set(report) == {"/".join(path) for path in wanted}
        for layer in report.values():
            assert 0 <= layer.accepted <= layer.requested
            assert 0 <= layer.turnover <= 1
            assert 0 <= layer.collateral <= 1

    again, _ = history(name, seed=0)
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = jax.device_get(create(model, jax.random.key(1)))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
