"""Gradual density: the schedule, its plans, and a run in stages, which resumes to the same bits."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsb_jax as dsb
from dsb_jax.gradual import GradualDensity, scale_plan
from dsb_jax.layout import max_blocks
from dsb_jax.methods import METHODS
from dsb_jax.rules import Rule
from dsb_jax.spec import conv_spec, linear_spec
from dsb_jax.telemetry import count_active, count_bytes
from dsb_jax.training import data, loop
from dsb_jax.training.build import build
from dsb_jax.training.checkpoints import abstract_state, restore
from dsb_jax.training.config import Config, check_config
from dsb_jax.training.summary import measure_stages
from experiments import grid, outcomes, terminal
from tests.test_loop import Silent

LAYERS = {
    ("conv",): conv_spec((3, 3), 16, 40),
    ("stack",): linear_spec(64, 48).stacked((0,), (3,)),
    ("ragged",): linear_spec(50, 37),
    ("own",): linear_spec(64, 64),
    ("stem",): linear_spec(3, 16),
}


def plan_of(sparsity=0.9, distribution="uniform", **options):
    rules = (Rule("own", sparsity=0.7),)
    return dsb.make_plan(
        LAYERS, sparsity=sparsity, distribution=distribution, block_shape=(8, 4), rules=rules, **options
    )


def test_the_schedule_by_hand():
    gradual = GradualDensity(0.4, 150)
    assert gradual.begins == (0, 30, 60, 90, 120, 150)
    densities = [gradual.density(step, 0.1) for step in gradual.begins]
    np.testing.assert_allclose(densities, [0.4, 0.1 + 0.3 * 0.512, 0.1 + 0.3 * 0.216, 0.1192, 0.1024, 0.1])
    assert densities[0] == 0.4
    assert densities[-1] == gradual.density(10_000, 0.1) == 0.1
    assert np.mean(densities[:-1]) / 2 + 0.05 == pytest.approx(0.154, abs=2e-4)  # as the docstring has it
    late = GradualDensity(initial_density=1, end_step=20, num_stages=2, start_step=10)
    assert late.begins == (0, 15, 20)
    assert [late.density(step, 0.5) for step in (0, 10, 15, 20)] == [1, 1, 0.5 + 0.5 / 8, 0.5]
    assert hash(late) == hash(dataclasses.replace(late))


@settings(max_examples=40, deadline=None)
@given(
    sparsity=st.floats(0.5, 0.93),
    share=st.floats(0, 1),
    distribution=st.sampled_from(["uniform", "erk"]),
    stages=st.integers(1, 6),
)
def test_plans_of_the_stages(sparsity, share, distribution, stages):
    plan = plan_of(sparsity, distribution)
    final = 1 - plan.sparsity()
    gradual = GradualDensity(final + share * (1 - final), end_step=60, num_stages=stages, start_step=6)
    planned = gradual.stages(plan)
    assert planned[0][0] == 0
    assert planned[-1][1] is plan or planned[-1][1] == plan
    assert {step for step, _ in planned} <= set(gradual.begins)
    total = sum(spec.num_layers * spec.size for spec in plan.eligible.values())
    most = sum(
        spec.num_layers * spec.with_blocks((8, 4), max_blocks(spec.shape, (8, 4))).num_active
        for spec in plan.sparse.values()
    ) + sum(spec.size for path, spec in plan.eligible.items() if path not in plan.sparse)
    for (_, earlier), (_, later) in itertools.pairwise(planned):
        assert earlier != later
        for path, spec in later.sparse.items():
            before = earlier.sparse[path]
            assert before.num_blocks >= spec.num_blocks
            assert before.with_blocks(before.block_shape, spec.num_blocks) == spec
    for step, stage in planned:
        assert list(stage) == list(plan)
        wanted = min(gradual.density(step, final) * total, most)
        assert abs((1 - stage.sparsity()) * total - wanted) <= 8 * (4 + 2 + stages) * 4  # rounding, also of later ones
        for path, layer in stage.items():
            assert (layer == plan[path]) if path not in plan.sparse else layer.num_blocks >= plan[path].num_blocks
    for done in (0, 1, 6, 7, 35, 60, 61):
        held = [stage for step, stage in planned if step < max(done, 1)][-1]
        assert gradual.plan_after(plan, done) == held


def test_all_layers_grow_by_one_factor_as_far_as_they_have_room():
    plan = plan_of(0.9)
    twice = scale_plan(plan, 2 * (1 - plan.sparsity()), least=plan)
    for path, spec in plan.sparse.items():
        assert abs(twice[path].num_blocks - 2 * spec.num_blocks) <= 1, path
    most = scale_plan(plan, 1.0, least=plan)
    for path, spec in plan.sparse.items():
        assert most[path].num_blocks == max_blocks(spec.shape, spec.block_shape), path
    assert scale_plan(plan, 1 - plan.sparsity(), least=plan) == plan
    full = scale_plan(plan, 0.5, least=plan)
    factors = {path: full[path].num_blocks / spec.num_blocks for path, spec in plan.sparse.items()}
    assert full["own",].num_blocks == max_blocks((64, 64), (8, 4)) or factors["own",] == pytest.approx(5, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"initial_density": 1.5}, r"initial_density=1.5 is not in \[0, 1\]"),
        ({"end_step": 2.5}, "end_step=2.5 is no whole number of at least 1"),
        ({"num_stages": 0}, "num_stages=0 is no whole number of at least 1"),
        ({"start_step": -1}, "start_step=-1 is no whole number of at least 0"),
        ({"num_stages": 101}, "num_stages=101 do not fit between start_step=0 and end_step=100; give at most 100"),
        ({"start_step": 100}, "num_stages=5 do not fit .* give at most 0, or more steps"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        GradualDensity(**{"initial_density": 0.4, "end_step": 100, **settings})


def test_a_plan_that_is_denser_is_refused():
    with pytest.raises(ValueError, match=r"initial_density=0.1 is below the plan's density of 0.4\d*; give more"):
        GradualDensity(0.1, 100).stages(plan_of(0.5))
    with pytest.raises(ValueError, match="plan=None is no SparsityPlan"):
        GradualDensity(0.1, 100).stages(None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"initial_density": 0.05},
            r"initial_density=0.05 is not in \[0.1, 1\]: it falls to 0.1, the density of sparsity=0.9",
        ),
        ({"initial_density": float("nan")}, r"initial_density=nan is not in \[0.1, 1\]"),
        ({"density_stages": 3}, "density_stages=3 has no effect without an initial_density"),
        ({"initial_density": 0.4, "density_stages": 0}, "density_stages=0 is not a positive number"),
        ({"initial_density": 0.4, "density_end_fraction": 1.0}, r"density_end_fraction=1.0 is not in \(0, 1\)"),
        ({"initial_density": 0.4, "method": "dense"}, "initial_density=0.4 has no effect on method=dense"),
        ({"initial_density": 0.4, "method": "small_dense"}, "has no effect on method=small_dense"),
        ({"initial_density": 0.4, "total_steps": 8}, "density_stages=5 are more than the 4 steps"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        build(dataclasses.replace(Config(), **changes))


# Three stages: steps 0 to 4, 5 to 9 and 10 to 19; the second begins with an epoch, and the third where one adapts.
CONFIG = Config(
    epochs=4, batch_size=48, update_interval=2, learning_rate=0.1, block_shape=(8, 8), grow="random",
    keep_dense=("stem", "head", "conv_1", "conv_2"), initial_density=0.4, density_stages=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    full = data.load("digits")
    train, test = slice(240), slice(50)
    return dataclasses.replace(
        full,
        train_inputs=full.train_inputs[train], train_labels=full.train_labels[train],
        test_inputs=full.test_inputs[test], test_labels=full.test_labels[test],
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("gradual") / "whole"
    config = loop.for_dataset(CONFIG, digits)
    progress = Silent()
    return config, workdir, loop.run(config, digits, workdir, resume=False, progress=progress), progress


def entries(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_run_in_stages(finished):
    _, workdir, summary, progress = finished
    noted = [entry for entry in entries(workdir) if entry["kind"] == "stage"]
    assert [entry["step"] for entry in noted] == [stage["step"] for stage in summary["stages"]] == [0, 5, 10]
    for entry, stage in zip(noted, summary["stages"], strict=True):
        assert entry["bytes"] == stage["bytes"]  # counted from arrays, and from shapes
        assert entry["density"] == pytest.approx(stage["density"])
    np.testing.assert_allclose([s["density"] for s in summary["stages"]], [0.4, 0.1 + 0.3 / 8, 0.1], atol=2e-3)
    assert [note for note in progress.notes if "stage" in note][1].startswith("step 5: stage 2 of 3, density 0.137, ")
    # Of one step the stage comes first, then the adaptation.
    assert [entry["kind"] for entry in entries(workdir) if entry["step"] == 10 and entry["kind"] != "eval"] == [
        "train", "stage", "adapt",
    ]  # fmt: skip
    state = restore(workdir).state
    assert summary["bytes"] == summary["stages"][-1]["bytes"]
    assert summary["bytes"] == count_bytes(state.params, state.opt_state, state.topology)
    assert sum(count_active(state.topology).values()) == summary["num_active"]
    assert summary["sparsity"] == pytest.approx(0.9, abs=2e-3)
    shares = np.array([5, 5, 10]) / 20
    for name in ("density", "train_ratio"):
        each = np.array([stage[name] for stage in summary["stages"]])
        assert (np.diff(each) < 0).all()
        assert summary["average"][name] == pytest.approx((each * shares).sum())
        assert summary["peak"][name] == each[0]
    for name in ("params", "grads", "opt_state", "topology", "index"):
        each = [stage["bytes"][name] for stage in summary["stages"]]
        assert summary["average"]["bytes"][name] == pytest.approx(np.dot(each, shares), abs=1)
        assert summary["peak"]["bytes"][name] == each[0]
    shown = terminal.outcome_table(summary)
    assert "3 stages" in shown.columns[0]._cells
    assert summary["flops"]["train_ratio"] == summary["average"]["train_ratio"]
    assert summary["flops"]["inference_ratio"] == summary["stages"][-1]["inference_ratio"]


@pytest.mark.parametrize("stopped_after", [5, 10])
def test_a_run_that_was_stopped_between_stages_resumes_to_the_same_bits(stopped_after, finished, digits, tmp_path):
    config, workdir, summary, _ = finished
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, digits, tmp_path, resume=False, progress=Silent(interrupt_after=stopped_after))
    held = restore(tmp_path)  # the stage that begins at this step has not begun
    assert held.step in (5, stopped_after)  # written in the background: the last may not be complete
    expected = [stage["bytes"] for stage in summary["stages"] if stage["step"] < held.step][-1]
    assert count_bytes(held.state.params, held.state.opt_state, held.state.topology) == expected
    again = loop.run(config, digits, tmp_path, resume=True, progress=Silent())
    ours, theirs = restore(tmp_path), restore(workdir)
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, ours.extra, theirs.extra)
    assert entries(tmp_path) == entries(workdir)
    for name in ("stages", "average", "peak", "bytes", "flops", "test_accuracy", "exploration"):
        assert again[name] == summary[name]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dsb"])
def test_stages_of_other_methods(method):
    """Only traced: every method's layers go from each stage to the next."""
    config = dataclasses.replace(CONFIG, method=method, total_steps=20, weight_decay=0.1)
    components = build(config)
    state = abstract_state(config, components)
    for stage in components.stages[1:]:
        trees = jax.eval_shape(
            lambda params, topology, opt_state, plan=stage.plan: dsb.restage(
                params, topology, opt_state, plan, components.method, components.optimizer, jax.random.key(0)
            ),
            state.params, state.topology, state.opt_state,
        )  # fmt: skip
        state = abstract_state(config, components, done=stage.step + 1)
        expected = state.params, state.topology, state.opt_state
        assert jax.tree.structure(trees) == jax.tree.structure(expected)
        assert jax.tree.leaves(trees) == jax.tree.leaves(expected)
    nbytes = count_bytes(state.params, state.opt_state, state.topology)
    numbers = measure_stages(config, components, nbytes)
    sizes = [sum(stage["bytes"].values()) for stage in numbers["stages"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_of_a_constant_density_average_and_peak_are_the_same_numbers():
    for method in ("dsb", "dense"):
        config = dataclasses.replace(CONFIG, method=method, initial_density=None, density_stages=5)
        check_config(config)
        components = build(config)
        assert len(components.stages) == 1
        state = abstract_state(config, components)
        nbytes = count_bytes(state.params, state.opt_state, state.topology)
        numbers = measure_stages(config, components, nbytes)
        only = {name: numbers["stages"][0][name] for name in ("density", "train_ratio", "bytes")}
        assert numbers["average"] == numbers["peak"] == only
        assert only["bytes"] == nbytes


@pytest.mark.parametrize("method", ["dense", "small_dense"])
def test_settings_of_stages_without_effect_make_no_new_run(method):
    gradual = {"initial_density": "0.4", "density_stages": "3", "density_end_fraction": "0.7"}
    assert grid.make_run({"method": method, **gradual}, 0) == grid.make_run({"method": method}, 0)
    assert grid.make_run({"density_stages": "3", "density_end_fraction": "0.7"}, 0) == grid.make_run({}, 0)
    run = grid.make_run({"method": "rigl", **gradual}, 0)
    values = run.config.initial_density, run.config.density_stages, run.config.density_end_fraction
    assert values == (0.4, 3, 0.7)
    assert {"--initial_density=0.4", "--density_stages=3", "--density_end_fraction=0.7"} <= set(run.arguments())


def test_rows_of_a_sweep_have_the_bytes_of_old_and_new_summaries():
    old = {"config": {}, "test_accuracy": 0.5, "bytes": {"params": 6, "grads": 4}}
    new = old | {"average": {"bytes": {"params": 9, "grads": 6}}, "peak": {"bytes": {"params": 12, "grads": 8}}}
    assert outcomes.make_row("cell", {}, {0: old})["bytes"] == {"last": 10, "average": None, "peak": None}
    assert outcomes.make_row("cell", {}, {0: new, 1: new})["bytes"] == {"last": 10, "average": 15, "peak": 20}
    del old["bytes"]
    assert outcomes.make_row("cell", {}, {0: old})["bytes"]["last"] is None
