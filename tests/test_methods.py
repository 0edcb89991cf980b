"""DSB: every criterion in both granularities keeps sizes, reports honestly, and adapts by hand as on paper."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.layout import BlockLayout, random_layout, real_rows, to_mask, validate
from dsb_jax.methods import DSB, GRANULARITIES, GROW, LayerState, schedule
from dsb_jax.ops.statistics import Gradient, OutputInputNorms, PanelGradientNorm
from dsb_jax.spec import linear_spec
from tests.conftest import make_layout

T_END = 100
# (out, in), (R, C), num_blocks
SIZES = {"whole": ((32, 24), (8, 4), 10), "ragged": ((29, 26), (8, 4), 9)}
# Compiling is what these tests cost: every criterion in both granularities, options and sizes spread over them.
METHOD = {
    "norm block": {},
    "norm panel_column": {},
    "norm_unaligned block": {"block_aware_drop": False},
    "norm_unaligned panel_column": {"min_group_blocks": 0},
    "block_gradient block": {},
    "block_gradient panel_column": {},
    "block_gradient panel_column, regrouped now and then": {"regroup_interval": 30},
    "gradient block": {"regroup_interval": 0},
    "gradient panel_column": {},
    "random block": {"min_group_blocks": 3},
    "random panel_column": {"min_group_blocks": 3},
}
RAGGED = ("norm block", "norm panel_column", "gradient block", "random block", "random panel_column")
CASES = [(name, "ragged" if name in RAGGED else "whole") for name in METHOD] + [("norm panel_column", "whole")]
law = settings(max_examples=6)
seeds = st.integers(0, 2**16)
jit_mask, jit_real = jax.jit(to_mask), jax.jit(real_rows)


@functools.cache
def method_of(name):
    grow, granularity = name.split(",")[0].split()
    return DSB(update_end_step=T_END, grow=grow, granularity=granularity, **METHOD[name])


@functools.cache
def compiled(method):
    """The update, compiled once for each size; state and report as numpy arrays."""
    jitted = jax.jit(method.update)
    return lambda key, step, *others: jax.device_get(jitted(key, np.int32(step), *others))


def update_of(name):
    return compiled(method_of(name))


@functools.cache
def draw(size):
    """seed -> a layout of that size."""
    shape, block_shape, num_blocks = SIZES[size]

    def layout(seed):
        return random_layout(jax.random.key(seed), shape, block_shape=block_shape, num_blocks=num_blocks)

    jitted = jax.jit(layout)
    return lambda seed: jax.device_get(jitted(seed))


def arguments(name, size, seed, counts=None):
    """Key, state and statistic as an adaptation would find them; phantom weights are zero.

    `counts`: the blocks in each group, if they are not to be spread evenly.
    """
    shape, block_shape, num_blocks = SIZES[size]
    rng = np.random.default_rng(seed)
    layout = draw(size)(seed)
    if counts is not None:
        uneven = make_layout(seed, shape, block_shape, counts)
        layout = jax.tree.map(lambda drawn, array: np.asarray(array, drawn.dtype), layout, uneven)
    blocks = rng.standard_normal((num_blocks, *block_shape)).astype(np.float32) * np.asarray(jit_real(layout))
    kind = method_of(name).statistic
    spec = linear_spec(shape[1], shape[0]).with_blocks(block_shape, num_blocks)
    zeros = None if kind is None else jax.eval_shape(lambda: kind.zeros(spec))
    statistic = jax.tree.map(lambda leaf: np.abs(rng.standard_normal(leaf.shape)).astype(np.float32), zeros)
    return jax.random.key(seed), LayerState(blocks, layout), statistic


def masks(*layouts):
    return [np.asarray(jit_mask(layout)) for layout in layouts]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_update_keeps_the_contract(name, size):
    """One test, because one compilation serves all of it."""
    update = update_of(name)

    @law
    @given(seed=seeds, step=st.sampled_from([0, 30, 99]))
    def keeps_every_size_and_reports_what_it_did(seed, step):
        key, *others = arguments(name, size, seed)
        new, report = update(key, step, *others)
        (_, layout, _), _ = others
        check_layouts(layout, new.layout)
        check_report(name, step, report, layout, new.layout)

    keeps_every_size_and_reports_what_it_did()
    check_determinism(name, *arguments(name, size, 1))

    key, state, statistic = arguments(name, size, 2)
    for value in (0.0, np.nan):  # a dead layer measures zero everywhere, a diverged one NaN
        useless = jax.tree.map(lambda leaf, value=value: np.full_like(leaf, value), statistic)
        new, report = update(key, 0, state, useless)
        check_layouts(state.layout, new.layout)
        assert 0 <= report.collateral <= 1


def check_layouts(layout, new):
    validate(new)
    assert jax.tree.structure(new) == jax.tree.structure(layout)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(new)] == [(a.shape, a.dtype) for a in jax.tree.leaves(layout)]
    before, after = masks(layout, new)
    assert after.sum() == before.sum() == layout.num_active


def check_report(name, step, report, layout, new):
    options, (before, after) = METHOD[name], masks(layout, new)
    assert all(value.shape == () for value in report)
    assert 0 <= report.accepted <= report.requested <= layout.num_active
    assert 0 <= report.collateral <= 1
    assert report.turnover == pytest.approx((after & ~before).sum() / layout.num_active)
    assert report.empty_groups == (np.diff(new.group_start) == 0).sum()
    assert report.accepted <= (after & ~before).sum()
    columns = "panel_column" in name and not ("regrouped" in name and step % options["regroup_interval"] == 0)
    marks = 0.15 * (1 + np.cos(np.pi * step / T_END)) * layout.num_active
    if columns or options.get("regroup_interval") == 0:
        np.testing.assert_array_equal(new.out_idx, layout.out_idx)
    if columns:
        assert report.collateral == 0
    elif not options.get("block_aware_drop", True):
        assert report.requested == pytest.approx(marks, abs=0.51)
    else:
        assert report.requested <= marks + 0.51
    if "min_group_blocks" in options:
        assert report.empty_groups == 0


def check_determinism(name, key, *others):
    one, same, other = (update_of(name)(k, 0, *others) for k in (key, key, jax.random.key(99)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    differs = np.not_equal(*masks(one[0].layout, other[0].layout)).any()
    assert differs == name.startswith("random")  # random growth follows its key


@pytest.mark.parametrize("size", SIZES)
@law
@given(seed=seeds)
def test_panel_columns_drop_the_weakest_and_keep_all_others(size, seed):
    """The kept columns by numpy: all but the share of smallest mean square, whatever happens to the rest."""
    key, (blocks, layout, _), statistic = arguments("norm panel_column", size, seed)
    (_, new, _), report = update_of("norm panel_column")(key, 0, LayerState(blocks, layout), statistic)
    real = np.asarray(jit_real(layout))
    strength = np.square(blocks).sum(axis=1) / real.sum(axis=1)
    dropped = np.zeros(strength.size, bool)
    dropped[np.argsort(strength.ravel())[: round(0.3 * strength.size)]] = True
    kept = real & ~dropped.reshape(strength.shape)[:, None, :]
    rows = np.repeat(layout.out_idx, np.diff(layout.group_start), axis=0)
    b, r, c = np.nonzero(kept)
    assert masks(new)[0][rows[b, r], layout.in_idx[b, c]].all()
    assert report.requested == layout.num_active - kept.sum()


def by_hand(blocks, in_idx, group_start, **sizes):
    arrays = (np.array(array, np.int32) for array in ([[0, 1], [2, 3]], in_idx, group_start))
    layout = BlockLayout(*arrays, (4, 4), **sizes)
    validate(layout)
    return LayerState(np.array(blocks, np.float32), layout)


@functools.cache
def adapt_by_hand(**options):
    """An update that drops half at step 0 and a quarter at step 5."""
    return compiled(DSB(update_end_step=10, drop_fraction=0.5, grow="block_gradient", **options))


def test_panel_columns_by_hand():
    # Two panels of two columns of strength 1, 4 and 2, 3. Half are dropped: column 0 of group 0, column 2 of group 1.
    state = by_hand(
        [[[1], [1]], [[4], [4]], [[2], [2]], [[3], [3]]], [[0], [1], [2], [3]], [0, 2, 4], block_shape=(2, 1)
    )
    # The best inactive columns are 0 of group 1 and 2 of group 0; the 9s belong to columns that are active already.
    statistic = np.array([[9, 9, 5, 1], [7, 3, 9, 0]], np.float32)
    new, report = adapt_by_hand()(jax.random.key(0), 0, state, statistic)
    assert masks(new.layout)[0].astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1]]
    assert new.blocks[:, 0, 0].tolist() == [4, 0, 3, 0]
    assert [float(value) for value in report[:5]] == [4, 4, 0.5, 0, 0]


def two_blocks():
    """State and statistic of the tests below: of block 0, group 0, all weights are smaller than of block 1."""
    state = by_hand([[[0.1, 0.2], [0.3, 0.4]], [[5, 6], [7, 8]]], [[0, 1], [2, 3]], [0, 1, 2],
                             block_shape=(2, 2))  # fmt: skip
    return state, np.array([[9, 9, 3, 2], [1, 0, 9, 9]], np.float32)


def test_a_block_moves_by_hand():
    # k = 4 of 8: all of block 0, the smaller one. Group 0 grows columns 2 and 3 at the mean of the kept, 6.5.
    new, report = adapt_by_hand(granularity="block")(jax.random.key(0), 0, *two_blocks())
    assert masks(new.layout)[0].astype(int).tolist() == [[0, 0, 1, 1]] * 4
    assert [float(value) for value in report[:5]] == [4, 4, 0.5, 0, 0]


def test_collateral_by_hand():
    # k = 2: row 0 of block 0 goes; .3 and .4 are kept. Group 0 grows its column 2, worth 2 * 26.7 / 6 = 8.9, and has
    # room for one column more: .4 stays, .3 at (1, 0) is lost, one of six kept weights. (0, 1) comes along with .4.
    new, report = adapt_by_hand(granularity="block")(jax.random.key(0), 5, *two_blocks())
    assert masks(new.layout)[0].astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert [float(value) for value in report[:5]] == pytest.approx([2, 2, 0.25, 1 / 6, 0])


def test_meek_growth_displaces_nothing_that_is_worth_more_by_hand():
    # As above, but a grown position is scored at 0.03 of the mean: column 2 is worth 0.27, less than .3 and .4.
    state, statistic = two_blocks()
    meek = adapt_by_hand(granularity="block", growth_score=0.03, regroup_interval=0)  # the rows would stay anyway
    new, report = meek(jax.random.key(0), 5, state, statistic)
    np.testing.assert_array_equal(*masks(state.layout, new.layout))
    assert [float(value) for value in report[:5]] == [2, 0, 0, 0, 0]


def test_regrouping_now_and_then():
    """At a multiple of the interval the adaptation is one of whole blocks, at any other one of panel columns."""
    key, *others = arguments("block_gradient block", "whole", 3)
    mixed = update_of("block_gradient panel_column, regrouped now and then")
    for step, granularity in ((30, "block"), (40, "panel_column"), (60, "block")):
        alone = update_of(f"block_gradient {granularity}")
        for a, b in zip(
            jax.tree.leaves(mixed(key, step, *others)), jax.tree.leaves(alone(key, step, *others)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_empty_groups_are_counted_or_fed():
    key, *others = arguments("norm panel_column", "whole", 0, counts=(6, 4, 0, 0))
    for name, step, count in (
        ("norm_unaligned panel_column", 99, 2),  # of which the paper's rule is tested
        ("norm panel_column", 99, 0),  # where no column is dropped any more
        ("norm panel_column", T_END, 2),  # and where nothing changes
    ):
        _, report = update_of(name)(key, step, *others)
        assert report.empty_groups == count


def test_without_the_grouping_of_before_more_is_grown():
    """The paper's way: rows change groups though that costs kept weights."""
    size, shares = "whole", {}
    for keep in (True, False):
        method = DSB(granularity="block", grow="gradient", min_group_blocks=0, keep_grouping=keep)
        reports = []
        for seed in range(16):
            key, state, _ = arguments("gradient block", size, seed)
            rng = np.random.default_rng(seed)
            gradient = rng.standard_normal((32, 2)) @ rng.standard_normal((2, 24))
            new, report = compiled(method)(key, 0, state, gradient.astype(np.float32))
            check_layouts(state.layout, new.layout)
            reports.append(report.accepted / report.requested)
        shares[keep] = np.array(reports)
    assert (shares[False] >= shares[True]).all()
    assert shares[False].mean() > 1.05 * shares[True].mean() > 0


def test_what_each_criterion_must_know():
    assert {grow: DSB(grow=grow).statistic for grow in GROW} == {
        "norm": OutputInputNorms(),
        "norm_unaligned": OutputInputNorms(),
        "block_gradient": PanelGradientNorm(),
        "gradient": Gradient(),
        "random": None,
    }


def test_the_paper_as_a_preset():
    method = DSB.paper()
    assert (method.granularity, method.min_group_blocks, method.keep_grouping) == ("block", 0, False)
    assert method.statistic == OutputInputNorms()
    assert float(schedule.drop_fraction(method, 37_499)) == pytest.approx(0.15, rel=1e-3)
    assert float(schedule.drop_fraction(method, 37_500)) == 0
    assert DSB.paper(update_end_step=10, grow="gradient") == DSB(
        **{**schedule.AUTHORS, "update_end_step": 10}, granularity="block", grow="gradient", min_group_blocks=0,
        keep_grouping=False, columns="random",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grow": ["norm"]}, "grow=.* is unknown"),
        ({"grow": "rigl"}, "grow='rigl' is unknown; choose one of " + ", ".join(GROW)),
        ({"granularity": "row"}, "granularity='row' is unknown; choose one of block, panel_column"),
        ({"drop_fraction": -0.1}, r"drop_fraction=-0.1 is not in \[0, 1\]; the paper uses 0.3"),
        ({"drop_fraction": 1.5}, r"drop_fraction=1.5 is not in \[0, 1\]"),
        ({"min_group_blocks": -1}, "min_group_blocks=-1 is no whole number of at least 0"),
        ({"block_aware_drop": False}, "block_aware_drop=False has no effect on granularity=panel_column; add granul"),
        ({"growth_score": 0.5}, "growth_score=0.5 has no effect on granularity=panel_column"),
        ({"growth_score": 0.0}, r"growth_score=0.0 is not in \[1e-06, 1e\+06\]; 1 is the paper's"),
        ({"growth_score": float("inf")}, "growth_score=inf is not in"),
        ({"regroup_interval": -5}, "regroup_interval=-5 is no whole number of at least 0"),
        ({"min_group_blocks": 1.0}, r"min_group_blocks=1\.0 is no whole number"),
        ({"block_aware_drop": 1}, "block_aware_drop=1 is neither True nor False"),
        ({"keep_grouping": None}, "keep_grouping=None is neither True nor False"),
        (
            {"keep_grouping": False},
            "keep_grouping=False has no effect with granularity=panel_column, regroup_interval=None",
        ),
        ({"keep_grouping": False, "granularity": "block", "regroup_interval": 0}, "keep_grouping=False has no effect"),
    ],
)
def test_invalid_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DSB(update_end_step=10, **options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_minimum_is_met_as_far_as_there_are_blocks(granularity):
    name = f"random {granularity}"
    assert METHOD[name] == {"min_group_blocks": 3}
    key, *others = arguments(name, "ragged", 0, counts=(5, 2, 0, 2))
    new, _ = update_of(name)(key, 0, *others)
    assert np.diff(new.layout.group_start).min() == 2  # 9 blocks over 4 row groups


@pytest.mark.parametrize(
    "options",
    [
        {"regroup_interval": 30, "keep_grouping": False},
        {"regroup_interval": 30, "growth_score": 0.5},
        {"granularity": "block", "block_aware_drop": False, "regroup_interval": 0},
        {"drop_fraction": 0, "min_group_blocks": 0},
    ],
)
def test_valid_settings(options):
    assert DSB(**options) == DSB(**options)
