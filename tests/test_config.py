"""Configs: JSON without loss, invalid values refused, and objects that depend on nothing else."""

import dataclasses
import json

import pytest

from dsb_jax.methods import DSB, SET, Static, schedule
from dsb_jax.ops import tuning
from dsb_jax.training.build import build, decide_feature_major, dense_rules, make_method
from dsb_jax.training.config import METHODS, PROTOCOLS, Config, check_config


def test_json_and_back():
    config = Config(method="set", block_shape=(32, 8), keep_dense=(), anneal_fraction=1.2, feature_major=False)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    younger = ("anneal_fraction", "keep_grouping", "feature_major", "backward_factor")
    of_before = {name: value for name, value in Config().to_json().items() if name not in younger}
    assert Config.from_json(of_before) == Config()
    for odd in ({**of_before, "depth": 3}, {name: value for name, value in of_before.items() if name != "seed"}):
        with pytest.raises(ValueError, match=r"unknown or missing fields \['(depth|seed)'\]"):
            Config.from_json(odd)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "method='magic' is unknown; choose one of dsb, ssb, rigl, set, topkast, dense"),
        ({"sparsity": 1.0}, r"sparsity=1.0 is not in \[0, 1\)"),
        ({"drop_fraction": 1.01}, r"drop_fraction=1.01 is not in \[0, 1\]"),
        ({"anneal_fraction": 0.0}, "anneal_fraction=0.0 is not a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is not a positive number"),
        ({"weight_decay": float("nan")}, "weight_decay=nan is not in"),
        ({"update_interval": 0}, "update_interval=0 is not a positive number"),
        ({"seed": 2**32}, "seed=4294967296 is not in"),
        ({"block_shape": (0, 4)}, r"block_shape=\(0, 4\) has a side below 1"),
    ],
)
def test_an_invalid_value_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        check_config(dataclasses.replace(Config(), **changes))


def test_the_neighbours_of_invalid_values_are_valid():
    for changes in ({"sparsity": 0.0}, {"drop_fraction": 1.0}, {"seed": 2**32 - 1}, {"anneal_fraction": 5.0}):
        check_config(dataclasses.replace(Config(), **changes))
    for method in METHODS:
        check_config(Config(method=method))


def test_methods_have_the_settings_of_the_config():
    config = Config(total_steps=1000, update_end_fraction=0.5, update_interval=20, drop_fraction=0.4)
    assert make_method(config) == DSB(update_end_step=500, update_interval=20, drop_fraction=0.4)
    annealed = dataclasses.replace(config, method="set", anneal_fraction=1.25)
    assert make_method(annealed) == SET(update_end_step=500, anneal_steps=1250, update_interval=20, drop_fraction=0.4)
    assert make_method(Config(method="ssb")) == Static()
    assert make_method(Config(method="small_dense")) is None
    never = make_method(Config(update_end_fraction=0.0))
    assert not any(never.due(step) for step in range(200))


def test_the_schedule_of_the_authors():
    config = dataclasses.replace(Config(total_steps=62_560), **PROTOCOLS["authors"])
    method = make_method(config)
    assert {name: getattr(method, name) for name in schedule.AUTHORS} == dict(schedule.AUTHORS)
    assert float(schedule.drop_fraction(method, 37_499)) == pytest.approx(0.15, abs=1e-4)  # where it stops
    half = make_method(dataclasses.replace(config, total_steps=31_280))
    assert (half.update_end_step, half.anneal_steps) == (18_750, 37_500)


def test_equal_configs_give_the_same_objects_whatever_the_seed():
    assert build(Config(method="dense", seed=1)) is build(Config(method="dense", seed=2))


def test_what_was_tuned_on_this_machine_does_not_decide_the_order_of_activations(monkeypatch):
    def refuse(*_):
        raise AssertionError("a table was looked up")

    monkeypatch.setattr(tuning, "lookup", refuse)
    assert decide_feature_major(Config()) == decide_feature_major(Config(implementation="xla"))
    assert not decide_feature_major(Config(implementation="dense"))
    assert not decide_feature_major(Config(method="dense"))
    with pytest.raises(AssertionError, match="looked up"):
        decide_feature_major(Config(), tuned=True)


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
    paths = ("stem",), ("stage_0", "conv_0"), ("stage_0", "skip"), ("stage_1", "conv_0"), ("head",)
    (rule,) = dense_rules(("nothing", pattern))
    assert {"/".join(path) for path in paths if rule.matches(path)} == dense
    assert dense_rules(()) == ()
