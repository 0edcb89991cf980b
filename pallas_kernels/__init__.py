"""Array-level kernels of the shuffled-block matmul and convolution: arrays in, arrays out, jax only.

`interface` says what an implementation is; `reference` is the specification every implementation is tested
against. Implementations for an accelerator are further modules beside `reference`.
"""

from pallas_kernels.interface import ConvGeometry as ConvGeometry
from pallas_kernels.interface import Kernels as Kernels
from pallas_kernels.interface import matmul_geometry as matmul_geometry
from pallas_kernels.reference import REFERENCE as REFERENCE
