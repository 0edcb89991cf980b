"""Density in stages: another number of blocks between steps; what stays keeps its bits, weights and moments alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import dsb_jax as dsb
from dsb_jax import stages
from dsb_jax.layout import unpack
from dsb_jax.linen import SparseDense
from dsb_jax.methods import DSB, RigL, TopKAST
from dsb_jax.paths import nodes
from dsb_jax.spec import LayerSpec
from dsb_jax.topology import by_layer
from tests.topologies import assert_same_bits, noise_like

WIDTH, BLOCKS = 12, (4, 3)


class Stack(nn.Module):
    """A layer with phantom rows and three stacked ones."""

    @nn.compact
    def __call__(self, x):
        sparse = {"num_blocks": 6, "block_shape": BLOCKS, "implementation": "dense"}
        lifted = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 0, "topology": 0, "statistics": 0}, split_rngs={"params": True}, length=3,
        )  # fmt: skip
        x, _ = lifted(SparseDense(WIDTH, name="stack", **sparse), x, None)
        return SparseDense(10, name="ragged", **sparse)(x)


X = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
OPTIMIZER = optax.adam(1e-2)
METHOD = DSB()  # test_method_contract.py resizes the layers of all methods


def plan_of(topology, num_blocks):
    """Both layers with as many weights as `num_blocks` blocks of theirs hold."""
    layers = []
    for path, node in nodes(topology).items():
        sizes = node.spec
        dense = dataclasses.replace(sizes, storage="dense", block_shape=(1, 1), num_blocks=sizes.size, num_active=0)
        layers.append(dsb.plan.PlannedLayer(path[:-1], dense, dense.with_blocks(BLOCKS, num_blocks), ""))
    return dsb.SparsityPlan(tuple(layers))


@jax.jit
def unpacked(leaf, node):
    return by_layer(lambda layout, _, leaf: unpack(leaf, layout, fill=jnp.nan), node, leaf)


def in_place(leaf, node):
    return np.asarray(unpacked(leaf, node))


@pytest.fixture(scope="module")
def staged():
    """Trees with 6 blocks a layer, with 3 and twice with 8."""
    model = Stack()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    state = noise_like(jax.eval_shape(OPTIMIZER.init, variables["params"]))
    each = [(variables["params"], variables["topology"], state)]
    for seed, count in enumerate((3, 8, 8)):
        plan = plan_of(each[0][1], count)
        each.append(dsb.restage(*each[-1], plan, METHOD, OPTIMIZER, jax.random.key(seed)))
    compiled = stages._resize._cache_size()
    dsb.restage(*each[-2], plan_of(each[0][1], 8), METHOD, OPTIMIZER, jax.random.key(2))
    assert stages._resize._cache_size() == compiled  # plans that are equal share a program
    return [jax.device_get(trees) for trees in each]


def test_sizes_are_those_of_the_plan(staged):
    each, model = staged, Stack()
    for (params, topology, state), count in zip(each, (6, 3, 8, 8), strict=True):
        dsb.validate_topology(topology)
        for path, node in nodes(topology).items():
            planned = plan_of(each[0][1], count)[path[:-1]]
            assert node.spec == planned
            assert params[path[0]]["blocks"].shape == node.blocks_shape == state[0].nu[path[0]]["blocks"].shape
            wanted = planned.num_active * node.num_layers
            assert dsb.telemetry.count_active(topology)[path[:-1]] == wanted
        y, gradient = jax.jit(jax.value_and_grad(lambda p, t: model.apply({"params": p, "topology": t}, X).sum()))(
            params, topology
        )
        assert np.isfinite(y)
        assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, params)


def test_what_stays_keeps_its_bits(staged):
    each = staged
    for i in range(2):
        (old, old_topology, old_state), (new, topology, state) = each[i : i + 2]
        for path, node in nodes(old_topology).items():
            layer, new_node = path[0], nodes(topology)[path]
            was, now = in_place(old[layer]["blocks"], node), in_place(new[layer]["blocks"], new_node)
            stays, is_new = ~np.isnan(was) & ~np.isnan(now), np.isnan(was) & ~np.isnan(now)
            assert_same_bits(now[stays], was[stays])
            assert (now[is_new] == 0).all()
            assert is_new.any() == (i == 1)
            if i == 1:
                assert stays.sum() == (~np.isnan(was)).sum()  # nothing is lost where a layer grows
            for field in ("mu", "nu"):
                was, now = (in_place(getattr(s[0], field)[layer]["blocks"], n)
                            for s, n in ((old_state, node), (state, new_node)))  # fmt: skip
                assert_same_bits(now[stays], was[stays])
                if field == "mu":
                    assert (now[is_new] == 0).all()
                else:  # the mean of those of their row group that stay
                    assert (now[is_new] != 0).all()
        assert_same_bits(old_state[0].count, state[0].count)
        assert_same_bits(old["ragged"]["bias"], new["ragged"]["bias"])


def test_the_same_plan_changes_nothing(staged):
    each = staged
    assert_same_bits(each[2], each[3])


def test_plans_of_something_else_are_refused(staged):
    each = staged
    params, topology, state = each[0]
    right = plan_of(topology, 6)

    def refused(change, message):
        layers = [change(layer) if layer.path == ("ragged",) else layer for layer in right.layers]
        plan = dsb.SparsityPlan(tuple(layer for layer in layers if layer is not None))
        with pytest.raises(ValueError, match=message):
            dsb.restage(params, topology, state, plan, METHOD, OPTIMIZER, jax.random.key(0))

    refused(lambda layer: None, "ragged is sparse, but the plan has 'no such layer'; give a plan that keeps it sparse")
    refused(lambda layer: layer._replace(planned="density 1"), "ragged is sparse, but the plan has 'density 1'")

    def wider(layer):
        spec = LayerSpec((15, 10), out_axes=(1,), in_axes=(0,)).with_blocks(BLOCKS, 6)
        return layer._replace(planned=spec)

    refused(wider, r"ragged is \(10, 12\) in .* blocks, but \(10, 15\) in")
    refused(
        lambda layer: layer._replace(planned=layer.dense.with_blocks((2, 3), 6)),
        r"ragged is \(10, 12\) in \(4, 3\) blocks, but \(10, 12\) in \(2, 3\).*only the number of blocks may",
    )
    with pytest.raises(ValueError, match="RigL adapts layers with storage 'single', but ragged has 'blocks'"):
        dsb.restage(params, topology, state, right, RigL(), OPTIMIZER, jax.random.key(0))


SHRINKING = {"dsb": DSB(min_group_blocks=2), "rigl": RigL(), "topkast": TopKAST(backward_factor=1.2)}  # SET as RigL


@pytest.mark.parametrize("name", SHRINKING)
def test_a_layer_that_shrinks_keeps_its_strongest_weights_and_their_moments(name):
    """From 10 blocks of weights to 7, whatever the weights are; row groups differ by orders of magnitude."""
    method = SHRINKING[name]
    model = SparseDense(WIDTH, num_blocks=10, block_shape=BLOCKS, implementation="dense", method=method, name="layer")
    variables = jax.jit(model.init)(jax.random.key(0), X)
    topology, params = {"layer": variables["topology"]}, {"layer": variables["params"]}
    plan, node = plan_of(topology, 7), nodes(topology)["layer", "blocks"]
    group = np.repeat(np.arange(node.layout.num_groups), np.diff(node.layout.group_start))

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 2**31 - 1), exponents=st.lists(st.integers(-3, 3), min_size=3, max_size=3))
    def law(seed, exponents):
        scale = np.float32(10.0) ** np.resize(exponents, node.layout.num_groups)
        blocks = noise_like(params["layer"]["blocks"], seed=seed) * scale[group][:, None, None].astype(np.float32)
        trained = {"layer": {**params["layer"], "blocks": blocks}}
        state = noise_like(jax.eval_shape(OPTIMIZER.init, trained), seed=seed + 1)
        new, now_topology, now_state = dsb.restage(trained, topology, state, plan, method, OPTIMIZER, jax.random.key(1))
        now = nodes(now_topology)["layer", "blocks"]
        dsb.validate_topology(now_topology)
        assert now.spec == method.stored(plan["layer",])
        was, left = in_place(trained["layer"]["blocks"], node), in_place(new["layer"]["blocks"], now)
        stays, went = ~np.isnan(was) & ~np.isnan(left), ~np.isnan(was) & np.isnan(left)
        assert_same_bits(left[stays], was[stays])
        for field in ("mu", "nu"):
            before, after = (in_place(getattr(s[0], field)["layer"]["blocks"], n)
                             for s, n in ((state, node), (now_state, now)))  # fmt: skip
            assert_same_bits(after[stays], before[stays])
            assert (after[~np.isnan(left) & ~stays] == 0).all()
        if name == "topkast":
            return  # of all its weights; tests/test_method_layers.py
        assert stays.sum() == (~np.isnan(left)).sum()  # nothing comes in
        if name != "dsb":
            assert np.abs(was[stays]).min() >= np.abs(was[went]).max()
            return
        counts, had = (np.diff(n.layout.group_start) for n in (now, node))
        assert counts.min() >= 2
        assert (counts <= had).all()
        # Blocks are cut from the columns of a group in the order of their strength.
        weakest_kept, strongest_gone = [], []
        for g, of_group in enumerate(np.asarray(now.layout.out_idx)):
            np.testing.assert_array_equal(of_group, node.layout.out_idx[g])
            strength = np.sort(np.square(was[of_group[of_group < WIDTH]]).mean(axis=0))[::-1]
            blocks = strength[~np.isnan(strength)].reshape(-1, BLOCKS[1]).sum(axis=1)
            kept = np.square(left[of_group]).mean(axis=0)
            kept = np.sort(kept[~np.isnan(kept)])[::-1].reshape(-1, BLOCKS[1]).sum(axis=1)
            np.testing.assert_allclose(kept, blocks[: counts[g]], rtol=1e-5)
            weakest_kept += [kept[-1]] if counts[g] > 2 else []
            strongest_gone += list(blocks[counts[g] : counts[g] + 1])
        assert min(weakest_kept) >= max(strongest_gone) * (1 - 1e-5)

    law()
