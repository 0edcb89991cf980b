"""One layer at a time: its passes as calls that can be timed, the fastest tiles, its implementations against dense."""

import concurrent.futures
import functools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsb_jax.layout import BlockLayout, random_layout
from dsb_jax.ops import Choice, sparse_conv, sparse_matmul
from dsb_jax.ops.dispatch import unsupported_reason
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.tuning import Result
from experiments import timing
from pallas_kernels import Kernels
from pallas_kernels.tiles import KernelTiles, Tiles

# The sparse implementations that are worth timing, by backend.
SPARSE_IMPLEMENTATIONS = {"cpu": ("xla",), "gpu": ("pallas", "triton")}
# Around the defaults: fewer and more positions, wider steps, more threads, other depths of the pipeline.
CANDIDATES = (
    Tiles(128, 32, 4, 3),
    Tiles(64, 32, 4, 3),
    Tiles(256, 32, 8, 3),
    Tiles(128, 64, 4, 3),
    Tiles(128, 64, 8, 4),
    Tiles(64, 64, 4, 4),
)
TOLERANCE = 0.03  # of results against dense ones, in the Frobenius norm: bfloat16 is off by 0.01, a wrong kernel by 1
Factory = Callable[[KernelTiles], Kernels]
Call = functools.partial[Any]  # a jitted function with all of its arguments


class Untunable(Exception):
    """An implementation that this device or layer is not for, with the reason."""


def repeated(call: Callable[..., Any], repeats: int) -> Any:
    """`call(*arrays, index)`, compiled, so many times on the device in one go: short passes drown in the launch.

    Each pass waits for the one before: its index is shifted by whether the last results held NaN, which a compiler
    cannot know to be never. Otherwise it would compute a loop's constant body once.
    """
    if repeats == 1:
        return jax.jit(call)

    @jax.jit
    def run(*arguments: Any) -> Any:
        *arrays, (out_idx, in_idx, group_start) = arguments

        def body(_: Any, results: Any) -> Any:
            token = sum(leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(results))
            moved = in_idx + (token != token).astype(in_idx.dtype)
            return call(*arrays, (out_idx, moved, group_start))

        shapes = jax.eval_shape(call, *arguments)
        return lax.fori_loop(0, repeats, body, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    return run


class Example:
    """Random arrays of one layer, and its passes as calls without arguments.

    Attributes:
      layout: a random one.
      x: [C, H, W, N].
      blocks: [num_blocks, R, C].
      index: `(out_idx, in_idx, group_start)`, as kernels take it.
      repeats: how often a call computes its pass.
    """

    def __init__(self, layer: LayerCall, repeats: int) -> None:
        self.layer, self.repeats = layer, repeats
        x_key, block_key, layout_key = jax.random.split(jax.random.key(0), 3)
        dtype = jnp.dtype(layer.dtype)
        spec = layer.spec
        self.layout = random_layout(layout_key, spec.shape, block_shape=spec.block_shape, num_blocks=spec.num_blocks)
        self.x = jax.random.normal(x_key, (spec.c_in, *layer.input_size, layer.batch), dtype)
        blocks = jax.random.normal(block_key, (spec.num_blocks, *spec.block_shape))
        self.blocks = (blocks * (layer.density * spec.in_) ** -0.5).astype(dtype)  # outputs of order one
        self.index = self.layout.index

    def training_pass(self, implementation: str, tiles: KernelTiles | None) -> Call:
        """Forward and backward: y, gradients of x and of the blocks.

        Dense takes its activations with the batch first, as in a model that is mostly dense: the form XLA is best at.
        """
        layer, dense = self.layer, implementation == "dense"
        choice = Choice(implementation, "to be timed", tiles)
        options: dict[str, Any] = {"implementation": choice, "feature_major": not dense}

        def product(x: jax.Array, blocks: jax.Array, layout: BlockLayout) -> jax.Array:
            if layer.is_linear:
                return sparse_matmul(x, blocks, layout, **options)
            return sparse_conv(x, blocks, layout, geometry=layer.geometry, **options)

        def call(x: jax.Array, blocks: jax.Array, index: Any) -> Any:
            out_idx, in_idx, group_start = index
            layout = BlockLayout(out_idx, in_idx, group_start, layer.spec.shape, layer.spec.block_shape)
            y, backward = jax.vjp(lambda x, blocks: product(x, blocks, layout), x, blocks)
            return y, *backward(y)

        x = self.x.reshape(layer.spec.c_in, layer.batch) if layer.is_linear else self.x
        x = jnp.moveaxis(x, (0, -1), (-1, 0)) if dense else x
        return functools.partial(repeated(call, self.repeats), x, self.blocks, self.index)

    def one_pass(self, name: str, kernels: Kernels) -> Call:
        """One of the three passes of an implementation: "forward", "input_gradient" or "weight_gradient"."""
        layer, geometry = self.layer, self.layer.geometry
        dy = jnp.ones((layer.spec.out, *geometry.output_size(*layer.input_size), layer.batch), self.x.dtype)
        first, second, options = {
            "forward": (self.x, self.blocks, {"out": layer.spec.out}),
            "input_gradient": (dy, self.blocks, {"input_size": layer.input_size}),
            "weight_gradient": (self.x, dy, {"dtype": self.blocks.dtype}),
        }[name]
        call = functools.partial(getattr(kernels, name), geometry=geometry, **options)  # type: ignore[arg-type]
        return functools.partial(repeated(call, self.repeats), first, second, self.index)


def factory_of(implementation: str) -> Factory | None:
    """Makes the kernels of an implementation from tiles; None if it has no tiles.

    Raises:
      Untunable: if the kernels cannot be imported.
    """
    try:
        if implementation == "pallas":
            from pallas_kernels.pallas_gpu import pallas_kernels

            return pallas_kernels
        if implementation == "triton":
            from pallas_kernels.triton_gpu import triton_kernels

            return triton_kernels
    except ImportError as error:
        raise Untunable(str(error)) from error
    return None


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


def tune_tiles(
    example: Example, factory: Factory, rounds: int, candidates: Iterable[Tiles] = CANDIDATES
) -> KernelTiles:
    """The fastest tiles of each pass, by medians over turns.

    Raises:
      Untunable: if a pass runs with none of them.
    """
    named = {f"{name} {tiles}": (name, tiles) for name in Kernels._fields for tiles in candidates}
    calls, said = try_out(
        {key: example.one_pass(name, factory(KernelTiles(**{name: tiles}))) for key, (name, tiles) in named.items()}
    )
    best: dict[str, Any] = {}
    for name in Kernels._fields:
        times = timing.in_turns({key: call for key, call in calls.items() if named[key][0] == name}, rounds)
        if not times:
            raise Untunable(f"no tiles serve its {name}: {said}")
        best[name] = named[min(times, key=lambda key: statistics.median(times[key]))][1]
    return KernelTiles(**best)


def error_of(results: Any, dense: Any) -> float:
    """The largest relative error of y, dx and d_blocks against those of dense, in the Frobenius norm."""
    errors = []
    for got, right, moved in zip(results, dense, (True, True, False), strict=True):
        right = jnp.moveaxis(right, (0, -1), (-1, 0)) if moved else right
        got, right = got.astype(jnp.float32), right.astype(jnp.float32)
        errors.append(float(jnp.linalg.norm((got - right).ravel()) / jnp.linalg.norm(right.ravel())))
    return max(errors, key=lambda e: (e != e, e))  # a NaN is the largest


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
    """Dense and every implementation that serves the layer, fastest first.

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
    candidates = {"dense": example.training_pass("dense", None)}
    right = candidates["dense"]()
    chosen: dict[str, KernelTiles | None] = {"dense": None}
    for name in SPARSE_IMPLEMENTATIONS[backend]:
        try:
            if unsupported := unsupported_reason(name, layer, backend):
                raise Untunable(unsupported)
            factory = factory_of(name)
            if factory is not None and tiles != "default":
                key = name, layer if tiles == "each" else layer.with_density(1.0)
                if key not in known:
                    known[key] = tune_tiles(example, factory, rounds)
                chosen[name] = known[key]
            good, said = try_out({name: example.training_pass(name, chosen.get(name))})
            if not good:
                raise Untunable(said)
            if not (error := error_of(good[name](), right)) <= TOLERANCE:
                raise Untunable(f"its results are off by {error:.2g} of their norm")
        except Untunable as reason:
            say(f"{layer}: {name} left out: {reason}")
        else:
            candidates |= good
    times = timing.in_turns(candidates, rounds)
    dense_s = statistics.median(times["dense"]) / repeats
    # Ratios round by round are steadier than medians of seconds, and they are what "auto" reads.
    ratios = {name: timing.median_ratio(times[name], times["dense"]) for name in candidates}
    results = [Result(name, dense_s * ratio, chosen.get(name)) for name, ratio in ratios.items()]
    return tuple(sorted(results, key=lambda result: result.seconds))
