"""Timing on noisy machines: rivals take turns within one run, ratios are medians over the turns."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax


def in_turns(rivals: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round, after one call that compiles. A rival returns arrays to wait for."""
    for call in rivals.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios round by round, in which a slow phase of the machine cancels."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def environment() -> dict[str, Any]:
    """What a number in a file needs beside it."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }
