"""PyTorch's training step beside ours, from a process of its own: the rival that a user of a CPU would take.

    python -m experiments.benchmark_training --model=resnet18 --peer_python=/path/to/python

`experiments.torch_peer` runs there, in whichever Python has PyTorch; here is what starts it, asks it for the time of a
step, and ends it. A rival that fails, answers nonsense or does not answer is an error of two lines, never a wait
without end.
"""

import contextlib
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
from rich.console import Console

from dsb_jax.training.config import Config

NONE = "none"  # of the flag: no rival
ROOT = Path(__file__).parent.parent
ANSWER_S = 600.0  # a step takes seconds; the first answer waits for the import of PyTorch
# Threads that wait must not spin: those of PyTorch would take the cores from XLA's, and from one another where another
# process has one of them (two threads, one core of two busy: a step took 14 to 20 times as long).
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


class TorchProcess:
    """A process that waits for the word to make a step. `running` makes and ends it.

    Attributes:
      version: of PyTorch.
    """

    def __init__(self, python: str, process: subprocess.Popen[bytes], errors: IO[bytes], answer_s: float) -> None:
        self._python, self._process, self._errors, self._answer_s = python, process, errors, answer_s
        self._unread = b""
        self.version = str(self._answer("torch"))

    def step(self) -> float:
        """Seconds of one step, before which another was made.

        Raises:
          ValueError: if the process ended, said something else, or said nothing for minutes.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, which says why
            self._process.stdin.write(b"step\n")
        return float(self._answer("seconds"))

    def _answer(self, key: str) -> Any:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        end = time.monotonic() + self._answer_s
        while b"\n" not in self._unread:
            if not select.select([output], [], [], max(end - time.monotonic(), 0))[0]:
                raise self._error(f"has not answered for {self._answer_s:g} s")
            piece = os.read(output, 1 << 16)
            if not piece:
                raise self._error(self._end())
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            return json.loads(line)[key]
        except (ValueError, LookupError, TypeError):
            text = line.decode(errors="replace")
            raise self._error(f'answered {text!r} instead of an object with "{key}"') from None

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        last = f": {lines[-1].strip()}" if lines else ""
        return f"ended with exit code {self._process.poll()}{last}"

    def _error(self, what: str) -> ValueError:
        return ValueError(
            f"peer_python={self._python}: the process of PyTorch {what}.\nGive a Python of 3.10 or newer that has "
            f"PyTorch (PYTHON -m pip install torch), or measure without: --peer_python={NONE}."
        )


def find_python(flag: str, console: Console, unwritten: str | None = None) -> str | None:
    """The Python that the rival runs in; None for no rival, and then a line says why.

    Args:
      flag: a path, or a command; "" for this Python if PyTorch is installed beside it; "none" for no rival.
      console: for the line.
      unwritten: why there is no rival for the model, if there is none.

    Raises:
      ValueError: if what was given cannot be started, or is to be compared with another device than a CPU.
    """
    if flag == NONE:
        return None
    backend = jax.default_backend()
    reason = unwritten
    if reason is None and not flag:
        if backend != "cpu":
            reason = f"it would run on a CPU, beside {backend}"
        elif importlib.util.find_spec("torch") is None:
            cure = "--peer_python=PATH of a Python that has it, or pip install 'dsb-jax[peers]'"
            reason = f"not installed here; {cure}"
    if reason is not None:
        console.print(f"without PyTorch's step: {reason}.", markup=False, highlight=False, soft_wrap=True)
        return None
    if not flag:
        return sys.executable
    if backend != "cpu":
        raise ValueError(f"peer_python={flag}: PyTorch would run on a CPU, beside {backend}; leave it out.")
    found = shutil.which(flag)
    if found is None:
        raise ValueError(f"peer_python={flag}: there is no such program; give the path of a Python that has PyTorch.")
    return os.path.abspath(found)  # not resolved: a virtual environment is known by the path of its link


@contextlib.contextmanager
def running(
    python: str | None, config: Config, cores: int, *, answer_s: float = ANSWER_S
) -> Iterator[TorchProcess | None]:
    """The process of the dense model of a config, ended with the block; None without a Python.

    Args:
      python: from `find_python`.
      config: gives model, sizes, dtype and optimizer; SGD without anything that SGD has beside momentum and L2.
      cores: threads of the process, which runs where this one may.
      answer_s: how long an answer may take.

    Raises:
      ValueError: if it does not start.
    """
    if python is None:
        yield None
        return
    values = {name: getattr(config, name) for name in ("model", "dtype", "batch_size", "num_classes")}
    values |= {name: getattr(config, name) for name in ("learning_rate", "momentum", "weight_decay")}
    values |= {"image_size": config.input_shape[0], "threads": cores}
    command = [python, "-m", "experiments.torch_peer", *(f"--{name}={value}" for name, value in values.items())]
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile())
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | _ENVIRONMENT, bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(
                f"peer_python={python} cannot be started: {error.strerror}; give the path of a Python that has PyTorch."
            ) from None
        stack.enter_context(process)
        stack.callback(process.kill)  # before the stack waits for its end
        yield TorchProcess(python, process, errors, answer_s)
