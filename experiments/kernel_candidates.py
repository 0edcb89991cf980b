"""The candidates of a kernel benchmark: each pass of each implementation as a function of arrays, timed alike.

A candidate takes activations in the order it has in a model: the kernels feature-major, `[C, H, W, N]`; the dense
product and the dense fallback with the features innermost, `[N, H, W, C]` (a matrix: `[N, in]`), which is what cuDNN
and cuBLAS are fastest at.
"""

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsb_jax.layout import BlockLayout
from dsb_jax.ops.convolution import convolve
from dsb_jax.ops.dispatch import choose
from dsb_jax.ops.implementations import kernels_of
from dsb_jax.ops.native import loading
from experiments.kernel_shapes import Layer
from pallas_kernels import REFERENCE, Index, Kernels
from pallas_kernels.tiles import KernelTiles

PASSES = ("forward", "input_gradient", "weight_gradient")
GPU_KERNELS = ("pallas", "triton")
# The last is for a check without a GPU, not for speed.
IMPLEMENTATIONS = ("native", "xla", *GPU_KERNELS, "dense_fallback", "pallas_interpreted")
LEAST_SAMPLE_S = 5e-3  # a sample repeats its call until it is this long: the clock and the dispatch are noise then
MOST_REPEATS = 500
REFERENCE_BYTES = 1 << 28  # of an intermediate array of the reference

Function = Callable[..., jax.Array]


class Operands(NamedTuple):
    """What the kernels take: x[C, H, W, N], blocks[num_blocks, R, C'], dy[out, OH, OW, N]; arrays of jax or numpy.

    The index is that of the layout, with what products derive from it: a training step derives nothing.
    """

    x: Any
    blocks: Any
    index_arrays: Index
    dy: Any


class Call(NamedTuple):
    """One pass of one candidate: the function, its operands, and whether activations are `[N, ..., features]`.

    The operands of a weight gradient begin with x and dy.
    """

    function: Function
    operands: tuple[Any, ...]
    batch_first: bool = False


def unavailable(name: str) -> str | None:
    """Why an implementation cannot run here at all, or None if it can.

    Raises:
      ValueError: if there is none of that name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementations: {name!r} is unknown; choose of {', '.join(IMPLEMENTATIONS)}.")
    if name in GPU_KERNELS and not has_gpu():
        return f"needs a GPU, the backend is {jax.default_backend()}"
    if name == "native":
        return f"needs a CPU, the backend is {jax.default_backend()}" if has_gpu() else loading.unavailable_reason()
    try:
        if name in GPU_KERNELS:
            kernels_of(name)
    except (ImportError, NotImplementedError) as error:
        return f"not available: {error}"
    return None


def tiles_of(name: str, layer: Layer, layout: BlockLayout, dtype: Any) -> KernelTiles | None:
    """Tile sizes of a GPU kernel as the library takes them: from a tuned table, else the default; None if it has none.

    Raises:
      NotImplementedError: if the kernel cannot serve the layer.
    """
    if name not in GPU_KERNELS:
        return None
    choice = choose(
        name, layout, geometry=layer.geometry, input_size=layer.input_size, batch=layer.batch, dtype=dtype
    )  # fmt: skip
    return choice.tiles or KernelTiles()


def default_implementations() -> tuple[str, ...]:
    """What the backend has."""
    if has_gpu():
        return ("pallas", "triton", "dense_fallback")
    return ("xla",) if loading.unavailable_reason() else ("native", "xla")


def has_gpu() -> bool:
    """Whether jax computes on one."""
    return jax.default_backend() == "gpu"


def calls_of(name: str, layer: Layer, operands: Operands, tiles: KernelTiles | None) -> dict[str, Call]:
    """The three passes of an implementation."""
    if name == "dense_fallback":  # blocks are unpacked into a kernel, then as in `dense_calls`
        return kernel_calls(kernels_of("dense", feature_major=False), layer, operands, batch_first=True)
    if name == "pallas_interpreted":
        module = importlib.import_module("pallas_kernels.pallas_gpu")
        return kernel_calls(module.pallas_kernels(interpret=True), layer, operands)
    return kernel_calls(kernels_of(name, tiles), layer, operands)


def kernel_calls(kernels: Kernels, layer: Layer, operands: Operands, *, batch_first: bool = False) -> dict[str, Call]:
    """The three passes of an array-level implementation, whose activations are [N, H, W, C] if `batch_first`."""
    x, blocks, index, dy = operands
    geometry = layer.geometry
    if batch_first:
        x, dy = (a.transpose(3, 1, 2, 0) for a in (x, dy))
    forward = functools.partial(kernels.forward, out=layer.out, geometry=geometry)
    input_gradient = functools.partial(kernels.input_gradient, geometry=geometry, input_size=layer.input_size)
    weight_gradient = functools.partial(kernels.weight_gradient, geometry=geometry, dtype=blocks.dtype)
    return {
        "forward": Call(forward, (x, blocks, index), batch_first),
        "input_gradient": Call(input_gradient, (dy, blocks, index), batch_first),
        "weight_gradient": Call(weight_gradient, (x, dy, index), batch_first),
    }


def _innermost(array: jax.Array, layer: Layer) -> jax.Array:
    """[C, H, W, N] -> [N, H, W, C], of a matrix [N, C]."""
    return array[:, 0, 0, :].T if layer.is_matmul else array.transpose(3, 1, 2, 0)


def _outermost(array: np.ndarray) -> np.ndarray:
    """The inverse of `_innermost`."""
    return array.T[:, None, None, :] if array.ndim == 2 else array.transpose(3, 1, 2, 0)


def _product_calls(product: Function, layer: Layer, x: jax.Array, dy: jax.Array, *weights: Any) -> dict[str, Call]:
    """The passes of `product(x, *weights)`, which is linear in x and in the first of the weights."""
    x, dy = _innermost(x, layer), _innermost(dy, layer)

    # The forward product inside of vjp is needed by neither gradient, so the compiler drops it.
    def input_gradient(x: jax.Array, dy: jax.Array, *weights: Any) -> jax.Array:
        return jax.vjp(lambda x: product(x, *weights), x)[1](dy)[0]

    def weight_gradient(x: jax.Array, dy: jax.Array, first: jax.Array, *rest: Any) -> jax.Array:
        return jax.vjp(lambda first: product(x, first, *rest), first)[1](dy)[0]

    return {
        "forward": Call(product, (x, *weights), batch_first=True),
        "input_gradient": Call(input_gradient, (x, dy, *weights), batch_first=True),
        "weight_gradient": Call(weight_gradient, (x, dy, *weights), batch_first=True),
    }


def dense_calls(layer: Layer, x: jax.Array, dy: jax.Array) -> dict[str, Call]:
    """The baseline: XLA's dense product with a plain kernel, in x's dtype. On a GPU that is cuBLAS or cuDNN."""
    kernel = jax.random.normal(jax.random.key(3), (layer.in_features, layer.out), x.dtype)
    if layer.is_matmul:
        return _product_calls(jnp.matmul, layer, x, dy, kernel)
    kernel = kernel.reshape(*layer.geometry.kernel_size, layer.geometry.in_channels, layer.out)
    product = functools.partial(convolve, geometry=layer.geometry, feature_major=False)
    return _product_calls(product, layer, x, dy, kernel)


@dataclasses.dataclass
class Timed:
    """A compiled call that is repeated to make a sample.

    Attributes:
      call: starts the work; what it returns can be waited for.
      inside: how often the pass runs within one call.
      repeats: calls of a sample, set by `calibrate`.
      wait: waits for a result; by default jax's.
    """

    call: Callable[[], Any]
    inside: int = 1
    repeats: int = 1
    wait: Callable[[Any], Any] = jax.block_until_ready

    def calibrate(self) -> None:
        """Compiles, and sets `repeats` by the time of a second call."""
        self.wait(self.call())
        begin = time.perf_counter()
        self.wait(self.call())
        seconds = max(time.perf_counter() - begin, 1e-6)
        self.repeats = min(MOST_REPEATS, math.ceil(LEAST_SAMPLE_S / seconds))

    def sample(self) -> None:
        """Runs the repeats. On a GPU they are queued and waited for once; a CPU would run some of them at a time."""
        one_by_one = jax.default_backend() == "cpu"
        result = None
        for _ in range(self.repeats):
            result = self.call()
            if one_by_one:
                self.wait(result)
        self.wait(result)

    @property
    def runs(self) -> int:
        """How often the pass runs in a sample."""
        return self.repeats * self.inside


def chained(function: Function) -> Callable[..., list[jax.Array]]:
    """Runs of a function in one dispatch, one after the other: a jitted function of one tuple of operands for each run.

    A kernel may take less time than its dispatch. Every run gets operands of its own (the same arrays, but the compiler
    does not know), so that none is merged with another, and a barrier keeps each behind the one before.
    """

    @jax.jit
    def run(*copies: tuple[Any, ...]) -> list[jax.Array]:
        results: list[jax.Array] = []
        for operands in copies:
            if results:
                results[-1], operands = lax.optimization_barrier((results[-1], operands))
            results.append(function(*operands))
        return results

    return run


@dataclasses.dataclass
class CompiledPass(Timed):
    """A pass of ours: `call` runs it `inside` times on the operands of `spec`, `run_on` on others."""

    spec: Call | None = None
    run_on: Callable[..., jax.Array] | None = None


def compiled(spec: Call, inside: int) -> CompiledPass:
    """Compiles a pass that runs `inside` times in one dispatch, and calibrates it."""
    run = chained(spec.function)
    timed = CompiledPass(functools.partial(run, *[spec.operands] * inside), inside, spec=spec)
    timed.run_on = lambda *operands: run(*[operands] * inside)[-1]
    timed.calibrate()
    return timed


def reference_results(layer: Layer, operands: Operands, count: int) -> dict[str, np.ndarray]:
    """The three passes over the first `count` examples by the reference, in float32."""

    @jax.jit
    def run(operands: Operands) -> dict[str, jax.Array]:
        x, dy = operands.x[..., :count].astype(jnp.float32), operands.dy[..., :count].astype(jnp.float32)
        part = Operands(x, operands.blocks.astype(jnp.float32), operands.index_arrays, dy)
        calls = kernel_calls(REFERENCE, layer, part)
        return {name: call.function(*call.operands, precision="highest") for name, call in calls.items()}

    return {name: np.asarray(result) for name, result in run(operands).items()}


def reference_count(layer: Layer, operands: Operands) -> int:
    """How many examples the reference takes without an intermediate array beyond `REFERENCE_BYTES`."""
    num_blocks, rows, cols = operands.blocks.shape
    each = 4 * max(num_blocks * max(rows, cols), layer.in_features) * layer.positions // layer.batch
    return max(1, min(layer.batch, REFERENCE_BYTES // each))


def error_of(pass_name: str, timed: CompiledPass, wanted: np.ndarray, count: int) -> float:
    """Largest deviation of a pass from the reference over the first `count` examples, over the largest entry.

    What is timed is what is checked, at its full size. An activation is compared in its first examples; the gradient of
    the weights, a sum over all examples, is taken with dy zero beyond them.
    """
    spec, run = timed.spec, timed.run_on
    assert spec is not None
    assert run is not None
    # Slices are taken by numpy: the arrays are few, and each slice on the device would be compiled.
    if pass_name == "weight_gradient":
        x, dy, *rest = spec.operands
        first = np.array(dy)
        first[(slice(count, None),) if spec.batch_first else (..., slice(count, None))] = 0
        got = np.asarray(run(x, jnp.asarray(first), *rest))
    else:
        result = np.asarray(run(*spec.operands))
        got = (_outermost(result) if spec.batch_first else result)[..., :count]
    got = got.astype(np.float32)
    return float(np.max(np.abs(got - wanted)) / max(float(np.max(np.abs(wanted))), 1e-30))
