"""One node for each sparse layer or stack of layers: its sizes, its layers one by one, and its way into files."""

import dataclasses

import flax.core
import flax.serialization
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import BlockLayout, unpack
from dsb_jax.methods import TopKAST
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec
from dsb_jax.topology import LayerTopology, by_layer, join_stack, split_stack
from tests.conftest import make_layout
from tests.topologies import assert_same_bits, make_node, node_of_counts, stacked

SHAPE, BLOCK_SHAPE = (10, 14), (4, 3)


def layers(count: int) -> list[LayerTopology]:
    """Equal sizes, other patterns; the ragged last group always holds one block."""
    return [node_of_counts(seed, SHAPE, BLOCK_SHAPE, ((1, 2, 1), (2, 1, 1))[seed % 2]) for seed in range(count)]


def test_the_sizes_of_one_layer():
    node = make_node(make_layout(0, (8, 18), (4, 3), (2, 1)), spec=conv_spec((3, 3), 2, 8))
    assert (node.stack_axes, node.stack_shape, node.num_layers) == ((), (), 1)
    assert node.kernel_shape == (3, 3, 2, 8)
    assert node.blocks_shape == (3, 4, 3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spec_knows", [False, True])
def test_the_sizes_of_a_stack(axis, spec_knows):
    """Read from the shapes of a layer that was lifted by somebody else, or told by the spec: the same."""
    node = stacked(layers(3), axis)
    if spec_knows:
        own = dataclasses.asdict(node.spec) | {"stack_axes": (axis,)}
        sizes, axes = ((3, 14, 10), (2, 1)) if axis == 0 else ((14, 3, 10), (2, 0))
        spec = LayerSpec(**own | {"kernel_shape": sizes, "out_axes": axes[:1], "in_axes": axes[1:], "num_active": 0})
        node = dataclasses.replace(node, spec=spec)
    assert (node.stack_axes, node.stack_shape, node.num_layers) == ((axis,), (3,), 3)
    assert node.blocks_shape == ((3, 4, 4, 3) if axis == 0 else (4, 3, 4, 3))
    assert node.kernel_shape == ((3, 14, 10) if axis == 0 else (14, 3, 10))
    assert (node.spec.num_blocks, node.spec.num_groups) == (4, 3)
    assert node.spec.num_active == 3 * 12 + 1 * 6
    if axis == 0:  # a layout alone knows of stack axes in front only
        layout = node.layout
        assert (layout.num_blocks, layout.num_groups, layout.num_active) == (4, 3, node.spec.num_active)


def test_a_stack_of_stacks():
    inner = [stacked(layers(2)), stacked(layers(2)[::-1]), stacked(layers(2))]
    node = stacked(inner)
    assert (node.stack_axes, node.stack_shape, node.num_layers) == ((0, 1), (3, 2), 6)
    assert node.blocks_shape == (3, 2, 4, 4, 3)
    split = split_stack(node.layout, node.stack_axes)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[2], split), inner[1].layout.__class__(*[
        np.asarray(leaf)[0] for leaf in jax.tree.leaves(inner[1].layout)], SHAPE, BLOCK_SHAPE))  # fmt: skip
    assert_same_bits(join_stack(split, node.stack_axes, node.stack_shape), node.layout)


def test_a_layout_of_another_layer_is_no_stack():
    node = stacked(layers(3))
    other = dataclasses.replace(node, spec=linear_spec(14, 10).with_blocks((4, 3), 5))
    with pytest.raises(ValueError, match=r"in_idx\[3, 4, 3\] are no stack of layers of 3 groups and 5 blocks"):
        _ = other.stack_axes


@settings(max_examples=8)
@given(st.integers(0, 2), st.permutations(range(4)))
def test_splitting_a_stack_is_invertible(count, order):
    axes, sizes = tuple(sorted(order[:count])), tuple(range(2, 2 + count))
    own = [3, 4, 5]
    for axis, size in zip(axes, sizes, strict=True):
        own.insert(min(axis, len(own)), size)
    leaf = np.arange(np.prod(own)).reshape(own)
    axes = tuple(min(axis, len(own) - 1) for axis in axes)
    split = split_stack({"leaf": leaf}, axes)["leaf"]
    assert split.shape == (np.prod(sizes, dtype=int), 3, 4, 5)
    np.testing.assert_array_equal(join_stack(split, axes, sizes), leaf)


@pytest.mark.parametrize("axis", [0, 1])
def test_by_layer_is_a_loop_over_the_layers(axis):
    each = layers(3)
    blocks = np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32)

    def dense(layout, aux, blocks):
        return unpack(blocks, layout)

    result = jax.jit(lambda node, blocks: by_layer(dense, node, blocks))(
        stacked(each, axis), np.moveaxis(blocks, 0, axis)
    )
    one = jax.jit(lambda node, blocks: by_layer(dense, node, blocks))
    assert_same_bits(result, np.stack([np.asarray(one(node, b)) for node, b in zip(each, blocks, strict=True)], axis))


def top_kast(num_active: int) -> tuple[jax.Array, LayerTopology]:
    method = TopKAST(exploration=1e-3)
    spec = method.stored(linear_spec(12, 8).with_single(num_active))
    weights = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    blocks, layout, aux = jax.jit(lambda w: method.init(jax.random.key(0), w, spec))(weights)
    return blocks, LayerTopology(layout, aux, spec)


@pytest.fixture(scope="module")
def variables():
    """Of a model with a plain layer, a stack along each axis, and a layer with weights that its method keeps."""
    blocks, aux_node = top_kast(20)
    topology = {
        "plain": {"blocks": layers(1)[0]},
        "stack": {"inner": {"blocks": stacked(layers(2))}},
        "second_axis": {"blocks": stacked(layers(2), 1)},
        "kept": {"blocks": aux_node},
    }
    params = jax.tree.map(
        lambda node: np.arange(np.prod(node.blocks_shape), dtype=np.float32).reshape(node.blocks_shape),
        topology,
        is_leaf=lambda node: isinstance(node, LayerTopology),
    )
    params["kept"]["blocks"] = blocks
    return {"params": params, "topology": topology, "batch_stats": {"norm": {"mean": np.ones(3, np.float32)}}}


def forgotten(tree):
    """The same sizes, other numbers."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("frozen", [False, True])
def test_whole_variables_go_through_bytes(variables, frozen):
    if frozen:
        variables = flax.core.freeze(variables)
    data = flax.serialization.to_bytes(variables)
    assert_same_bits(flax.serialization.from_bytes(forgotten(variables), data), variables)
    state = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(
        flax.serialization.to_state_dict(variables)))  # fmt: skip
    assert_same_bits(flax.serialization.from_state_dict(forgotten(variables), state), variables)


def test_a_layout_alone_goes_through_bytes():
    layout = make_layout(0, (8, 12), (4, 3), (2, 1))
    layout = dataclasses.replace(layout, in_idx=np.asarray(layout.in_idx, np.uint16))
    restored = flax.serialization.from_bytes(forgotten(layout), flax.serialization.to_bytes(layout))
    assert isinstance(restored, BlockLayout)
    assert_same_bits(restored, layout)


def test_what_is_saved_are_names_and_arrays(variables):
    """No class, no static field: what another program reads needs none of ours."""
    state = flax.serialization.to_state_dict(variables["topology"]["kept"]["blocks"])
    assert {name: sorted(inner) for name, inner in state.items()} == {
        "layout": ["group_start", "in_idx", "out_idx"],
        "aux": ["forward_mask", "reserve"],
    }
    assert "aux" not in flax.serialization.to_state_dict(variables["topology"]["plain"]["blocks"])


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_saved_layer_brings_its_number_of_blocks(axis):
    """Density in stages: the target was made by the first plan, the file has the last one's number of blocks."""
    few = [node_of_counts(seed, (8, 12), (4, 3), (1, 1)) for seed in range(2)]
    many = [node_of_counts(seed, (8, 12), (4, 3), (2, 3)) for seed in range(2)]
    target, saved = (each[0] if axis is None else stacked(each, axis) for each in (few, many))
    restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(saved))
    assert restored.spec == saved.spec != target.spec
    assert_same_bits(restored, saved)


def test_a_saved_layer_of_another_kind_is_refused(variables):
    plain, kept = (variables["topology"][name]["blocks"] for name in ("plain", "kept"))
    with pytest.raises(ValueError, match="the saved topology has no aux/forward_mask; it is of another kind of layer"):
        flax.serialization.from_state_dict(kept, flax.serialization.to_state_dict(plain))
    _, other = top_kast(24)
    with pytest.raises(ValueError, match="stores 48 weights and the target 40; make the target of the plan"):
        flax.serialization.from_state_dict(kept, flax.serialization.to_state_dict(other))


def test_two_plans_are_two_programs():
    """The static spec keeps the caches of `jit` apart, the numbers of the layout do not."""
    traced = []
    count = jax.jit(lambda node: traced.append(node.spec) or node.layout.group_start[-1])
    one, same, other = (node_of_counts(s, (8, 12), (4, 3), c) for s, c in ((0, (1, 2)), (1, (2, 1)), (0, (2, 2))))
    assert [int(count(node)) for node in (one, same, other)] == [3, 3, 4]
    assert len(traced) == 2
