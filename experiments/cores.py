"""How many cores a measurement may use: this process, its threads, and the processes that it starts."""

import os

import jax


def available() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        return available()
    if not hasattr(os, "sched_setaffinity"):
        raise NotImplementedError(f"cores={cores}: this system cannot keep a process on some cores; leave it out.")
    mine = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(mine):
        raise ValueError(f"cores={cores}, but this process may run on {len(mine)}; give 1 to {len(mine)}.")
    os.sched_setaffinity(0, mine[:cores])
    if folder := jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{folder}-{cores}-cores")
    return cores
