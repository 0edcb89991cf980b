"""What the tests share: strict settings, a quick hypothesis profile, layouts with given blocks in each group."""

import math
import os
import tempfile
from pathlib import Path

# Tests compile much and compute little: unoptimized machine code, in one piece, halves their time.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
)

# Workers and the programs that tests start share what one of them has compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="dsb_jax_tests_", ignore_cleanup_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import jax
import numpy as np
import pytest
from hypothesis import settings

from dsb_jax.layout import BlockLayout, validate
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec

jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("quick", deadline=None, max_examples=20)
settings.load_profile("quick")

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Linux maps at most 65,530 pieces of memory into a process: too few for all that the tests compile in one."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


def always(*names, of):
    """For `parametrize`: all of `of`, of which those not named wait for `make campaign`, being near to one that is."""
    missing = set(names) - set(of)
    assert not missing, missing
    return [
        name
        if name in names
        else pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.campaign)
        for name in of
    ]


def make_layout(
    seed: int, shape: tuple[int, int], block_shape: tuple[int, int], counts: tuple[int, ...]
) -> BlockLayout:
    """A layout of random rows and columns whose group g holds `counts[g]` blocks."""
    rng = np.random.default_rng(seed)
    (out, in_), (rows, cols) = shape, block_shape
    out_idx = np.append(rng.permutation(out), np.arange(out, len(counts) * rows)).reshape(len(counts), rows)
    in_idx = np.concatenate([rng.permutation(in_)[: n * cols].reshape(n, cols) for n in counts])
    start = np.append(0, np.cumsum(counts))
    arrays = (jax.numpy.asarray(array, jax.numpy.int32) for array in (out_idx, in_idx, start))
    layout = BlockLayout(*arrays, shape, block_shape)
    validate(layout)
    return layout


def make_spec(out: int, in_: int, kernel_size: tuple[int, ...] = ()) -> LayerSpec:
    """A dense linear layer, or a convolution whose kernel, flattened, has `in_` columns."""
    return conv_spec(kernel_size, in_ // math.prod(kernel_size), out) if kernel_size else linear_spec(in_, out)
