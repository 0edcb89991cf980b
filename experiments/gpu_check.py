"""One command on a machine with an NVIDIA GPU: are the kernels right, how fast are they, which goals are met.

    make gpu-check                  # a virtual environment with jax[cuda13]
    make gpu-check BIN=/usr/bin     # the machine's own python, nothing is installed
    python -m experiments.gpu_check --json=results/gpu.json
    python -m experiments.gpu_check --json=rehearsal/gpu.json --rehearse    # the same on a CPU, with tiny sizes

At most nine minutes. Each part is a process of its own with a time budget; one that fails or is stopped leaves the
others alone, and what it had written is kept. By value (docs/gpu.md has what each number means):

    smoke       each kernel against the reference; if one is wrong:
    diagnosis   its PTX and a run of compute-sanitizer; training at its R then uses dense products
    gemm        4096 x 4096 x 4096 at sparsity 0.9, at three block shapes
    training    ResNet-18 and VGG-16, batch 512, bfloat16, at 0.9
    tests       pytest -m gpu -k pallas
    tune        tiles and choices; then gemm again with them
    conv, training at 0.5, adaptation, peers

All results lie in the folder of --json, in at most five files that begin with its name: the JSON, the log of all parts,
the tuned table, and of a wrong kernel its PTX and the sanitizer's log.

Exit code 0 if every part did its work (whether or not it met the goals), 1 if one did not, 2 without a GPU. Of a
rehearsal: 0 if every part ended as it should, those included that have to fail.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from experiments import gpu_check_report, gpu_smoke, program
from experiments.gpu_check_parts import measured_parts, rehearsed_parts, select, write_stand_in
from experiments.gpu_check_report import REHEARSED
from experiments.gpu_check_run import Folder, Part, run_part, tidy_file

FLAGS = flags.FLAGS
LIMIT_S = 520.0
LEAST_S = 5.0  # a part is not begun with less
PROBE = "from experiments import gpu_check; gpu_check.write_environment('{file}')"
PROBE_S = 120.0
GPU_FACTS = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,temperature.gpu"
NOTE = "A rehearsal on a CPU with tiny sizes. No number in it is a measurement."


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("json", None, "Write the results to this file, and more beside it; its folder is made.")
    flags.DEFINE_bool("rehearse", False, "Run all of it on a CPU with tiny sizes; its numbers measure nothing.")
    flags.DEFINE_list("parts", None, "Run these parts only, such as smoke,gemm; by default all.")
    flags.DEFINE_float("limit_s", LIMIT_S, "Seconds for all parts together, the start included.", lower_bound=0)


def write_environment(file: str) -> None:
    """Backend, device and versions as JSON. Run in a process of its own, which lets go of the GPU's memory."""
    import jax

    from experiments import timing

    versions = {}
    for name in (
        "jax-cuda13-plugin",
        "jax-cuda12-plugin",
        "jax-triton",
        "triton",
        "torch",
        "stanford-stk",
        "pytest-xdist",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    Path(file).write_text(json.dumps({"backend": jax.default_backend(), **timing.environment(), **versions}))


def gpu_facts() -> dict[str, str] | str:
    """What nvidia-smi says of the GPU, or why it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not on the PATH"
    command = [tool, f"--query-gpu={GPU_FACTS}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {type(error).__name__}"
    first = (said.stdout.strip().splitlines() or [said.stderr.strip()])[0]
    values = [value.strip() for value in first.split(",")]
    names = GPU_FACTS.split(",")
    return dict(zip(names, values, strict=True)) if len(names) == len(values) else first[:200]


def find_device(folder: Folder, rehearse: bool) -> dict[str, Any]:
    """The environment of this machine.

    Raises:
      NotImplementedError: if jax finds no GPU, unless this is a rehearsal.
    """
    answer = run_part(Part("probe", ("-c", PROBE), PROBE_S), PROBE_S, folder, folder.environment(rehearse))
    environment = answer.get("results")
    if answer["error"] is not None or environment is None:
        raise NotImplementedError(f"no GPU: jax does not start here ({answer['error']}).")
    if rehearse:
        return environment
    if environment["backend"] != "gpu":
        raise NotImplementedError(
            f"no GPU: jax {environment['jax']} computes on the {environment['backend']} here. gpu-check needs an "
            "NVIDIA GPU and jax with CUDA: pip install '.[cuda]'. Without one, --rehearse runs it on the CPU."
        )
    return {**environment, "nvidia-smi": gpu_facts()}


class Check:
    """The parts that are done, and the file that says so.

    Attributes:
      folder: of the results.
      rehearse: whether this is a rehearsal.
      done: name of a part -> its outcome.
      interrupted: whether a signal asked this program to end.
    """

    def __init__(self, folder: Folder, rehearse: bool) -> None:
        self.folder, self.rehearse = folder, rehearse
        self.begin = time.monotonic()
        self.done: dict[str, dict[str, Any]] = {}
        self.environment: dict[str, Any] = {}
        self.interrupted = False

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.begin

    def interrupt(self, *_: Any) -> None:
        """A handler of signals: the running part is stopped, then all is written. The next signal ends at once."""
        self.interrupted = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def write(self, running: dict[str, Any] | None = None) -> None:
        """Writes the file of results anew, at one stroke: who reads it finds the old one or the new."""
        command = " ".join(["python -m experiments.gpu_check", *sys.argv[1:]])
        body = {
            **({"rehearsal": NOTE} if self.rehearse else {}), "command": command, "environment": self.environment,
            "seconds": round(self.seconds, 1), **({"running": running} if running else {}),
            **gpu_check_report.body(self.done, self.environment.get("device", ""), self.rehearse), "parts": self.done,
        }  # fmt: skip
        text = self.folder.without_paths(json.dumps(body, indent=1, ensure_ascii=False))
        new = self.folder.json.with_suffix(".new")
        new.write_text(text + "\n")
        new.replace(self.folder.json)

    def wrong_cases(self) -> list[gpu_smoke.Case]:
        """What the smoke found wrong."""
        smoke = self.done.get("smoke", {})
        return gpu_smoke.failed(smoke.get("results", smoke.get(REHEARSED)) or [])

    def implementation(self, part: Part) -> str:
        """What a training part uses: "dense" if a kernel at its R was found wrong."""
        wrong = {case.rows for case in self.wrong_cases() if case.dtype == "bfloat16"}
        return "dense" if part.rows in wrong else "auto"

    def skipped_for(self, part: Part) -> str | None:
        """Why a part has nothing to do, or None."""
        if part.name == "diagnosis" and not self.wrong_cases():
            return "no kernel is wrong"
        return None

    def run(self, part: Part, limit_s: float) -> None:
        """Runs a part, and writes what it writes."""
        if (reason := self.skipped_for(part)) is not None:
            self.done[part.name] = {"seconds": 0.0, "end": "skipped", "error": None, "tail": [reason]}
            return
        problem = f"no time left ({limit_s:.0f} s)" if limit_s < LEAST_S and not part.strict else None
        if part.needs and not self.folder.file(part.needs).exists():
            problem = f"without the file {self.folder.file(part.needs).name}, which an earlier part writes"
        if problem is not None:
            self.done[part.name] = {"seconds": 0.0, "end": "failed", "error": problem, "tail": []}
            return
        implementation = self.implementation(part)
        names = {
            "{implementation}": implementation, "{failed}": ",".join(map(str, self.wrong_cases())),
            **{f"{{{kind}}}": str(self.folder.file(kind)) for kind in ("tuned", "ptx", "sanitizer")},
        }  # fmt: skip
        filled = Part(
            part.name, tuple(_filled(argument, names) for argument in part.arguments), part.budget_s,
            {name: _filled(value, names) for name, value in part.environment.items()},
        )  # fmt: skip
        notes: dict[str, Any] = {}
        if part.rows is not None:
            notes["implementation"] = implementation
            if implementation == "dense":
                notes["reason"] = f"the smoke part found a kernel wrong at R = {part.rows}"

        def keep(outcome: dict[str, Any], pid: int | None) -> None:
            outcome = {**outcome, **notes}
            if self.rehearse and "results" in outcome:
                outcome[REHEARSED] = outcome.pop("results")
            self.done[part.name] = outcome
            self.write({"part": part.name, "pid": pid} if pid is not None else None)

        variables = self.folder.environment(self.rehearse)
        if self.rehearse:
            variables["PATH"] = f"{self.folder.temporary}{os.pathsep}{variables.get('PATH', '')}"
        outcome = run_part(
            filled, limit_s, self.folder, variables, interrupted=lambda: self.interrupted, written=keep
        )  # fmt: skip
        passed = any(line.get("outcome") == "passed" for line in outcome.get("results") or [] if part.name == "tests")
        if part.name == "tests" and outcome["error"] is None and not passed and not self.rehearse:
            outcome |= {"end": "failed", "error": "no test passed: all were skipped or not selected"}
        for kind in ("ptx", "sanitizer", "tuned"):
            if any(f"{{{kind}}}" in argument for argument in part.arguments):
                tidy_file(self.folder.file(kind), self.folder)
        keep(outcome, None)

    def run_all(self, parts: list[Part], limit_s: float, say: Any) -> None:
        """Runs the parts; what one does not use of its budget, the later ones may."""
        budgets = sum(part.budget_s for part in parts if not part.strict)
        scale = (limit_s - self.seconds) / max(budgets, 1.0)
        share = self.seconds
        for part in parts:
            if self.interrupted:
                self.done[part.name] = {"seconds": 0.0, "end": "failed", "error": "not begun", "tail": []}
                continue
            begin = self.seconds
            left = limit_s - begin
            if part.strict:
                allowed = min(part.budget_s, left)
            else:
                share += scale * part.budget_s
                allowed = min(share - begin, left)
            say(f"{part.name} ...")
            self.run(part, allowed)
            if part.strict:
                share += self.seconds - begin


def _filled(text: str, names: dict[str, str]) -> str:
    return re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], text)


def main() -> None:
    """Runs the parts and writes the files."""
    console = program.console()
    rehearse = FLAGS.rehearse
    parts = select(rehearsed_parts() if rehearse else measured_parts(), FLAGS.parts)
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as temporary:
        path = Path(FLAGS.json) if FLAGS.json else Path(temporary) / "results" / "gpu.json"
        if path.is_dir():
            raise ValueError(f"json={FLAGS.json} is a folder; give a file in it, such as {path / 'gpu.json'}.")
        probing = Folder(Path(temporary) / "probe.json", Path(temporary))
        check = Check(
            Folder(path.absolute(), Path(temporary), " (rehearsal, no measurement)" if rehearse else ""), rehearse
        )
        check.environment = find_device(probing, rehearse)
        path.parent.mkdir(parents=True, exist_ok=True)
        check.folder.remove_old()
        check.folder.file("log").write_text(f"{NOTE}\n" if rehearse else "")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, check.interrupt)
        if rehearse:
            write_stand_in(Path(temporary))
        device, jax_version = check.environment["device"], check.environment["jax"]
        console.print(f"{NOTE + ' ' if rehearse else ''}{device}, jax {jax_version}")
        check.run_all(parts, FLAGS.limit_s, console.print)
        check.write()
        for table in gpu_check_report.summary(check.done, device, rehearse):
            console.print(table)
    surprising = gpu_check_report.surprises(check.done, {part.name: part.expected for part in parts}, rehearse)
    for line in surprising:
        console.print(line, markup=False)
    if surprising or check.interrupted:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    program.start(main)
