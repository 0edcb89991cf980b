"""Sparse to dense and back: the same bits, in the kernels' own shapes, for every storage and stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsb_jax as dsb
from dsb_jax.methods import DSB, RigL, TopKAST
from dsb_jax.plan import PlannedLayer, SparsityPlan
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from dsb_jax.topology import LayerTopology
from tests.conftest import make_layout
from tests.topologies import assert_same_bits, make_node, node_of_counts, stacked

# name: the dense layer, of 6 outputs (which 4 does not divide) and 12 inputs.
LINEAR = linear_spec(12, 6)
SPECS = {
    "conv": conv_spec((3, 2), 2, 6),
    "query": LayerSpec((12, 3, 2), out_axes=(1, 2), in_axes=(0,)),
    "scanned": LayerSpec((3, 12, 6), out_axes=(2,), in_axes=(1,), stack_axes=(0,)),
    "stacked_last": LayerSpec((12, 2, 6), out_axes=(2,), in_axes=(0,), stack_axes=(1,)),
}
METHODS = [DSB(), TopKAST()]  # test_method_contract.py has all


def dense_params(seed=0):
    rng = np.random.default_rng(seed)
    layers = {
        name: {"kernel": rng.normal(size=spec.kernel_shape).astype(np.float32), "bias": np.ones(6, np.float32)}
        for name, spec in SPECS.items()
    }
    return {"body": layers, "head": {"kernel": rng.normal(size=(6, 3)).astype(np.float32)}}


def plan(num_blocks=4):
    layers = [PlannedLayer(("body", n), s, s.with_blocks((4, 3), num_blocks), "") for n, s in SPECS.items()]
    head = linear_spec(6, 3)
    return SparsityPlan((*layers, PlannedLayer(("head",), head, "kept dense by 'head'", "")))


@pytest.fixture(scope="module", params=METHODS, ids=[m.name for m in METHODS])
def made(request):
    dense = dense_params()
    make = jax.jit(lambda dense: dsb.from_dense(dense, plan(), method=request.param, key=jax.random.key(0)))
    return request.param, dense, *jax.device_get(make(dense))


def test_kept_weights_keep_their_bits(made):
    method, dense, params, topology = made
    dsb.validate_topology(topology)
    masks, back = (
        jax.device_get(jax.jit(f)(*a)) for f, a in ((dsb.masks, [topology]), (dsb.to_dense, [params, topology]))
    )
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, dense)
    assert_same_bits(back["head"], dense["head"])
    for name, spec in SPECS.items():
        node = topology["body"][name]["blocks"]
        assert node.spec == method.stored(spec.with_blocks((4, 3), 4))
        assert params["body"][name]["blocks"].shape == node.blocks_shape
        kernel, mask, now = dense["body"][name]["kernel"], masks["body"][name]["kernel"], back["body"][name]["kernel"]
        assert_same_bits(now, np.where(mask, kernel, np.float32(0)))
        per_layer = np.moveaxis(mask, spec.stack_axes, range(len(spec.stack_axes))).reshape(spec.num_layers, -1)
        assert (per_layer.sum(axis=1) == node.spec.num_active).all()
        if method.storage != "blocks":  # single weights: the largest, of each layer by itself
            sizes = np.moveaxis(np.abs(kernel), spec.stack_axes, range(len(spec.stack_axes))).reshape(per_layer.shape)
            for row, size in zip(per_layer, sizes, strict=True):
                assert size[row].min() > size[~row].max()
        else:
            assert np.abs(kernel[mask]).mean() > np.abs(kernel[~mask]).mean()


def test_there_and_back_is_the_same_bits(made):
    """With a topology: masked dense weights come back as they were, and so do the blocks."""
    method, _, params, topology = made
    masks = jax.jit(dsb.masks)(topology)
    other = dense_params(1)
    for name in SPECS:
        kernel = other["body"][name]["kernel"]
        other["body"][name]["kernel"] = np.where(masks["body"][name]["kernel"], kernel, np.float32(0))
    packed, same = dsb.from_dense(other, topology=topology)
    assert same is topology
    assert jax.tree.structure(packed) == jax.tree.structure(params)
    back = jax.device_get(jax.jit(dsb.to_dense)(packed, topology))
    assert_same_bits(back, other)
    if method.storage != "backward_set":  # which stores more than it computes with
        again, _ = dsb.from_dense(jax.jit(dsb.to_dense)(params, topology), topology=topology)
        assert_same_bits(jax.device_get(again), params)


def test_another_score_is_another_pattern():
    spec = LINEAR
    some = SparsityPlan((PlannedLayer(("fc",), spec, spec.with_blocks((4, 3), 4), ""),))
    dense = {"fc": {"kernel": np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)}}
    _, least = dsb.from_dense(dense, some, method=RigL(), score=lambda w: 1 / jnp.abs(w))
    mask = np.asarray(dsb.masks(least)["fc"]["kernel"])
    assert np.abs(dense["fc"]["kernel"])[mask].max() < np.abs(dense["fc"]["kernel"])[~mask].min()


@settings(max_examples=5)
@given(st.sampled_from([(6, 12, (3, 2)), (7, 9, (4, 3)), (5, 5, (1, 1)), (8, 8, (8, 1))]), st.integers(0, 2**30))
def test_any_layout_there_and_back(sizes, seed):
    out, in_, block_shape = sizes
    rng = np.random.default_rng(seed)
    groups, most = -(-out // block_shape[0]), in_ // block_shape[1]
    counts = rng.integers(0, most + 1, groups)
    if out % block_shape[0]:
        counts[-1] = 0
        counts = rng.permutation(np.resize([1, 2], groups - 1)) if groups > 1 else np.array([], int)
        counts = np.append(counts, [c for c in range(most + 1) if round((counts.sum() + c) / groups) == c][:1])
    if not counts.sum():
        counts[0] = 1
    node = node_of_counts(seed, (out, in_), block_shape, tuple(counts.tolist()))
    blocks = rng.normal(size=node.blocks_shape).astype(np.float32)
    blocks[np.asarray(node.layout.out_idx)[np.repeat(np.arange(groups), counts)] >= out] = 0
    tree, topology = {"kernel": {"blocks": blocks}}, {"kernel": {"blocks": node}}
    dense = dsb.to_dense(tree, topology)
    assert dense["kernel"]["kernel"].shape == (in_, out)
    packed, _ = dsb.from_dense(dense, topology=topology)
    assert_same_bits(np.asarray(packed["kernel"]["blocks"]), blocks)


@pytest.mark.parametrize("name", ["enc/fc", "layout", "blocks", "topology", "kernel", "statistics"])
def test_layers_may_be_called_anything(name):
    node = node_of_counts(0, (8, 12), (4, 3), (2, 1))
    blocks = np.arange(36, dtype=np.float32).reshape(3, 4, 3) + 1
    params = {name: {"blocks": blocks, "bias": np.zeros(8)}, "outer": {name: {"blocks": blocks}}}
    topology = {name: {"blocks": node}, "outer": {name: {"blocks": node}}}
    dense = dsb.to_dense(params, topology)
    assert dense.keys() == {name, "outer"}
    assert dense[name].keys() == {"kernel", "bias"}
    assert dense[name]["kernel"].shape == dense["outer"][name]["kernel"].shape == (12, 8)
    assert np.count_nonzero(dense[name]["kernel"]) == 36
    packed, _ = dsb.from_dense(dense, topology=topology)
    assert_same_bits(jax.device_get(packed), params)
    assert dsb.masks(topology)[name]["kernel"].sum() == 36
    assert dsb.permutations(topology)["outer"][name].shape == (8,)


def test_permutations_bring_groups_together():
    one = node_of_counts(0, (10, 12), (4, 3), (2, 1, 1))
    both = stacked([one, node_of_counts(1, (10, 12), (4, 3), (1, 2, 1))])
    orders = dsb.permutations({"fc": {"blocks": one}, "stack": {"blocks": both}})
    masks = dsb.masks({"fc": {"blocks": one}, "stack": {"blocks": both}})
    assert (orders["fc"].dtype, orders["stack"].shape) == (jnp.int32, (2, 10))
    cases = [(orders["fc"], masks["fc"]["kernel"])]
    cases += list(zip(orders["stack"], masks["stack"]["kernel"], strict=True))
    for order, kernel in cases:
        assert sorted(np.asarray(order).tolist()) == list(range(10))
        rows = np.asarray(kernel).T[np.asarray(order)]
        for start in (0, 4, 8):
            group = rows[start : min(start + 4, 10)]
            assert (group == group[0]).all()


def test_what_does_not_belong_together_is_refused():
    dense, some = dense_params(), plan()
    for given_both in ({}, {"plan": some, "topology": {}}):
        with pytest.raises(ValueError, match="takes a plan, which chooses a pattern, or a topology"):
            dsb.from_dense(dense, **given_both)
    node = make_node(make_layout(0, (8, 12), (4, 3), (2, 1)))
    for params, message in (
        ({"fc": {"kernel": np.ones((12, 9))}}, r"fc/kernel has shape \(12, 9\), expected \(12, 8\)"),
        ({"fc": {"weight": np.ones((12, 8))}}, "fc/kernel is not among the parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            dsb.from_dense(params, topology={"fc": {"blocks": node}})
    other = {**dense, "body": {**dense["body"], "conv": {"kernel": np.ones((12, 6))}}}
    with pytest.raises(ValueError, match=r"body/conv/kernel has shape \(12, 6\), expected \(3, 2, 2, 6\)"):
        dsb.from_dense(other, some)


def test_weights_may_lie_under_another_name():
    """A node at a path that does not end in `blocks` keeps its name."""
    node = node_of_counts(0, (8, 12), (4, 3), (2, 1))
    assert isinstance(dataclasses.replace(node), LayerTopology)
    dense = dsb.to_dense({"fc": np.ones((3, 4, 3), np.float32)}, {"fc": node})
    assert dense["fc"].shape == (12, 8)
    packed, _ = dsb.from_dense(dense, topology={"fc": node})
    assert packed["fc"].shape == (3, 4, 3)
