"""The GPUs to compile for, from their public data sheets, in the form that XLA reads (a GpuTargetConfigProto)."""

import dataclasses

_TEXT = """
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {cores}
  fpus_per_core: {fpus_per_core}
  clock_rate_ghz: {clock_ghz}
  memory_bandwidth: {memory_bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2_cache}
  shared_memory_per_core: {shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: {threads_per_core}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler asks about a GPU. Sizes are in bytes, "core" is a streaming multiprocessor.

    Attributes:
      name: as the driver reports it; Pallas looks the architecture up by it.
      arch: compute capability as ptxas writes it, such as sm_90.
      cores: number of streaming multiprocessors.
      fpus_per_core: float32 units of each.
      clock_ghz: boost clock.
      memory_bandwidth: bytes a second.
      memory: of the device.
      l2_cache: of the device.
      shared_memory_per_core: of each multiprocessor.
      shared_memory_per_block: the most that one thread block may ask for.
      threads_per_core: the most that are resident at a time.
    """

    name: str
    arch: str
    cores: int
    fpus_per_core: int
    clock_ghz: float
    memory_bandwidth: int
    memory: int
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    threads_per_core: int

    def target_config(self) -> str:
        """The text-format GpuTargetConfigProto."""
        major, minor = divmod(int(self.arch.removeprefix("sm_")), 10)
        # XLA compiles for sm_90a on a real Hopper; without the "a" there are no wgmma instructions.
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return _TEXT.format(major=major, minor=minor, extension=extension, **dataclasses.asdict(self))


GPUS = (
    Gpu(
        name="NVIDIA A100-SXM4-80GB",
        arch="sm_80",
        cores=108,
        fpus_per_core=64,
        clock_ghz=1.41,
        memory_bandwidth=2_039_000_000_000,
        memory=80 * 2**30,
        l2_cache=40 * 2**20,
        shared_memory_per_core=164 * 2**10,
        shared_memory_per_block=163 * 2**10,
        threads_per_core=2048,
    ),
    Gpu(
        name="NVIDIA L4",
        arch="sm_89",
        cores=58,
        fpus_per_core=128,
        clock_ghz=2.04,
        memory_bandwidth=300_000_000_000,
        memory=24 * 2**30,
        l2_cache=48 * 2**20,
        shared_memory_per_core=100 * 2**10,
        shared_memory_per_block=99 * 2**10,
        threads_per_core=1536,
    ),
    Gpu(
        name="NVIDIA H200",
        arch="sm_90",
        cores=132,
        fpus_per_core=128,
        clock_ghz=1.98,
        memory_bandwidth=4_800_000_000_000,
        memory=141 * 2**30,
        l2_cache=50 * 2**20,
        shared_memory_per_core=228 * 2**10,
        shared_memory_per_block=227 * 2**10,
        threads_per_core=2048,
    ),
)


def find_gpu(name: str) -> Gpu:
    """The GPU with the given architecture ("sm_90") or whose name has the given word ("H200")."""
    for gpu in GPUS:
        if name == gpu.arch or name.lower() in gpu.name.lower().replace("-", " ").split() or name == gpu.name:
            return gpu
    known = ", ".join(f"{gpu.arch} ({gpu.name})" for gpu in GPUS)
    raise ValueError(f"no data about the GPU {name!r}; choose one of {known}.")
