"""Top-KAST: what is stored where, an update by hand, and training equal to the dense weights of the paper."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax import checkpoint
from dsb_jax.adapt import adapt_step
from dsb_jax.layout import BlockLayout, validate
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.linen.forward_set import forward_set
from dsb_jax.methods import topkast
from dsb_jax.methods.topkast import join
from dsb_jax.plan import KEEP_DENSE
from dsb_jax.telemetry import active_positions, count_active, count_bytes
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state, dense_params, kept_beside, layouts
from dsb_jax.training.config import Recipe, assemble, make_optimizer
from experiments import run as runs

OUT, IN, ACTIVE = 7, 12, 20
METHOD = topkast(backward_factor=1.5)
law = settings(max_examples=6)


jit_join, jit_dense = jax.jit(join), jax.jit(dense_params)


@functools.cache
def compiled(method):
    """`store`, and update and exchange in one: what a layer does, as numpy arrays."""

    def move(blocks, layout, beside):
        new, report = method.update(jax.random.key(0), jnp.int32(7), blocks, layout, beside)
        return new, report, method.exchange(blocks, layout, new, beside)

    store, move = jax.jit(method.store, static_argnums=1), jax.jit(move)
    return lambda *args: jax.device_get(store(*args)), lambda *args: jax.device_get(move(*args))


def spread(blocks, layout):
    """The values of 1x1 blocks at their positions by numpy, zero elsewhere."""
    dense = np.zeros(layout.shape, blocks.dtype)
    rows = np.repeat(layout.out_idx[:, 0], np.diff(layout.group_start))
    dense[rows, layout.in_idx[:, 0]] = np.asarray(blocks).ravel()
    return dense


def mask_of(layout):
    return spread(np.ones(layout.num_blocks, bool), layout)


def largest(weights, count):
    """bool[out, in]: the `count` of largest magnitude by numpy, ties by index."""
    mask = np.zeros(weights.size, bool)
    mask[np.argsort(-np.abs(weights).ravel(), kind="stable")[:count]] = True
    return mask.reshape(weights.shape)


def stored(weights, count, active):
    """What `store` makes of weights, by numpy: layout, blocks and what is kept beside."""
    mask = largest(weights, count)
    rows, columns = np.nonzero(mask)
    start = np.searchsorted(rows, np.arange(len(weights) + 1)).astype(np.int32)
    layout = BlockLayout(np.arange(len(weights), dtype=np.int32)[:, None], columns[:, None].astype(np.uint16), start,
                         weights.shape, (1, 1))  # fmt: skip
    blocks, forward = (array[mask].reshape(-1, 1, 1) for array in (weights, largest(weights, active)))
    return layout, blocks, {"forward_mask": forward, "reserve": weights[~mask]}


def joined(blocks, layout, reserve):
    """The inverse by numpy."""
    weights = spread(blocks, layout)
    weights[~mask_of(layout)] = reserve
    return weights


def check(weights, layout, blocks, beside):
    """That these are the sets A and B of the weights."""
    validate(layout)
    state, expected = (layout, blocks, beside), stored(weights, 30, ACTIVE)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(jit_join(blocks, layout, beside["reserve"]), weights)
    assert set(active_positions(layout, beside["forward_mask"])) == set(np.flatnonzero(largest(weights, ACTIVE)))


@law
@given(seed=st.integers(0, 2**16), ties=st.booleans())
def test_the_sets_and_that_nothing_is_lost(seed, ties):
    store, move = compiled(METHOD)
    rng = np.random.default_rng(seed)
    weights = rng.integers(-3, 4, (OUT, IN)) if ties else rng.standard_normal((OUT, IN))
    weights = weights.astype(np.float32)
    layout, blocks, beside = store(weights, ACTIVE)
    check(weights, layout, blocks, beside)
    trained = blocks + rng.standard_normal(blocks.shape).astype(np.float32)  # those that have a gradient move
    weights = joined(trained, layout, beside["reserve"])
    new, report, (moved, kept) = move(trained, layout, beside)
    check(weights, new, moved, kept)
    entered = (largest(weights, ACTIVE) & ~spread(beside["forward_mask"], layout)).sum()
    assert report.requested == report.accepted == entered
    assert report.turnover == pytest.approx(entered / ACTIVE)
    assert report.collateral == 0
    assert report.empty_groups == (~largest(weights, ACTIVE).any(axis=1)).sum()


def test_an_update_by_hand():
    store, move = compiled(topkast(backward_factor=2))
    layout, blocks, beside = store(np.array([[5, -4, 1], [0.5, 3, -2]], np.float32), 2)
    assert mask_of(layout).astype(int).tolist() == [[1, 1, 0], [0, 1, 1]]
    assert blocks.ravel().tolist() == [5, -4, 3, -2]
    assert beside["forward_mask"].ravel().tolist() == [True, True, False, False]
    assert beside["reserve"].tolist() == [1, 0.5]
    # Training wears 5 down to 0.7 and -2 to 0.1: 3 enters the forward set, and 1 the backward set from the reserve.
    blocks = np.array([0.7, -4, 3, 0.1], np.float32)[:, None, None]
    new, report, (moved, kept) = move(blocks, layout, beside)
    assert mask_of(new).astype(int).tolist() == [[1, 1, 1], [0, 1, 0]]
    assert moved.ravel().tolist() == pytest.approx([0.7, -4, 1, 3])
    assert kept["forward_mask"].ravel().tolist() == [False, True, False, True]
    assert kept["reserve"].tolist() == pytest.approx([0.5, 0.1])
    assert [float(value) for value in report] == [1, 1, 0.5, 0, 0]


def test_the_gradient_goes_through_and_the_penalty_is_added():
    def both_ways(blocks, mask, gradient):
        y, backward = jax.vjp(lambda blocks: forward_set(blocks, mask, 0.5), blocks)
        return y, *backward(gradient)

    columns = (np.reshape(values, (2, 1, 1)) for values in ([2.0, 3.0], [True, False], [10.0, 20.0]))
    y, gradient = jax.jit(both_ways)(*columns)
    assert y.ravel().tolist() == [2, 0]
    assert gradient.ravel().tolist() == [10, 20 + 0.5 * 3]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda **how: SparseDense(6, **how), (5, 9)),
        (lambda **how: SparseConv(6, (3, 3), strides=2, **how), (3, 6, 6, 4)),
    ],
)
def test_a_layer_computes_and_learns_as_the_dense_weights_would(layer, x):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(x).astype(np.float32)
    sparse, dense = layer(num_blocks=20, block_shape=(1, 1), store=METHOD.store, exploration=0.1), layer()
    kernel = jax.eval_shape(dense.init, jax.random.key(0), x)["params"]["kernel"]
    weights = rng.standard_normal((6, kernel.size // 6)).astype(np.float32)
    layout, blocks, beside = stored(weights, 30, 20)
    rest = {"bias": np.ones(6, np.float32)}
    params, topology = {"blocks": blocks, **rest}, {"layout": layout, **beside}
    wanted = jax.eval_shape(sparse.init, jax.random.key(0), x)
    assert jax.tree.structure(wanted) == jax.tree.structure({"params": params, "topology": topology})

    def loss(module, params, **others):
        return jnp.square(module.apply({"params": params, **others}, x) - 1).sum()

    value, own = jax.jit(jax.value_and_grad(lambda p: loss(sparse, p, topology=topology)))(params)
    forward = largest(weights, 20)
    masked = (weights * forward).T.reshape(kernel.shape)
    wanted, gradient = jax.jit(jax.value_and_grad(lambda k: loss(dense, {"kernel": k, **rest})))(masked)
    assert value == pytest.approx(float(wanted), rel=1e-5)
    penalty = 0.1 * (weights.size / 20 - 1)
    gradient = np.asarray(gradient).reshape(-1, 6).T + penalty * np.where(forward, 0, weights)
    np.testing.assert_allclose(own["blocks"].ravel(), gradient[mask_of(layout)], rtol=2e-4, atol=2e-4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape(x.shape[0], -1)
        x = SparseDense(8, num_blocks=40, block_shape=(1, 1), store=METHOD.store, exploration=1e-3, name="first")(x)
        return nn.Dense(4)(nn.relu(x))


def test_an_adaptation_moves_weights_and_moments_to_where_they_belong():
    optimizer, _ = make_optimizer(Recipe())
    images = np.random.default_rng(0).standard_normal((8, 4, 4, 1)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32) % 4
    state = jax.jit(functools.partial(create_train_state, Net(), optimizer, images=images))(jax.random.key(1))
    reserve = np.asarray(state.topology["first"]["reserve"])
    for _ in range(3):
        state, _ = train_step(state, images, labels, model=Net(), optimizer=optimizer)
    old = jax.device_get(state)
    np.testing.assert_array_equal(old.topology["first"]["reserve"], reserve)  # it has no gradient
    new, report = adapt_step(state, images, labels, model=Net(), method=METHOD, optimizer=optimizer)
    new = jax.device_get(new)

    def in_place(tree, state):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found = [leaf for path, leaf in leaves if getattr(path[-1], "key", None) == "blocks"]
        return [spread(leaf, state.topology["first"]["layout"]) for leaf in found]

    weights = [joined(s.params["first"]["blocks"], s.topology["first"]["layout"], s.topology["first"]["reserve"])
               for s in (old, new)]  # fmt: skip
    np.testing.assert_array_equal(*weights)
    stays = mask_of(old.topology["first"]["layout"]) & mask_of(new.topology["first"]["layout"])
    assert 0 < stays.sum() < 60
    assert report["first"].accepted > 0
    (before,), (after,) = in_place(old.opt_state, old), in_place(new.opt_state, new)
    assert (before != 0).any()
    np.testing.assert_array_equal(after, np.where(stays, before, 0))
    kernel = jit_dense(new)["first"]["kernel"]
    assert (np.asarray(kernel) != 0).sum() == 40


def test_equal_terms_and_the_account(tmp_path):
    recipe = Recipe(method="topkast", keep_dense=(*KEEP_DENSE, "conv_3"), total_steps=10, epochs=1)
    assembly, state = runs.create(recipe)
    other = assemble(dataclasses.replace(recipe, method="dsb"))
    assert len(other.plan.sparse_layers) == 2  # each costs a second of compiling
    for layer in other.plan.sparse_layers:
        wanted = other.plan.num_active(layer)
        assert count_active(state)[layer.path] == wanted
        assert layouts(state.topology)[layer.path].num_blocks == 2 * wanted
    assert runs.measure_sparsity(assembly, state)["num_active"] == sum(count_active(state).values())
    held = count_bytes(state)
    weights = sum(layer.shape.size for layer in assembly.plan.layers)
    assert 4 * weights < held["params"] < 4.05 * weights  # all of them, biases and norms beside
    assert held["grads"] == held["opt_state"] - 4 < held["params"]  # the learning rate's step count beside the moments
    with checkpoint.Checkpoints(tmp_path, recipe) as saver:
        saver.save(state, test_accuracy=0.5)
    restored = checkpoint.restore(tmp_path)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(kept_beside(restored.state.topology, ("conv_1",))) == {"forward_mask", "reserve"}


def test_a_recipe_of_before_has_the_default():
    values = json.loads(json.dumps(Recipe(method="ssb").to_json()))
    del values["backward_factor"]
    assert Recipe.from_json(values) == Recipe(method="ssb")
    for wrong in ({**values, "magic": 1}, {k: v for k, v in values.items() if k != "sparsity"}):
        with pytest.raises(ValueError, match="unknown or missing fields"):
            Recipe.from_json(wrong)


def test_a_backward_set_that_cannot_be():
    with pytest.raises(ValueError, match=r"backward_factor=0\.5 is below 1; the backward set holds the forward set"):
        topkast(backward_factor=0.5)
