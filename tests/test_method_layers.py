"""What init, update and resize of every method promise.

Stacks of three layers go through one vmapped call, so that a compilation serves several layers at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import validate
from tests.test_method_values import END, METHOD, PLANNED, START, spec_of

STACK = 3
seeds = st.integers(0, 2**16)
law = settings(max_examples=3)


@functools.cache
def functions(name):
    """init, update and the resizes of a stack, each compiled once; results as numpy arrays."""
    method, spec = METHOD[name], spec_of(name)

    def init(key, weights):
        return method.init(key, weights, spec)

    def update(key, step, state, statistic):
        return method.update(key, step, state, statistic)

    def resize(key, state):
        few, many = (method.resize(key, state, spec_of(name, count)) for count in (5, 13))
        return few, many

    def best(key, weights):
        return method.init(key, weights, spec, score=jnp.abs(weights))

    mapped = {
        "init": jax.jit(jax.vmap(init)),
        "best": jax.jit(jax.vmap(best)),
        "update": jax.jit(jax.vmap(update, in_axes=(0, None, 0, 0))),
        "resize": jax.jit(jax.vmap(resize)),
    }
    return {key: lambda *args, jitted=jitted: jax.device_get(jitted(*args)) for key, jitted in mapped.items()}


def draw(seed):
    """Keys and weights of a stack."""
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), STACK)
    return rng, keys, rng.standard_normal((STACK, *PLANNED.shape)).astype(np.float32)


def statistics(name, rng):
    statistic = METHOD[name].statistic
    zeros = None if statistic is None else statistic.zeros(spec_of(name))
    return jax.tree.map(lambda leaf: rng.random((STACK, *leaf.shape)).astype(np.float32), zeros)


def trained(name, seed):
    """Keys, a stack whose stored weights have moved, and statistics."""
    rng, keys, weights = draw(seed)
    state = functions(name)["init"](keys, weights)
    noise = rng.standard_normal(state.blocks.shape).astype(np.float32)
    return keys, state._replace(blocks=np.where(state.blocks == 0, 0, state.blocks + noise)), statistics(name, rng)


def one(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def layers(tree):
    return [one(tree, i) for i in range(STACK)]


def positions(layout):
    """Row and column of every real weight, and its index in the blocks, by numpy."""
    rows = np.repeat(layout.out_idx, np.diff(layout.group_start), axis=0)
    rows = np.broadcast_to(rows[:, :, None], (*rows.shape, layout.in_idx.shape[1]))
    columns = np.broadcast_to(layout.in_idx[:, None, :], rows.shape).astype(int)
    real = rows < layout.shape[0]
    return (rows[real], columns[real]), real


def dense(state, fill=0):
    """The blocks at their positions, `fill` elsewhere, by numpy."""
    at, real = positions(state.layout)
    matrix = np.full(state.layout.shape, fill, state.blocks.dtype)
    matrix[at] = state.blocks[real]
    return matrix


def mask_of(state):
    return dense(state._replace(blocks=np.ones(state.blocks.shape, bool)))


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def check(name, state, spec):
    """Sizes, a valid layout, zero phantoms, as many active weights as the spec says."""
    validate(state.layout)
    assert (state.layout.shape, state.layout.block_shape) == (spec.shape, spec.block_shape)
    assert state.blocks.shape == (spec.num_blocks, *spec.block_shape)
    assert state.blocks.dtype == np.float32
    assert not state.blocks[~positions(state.layout)[1]].any()
    assert mask_of(state).sum() == spec.num_stored
    if name == "topkast":
        assert state.aux.active.sum() == spec.num_active
        assert state.aux.reserve.shape == (spec.size - spec.num_stored,)
    else:
        assert state.aux is None
        assert state.layout.num_active == spec.num_active


def everything(name, state):
    """All weights that a layer keeps, zero where it has none."""
    weights = dense(state)
    if name == "topkast":
        weights[~mask_of(state)] = state.aux.reserve
    return weights


@pytest.mark.parametrize("name", METHOD)
@law
@given(seed=seeds)
def test_init_draws(name, seed):
    _, keys, weights = draw(seed)
    stack = functions(name)["init"](keys, weights)
    same_bits(stack, functions(name)["init"](keys, weights))
    for state, w in zip(layers(stack), weights, strict=True):
        check(name, state, spec_of(name))
        at, real = positions(state.layout)
        if name == "topkast":
            np.testing.assert_array_equal(everything(name, state), w)
            continue
        fan_in = mask_of(state).sum(axis=1)[at[0]]
        np.testing.assert_allclose(state.blocks[real], w[at] * np.sqrt(PLANNED.in_ / fan_in), rtol=1e-5)
    first, second = layers(stack)[:2]  # other keys, other patterns
    assert (mask_of(first) != mask_of(second)).any()


@pytest.mark.parametrize("name", METHOD)
def test_init_takes_the_best_by_a_score(name):
    _, keys, weights = draw(0)
    stack = functions(name)["best"](keys, weights)
    same_bits(stack, functions(name)["best"](keys[::-1], weights))
    for state, drawn, w in zip(layers(stack), layers(functions(name)["init"](keys, weights)), weights, strict=True):
        check(name, state, spec_of(name))
        at, real = positions(state.layout)
        assert (state.blocks[real] == w[at]).all()
        if METHOD[name].storage == "blocks":
            assert np.abs(w)[mask_of(state)].sum() > np.abs(w)[mask_of(drawn)].sum()
            assert np.diff(state.layout.group_start).min() >= 1
        else:
            assert np.abs(w)[mask_of(state)].min() >= np.abs(w)[~mask_of(state)].max()


@pytest.mark.parametrize("name", METHOD)
def test_update_keeps_the_contract(name):
    update = functions(name)["update"]

    @law
    @given(seed=seeds, step=st.sampled_from([START, 50, END - 1]))
    def moves_within_the_schedule(seed, step):
        keys, stack, statistic = trained(name, seed)
        new_stack, reports = update(keys, np.int32(step), stack, statistic)
        same_bits((new_stack, reports), update(keys, np.int32(step), stack, statistic))
        for state, new, report in zip(*map(layers, (stack, new_stack, reports)), strict=True):
            assert [(a.shape, a.dtype) for a in jax.tree.leaves(new)] == [
                (a.shape, a.dtype) for a in jax.tree.leaves(state)
            ]
            check(name, new, spec_of(name))
            weights, stays = everything(name, state), mask_of(state) & mask_of(new)
            if name != "topkast":
                weights = np.where(stays, weights, 0)
            assert everything(name, new).tobytes() == weights.tobytes()
            assert 0 <= report.accepted <= report.requested <= PLANNED.num_active
            assert 0 <= report.turnover <= 1
            assert 0 <= report.collateral <= 1
        # A block of which few weights are new may be refused, for what comes along with it.
        grew = np.any if name == "dsb, blocks" else np.all
        assert grew(reports.accepted > 0) or step == END - 1 or name == "ssb"

    moves_within_the_schedule()
    keys, stack, statistic = trained(name, 0)
    stack.blocks[:, 0, 0, 0] = np.nan
    for step in (0, START - 1, END, 2**30):  # the identity, bit by bit
        new, report = update(keys, np.int32(step), stack, statistic)
        same_bits(new, stack)
        assert not np.any([report.requested, report.accepted, report.turnover, report.collateral])


@pytest.mark.parametrize("name", METHOD)
@law
@given(seed=seeds)
def test_resize_keeps_the_strongest(name, seed):
    keys, stack, _ = trained(name, seed)
    resized = functions(name)["resize"](keys, stack)
    same_bits(resized, functions(name)["resize"](keys, stack))
    for state, few, many in zip(*map(layers, (stack, *resized)), strict=True):
        old, weights = mask_of(state), everything(name, state)
        for new, count in ((few, 5), (many, 13)):
            check(name, new, spec_of(name, count))
            wanted = weights if name == "topkast" else np.where(old & mask_of(new), weights, 0)
            assert everything(name, new).tobytes() == wanted.tobytes()
        if name == "topkast":
            for new, count in ((few, 5), (many, 13)):
                spec = spec_of(name, count)
                assert new.aux.penalty == pytest.approx(0.1 * (spec.size / spec.num_active - 1))
                active = dense(new._replace(blocks=new.aux.active))
                assert np.abs(weights)[active].min() >= np.abs(weights)[~active].max()
            continue
        assert (old <= mask_of(many)).all()  # growing, all stay
        assert (mask_of(few) <= old).all()  # shrinking, nothing comes in
        if METHOD[name].storage == "single":
            assert np.abs(weights)[mask_of(few)].min() >= np.abs(weights)[old & ~mask_of(few)].max()
            continue
        np.testing.assert_array_equal(few.layout.out_idx, state.layout.out_idx)
        assert np.diff(few.layout.group_start).min() >= 1
        for group, rows in enumerate(state.layout.out_idx):  # the weakest columns of each group went
            rows = rows[rows < PLANNED.out]
            strength = np.square(weights[rows]).mean(axis=0)
            stayed, went = mask_of(few)[rows[0]], old[rows[0]] & ~mask_of(few)[rows[0]]
            assert not went.any() or strength[stayed].min() >= strength[went].max(), group


@pytest.mark.parametrize("name", [n for n in METHOD if n not in ("dsb", "rigl", "topkast")])
def test_a_stack_is_its_layers_one_by_one(name):
    """The others are in test_method_contract.py, where an adaptation does it."""
    method = METHOD[name]
    keys, stack, statistic = trained(name, 1)
    together = functions(name)["update"](keys, np.int32(20), stack, statistic)
    single = jax.jit(method.update)
    for i in range(STACK):
        arguments = one((stack, statistic), i)
        same_bits(jax.device_get(single(keys[i], np.int32(20), *arguments)), one(together, i))
    with jax.debug_nans(True):
        single(keys[0], np.int32(20), *one((stack, statistic), 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", METHOD)
def test_dtypes_stay_in_every_mode(name, dtype):
    """Only traced: no sum of different dtypes, nothing widens with 64 bits."""
    method, spec = METHOD[name], spec_of(name)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        weights = jax.ShapeDtypeStruct(spec.shape, dtype)
        statistic = None if method.statistic is None else jax.eval_shape(lambda: method.statistic.zeros(spec))

        def every_way(key, step, weights, statistic):
            state = method.init(key, weights, spec)
            new, report = method.update(key, step, state, statistic)
            few = method.resize(key, state, spec_of(name, 5))
            return state, method.init(key, weights, spec, score=jnp.abs(weights)), new, few, report

        *states, report = jax.eval_shape(every_way, jax.random.key(0), jnp.int32(20), weights, statistic)
    for state in states:
        assert state.blocks.dtype == dtype
        assert [str(a.dtype) for a in jax.tree.leaves(state.layout)] == ["int32", "uint16", "int32"]
        assert state.aux is None or [str(a.dtype) for a in jax.tree.leaves(state.aux)] == ["bool", dtype]
    assert [str(a.dtype) for a in report[:5]] == ["int32", "int32", "float32", "float32", "int32"]


@pytest.mark.parametrize("name", ["dsb", "set"])
def test_the_same_bits_with_64_bits(name):
    """What is drawn, too."""
    keys, stack, statistic = trained(name, 2)
    arguments = keys[0], np.int32(20), *one((stack, statistic), 0)
    narrow = jax.device_get(jax.jit(METHOD[name].update)(*arguments))
    with jax.enable_x64(True):
        wide = jax.device_get(jax.jit(METHOD[name].update)(*arguments))
    same_bits(narrow, wide)
