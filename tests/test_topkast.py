"""Top-KAST: what is stored where, an update by hand, and the gradient of what a layer computes with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import BlockLayout, validate
from dsb_jax.methods import LayerState, TopKAST
from dsb_jax.methods.topkast import ForwardSet, join
from dsb_jax.spec import linear_spec

OUT, IN, ACTIVE = 7, 12, 20
METHOD = TopKAST(backward_factor=1.5, exploration=0.1)
law = settings(max_examples=6)
jit_join = jax.jit(join)


@functools.cache
def compiled(method, shape, num_active):
    """`init` and `update`, as numpy arrays."""
    spec = method.stored(linear_spec(shape[1], shape[0]).with_single(num_active))
    init = jax.jit(lambda weights: method.init(jax.random.key(0), weights, spec))
    update = jax.jit(lambda state: method.update(jax.random.key(0), jnp.int32(7), state, None))
    return lambda weights: jax.device_get(init(weights)), lambda state: jax.device_get(update(state))


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


def split(weights, count, active, penalty):
    """The state that weights make, by numpy."""
    mask = largest(weights, count)
    rows, columns = np.nonzero(mask)
    start = np.searchsorted(rows, np.arange(len(weights) + 1)).astype(np.int32)
    out_idx, in_idx = np.arange(len(weights), dtype=np.int32)[:, None], columns[:, None].astype(np.uint16)
    layout = BlockLayout(out_idx, in_idx, start, weights.shape, (1, 1))
    blocks, forward = (array[mask].reshape(-1, 1, 1) for array in (weights, largest(weights, active)))
    return LayerState(blocks, layout, ForwardSet(forward, weights[~mask], penalty))


def check(weights, state):
    """That these are the sets A and B of the weights."""
    validate(state.layout)
    expected = split(weights, 30, ACTIVE, 0.1 * (OUT * IN / ACTIVE - 1))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(jit_join(state), weights)


@law
@given(seed=st.integers(0, 2**16), ties=st.booleans())
def test_the_sets_and_that_nothing_is_lost(seed, ties):
    init, update = compiled(METHOD, (OUT, IN), ACTIVE)
    rng = np.random.default_rng(seed)
    weights = rng.integers(-3, 4, (OUT, IN)) if ties else rng.standard_normal((OUT, IN))
    weights = weights.astype(np.float32)
    state = init(weights)
    check(weights, state)
    state = state._replace(blocks=state.blocks + rng.standard_normal(state.blocks.shape).astype(np.float32))
    weights = spread(state.blocks, state.layout)  # those that have a gradient have moved
    weights[~mask_of(state.layout)] = state.aux.reserve
    new, report = update(state)
    check(weights, new)
    entered = (largest(weights, ACTIVE) & ~spread(state.aux.active, state.layout)).sum()
    assert report.requested == report.accepted == entered
    assert report.turnover == pytest.approx(entered / ACTIVE)
    assert report.collateral == 0
    assert report.empty_groups == (~largest(weights, ACTIVE).any(axis=1)).sum()


def test_an_update_by_hand():
    init, update = compiled(TopKAST(), (2, 3), 2)
    state = init(np.array([[5, -4, 1], [0.5, 3, -2]], np.float32))
    assert mask_of(state.layout).astype(int).tolist() == [[1, 1, 0], [0, 1, 1]]
    assert state.blocks.ravel().tolist() == [5, -4, 3, -2]
    assert state.aux.active.ravel().tolist() == [True, True, False, False]
    assert state.aux.reserve.tolist() == [1, 0.5]
    assert state.aux.penalty == 0
    # Training wears 5 down to 0.7 and -2 to 0.1: 3 enters the forward set, and 1 the backward set from the reserve.
    blocks = np.array([0.7, -4, 3, 0.1], np.float32)[:, None, None]
    new, report = update(state._replace(blocks=blocks))
    assert mask_of(new.layout).astype(int).tolist() == [[1, 1, 1], [0, 1, 0]]
    assert new.blocks.ravel().tolist() == pytest.approx([0.7, -4, 1, 3])
    assert new.aux.active.ravel().tolist() == [False, True, False, True]
    assert new.aux.reserve.tolist() == pytest.approx([0.5, 0.1])
    assert [float(value) for value in report[:5]] == [1, 1, 0.5, 0, 0]


def test_a_row_that_nothing_is_computed_with_counts_as_empty_before_the_start_too():
    init, _ = compiled(TopKAST(), (2, 3), 2)
    state = init(np.array([[5, -4, 1], [0.5, 3, -2]], np.float32))
    _, report = jax.jit(TopKAST(update_start_step=9).update)(jax.random.key(0), 7, state, None)
    assert [float(value) for value in report[:5]] == [0, 0, 0, 0, 1]  # row 1 has weights in the backward set only


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_gradient_goes_through_and_the_penalty_is_added(dtype):
    def both_ways(blocks, mask, gradient):
        aux = ForwardSet(mask, jnp.zeros(0), 0.5)
        y, backward = jax.vjp(aux.forward, blocks)
        return y, *backward(gradient)

    columns = (np.reshape(values, (2, 1, 1)) for values in ([2.0, 3.0], [True, False], [10.0, 20.0]))
    blocks, mask, gradient = columns
    with jax.numpy_dtype_promotion("strict"):
        y, found = jax.jit(both_ways)(blocks.astype(dtype), mask, gradient.astype(dtype))
    assert (y.dtype, found.dtype) == (dtype, dtype)
    assert y.ravel().tolist() == [2, 0]
    assert found.ravel().tolist() == [10, 20 + 0.5 * 3]
    alone = ForwardSet(mask, np.zeros(0), 0.5).forward(blocks.astype(dtype))  # of numpy arrays, and not compiled
    np.testing.assert_array_equal(alone, y)


def test_all_weights_can_be_in_the_backward_set():
    weights = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    init, update = compiled(TopKAST(backward_factor=10), (2, 3), 2)
    state = init(weights)
    assert state.aux.reserve.shape == (0,)
    new, _ = update(state._replace(blocks=-state.blocks[::-1]))
    np.testing.assert_array_equal(jit_join(new), -weights[::-1, ::-1])
    assert new.aux.active.ravel().tolist() == [True, True, False, False, False, False]
