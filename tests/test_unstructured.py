"""RigL, SET and the small dense model: the contract of methods, one update by hand each, equal terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.adapt import adapt_step, repack
from dsb_jax.layout import block_group, groups_of_blocks, layout_of_positions, pack, to_mask, unpack, validate
from dsb_jax.methods import rigl, set_, small_dense
from dsb_jax.methods.unstructured import random_positions
from dsb_jax.plan import LayerPlan, SparsityPlan, find_layers, make_plan, unstructured
from dsb_jax.recipe import Recipe, assemble
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state, layouts
from experiments import run as runs

T_END = 100
MAKERS = {"rigl": rigl, "set": set_}
OUT, IN, COUNT = 7, 12, 25
seeds = st.integers(0, 2**16)
law = settings(max_examples=6)


@functools.cache
def update_of(name):
    return jax.jit(MAKERS[name](update_end_step=T_END).update)


@functools.cache
def draw():
    return jax.jit(lambda seed: random_positions(jax.random.key(seed), (OUT, IN), block_shape=(1, 1), num_blocks=COUNT))


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 13), (2, 24)])
def test_a_layout_of_positions_holds_exactly_these(seed, count):
    mask = np.zeros(24, bool)
    mask[np.random.default_rng(seed).permutation(24)[:count]] = True
    layout = layout_of_positions(jnp.asarray(mask.reshape(4, 6)), count)
    validate(layout)
    np.testing.assert_array_equal(to_mask(layout), mask.reshape(4, 6))
    values = jnp.arange(1.0, count + 1)[:, None, None]
    np.testing.assert_array_equal(pack(unpack(values, layout), layout), values)
    assert layout.num_active == count


def test_groups_of_many_blocks_are_those_of_few():
    """Above a size the groups are found in another way."""
    layout = random_positions(jax.random.key(0), (300, 200), block_shape=(1, 1), num_blocks=20000)
    assert layout.num_blocks * layout.num_groups > 2**22
    rows = np.repeat(np.arange(300), np.diff(layout.group_start))
    np.testing.assert_array_equal(block_group(layout), rows)
    np.testing.assert_array_equal(groups_of_blocks(jnp.array([0, 2, 2, 3], jnp.int32), 3), [0, 0, 2])


@pytest.mark.parametrize("name", MAKERS)
@given(seed=seeds, step=st.sampled_from([0, 30, 99, T_END]))
@law
def test_update_drops_the_weakest_and_grows_as_many(name, seed, step):
    rng = np.random.default_rng(seed)
    layout = draw()(seed)
    values = rng.standard_normal((COUNT, 1, 1)).astype(np.float32)
    gradient = rng.standard_normal((OUT, IN)).astype(np.float32)
    arguments = jax.random.key(seed), jnp.int32(step), jnp.asarray(values), layout, {"gradient": jnp.asarray(gradient)}
    new, report = update_of(name)(*arguments)
    validate(new)
    same, _ = update_of(name)(*arguments)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(same), strict=True))
    before, after = np.asarray(to_mask(layout)), np.asarray(to_mask(new))
    k = int(np.round(np.float32(0.15 * (1 + np.cos(np.pi * step / T_END))) * COUNT)) if step < T_END else 0
    weights = np.asarray(unpack(jnp.asarray(values), layout))
    active = np.flatnonzero(before)
    kept = np.sort(active[np.argsort(np.abs(weights.ravel()[active]), kind="stable")[k:]])
    assert after.ravel()[kept].all()
    assert after.sum() == COUNT
    grown = np.setdiff1d(np.flatnonzero(after), kept)
    assert report.requested == report.accepted == grown.size == k
    assert report.turnover == pytest.approx((after & ~before).sum() / COUNT)
    assert report.collateral == 0
    assert report.empty_groups == (after.sum(axis=1) == 0).sum()
    if name == "rigl":
        others = np.setdiff1d(np.arange(OUT * IN), kept)
        np.testing.assert_array_equal(grown, np.sort(others[np.argsort(-np.abs(gradient.ravel()[others]))[:k]]))
    else:
        assert not before.ravel()[grown].any()
    # Kept weights are bit-identical, weights that were not there are zero.
    moved = np.asarray(unpack(repack(jnp.asarray(values), layout, new), new))
    np.testing.assert_array_equal(moved, np.where(after & before, weights, 0))


def test_rigl_by_hand():
    # Half of 4: -1 and 2 go. Of what is not kept, (1, 1) has the largest gradient; then comes (0, 2), which regrows.
    weights = jnp.array([[5.0, 0.0, -1.0], [2.0, 0.0, 7.0]])
    layout = layout_of_positions(weights != 0, 4)
    gradient = {"gradient": jnp.array([[99.0, 1.0, 3.0], [2.0, -4.0, 99.0]])}
    update = rigl(update_end_step=10, alpha=0.5).update
    new, report = update(jax.random.key(0), jnp.int32(0), pack(weights, layout), layout, gradient)
    assert to_mask(new).astype(int).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert repack(pack(weights, layout), layout, new).ravel().tolist() == [5, -1, 0, 7]
    assert [float(value) for value in report] == [2, 2, 0.25, 0, 0]


def test_set_by_hand():
    # One of four goes, -1, and the only inactive position grows, whatever the key.
    weights = jnp.array([[5.0, 0.0], [-1.0, 7.0], [0.5, 3.0]])
    layout = layout_of_positions(weights != 0, 5)
    update = set_(update_end_step=10, alpha=0.2).update
    for seed in range(3):
        new, report = update(jax.random.key(seed), jnp.int32(0), pack(weights, layout), layout, None)
        assert to_mask(new).astype(int).tolist() == [[1, 1], [1, 1], [0, 1]]
        assert repack(pack(weights, layout), layout, new).ravel().tolist() == [5, 0, -1, 7, 3]
        assert [float(value) for value in report] == pytest.approx([1, 1, 0.2, 0, 0])


def test_set_follows_its_key():
    layout, values = draw()(0), jnp.ones((COUNT, 1, 1))
    one, other = (update_of("set")(jax.random.key(s), jnp.int32(0), values, layout, None)[0] for s in (0, 1))
    assert (to_mask(one) != to_mask(other)).any()


@given(data=st.data())
@law
def test_equal_terms_the_same_number_of_weights_in_every_layer(data):
    sizes = {(f"layer_{i}",): data.draw(st.tuples(st.integers(16, 70), st.integers(16, 90))) for i in range(3)}
    params = {name: {"kernel": jax.ShapeDtypeStruct((in_, out), jnp.float32)} for (name,), (out, in_) in sizes.items()}
    plan = make_plan(find_layers(params), sparsity=0.5, block_shape=(8, 4), min_blocks=1)
    single = unstructured(plan)
    assert single.block_shape == (1, 1)
    assert [plan.num_active(a) for a in plan.layers] == [single.num_active(b) for b in single.layers]
    assert plan.sparsity() == single.sparsity()


def test_dense_layers_of_a_plan_stay_dense():
    shape = next(iter(find_layers({"head": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}).values()))
    plan = SparsityPlan((LayerPlan(("head",), shape, None, "kept dense", eligible=False),), (4, 4))
    assert unstructured(plan).layers == plan.layers


@pytest.mark.parametrize("name", MAKERS)
def test_convolutions_adapt_in_a_model(name):
    """With Adam: after an adaptation every moment of a weight that is new is zero, of one that stayed the same."""
    recipe = Recipe(method=name, optimizer="adamw", batch_size=8, total_steps=100)
    assembly, state = runs.create(recipe)
    images, labels = jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), jnp.arange(8) % 10
    static = {"model": assembly.model, "optimizer": assembly.optimizer}
    state, metrics = train_step(state, images, labels, **static)
    assert np.isfinite(metrics["loss"])
    old = jax.device_get(state)
    new, report = adapt_step(state, images, labels, method=assembly.method, **static)
    new = jax.device_get(new)
    moments = [optax.tree_utils.tree_get(tree, "mu") for tree in (old.opt_state, new.opt_state)]  # as deep as params
    for (name_, before), after in zip(layouts(old.topology).items(), layouts(new.topology).values(), strict=True):
        assert before.shape[1] > before.shape[0]
        assert report["/".join(name_)].accepted > 0
        assert after.num_active == before.num_active
        stays = np.asarray(to_mask(before)) & np.asarray(to_mask(after))
        assert (~stays & np.asarray(to_mask(after))).any()
        for tree, other in ((old.params, new.params), moments):
            was, now = (unpack(t[name_[0]]["blocks"], layout) for t, layout in ((tree, before), (other, after)))
            np.testing.assert_array_equal(now, np.where(stays, was, 0))


def test_small_dense_has_as_many_weights_as_the_sparse_model():
    sparse, small = (assemble(Recipe(method=name, sparsity=0.8)) for name in ("dsb", "small_dense"))
    wanted = sum(sparse.plan.num_active(layer) for layer in sparse.plan.layers)
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    params = jax.eval_shape(small.model.init, jax.random.key(0), images)["params"]
    layers = find_layers(params)
    assert sum(shape.size for shape in layers.values()) == pytest.approx(wanted, rel=0.05)
    assert layers[("head",)].out == 10
    assert small.plan is None
    assert not small_dense().sparse
    state = jax.eval_shape(
        functools.partial(create_train_state, small.model, small.optimizer, images=images), jax.random.key(0)
    )
    assert jax.tree.leaves(state.topology) == []


def test_every_layer_is_narrower_by_the_same_factor():
    recipe = Recipe(method="small_dense", sparsity=0.75)
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    full, small = (
        find_layers(jax.eval_shape(assemble(r).model.init, jax.random.key(0), images)["params"])
        for r in (dataclasses.replace(recipe, method="dense"), recipe)
    )
    ratios = [small[path].out / full[path].out for path in full if path != ("head",)]
    assert max(ratios) - min(ratios) < 0.03
    assert 0.4 < min(ratios) < 0.6


@pytest.mark.parametrize("make", MAKERS.values())
def test_settings_that_cannot_be(make):
    with pytest.raises(ValueError, match=r"alpha=1\.5 is not a share"):
        make(update_end_step=10, alpha=1.5)
    with pytest.raises(ValueError, match="block_shape=16x16: single weights are stored as 1x1 blocks"):
        make(update_end_step=10).init(jax.random.key(0), (32, 32), block_shape=(16, 16), num_blocks=2)
