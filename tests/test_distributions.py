"""Laws of densities and of their rounding to blocks: the total is kept, whatever the shapes."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsb_jax import distributions, layout
from dsb_jax.spec import LayerSpec
from tests.conftest import make_spec

SPARSITIES = st.floats(0, 1)
BLOCKS = st.sampled_from([(16, 16), (32, 8), (64, 4), (8, 1), (5, 3)])


def to_blocks(specs, densities, block_shape, **options):
    """All layers in blocks of one shape."""
    return distributions.to_blocks(specs, densities, [block_shape] * len(specs), **options)


@st.composite
def layer_shapes(draw, min_out=1, min_c_in=1):
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (3,)]))
    c_in = draw(st.integers(min_c_in, 300))
    return make_spec(draw(st.integers(min_out, 300)), math.prod(kernel) * c_in, kernel)


def models(**bounds):
    return st.lists(layer_shapes(**bounds), min_size=1, max_size=6)


def total_weights(shapes):
    return sum(shape.out * shape.in_ for shape in shapes)


def active_weights(shapes, num_blocks, block_shape):
    return [layout.num_active(s.shape, block_shape, n) for s, n in zip(shapes, num_blocks, strict=True)]


def test_erk_by_hand():
    # Scores c_in + out + kernel: 3x3 convolution of 16 to 32 channels 16 + 32 + 6 = 54, linear 64 to 10 74, 8 to 2 10.
    # N = 4608 + 640 + 16 = 5264; at sparsity 0.5 2632 weights are wanted. eps = 2632 / 138 = 19.07, so the linear
    # layers would have 1411 of 640 and 190.7 of 16 weights: both are dense. 2632 - 656 = 1976 of 4608 remain.
    shapes = [make_spec(32, 144, (3, 3)), make_spec(10, 64), make_spec(2, 8)]
    assert distributions.erk(shapes, 0.5) == pytest.approx((1976 / 4608, 1.0, 1.0))
    # At 0.9 526.4 are wanted, eps = 3.814: 38.1 of 16 saturates, then eps = 510.4 / 128 = 3.9875.
    expected = (3.9875 * 54 / 4608, 3.9875 * 74 / 640, 1.0)
    assert distributions.erk(shapes, 0.9) == pytest.approx(expected)


# WRN-10-2's layers in RigL's order: kernel, c_in, out.
_WRN_10_2 = (
    *(((3, 3), 3, 16), ((3, 3), 16, 32), ((3, 3), 32, 32), ((1, 1), 16, 32), ((3, 3), 32, 64), ((3, 3), 64, 64)),
    *(((1, 1), 32, 64), ((3, 3), 64, 128), ((3, 3), 128, 128), ((1, 1), 64, 128), ((), 128, 10)),
)


@pytest.mark.parametrize(
    ("sparsity", "theirs"),
    [
        (0.8, (1, 0.687333, 0.445494, 1, 0.324574, 0.213201, 1, 0.157514, 0.104214, 1, 1)),
        (0.9, (1, 0.300596, 0.194831, 1, 0.141948, 0.093241, 1, 0.068887, 0.045577, 0.607455, 1)),
        (0.95, (0.679531, 0.137605, 0.089189, 1, 0.06498, 0.042683, 0.561888, 0.031535, 0.020864, 0.278077, 1)),
    ],
)
def test_erk_is_that_of_rigls_own_code(sparsity, theirs):
    # What `get_sparsities_erdos_renyi` of google-research/rigl (d39fc7d) returned for these shapes. It rounds the zeros
    # of each layer down, which leaves it up to one weight a layer more: eleven of some 15,000 here.
    specs = [make_spec(out, math.prod(kernel) * c_in, kernel) for kernel, c_in, out in _WRN_10_2]
    assert distributions.erk(specs, sparsity) == pytest.approx(theirs, rel=5e-4)


@given(shapes=models(), sparsity=SPARSITIES)
def test_erk_keeps_the_total_and_the_proportions(shapes, sparsity):
    densities = distributions.erk(shapes, sparsity)
    assert all(0 <= d <= 1 for d in densities)
    held = sum(d * s.out * s.in_ for d, s in zip(densities, shapes, strict=True))
    assert held == pytest.approx((1 - sparsity) * total_weights(shapes), rel=1e-9)
    # eps = density / rule is one number for all layers below 1, and at least as large as a dense layer's own.
    eps = [
        d * s.c_in * s.out * math.prod(s.kernel_size) / (s.c_in + s.out + sum(s.kernel_size))
        for d, s in zip(densities, shapes, strict=True)
    ]
    free = [e for e, d in zip(eps, densities, strict=True) if d < 1]
    if free:
        np.testing.assert_allclose(free, free[0], rtol=1e-9)
        assert all(e <= free[0] * (1 + 1e-9) for e in eps)


@given(shapes=models(), sparsity=SPARSITIES)
def test_uniform_is_one_density(shapes, sparsity):
    assert distributions.uniform(shapes, sparsity) == (1 - sparsity,) * len(shapes)


def test_to_blocks_by_hand():
    # The example of the module docstring: 1.6 and 3.2 blocks are wanted, the missing one goes to the remainder 0.6.
    shapes = [make_spec(64, 64), make_spec(128, 64)]
    assert to_blocks(shapes, (0.1, 0.1), (16, 16)) == (2, 3)


def test_to_blocks_counts_ragged_rows_by_hand():
    # out = 6 with R = 4: two groups, the last with 2 real rows. in = 8, C = 2: up to 8 blocks, of 8 weights each but
    # for the blocks of the last group, round(num_blocks / 2), which hold 4. Half of 48 weights are 24: 4 blocks.
    shape = make_spec(6, 8)
    assert layout.num_active((6, 8), (4, 2), 4) == 4 * 8 - 2 * 4 == 24
    assert to_blocks([shape], (0.5,), (4, 2)) == (4,)


@given(
    shapes=models(min_out=64, min_c_in=16),
    block_shape=BLOCKS,
    sparsity=SPARSITIES,
    rule=st.sampled_from([distributions.uniform, distributions.erk]),
)
def test_to_blocks_keeps_the_total_and_every_layer(shapes, block_shape, sparsity, rule):
    densities = rule(shapes, sparsity)
    wanted = [d * s.out * s.in_ for d, s in zip(densities, shapes, strict=True)]
    most = [layout.max_blocks(s.shape, block_shape) for s in shapes]
    least_weights = active_weights(shapes, [1] * len(shapes), block_shape)
    most_weights = active_weights(shapes, most, block_shape)
    assume(sum(least_weights) <= sum(wanted) <= sum(most_weights))
    num_blocks = to_blocks(shapes, densities, block_shape)
    held = active_weights(shapes, num_blocks, block_shape)
    block = math.prod(block_shape)
    assert all(1 <= n <= m for n, m in zip(num_blocks, most, strict=True))
    assert abs(sum(held) - sum(wanted)) <= block / 2 + 1e-3
    if all(lo <= w <= hi for lo, w, hi in zip(least_weights, wanted, most_weights, strict=True)):
        assert all(abs(h - w) <= block + 1e-3 for h, w in zip(held, wanted, strict=True))


@given(shapes=models(min_out=64, min_c_in=16), block_shape=BLOCKS, seed=st.integers(0, 2**32 - 1))
def test_to_blocks_returns_what_a_layout_of_that_density_holds(shapes, block_shape, seed):
    """Densities that are whole blocks come back as those blocks."""
    rng = np.random.default_rng(seed)
    blocks = tuple(int(rng.integers(1, layout.max_blocks(s.shape, block_shape) + 1)) for s in shapes)
    held = active_weights(shapes, blocks, block_shape)
    densities = [h / (s.out * s.in_) for h, s in zip(held, shapes, strict=True)]
    assert to_blocks(shapes, densities, block_shape) == blocks


def test_to_blocks_feeds_every_row_group_by_hand():
    # A shortcut of 32 to 64 channels has four row groups, a tenth of it is 0.8 blocks. The other layer wants 28.8; both
    # together 29.6, so that 25.6 are left beside the four.
    shapes = [make_spec(64, 32, (1, 1)), make_spec(128, 576, (3, 3))]
    assert to_blocks(shapes, (0.1, 0.1), (16, 16)) == (1, 29)
    assert to_blocks(shapes, (0.1, 0.1), (16, 16), min_group_blocks=1) == (4, 26)
    # With two for each group the 8 of the first leave 21.6 to the second.
    assert to_blocks(shapes, (0.1, 0.1), (16, 16), min_group_blocks=2) == (8, 22)
    # Three for each of the 8 groups of the second and the two that fit in the first are 32: it stays at two.
    assert to_blocks(shapes, (0.1, 0.1), (16, 16), min_group_blocks=3) == (8, 22)
    # 16 columns hold one block for each group, not five; and of 9.6 blocks not each of the 12 groups can have one.
    assert to_blocks([make_spec(64, 16)], (1.0,), (16, 16), min_group_blocks=5) == (4,)
    shapes = [make_spec(64, 32, (1, 1)), make_spec(128, 32)]
    assert to_blocks(shapes, (0.2, 0.2), (16, 16), min_group_blocks=1) == (2, 3)


@given(
    shapes=models(min_out=64, min_c_in=16),
    block_shape=BLOCKS,
    sparsity=st.floats(0.5, 1),
    rule=st.sampled_from([distributions.uniform, distributions.erk]),
    least=st.integers(0, 3),
)
def test_to_blocks_feeds_every_row_group_if_it_can(shapes, block_shape, sparsity, rule, least):
    densities = rule(shapes, sparsity)
    groups = [layout.count_groups(s.out, block_shape[0]) for s in shapes]
    fed = [max(1, min(least, s.in_ // block_shape[1]) * n) for s, n in zip(shapes, groups, strict=True)]
    wanted = sum(d * s.size for d, s in zip(densities, shapes, strict=True))
    most = [layout.max_blocks(s.shape, block_shape) for s in shapes]
    assume(sum(active_weights(shapes, fed, block_shape)) <= wanted <= sum(active_weights(shapes, most, block_shape)))
    num_blocks = to_blocks(shapes, densities, block_shape, min_group_blocks=least)
    assert all(n >= f for n, f in zip(num_blocks, fed, strict=True))
    assert abs(sum(active_weights(shapes, num_blocks, block_shape)) - wanted) <= math.prod(block_shape) / 2 + 1e-3


def test_to_blocks_shares_what_a_layer_cannot_hold():
    # in = 27 holds one block of 16 columns, 16/27 of the dense 27 * 64 weights; the other layer takes the rest.
    shapes = [make_spec(64, 27, (3, 3)), make_spec(256, 256)]
    wanted = 64 * 27 + 0.1 * 256 * 256
    num_blocks = to_blocks(shapes, (1.0, 0.1), (16, 16))
    assert num_blocks[0] == layout.max_blocks((64, 27), (16, 16)) == 4
    assert abs(sum(num_blocks) * 256 - wanted) <= 128


@pytest.mark.parametrize("rule", [distributions.uniform, distributions.erk])
@pytest.mark.parametrize("sparsity", [-0.1, 1.01, float("nan")])
def test_impossible_sparsities_are_named(rule, sparsity):
    with pytest.raises(ValueError, match=re.escape(f"sparsity={sparsity}") + ".*give 0 to 1"):
        rule([make_spec(8, 8)], sparsity)


@pytest.mark.parametrize(
    ("shapes", "sparsity", "quoted"),
    [
        ([make_spec(64, 64), make_spec(128, 64)], 0.99, r"at most (\d\.\d+)"),
        ([make_spec(64, 27, (3, 3)), make_spec(64, 64)], 0.0, r"at least (\d\.\d+)"),
    ],
)
def test_the_limit_quoted_in_the_error_works(shapes, sparsity, quoted):
    with pytest.raises(ValueError, match=f"sparsity={sparsity:g}") as error:
        to_blocks(shapes, distributions.uniform(shapes, sparsity), (16, 16))
    (limit,) = map(float, re.findall(quoted, str(error.value)))
    to_blocks(shapes, distributions.uniform(shapes, limit), (16, 16))


def test_other_errors_name_the_value():
    shape = make_spec(64, 64)
    with pytest.raises(ValueError, match="block_shape=128x4 is larger"):
        to_blocks([shape], (0.5,), (128, 4))
    with pytest.raises(ValueError, match=r"density=1.5"):
        to_blocks([shape], (1.5,), (16, 16))
    with pytest.raises(ValueError, match="min_group_blocks=-1 is negative"):
        to_blocks([shape], (0.5,), (16, 16), min_group_blocks=-1)
    with pytest.raises(ValueError, match="2 densities for 1 layers"):
        to_blocks([shape], (0.5, 0.5), (16, 16))


def stacked(spec, count):
    """`count` equal layers under one scan, along axis 0."""
    axes = {name: tuple(axis + 1 for axis in getattr(spec, name)) for name in ("out_axes", "in_axes", "spatial_axes")}
    return LayerSpec((count, *spec.kernel_shape), stack_axes=(0,), **axes)


@given(
    specs=models(min_out=64, min_c_in=16),
    counts=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    block_shape=BLOCKS,
    sparsity=st.floats(0.3, 0.9),
    rule=st.sampled_from([distributions.uniform, distributions.erk]),
)
def test_a_stack_counts_as_its_layers(specs, counts, block_shape, sparsity, rule):
    stacks = [stacked(spec, count) for spec, count in zip(specs, counts, strict=False)]
    apart = [spec for spec, count in zip(specs, counts, strict=False) for _ in range(count)]
    densities, of_each = rule(stacks, sparsity), rule(apart, sparsity)
    repeated = [d for d, count in zip(densities, counts, strict=False) for _ in range(count)]
    assert repeated == pytest.approx(of_each, rel=1e-9)
    wanted = sum(d * spec.size for d, spec in zip(of_each, apart, strict=True))
    most = active_weights(apart, [layout.max_blocks(s.shape, block_shape) for s in apart], block_shape)
    assume(sum(active_weights(apart, [1] * len(apart), block_shape)) <= wanted <= sum(most))
    num_blocks = to_blocks(stacks, densities, block_shape)
    held = active_weights(stacks, num_blocks, block_shape)
    total = sum(h * count for h, count in zip(held, counts, strict=False))
    assert abs(total - wanted) <= math.prod(block_shape) / 2 * max(counts[: len(specs)]) + 1e-3


def test_a_stack_by_hand():
    # Each of three layers wants 1.6 blocks, the other one 3.2: 8 in all. Whole ones, down, are 3 * 1 + 3: two are
    # missing. The largest remainder is the stack's, whose three more are nearer than none.
    stack, single = stacked(make_spec(64, 64), 3), make_spec(128, 64)
    assert stack.num_layers * stack.size == 3 * 4096
    assert to_blocks([stack], (0.1,), (16, 16)) == (2,)
    assert to_blocks([stack, single], (0.1, 0.1), (16, 16)) == (2, 3)
    assert to_blocks([stack, stack], (0.03, 0.1), (16, 16), min_group_blocks=1) == (1, 1)
    with pytest.raises(
        ValueError, match=r"one 64x64 block in each of 3 layers takes 12288; use a sparsity of at most 0"
    ):
        to_blocks([stack], (0.2,), (64, 64))


def test_a_model_without_sparse_layers_has_none():
    assert distributions.uniform([], 0.9) == distributions.erk([], 0.9) == ()
    assert to_blocks([], (), (16, 16)) == ()
