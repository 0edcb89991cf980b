"""Sweeps: grids without duplicates, and the same table however often a sweep was stopped on its way."""

import dataclasses
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from dsb_jax.training import data, loop
from dsb_jax.training.checkpoints import check_workdir
from dsb_jax.training.config import METHODS, Config
from experiments import grid, outcomes, sweep
from experiments.presets import PRESETS
from experiments.sweep import Estimate, Sweep, format_seconds
from tests.test_loop import Silent
from tests.test_programs import call_here

ROOT = Path(__file__).parent.parent


def digits_runs(**parts):
    return grid.expand([{"sparsity": (0.9,), **parts}], seeds=(0,), common={"dataset": "digits"})


# A stand-in for a training: it writes the summary of the config that it is given, or fails.
STAND_IN = """
import json, pathlib, sys
folder, body, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("a line of output")
if code:
    sys.exit(code)
folder.mkdir()
(folder / "summary.json").write_text(body)
"""


def stand_in(root, code=lambda run: 0, calls=None):
    def command(runs):
        (run,) = runs
        summary = {"config": run.config.to_json(), "test_accuracy": 0.5 + run.seed / 10, "train_time_s": 1.0}
        return [sys.executable, "-c", STAND_IN, str(root / run.name), json.dumps(summary), str(code(run))]

    return command


def make(root, runs, **how):
    return Sweep(root, runs, stand_in(root, **how), Console(quiet=True)).make()


def test_every_preset_has_distinct_names_and_settings_that_exist():
    for name in PRESETS:
        runs = grid.preset_runs(name)
        assert len({run.name for run in runs}) == len(runs)
        grid.check_runs([run for run in runs if run.config.method in METHODS])


def test_the_digits_preset_runs_shared_cells_once():
    runs = grid.preset_runs("digits")
    # dense once for all sparsities; the parts share dsb and block_gradient at 0.9 with each other
    cells = {run.settings for run in runs}
    assert len(cells) == (1 + 6 * 3) + 2 * 3 + 2 * 3 + 2 + 2 * 3 * 3
    assert len(runs) == 5 * len(cells)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)  # the whole grid with one seed comes first


def test_settings_without_effect_or_equal_to_the_default_make_no_new_run():
    assert grid.make_run({"method": "dense", "sparsity": "0.8"}, 0) == grid.make_run({"method": "dense"}, 0)
    assert grid.make_run({"method": "ssb", "grow": "norm"}, 0) == grid.make_run({"method": "ssb"}, 0)
    assert grid.make_run({"grow": "block_gradient", "epochs": "24"}, 0) == grid.make_run({}, 0)
    assert grid.make_run({"epochs": "24", "dataset": "cifar10"}, 0) != grid.make_run({"dataset": "cifar10"}, 0)
    rule = {"method": ("dsb",), "grow": ("norm", "gradient"), "block_aware_drop": ("true", "false")}
    assert len(digits_runs(**rule)) == 2  # whole panel columns know no rule
    assert len(digits_runs(**rule, granularity=("block",))) == 4
    settings = {"block_shape": "32x8", "granularity": "block", "block_aware_drop": "false", "learning_rate": "0.1"}
    run = grid.make_run(settings, 3)
    assert run.name == ("digits-convnet-dsb-0.9-32x8-block_aware_drop=False-granularity=block-learning_rate=0.1-seed3")
    assert {"--noblock_aware_drop", "--block_shape=32x8", "--seed=3"} <= set(run.arguments())
    assert run.config == dataclasses.replace(
        Config(), block_shape=(32, 8), granularity="block", block_aware_drop=False, learning_rate=0.1, seed=3
    )


def test_a_run_is_done_if_the_config_is_the_same(tmp_path):
    run = grid.make_run({"dataset": "cifar10"}, 0)
    config = run.config.to_json() | {"total_steps": 7, "input_shape": [32, 32, 3], "update_interval": 1}
    assert run.matches(config)  # a short run adapts more often
    assert not run.matches(config | {"update_interval": 2})
    assert not run.matches(config | {"weight_decay": 0.5})
    assert not run.matches({k: v for k, v in config.items() if k != "grow"})
    assert not grid.make_run({}, 0).matches(grid.make_run({}, 0).config.to_json() | {"update_interval": 5})
    for method, same in (("dsb", False), ("ssb", True)):  # what has no effect on a method is no other config
        other = grid.make_run({"method": method}, 0)
        assert other.matches(other.config.to_json() | {"granularity": "block", "grow": "norm"}) == same
    folder = grid.workdir(tmp_path, run)
    folder.mkdir()
    (folder / "summary.json").write_text('{"config": ')
    assert outcomes.finished(tmp_path, run) is None
    (folder / "summary.json").write_text(json.dumps({"config": config, "test_accuracy": 0.5}))
    assert outcomes.finished(tmp_path, run) == {"config": config, "test_accuracy": 0.5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"grow": "magic"}, "magic"),
        ({"model": "wrn-11-2"}, "wrn-11-2"),
        ({"sparsity": "1.5"}, "sparsity=1.5"),
        ({"sparsity": "many"}, "sparsity='many' is not a number"),
        ({"total_steps": "5"}, "'total_steps' is not a setting"),
        ({"block_aware_drop": "maybe"}, "maybe"),
    ],
)
def test_values_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        grid.check_runs([grid.make_run(settings, 0)])


def test_a_value_that_no_run_looks_at_is_refused():
    values = {"method": ["dsb", "dense"], "sparsity": ["0.8"], "block_aware_drop": ["true", "false"]}
    runs = grid.expand([values], seeds=[0], common={})
    with pytest.raises(ValueError, match="block_aware_drop=false has no effect on dense, dsb; it is for granularity"):
        grid.check_effects(runs, values)
    values["granularity"] = ["block"]
    grid.check_effects(grid.expand([values], seeds=[0], common={}), values)
    with pytest.raises(ValueError, match=r"sparsity=0\.8 has no effect on dense"):
        grid.check_effects(grid.expand([{"method": ["dense"]}], seeds=[0], common={}), {"sparsity": ["0.8"]})


def test_selecting_from_a_preset():
    runs = grid.preset_runs("digits")
    chosen = grid.select(runs, {"method": ["dense", "ssb"], "sparsity": ["0.9"], "seed": [2]})
    assert [run.cell for run in chosen] == [
        "digits-convnet-dense", *(f"digits-convnet-ssb-0.9-{shape}" for shape in ("auto", "16x16", "32x8", "64x4"))
    ]  # fmt: skip
    with pytest.raises(ValueError, match=re.escape("no run of the grid has seed in [9]")):
        grid.select(runs, {"seed": [9]})


def test_a_failed_run_is_noted_and_the_others_go_on(tmp_path):
    runs = digits_runs(method=("dsb", "ssb", "dense"))
    failed = make(tmp_path, runs, code=lambda run: 3 if run.config.method == "ssb" else 0)
    assert [run.config.method for run in failed] == ["ssb"]
    note = tmp_path / f"{failed[0].name}.failure.txt"
    assert "exit code 3" in note.read_text()
    assert "a line of output" in note.read_text()
    assert [row["settings"]["method"] for row in outcomes.make_rows(tmp_path, runs)] == ["dsb", "dense"]
    assert make(tmp_path, runs, code=lambda run: 0 if run.config.method == "ssb" else 4) == []  # only what is missing
    assert not note.exists()
    assert len(outcomes.make_rows(tmp_path, runs)) == 3


def test_a_run_that_another_process_holds_is_left_for_last(tmp_path):
    runs = digits_runs(method=("ssb", "dense"))
    lock = tmp_path / ".locks" / runs[0].name
    lock.parent.mkdir()
    # Holds the lock until the other run is there, as a run does that has outlived its sweep.
    holder = (
        "import fcntl, pathlib, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.05)"
    )
    other = tmp_path / runs[1].name / "summary.json"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock), str(other)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert make(tmp_path, runs) == []
    first, second = (tmp_path / run.name / "summary.json" for run in runs)
    assert first.stat().st_mtime_ns > second.stat().st_mtime_ns


def test_a_row_by_hand(tmp_path):
    runs = grid.expand([{"method": ("dsb",)}], seeds=(0, 1, 2), common={})
    for run, accuracy, exploration in zip(runs, (0.9, 0.92, 0.97), (0.2, 0.4, None), strict=True):
        summary = {
            "config": run.config.to_json(), "test_accuracy": accuracy, "sparsity": 0.9, "exploration": exploration,
            "flops": {"train_ratio": 0.2, "inference_ratio": 0.1},
        }  # fmt: skip
        grid.workdir(tmp_path, run).mkdir()
        (grid.workdir(tmp_path, run) / "summary.json").write_text(json.dumps(summary))
    (row,) = outcomes.make_rows(tmp_path, runs)
    assert row["n"] == 3
    assert row["mean"] == pytest.approx(0.93)
    assert row["std"] == pytest.approx(((0.03**2 + 0.01**2 + 0.04**2) / 2) ** 0.5)
    assert row["values"] == {"0": 0.9, "1": 0.92, "2": 0.97}
    assert row["exploration"] == pytest.approx(0.3)
    assert row["collateral"] is None
    assert row["flops"] == {"train_ratio": pytest.approx(0.2), "inference_ratio": pytest.approx(0.1)}
    assert outcomes.outcome_table([row]).row_count == 1


def test_the_estimate_takes_the_same_method_first():
    dsb, ssb, dense = digits_runs(method=("dsb", "ssb", "dense"))
    estimate = Estimate()
    assert estimate.left([dsb]) is None
    for seconds in (30.0, 50.0, 40.0):
        estimate.add(dsb, seconds)
    estimate.add(ssb, 10.0)
    assert estimate.left([dsb, ssb]) == 50
    assert estimate.left([dense]) == 35  # the median of all four
    assert estimate.left([]) == 0
    assert [format_seconds(s) for s in (None, 89.0, 120.0, 4000.0)] == ["?", "89 s", "2 min", "1 h 07 min"]


def test_a_run_killed_while_it_noted_its_config_begins_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.json").write_text('{"dataset"')
    assert check_workdir(tmp_path, Config(), resume=True)[1] is None


SWEEP = ("--methods=dense", "--seeds=0,1", "--set=epochs=3", "--set=batch_size=256")


def sweep_process(root, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", f"--root={root}", *SWEEP, *more], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sweep_that_was_killed_ends_with_the_same_table(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs = grid.expand([{"method": ("dense",)}], seeds=(0, 1), common={}, override={"epochs": "3", "batch_size": "256"})
    # The runs without a break in this process, where the seeds share what they compile; the sweep's own then find it
    # in the cache.
    dataset = data.load("digits")
    for run in runs:
        config = loop.for_dataset(run.config, dataset)
        loop.run(config, dataset, grid.workdir(whole, run), resume=False, progress=Silent())
    first, second = (broken / f"digits-convnet-dense-batch_size=256-epochs=3-seed{seed}" for seed in (0, 1))
    shutil.copytree(whole / first.name, first)
    done = {file: file.read_bytes() for file in first.glob("*.json*")}
    process = sweep_process(broken)
    wait_for(lambda: (second / "checkpoints" / "5").exists())  # the first of its three epochs is on disk
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not (second / "summary.json").exists(), "the run was over before it could be killed"
    with (broken / ".locks" / second.name).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free: the run has ended with its sweep
    assert not (broken / "table.json").exists()
    process = sweep_process(broken)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "1 done, 1 left" in output
    assert {file: file.read_bytes() for file in first.glob("*.json*")} == done
    assert json.loads((second / "summary.json").read_text())["resumed_at_step"] >= 5
    table = json.loads((broken / "table.json").read_text())
    assert table == json.loads(json.dumps({"rows": outcomes.make_rows(whole, runs)}))
    assert [row["n"] for row in table["rows"]] == [2]


def test_the_program_ends_with_an_error_if_a_run_failed(tmp_path):
    flags = (f"--root={tmp_path}", "--methods=dense", "--set=batch_size=5000")
    command = [sys.executable, "-m", "experiments.sweep", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 1
    (note,) = tmp_path.glob("*.failure.txt")
    assert "batch_size=5000 is more than" in note.read_text()
    assert note.name in result.stdout
    with pytest.raises(ValueError, match="method='magic' is unknown"):
        call_here(sweep, *flags, "--methods=magic")


TOGETHER = """
import json, pathlib, sys
for text in sys.argv[1:]:
    folder, body, code = json.loads(text)
    if code:
        sys.exit(code)
    pathlib.Path(folder).mkdir()
    (pathlib.Path(folder) / "summary.json").write_text(body)
"""


def test_the_seeds_of_a_cell_share_a_process_and_one_that_fails_does_not_take_the_others_along(tmp_path):
    runs = grid.expand([{"method": ("dsb", "ssb")}], seeds=(2, 0, 1), common={})
    asked = []

    def command(runs):
        asked.append([(run.config.method, run.seed) for run in runs])
        parts = []
        for run in runs:
            summary = {"config": run.config.to_json(), "test_accuracy": 0.5, "train_time_s": 1.0}
            fails = (run.config.method, run.seed) == ("dsb", 1)
            parts.append(json.dumps([str(tmp_path / run.name), json.dumps(summary), 3 if fails else 0]))
        return [sys.executable, "-c", TOGETHER, *parts]

    failed = Sweep(tmp_path, runs, command, Console(quiet=True), together=True).make()
    assert [(run.config.method, run.seed) for run in failed] == [("dsb", 1)]
    assert asked == [
        [("dsb", 0), ("dsb", 1), ("dsb", 2)],
        [("dsb", 1)],  # what the note of its failure tells to try
        [("dsb", 2)],
        [("ssb", 0), ("ssb", 1), ("ssb", 2)],
    ]
    assert sum(outcomes.finished(tmp_path, run) is not None for run in runs) == 5


def test_the_command_of_several_seeds():
    runs = grid.expand([{"method": ("ssb",)}], seeds=(0, 1), common={})
    command = sweep.train_command(Path("ROOT"), None)
    assert {"--seeds=0,1", "--workdir=ROOT/digits-convnet-ssb-0.9-auto-seed{seed}"} <= set(command(runs))
    alone = command(runs[1:])
    assert "--workdir=ROOT/digits-convnet-ssb-0.9-auto-seed1" in alone
    assert not any(argument.startswith("--seeds") for argument in alone)
