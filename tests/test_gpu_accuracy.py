"""The ten-minute comparison for a GPU, on a machine without one: a rehearsal, the time limit, what is kept."""

import functools
import io
import json
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from dsb_jax.training import data
from experiments import gpu_accuracy
from experiments.gpu_accuracy_arms import Budget, OutOfTime, arms, groups, make_config, select
from experiments.gpu_accuracy_results import Results, outcome_table
from experiments.scanned_training import Outcome
from tests.test_programs import call_here

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what happens without a GPU")
ENVIRONMENT = {"device": "a GPU", "jax": "1"}


@pytest.mark.campaign
@on_a_cpu
def test_a_rehearsal_trains_writes_and_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    """With two of its arms; `--rehearse` alone trains all of them."""
    monkeypatch.setattr(gpu_accuracy, "prepare_device", lambda rehearse: None)
    file = tmp_path / "new" / "gpu.json"
    rehearse = functools.partial(call_here, gpu_accuracy, "--rehearse", f"--json={file}", "--epochs=1")
    rehearse("--arms=dsb", "--seeds=0")
    first = json.loads(file.read_text())
    assert "No number in it is a measurement" in first["rehearsal"]
    assert list(first["arms"]) == ["dsb"]
    capsys.readouterr()
    rehearse("--arms=dsb,dense", "--seeds=0", "--limit_s=0.1")
    told, second = capsys.readouterr().out, json.loads(file.read_text())
    assert "dsb: done before" in told
    assert "dense, left out" in told
    assert (second["arms"], list(second["left_out"])) == (first["arms"], ["dense"])
    dsb = second["arms"]["dsb"]
    assert (dsb["config"]["method"], dsb["config"]["dtype"], dsb["config"]["distribution"]) == (
        "dsb",
        "bfloat16",
        "erk",
    )
    assert dsb["choices"]
    assert abs(dsb["sparsity"] - 0.9) < 0.01
    assert set(dsb["bytes"]) == {"params", "grads", "opt_state", "topology", "index"}
    assert {"segment", "adapt", "evaluate", "arm"} <= dsb["compile_s"].keys()
    (seed,) = dsb["seeds"].values()
    assert 0 <= seed["test_accuracy"] <= 1
    assert seed["curve"][-1][0] == dsb["config"]["total_steps"]
    assert seed["step_s"] > 0
    assert [path.name for path in file.parent.iterdir()] == ["gpu.json"]
    assert str(tmp_path) not in file.read_text()


@on_a_cpu
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    with pytest.raises(NotImplementedError, match=r"no GPU.*cuda.*--rehearse"):
        call_here(gpu_accuracy, f"--json={tmp_path / 'gpu.json'}")
    assert list(tmp_path.iterdir()) == []


def test_arms_by_what_they_tell():
    names = [arm.name for arm in arms()]
    assert names[:4] == ["dsb", "rigl", "ssb", "dense"]
    assert len(set(names)) == len(names)
    assert {arm.against for arm in arms()} <= set(names)
    assert [arm.name for arm in select(["set", "dsb"])] == ["dsb", "set"]
    with pytest.raises(ValueError, match="'dbs' is unknown; choose of dsb, rigl"):
        select(["dbs"])


def test_configs_are_the_authors_protocol_at_another_length():
    like_cifar = SimpleNamespace(
        name="cifar10", num_classes=10, train_labels=range(50_000),
        train_inputs=SimpleNamespace(shape=(50_000, 32, 32, 3)), augmentation=data.Augmentation(4, True),
    )  # fmt: skip
    configs = {arm.name: make_config(arm, like_cifar, gpu_accuracy.EPOCHS, {}) for arm in arms()}
    for config in configs.values():
        assert (config.model, config.dtype, config.distribution) == ("wrn-22-2", "bfloat16", "erk")
        assert (config.total_steps, config.update_interval, config.batch_size) == (3900, 100, 128)
    assert configs["dsb"].update_end_step == 2338  # 37,500 of 62,560 steps
    assert configs["dsb 16x16"].block_shape == (16, 16)
    assert configs["rigl 0.95"].sparsity == 0.95


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_an_arm_is_begun_only_if_it_is_expected_to_end_in_time():
    clock = Clock()
    budget = Budget(100, clock)
    budget.require(budget.expected(4), "the first")  # of which nothing is known
    budget.compile_s += [20, 10]
    budget.group_s += [5, 15, 5]
    assert budget.expected(2) == 50
    clock.now += 49
    budget.require(budget.expected(2), "fits")
    clock.now += 2
    with pytest.raises(OutOfTime, match="late: 50 s do not fit, 51 of 100 s were over"):
        budget.require(budget.expected(2), "late")
    clock.now += 50
    with pytest.raises(OutOfTime, match="step 7: its time was over"):
        budget.require(0.0, "step 7")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs arms whose training is a clock that moves on; accuracies are 0.5 and the seed in per cent."""
    clock, trained = Clock(), []

    def compile_arm(config, arrays, seeds, together):
        clock.now += 30
        if config["method"] == "ssb":
            raise RuntimeError("it broke\nand more")
        programs = SimpleNamespace(num_seeds=together, seconds={"all": 30.0}, choices={"dense": 1})
        return programs, groups(seeds, together)[0], None

    def train(programs, config, components, arrays, trainings, *, advanced):
        for step in (100, 200):
            clock.now += 10
            advanced(step)
        trained.append((config["method"], tuple(trainings)))
        accuracy = [0.5 + seed / 100 for seed in trainings]
        values = [2.0] * len(trainings)
        return Outcome(trainings, [(200, accuracy, values)], [values] * 2, [1.0, 1.0], [], [0.1])

    class Config(dict):
        update_interval = 100

        def to_json(self):
            return dict(self)

    monkeypatch.setattr(gpu_accuracy, "compile_arm", compile_arm)
    monkeypatch.setattr(gpu_accuracy.scanned_training, "train", train)
    monkeypatch.setattr(gpu_accuracy.scanned_training, "begin", lambda config, count, group: group)
    monkeypatch.setattr(gpu_accuracy.scanned_training, "state_of", lambda *_: SimpleNamespace(
        params={}, opt_state={}, topology={}))  # fmt: skip
    monkeypatch.setattr(gpu_accuracy, "build", lambda config: None)
    monkeypatch.setattr(gpu_accuracy, "count_bytes", lambda *_: {"params": 2**20})
    monkeypatch.setattr(gpu_accuracy, "measure_sparsity", lambda *_: {"sparsity": 0.9})
    monkeypatch.setattr(gpu_accuracy.time, "perf_counter", clock)

    def run(limit_s, *, names=("dsb", "rigl"), seeds=(0, 1, 2), together=1, environment=None, **settings):
        results = Results(tmp_path / "gpu.json", environment or ENVIRONMENT, {})
        configs = [(arm, Config(method=arm.name, **settings)) for arm in select(names)]
        arrays = SimpleNamespace(train_labels=range(10))
        clock.now = 1000.0
        trained.clear()
        failed = gpu_accuracy.run_arms(
            configs, arrays, seeds, together, results, Budget(limit_s, clock), Console(quiet=True)
        )
        return failed, list(trained), json.loads((tmp_path / "gpu.json").read_text())

    return run


def test_what_does_not_fit_is_left_out_and_named(run):
    failed, trained, body = run(150)  # an arm takes 30 and three times 20 s
    assert not failed
    assert trained == [("dsb", (0,)), ("dsb", (1,)), ("dsb", (2,))]
    assert list(body["arms"]) == ["dsb"]
    assert body["left_out"] == {"rigl": "seeds [0, 1, 2]: 90 s do not fit, 90 of 150 s were over"}
    _, trained, body = run(150)  # goes on
    assert trained == [("rigl", (0,)), ("rigl", (1,)), ("rigl", (2,))]
    assert (list(body["arms"]), body["left_out"]) == (["dsb", "rigl"], {})
    assert run(150)[1] == []


def test_seeds_that_do_not_fit_are_left_out_and_what_was_done_is_kept(run):
    _, trained, body = run(65)
    assert trained == [("dsb", (0,))]
    assert body["left_out"]["dsb"] == "seeds [1, 2]: 20 s do not fit, 50 of 65 s were over"
    assert list(body["arms"]["dsb"]["seeds"]) == ["0"]
    _, trained, body = run(35, seeds=(0, 3), names=("dsb",), lr=1)  # another config: begun, and broken off
    assert trained == []
    assert "step 100: its time was over" in body["left_out"]["dsb"]
    assert body["arms"] == {}


def test_results_of_another_config_device_or_version_are_not_kept(run):
    run(900)
    assert run(900, names=("dsb",))[1] == []
    assert run(900, names=("dsb",), lr=2)[1] == [("dsb", (seed,)) for seed in (0, 1, 2)]
    other = {**ENVIRONMENT, "jax": "2"}
    _, trained, body = run(900, names=("dsb",), environment=other, lr=2)
    assert len(trained) == 3
    assert body["arms"]["dsb"]["environment"] == other
    assert body["arms"]["rigl"]["environment"] == ENVIRONMENT  # not asked for: it stays


def test_an_arm_that_fails_leaves_the_others_alone(run):
    failed, trained, body = run(900, names=("ssb", "dsb", "rigl"))
    assert failed == ["ssb"]
    assert len(trained) == 6
    assert body["arms"]["ssb"]["error"] == "RuntimeError: it broke"
    assert "error" not in body["arms"]["dsb"]


def test_the_last_group_is_filled_up_so_that_nothing_compiles_again(run):
    assert groups((0, 1, 2), 2) == [[0, 1], [2, 2]]
    _, trained, body = run(900, names=("dsb",), together=2)
    assert trained == [("dsb", (0, 1)), ("dsb", (2, 2))]
    seeds = body["arms"]["dsb"]["seeds"]
    assert {seed: values["test_accuracy"] for seed, values in seeds.items()} == {"0": 0.5, "1": 0.51, "2": 0.52}
    assert seeds["2"]["step_s"] == pytest.approx(1 / 100 / 2)


def test_the_table_pairs_seeds(run):
    _, _, body = run(900, seeds=(0, 1))
    for seed, accuracy in (("0", 0.48), ("1", 0.51)):
        body["arms"]["rigl"]["seeds"][seed]["test_accuracy"] = accuracy
    console = Console(file=io.StringIO(), width=150)
    console.print(outcome_table(body["arms"], "title"))
    text = console.file.getvalue()
    assert "50.50" in text  # the mean of dsb
    assert "-1.00 ± 1.00 to dsb" in text  # -2 and 0 points


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "gpu.json").write_text('{"parts": {}}')
    with pytest.raises(ValueError, match="holds no results of this program; move it away"):
        Results(tmp_path / "gpu.json", ENVIRONMENT, {})
