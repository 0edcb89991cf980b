"""One command on a machine with an NVIDIA GPU: are the kernels right, how fast are they, which goals are met.

    make gpu-check                  # a virtual environment with jax[cuda13]
    make gpu-check BIN=/usr/bin     # the machine's own python, nothing is installed
    python -m experiments.gpu_check --json=experiments/results/gpu_check.json

At most 8 minutes. Each part is a process of its own with a time budget; one that fails or runs out of time leaves the
others alone, and the file is written after each of them:

    tests      pytest -m gpu
    tune       experiments.tune: the tiles and choices that the following parts use, kept beside the results
    gemm       experiments.benchmark_kernels: 4096 x 4096 x 4096 at sparsity 0.9
    training   experiments.benchmark_training: ResNet-18 and VGG-16, batch 512, bfloat16, at 0.9 and at 0.5
    conv       experiments.benchmark_kernels: some convolutions

Exit code 0 if every part did its work (whether or not it met the goals), 1 if one did not, 2 without a GPU.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.table import Table

from experiments import program, timing
from experiments.kernel_measurement import BOTH

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent
LIMIT_S = 470.0
PROBE = "from experiments import gpu_check; gpu_check.write_environment('{file}')"
PROBE_S = 300.0
TEST_PROCESSES = min(8, (os.cpu_count() or 2) // 2)  # tests compile much and compute little
GEMM = "4096x4096x4096"
CONVS = ("64x64x3x3@32x32x512", "256x256x3x3@8x8x512", "512x512x3x3@4x4x512")
TRAINED = ("resnet18", "vgg16")
RECIPE = ("--block_shape=64x4", "--batch_size=512", "--dtype=bfloat16")


@dataclasses.dataclass(frozen=True)
class Part:
    """A process to run.

    Attributes:
      name: of the part, a key of the results.
      arguments: of the python interpreter; `{file}` stands for a file for results, which becomes the part's.
      budget_s: its share of the time. What the parts before it did not use is added.
    """

    name: str
    arguments: tuple[str, ...]
    budget_s: float


@dataclasses.dataclass(frozen=True)
class Goal:
    """A speed-up over dense that is wanted. `value` is None if it was not measured."""

    name: str
    wanted: float
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value >= self.wanted


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("json", None, "Write the results to this file; a tuned table goes beside it.")
    flags.DEFINE_float("limit_s", LIMIT_S, "Seconds for all parts together.", lower_bound=0)


def write_environment(file: str) -> None:
    """Backend, device and versions as JSON. Run in a process of its own, which lets go of the GPU's memory."""
    versions = {}
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "triton", "torch", "stanford-stk"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    Path(file).write_text(json.dumps({"backend": jax.default_backend(), **timing.environment(), **versions}))


def parts(table: Path) -> list[Part]:
    """What is run, in this order: first what the others build on, then by how much it tells."""
    module = ("-m",)
    training = {
        (model, sparsity): (
            *module, "experiments.benchmark_training", f"--model={model}", f"--sparsities={sparsity}", *RECIPE,
            "--distributions=uniform", "--rounds=5", "--nolayers", "--json={file}",
        )
        for sparsity in ("0.9", "0.5") for model in TRAINED
    }  # fmt: skip
    kernels = (*module, "experiments.benchmark_kernels", "--sparsities=0.9", "--dtype=bfloat16", "--rounds=5")
    tests = [*module, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--maxfail=20", "--junitxml={file}"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(TEST_PROCESSES)]
    tune = (
        *module, "experiments.tune", f"--shapes={GEMM}", f"--models={','.join(TRAINED)}", "--sparsities=0.9",
        "--block_shapes=64x4", "--batch_size=512", "--dtype=bfloat16", "--tiles=once", "--rounds=3", "--limit_s=35",
        f"--table={table}",
    )  # fmt: skip
    gemm = f"--shapes={GEMM}", "--block_shapes=64x4,32x8,16x16", "--limit_s=50", "--json={file}"
    conv = f"--shapes={','.join(CONVS)}", "--block_shapes=64x4", "--limit_s=20", "--json={file}"
    return [
        Part("tests", tuple(tests), 95),
        Part("tune", tune, 50),
        Part("gemm", (*kernels, *gemm), 65),
        Part("training resnet18 0.9", training["resnet18", "0.9"], 75),
        Part("training vgg16 0.9", training["vgg16", "0.9"], 75),
        Part("training resnet18 0.5", training["resnet18", "0.5"], 45),
        Part("training vgg16 0.5", training["vgg16", "0.5"], 45),
        Part("conv", (*kernels, *conv), 30),
    ]


def run_part(part: Part, limit_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a part to its end, or stops it after `limit_s`.

    Returns:
      seconds, command, error (None if it did its work), tail (its last lines), and results where it wrote any.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results"
        arguments = [argument.replace("{file}", str(file)) for argument in part.arguments]
        begin = time.monotonic()
        # A session of its own, so that stopping it stops what it started.
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=max(limit_s, 0.1))
            error = None if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            error = f"stopped after {limit_s:.0f} s"
        tail = [without_paths(line) for line in output.splitlines() if line.strip()][-12:]
        if error is not None and tail:
            error += f": {tail[-1].strip()[:200]}"
        outcome = {
            "seconds": round(time.monotonic() - begin, 1),
            "command": without_paths("python " + " ".join(part.arguments)).replace("{file}", "FILE"),
            "error": error,
            "tail": tail if error is not None else tail[-1:],
        }
        if file.exists():
            outcome["results"] = read_results(without_paths(file.read_text().replace(str(file), "FILE")))
        return outcome


def without_paths(text: str) -> str:
    """Paths inside of the project become relative: results are kept, and read elsewhere."""
    return text.replace(f"{ROOT}{os.sep}", "")


def read_results(text: str) -> Any:
    """What a part wrote: JSON; or the counts of a JUnit file. None if it is neither, half written."""
    if text.startswith("<?xml"):
        return {
            name: int(found[1]) if (found := re.search(rf'<testsuite [^>]*\b{name}="(\d+)"', text)) else None
            for name in ("tests", "failures", "errors", "skipped")
        }
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def goals(done: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """The goals beside what the parts measured; of the kernels, the best sparse implementation counts."""

    def results(part: str) -> list[dict[str, Any]]:
        return (done.get(part, {}).get("results") or {}).get("results", [])

    def kernel(block_shape: str, name: str) -> float | None:
        found = [
            r["speedup"][name] for r in results("gemm")
            if r["block_shape"] == block_shape and r["implementation"] in ("pallas", "triton")
            and name in r.get("speedup", {})
        ]  # fmt: skip
        return max(found, default=None)

    def training(model: str, sparsity: str) -> float | None:
        return next((r["speedup"] for r in results(f"training {model} {sparsity}")), None)

    wanted = {("64x4", "forward"): 3.0, ("64x4", BOTH): 2.0, ("32x8", "forward"): 1.6, ("32x8", BOTH): 1.2}
    listed = [Goal(f"GEMM 4096^3, 0.9, {shape}, {name}", least, kernel(shape, name))
              for (shape, name), least in wanted.items()]  # fmt: skip
    listed += [Goal(f"training step, {model}, 0.9, 64x4", 1.3, training(model, "0.9")) for model in TRAINED]
    listed += [Goal(f"auto never slow, {model}, 0.5, 64x4", 0.97, training(model, "0.5")) for model in TRAINED]
    return listed


def find_gpu() -> dict[str, Any]:
    """The environment of this machine.

    Raises:
      NotImplementedError: if jax finds no GPU.
    """
    answer = run_part(Part("probe", ("-c", PROBE), PROBE_S), PROBE_S, {})
    environment = answer.get("results")
    if answer["error"] is not None or environment is None:
        raise NotImplementedError(f"no GPU: jax does not start here ({answer['error']}).")
    if environment["backend"] != "gpu":
        raise NotImplementedError(
            f"no GPU: jax {environment['jax']} computes on the {environment['backend']} here. gpu-check needs an "
            "NVIDIA GPU and jax with CUDA: pip install '.[cuda]'."
        )
    return environment


def summary(done: Mapping[str, Mapping[str, Any]], listed: Sequence[Goal]) -> list[Table]:
    """Parts with their seconds, goals with their values."""
    ran = Table(title="gpu-check")
    for column in ("part", "seconds", "outcome"):
        ran.add_column(column, justify="right" if column == "seconds" else "left")
    for name, outcome in done.items():
        ran.add_row(name, f"{outcome['seconds']:.0f}", outcome["error"] or (outcome["tail"] or ["done"])[-1][:80])
    reached = Table(title="goals: speed-up over dense")
    for column in ("goal", "at least", "measured", ""):
        reached.add_column(column, justify="left" if column == "goal" else "right")
    words = {True: "met", False: "missed", None: "not measured"}
    for goal in listed:
        value = "" if goal.value is None else f"{goal.value:.2f}x"
        reached.add_row(goal.name, f"{goal.wanted:g}x", value, words[goal.met])
    return [ran, reached]


def main() -> None:
    """Runs the parts and writes the file."""
    console = program.console()
    path = timing.results_path(FLAGS.json)
    begin = time.monotonic()
    environment = find_gpu()
    console.print(f"{environment['device']}, jax {environment['jax']}")
    done: dict[str, dict[str, Any]] = {}

    def write() -> None:
        if path is not None:
            listed = [{**dataclasses.asdict(goal), "met": goal.met} for goal in goals(done)]
            command = " ".join(["python -m experiments.gpu_check", *sys.argv[1:]])
            body = {"command": command, "environment": environment, "seconds": round(time.monotonic() - begin, 1),
                    "goals": listed, "parts": done}  # fmt: skip
            path.write_text(json.dumps(body, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tuned.json" if path is None else path.absolute().with_suffix(".tuned.json")
        table.unlink(missing_ok=True)
        # What a part compiles, the next one need not: both sparsities train the same dense model.
        shared = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
        share = time.monotonic() - begin
        for part in parts(table):
            share += part.budget_s
            left = min(share, FLAGS.limit_s) - (time.monotonic() - begin)
            if left < 5:
                done[part.name] = {"seconds": 0.0, "error": "no time left", "tail": []}
                continue
            console.print(f"{part.name} ...")
            # Several tests share the GPU's memory: none may take it all.
            extra = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if part.name == "tests" else shared
            if table.exists():
                extra = {**extra, "DSB_JAX_TUNED": str(table)}
            done[part.name] = run_part(part, left, extra)
            write()
    write()
    for shown in summary(done, goals(done)):
        console.print(shown)
    if any(outcome["error"] is not None for outcome in done.values()):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    program.start(main)
