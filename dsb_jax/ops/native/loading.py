"""Finds the compiled library of native kernels and registers its functions with XLA.

Which vectors are used is asked of the processor. The environment variable DSB_JAX_NATIVE says otherwise: `avx2` on a
processor that has AVX-512, `off` for none of it. DSB_JAX_NATIVE_LIBRARY names another library than the one beside this
file, such as one built with sanitizers.
"""

import ctypes
import functools
import importlib.machinery
import os
import platform
import re
import warnings
from pathlib import Path

import jax

VARIABLE = "DSB_JAX_NATIVE"
LIBRARY_VARIABLE = "DSB_JAX_NATIVE_LIBRARY"
VECTORS = {"avx512": 16, "avx2": 8}  # floats
TARGETS = {name: f"dsb_jax_native_{name}" for name in ("forward", "input_gradient", "weight_gradient")}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    folder = Path(__file__).parent
    named = os.environ.get(LIBRARY_VARIABLE)
    paths = [Path(named)] if named else [folder / f"library{end}" for end in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.is_file()), None)
    if found is None and named:
        return f"{LIBRARY_VARIABLE}={named} is not a file"
    if found is None and (here := f"{platform.system()} on {platform.machine()}") != "Linux on x86_64":
        return f"they are for Linux on x86-64, this is {here}; use auto or xla"
    if found is None:
        return (
            "they were not compiled, for want of a C++ compiler that works; install g++ or clang++, or name one by "
            "CXX, then install dsb_jax anew"
        )
    try:
        library = ctypes.CDLL(os.fspath(found))
    except OSError as error:
        return f"{found} cannot be loaded: {error}"
    # An older jaxlib refuses a library of newer headers, and with it the whole backend.
    if library.dsb_jax_native_api() > _api_of_jaxlib():
        return "they were compiled for a newer jaxlib than this; install dsb_jax anew"
    return library


def _api_of_jaxlib() -> int:
    """The minor version of XLA's foreign function interface, by the headers beside this jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    found = re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)
    assert found is not None
    return int(found[1])


def _wanted() -> str:
    return os.environ.get(VARIABLE, "").lower()


@functools.cache
def unavailable_reason() -> str | None:
    """Why the native kernels cannot be used in this process, with the cure; None if they can."""
    wanted = _wanted()
    if wanted == "off":
        return f"{VARIABLE}=off"
    if wanted and wanted not in VECTORS:
        return f"{VARIABLE}={wanted} is unknown; set avx512, avx2 or off, or unset it"
    library = _load()
    if isinstance(library, str):
        return library
    here = library.dsb_jax_native_vector()
    if here < VECTORS.get(wanted, 8):
        return f"this processor has no {'AVX-512' if wanted == 'avx512' else 'AVX2'}"
    use(wanted or ("avx512" if here == 16 else "avx2"))
    return None


@functools.cache
def tell_missing() -> None:
    """Warns, once in a process, where the library should be and is not."""
    reason = unavailable_reason()
    if reason is not None and _wanted() != "off":
        warnings.warn(f"dsb_jax computes without its native CPU kernels, so slower: {reason}.", stacklevel=2)


def use(instructions: str) -> None:
    """From now on the kernels use these instructions: a name in VECTORS, which the processor must have."""
    _library().dsb_jax_native_use(VECTORS[instructions])


def vector() -> int:
    """Floats of the vectors that the kernels use; 0 if they cannot be used."""
    return 0 if unavailable_reason() else _library().dsb_jax_native_used()


def _library() -> ctypes.CDLL:
    library = _load()
    assert not isinstance(library, str)
    return library


@functools.cache
def register() -> None:
    """Makes the functions known to XLA, once in a process.

    Raises:
      NotImplementedError: if they cannot be used here.
    """
    if reason := unavailable_reason():
        raise NotImplementedError(f"the native kernels cannot be used: {reason}.")
    library = _library()
    for target in TARGETS.values():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")


@functools.cache
def peak_flops() -> float:
    """Operations in a second of one core, in registers alone: what the passes are measured against."""
    register()
    library = _library()
    library.dsb_jax_native_peak.restype = ctypes.c_double
    return max(library.dsb_jax_native_peak() for _ in range(3))
