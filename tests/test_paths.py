"""Weights, topology and statistics find each other by path and type alone, whatever the modules are called."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.layout import validate
from dsb_jax.methods.topkast import ForwardSet
from dsb_jax.paths import by_path, layer_path, nodes, path_name, replace_at, validate_topology, weights_at
from dsb_jax.spec import linear_spec
from dsb_jax.topology import LayerTopology
from tests.conftest import make_layout
from tests.topologies import assert_same_bits, node_of_counts, stacked

NODE = node_of_counts(0, (8, 12), (4, 3), (2, 1))
ODD_NAMES = ("enc/fc", "layout", "blocks", "topology", "kernel", "statistics", "a b", "%2F", "")


def test_every_name_is_a_name():
    topology = {name: {"blocks": NODE} for name in ODD_NAMES} | {"deep": {"blocks": {"blocks": NODE}}}
    assert list(nodes(topology)) == [*sorted((name, "blocks") for name in ODD_NAMES if name <= "deep"),
        ("deep", "blocks", "blocks"), *sorted((name, "blocks") for name in ODD_NAMES if name > "deep")]  # fmt: skip
    params = {name: {"blocks": np.full((3, 4, 3), i)} for i, name in enumerate(ODD_NAMES)}
    params["deep"] = {"blocks": {"blocks": np.full((3, 4, 3), -1), "bias": np.zeros(8)}}
    found = weights_at(params, nodes(topology))
    assert {path[0]: leaf[0, 0, 0] for path, leaf in found.items()} == {
        **{name: i for i, name in enumerate(ODD_NAMES)}, "deep": -1,
    }  # fmt: skip
    changed = replace_at(params, {("enc/fc", "blocks"): np.ones(2), ("deep", "blocks", "blocks"): np.zeros(2)})
    assert changed["enc/fc"]["blocks"].shape == changed["deep"]["blocks"]["blocks"].shape == (2,)
    changed["enc/fc"], changed["deep"]["blocks"]["blocks"] = params["enc/fc"], params["deep"]["blocks"]["blocks"]
    assert_same_bits(changed, params)
    assert layer_path(("deep", "blocks", "blocks")) == ("deep", "blocks")


@given(st.lists(st.lists(st.text("a/%2F", max_size=4), min_size=1, max_size=3), min_size=2, max_size=6))
def test_no_two_paths_have_one_name(paths):
    paths = {tuple(path) for path in paths}
    assert len({path_name(path) for path in paths}) == len(paths)


def test_boxes_are_looked_into_and_kept():
    boxed = nn.Partitioned(np.ones((3, 4, 3)), ("blocks", None, None))
    params = {"fc": {"blocks": boxed, "bias": np.zeros(8)}}
    assert weights_at(params, {("fc", "blocks"): NODE})[("fc", "blocks")] is boxed.value
    changed = replace_at(params, {("fc", "blocks"): np.zeros(5)})
    assert changed["fc"]["blocks"].names == boxed.names
    assert changed["fc"]["blocks"].value.shape == (5,)


def test_weights_that_are_not_there():
    for params, count in (
        ({"fc": {"kernel": np.ones(3)}}, 0),
        ({"fc": {"blocks": {"a": np.ones(1), "b": np.ones(1)}}}, 2),
    ):
        with pytest.raises(ValueError, match=f"the tree has {count} arrays at 'fc/blocks', where the topology has"):
            weights_at(params, {("fc", "blocks"): NODE})


def test_nodes_are_leaves_among_anything():
    topology = [{"a": NODE}, (NODE, None), 3]
    assert set(nodes(topology)) == {("0", "a"), ("1", "0")}
    assert set(by_path(topology)) == {("0", "a"), ("1", "0"), ("2",)}


def changed_layout(**arrays):
    return dataclasses.replace(NODE, layout=dataclasses.replace(NODE.layout, **arrays))


def first_column_twice(layout):
    return np.asarray(layout.in_idx)[[0, 0, 2]]


@pytest.mark.parametrize(("node", "message"), [
    (changed_layout(in_idx=first_column_twice(NODE.layout)), "in_idx repeats a column within a row group"),
    (changed_layout(out_idx=np.asarray(NODE.layout.out_idx) // 2), "out_idx is not a permutation of 0..7"),
    (changed_layout(in_idx=np.asarray(NODE.layout.in_idx) + 12), "outside 0..11"),
    (changed_layout(group_start=np.array([0, 3, 2], np.int32)), "does not cut 3 blocks into 2 groups"),
    (changed_layout(block_shape=(0, 3)), r"the layout is of \(8, 12\) in \(0, 3\) blocks, the spec"),
    (changed_layout(shape=(8, 11)), r"the layout is of \(8, 11\)"),
    (dataclasses.replace(NODE, spec=NODE.spec.with_blocks((4, 3), 4)), "the layout holds 3 blocks, the spec 4"),
    (dataclasses.replace(NODE, layout=make_layout(0, (8, 12), (4, 3), (2, 2))), "holds 4 blocks, the spec 3"),
])  # fmt: skip
def test_a_damaged_layer_is_named(node, message):
    validate_topology({"a/b": {"blocks": NODE}})
    with pytest.raises(ValueError, match=rf"^topology/a%2Fb/blocks: .*{message}"):
        validate_topology({"a": {"blocks": NODE}, "a/b": {"blocks": node}})


SPEC = linear_spec(6, 4).with_single(9, num_computed=4)
FORWARD = np.arange(9).reshape(9, 1, 1) < 4
LAYOUT = make_layout(0, (4, 6), (1, 1), (2, 3, 3, 1))


def kept_beside(forward_mask=FORWARD, num_reserved=15):
    return LayerTopology(LAYOUT, ForwardSet(forward_mask, np.zeros(num_reserved, np.float32), 0.0), SPEC)


@pytest.mark.parametrize(("node", "message"), [
    (LayerTopology(LAYOUT, None, SPEC), "nothing beside the layout says which of the stored weights are computed"),
    (kept_beside(FORWARD[:8]), r"active is bool\[8, 1, 1\], expected bool\[9, 1, 1\]"),
    (kept_beside(FORWARD.astype(np.int32)), r"active is int32\[9, 1, 1\], expected bool\[9, 1, 1\]"),
    (kept_beside(~FORWARD), "5 weights are active, the spec says 4"),
    (kept_beside(num_reserved=14), r"reserve holds \[14\] weights, expected \[15\]"),
    (dataclasses.replace(NODE, aux=kept_beside().aux), "ForwardSet, which belongs to no layer of blocks"),
])  # fmt: skip
def test_what_lies_beside_a_layout_is_checked(node, message):
    validate_topology({"blocks": kept_beside()})
    validate_topology({"blocks": stacked([kept_beside()] * 2)})
    with pytest.raises(ValueError, match=f"^topology/blocks: .*{message}"):
        validate_topology({"blocks": node})
    with pytest.raises(ValueError, match=f"^topology/blocks: .*{message}"):
        validate_topology({"blocks": stacked([node] * 2)})


@pytest.mark.parametrize("tree", [{"fc": {"blocks": np.zeros(3)}}, [3], NODE.layout])
def test_trees_of_something_else_are_no_topology(tree):
    with pytest.raises(ValueError, match=r"this is no topology: it has \d leaves, such as '.*', and no LayerTopology"):
        validate_topology(tree)


@pytest.mark.parametrize("axis", [0, 1])
def test_every_layer_of_a_stack_is_checked(axis):
    right = [NODE, node_of_counts(1, (8, 12), (4, 3), (1, 2)), NODE]
    validate_topology({"blocks": stacked(right, axis)})
    wrong = [*right[:2], changed_layout(in_idx=first_column_twice(NODE.layout))]
    with pytest.raises(ValueError, match=r"topology/blocks: in_idx repeats a column"):
        validate_topology({"blocks": stacked(wrong, axis)})


@pytest.mark.parametrize("block_shape", [(0, 3), (4, 0), (-4, 3), (4, 2.5)])
def test_block_sides_that_divide_nothing(block_shape):
    """A ValueError from every function that would else divide by them (reliability 13)."""
    layout = dataclasses.replace(NODE.layout, block_shape=block_shape)
    wrong = "a side below 1|not a whole number"
    with pytest.raises(ValueError, match=wrong):
        validate(layout)
    with pytest.raises(ValueError, match=wrong):
        linear_spec(12, 8).with_blocks(block_shape, 3)
    with pytest.raises(ValueError, match=r"topology/blocks: the layout is of"):
        validate_topology({"blocks": dataclasses.replace(NODE, layout=layout)})


@pytest.mark.parametrize("num_blocks", [2.5, 0, -1, True, float("nan")])
def test_numbers_of_blocks_that_are_none(num_blocks):
    with pytest.raises(ValueError, match="num_blocks"):
        linear_spec(12, 8).with_blocks((4, 3), num_blocks)


def test_a_topology_of_one_device_or_the_host_is_the_same():
    validate_topology({"blocks": jax.device_put(NODE)})
    validate_topology({"blocks": jax.device_get(NODE)})
    validate_topology({})
