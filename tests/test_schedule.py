"""Laws of the adaptation schedules, and one schedule worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.methods import schedule as schedules

ALPHAS = st.floats(0, 1)
ENDS = st.integers(1, 1_000_000)


def test_drop_fraction_by_hand():
    # alpha / 2 = 0.15 times 1 + cos of 0, 60, 90, 120 and 180 degrees: 2, 1.5, 1, 0.5 and 0; then nothing any more.
    steps = jnp.array([0, 20, 30, 40, 60, 61, 6000])
    got = schedules.drop_fraction(steps, alpha=0.3, update_end_step=60)
    np.testing.assert_allclose(got, [0.3, 0.225, 0.15, 0.075, 0, 0, 0], atol=1e-7)
    assert not got[4:].any()


@settings(max_examples=30, deadline=None)
@given(alpha=ALPHAS, end=ENDS)
def test_drop_fraction_falls_from_alpha_to_exactly_zero(alpha, end):
    steps = jnp.array([0, end // 4, end // 2, end - 1, end, end + 1, 2 * end])
    fractions = np.asarray(schedules.drop_fraction(steps, alpha=alpha, update_end_step=end))
    np.testing.assert_allclose(fractions[0], alpha, rtol=1e-6, atol=1e-30)  # float32 has no 1e-97
    assert (np.diff(fractions) <= 1e-7).all()
    assert (fractions[4:] == 0).all()


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 200), alpha=ALPHAS)
def test_drop_fraction_is_the_same_traced(step, alpha):
    traced = jax.jit(lambda t: schedules.drop_fraction(t, alpha=alpha, update_end_step=100))(step)
    np.testing.assert_allclose(traced, schedules.drop_fraction(step, alpha=alpha, update_end_step=100), atol=1e-7)
    assert traced.dtype == jnp.float32


def test_update_due_by_hand():
    due = [t for t in range(40) if schedules.update_due(t, update_interval=10, update_end_step=30)]
    assert due == [10, 20]  # not at 0, and at 30 the drop fraction is 0


@settings(max_examples=50)
@given(interval=st.integers(1, 50), end=st.integers(0, 400))
def test_update_due_every_interval_below_the_end(interval, end):
    due = [t for t in range(450) if schedules.update_due(t, update_interval=interval, update_end_step=end)]
    assert due == list(range(interval, end, interval))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"alpha": 1.5, "update_end_step": 10}, "alpha=1.5.*give 0 to 1"),
        ({"alpha": float("nan"), "update_end_step": 10}, "alpha=nan"),
        ({"alpha": 0.3, "update_end_step": 0}, "update_end_step=0.*at least 1"),
    ],
)
def test_drop_fraction_errors_name_the_value_and_the_cure(kwargs, words):
    with pytest.raises(ValueError, match=words):
        schedules.drop_fraction(0, **kwargs)


def test_update_due_rejects_an_interval_of_zero():
    with pytest.raises(ValueError, match=r"update_interval=0.*at least 1"):
        schedules.update_due(5, update_interval=0, update_end_step=10)
