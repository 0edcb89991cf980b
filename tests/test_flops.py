"""Operations by hand: one layer, one model, and what each method's adaptations add."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dsb_jax import flops
from dsb_jax.methods import DSB, SET, Static
from dsb_jax.ops.statistics import Gradient, OutputInputNorms, PanelGradientNorm
from dsb_jax.spec import conv_spec, linear_spec
from dsb_jax.training import models
from dsb_jax.training.build import build
from dsb_jax.training.config import Config

# A convolution of 16 x 32 in blocks of 4x8 of which 4 of 16 exist (density 1/4), and a dense classifier of 10 x 16.
DENSE = {("conv",): (conv_spec((2, 2), 8, 16), 25), ("head",): (linear_spec(16, 10), 1)}
CALLS = {**DENSE, ("conv",): (conv_spec((2, 2), 8, 16).with_blocks((4, 8), 4), 25)}
CONV, HEAD = 16 * 32 * 25, 10 * 16


def image(*shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def conv_and_head(**how):
    counted = flops.count(CALLS, **how)
    return counted[("conv",)], counted[("head",)]


def test_a_static_layer_by_hand():
    conv, head = conv_and_head()
    assert conv == (CONV, CONV / 4, CONV / 4, CONV / 4, 0)
    assert head == (HEAD, HEAD, HEAD, HEAD, 0)
    assert (conv.train_ratio, conv.inference_ratio) == (0.25, 0.25)
    assert (head.train_ratio, head.inference_ratio) == (1, 1)


@pytest.mark.parametrize(
    ("statistic", "of_conv", "of_head"),
    [(None, 0, 0), (OutputInputNorms(), 0.5, 2), (PanelGradientNorm(), 1.5, 2), (Gradient(), 1.5, 2)],
)
def test_what_an_adaptation_adds(statistic, of_conv, of_head):
    conv, head = conv_and_head(statistic=statistic, adapt_share=0.01)
    assert conv.adaptation == pytest.approx(0.01 * of_conv * CONV)
    assert head.adaptation == pytest.approx(0.01 * of_head * HEAD)
    assert conv.train_ratio == pytest.approx((0.75 + 0.01 * of_conv) / 3)
    assert conv.inference_ratio == 0.25


def test_more_weights_may_have_a_gradient_than_are_computed_with():
    spec = linear_spec(16, 10).with_single(64, num_computed=40)
    layer = flops.count({("layer",): (spec, 3)})[("layer",)]
    assert layer == (160 * 3, 40 * 3, 40 * 3, pytest.approx(64 * 3), 0)


def test_the_whole_model_by_hand():
    ratios = flops.compare(flops.count(CALLS), flops.count(DENSE))
    assert ratios["inference_ratio"] == pytest.approx((CONV / 4 + HEAD) / (CONV + HEAD))
    assert ratios["train_ratio"] == pytest.approx(ratios["inference_ratio"])


def test_the_share_of_adaptations():
    every_tenth = functools.partial(DSB, update_interval=10)
    share = functools.partial(flops.share_of_adaptations, total_steps=100, adapt_batch_size=32)
    assert share(every_tenth(update_end_step=50), batch_size=128) == pytest.approx(4 / 100 * 32 / 128)  # 10, 20, 30, 40
    assert share(every_tenth(update_end_step=75), batch_size=16) == pytest.approx(7 / 100)
    assert share(SET(update_interval=50, update_end_step=100), batch_size=32) == pytest.approx(1 / 100)
    assert share(Static(), batch_size=32) == share(None, batch_size=32) == 0


def test_an_impossible_share_is_refused():
    with pytest.raises(ValueError, match=r"adapt_share=1.5"):
        flops.count(CALLS, adapt_share=1.5)


@pytest.mark.parametrize("feature_major", [False, True])
def test_positions_of_a_model_in_either_order(feature_major):
    components = build(Config(implementation="xla" if feature_major else "dense"))
    assert components.model.layers.feature_major == feature_major
    positions = {path: n for path, (_, n) in flops.find_calls(components.model, image(8, 8, 1)).items()}
    names = ("stem", "conv_1", "conv_2", "conv_3", "head")
    assert positions == {(name,): n for name, n in zip(names, (64, 64, 16, 16, 1), strict=True)}


def test_a_layer_called_twice_counts_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="layer")
            return layer(layer(x.reshape(x.shape[0], -1)))

    assert flops.find_calls(Twice(), image(2, 2, 1)) == {("layer",): (linear_spec(4, 4), 2)}


def test_methods_against_dense():
    config = Config(implementation="dense")
    reference = models.create("convnet", num_classes=10)

    def ratios(method, **costs):
        components = build(dataclasses.replace(config, method=method))
        return flops.measure(components.model, reference, config.abstract_inputs(1), **costs)

    assert ratios("dense") == {"train_ratio": 1, "inference_ratio": 1}
    # By hand: conv_1 holds 7, conv_2 29 and conv_3 58 blocks of 256 weights.
    stem, head = 32 * 9 * 64, 10 * 128
    dense = stem + 64 * 288 * 64 + 128 * 576 * 16 + 128 * 1152 * 16 + head
    sparse = stem + 7 * 256 * 64 + 29 * 256 * 16 + 58 * 256 * 16 + head
    ssb = ratios("ssb")
    assert ssb["inference_ratio"] == pytest.approx(sparse / dense)
    assert ssb["train_ratio"] == pytest.approx(sparse / dense)
    adapting = ratios("dsb", statistic=PanelGradientNorm(), adapt_share=0.02)
    added = 0.02 * (2 * sparse + dense - stem - head) / (3 * dense)
    assert adapting["train_ratio"] == pytest.approx(ssb["train_ratio"] + added)
    assert adapting["inference_ratio"] == ssb["inference_ratio"]
    small = ratios("small_dense")
    assert small["train_ratio"] == pytest.approx(small["inference_ratio"])
    assert 0.05 < small["inference_ratio"] < 0.2  # about as many weights as at a density of 0.1, at other positions
