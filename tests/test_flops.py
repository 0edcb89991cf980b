"""Operations by hand: one layer, one model, and what each method's adaptations add."""

import dataclasses

import pytest
from flax import linen as nn

from dsb_jax import flops
from dsb_jax.distributions import LayerShape
from dsb_jax.plan import LayerPlan, SparsityPlan
from dsb_jax.training import models
from dsb_jax.training.config import Config, build

# A convolution of 16 x 32 in blocks of 4x8 of which 4 of 16 exist (density 1/4), and a dense classifier of 10 x 16.
PLAN = SparsityPlan(
    (
        LayerPlan(("conv",), LayerShape(16, 32, (2, 2)), 4, "uniform", True),
        LayerPlan(("head",), LayerShape(10, 16), None, "kept dense", False),
    ),
    (4, 8),
)
POSITIONS = {("conv",): 25, ("head",): 1}
CONV, HEAD = 16 * 32 * 25, 10 * 16


def conv_and_head(**how):
    counted = flops.count_sparse(PLAN, POSITIONS, **how)
    return counted[("conv",)], counted[("head",)]


def test_a_static_layer_by_hand():
    conv, head = conv_and_head()
    assert conv == (CONV, CONV / 4, CONV / 4, CONV / 4, 0)
    assert head == (HEAD, HEAD, HEAD, HEAD, 0)
    assert (conv.train_ratio, conv.inference_ratio) == (0.25, 0.25)
    assert (head.train_ratio, head.inference_ratio) == (1, 1)


@pytest.mark.parametrize(
    ("statistic", "of_conv", "of_head"),
    [(None, 0, 0), ("norm", 2 * 0.25, 2), ("block_gradient", 2 * 0.25 + 1, 2), ("gradient", 2 * 0.25 + 1, 2)],
)
def test_what_an_adaptation_adds(statistic, of_conv, of_head):
    conv, head = conv_and_head(statistic=statistic, adapt_share=0.01)
    assert conv.adaptation == pytest.approx(0.01 * of_conv * CONV)
    assert head.adaptation == pytest.approx(0.01 * of_head * HEAD)
    assert conv.train_ratio == pytest.approx((0.75 + 0.01 * of_conv) / 3)
    assert conv.inference_ratio == 0.25


def test_topkast_has_gradients_of_more_weights():
    conv, head = conv_and_head(backward_factor=1.4)
    assert conv.weight_gradient == pytest.approx(0.35 * CONV)
    assert conv.train_ratio == pytest.approx((0.25 + 0.25 + 0.35) / 3)
    assert head.weight_gradient == HEAD
    assert conv_and_head(backward_factor=5)[0].weight_gradient == CONV  # never more than all


def test_the_whole_model_by_hand():
    dense = flops.count_dense({layer.path: layer.shape for layer in PLAN.layers}, POSITIONS)
    ratios = flops.compare(flops.count_sparse(PLAN, POSITIONS), dense)
    assert ratios["inference_ratio"] == pytest.approx((CONV / 4 + HEAD) / (CONV + HEAD))
    assert ratios["train_ratio"] == pytest.approx(ratios["inference_ratio"])


def test_the_share_of_adaptations():
    share = flops.share_of_adaptations(
        total_steps=100, update_interval=10, update_end_step=50, batch_size=128, adapt_batch_size=32
    )
    assert share == pytest.approx(4 / 100 * 32 / 128)  # at steps 10, 20, 30, 40
    share = flops.share_of_adaptations(
        total_steps=100, update_interval=10, update_end_step=75, batch_size=16, adapt_batch_size=32
    )
    assert share == pytest.approx(7 / 100)


@pytest.mark.parametrize("how", [{"adapt_share": 1.5}, {"backward_factor": 0.9}, {"statistic": "magic"}])
def test_impossible_costs_are_refused(how):
    with pytest.raises(ValueError, match=f"{next(iter(how))}="):
        flops.count_sparse(PLAN, POSITIONS, **how)


@pytest.mark.parametrize("feature_major", [False, True])
def test_positions_of_a_model_in_either_order(feature_major):
    components = build(Config(implementation="xla" if feature_major else "dense"))
    assert components.model.layers.feature_major == feature_major
    positions, _ = flops.find_positions(components.model, (8, 8, 1))
    names = ("stem", "conv_1", "conv_2", "conv_3", "head")
    assert positions == {(name,): n for name, n in zip(names, (64, 64, 16, 16, 1), strict=True)}


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="layer")
            return layer(layer(x.reshape(x.shape[0], -1)))

    assert flops.find_positions(Twice(), (2, 2, 1))[0] == {("layer",): 2}


def test_methods_against_dense():
    config = Config(implementation="dense")
    reference = models.create("convnet", num_classes=10)

    def ratios(method, **costs):
        components = build(dataclasses.replace(config, method=method))
        return flops.measure(components.model, components.plan, reference, config.image_shape, **costs)

    assert ratios("dense") == {"train_ratio": 1, "inference_ratio": 1}
    # By hand: conv_1 holds 7, conv_2 29 and conv_3 58 blocks of 256 weights.
    stem, head = 32 * 9 * 64, 10 * 128
    dense = stem + 64 * 288 * 64 + 128 * 576 * 16 + 128 * 1152 * 16 + head
    sparse = stem + 7 * 256 * 64 + 29 * 256 * 16 + 58 * 256 * 16 + head
    ssb = ratios("ssb")
    assert ssb["inference_ratio"] == pytest.approx(sparse / dense)
    assert ssb["train_ratio"] == pytest.approx(sparse / dense)
    adapting = ratios("dsb", statistic="block_gradient", adapt_share=0.02)
    added = 0.02 * (2 * sparse + dense - stem - head) / (3 * dense)
    assert adapting["train_ratio"] == pytest.approx(ssb["train_ratio"] + added)
    assert adapting["inference_ratio"] == ssb["inference_ratio"]
    small = ratios("small_dense")
    assert small["train_ratio"] == pytest.approx(small["inference_ratio"])
    assert 0.05 < small["inference_ratio"] < 0.2  # about as many weights as at a density of 0.1, at other positions
