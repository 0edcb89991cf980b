"""The rules of a plan: what stays dense and why, that totals are met, what is refused."""

import functools
import math
import pickle
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax import plan as planning
from dsb_jax.distributions import at_density, erk
from dsb_jax.plan import SparsityPlan
from dsb_jax.rules import Rule
from dsb_jax.spec import LayerSpec
from tests.conftest import make_spec

# Blocks of 16x16 where nothing else is said; those chosen by layer have tests of their own (test_block_shapes).
make_plan = functools.partial(planning.make_plan, block_shape=(16, 16))

CONV = make_spec(64, 288, (3, 3))
LAYERS = {
    ("stem",): make_spec(32, 27, (3, 3)),
    ("stage_0", "conv_0"): CONV,
    ("stage_0", "skip"): make_spec(64, 32, (1, 1)),
    ("stage_1", "conv_0"): make_spec(128, 576, (3, 3)),
    ("stage_1", "narrow"): make_spec(8, 576, (3, 3)),
    ("stage_1", "short"): make_spec(64, 16),
    ("head",): make_spec(10, 128),
}


ENDS = (Rule("stem", dense=True), Rule("head", dense=True))


def test_what_stays_dense_and_why():
    plan = make_plan(LAYERS, sparsity=0.9, rules=ENDS)
    assert isinstance(plan, SparsityPlan)
    assert tuple(plan) == tuple(LAYERS)  # in the order of the model
    assert len(plan) == len(LAYERS)
    assert plan.sizes == LAYERS
    assert {"/".join(path): plan.note(path) for path in plan} == {
        "stem": "kept dense by 'stem'",
        "stage_0/conv_0": "uniform",
        "stage_0/skip": "uniform, raised for the sake of every row group",
        "stage_1/conv_0": "uniform",
        "stage_1/narrow": "smaller than a 16x16 block",
        "stage_1/short": "holds 4 blocks at the most",
        "head": "kept dense by 'head'",
    }
    for path, planned in plan.items():
        if "uniform" in plan.note(path):
            assert planned == plan.sparse[path] == LAYERS[path].with_blocks((16, 16), planned.num_blocks)
        else:
            assert planned == plan.note(path)
            assert path not in plan.sparse
    # Of 18432, 2048 and 73728 weights in blocks of 256 each keeps a tenth: 7.2, 0.8 and 28.8 blocks, 36.8 in all. But
    # the shortcut has four row groups, a block for each: the other two share 32.8, as 7.2 to 28.8 that is 6.6 and 26.2.
    assert [spec.num_blocks for spec in plan.sparse.values()] == [7, 4, 26]


def test_the_densities_as_they_are():
    plan = make_plan(LAYERS, sparsity=0.9, rules=ENDS, min_group_blocks=0)
    assert [spec.num_blocks for spec in plan.sparse.values()] == [7, 1, 29]
    assert plan.note(("stage_0", "skip")) == "uniform"


def test_a_layer_that_takes_over_what_another_cannot_hold_is_not_called_raised():
    # Of 27 columns a block takes 16: at 0.2 the narrow layer holds 1024 of 1382 weights, and the other 1.4 blocks more.
    layers = {("narrow",): make_spec(64, 27, (3, 3)), ("wide",): make_spec(256, 256)}
    plan = make_plan(layers, sparsity=0.2, min_blocks=1, min_group_blocks=0)
    assert [(plan[path].num_blocks, plan.note(path)) for path in plan] == [(4, "uniform"), (206, "uniform")]


def test_the_limits_can_be_moved():
    plan = make_plan(LAYERS, sparsity=0.5, block_shape=(8, 4), min_blocks=1)
    assert len(plan.sparse) == len(LAYERS)
    assert {spec.block_shape for spec in plan.sparse.values()} == {(8, 4)}
    # 4 blocks is fewer than 5, and not fewer than 4.
    assert make_plan(LAYERS, sparsity=0.5, min_blocks=4)["stage_1", "short"].num_blocks == 4  # one a row group
    assert make_plan(LAYERS, sparsity=0.5, min_blocks=5)["stage_1", "short"] == "holds 4 blocks at the most"


def test_the_first_rule_that_matches_wins():
    rules = (
        Rule("stem|head", dense=True),
        Rule("stage_0/.*", sparsity=0.5, block_shape=(8, 4)),
        Rule(".*/conv_0", sparsity=0.875),
    )
    plan = make_plan(LAYERS, sparsity=0.75, rules=rules, min_blocks=1)
    assert {"/".join(path): (spec.block_shape, spec.density) for path, spec in plan.sparse.items()} == {
        "stage_0/conv_0": ((8, 4), 0.5),
        "stage_0/skip": ((8, 4), 0.5),
        "stage_1/conv_0": ((16, 16), 0.125),
        "stage_1/short": ((16, 16), 0.25),  # one block of four
    }
    assert plan["stem",] == plan["head",] == "kept dense by 'stem|head'"
    assert plan.note(("stage_0", "skip")) == "by the rule 'stage_0/.*'"
    assert plan.note(("stage_1", "short")) == "uniform"


def test_the_target_holds_over_the_layers_without_a_sparsity_of_their_own():
    layers = {(f"layer_{i}",): make_spec(128, 128) for i in range(4)}
    alone = make_plan(layers, sparsity=0.875)
    plan = make_plan(layers, sparsity=0.875, rules=[Rule("layer_0", sparsity=0.5)])
    assert [spec.density for spec in plan.sparse.values()] == [0.5, 0.125, 0.125, 0.125]
    assert [spec.density for spec in alone.sparse.values()] == [0.125] * 4
    shaped = make_plan(layers, sparsity=0.875, rules=[Rule("layer_0", block_shape=(8, 4))])  # but not a sparsity
    assert [spec.density for spec in shaped.sparse.values()] == [0.125] * 4
    assert make_plan(layers, sparsity=0.9, rules=[Rule("layer_0", sparsity=0.0)])["layer_0",] == "density 1"


def test_a_sparsity_of_its_own_means_what_density_means():
    """A 1x1 convolution of 32 channels at 0.9: less than a block for each of four row groups, so one each."""
    layers = {("skip",): make_spec(64, 32, (1, 1)), ("body",): make_spec(64, 576, (3, 3))}
    plan = make_plan(layers, sparsity=0.5, rules=[Rule("skip", sparsity=0.9)])
    assert plan["skip",] == at_density(layers["skip",], 0.1, (16, 16), 1)
    assert plan["skip",].num_blocks == 4
    assert plan.note(("skip",)) == "by the rule 'skip', raised for the sake of every row group"


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([Rule("conv_0", dense=True)], ValueError, "the rule 'conv_0' matches no layer; it must match the whole path"),
        ([Rule(".*", sparsity=0.5), Rule("head", dense=True)], ValueError, "'head' matches no layer that an earlier"),
        ([Rule("stage_1/narrow", sparsity=0.5)], ValueError, "no effect: stage_1/narrow stays dense .*smaller than"),
        ("stem", TypeError, "rules='stem' is no sequence of rules"),
        (Rule("stem", dense=True), TypeError, "is no sequence of rules"),
        (["stem"], TypeError, "is no sequence of rules"),
    ],
)
def test_rules_without_effect_are_refused(rules, error, message):
    with pytest.raises(error, match=message):
        make_plan(LAYERS, sparsity=0.5, rules=rules)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pattern": "(", "dense": True}, "is no regular expression"),
        ({"pattern": "a"}, "says nothing, or both"),
        ({"pattern": "a", "dense": True, "sparsity": 0.5}, "says nothing, or both"),
        ({"pattern": "a", "sparsity": 1.0}, "sparsity=1 leaves no weights"),
        ({"pattern": "a", "sparsity": -0.5}, "sparsity=-0.5"),
    ],
)
def test_wrong_rules(how, message):
    with pytest.raises(ValueError, match=message):
        Rule(**how)


@st.composite
def models(draw):
    kernels = st.sampled_from([(), (1, 1), (3, 3)])
    shapes = draw(st.lists(st.tuples(st.integers(16, 200), st.integers(16, 200), kernels), min_size=1, max_size=5))
    return {(f"layer_{i}",): make_spec(out, math.prod(k) * c, k) for i, (out, c, k) in enumerate(shapes)}


def active_weights(plan):
    return sum(spec.num_active for spec in (plan.sizes | plan.sparse).values())


@given(layers=models(), sparsity=st.floats(0.3, 0.8), distribution=st.sampled_from(["uniform", "erk"]))
def test_the_sparsity_is_met_within_one_block(layers, sparsity, distribution):
    # Blocks of 4x4 with out, in >= 16 hold any density up to 1 - 3/19 and down to one block in 16.
    plan = make_plan(layers, sparsity=sparsity, distribution=distribution, block_shape=(4, 4))
    size = sum(shape.size for shape in layers.values())
    active = active_weights(plan)
    assert abs(active - (1 - sparsity) * size) <= 4 * 4
    assert plan.sparsity() == plan.sparsity(eligible_only=False) == pytest.approx(1 - active / size)


def test_sparsity_says_over_which_weights():
    plan = make_plan(LAYERS, sparsity=0.9, rules=ENDS)
    eligible = 18432 + 2048 + 73728
    dense = sum(shape.size for shape in LAYERS.values()) - eligible
    assert plan.sparsity() == 1 - 37 * 256 / eligible
    assert plan.sparsity(eligible_only=False) == 1 - (37 * 256 + dense) / (eligible + dense)


def test_erk_spares_small_layers_and_saturated_ones_are_dense():
    layers = {("wide",): make_spec(512, 512), ("thin",): make_spec(16, 256), ("conv",): CONV}
    plan = make_plan(layers, sparsity=0.8, distribution="erk")
    densities = erk(list(layers.values()), 0.8)
    assert densities[1] == 1  # what makes this case one of saturation
    assert plan["thin",] == plan.note(("thin",)) == "density 1"
    assert plan.note(("conv",)) == plan.note(("wide",)) == "erk"
    total = sum(spec.size for spec in layers.values())
    assert abs(active_weights(plan) - 0.2 * total) <= 256
    assert plan.sparsity() == 1 - active_weights(plan) / total  # the one of density 1 is eligible
    for path, density in zip(layers, densities, strict=True):
        assert abs((plan.sizes | plan.sparse)[path].num_active - density * layers[path].size) <= 256


def test_without_sparsity_every_layer_is_dense():
    plan = make_plan(LAYERS, sparsity=0.0)
    assert plan.sparse == {}
    assert plan.sparsity() == 0
    assert plan["stage_0", "conv_0"] == "density 1"


def test_a_plan_is_hashable_and_equal_to_its_twin():
    one, two = (make_plan(LAYERS, sparsity=0.9) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != make_plan(LAYERS, sparsity=0.8)
    assert isinstance(one, Mapping)
    assert dict(one) == dict(two.items())
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert hash(copy) == hash(one)
    assert copy["stage_0", "skip"] == one["stage_0", "skip"]


def test_a_stack_counts_as_its_layers():
    scanned = LayerSpec((3, 64, 32), out_axes=(2,), in_axes=(1,), stack_axes=(0,))
    plan = make_plan({("scan",): scanned, ("body",): make_spec(64, 64)}, sparsity=0.75, block_shape=(8, 8))
    # 3 * 2048 and 4096 weights at a quarter: 8 blocks in each of the three, 16 in the other.
    assert [spec.num_blocks for spec in plan.sparse.values()] == [8, 16]
    assert plan["scan",].num_layers == 3
    assert plan.sparsity() == 0.75
    layers = {("scan",): scanned, ("head",): make_spec(64, 64)}
    dense = make_plan(layers, sparsity=0.75, block_shape=(8, 8), rules=ENDS[1:])
    assert dense.sparsity(eligible_only=False) == 1 - (3 * 512 + 4096) / (3 * 2048 + 4096)


def test_paths_are_never_joined_and_taken_apart():
    """A "/" in a name, and names that another path has joined, are layers of their own."""
    layers = {("a/b", "c"): make_spec(64, 64), ("a", "b", "c"): make_spec(64, 128), ("a", "b/c"): make_spec(32, 64)}
    plan = make_plan(layers, sparsity=0.5)
    assert plan.sizes == layers
    with pytest.raises(KeyError, match=r"no layer 'a%2Fb/d'"):
        plan["a/b", "d"]
    assert ("a", "b") not in plan


def test_errors_name_the_value_and_the_cure():
    with pytest.raises(ValueError, match="distribution='er' is unknown; choose one of uniform, erk"):
        make_plan(LAYERS, sparsity=0.9, distribution="er")
    for sparsity in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"sparsity={sparsity}"):
            make_plan(LAYERS, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"sparsity=0.9999 leaves 9 weights, but one 16x16 block .* at most 0\.9"):
        make_plan(LAYERS, sparsity=0.9999)
    with pytest.raises(
        ValueError,
        match=r"no layer can be sparse in 512x16 blocks: stem kept dense by 'stem'; .* Use other rules, a smaller",
    ):
        make_plan(LAYERS, sparsity=0.9, block_shape=(512, 16), rules=ENDS)
    with pytest.raises(ValueError, match="there are no layers to plan; give dsb_jax"):
        make_plan({}, sparsity=0.9)
    with pytest.raises(
        KeyError, match=r"no layer 'body' in the plan, which has stem, stage_0/conv_0, .* make the plan"
    ):
        make_plan(LAYERS, sparsity=0.9)["body",]
