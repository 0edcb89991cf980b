"""Block shapes by the size of a layer: `block_shape="auto"`.

Tall blocks are not free where a layer has few row groups: all rows of a group read the same inputs. And a block that is
wider than what a row group has to spare cannot be spread evenly: at a density of 0.1 a group that reads 128 inputs has
12.8 columns, less than one block of 16.

    R   the largest power of two, of 4 to 16, that leaves `LEAST_GROUPS` row groups
    C   the largest power of two, of 1 to 16, of which a row group has two blocks or more at the layer's density

Whether a layer can be sparse at all is decided as for blocks of 16x16: a classifier of ten outputs stays dense.

What that is worth in accuracy and costs in time: experiments/RESULTS.md.
"""

from typing import Literal

from dsb_jax.spec import LayerSpec

AUTO: Literal["auto"] = "auto"
BlockShape = tuple[int, int] | Literal["auto"]
LEAST_GROUPS = 8
_ROWS, _COLS = (16, 8, 4), (16, 8, 4, 2, 1)


def auto_block_shape(spec: LayerSpec, density: float) -> tuple[int, int]:
    """(R, C) of a layer with a density in (0, 1]."""
    most = density * spec.in_ / 2
    rows = next((rows for rows in _ROWS if spec.out >= rows * LEAST_GROUPS), min(_ROWS[-1], spec.out))
    return rows, next((cols for cols in _COLS if cols <= most), 1)


def shape_of(block_shape: BlockShape, spec: LayerSpec, density: float | None = None) -> tuple[int, int]:
    """The block shape of a layer; before its density is known, the one that decides whether it can be sparse."""
    if not isinstance(block_shape, str):
        return block_shape[0], block_shape[1]
    return (_ROWS[0], _COLS[0]) if density is None else auto_block_shape(spec, density)


def shape_text(block_shape: BlockShape) -> str:
    """(32, 8) -> '32x8'."""
    return block_shape if isinstance(block_shape, str) else "x".join(map(str, block_shape))
