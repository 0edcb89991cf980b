"""RigL, SET and the small dense model: the contract of methods, one update by hand each, equal terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.adapt import adapt_step, repack
from dsb_jax.layout import (
    BlockLayout,
    block_group,
    groups_of_blocks,
    layout_of_positions,
    pack,
    to_mask,
    unpack,
    validate,
)
from dsb_jax.linen import SparseConv
from dsb_jax.methods import rigl, set_, small_dense
from dsb_jax.methods.unstructured import random_positions
from dsb_jax.plan import LayerPlan, SparsityPlan, find_layers, make_plan, unstructured
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state, layouts, with_layouts
from dsb_jax.training.config import Recipe, assemble, make_optimizer

T_END = 100
MAKERS = {"rigl": rigl, "set": set_}
OUT, IN, COUNT = 7, 12, 25
seeds = st.integers(0, 2**16)
law = settings(max_examples=6)


@functools.cache
def update_of(name, **options):
    """Update and repacking in one: new layout, report, moved values, as numpy arrays."""
    update = MAKERS[name](**{"update_end_step": T_END, **options}).update

    def both(key, step, values, layout, statistic):
        new, report = update(key, step, values, layout, statistic)
        return new, report, repack(values, layout, new)

    jitted = jax.jit(both)
    return lambda key, step, *others: jax.device_get(jitted(key, np.int32(step), *others))


@functools.cache
def draw():
    def positions(seed):
        return random_positions(jax.random.key(seed), (OUT, IN), block_shape=(1, 1), num_blocks=COUNT)

    jitted = jax.jit(positions)
    return lambda seed: jax.device_get(jitted(seed))


def positions_of(mask):
    """The layout of single weights at the True positions, by numpy."""
    rows, columns = np.nonzero(mask)
    start = np.searchsorted(rows, np.arange(len(mask) + 1)).astype(np.int32)
    out_idx, in_idx = np.arange(len(mask), dtype=np.int32)[:, None], columns[:, None].astype(np.uint16)
    return BlockLayout(out_idx, in_idx, start, mask.shape, (1, 1))


def spread(values, layout):
    """The values of single weights at their positions, zero elsewhere, by numpy."""
    dense = np.zeros(layout.shape, values.dtype)
    rows = np.repeat(layout.out_idx[:, 0], np.diff(layout.group_start))
    dense[rows, layout.in_idx[:, 0]] = values.ravel()
    return dense


def mask_of(layout):
    return spread(np.ones(layout.num_blocks, bool), layout)


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(mask, count):
    """The layout of these positions, its mask, and 1, 2, .. unpacked and packed again."""
    layout = layout_of_positions(mask, count)
    return layout, to_mask(layout), pack(unpack(jnp.arange(1.0, count + 1)[:, None, None], layout), layout)


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 13), (2, 24)])
def test_a_layout_of_positions_holds_exactly_these(seed, count):
    mask = np.zeros(24, bool)
    mask[np.random.default_rng(seed).permutation(24)[:count]] = True
    mask = mask.reshape(4, 6)
    layout, found, values = jax.device_get(there_and_back(mask, count))
    validate(layout)
    assert layout.in_idx.dtype == np.uint16
    for array, expected in zip(jax.tree.leaves(layout), jax.tree.leaves(positions_of(mask)), strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(values.ravel(), np.arange(1, count + 1))
    assert layout.num_active == count


def test_groups_of_many_blocks_are_those_of_few():
    """Above a size the groups are found in another way."""
    layout = positions_of(np.random.default_rng(0).permutation(300 * 200).reshape(300, 200) < 20000)
    assert layout.num_blocks * layout.num_groups > 2**22
    rows = np.repeat(np.arange(300), np.diff(layout.group_start))
    np.testing.assert_array_equal(jax.jit(block_group)(layout), rows)
    few = jax.jit(groups_of_blocks, static_argnums=1)(np.array([0, 2, 2, 3], np.int32), 3)
    np.testing.assert_array_equal(few, [0, 0, 2])


@pytest.mark.parametrize("name", MAKERS)
@given(seed=seeds, step=st.sampled_from([0, 30, 99, T_END]))
@law
def test_update_drops_the_weakest_and_grows_as_many(name, seed, step):
    rng = np.random.default_rng(seed)
    layout = draw()(seed)
    validate(layout)
    values = rng.standard_normal((COUNT, 1, 1)).astype(np.float32)
    gradient = rng.standard_normal((OUT, IN)).astype(np.float32)
    arguments = jax.random.key(seed), step, values, layout, {"gradient": gradient}
    new, report, moved = update_of(name)(*arguments)
    validate(new)
    same, *_ = update_of(name)(*arguments)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(same), strict=True))
    before, after = mask_of(layout), mask_of(new)
    k = int(np.round(np.float32(0.15 * (1 + np.cos(np.pi * step / T_END))) * COUNT)) if step < T_END else 0
    weights = spread(values, layout)
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
    np.testing.assert_array_equal(spread(moved, new), np.where(after & before, weights, 0))


def by_hand(weights):
    """Values and layout of the weights that are not zero."""
    weights = np.array(weights, np.float32)
    return weights[weights != 0].reshape(-1, 1, 1), positions_of(weights != 0)


def test_rigl_by_hand():
    # Half of 4: -1 and 2 go. Of what is not kept, (1, 1) has the largest gradient; then comes (0, 2), which regrows.
    values, layout = by_hand([[5, 0, -1], [2, 0, 7]])
    gradient = {"gradient": np.array([[99, 1, 3], [2, -4, 99]], np.float32)}
    update = update_of("rigl", update_end_step=10, alpha=0.5)
    new, report, moved = update(jax.random.key(0), 0, values, layout, gradient)
    assert mask_of(new).astype(int).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert moved.ravel().tolist() == [5, -1, 0, 7]
    assert [float(value) for value in report] == [2, 2, 0.25, 0, 0]


def test_set_by_hand():
    # One of four goes, -1, and the only inactive position grows, whatever the key.
    values, layout = by_hand([[5, 0], [-1, 7], [0.5, 3]])
    update = update_of("set", update_end_step=10, alpha=0.2)
    for seed in range(3):
        new, report, moved = update(jax.random.key(seed), 0, values, layout, None)
        assert mask_of(new).astype(int).tolist() == [[1, 1], [1, 1], [0, 1]]
        assert moved.ravel().tolist() == [5, 0, -1, 7, 3]
        assert [float(value) for value in report] == pytest.approx([1, 1, 0.2, 0, 0])


def test_set_follows_its_key():
    values, statistic = np.ones((COUNT, 1, 1), np.float32), {"gradient": np.ones((OUT, IN), np.float32)}
    one, other = (update_of("set")(jax.random.key(s), 0, values, draw()(0), statistic)[0] for s in (0, 1))
    assert (mask_of(one) != mask_of(other)).any()


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


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        how = {"strides": 2, "num_blocks": 60, "block_shape": (1, 1), "init_layout": random_positions}
        for name in ("first", "second"):
            x = nn.relu(SparseConv(8, (3, 3), **how, name=name)(x))
        return nn.Dense(4)(x.mean(axis=(1, 2)))


@functools.cache
def trained():
    """State of a model after one step, optimizer and batch; compiled once, since the methods begin and train alike.

    The first state is drawn by numpy: random weights and positions, zeros elsewhere.
    """
    assert rigl(update_end_step=T_END).init is set_(update_end_step=T_END).init is random_positions
    optimizer, _ = make_optimizer(Recipe(optimizer="adamw", total_steps=100))
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((8, 8, 8, 8)).astype(np.float32), np.arange(8, dtype=np.int32) % 4
    state = jax.eval_shape(functools.partial(create_train_state, Net(), optimizer, images=images), jax.random.key(0))
    drawn = {path: positions_of(rng.permutation(8 * 72).reshape(8, 72) < 60) for path in layouts(state.topology)}
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(leaf.dtype), state.params)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    state = dataclasses.replace(state, params=params, topology=with_layouts(state.topology, drawn))
    state, metrics = train_step(state, images, labels, model=Net(), optimizer=optimizer)
    assert np.isfinite(metrics["loss"])
    return jax.device_get(state), optimizer, images, labels


@pytest.mark.parametrize("name", MAKERS)
def test_convolutions_adapt_in_a_model(name):
    """With Adam: after an adaptation every moment of a weight that is new is zero, of one that stayed the same."""
    old, optimizer, *batch = trained()
    method = MAKERS[name](update_end_step=T_END)
    new, report = jax.device_get(adapt_step(old, *batch, model=Net(), method=method, optimizer=optimizer))
    moments = [optax.tree_utils.tree_get(tree, "mu") for tree in (old.opt_state, new.opt_state)]  # as deep as params
    assert len(layouts(old.topology)) == 2
    for (name_, before), after in zip(layouts(old.topology).items(), layouts(new.topology).values(), strict=True):
        assert before.shape[1] > before.shape[0]
        assert report["/".join(name_)].accepted > 0
        assert after.num_active == before.num_active
        stays = mask_of(before) & mask_of(after)
        assert (~stays & mask_of(after)).any()
        for tree, other in ((old.params, new.params), moments):
            was, now = (spread(t[name_[0]]["blocks"], layout) for t, layout in ((tree, before), (other, after)))
            assert was.any()
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
