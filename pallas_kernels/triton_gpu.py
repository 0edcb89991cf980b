"""The jax-triton implementation of the three operations: benchmark peer of the Pallas one, and its second home.

Optional (`pip install '.[triton]'`) and imported only when used. Without tile sizes the kernels tune themselves on the
device, by timing, at the first use of each shape.
"""

import functools
import importlib
import inspect
from importlib import metadata
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.input_gradient import COLLECTED, columns_by_source
from pallas_kernels.interface import Kernels
from pallas_kernels.limits import is_exact
from pallas_kernels.over_rows import RowKernels, over_rows
from pallas_kernels.rows import ImageRows
from pallas_kernels.tiles import KernelTiles, Tiles, padded_rows
from pallas_kernels.weight_gradient import count_splits, cut_panels

_INPUT_PRECISION = {True: "ieee", False: "tf32"}
_TUNED_COLUMNS = 32  # of the weight gradient: its chunks are cut beforehand


def available() -> str | None:
    """Why jax-triton cannot be used here, or None if it can."""
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error}); pip install '.[triton]'"
    version = metadata.version("jax-triton")
    if tuple(map(int, version.split(".")[:3])) <= (0, 4, 1) and jax.__version_info__ >= (0, 12):
        # Its rule for dead code takes two arguments, jax 0.12 passes three.
        return f"jax-triton {version} does not work with jax {jax.__version__}; use jax 0.11"
    return None


@functools.cache
def _source() -> ModuleType:
    reason = available()
    if reason is not None:
        raise NotImplementedError(f"no Triton kernel: {reason}, or choose implementation='pallas'.")
    return importlib.import_module("pallas_kernels.triton_source")


@functools.cache
def _autotuned(name: str) -> Any:
    source = _source()
    columns = (_TUNED_COLUMNS,) if name == "weight_gradient" else (32, 64)
    # The sizes that decide which tiles are best; all are compile-time constants of the kernel.
    return source.autotuned(getattr(source, name), ["OUT", "OUT_H", "OUT_LENGTH", "R"], columns)


def _call(
    name: str,
    tiles: Tiles | None,
    *arrays: jax.Array | None,
    result: jax.ShapeDtypeStruct,
    grid: Any,
    compute_capability: int | None,
    **constants: Any,
) -> jax.Array:
    source = _source()
    triton_call: Any = importlib.import_module("jax_triton").triton_call
    options: dict[str, Any] = {"grid": grid, **constants}
    # jax-triton 0.4 renamed the argument.
    options["out_type" if "out_type" in inspect.signature(triton_call).parameters else "out_shape"] = result
    if compute_capability is not None:
        options["compute_capability"] = compute_capability
    if tiles is None:
        return triton_call(*arrays, kernel=_autotuned(name), **options)
    return triton_call(
        *arrays, kernel=getattr(source, name), num_warps=tiles.num_warps, num_stages=tiles.num_stages, **options
    )


def _input_sizes(image: ImageRows) -> dict[str, int]:
    geometry = image.geometry
    return {
        "OUT_H": image.out_size[0],
        "OUT_LENGTH": image.out_length,
        "CHANNELS": geometry.in_channels,
        "HEIGHT": image.height,
        "PHASES": image.phases,
        "LENGTH": image.length,
        "KERNEL_W": geometry.kernel_size[1],
        "STRIDE_H": geometry.strides[0],
        "STRIDE_W": geometry.strides[1],
        "TOP": geometry.padding[0][0],
        "LEFT": geometry.padding[1][0],
        "BATCH": image.padded_batch,
        "SPLIT": image.split,
    }


def _tile_sizes(tiles: Tiles | None) -> dict[str, int]:
    return {} if tiles is None else {"POSITIONS": tiles.positions, "COLUMNS": tiles.columns}


@functools.lru_cache(maxsize=256)
def triton_kernels(tiles: KernelTiles | None = None, *, compute_capability: int | None = None) -> Kernels:
    """The Triton kernels; equal arguments give the same object, so nothing recompiles.

    Args:
      tiles: tile sizes of each kernel; None tunes them on the device.
      compute_capability: such as 90, to lower on a machine without a GPU; None asks the device.

    Returns:
      The three operations; see `pallas_kernels.over_rows`. NotImplementedError without jax-triton.
    """
    call = functools.partial(_call, compute_capability=compute_capability)

    def fitted(name: str, image: ImageRows, rows: int, x: jax.Array) -> Tiles | None:
        return None if tiles is None else getattr(tiles, name).fit(image.out_length, rows, x.dtype.itemsize)

    def forward(
        x_rows: jax.Array,
        entries: jax.Array,
        index: Any,
        *,
        bias: jax.Array | None,
        image: ImageRows,
        cols: int,
        out: int,
        precision: lax.PrecisionLike,
    ) -> jax.Array:
        out_idx, in_idx, group_start = index
        num_groups, rows = out_idx.shape
        mine = fitted("forward", image, rows, x_rows)
        return call(
            "forward",
            mine,
            group_start,
            out_idx.reshape(-1),
            in_idx.reshape(-1),
            entries,
            x_rows,
            bias,
            result=jax.ShapeDtypeStruct((out * image.out_size[0], image.out_length), x_rows.dtype),
            grid=lambda meta: (num_groups * image.out_size[0] * -(-image.out_length // meta["POSITIONS"]),),
            NUM_GROUPS=num_groups,
            R=rows,
            PADDED_R=padded_rows(rows),
            COLS=cols,
            OUT=out,
            PRECISION=_INPUT_PRECISION[is_exact(precision)],
            **_input_sizes(image),
            **_tile_sizes(mine),
        )

    def input_gradient(
        dy_rows: jax.Array,
        entries: jax.Array,
        index: Any,
        *,
        image: ImageRows,
        cols: int,
        out: int,
        precision: lax.PrecisionLike,
    ) -> jax.Array:
        out_idx, in_idx, group_start = index
        num_groups, rows = out_idx.shape
        mine = fitted("input_gradient", image, rows, dy_rows)
        p = call(
            "scatter",
            mine,
            group_start,
            out_idx.reshape(-1),
            entries,
            dy_rows,
            result=jax.ShapeDtypeStruct((entries.shape[0] * image.out_size[0], image.out_length), dy_rows.dtype),
            grid=lambda meta: (num_groups * image.out_size[0] * -(-image.out_length // meta["POSITIONS"]),),
            NUM_GROUPS=num_groups,
            R=rows,
            PADDED_R=padded_rows(rows),
            COLS=cols,
            OUT=out,
            OUT_H=image.out_size[0],
            OUT_LENGTH=image.out_length,
            PRECISION=_INPUT_PRECISION[is_exact(precision)],
            **_tile_sizes(mine),
        )
        first, order = columns_by_source(in_idx, image)
        plain = (mine or Tiles()).fit(image.length, rows, dy_rows.dtype.itemsize)
        sources = image.geometry.in_channels * image.phases
        return call(
            "collect",
            plain,
            first,
            order,
            in_idx.reshape(-1),
            p,
            result=jax.ShapeDtypeStruct((image.num_rows, image.length), dy_rows.dtype),
            grid=(sources * image.height * -(-image.length // plain.positions),),
            POSITIONS=plain.positions,
            COLLECTED=COLLECTED,
            **_input_sizes(image),
        )

    def weight_gradient(
        x_rows: jax.Array,
        dy_rows: jax.Array,
        index: Any,
        *,
        image: ImageRows,
        cols: int,
        out: int,
        precision: lax.PrecisionLike,
    ) -> jax.Array:
        out_idx, in_idx, group_start = index
        rows, num_entries = out_idx.shape[1], in_idx.size
        mine = fitted("weight_gradient", image, rows, x_rows)
        chunks = cut_panels(group_start, num_entries, cols, _TUNED_COLUMNS if mine is None else mine.columns)
        num_chunks = chunks.group.shape[0]
        num_splits = count_splits(num_chunks, image, 128 if mine is None else mine.positions)
        parts = call(
            "weight_gradient",
            mine,
            *chunks,
            out_idx.reshape(-1),
            in_idx.reshape(-1),
            x_rows,
            dy_rows,
            result=jax.ShapeDtypeStruct((num_splits * num_entries, rows), jnp.float32),
            grid=(num_chunks * num_splits,),
            NUM_CHUNKS=num_chunks,
            NUM_SPLITS=num_splits,
            NUM_ENTRIES=num_entries,
            R=rows,
            PADDED_R=padded_rows(rows),
            OUT=out,
            PRECISION=_INPUT_PRECISION[is_exact(precision)],
            **_input_sizes(image),
            **_tile_sizes(mine),
        )
        return parts.reshape(num_splits, num_entries, rows).sum(axis=0)

    return over_rows("Triton", RowKernels(forward, input_gradient, weight_gradient))
