"""What is kept of kernels that `experiments.gpu_smoke` found wrong: their PTX, and one run of compute-sanitizer.

    python -m experiments.gpu_diagnosis --cases='bfloat16 64x4 2048x2048x2048 forward' \\
        --ptx=FILE --log=FILE --lines=FILE

Up to `MOST_CASES` are compiled in a process of their own, where XLA writes what it compiles to a folder. The sanitizer
runs the first case alone. Lines say what was found; a tool that is not there is a line as well.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments import program
from experiments.gpu_smoke import DYING, Case, append, case_command, parse_case

FLAGS = flags.FLAGS
MOST_CASES = 6
COMPILE_S = 60.0
SANITIZER_S = 40.0
SANITIZER = "compute-sanitizer"
CUDA_BIN = "/usr/local/cuda/bin"


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("cases", None, "Cases, as experiments.gpu_smoke writes them, with commas.", required=True)
    flags.DEFINE_string("ptx", None, "Write the PTX to this file.", required=True)
    flags.DEFINE_string("log", None, "Write what the sanitizer prints to this file.", required=True)
    flags.DEFINE_string("lines", None, "Append the lines to this file.", required=True)
    flags.DEFINE_bool("rehearse", False, "Cases in Pallas' interpreter; a stand-in takes the sanitizer's place.")


def dump_ptx(cases: list[Case], target: Path, rehearse: bool) -> str:
    """Compiles the cases once more, and writes their PTX to one file; what was found, in words.

    Without PTX, as on a CPU, the optimized HLO is taken.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        lines = Path(folder) / "lines"
        command = [*case_command(cases, lines, one_by_one=True, rehearse=rehearse), "--compile_only"]
        dumping = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_emitter_re=ptx"
        # A program out of the cache would not be compiled, and nothing would be written.
        variables = {**os.environ, "XLA_FLAGS": dumping, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        variables.pop("JAX_COMPILATION_CACHE_DIR", None)
        problem = ""
        try:
            code = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, timeout=COMPILE_S).returncode
            problem = f"; compiling ended with exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"; compiling took more than {COMPILE_S:.0f} s"
        files = [file for file in sorted(dump.glob("**/*.ptx")) if file.stat().st_size]  # jax 0.11 dumps empty ones too
        kind = "PTX" if files else "optimized HLO"
        files = files or sorted(dump.glob("**/*after_optimizations.txt"))
        with target.open("w") as out:
            out.write(f"// {kind} of {', '.join(map(str, cases))}\n")
            for file in files:
                out.write(f"\n// ==== {file.name}\n{file.read_text(errors='replace')}")
        return f"{kind} of {len(files)} modules{problem}" if files else f"nothing was compiled{problem}"


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is, or None."""
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=CUDA_BIN)


def sanitize(case: Case, target: Path, rehearse: bool) -> str:
    """One run of the sanitizer over one case; its verdict in words."""
    tool = find_sanitizer()
    if tool is None:
        return f"{SANITIZER} is neither on the PATH nor in {CUDA_BIN}"
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "--tool=memcheck", "--print-limit=50",
                   *case_command([case], Path(folder) / "lines", one_by_one=True, rehearse=rehearse)]  # fmt: skip
        # Each array in memory of its own: in one large piece, reading beside an array would not be seen.
        variables = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
        begin = time.monotonic()
        with target.open("w") as log:
            try:
                code = subprocess.run(
                    command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    timeout=SANITIZER_S,
                ).returncode  # fmt: skip
                ended = f"exit code {code}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {SANITIZER_S:.0f} s"
    verdict = re.findall(r"ERROR SUMMARY: .*", target.read_text(errors="replace"))
    return f"{ended} after {time.monotonic() - begin:.0f} s: {verdict[-1] if verdict else 'no summary'}"


def main() -> None:
    """Flags -> PTX, sanitizer, lines."""
    cases = [parse_case(text) for text in FLAGS.cases.split(",")][:MOST_CASES]
    lines = Path(FLAGS.lines)
    said = dump_ptx(cases, Path(FLAGS.ptx), FLAGS.rehearse)
    append(lines, {"ptx": said, "cases": [str(case) for case in cases]})
    # In a rehearsal, the case that ends its process would end here as well.
    first = next((case for case in cases if case != DYING), cases[0])
    verdict = sanitize(first, Path(FLAGS.log), FLAGS.rehearse)
    append(lines, {"sanitizer": verdict, "case": str(first)})
    print(f"{said}; sanitizer: {verdict}", flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    define_flags()
    program.start(main)
