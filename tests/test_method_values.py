"""All methods are values: they compare, hash, print, go to JSON and back, and refuse invalid settings and layers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.methods import DSB, METHODS, SET, LayerState, RigL, Static, TopKAST, from_json, to_json
from dsb_jax.spec import linear_spec

START, END = 10, 100
SCHEDULE = {"update_start_step": START, "update_end_step": END}
METHOD = {
    "dsb": DSB(**SCHEDULE),
    "dsb, blocks": DSB(**SCHEDULE, granularity="block", grow="random", keep_grouping=False),
    "ssb": Static(),
    "rigl": RigL(**SCHEDULE),
    "set": SET(**SCHEDULE),
    "topkast": TopKAST(**SCHEDULE, backward_factor=1.5, exploration=0.1),
}
PLANNED = linear_spec(26, 29).with_blocks((8, 4), 9)  # ragged

steps = st.integers(0, 2**31 - 1)
SCHEDULES = {
    "update_interval": st.integers(1, 2**31 - 1),
    "update_start_step": steps,
    "update_end_step": st.none() | st.integers(1, 2**31 - 1),
}
ANNEALED = {
    **SCHEDULES,
    "drop_fraction": st.sampled_from([0, 1]) | st.floats(0, 1),
    "anneal_steps": st.none() | st.integers(1, 2**31 - 1),
}
BLOCKWISE = {
    "granularity": st.just("block"),
    "grow": st.sampled_from(["norm", "norm_unaligned", "block_gradient", "gradient", "random"]),
    "block_aware_drop": st.booleans(),
    "keep_grouping": st.booleans(),
    "growth_score": st.just(2) | st.floats(1e-6, 1e6),
    "min_group_blocks": steps,
    "regroup_interval": st.none() | st.integers(1, 2**31 - 1),
}
VALUES = st.one_of(
    st.just(Static()),
    st.fixed_dictionaries({}, optional=ANNEALED).map(lambda fields: RigL(**fields)),
    st.fixed_dictionaries({}, optional=ANNEALED).map(lambda fields: SET(**fields)),
    st.fixed_dictionaries({}, optional=ANNEALED).map(lambda fields: DSB(**fields)),
    st.fixed_dictionaries({}, optional=ANNEALED).map(lambda fields: DSB.paper(**fields)),
    st.fixed_dictionaries(BLOCKWISE, optional=ANNEALED).map(lambda fields: DSB(**fields)),
    st.fixed_dictionaries(
        {}, optional={**SCHEDULES, "backward_factor": st.just(3) | st.floats(1, 1e6), "exploration": st.floats(0, 1e6)}
    ).map(lambda fields: TopKAST(**fields)),
)


@settings(max_examples=60)
@given(method=VALUES, other=VALUES)
def test_a_method_is_a_value(method, other):
    again = from_json(json.loads(json.dumps(to_json(method))))
    assert again == method
    assert hash(again) == hash(method)
    assert repr(again) == repr(method)
    assert type(again) is type(method)
    assert (method == other) == (to_json(method) == to_json(other)) == (repr(method) == repr(other))
    assert METHODS[method.name] is type(method)


def test_whole_numbers_are_numbers():
    one, other = (
        DSB(drop_fraction=1, growth_score=2, granularity="block"),
        DSB(drop_fraction=1.0, growth_score=2.0, granularity="block"),
    )
    assert (one, hash(one), repr(one), json.dumps(to_json(one))) == (
        other, hash(other), repr(other), json.dumps(to_json(other))
    )  # fmt: skip
    assert from_json({"name": "dsb", "drop_fraction": 1}) == DSB(drop_fraction=1.0)


def test_the_registry():
    assert list(METHODS) == ["dsb", "ssb", "rigl", "set", "topkast"]
    assert from_json({"name": "topkast"}) == TopKAST()


BAD_STEPS = (-1, 2.5, 3.0, float("nan"), float("inf"), True, "10", 2**31)
BAD_SHARES = (-0.1, 1.5, float("nan"), float("inf"), True, "0.3", 10**400, None)


@pytest.mark.parametrize("method", [DSB, RigL, SET, TopKAST], ids=lambda method: method.name)
def test_invalid_settings_of_the_schedule(method):
    fields = {
        "update_interval": (0, None, *BAD_STEPS),
        "update_start_step": (None, *BAD_STEPS),
        "update_end_step": (0, *BAD_STEPS),
        "anneal_steps": (0, *BAD_STEPS),
        "drop_fraction": BAD_SHARES,
    }
    for name in {field.name for field in dataclasses.fields(method)} & set(fields):
        for value in fields[name]:
            with pytest.raises(ValueError, match=f"^{name}=.*(is no whole number|is not in)") as caught:
                method(**{name: value})
            assert "\n" not in str(caught.value)
            with pytest.raises(ValueError, match=f"^method '{method.name}': {name}="):
                from_json({"name": method.name, name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "dense"}, r"^method name='dense' is unknown; choose one of dsb, ssb, rigl, set, topkast\.$"),
        ({}, "^method name=None is unknown"),
        ({"name": ["dsb"]}, r"^method name=\['dsb'\] is unknown"),
        ({"name": "rigl", "grow": "norm"}, "^method 'rigl' has no field 'grow'; it has drop_fraction, update_inter"),
        ({"name": "ssb", "drop_fraction": 0.3}, "^method 'ssb' has no field 'drop_fraction'; it has columns"),
        ({"name": "topkast", "backward_factor": 0.5}, r"^method 'topkast': backward_factor=0\.5 is not in \[1, "),
        ({"name": "topkast", "exploration": -1}, "^method 'topkast': exploration=-1 is not in"),
    ],
)
def test_invalid_json(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_json(values)
    assert "\n" not in str(caught.value)


def test_a_method_of_ones_own_is_not_written():
    with pytest.raises(ValueError, match=r"Own\(\) is not one of the methods dsb, ssb"):
        to_json(type("Own", (Static,), {"__repr__": lambda self: "Own()"})())


@settings(max_examples=40)
@given(interval=st.integers(1, 50), start=st.integers(0, 200), end=st.none() | st.integers(1, 300))
def test_due_is_the_schedule_by_brute_force(interval, start, end):
    multiples = [t for t in range(interval, 400, interval) if start <= t < (400 if end is None else end)]
    for method in (DSB, RigL, SET, TopKAST):
        due = method(update_interval=interval, update_start_step=start, update_end_step=end).due
        assert [t for t in range(400) if due(t)] == multiples
    assert not any(map(Static().due, range(400)))


def spec_of(name, num_blocks=PLANNED.num_blocks):
    return METHOD[name].stored(PLANNED.with_blocks(PLANNED.block_shape, num_blocks))


@pytest.mark.parametrize("name", METHOD)
def test_stored_keeps_the_active_weights(name):
    method, spec = METHOD[name], spec_of(name)
    assert spec.storage == method.storage
    assert spec.num_active == PLANNED.num_active
    assert method.stored(spec) == spec
    assert spec.num_blocks == {"blocks": 9, "single": 264, "backward_set": 396}[method.storage]


def test_no_more_is_stored_than_there_is():
    full = TopKAST(backward_factor=1e6).stored(PLANNED)
    assert (full.num_blocks, full.num_active) == (PLANNED.size, PLANNED.num_active)


@pytest.mark.parametrize("name", METHOD)
def test_wrong_layers_are_refused(name):
    method, spec = METHOD[name], spec_of(name)
    weights, key = np.zeros(spec.shape, np.float32), jax.random.key(0)
    other = PLANNED.with_single(9) if method.storage == "blocks" else PLANNED
    with pytest.raises(ValueError, match=f"method '{method.name}' stores '{method.storage}', and this layer's stor"):
        method.init(key, weights, other)
    with pytest.raises(ValueError, match=r"weights has shape \[26, 29\], the layer is \[29, 26\] \(out, in\)"):
        method.init(key, weights.T, spec)
    with pytest.raises(ValueError, match=r"score has shape \[26, 29\]"):
        method.init(key, weights, spec, score=weights.T)
    state = LayerState(*jax.eval_shape(lambda: method.init(key, weights, spec)))
    with pytest.raises(ValueError, match=r"cannot be resized to \(30, 26\)"):
        method.resize(key, state, method.stored(linear_spec(26, 30).with_blocks((8, 4), 9)))
    if method.storage == "blocks":
        with pytest.raises(ValueError, match="stores 'blocks', and this layer's storage is 'single'"):
            method.stored(other)
