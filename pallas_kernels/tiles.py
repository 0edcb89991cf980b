"""Tile sizes of the GPU kernels: what a program computes at a time, and with how many threads.

A program of the forward pass owns one row group and `positions` output positions, and walks over the group's panel
`columns` at a time. With R = 32, columns = 32 and positions = 128, one step multiplies a 32x32 piece of the panel
with 32x128 gathered inputs.
"""

import dataclasses

_MOST_ROW_BYTES = 256


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def collected_positions(length: int, num_warps: int) -> int:
    """Positions of a program of the input gradient's second pass: 8 elements, 16 bytes of bfloat16, for each thread."""
    return min(8 * 32 * num_warps, max(16, power_of_two(length)))


def padded_rows(rows: int) -> int:
    """Rows of a group as a kernel holds them: a power of two that tensor cores take."""
    return max(16, power_of_two(rows))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel; all but `num_stages` are powers of two.

    Attributes:
      positions: output positions (image column and example) of a program, at least 16.
      columns: columns of a panel in one step, at least 16.
      num_warps: of 32 threads each.
      num_stages: depth of the software pipeline of loads.
    """

    positions: int = 128
    columns: int = 32
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (("positions", 16), ("columns", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}={value} is not a power of two of at least {least}.")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} is below 1.")

    def fit(self, positions: int, rows: int, itemsize: int) -> "Tiles":
        """These tiles, no wider than a row of `positions`, and within the shared memory of every GPU.

        Args:
          positions: of one output row.
          rows: R.
          itemsize: bytes of an activation; at 4 and R = 128 the L4 holds half of the usual tile.
        """
        widest = max(16, power_of_two(positions))
        if rows * itemsize > _MOST_ROW_BYTES:
            widest = min(widest, 64)
        return dataclasses.replace(self, positions=min(self.positions, widest))


@dataclasses.dataclass(frozen=True)
class KernelTiles:
    """Tile sizes of the three kernels of a layer; hashable, a static argument.

    `weight_gradient=None` takes as many columns as pay, by `weight_gradient_columns`.
    """

    forward: Tiles = Tiles()
    input_gradient: Tiles = Tiles()
    weight_gradient: Tiles | None = None

    def of_weight_gradient(self, rows: int, panel: float, itemsize: int) -> Tiles:
        """The tiles of the weight gradient of a layer; arguments as in `weight_gradient_columns`."""
        if self.weight_gradient is not None:
            return self.weight_gradient
        return Tiles(positions=64, columns=weight_gradient_columns(rows, panel, itemsize))


def weight_gradient_columns(rows: int, panel: float, itemsize: int) -> int:
    """Panel columns of a program of the weight gradient: each more saves a read of dY, until registers run out.

    Args:
      rows: R.
      panel: columns of a panel, the mean; no program is wider than that.
      itemsize: bytes of an activation.
    """
    most = 128 if padded_rows(rows) * itemsize <= 128 else 64 if padded_rows(rows) * itemsize <= 256 else 32
    return max(32, min(most, power_of_two(max(1, round(panel)))))


DEFAULT_TILES = KernelTiles()
