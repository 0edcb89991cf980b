"""Checks some cases of `experiments.gpu_smoke` in this process: a kernel against the reference, and the time of a call.

    python -m experiments.gpu_smoke_case --cases='bfloat16 64x4 2048x2048x2048 forward' --lines=FILE

The reference computes in float32 on the CPU, where it needs no GPU compiler and knows nothing of TF32.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsb_jax.layout import BlockLayout, column_dtype
from experiments import program
from experiments.gpu_smoke import SPARSITY, Case, append, parse_case
from experiments.kernel_candidates import Call, Operands, kernel_calls
from experiments.kernel_shapes import parse_layer
from pallas_kernels import REFERENCE, Kernels
from pallas_kernels.pallas_gpu import pallas_kernels

FLAGS = flags.FLAGS
# Of the largest entry of the result: TF32 has 10 bits, bfloat16 8.
TOLERANCES = {"bfloat16": 1e-2, "float32": 5e-3}
LEAST_SAMPLE_S = 2e-3
MOST_CALLS = 200
SAMPLES = 5
DIES = 7  # exit code of a case that dies on purpose


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("cases", None, "Cases, as experiments.gpu_smoke writes them, with commas.", required=True)
    flags.DEFINE_string("lines", None, "Append the lines to this file.", required=True)
    flags.DEFINE_bool("one_by_one", False, "Compile each case when the one before is done.")
    flags.DEFINE_bool("compile_only", False, "Compile the cases and run none.")
    flags.DEFINE_bool("interpret", False, "Compute in Pallas' interpreter: a rehearsal, times are left out.")
    flags.DEFINE_string("wrong", None, "Make the result of this case wrong, for a rehearsal.")
    flags.DEFINE_string("dies", None, "End the process at this case, for a rehearsal.")


@functools.cache
def random_numbers() -> np.ndarray:
    """float32[16 Mi] from a normal distribution; all arrays are cut out of it."""
    return np.random.default_rng(0).standard_normal(1 << 24, np.float32)


def numpy_layout(shape: tuple[int, int], block_shape: tuple[int, int], num_blocks: int) -> BlockLayout:
    """A random layout whose groups differ by one block at the most, of a matrix without phantom rows.

    That of `dsb_jax.layout` would be compiled first, a second for each shape.
    """
    (out, in_), (rows, cols), rng = shape, block_shape, np.random.default_rng(0)
    groups = out // rows
    counts = num_blocks // groups + (np.arange(groups) < num_blocks % groups)
    out_idx = rng.permutation(out).reshape(groups, rows)
    in_idx = np.concatenate([rng.permutation(in_)[: count * cols].reshape(count, cols) for count in counts])
    arrays: list[Any] = [out_idx, in_idx, np.append(0, np.cumsum(counts))]
    dtypes = np.int32, column_dtype(in_), np.int32  # as those of the library: the kernels differ with them
    out_idx, in_idx, group_start = (array.astype(dtype) for array, dtype in zip(arrays, dtypes, strict=True))
    return BlockLayout(out_idx, in_idx, group_start, shape, block_shape)


@functools.cache
def operands_of(dtype: str, rows: int, cols: int, layer_text: str) -> Operands:
    """Random arrays of a layer, made on the CPU; all passes share them."""
    layer = parse_layer(layer_text)
    num_blocks = layer.num_blocks(SPARSITY, (rows, cols))
    layout = numpy_layout((layer.out, layer.in_features), (rows, cols), num_blocks)

    def normal(start: int, *shape: int) -> np.ndarray:
        return random_numbers()[start : start + math.prod(shape)].reshape(shape).astype(jnp.dtype(dtype))

    x = normal(0, layer.geometry.in_channels, *layer.input_size, layer.batch)
    dy = normal(x.size, layer.out, *layer.output_size, layer.batch)
    blocks = normal(x.size + dy.size, num_blocks, rows, cols)
    return Operands(x, blocks, layout.index, dy)


def call_of(case: Case, kernels: Kernels, operands: Operands) -> Call:
    """The pass of a case with its operands."""
    return kernel_calls(kernels, parse_layer(case.layer), operands)[case.pass_name]


def compile_case(case: Case, interpret: bool) -> Callable[[], jax.Array]:
    """The kernel of a case, compiled for the device, ready to be called on its arguments there."""
    kernels = pallas_kernels(interpret=interpret)
    call = call_of(case, kernels, operands_of(case.dtype, case.rows, case.cols, case.layer))
    placed = jax.device_put(call.operands)
    return functools.partial(jax.jit(call.function).lower(*placed).compile(), *placed)


def wanted_result(case: Case) -> np.ndarray:
    """What the reference gives in float32."""
    given = operands_of(case.dtype, case.rows, case.cols, case.layer)
    in_float32 = given._replace(**{name: getattr(given, name).astype(np.float32) for name in ("x", "blocks", "dy")})
    call = call_of(case, REFERENCE, in_float32)
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(jax.jit(functools.partial(call.function, precision="highest"))(*call.operands))


def seconds_of(call: Callable[[], jax.Array]) -> float:
    """Median time of a call among many that are queued, in seconds; launches count."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, min(MOST_CALLS, int(LEAST_SAMPLE_S / max(time.perf_counter() - begin, 1e-6))))
    samples = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - begin) / count)
    return statistics.median(samples)


def check(case: Case, call: Callable[[], jax.Array], wanted: np.ndarray) -> dict[str, Any]:
    """The line of a compiled case."""
    result = np.asarray(call()).astype(np.float32)
    if str(case) == FLAGS.wrong:
        result = 1.5 * result
    error = float(np.abs(result - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
    right = result.shape == wanted.shape and error <= TOLERANCES[case.dtype]
    line = {"error": error if np.isfinite(error) else str(error), "tolerance": TOLERANCES[case.dtype], "ok": right}
    if not right:
        line["message"] = f"error {error:.1e} of the largest entry, tolerated {TOLERANCES[case.dtype]:.0e}"
    seconds = seconds_of(call)
    return {**line, "us": None if FLAGS.interpret else round(seconds * 1e6, 1)}


def run(cases: Sequence[Case], path: Path) -> None:
    """Writes a line when a case begins, and one when it is checked."""
    workers = 1 if FLAGS.one_by_one else min(16, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def compiled(case: Case) -> Callable[[], jax.Array]:
            call = compile_case(case, FLAGS.interpret)
            append(path, {"compiled": str(case)})  # a sign of life
            return call

        for each in dict.fromkeys(dataclasses.replace(case, pass_name="") for case in cases):
            operands_of(each.dtype, each.rows, each.cols, each.layer)  # once, before several threads ask for them
        early = [] if FLAGS.one_by_one else [case for case in cases if str(case) != FLAGS.dies]
        started = {case: pool.submit(compiled, case) for case in early}
        wanted = {} if FLAGS.compile_only else {case: pool.submit(wanted_result, case) for case in cases}
        for case in cases:
            append(path, {"begun": str(case)})
            if str(case) == FLAGS.dies and not FLAGS.compile_only:
                os._exit(DIES)
            begin = time.perf_counter()
            try:
                call = started[case].result() if case in started else compiled(case)
                waited = time.perf_counter() - begin
                line: dict[str, Any] = {"ok": True} if FLAGS.compile_only else check(case, call, wanted[case].result())
                if not FLAGS.interpret:
                    line["compile_s"] = round(waited, 2)
            except Exception as error:  # one kernel that breaks must not take the other cases along
                line = {"ok": False, "message": f"{type(error).__name__}: {error}"[:600]}
            append(path, {"case": str(case), **line, **({"rehearsal": True} if FLAGS.interpret else {})})
            print(case, line, flush=True)
            if not line["ok"] and not FLAGS.compile_only:
                leave_if_broken(pool)


def leave_if_broken(pool: concurrent.futures.ThreadPoolExecutor) -> None:
    """Ends the process if the device answers nothing any more, as after an access outside of its memory."""
    try:
        jax.block_until_ready(jax.device_put(np.ones(8, np.float32)) + 1)
    except Exception as error:
        print(f"the device does not answer: {error}", flush=True)
        os._exit(3)


def main() -> None:
    """Flags -> cases."""
    run([parse_case(text) for text in FLAGS.cases.split(",")], Path(FLAGS.lines))
    sys.stdout.flush()


if __name__ == "__main__":
    define_flags()
    program.start(main)
