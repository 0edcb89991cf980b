"""The programs as a user runs them: mistakes end in one or two lines with the value and the cure, exit code not 0."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from absl import flags

from dsb_jax.training.build import build
from dsb_jax.training.config import Config
from experiments import benchmark_adaptation, evaluate, train
from experiments import flags as config_flags
from tests import fake_peer

ROOT = Path(__file__).parent.parent


def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


def call_here(program: ModuleType, *arguments: str) -> None:
    """A program's main with these flags, in this process: another takes seconds to start, and compiles anew.

    The flags are apart from those of the other programs, some of which have the same names.
    """
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        for name in (*(name for name in vars(flags) if name.startswith("DEFINE_")), "adopt_module_key_flags"):
            patch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
        program.define_flags()
        for module in (program, config_flags):
            patch.setattr(module, "FLAGS", values)
        assert len(values([program.__name__, *arguments])) == 1  # the name: nothing is left over
        program.main()


def test_a_mistake_ends_in_a_short_message(tmp_path):
    workdir = tmp_path / "run"
    result = call("train", f"--workdir={workdir}", "--method=rigl2")
    assert result.returncode != 0
    message = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Traceback" not in result.stderr, result.stderr
    assert len(message) <= 4, result.stderr  # absl adds a hint of two lines to its own
    for word in ("rigl2", "dsb"):
        assert word in result.stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity=0.9999"], ["0.9999"]),
        (["--block_shape=16"], ["'16'", "16x16"]),
        (["--dataset=no_such_set", "--model=convnet"], ["no_such_set"]),
        (["--batch_size=5000"], ["batch_size=5000"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_written(arguments, words, tmp_path):
    """In what `program.start` makes a message of exit code 2, as tests/test_program.py has it."""
    workdir = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError, ImportError, NotImplementedError)) as caught:
        call_here(train, f"--workdir={workdir}", *arguments)
    message = str(caught.value)
    assert len(message.splitlines()) <= 4
    for word in words:
        assert word in message
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"model": "resnet99"}, ["resnet99", "resnet18"]),
        ({"sparsity": 1.0}, ["sparsity=1.0"]),
        ({"block_shape": (256, 16)}, ["256x16", "block"]),
        ({"drop_fraction": 1.5}, ["drop_fraction=1.5"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_be_is_refused_in_a_short_message(setting, words):
    """What `program.start` then prints; a process for each would cost seconds."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        build(Config(**setting))
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    for word in words:
        assert word in message


def test_train_evaluate_and_resume(tmp_path):
    workdir = tmp_path / "run"
    flags = (
        f"--workdir={workdir}", "--epochs=1", "--update_interval=5", "--batch_size=128", "--grow=norm",
        "--keep_dense=stem,head,conv_2,conv_3",  # one sparse layer compiles fastest
    )  # fmt: skip
    trained = call("train", *flags)
    assert trained.returncode == 0, trained.stderr
    assert "conv_1" in trained.stdout
    assert (workdir / "curves.png").exists()
    with pytest.raises(ValueError, match="--resume") as caught:
        call_here(train, *flags)
    assert len(str(caught.value).splitlines()) == 1
    report = tmp_path / "report.json"
    evaluated = call("evaluate", f"--checkpoint={workdir}", f"--json={report}")
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    assert json.loads(report.read_text())["test_accuracy"] == summary["test_accuracy"]
    with pytest.raises((ValueError, FileNotFoundError), match="nothing"):
        call_here(evaluate, f"--checkpoint={tmp_path / 'nothing'}")


def test_benchmarks_write_what_is_promised(tmp_path):
    file = tmp_path / "training.json"
    result = call(
        "benchmark_training", "--model=convnet", "--sparsities=0.9", "--block_shapes=128x96", "--batch_size=4",
        "--image_size=8", "--rounds=1", "--distributions=uniform", f"--json={file}",
        f"--peer_python={fake_peer.write(tmp_path)}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = json.loads(file.read_text())
    assert written["cores"] >= 1
    assert written["environment"]["torch"] == fake_peer.VERSION
    (entry,) = written["results"]
    assert entry["torch_step_s"] == fake_peer.SECONDS
    assert 0 < entry["speedup_over_fastest"] <= entry["speedup"]
    assert {"model", "sparsity", "block_shape", "dense_step_s", "sparse_step_s", "speedup"} <= set(entry)
    assert [layer["layer"] for layer in entry["layers"]] == ["conv_3"]  # alone it can hold such blocks: compiled fast
    assert {"dense_s", "sparse_s", "speedup"} <= set(entry["layers"][0])
    file = tmp_path / "adaptation.json"
    for granularity, grow in (("block", "norm"), ("panel_column", "norm,block_gradient")):
        call_here(
            benchmark_adaptation, "--models=", "--layer=64x16x3x3", "--batch_size=2", "--rounds=1",
            f"--granularities={granularity}", f"--grow={grow}", f"--json={file}",
        )  # fmt: skip
        results = json.loads(file.read_text())["results"]
        assert [(entry["granularity"], entry["grow"]) for entry in results] == [
            (granularity, name) for name in grow.split(",")
        ]
        for entry in results:
            assert {"layer", "adapt_s", "amortized_share"} <= set(entry)
    result = call("benchmark_adaptation", "--grow=magic")
    assert result.returncode == 2
    assert result.stderr.startswith("error: grow: 'magic' is unknown; choose of "), result.stderr
