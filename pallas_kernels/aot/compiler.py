"""One call: a function and shapes in, optimized HLO and the machine-level facts of each kernel out."""

import collections
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.aot.gpus import find_gpu
from pallas_kernels.aot.toolchain import gpu_topology, ptxas, unavailable

_REPLICATED = PartitionSpec()

_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(.*?^}$", re.DOTALL | re.MULTILINE)
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;\[]*\[[^\]]*\], *\[[^\]]*\], *(\w+)")
_THUNK = re.compile(r"\] (\S+) grid: \[.*?\] threads: \[.*?\]\s+shared_memory: (\d+) bytes")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One GPU kernel.

    Attributes:
      name: of its entry point.
      ptx: text of its entry point.
      registers: of each thread.
      spill_bytes: written to and read from memory for want of registers.
      shared_bytes: shared memory of a thread block.
      tensor_cores: number of tensor-core instructions (mma.sync or wgmma).
      async_copies: number of asynchronous copies (cp.async) of each size in bytes, such as `{16: 8}`.
    """

    name: str
    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_cores: int
    async_copies: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a function.

    Attributes:
      hlo: optimized HLO of one device's program.
      kernels: in no particular order, those that XLA wrote itself among them; libraries such as cuBLAS have none.
    """

    hlo: str
    kernels: tuple[Kernel, ...]

    def count(self, opcode: str) -> int:
        """Occurrences of an HLO operation, fused and asynchronous ones included, such as "all-reduce"."""
        return len(re.findall(rf"^\s*(?:ROOT )?%?[\w.-]+ = .*? {opcode}(?:-start)?\(%?[\w.)]", self.hlo, re.MULTILINE))

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        raise KeyError(f"no kernel {name}; there are {', '.join(kernel.name for kernel in self.kernels)}.")


def compile_for(gpu: str, function: Callable, *arguments: Any, specs: Any = _REPLICATED, devices: int = 1) -> Compiled:
    """Compiles `function(*arguments)` for a GPU that need not be here.

    Args:
      gpu: an architecture ("sm_80", "sm_89", "sm_90") or a name ("A100", "L4", "H200").
      function: to be jitted; it is traced under a mesh of one axis, "batch", which `jax.shard_map` may use.
      *arguments: trees of `jax.ShapeDtypeStruct` (arrays serve as well); nothing is run.
      specs: how the arguments are laid out over the axis "batch": a PartitionSpec for all, or one for each argument.
      devices: number of GPUs.

    Returns:
      The program of one device.
    """
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    mesh = topologies.make_mesh(gpu_topology(find_gpu(gpu), devices), (devices,), ("batch",))

    def place(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    each = (specs,) * len(arguments) if isinstance(specs, PartitionSpec) else specs
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        placed = [place(spec, tree) for spec, tree in zip(each, arguments, strict=True)]
        # Options of one compilation, so that neither XLA_FLAGS nor the rest of the process matters. The level is
        # XLA's default; tests lower it to compile faster for the CPU.
        options: dict[str, Any] = {
            "xla_dump_to": folder,
            "xla_dump_emitter_re": "ptx",
            "xla_backend_optimization_level": 3,
        }
        program = jax.jit(function).lower(*placed).compile(compiler_options=options)
        return Compiled(program.as_text() or "", _read_kernels(pathlib.Path(folder)))


def _read_kernels(dump: pathlib.Path) -> tuple[Kernel, ...]:
    """The kernels in a folder that XLA dumped to."""
    launched: dict[str, int] = {}
    for file in dump.glob("*.thunk_sequence.txt"):
        launched |= {name: int(size) for name, size in _THUNK.findall(file.read_text())}
    kernels = []
    for file in sorted(dump.glob("*.ptx")):
        entries = list(_ENTRY.finditer(file.read_text()))
        facts = _assemble(file) if entries else {}  # jax 0.11 dumps empty files too
        for entry in entries:
            name, ptx = entry.group(1), entry.group(0)
            registers, spill_bytes, static_bytes = facts[name]
            copies = collections.Counter(int(size, 0) for size in _ASYNC_COPY.findall(ptx))
            tensor_cores = len(_TENSOR_CORE.findall(ptx))
            shared_bytes = static_bytes + launched.get(name, 0)
            kernels.append(Kernel(name, ptx, registers, spill_bytes, shared_bytes, tensor_cores, dict(copies)))
    return tuple(kernels)


def _assemble(file: pathlib.Path) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory of each kernel of a PTX file."""
    target = _TARGET.search(file.read_text())
    assert target is not None, f"{file.name} names no architecture."
    command = [str(ptxas()), "-v", f"-arch={target.group(1)}", "-o", "/dev/null", str(file)]
    log = subprocess.run(command, capture_output=True, text=True, check=False)
    if log.returncode != 0:
        raise RuntimeError(f"ptxas failed on {file.name}: {log.stderr}{log.stdout}")
    facts = {}
    for part in (log.stderr + log.stdout).split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found.group(1)) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        facts[part.split("'")[0]] = number(r"Used (\d+) registers"), spills, number(r"(\d+) bytes smem")
    return facts
