"""The rules of a plan: what stays dense and why, that totals are met, what is refused."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.distributions import LayerShape, erk
from dsb_jax.plan import SparsityPlan, find_layers, make_plan

CONV = LayerShape(64, 288, (3, 3))
LAYERS = {
    ("stem",): LayerShape(32, 27, (3, 3)),
    ("stage_0", "conv_0"): CONV,
    ("stage_0", "skip"): LayerShape(64, 32, (1, 1)),
    ("stage_1", "conv_0"): LayerShape(128, 576, (3, 3)),
    ("stage_1", "narrow"): LayerShape(8, 576, (3, 3)),
    ("stage_1", "short"): LayerShape(64, 16),
    ("head",): LayerShape(10, 128),
}


def test_what_stays_dense_and_why():
    plan = make_plan(LAYERS, sparsity=0.9)
    assert isinstance(plan, SparsityPlan)
    assert tuple(layer.path for layer in plan.layers) == tuple(LAYERS)  # in the order of the model
    assert {path: plan[path].shape for path in LAYERS} == LAYERS
    reasons = {"/".join(layer.path): layer.reason for layer in plan.layers}
    assert reasons == {
        "stem": "kept dense by 'stem'",
        "stage_0/conv_0": "uniform",
        "stage_0/skip": "raised from uniform for the sake of every row group",
        "stage_1/conv_0": "uniform",
        "stage_1/narrow": "smaller than a 16x16 block",
        "stage_1/short": "holds 4 blocks at the most",
        "head": "kept dense by 'head'",
    }
    for layer in plan.layers:
        assert layer.eligible == ("uniform" in layer.reason) == (layer.num_blocks is not None)
        assert (layer in plan.sparse_layers) == layer.eligible
        if not layer.eligible:
            assert plan.num_active(layer) == layer.shape.size
    # Of 18432, 2048 and 73728 weights in blocks of 256 each keeps a tenth: 7.2, 0.8 and 28.8 blocks, 36.8 in all. But
    # the shortcut has four row groups, a block for each: the other two share 32.8, as 7.2 to 28.8 that is 6.6 and 26.2.
    assert [layer.num_blocks for layer in plan.sparse_layers] == [7, 4, 26]


def test_the_densities_as_they_are():
    plan = make_plan(LAYERS, sparsity=0.9, min_group_blocks=0)
    assert [layer.num_blocks for layer in plan.sparse_layers] == [7, 1, 29]
    assert plan["stage_0", "skip"].reason == "uniform"


def test_a_layer_that_takes_over_what_another_cannot_hold_is_not_called_raised():
    # Of 27 columns a block takes 16: at 0.2 the narrow layer holds 1024 of 1382 weights, and the other 1.4 blocks more.
    layers = {("narrow",): LayerShape(64, 27, (3, 3)), ("wide",): LayerShape(256, 256)}
    plan = make_plan(layers, sparsity=0.2, min_blocks=1, min_group_blocks=0)
    assert [(layer.num_blocks, layer.reason) for layer in plan.layers] == [(4, "uniform"), (206, "uniform")]


def test_the_limits_can_be_moved():
    plan = make_plan(LAYERS, sparsity=0.5, block_shape=(8, 4), keep_dense=(), min_blocks=1)
    assert len(plan.sparse_layers) == len(LAYERS)
    assert plan.block_shape == (8, 4)
    # 4 blocks is fewer than 5, and not fewer than 4.
    assert make_plan(LAYERS, sparsity=0.5, min_blocks=4)["stage_1", "short"].num_blocks == 4  # one a row group
    assert make_plan(LAYERS, sparsity=0.5, min_blocks=5)["stage_1", "short"].reason == "holds 4 blocks at the most"


@pytest.mark.parametrize(
    ("pattern", "dense"),
    [
        ("conv_0", {"stage_0/conv_0", "stage_1/conv_0"}),  # any part of the path
        ("stage_0", {"stage_0/conv_0", "stage_0/skip"}),
        ("stage_0/*", {"stage_0/conv_0", "stage_0/skip"}),  # the whole path
        ("*/conv_?", {"stage_0/conv_0", "stage_1/conv_0"}),
        ("stage_1/conv_0", {"stage_1/conv_0"}),
        ("conv", set()),  # a pattern, not a substring
        ("SKIP", set()),  # case counts
        ("s[kt][ie][pm]", {"stage_0/skip", "stem"}),
    ],
)
def test_keep_dense_patterns(pattern, dense):
    plan = make_plan(LAYERS, sparsity=0.8, keep_dense=(pattern,), min_blocks=1)
    kept = {"/".join(layer.path) for layer in plan.layers if layer.reason == f"kept dense by {pattern!r}"}
    assert kept == dense


@st.composite
def models(draw):
    kernels = st.sampled_from([(), (1, 1), (3, 3)])
    shapes = draw(st.lists(st.tuples(st.integers(16, 200), st.integers(16, 200), kernels), min_size=1, max_size=5))
    return {(f"layer_{i}",): LayerShape(out, math.prod(k) * c, k) for i, (out, c, k) in enumerate(shapes)}


@given(layers=models(), sparsity=st.floats(0.3, 0.8), distribution=st.sampled_from(["uniform", "erk"]))
def test_the_sparsity_is_met_within_one_block(layers, sparsity, distribution):
    # Blocks of 4x4 with out, in >= 16 hold any density up to 1 - 3/19 and down to one block in 16.
    plan = make_plan(layers, sparsity=sparsity, distribution=distribution, block_shape=(4, 4))
    size = sum(shape.size for shape in layers.values())
    active = sum(plan.num_active(layer) for layer in plan.layers)
    assert all(layer.eligible for layer in plan.layers)
    assert abs(active - (1 - sparsity) * size) <= 4 * 4
    assert plan.sparsity() == plan.sparsity(eligible_only=False) == pytest.approx(1 - active / size)


def test_sparsity_says_over_which_weights():
    plan = make_plan(LAYERS, sparsity=0.9)
    eligible = 18432 + 2048 + 73728
    dense = sum(shape.size for shape in LAYERS.values()) - eligible
    assert plan.sparsity() == 1 - 37 * 256 / eligible
    assert plan.sparsity(eligible_only=False) == 1 - (37 * 256 + dense) / (eligible + dense)


def test_erk_spares_small_layers_and_saturated_ones_are_dense():
    layers = {("wide",): LayerShape(512, 512), ("thin",): LayerShape(16, 256), ("conv",): CONV}
    plan = make_plan(layers, sparsity=0.8, distribution="erk")
    densities = erk(list(layers.values()), 0.8)
    assert densities[1] == 1  # what makes this case one of saturation
    thin = plan["thin",]
    assert (thin.num_blocks, thin.reason, thin.eligible) == (None, "density 1", True)
    assert plan["conv",].reason == plan["wide",].reason == "erk"
    total = sum(shape.size for shape in layers.values())
    assert abs(sum(plan.num_active(layer) for layer in plan.layers) - 0.2 * total) <= 256
    for path, density in zip(layers, densities, strict=True):
        assert abs(plan.num_active(plan[path]) - density * layers[path].size) <= 256


def test_without_sparsity_every_layer_is_dense():
    plan = make_plan(LAYERS, sparsity=0.0)
    assert plan.sparse_layers == ()
    assert plan.sparsity() == 0
    assert plan["stage_0", "conv_0"].reason == "density 1"


def test_a_plan_is_hashable_and_equal_to_its_twin():
    one, two = (make_plan(LAYERS, sparsity=0.9) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != make_plan(LAYERS, sparsity=0.8)


def test_errors_name_the_value_and_the_cure():
    with pytest.raises(ValueError, match="distribution='er' is unknown; choose one of uniform, erk"):
        make_plan(LAYERS, sparsity=0.9, distribution="er")
    for sparsity in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"sparsity={sparsity}"):
            make_plan(LAYERS, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"sparsity=0.9999 leaves 9 weights, but one 16x16 block .* at most 0\.9"):
        make_plan(LAYERS, sparsity=0.9999)
    with pytest.raises(
        ValueError, match=r"no layer can hold 512x16 blocks: stem kept dense by 'stem'; .* smaller .*Use a smaller"
    ):
        make_plan(LAYERS, sparsity=0.9, block_shape=(512, 16))
    with pytest.raises(ValueError, match="no layer can hold"):
        make_plan({}, sparsity=0.9)
    with pytest.raises(
        KeyError, match=r"no layer 'body' in the plan, which has stem, stage_0/conv_0, .* make the plan"
    ):
        make_plan(LAYERS, sparsity=0.9)["body",]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 2))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(8, (5,), name="one_d")(x.reshape(x.shape[0], -1, 8))
        x = nn.Dense(5)(nn.Embed(3, 8)(jnp.zeros(1, jnp.int32)) + x.mean(axis=1))
        return nn.DenseGeneral((2, 3), name="general")(x)


def test_find_layers_by_their_kernels():
    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((2, 6, 6, 4)))["params"]
    assert find_layers(params) == {
        ("Conv_0",): LayerShape(8, 24, (3, 2)),
        ("Dense_0",): LayerShape(5, 8),
    }
    assert find_layers({}) == {}
