"""The sizes of one layer, as static values: the only description of them in this library.

A kernel is looked at as a matrix `W[out, in]`. Which axes of the kernel make up its rows and its columns is part of the
spec, so that a convolution (HWIO), an attention projection `[d, heads, head_dim]` or a stack of layers under `nn.scan`
all go to the matrix and back:

    kernel              shape            out_axes   in_axes     spatial_axes   stack_axes
    linear              (in, out)        (1,)       (0,)        ()             ()
    convolution         (kh, kw, c, o)   (3,)       (0, 1, 2)   (0, 1)         ()
    query projection    (d, h, k)        (1, 2)     (0,)        ()             ()
    12 scanned linears  (12, in, out)    (2,)       (1,)        ()             (0,)
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from dsb_jax.layout import check_sizes, count_groups, num_active

STORAGES = ("blocks", "single", "backward_set", "dense")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The sizes of one layer; hashable, the only description of them in this library.

    Attributes:
      kernel_shape: of the kernel as the dense layer keeps it, lifted axes included: `(in, out)`, `(kh, kw, c, out)`.
      out_axes, in_axes: which of its axes make up the rows and the columns of the matrix `W[out, in]`, in order.
      spatial_axes: those of `in_axes` that are the window of a convolution.
      stack_axes: its lifted axes, along which there is one layer each.
      block_shape: `(R, C)`.
      num_blocks: blocks that one layer stores.
      num_active: weights that one layer computes with; 0 stands for all real weights that are stored.
      storage: "blocks"; "single", one weight a block; "backward_set", single weights of which some are not computed
        with; or "dense", the whole kernel.
    """

    kernel_shape: tuple[int, ...]
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    spatial_axes: tuple[int, ...] = ()
    stack_axes: tuple[int, ...] = ()
    block_shape: tuple[int, int] = (1, 1)
    num_blocks: int = 0
    num_active: int = 0
    storage: str = "dense"

    def __post_init__(self) -> None:
        axes = (*self.out_axes, *self.in_axes, *self.stack_axes)
        if sorted(axes) != list(range(len(self.kernel_shape))) or not set(self.spatial_axes) <= set(self.in_axes):
            raise ValueError(
                f"out_axes={self.out_axes}, in_axes={self.in_axes}, stack_axes={self.stack_axes} do not name each axis "
                f"of kernel_shape={self.kernel_shape} once, with spatial_axes={self.spatial_axes} among in_axes."
            )
        if not self.out_axes or not self.in_axes or min(self.kernel_shape) < 1:
            raise ValueError(f"kernel_shape={self.kernel_shape} has no output, no input or a size below 1.")
        if self.storage not in STORAGES:
            raise ValueError(f"storage={self.storage!r} is unknown; choose one of {', '.join(STORAGES)}.")
        if self.storage == "dense":
            object.__setattr__(self, "num_blocks", self.size)
        check_sizes(self.shape, self.block_shape, self.num_blocks)
        stored = num_active(self.shape, self.block_shape, self.num_blocks)
        if not 0 <= self.num_active <= stored:
            raise ValueError(f"num_active={self.num_active} of {stored} stored weights; give 1 to {stored}.")
        if not self.num_active:
            object.__setattr__(self, "num_active", stored)

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.kernel_shape[axis] for axis in axes)

    @property
    def out(self) -> int:
        """Rows of the matrix: output features."""
        return math.prod(self._sizes(self.out_axes))

    @property
    def in_(self) -> int:
        """Columns of the matrix: input features; of a convolution, `prod(kernel_size) * c_in`."""
        return math.prod(self._sizes(self.in_axes))

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.out, self.in_

    @property
    def size(self) -> int:
        """Weights of the dense layer, one of a stack."""
        return self.out * self.in_

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The window of a convolution; empty for a linear layer."""
        return self._sizes(self.spatial_axes)

    @property
    def c_in(self) -> int:
        """Input channels of a convolution, input features of a linear layer."""
        return self.in_ // math.prod(self.kernel_size)

    @property
    def num_layers(self) -> int:
        """Layers in the stack; 1 without lifted axes."""
        return math.prod(self._sizes(self.stack_axes))

    @property
    def num_groups(self) -> int:
        """Row groups of one layer."""
        return count_groups(self.out, self.block_shape[0])

    @property
    def num_stored(self) -> int:
        """Real weights that one layer stores, which are those that have a gradient."""
        return num_active(self.shape, self.block_shape, self.num_blocks)

    @property
    def density(self) -> float:
        """Weights that the layer computes with, over all."""
        return self.num_active / self.size

    def with_blocks(self, block_shape: tuple[int, int], num_blocks: int) -> "LayerSpec":
        """The same layer in `num_blocks` shuffled blocks."""
        return dataclasses.replace(self, block_shape=block_shape, num_blocks=num_blocks, num_active=0, storage="blocks")

    def with_single(self, num_stored: int, *, num_computed: int | None = None) -> "LayerSpec":
        """The same layer in single weights; with `num_computed` of them in the forward pass, a "backward_set"."""
        storage = "single" if num_computed is None else "backward_set"
        return dataclasses.replace(
            self, block_shape=(1, 1), num_blocks=num_stored, num_active=num_computed or 0, storage=storage
        )

    def stacked(self, axes: tuple[int, ...], sizes: tuple[int, ...]) -> "LayerSpec":
        """A stack of such layers, whose kernels have `axes` more."""
        rest = [axis for axis in range(len(self.kernel_shape) + len(axes)) if axis not in axes]
        shape = dict(zip(axes, sizes, strict=True)) | dict(zip(rest, self.kernel_shape, strict=True))
        moved: dict[str, Any] = {
            name: tuple(rest[axis] for axis in getattr(self, name))
            for name in ("out_axes", "in_axes", "spatial_axes", "stack_axes")
        }
        moved["stack_axes"] = tuple(sorted((*moved["stack_axes"], *axes)))
        return dataclasses.replace(self, kernel_shape=tuple(shape[axis] for axis in sorted(shape)), **moved)

    def to_matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "out in"]:
        """The matrix of one layer's kernel, which has no lifted axes."""
        out_axes, in_axes = (self._without_stack(axes) for axes in (self.out_axes, self.in_axes))
        return kernel.transpose((*out_axes, *in_axes)).reshape(self.shape)

    def from_matrix(self, matrix: Array) -> Array:
        """The inverse of `to_matrix`, for arrays of any dtype."""
        order = (*self._without_stack(self.out_axes), *self._without_stack(self.in_axes))
        sizes = (*self._sizes(self.out_axes), *self._sizes(self.in_axes))
        return matrix.reshape(sizes).transpose(np.argsort(order))

    def _without_stack(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis - sum(stacked < axis for stacked in self.stack_axes) for axis in axes)


def linear_spec(in_: int, out: int) -> LayerSpec:
    """A linear layer with a kernel `[in, out]`, still dense."""
    return LayerSpec((in_, out), out_axes=(1,), in_axes=(0,))


def conv_spec(kernel_size: tuple[int, ...], c_in: int, out: int) -> LayerSpec:
    """A convolution with a kernel `[*kernel_size, c_in, out]`, still dense."""
    rank = len(kernel_size)
    return LayerSpec(
        (*kernel_size, c_in, out),
        out_axes=(rank + 1,),
        in_axes=tuple(range(rank + 1)),
        spatial_axes=tuple(range(rank)),
    )


def kept_spec(shape: tuple[int, ...]) -> LayerSpec:
    """Any kernel that stays dense: rows are its last axis, columns all others."""
    last = len(shape) - 1
    return LayerSpec(shape, (last,), tuple(range(last)))
