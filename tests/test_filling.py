"""What moments of newly active weights begin with: exact values, by the name of a field, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsb_jax as dsb
from dsb_jax.filling import check_fill, fill_pairs, move_and_fill, move_leaf, origins_of
from dsb_jax.layout import BlockLayout, pack, unpack
from dsb_jax.methods import SET
from dsb_jax.spec import linear_spec
from dsb_jax.topology import LayerTopology
from tests.conftest import make_layout
from tests.topologies import assert_same_bits, make_node, node_of_counts, stacked


def layout_of(out_idx, in_idx, group_start, shape=(4, 4), block_shape=(2, 2)):
    arrays = (jnp.asarray(a, jnp.int32) for a in (out_idx, in_idx, group_start))
    return BlockLayout(*arrays, shape, block_shape)


# Group 0 (rows 0, 1) reads columns 0 to 3, group 1 (rows 2, 3) columns 0, 1; then group 0 keeps columns 2, 3 and
# group 1 gains the same. Nothing of the numbers 1 to 4 stays.
OLD = make_node(layout_of([[0, 1], [2, 3]], [[0, 1], [2, 3], [0, 1]], [0, 2, 3]))
NEW = make_node(layout_of([[1, 0], [3, 2]], [[3, 2], [1, 0], [2, 3]], [0, 1, 3]))
MOMENT = np.array([[[1, 2], [3, 4]], [[10, 20], [30, 40]], [[5, 6], [7, 8]]], np.float32)
KEPT = [[[40, 30], [20, 10]], [[8, 7], [6, 5]]]  # rows 1, 0 by columns 3, 2; rows 3, 2 by columns 1, 0


@jax.jit
def zeroed(leaf, old, new):
    return move_and_fill(leaf, origins_of(old, new), new, "zero")


@jax.jit
def group_mean(leaf, old, new):
    return move_and_fill(leaf, origins_of(old, new), new, "group_mean")


def test_group_means_by_hand():
    assert zeroed(MOMENT, OLD, NEW).tolist() == [*KEPT, [[0, 0], [0, 0]]]
    # New are rows 3, 2 by columns 2, 3: their group keeps 5, 6, 7, 8.
    assert group_mean(MOMENT, OLD, NEW).tolist() == [*KEPT, [[6.5, 6.5], [6.5, 6.5]]]
    # A group of which nothing stays has the mean of what stays of the layer: 10, 20, 30, 40 here.
    other = make_node(layout_of([[1, 0], [3, 2]], [[3, 2], [0, 1], [2, 3]], [0, 1, 3]))
    before = make_node(layout_of([[0, 1], [2, 3]], [[2, 3], [0, 1], [0, 1]], [0, 3, 3]))
    twice = np.concatenate([MOMENT[1:2], MOMENT[:1], MOMENT[:1]])
    assert group_mean(twice, before, other).tolist() == [KEPT[0], [[25, 25], [25, 25]], [[25, 25], [25, 25]]]
    # Nothing stays at all: there is no mean, and zero is what a state begins with.
    nothing = (make_node(layout_of([[0, 1]], [[c, c + 1]], [0, 1], (2, 4))) for c in (0, 2))
    assert group_mean(MOMENT[:1], *nothing).tolist() == [[[0, 0], [0, 0]]]


def test_phantom_rows_stay_zero():
    """Rows 0 to 2 in groups of 2: the last group's second row is none, and counts in no mean."""
    old, new = (make_node(layout_of([[0, 1], [2, 3]], [[0, 1], a], [0, 1, 2], (3, 4))) for a in ([0, 1], [1, 2]))
    moment = np.array([[[1, 2], [3, 4]], [[5, 6], [0, 0]]], np.float32)
    assert group_mean(moment, old, new).tolist() == [[[1, 2], [3, 4]], [[6, 6], [0, 0]]]
    filled = jax.jit(lambda leaf: move_leaf(leaf, origins_of(old, new), new, 9))(moment)
    assert filled.tolist() == [[[1, 2], [3, 4]], [[6, 9], [0, 0]]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_stays_keeps_its_bits_and_its_dtype(dtype):
    old, new = (node_of_counts(seed, (10, 14), (4, 3), c) for seed, c in enumerate(((2, 1, 1), (1, 2, 1))))
    moment = np.asarray(np.random.default_rng(0).normal(size=(4, 4, 3)), dtype)
    moment = np.asarray(pack(unpack(jnp.asarray(moment), old.layout), old.layout))  # phantom weights are zero
    result, plain = np.asarray(group_mean(moment, old, new)), np.asarray(zeroed(moment, old, new))
    assert result.dtype == moment.dtype
    marks = np.ones((4, 4, 3), np.float32)
    stays = np.asarray(pack(unpack(jnp.asarray(marks), old.layout), new.layout)) > 0
    assert_same_bits(result[stays], plain[stays])
    # The definition, in double precision; bfloat16 is a rounding of it.
    group = np.repeat(np.arange(3), np.diff(new.layout.group_start))
    real = np.asarray(new.layout.out_idx)[group][:, :, None] < 10
    for g in range(3):
        mine = np.broadcast_to((group == g)[:, None, None], stays.shape)
        is_new = mine & ~stays & real
        kept = plain[mine & stays].astype(np.float64)
        assert is_new.any()
        wanted = kept.mean() if kept.size else plain[stays].astype(np.float64).mean()
        np.testing.assert_allclose(
            result[is_new].astype(np.float64), wanted, rtol=1e-5 if dtype == jnp.float32 else 0.01
        )


@settings(max_examples=10)
@given(st.integers(0, 99), st.booleans())
def test_a_layer_of_a_stack_is_filled_as_by_itself(seed, second):
    axis = int(second)
    olds, news = ([node_of_counts(seed + i, (10, 14), (4, 3), c) for i, c in enumerate(counts)]
                  for counts in (((2, 1, 1), (1, 2, 1), (3, 0, 1)), ((1, 2, 1), (0, 3, 1), (2, 1, 1))))  # fmt: skip
    moments = np.random.default_rng(seed).normal(size=(3, 4, 4, 3)).astype(np.float32)
    result = group_mean(np.moveaxis(moments, 0, axis), stacked(olds, axis), stacked(news, axis))
    each = [np.asarray(group_mean(m, o, n)) for m, o, n in zip(moments, olds, news, strict=True)]
    np.testing.assert_allclose(result, np.stack(each, axis), rtol=1e-6)


def test_a_function_sees_what_moved_and_what_is_new():
    seen = {}

    def values(moved, is_new, layout):
        seen.update(moved=moved, is_new=is_new, layout=layout)
        return jnp.where(is_new, 3.0, jnp.nan)

    result = move_and_fill(MOMENT, origins_of(OLD, NEW), NEW, values)
    assert result.tolist() == [*KEPT, [[3, 3], [3, 3]]]
    assert seen["moved"].tolist() == [*KEPT, [[0, 0], [0, 0]]]
    assert np.argwhere(seen["is_new"].any(axis=(1, 2))).tolist() == [[2]]
    assert seen["layout"] is NEW.layout


@pytest.mark.parametrize(("values", "have"), [
    (jnp.ones((2, 2, 2)), r"shape \[2, 2, 2\]"), (jnp.ones((1, 3, 2, 2)), r"shape \[1, 3, 2, 2\]"),
    (None, "None"), ("mean", "'mean'"), (MOMENT > 0, r"shape \[3, 2, 2\]"),
])  # fmt: skip
def test_values_that_are_no_numbers_for_these_weights(values, have):
    with pytest.raises(ValueError, match=rf"fill function gave {have}; return numbers for \[3, 2, 2\] weights"):
        move_and_fill(MOMENT, origins_of(OLD, NEW), NEW, lambda moved, is_new, layout: values)


@pytest.mark.parametrize("values", [7, 7.0, jnp.full(2, 7), jnp.full((3, 1, 1), 7.0), np.full((1, 2, 2), 7.0)])
def test_values_may_be_broadcast(values):
    result = move_and_fill(MOMENT, origins_of(OLD, NEW), NEW, lambda moved, is_new, layout: values)
    assert result.tolist() == [*KEPT, [[7, 7], [7, 7]]]


def test_pairs_have_a_hash_and_an_order():
    assert fill_pairs({"nu": "group_mean", "mu": "zero"}) == fill_pairs({"mu": "zero", "nu": "group_mean"})
    assert hash(fill_pairs({"nu": jnp.add})) == hash(fill_pairs({"nu": jnp.add}))
    assert fill_pairs(None) == fill_pairs({}) == ()
    for wrong in ("mean", "group-mean", 0, None):
        with pytest.raises(ValueError, match=r"fill=\{'nu': .*\} is unknown; give zero or group_mean, or a function"):
            fill_pairs({"nu": wrong})


def test_a_field_that_does_not_exist():
    check_fill(fill_pairs({"nu": "zero"}), {"mu", "nu", ""})
    with pytest.raises(
        ValueError, match="fill names 'v', but the optimizer's state has no such field: its fields are mu, nu"
    ):
        check_fill(fill_pairs({"nu": "zero", "v": "zero"}), {"mu", "nu", ""})
    with pytest.raises(ValueError, match="it keeps nothing for the sparse layers"):
        check_fill(fill_pairs({"nu": "zero"}), set())


@pytest.fixture(scope="module")
def filled():
    """An update of a layer and a stack of two, in which each moment of each optimizer begins with something else."""
    layouts = [make_layout(seed, (6, 8), (1, 1), (2,) * 6) for seed in range(3)]
    spec = linear_spec(8, 6).with_single(12)
    one, *both = (LayerTopology(layout, None, spec) for layout in layouts)
    topology = {"fc": {"blocks": one}, "stack": {"blocks": stacked(both)}}
    params = {"fc": {"blocks": jnp.arange(12.0).reshape(12, 1, 1) + 1},
              "stack": {"blocks": jnp.arange(24.0).reshape(2, 12, 1, 1) + 1}}  # fmt: skip
    optimizer = optax.chain(optax.scale_by_adam(), optax.trace(0.9))
    state = jax.tree.map(lambda leaf: leaf + jnp.asarray(2, leaf.dtype), optimizer.init(params))
    # Second moments begin with the mean of their row group where nothing else is said.
    fill = {"trace": lambda moved, is_new, layout: jnp.full(moved.shape, 7.0), "mu": "zero"}
    method = SET(drop_fraction=0.5)
    how = {"params": params, "topology": topology, "opt_state": state, "step": 0, "key": jax.random.key(0)}
    plain = dsb.update(method, optimizer, **how, statistics={}, fill={"nu": "zero"})
    with_fill = dsb.update(method, optimizer, **how, statistics={}, fill=fill)
    for typo in ({"v": "zero"}, {"nu": "group_mean", "momentum": "zero"}):
        with pytest.raises(ValueError, match=r"has no such field: its fields are mu, nu, trace\."):
            dsb.update(method, optimizer, **how, statistics={}, fill=typo)
    return plain, with_fill


def test_each_field_has_its_own_fill(filled):
    plain, with_fill = jax.device_get(filled)
    assert_same_bits(plain[:2], with_fill[:2])  # weights begin at zero, whatever moments do
    for layer in ("fc", "stack"):
        is_new = plain[0][layer]["blocks"] == 0
        assert is_new.sum() == (6 if layer == "fc" else 12)
        (adam, trace), (adam_plain, trace_plain) = with_fill[2], plain[2]
        assert_same_bits(adam.mu, adam_plain.mu)
        assert (adam_plain.nu[layer]["blocks"][is_new] == 0).all()
        assert (adam.nu[layer]["blocks"] == 2).all()  # whatever stays is 2, so that every mean is
        assert_same_bits(
            trace.trace[layer]["blocks"], np.where(is_new, np.float32(7), trace_plain.trace[layer]["blocks"])
        )
