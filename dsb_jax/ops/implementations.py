"""The kernels behind the names of the implementations."""

import importlib
from collections.abc import Iterable

from dsb_jax.ops.dense import dense_kernels
from dsb_jax.ops.native import NATIVE, NATIVE_BATCH_MAJOR, prefers_batch_major
from dsb_jax.ops.portable import PORTABLE
from dsb_jax.ops.xla import XLA
from pallas_kernels.interface import ConvGeometry, Kernels
from pallas_kernels.tiles import KernelTiles


def kernels_of(name: str, tiles: KernelTiles | None = None, *, feature_major: bool = True) -> Kernels:
    """The kernels of an implementation; those of a GPU, and the specification, are imported when they are asked for.

    Args:
      name: of the implementation, not "auto".
      tiles: of GPU kernels; None for their defaults.
      feature_major: whether activations are [C, H, W, N]; else [N, H, W, C], for those that `take_batch_major`.
    """
    if name == "xla":
        return XLA
    if name == "dense":
        return dense_kernels(feature_major=feature_major)
    if name == "portable":
        return PORTABLE
    if name == "native":
        return NATIVE if feature_major else NATIVE_BATCH_MAJOR
    if name == "reference":
        return importlib.import_module("pallas_kernels.reference").REFERENCE
    module = importlib.import_module(f"pallas_kernels.{name}_gpu")
    return getattr(module, f"{name}_kernels")(**({} if tiles is None else {"tiles": tiles}))


def take_batch_major(names: Iterable[str], geometry: ConvGeometry, input_size: tuple[int, int], batch: int) -> bool:
    """Whether all of these implementations compute a product with activations [N, H, W, C], too."""
    names = set(names)
    return names == {"dense"} or (names <= {"dense", "native"} and prefers_batch_major(geometry, input_size, batch))
