"""Einsum equations as matrix products, against `jnp.einsum`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.equations import Equation

LETTERS = "abcdefgh"


@st.composite
def equations(draw):
    """A product: letters that are kept, summed and made, each operand and the result in any order."""
    kept, summed, made = (draw(st.integers(low, 2)) for low in (0, 1, 1))
    names = iter(LETTERS)
    of_kind = ["".join(next(names) for _ in range(count)) for count in (kept, summed, made)]
    shuffled = [
        draw(st.permutations(list(a + b))) for a, b in ((0, 1), (1, 2), (0, 2)) for a, b in [(of_kind[a], of_kind[b])]
    ]
    inputs, kernel, result = map("".join, shuffled)
    if draw(st.booleans()):  # an ellipsis in front of what is kept, for 0 to 2 axes
        inputs, result = "..." + inputs, "..." + result
    return f"{inputs},{kernel}->{result}", draw(st.integers(0, 2)) if "..." in inputs else 0


@given(equations(), st.integers(0, 99))
def test_it_computes_what_einsum_does(drawn, seed):
    text, extra = drawn
    equation = Equation.parse(text)
    assert equation.is_product
    size = {letter: 2 + i for i, letter in enumerate(LETTERS)}
    rng = np.random.default_rng(seed)
    inputs, kernel = text.replace("...", "").split("->")[0].split(",")
    x = jnp.asarray(rng.normal(size=(*(3, 4)[:extra], *(size[letter] for letter in inputs))), jnp.float32)
    w = jnp.asarray(rng.normal(size=[size[letter] for letter in kernel]), jnp.float32)
    spec = equation.spec(w.shape)
    sizes = tuple(size[letter] for letter in equation.features)
    y = equation.product(x, sizes, lambda columns: columns @ spec.to_matrix(w).T)
    wanted = jnp.einsum(text, x, w)
    assert y.shape == wanted.shape
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5)


def test_a_projection_into_heads_by_hand():
    spec = Equation.parse("b t d, dhk -> bthk").spec((16, 2, 8))
    assert (spec.in_axes, spec.out_axes, spec.shape) == ((0,), (1, 2), (16, 16))
    spec = Equation.parse("bthk,hkd->btd").spec((2, 8, 16))
    assert (spec.in_axes, spec.out_axes, spec.shape) == ((0, 1), (2,), (16, 16))
    spec = Equation.parse("bd,dhk->bkh").spec((4, 2, 3))  # rows in the order of the result
    assert (spec.out_axes, spec.shape) == ((2, 1), (6, 4))


@pytest.mark.parametrize(
    "text",
    [
        "bthd,hdk->bthk",  # a matrix for each head
        "btd,dd->bt",  # a diagonal
        "btd,dk->bk",  # summed over the inputs' own axis
        "btd,dkj->btk",  # and over the kernel's
        "btd,k->btdk",  # nothing is summed: an outer product
        "btd,d->bt",  # no outputs of its own
        "btd,...dk->btk",
        "...d,dk->k",
    ],
)
def test_what_is_no_product_with_one_matrix(text):
    assert not Equation.parse(text).is_product


def test_rows_and_columns_are_those_of_the_matrix():
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 2, 2)
    y = Equation.parse("bd,dhk->bkh").product(
        x, (2, 2), lambda c: c @ jax.numpy.array([[0, 4, 8], [2, 6, 10], [1, 5, 9], [3, 7, 11.0]]).T
    )
    np.testing.assert_array_equal(y, jnp.einsum("bd,dhk->bkh", x, w))
