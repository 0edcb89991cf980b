"""Timing on noisy machines: candidates take turns in one program, ratios are medians over the turns."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax


def in_turns(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    self_timed: Mapping[str, Callable[[], float]] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one call that compiles. A candidate returns arrays to wait for.

    Before each timed call stands one of the same candidate that is not timed, as in the loop it stands for: right after
    another program a training step was seen to take up to 7 % longer, for the memory that it finds.

    Args:
      candidates: by name.
      rounds: turns of each.
      self_timed: candidates in other processes, which do the same there and return the seconds; the last in a round.
    """
    for call in candidates.values():
        jax.block_until_ready(call())
    for timed in self_timed.values():
        timed()
    times: dict[str, list[float]] = {name: [] for name in (*candidates, *self_timed)}
    for _ in range(rounds):
        for name, call in candidates.items():
            jax.block_until_ready(call())
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
        for name, timed in self_timed.items():
            times[name].append(timed())
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios round by round, in which a slow phase of the machine cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def milliseconds(seconds: float | None) -> str:
    """In a table: three digits, and all before the point, such as 0.42 ms, 57.3 ms, 1140 ms; "-" for None."""
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def environment(**versions: str) -> dict[str, Any]:
    """What a number in a file needs beside it; `versions` of packages that are not installed here."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        **versions,
    }


def results_path(json_flag: str | None) -> Path | None:
    """Where the results go; refused before anything is measured if it cannot be.

    Raises:
      ValueError: if the folder does not exist.
    """
    if json_flag is None:
        return None
    path = Path(json_flag)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"json={json_flag}: there is no folder {path.parent}; make it first.")
    return path


def write_results(path: Path, settings: dict[str, Any], results: list[dict[str, Any]], **versions: str) -> None:
    """Writes the results with what is needed to repeat them: command, settings, environment with `versions`."""
    program = Path(sys.argv[0]).stem
    command = f"python -m experiments.{program} " + " ".join(sys.argv[1:])
    body = {"command": command, "environment": environment(**versions), **settings, "results": results}
    path.write_text(json.dumps(body, indent=1) + "\n")
