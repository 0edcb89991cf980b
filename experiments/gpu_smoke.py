"""Is each kernel right? Each pass at each R, at one matrix and one convolution, against the reference: a line a case.

    python -m experiments.gpu_smoke --lines=FILE

The kernels are compiled as users get them. Cases run in another process, `experiments.gpu_smoke_case`: one that dies or
gives no sign of life is started again with the cases that are left, then one case at a time, so that a case that takes
its process along is known by name. A line has the case, its error over the largest entry of the reference's result, the
error that is tolerated, and the time of a call. That time holds the launch: `experiments.benchmark_kernels` measures.

Exit code 1 if a case is wrong.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import program
from experiments.gpu_check_run import parse_lines

FLAGS = flags.FLAGS
PASSES = ("forward", "input_gradient", "weight_gradient")
SPARSITY = 0.9
LAYERS = {"gemm": "2048x2048x2048", "conv": "256x256x3x3@8x8x128"}
# The most wanted first: 64x4 and 16x16 are what the training parts use.
BLOCK_SHAPES = ((64, 4), (16, 16), (32, 8), (128, 2))
PATIENCE_S = 20.0  # without any line
POLL_S = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """One pass of one layer.

    Attributes:
      dtype: of activations and blocks.
      rows, cols: of a block.
      layer: as `experiments.kernel_shapes.parse_layer` reads it.
      pass_name: one of `PASSES`.
    """

    dtype: str
    rows: int
    cols: int
    layer: str
    pass_name: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.rows}x{self.cols} {self.layer} {self.pass_name}"


def parse_case(text: str) -> Case:
    """The case of its own text.

    Raises:
      ValueError: if it is no such text.
    """
    try:
        dtype, block_shape, layer, pass_name = text.split()
        rows, cols = (int(size) for size in block_shape.split("x"))
    except ValueError:
        raise ValueError(f"cases: {text!r} is not such as 'bfloat16 64x4 256x256x64 forward'.") from None
    return Case(dtype, rows, cols, layer, pass_name)


def measured_cases() -> list[Case]:
    """What is checked on a GPU, the most wanted first."""
    found = [
        Case("bfloat16", rows, cols, layer, pass_name)
        for rows, cols in BLOCK_SHAPES for layer in LAYERS.values() for pass_name in PASSES
    ]  # fmt: skip
    rows, cols = BLOCK_SHAPES[0]
    return found + [Case("float32", rows, cols, layer, pass_name) for layer in LAYERS.values() for pass_name in PASSES]


# A rehearsal has one case that is made wrong, and one that takes its process along, once among others and once alone.
WRONG = Case("bfloat16", 64, 4, "64x128x16", "weight_gradient")
DYING = Case("bfloat16", 32, 8, "64x128x16", "forward")
REHEARSED = (
    Case("bfloat16", 64, 4, "64x128x16", "forward"), WRONG, DYING,
    Case("float32", 16, 4, "32x16x2x2@3x3x4", "forward"),
)  # fmt: skip


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("lines", None, "Append the lines to this file.", required=True)
    flags.DEFINE_bool("rehearse", False, "Tiny cases in Pallas' interpreter, two of them broken on purpose.")


def failed(lines: Sequence[dict[str, Any]]) -> list[Case]:
    """The cases that were found wrong, and one that was being checked when the lines ended."""
    bad = [parse_case(line["case"]) for line in lines if line.get("ok") is False]
    answered = {line["case"] for line in lines if "ok" in line}
    begun = [line["begun"] for line in lines if "begun" in line]
    return bad + [parse_case(name) for name in begun[-1:] if name not in answered]


def append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line to a file, at once."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file."""
    return parse_lines(path.read_text()) if path.exists() else []


def supervise(
    cases: Sequence[Case],
    path: Path,
    start: Callable[[Sequence[Case], bool], list[str]],
    patience_s: float = PATIENCE_S,
) -> None:
    """Has all cases checked, whatever becomes of the processes that check them.

    Args:
      cases: to check.
      path: of the lines. A process appends `{"begun": case}`, then `{"case": case, "ok": ..., ...}`.
      start: (cases, one_by_one) -> the command that checks them, compiled side by side or one after the other.
      patience_s: seconds without a line after which a process is stopped.
    """
    left, one_by_one = list(cases), False
    while left:
        before = len(read_lines(path))
        ended = _watch(start(left, one_by_one), path, patience_s)
        new = read_lines(path)[before:]
        answered = {line["case"] for line in new if "ok" in line}
        left = [case for case in left if str(case) not in answered]
        if not new or (ended == "exit code 0" and not answered):  # it did not even begin, nor would it the next time
            append(path, {"note": f"nothing was checked: {ended}"})
            return
        # Compiled side by side, any case may have ended the process: only alone one is known to have done it.
        begun = [line["begun"] for line in new if "begun" in line and line["begun"] not in answered]
        if one_by_one and begun:
            append(path, {"case": begun[-1], "ok": False, "message": f"its process ended: {ended}"})
            left = [case for case in left if str(case) != begun[-1]]
        one_by_one = True


def _watch(command: list[str], path: Path, patience_s: float) -> str:
    """Runs a command until it ends, or until it has written no line for `patience_s`; how it ended."""
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    size, since = -1, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = running.wait(timeout=POLL_S)
            return f"exit code {code}" if code >= 0 else f"signal {-code}"
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            return f"no line in {patience_s:.0f} s"


def case_command(cases: Sequence[Case], path: Path, *, one_by_one: bool = False, rehearse: bool = False) -> list[str]:
    """The command that checks cases in a process of its own."""
    command = [
        sys.executable, "-m", "experiments.gpu_smoke_case", f"--cases={','.join(map(str, cases))}", f"--lines={path}",
    ]  # fmt: skip
    if one_by_one:
        command.append("--one_by_one")
    if rehearse:
        command += ["--interpret", f"--wrong={WRONG}", f"--dies={DYING}"]
    return command


def main() -> None:
    """Flags -> cases, supervised."""
    path = Path(FLAGS.lines)
    cases = REHEARSED if FLAGS.rehearse else measured_cases()
    supervise(
        cases, path, lambda left, one_by_one: case_command(left, path, one_by_one=one_by_one, rehearse=FLAGS.rehearse)
    )
    lines = read_lines(path)
    bad, good = failed(lines), sum(line.get("ok") is True for line in lines)
    print(f"{good} cases right, {len(bad)} wrong, {len(cases) - good - len(bad)} not checked", flush=True)
    if bad or good < len(cases):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    program.start(main)
