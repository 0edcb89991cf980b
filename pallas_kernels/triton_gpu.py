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

from pallas_kernels.interface import Index, Kernels
from pallas_kernels.kernel_index import chunks, inverse
from pallas_kernels.limits import is_exact
from pallas_kernels.over_rows import RowKernels, over_rows
from pallas_kernels.rows import ImageRows
from pallas_kernels.tiles import KernelTiles, Tiles, collected_positions, padded_rows
from pallas_kernels.weight_gradient import count_splits

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
    aliases: Any = None,
    **constants: Any,
) -> jax.Array:
    source = _source()
    triton_call: Any = importlib.import_module("jax_triton").triton_call
    options: dict[str, Any] = {"grid": grid, **constants}
    if aliases:
        options["input_output_aliases"] = dict(aliases)
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
        "KERNEL_H": geometry.kernel_size[0],
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
    _source()  # refused here, not at the first call
    call = functools.partial(_call, compute_capability=compute_capability)

    def fitted(mine: Tiles | None, image: ImageRows, rows: int, x: jax.Array) -> Tiles | None:
        return None if mine is None else mine.fit(image.out_length, rows, x.dtype.itemsize)

    def forward(
        x_rows: jax.Array,
        entries: jax.Array,
        index: Index,
        *,
        bias: jax.Array | None,
        image: ImageRows,
        out: int,
        precision: lax.PrecisionLike,
    ) -> jax.Array:
        (num_groups, rows), (num_blocks, cols) = index.out_idx.shape, index.in_idx.shape
        mine = fitted(None if tiles is None else tiles.forward, image, rows, x_rows)
        return call(
            "forward",
            mine,
            index.group_start,
            index.out_idx.reshape(-1),
            index.in_idx.reshape(-1),
            entries,
            x_rows,
            bias,
            result=jax.ShapeDtypeStruct((out * image.out_size[0], image.out_length), x_rows.dtype),
            grid=lambda meta: (num_groups * image.out_size[0] * -(-image.out_length // meta["POSITIONS"]),),
            NUM_GROUPS=num_groups,
            NUM_BLOCKS=num_blocks,
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
        index: Index,
        *,
        image: ImageRows,
        whole: ImageRows,
        start: jax.Array | None,
        into: jax.Array | None,
        out: int,
        precision: lax.PrecisionLike,
    ) -> jax.Array:
        (num_groups, rows), (num_blocks, cols) = index.out_idx.shape, index.in_idx.shape
        first, rank = inverse(index, image.geometry.in_features)
        mine = fitted(None if tiles is None else tiles.input_gradient, image, rows, dy_rows)
        part = {"BATCH": image.padded_batch, "WHOLE_BATCH": whole.padded_batch}
        p = call(
            "scatter",
            mine,
            index.group_start,
            index.out_idx.reshape(-1),
            rank.reshape(-1),
            entries,
            dy_rows,
            start,
            result=jax.ShapeDtypeStruct((entries.shape[0] * image.out_size[0], image.out_length), dy_rows.dtype),
            grid=lambda meta: (num_groups * image.out_size[0] * -(-image.out_length // meta["POSITIONS"]),),
            NUM_GROUPS=num_groups,
            NUM_BLOCKS=num_blocks,
            R=rows,
            PADDED_R=padded_rows(rows),
            COLS=cols,
            OUT=out,
            OUT_H=image.out_size[0],
            OUT_LENGTH=image.out_length,
            WHOLE_LENGTH=whole.out_length,
            PRECISION=_INPUT_PRECISION[is_exact(precision)],
            **part,
            **_tile_sizes(mine),
        )
        num_warps = (mine or Tiles()).num_warps
        positions = collected_positions(image.length, num_warps)
        sources = image.geometry.in_channels * image.phases
        return call(
            "collect",
            Tiles(num_warps=num_warps),
            first,
            p,
            start,
            into,
            result=jax.ShapeDtypeStruct((whole.num_rows, whole.length), dy_rows.dtype),
            grid=(sources * image.height * -(-image.length // positions),),
            aliases={} if into is None else {3: 0},
            NUM_ENTRIES=entries.shape[0],
            WHOLE_LENGTH=whole.length,
            POSITIONS=positions,
            **(_input_sizes(image) | part),
        )

    def weight_gradient(
        x_rows: jax.Array,
        dy_rows: jax.Array,
        index: Index,
        *,
        image: ImageRows,
        out: int,
        precision: lax.PrecisionLike,
    ) -> jax.Array:
        (num_groups, rows), num_entries, itemsize = index.out_idx.shape, index.in_idx.size, x_rows.dtype.itemsize
        given = None if tiles is None else tiles.of_weight_gradient(rows, num_entries / num_groups, itemsize)
        mine = fitted(given, image, rows, x_rows)
        table = chunks(index, _TUNED_COLUMNS if mine is None else mine.columns)
        num_chunks = table.shape[0]
        num_splits = count_splits(num_chunks, num_entries * rows, image, 128 if mine is None else mine.positions)
        parts = call(
            "weight_gradient",
            mine,
            table.reshape(-1),
            index.out_idx.reshape(-1),
            index.in_idx.reshape(-1),
            x_rows,
            dy_rows,
            result=jax.ShapeDtypeStruct((num_splits * num_entries, rows), jnp.float32),
            grid=(num_chunks * num_splits,),
            NUM_GROUPS=num_groups,
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
