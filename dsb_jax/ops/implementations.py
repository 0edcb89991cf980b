"""The kernels behind the names of the implementations."""

import importlib

from dsb_jax.ops.dense import dense_kernels
from dsb_jax.ops.native import NATIVE
from dsb_jax.ops.portable import PORTABLE
from dsb_jax.ops.xla import XLA
from pallas_kernels.interface import Kernels
from pallas_kernels.tiles import KernelTiles


def kernels_of(name: str, tiles: KernelTiles | None = None, *, feature_major: bool = True) -> Kernels:
    """The kernels of an implementation; those of a GPU, and the specification, are imported when they are asked for.

    Args:
      name: of the implementation, not "auto".
      tiles: of GPU kernels; None for their defaults.
      feature_major: the order of activations, which only "dense" has a choice of.
    """
    if name == "xla":
        return XLA
    if name == "dense":
        return dense_kernels(feature_major=feature_major)
    if name == "portable":
        return PORTABLE
    if name == "native":
        return NATIVE
    if name == "reference":
        return importlib.import_module("pallas_kernels.reference").REFERENCE
    module = importlib.import_module(f"pallas_kernels.{name}_gpu")
    return getattr(module, f"{name}_kernels")(**({} if tiles is None else {"tiles": tiles}))
