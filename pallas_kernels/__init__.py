"""Array-level kernels of the shuffled-block matmul and convolution: arrays in, arrays out, jax only.

`interface` says what an implementation is, `kernel_index` what one may derive from a layout; `reference` is the
specification every implementation is tested against, and loaded when it is asked for. Implementations for an
accelerator are further modules beside `reference`.
"""

import importlib
from typing import Any

from pallas_kernels.interface import ConvGeometry as ConvGeometry
from pallas_kernels.interface import Index as Index
from pallas_kernels.interface import Kernels as Kernels
from pallas_kernels.interface import matmul_geometry as matmul_geometry
from pallas_kernels.kernel_index import KernelIndex as KernelIndex


def __getattr__(name: str) -> Any:
    if name == "REFERENCE":
        return importlib.import_module("pallas_kernels.reference").REFERENCE
    raise AttributeError(f"module 'pallas_kernels' has no attribute {name!r}")
