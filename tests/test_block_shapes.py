"""block_shape="auto": blocks by the size of a layer, explicit in the plan, and densities that are as wanted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.block_shapes import LEAST_GROUPS, auto_block_shape, shape_text
from dsb_jax.layout import check_sizes
from dsb_jax.plan import make_plan
from dsb_jax.rules import Rule
from tests.conftest import make_spec


@pytest.mark.parametrize(
    ("spec", "density", "shape"),
    [
        (make_spec(128, 1152, (3, 3)), 0.1, (16, 16)),  # 8 row groups of 16; 115.2 columns to spare
        (make_spec(64, 576, (3, 3)), 0.1, (8, 16)),  # 57.6: two blocks of 16 and more
        (make_spec(64, 288, (3, 3)), 0.1, (8, 8)),  # 28.8
        (make_spec(32, 288, (3, 3)), 0.05, (4, 4)),  # 14.4: three blocks of 4
        (make_spec(16, 144, (3, 3)), 0.1, (4, 4)),  # below 32 rows 4 is the least all the same
        (make_spec(128, 128), 0.1, (16, 4)),  # 12.8 columns, less than a block of 16
        (make_spec(32, 16, (1, 1)), 0.1, (4, 1)),  # 1.6 columns: two blocks there cannot be
        (make_spec(3, 40), 0.5, (3, 8)),  # no taller than the layer
    ],
)
def test_shapes_by_hand(spec, density, shape):
    assert auto_block_shape(spec, density) == shape


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1))
def test_a_block_always_fits(out, in_, density):
    rows, cols = auto_block_shape(make_spec(out, in_), density)
    check_sizes((out, in_), (rows, cols), 1)
    assert rows <= 4 or out >= LEAST_GROUPS * rows
    assert cols == 1 or 2 * cols <= density * in_


def test_the_plan_shows_them_and_rules_come_first():
    widths = {"a": (32, 64), "b": (128, 128), "c": (128, 128), "d": (64, 64), "e": (10, 640), "f": (32, 32)}
    layers = {(name,): make_spec(*width) for name, width in widths.items()}
    rules = (Rule("c", block_shape=(32, 2)), Rule("d", sparsity=0.5))
    plan = make_plan(layers, sparsity=0.9, block_shape="auto", rules=rules)
    assert {path[0]: spec.block_shape for path, spec in plan.sparse.items()} == {
        "a": (4, 2), "b": (16, 4), "c": (32, 2), "d": (8, 16),
    }  # fmt: skip
    assert plan["e",] == "smaller than a 16x16 block"  # a classifier
    assert plan["f",] == "holds 4 blocks at the most"
    assert "16x4" in str(plan)
    assert "32x2" in str(plan)


def test_uniform_is_uniform_in_narrow_layers():
    """At 16x16 every row group of 128 inputs needs a block of 16, an eighth of them; the wide layer pays for it."""
    layers = {("narrow",): make_spec(512, 128), ("wide",): make_spec(128, 512)}
    coarse, fine = (make_plan(layers, sparsity=0.9, block_shape=shape) for shape in ((16, 16), "auto"))
    assert coarse.sparse[("narrow",)].density == 0.125
    assert [spec.density for spec in fine.sparse.values()] == pytest.approx([0.1, 0.1], abs=0.002)
    assert abs(fine.sparsity() - 0.9) < 0.001


def test_what_is_no_shape():
    for shape in ("automatic", (16,), 16, (0, 4)):
        with pytest.raises(ValueError, match="block_shape="):
            make_plan({("a",): make_spec(64, 64)}, sparsity=0.9, block_shape=shape)
    assert shape_text("auto") == "auto"
    assert shape_text((32, 8)) == "32x8"
