"""Where the GPU compiler and ptxas are found, and how jax gets to know a compiler that is no device."""

import functools
import importlib.util
import pathlib
import shutil
import sys

import jax
from jax._src import xla_bridge  # jax has no public way to add a compiler after its start
from jax.experimental import topologies

from pallas_kernels.aot.gpus import Gpu

_OWN_FOLDER = pathlib.Path(sys.prefix) / "gpu-compiler"


def _folders(package: str) -> list[pathlib.Path]:
    """The own folder's copy of a package first, then those among the installed ones."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    installed = [] if spec is None else spec.submodule_search_locations or []
    return [_OWN_FOLDER.joinpath(*package.split(".")), *map(pathlib.Path, installed)]


def _compiler_library() -> pathlib.Path | None:
    libraries = [folder / "xla_cuda_plugin.so" for folder in _folders("jax_plugins.xla_cuda13")]
    return next((library for library in libraries if library.exists()), None)


@functools.cache
def ptxas() -> str | None:
    """Path of NVIDIA's assembler: it alone says how many registers a kernel takes and what it spills."""
    binaries = [folder / "bin" / "ptxas" for folder in _folders("nvidia.cu13")]
    return next((str(binary) for binary in binaries if binary.exists()), shutil.which("ptxas"))


def unavailable() -> str | None:
    """Why nothing can be compiled for GPUs here, or None if it can."""
    if _compiler_library() is None:
        return f"no GPU compiler in {_OWN_FOLDER.name} of the virtual environment; run make {_OWN_FOLDER.name}."
    if ptxas() is None:
        return (
            f"no ptxas in {_OWN_FOLDER.name} of the virtual environment nor on the path; run make {_OWN_FOLDER.name}."
        )
    return None


@functools.cache
def gpu_topology(gpu: Gpu, devices: int) -> topologies.TopologyDescription:
    """That many GPUs of one host, which exist for the compiler only."""
    # The devices of this process first: a compiler that is added later never becomes one of them.
    jax.devices()
    options = {"target_config": gpu.target_config(), "topology": f"1x1x{devices}"}
    try:
        return topologies.get_topology_desc(platform="cuda", **options)
    except NotImplementedError:  # jax knows no CUDA compiler yet
        library = _compiler_library()
        if library is None:
            raise RuntimeError(unavailable()) from None
        c_api = xla_bridge.register_plugin("cuda", library_path=str(library), priority=-1)
        # What jax does when it finds a compiler by itself; custom_partitioning is made known to it so.
        for callback in xla_bridge._plugin_callbacks:
            callback(c_api=c_api)
        return topologies.get_topology_desc(platform="cuda", **options)
