"""Laws of the adaptation schedules, and one schedule worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.methods import DSB, RigL, TopKAST
from dsb_jax.methods.schedule import AUTHORS, drop_fraction, is_within

SHARES = st.floats(0, 1)
ENDS = st.integers(1, 1_000_000)
jitted = jax.jit(drop_fraction, static_argnums=0)


def test_drop_fraction_by_hand():
    # 0.3 / 2 times 1 + cos of 0, 60, 90, 120 and 180 degrees: 2, 1.5, 1, 0.5 and 0; then nothing any more.
    steps = jnp.array([0, 20, 30, 40, 60, 61, 6000])
    got = drop_fraction(RigL(update_end_step=60), steps)
    np.testing.assert_allclose(got, [0.3, 0.225, 0.15, 0.075, 0, 0, 0], atol=1e-7)
    assert not got[4:].any()
    # Annealed over 60 steps, begun at 20 and stopped at 40.
    cut = RigL(update_start_step=20, update_end_step=40, anneal_steps=60)
    np.testing.assert_allclose(drop_fraction(cut, steps - 1)[:4], [0, 0, 0.15 * (1 + np.cos(np.pi * 29 / 60)),
                               0.15 * (1 + np.cos(np.pi * 39 / 60))], atol=1e-7)  # fmt: skip
    np.testing.assert_allclose(drop_fraction(cut, steps), [0, 0.225, 0.15, 0, 0, 0, 0], atol=1e-7)
    # Without end and annealing it is constant, without end alone it falls to 0.
    np.testing.assert_array_equal(drop_fraction(RigL(), steps), np.full(7, 0.3, np.float32))
    np.testing.assert_allclose(drop_fraction(RigL(anneal_steps=60), steps), got, atol=1e-7)


def test_the_authors_schedule_by_hand():
    # Half of the drop fraction is left where adapting stops; over all adaptations it sums to 91.8.
    method = DSB(**AUTHORS)
    steps = np.arange(0, 62_560, 100)
    fractions = np.asarray(drop_fraction(method, jnp.asarray(steps)), np.float64)
    assert fractions[374] == pytest.approx(0.15, abs=1e-3)
    assert fractions[375:].sum() == 0
    assert fractions[list(map(method.due, steps.tolist()))].sum() == pytest.approx(91.8, abs=0.1)


@settings(max_examples=30, deadline=None)
@given(share=SHARES, end=ENDS)
def test_drop_fraction_falls_to_exactly_zero(share, end):
    steps = jnp.array([0, end // 4, end // 2, end - 1, end, end + 1, 2 * end])
    fractions = np.asarray(drop_fraction(DSB(drop_fraction=share, update_end_step=end), steps))
    np.testing.assert_allclose(fractions[0], share, rtol=1e-6, atol=1e-30)  # float32 has no 1e-97
    assert (np.diff(fractions) <= 1e-7).all()
    assert (fractions[4:] == 0).all()


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 200))
def test_drop_fraction_is_the_same_traced(step):
    method = DSB(update_start_step=5, update_end_step=100, anneal_steps=150)
    traced = jitted(method, step)
    np.testing.assert_allclose(traced, drop_fraction(method, step), atol=1e-7)
    assert traced.dtype == jnp.float32


def test_due_by_hand():
    method = TopKAST(update_interval=10, update_end_step=30)
    assert [t for t in range(40) if method.due(t)] == [10, 20]  # not at 0, and at 30 it has ended
    method = TopKAST(update_interval=10, update_start_step=20)
    assert [t for t in range(45) if method.due(t)] == [20, 30, 40]


def test_the_longest_schedule_fits_a_step():
    method = RigL(update_start_step=2**31 - 2, update_end_step=2**31 - 1, anneal_steps=2**31 - 1)
    assert [bool(is_within(method, step)) for step in (2**31 - 3, 2**31 - 2, 2**31 - 1)] == [False, True, False]
    assert drop_fraction(method, 0) == 0
