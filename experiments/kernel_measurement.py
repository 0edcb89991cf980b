"""Measures one layer after the other: passes in turns, their bounds, their errors, and where sparse begins to pay."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from dsb_jax.layout import random_layout
from dsb_jax.topology import kernel_index
from experiments import kernel_peers, timing
from experiments.kernel_bounds import Device, bound, break_even
from experiments.kernel_candidates import (
    PASSES,
    Call,
    CompiledPass,
    Operands,
    Timed,
    calls_of,
    compiled,
    dense_calls,
    error_of,
    reference_count,
    reference_results,
    tiles_of,
)
from experiments.kernel_shapes import Layer

BOTH = "forward_backward"
MOST_INSIDE = 16  # runs within one dispatch: each of them is compiled
LEAST_DISPATCH_S = 3e-4
# Largest deviation over the largest entry. A GPU multiplies float32 in TF32, of 10 bits; bfloat16 has 8.
TOLERANCES = {("cpu", "float32"): 1e-4, ("gpu", "float32"): 5e-3, ("cpu", "bfloat16"): 1e-2, ("gpu", "bfloat16"): 1e-2}

Passes = TypeVar("Passes", bound=Mapping[str, Timed])


@dataclasses.dataclass
class Bench:
    """What all measurements share.

    Attributes:
      dtype: name of the dtype of activations and weights.
      rounds: turns.
      implementations, peers: names of what is measured.
      device: its measured limits.
      deadline: `time.monotonic` after which nothing new begins.
      failures: what was off or broke, one line each.
      left_out: what was not measured, and why.
    """

    dtype: str
    rounds: int
    implementations: Sequence[str]
    peers: Sequence[str]
    device: Device
    deadline: float = math.inf
    failures: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def inside(self, seconds: float) -> int:
        """How often a pass of at least so many seconds runs within one dispatch."""
        if jax.default_backend() == "cpu":
            return 1
        return max(1, min(MOST_INSIDE, math.ceil(LEAST_DISPATCH_S / seconds)))

    def attempt(self, make: Callable[[], Passes], where: str, *, ours: bool = True) -> Passes | str:
        """The compiled passes of a candidate, or why there are none; what breaks of ours is a failure, too."""
        try:
            return make()
        except NotImplementedError as reason:
            return f"not served: {reason}"
        except Exception as error:  # one kernel that breaks must not take the other measurements along
            message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if ours:
                self.failures.append(f"{where}: {message}")
            return message

    def check(self, passes: Mapping[str, CompiledPass], wanted: Mapping[str, Any], count: int, where: str
              ) -> dict[str, float | None]:  # fmt: skip
        """Relative error of each pass (None: not a number); those beyond the tolerance are failures."""
        tolerance = TOLERANCES["cpu" if jax.default_backend() == "cpu" else "gpu", self.dtype]
        errors: dict[str, float | None] = {}
        for name, timed in passes.items():
            error = error_of(name, timed, wanted[name], count)
            errors[name] = error if math.isfinite(error) else None
            if not error <= tolerance:
                self.failures.append(f"{where}, {name}: relative error {error:.1e}, tolerated {tolerance:.0e}")
        return errors


def measure_layer(
    bench: Bench, layer: Layer, block_shapes: Sequence[tuple[int, int]], sparsities: Sequence[float]
) -> list[dict[str, Any]]:
    """Results of one layer, one for each block shape, sparsity and implementation that could be measured."""
    subject: _Subject | None = None
    results: list[dict[str, Any]] = []
    for block_shape in block_shapes:
        for sparsity in sparsities:
            where = f"{layer}, {block_shape[0]}x{block_shape[1]}, {sparsity:g}"
            if time.monotonic() > bench.deadline:
                bench.left_out.append(f"{where}: time limit")
                continue
            try:
                layer.num_blocks(sparsity, block_shape)
            except ValueError as reason:
                bench.left_out.append(f"{where}: {reason}")
                continue
            subject = subject or _Subject(bench, layer)
            if isinstance(subject.dense, str):
                bench.left_out.append(f"{layer}: no dense product to compare with")
                return results
            results += subject.measure(sparsity, block_shape, where)
    return results


class _Subject:
    """A layer with its activations and the dense candidate, which all block shapes and sparsities share."""

    def __init__(self, bench: Bench, layer: Layer) -> None:
        self.bench, self.layer = bench, layer
        x_key, dy_key = jax.random.split(jax.random.key(0))
        self.x = jax.random.normal(x_key, (layer.geometry.in_channels, *layer.input_size, layer.batch), bench.dtype)
        self.dy = jax.random.normal(dy_key, (layer.out, *layer.output_size, layer.batch), bench.dtype)
        self.dense_bound = bound(layer, layer.out * layer.in_features, 0, self.x.dtype.itemsize, bench.device)
        self.inside = bench.inside(self.dense_bound)
        self.dense: Any = bench.attempt(lambda: self._compiled(dense_calls(layer, self.x, self.dy)), f"{layer}, dense")

    def _compiled(self, calls: Mapping[str, Call]) -> dict[str, CompiledPass]:
        return {name: compiled(call, self.inside) for name, call in calls.items()}

    def measure(self, sparsity: float, block_shape: tuple[int, int], where: str) -> list[dict[str, Any]]:
        """One result for each implementation and peer: numbers, or a note why there are none."""
        bench, layer, key = self.bench, self.layer, jax.random.key(1)
        num_blocks = layer.num_blocks(sparsity, block_shape)
        sizes: dict[str, Any] = {"shape": (layer.out, layer.in_features), "block_shape": block_shape}
        layout = jax.jit(functools.partial(random_layout, num_blocks=num_blocks, **sizes))(key)
        index = layout.index._replace(derived=kernel_index(layout, layer.call(sparsity, block_shape, bench.dtype).spec))
        operands = Operands(self.x, jax.random.normal(key, (num_blocks, *block_shape), bench.dtype), index, self.dy)
        tiles: dict[str, Any] = {}

        def ours(name: str) -> dict[str, CompiledPass]:
            tiles[name] = tiles_of(name, layer, layout, bench.dtype)
            return self._compiled(calls_of(name, layer, operands, tiles[name]))

        def theirs(name: str) -> dict[str, Timed]:
            passes = kernel_peers.peer_passes(name, layer, num_blocks, block_shape, bench.dtype)
            for timed in passes.values():
                timed.calibrate()
            return passes

        found: dict[str, Any] = {
            name: bench.attempt(functools.partial(ours, name), f"{where}, {name}") for name in bench.implementations
        }
        for name in bench.peers:
            found[name] = bench.attempt(functools.partial(theirs, name), f"{where}, {name}", ours=False)
        candidates = {name: passes for name, passes in found.items() if not isinstance(passes, str)}
        times = time_in_turns({"dense": self.dense, **candidates}, bench.rounds)
        errors: dict[str, Any] = {}
        if checked := [name for name in bench.implementations if name in candidates]:
            count = reference_count(layer, operands)
            wanted = reference_results(layer, operands, count)
            errors = {name: bench.check(candidates[name], wanted, count, f"{where}, {name}") for name in checked}
        index_bytes = sum(array.nbytes for array in index[:3])
        least = bound(layer, operands.blocks.size, index_bytes, self.x.dtype.itemsize, bench.device)
        operations = 2 * operands.blocks.size * layer.positions
        common = {
            "layer": str(layer), "names": list(layer.names), "out": layer.out, "in": layer.in_features,
            "positions": layer.positions, "block_shape": f"{block_shape[0]}x{block_shape[1]}", "sparsity": sparsity,
            "num_blocks": num_blocks, "density": layout.density, "bound_s": least, "dense_bound_s": self.dense_bound,
        }  # fmt: skip
        results = []
        for name, passes in found.items():
            result = {**common, "implementation": name}
            if isinstance(passes, str):
                results.append({**result, "note": passes})
                continue
            result["tiles"] = dataclasses.asdict(tiles[name]) if tiles.get(name) else None
            result["speedup"] = speedups(times["dense"], times[name])
            result["passes"] = {
                p: {
                    "s": (seconds := statistics.median(taken)),
                    "dense_s": (dense_seconds := statistics.median(times["dense"][p])),
                    "bound_fraction": least / seconds,
                    "core_peak_fraction": bench.device.core_peak and operations / seconds / bench.device.core_peak,
                    "dense_bound_fraction": self.dense_bound / dense_seconds,
                    "max_relative_error": errors.get(name, {}).get(p),
                }
                for p, taken in times[name].items()
            }
            results.append(result)
        return results


def time_in_turns(candidates: Mapping[str, Mapping[str, Timed]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one execution of each pass of each candidate, in each round."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in candidates}
    for name in PASSES:
        samples = {candidate: passes[name] for candidate, passes in candidates.items() if name in passes}
        taken = timing.in_turns({candidate: timed.sample for candidate, timed in samples.items()}, rounds)
        for candidate, timed in samples.items():
            times[candidate][name] = [seconds / timed.runs for seconds in taken[candidate]]
    return times


def speedups(dense: Mapping[str, list[float]], sparse: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of dense over sparse for each pass, and for the three together where there are three."""
    ratios = {name: timing.median_ratio(dense[name], times) for name, times in sparse.items()}
    if len(sparse) == len(PASSES):
        dense_sums, sparse_sums = (
            [sum(turn) for turn in zip(*(times[name] for name in PASSES), strict=True)] for times in (dense, sparse)
        )
        ratios[BOTH] = timing.median_ratio(dense_sums, sparse_sums)
    return ratios


def break_even_points(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The break-even sparsity of each layer, block shape and implementation: of forward, and of the three passes."""
    series: dict[tuple[str, str, str], dict[float, dict[str, float]]] = {}
    for result in results:
        if "speedup" in result:
            key = result["layer"], result["block_shape"], result["implementation"]
            series.setdefault(key, {})[result["sparsity"]] = result["speedup"]
    points = []
    for (layer, block_shape, implementation), by_sparsity in series.items():
        point: dict[str, Any] = {"layer": layer, "block_shape": block_shape, "implementation": implementation}
        for name in ("forward", BOTH):
            if all(name in found for found in by_sparsity.values()):
                point[name] = break_even(list(by_sparsity), [found[name] for found in by_sparsity.values()])
        points.append(point)
    return points
