"""How many cores a measurement may use: this process, its threads, and the processes that it starts."""

import os
from pathlib import Path

import jax

from dsb_jax.ops.cpu_model import available_cores

_POOL = "Eigen"  # in the names of the threads that XLA computes with


def use(cores: int | None) -> int:
    """Keeps this process on so many cores; to be called before jax computes anything, when XLA makes its threads.

    What XLA compiles depends on the number of cores (into how many parts a loop is cut), the key of its cache does not:
    programs for fewer cores are kept in a folder of their own.

    Args:
      cores: None for all that it may run on.

    Returns:
      Their number.

    Raises:
      ValueError: if there are not so many.
      NotImplementedError: where the system cannot do so.
    """
    if cores is None:
        _spread()
        return available_cores()
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError(f"cores={cores}: this system cannot keep a process on some cores; leave it out.")
    mine = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(mine):
        raise ValueError(f"cores={cores}, but this process may run on {len(mine)}; give 1 to {len(mine)}.")
    os.sched_setaffinity(0, mine[:cores])
    _spread()
    if folder := jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{folder}-{cores}-cores")
    return cores


def _spread() -> None:
    """Keeps each of XLA's threads on a core of its own, as `OMP_PROC_BIND` does with those of PyTorch.

    On a virtual machine that had been up for hours, the system kept two of them on one core for minutes while the other
    core stood idle, and a step took twice as long.
    """
    if not hasattr(os, "sched_setaffinity") or jax.default_backend() != "cpu":  # the threads come with the backend
        return
    mine = sorted(os.sched_getaffinity(0))
    threads = sorted(int(task.name) for task in Path("/proc/self/task").glob("*") if _POOL in _name_of(task))
    for number, thread in enumerate(threads):
        os.sched_setaffinity(thread, {mine[number % len(mine)]})


def _name_of(task: Path) -> str:
    """Of a thread, which may have ended since it was listed; those of the pool never do."""
    try:
        return (task / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
