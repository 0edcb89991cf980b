"""The jax-triton implementation on a machine without a GPU: each kernel runs in Triton's own interpreter.

Only `jax_triton.triton_call` is stood in for, by a host callback that hands the interpreter raw pointers, as a launch
on a GPU would. Results begin as NaN, so that a position that no program writes is seen. The interpreter does not know
bfloat16 (it multiplies the bits), hence float32 only.
"""

import functools
import importlib
import os
import sys
import threading
from types import ModuleType, SimpleNamespace
from unittest import mock

import jax
import numpy as np

from pallas_kernels import triton_gpu

# XLA calls back from several threads at once, but the interpreter patches Triton's language for the kernel it runs.
_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _interpreted_source() -> ModuleType:
    """The kernels, and Triton itself, imported while the variable is set by which Triton chooses to interpret."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        return importlib.import_module("pallas_kernels.triton_source")


def _pointer(array: np.ndarray):
    """What the interpreter makes of a tensor of PyTorch."""
    language = importlib.import_module("triton.language")
    handle = importlib.import_module("triton.runtime.interpreter").TensorHandle
    pointer = language.pointer_type(getattr(language, array.dtype.name))
    return language.tensor(handle(np.array([array.ctypes.data], np.uint64), pointer), pointer)


def _triton_call(*arrays, kernel, grid, out_type, num_warps, num_stages, input_output_aliases=None, **constants):
    del num_warps, num_stages  # of no meaning without threads
    given = [array is not None for array in arrays]

    def launch(*values):
        # Kept in a list until the kernel has run: it sees bare addresses.
        host = [np.array(value, order="C") for value in values]
        aliased = [host[i] for i in input_output_aliases or ()]
        result = aliased[0] if aliased else np.full(out_type.shape, np.nan, out_type.dtype)
        pointers = iter([_pointer(array) for array in host])
        arguments = [next(pointers) if is_given else None for is_given in given]
        with _ONE_AT_A_TIME:
            kernel[grid(constants) if callable(grid) else grid](*arguments, _pointer(result), **constants)
        return result

    return jax.pure_callback(launch, out_type, *(array for array in arrays if array is not None))


def install(monkeypatch) -> None:
    """For the rest of a test, `pallas_kernels.triton_gpu` runs in the interpreter."""
    source = _interpreted_source()
    monkeypatch.setattr(triton_gpu, "_source", lambda: source)
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=_triton_call))
