"""One layer at a time: its passes as calls that can be timed, the fastest tiles, its implementations against dense."""

import concurrent.futures
import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.layout import random_layout
from dsb_jax.ops.dispatch import GPU_KERNELS, unsupported_reason
from dsb_jax.ops.implementations import kernels_of, take_batch_major
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.tuning import Result
from dsb_jax.topology import kernel_index
from experiments import timing
from pallas_kernels.interface import Kernels, Passes
from pallas_kernels.tiles import KernelTiles, Tiles

# The sparse implementations that are worth timing, by backend.
SPARSE_IMPLEMENTATIONS = {"cpu": ("native", "xla"), "gpu": ("pallas", "triton")}
# Around the defaults: fewer and more positions, wider steps, more threads, other depths of the pipeline. Where indices
# take 4 bytes (more than 65,536 columns), 5 stages are the first that load two steps ahead.
CANDIDATES = Passes(
    forward=(
        Tiles(128, 32, 4, 3),
        Tiles(128, 32, 4, 5),
        Tiles(64, 32, 4, 3),
        Tiles(256, 32, 8, 3),
        Tiles(128, 64, 4, 3),
        Tiles(128, 64, 8, 4),
    ),
    input_gradient=(
        Tiles(128, 32, 4, 3),
        Tiles(128, 32, 4, 5),
        Tiles(64, 32, 4, 3),
        Tiles(256, 32, 8, 3),
        Tiles(128, 64, 4, 3),
    ),
    weight_gradient=(
        Tiles(64, 128, 4, 3),
        Tiles(64, 128, 8, 3),
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 5),
        Tiles(128, 64, 8, 3),
        Tiles(64, 32, 4, 3),
    ),
)
TOLERANCE = 0.03  # of results against dense ones, in the Frobenius norm: bfloat16 is off by 0.01, a wrong kernel by 1
Factory = Callable[[KernelTiles], Kernels]
Call = functools.partial[Any]  # a jitted function with all of its arguments


class Untunable(Exception):
    """An implementation that this device or layer is not for, with the reason."""


def repeated(call: Callable[..., Any], repeats: int) -> Any:
    """`call(*arrays, index)`, compiled, so many times on the device in one go: short passes drown in the launch.

    Each pass waits for the one before: some of its index is shifted by whether the last result held NaN, which a
    compiler cannot know to be never. Otherwise it would compute a loop's constant body once. What is shifted is small,
    and every pass of every implementation reads one of the two.
    """
    if repeats == 1:
        return jax.jit(call)

    @jax.jit
    def run(*arguments: Any) -> Any:
        *arrays, index = arguments

        def body(_: Any, result: Any) -> Any:
            token = result[(0,) * result.ndim].astype(jnp.float32)
            shift, place = (token != token).astype(jnp.int32), index.derived.row_place
            derived = dataclasses.replace(index.derived, row_place=place + shift.astype(place.dtype))
            return call(*arrays, index._replace(out_idx=index.out_idx + shift, derived=derived))

        shape = jax.eval_shape(call, *arguments)
        return lax.fori_loop(0, repeats, body, jnp.zeros(shape.shape, shape.dtype))

    return run


class Example:
    """Random arrays of one layer, and its passes as calls without arguments.

    Attributes:
      x: [C, H, W, N].
      dy: [out, OH, OW, N].
      blocks: [num_blocks, R, C].
      index: of a random layout, with what products derive from it.
      repeats: how often a call computes its pass.
    """

    def __init__(self, layer: LayerCall, repeats: int) -> None:
        self.layer, self.repeats = layer, repeats
        x_key, dy_key, block_key, layout_key = jax.random.split(jax.random.key(0), 4)
        dtype, spec = jnp.dtype(layer.dtype), layer.spec
        out_size = layer.geometry.output_size(*layer.input_size)
        self.x = jax.random.normal(x_key, (spec.c_in, *layer.input_size, layer.batch), dtype)
        self.dy = jax.random.normal(dy_key, (spec.out, *out_size, layer.batch), dtype)
        blocks = jax.random.normal(block_key, (spec.num_blocks, *spec.block_shape))
        self.blocks = (blocks * (layer.density * spec.in_) ** -0.5).astype(dtype)  # outputs of order one
        layout = random_layout(layout_key, spec.shape, block_shape=spec.block_shape, num_blocks=spec.num_blocks)
        self.index = layout.index._replace(derived=kernel_index(layout, spec))

    def one_pass(self, name: str, kernels: Kernels, *, feature_major: bool = True) -> Call:
        """One of the three passes of an implementation: "forward", "input_gradient" or "weight_gradient"."""
        layer = self.layer
        x, dy = (a if feature_major else jnp.moveaxis(a, (0, -1), (-1, 0)) for a in (self.x, self.dy))
        first, second, options = {
            "forward": (x, self.blocks, {"out": layer.spec.out}),
            "input_gradient": (dy, self.blocks, {"input_size": layer.input_size}),
            "weight_gradient": (x, dy, {"dtype": self.blocks.dtype}),
        }[name]
        call = functools.partial(getattr(kernels, name), geometry=layer.geometry, **options)  # type: ignore[arg-type]
        return functools.partial(repeated(call, self.repeats), first, second, self.index)

    def is_feature_major(self, implementation: str) -> bool:
        """What takes activations with the batch first gets them so, as a model that is mostly dense has them."""
        layer = self.layer
        return not take_batch_major([implementation], layer.geometry, layer.input_size, layer.batch)

    def passes(self, implementation: str, tiles: KernelTiles | None) -> dict[str, Call]:
        """The three passes of an implementation."""
        feature_major = self.is_feature_major(implementation)
        kernels = kernels_of(implementation, tiles, feature_major=feature_major)
        return {name: self.one_pass(name, kernels, feature_major=feature_major) for name in Kernels._fields}

    def result(self, implementation: str, call: Call) -> jax.Array:
        """What a pass of `passes` computes, in float32; activations as [C, H, W, N]."""
        result = call().astype(jnp.float32)
        turned = result.ndim == 4 and not self.is_feature_major(implementation)
        return jnp.moveaxis(result, (0, -1), (-1, 0)) if turned else result


def try_out(calls: Mapping[str, Call]) -> tuple[dict[str, Call], str]:
    """The calls that compile and run, compiled (in parallel: it takes most of the time), and what another one said."""
    good, said = {}, ""

    def compiled(call: Call) -> Call:
        jitted: Any = call.func
        return functools.partial(jitted.lower(*call.args).compile(), *call.args)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = {name: pool.submit(compiled, call) for name, call in calls.items()}
        for name, future in compiling.items():
            # Tiles that a GPU has no registers or shared memory for fail in many ways, by layer of the compiler.
            try:
                call = future.result()
                jax.block_until_ready(call())
            except Exception as error:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                good[name] = call
    return good, said


def tune_tiles(example: Example, factory: Factory, rounds: int, candidates: Passes = CANDIDATES) -> KernelTiles:
    """The fastest tiles of each pass, by medians over turns.

    Raises:
      Untunable: if a pass runs with none of them.
    """
    best: dict[str, Any] = {}
    for name, of_pass in candidates._asdict().items():
        named = {str(tiles): tiles for tiles in of_pass}
        calls, said = try_out(
            {key: example.one_pass(name, factory(KernelTiles(**{name: tiles}))) for key, tiles in named.items()}
        )
        times = timing.in_turns(calls, rounds)
        if not times:
            raise Untunable(f"no tiles serve its {name}: {said}")
        best[name] = named[min(times, key=lambda key: statistics.median(times[key]))]
    return KernelTiles(**best)


def error_of(result: jax.Array, dense: jax.Array) -> float:
    """The relative error of a pass against that of dense, in the Frobenius norm."""
    return float(jnp.linalg.norm((result - dense).ravel()) / jnp.linalg.norm(dense.ravel()))


def measure(
    layer: LayerCall,
    backend: str,
    *,
    rounds: int,
    repeats: int,
    tiles: str,
    known: MutableMapping[Any, KernelTiles],
    say: Callable[[str], None],
) -> tuple[Result, ...]:
    """The passes of dense and of every implementation that serves the layer, the fastest of them first.

    Args:
      layer: exact sizes.
      backend: of this process.
      rounds: turns that are timed.
      repeats: passes in one timing.
      tiles: "each": tuned for this layer; "once": for its first sparsity; "default": as the kernels choose.
      known: tuned tiles of earlier layers, added to.
      say: is told what is left out, and why.
    """
    example = Example(layer, repeats)
    dense, _ = try_out(example.passes("dense", None))
    right = {name: example.result("dense", call) for name, call in dense.items()}
    candidates = {"dense": dense}
    chosen: dict[str, KernelTiles | None] = {"dense": None}
    for name in SPARSE_IMPLEMENTATIONS[backend]:
        try:
            if unsupported := unsupported_reason(name, layer, backend):
                raise Untunable(unsupported)
            if name in GPU_KERNELS and tiles != "default":
                key = name, layer if tiles == "each" else layer.with_density(1.0)
                if key not in known:
                    factory = functools.partial(kernels_of, name)
                    known[key] = tune_tiles(example, factory, rounds)
                chosen[name] = known[key]
            passes, said = try_out(example.passes(name, chosen.get(name)))
            if len(passes) < len(Kernels._fields):
                raise Untunable(said)
            for of, call in passes.items():
                if not (error := error_of(example.result(name, call), right[of])) <= TOLERANCE:
                    raise Untunable(f"its {of} is off by {error:.2g} of its norm")
        except (Untunable, ImportError, NotImplementedError) as reason:
            say(f"{layer}: {name} left out: {reason}")
        else:
            candidates[name] = passes
    seconds: dict[str, dict[str, float]] = {name: {} for name in candidates}
    for of in Kernels._fields:
        times = timing.in_turns({name: passes[of] for name, passes in candidates.items()}, rounds)
        dense_s = statistics.median(times["dense"]) / repeats
        for name in candidates:
            # Ratios round by round are steadier than medians of seconds, and they are what "auto" reads.
            seconds[name][of] = dense_s * timing.median_ratio(times[name], times["dense"])
    results = [Result(name, Passes(**each), chosen.get(name)) for name, each in seconds.items()]
    return tuple(sorted(results, key=lambda result: sum(result.seconds)))
