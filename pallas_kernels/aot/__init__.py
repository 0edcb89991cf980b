"""Compiling for GPUs on a machine without one: what XLA and ptxas make of a function, before any GPU is rented.

    compiled = compile_for("sm_90", jnp.matmul, x, w)     # x, w: jax.ShapeDtypeStruct
    for kernel in compiled.kernels:
        print(kernel.name, kernel.registers, kernel.spill_bytes, kernel.tensor_cores, kernel.async_copies)

The compiler comes as two wheels that `make test` lays into the folder `gpu-compiler` of the virtual environment. They
stay out of site-packages on purpose: jax loads every GPU plugin it finds there at start, and one without the CUDA
libraries prints an error each time.
"""

from pallas_kernels.aot.compiler import Compiled as Compiled
from pallas_kernels.aot.compiler import Kernel as Kernel
from pallas_kernels.aot.compiler import compile_for as compile_for
from pallas_kernels.aot.gpus import GPUS as GPUS
from pallas_kernels.aot.gpus import Gpu as Gpu
from pallas_kernels.aot.gpus import find_gpu as find_gpu
from pallas_kernels.aot.toolchain import unavailable as unavailable
