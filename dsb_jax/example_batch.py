"""Example arguments of a model, from which those of any other batch size are made: shapes to trace, arrays to try."""

import dataclasses
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

BATCH = "batch"  # the name of the symbolic dimension

BatchAxis = int | tuple[int | None, ...] | None


@dataclasses.dataclass(frozen=True)
class ExampleBatch:
    """The arguments of one call.

    Attributes:
      leaves: all of their arrays.
      structure: of the arguments, a tuple.
      axes: the batch axis of each array; None if it has no batch.
      size: of the batch; None if no array has one.
    """

    leaves: tuple[jax.Array, ...]
    structure: Any
    axes: tuple[int | None, ...]
    size: int | None

    @classmethod
    def of(cls, arguments: tuple[Any, ...], batch_axis: BatchAxis) -> "ExampleBatch":
        """Finds the batch.

        Args:
          arguments: pytrees of arrays.
          batch_axis: a number stands for all arrays that are as long there as the first one; a tuple says it for each
            argument, None for one without a batch; None alone stands for no batch at all.

        Raises:
          ValueError: if that does not fit the arguments.
        """
        each = batch_axis if isinstance(batch_axis, tuple) else (batch_axis,) * len(arguments)
        if len(each) != len(arguments):
            raise ValueError(
                f"batch_axis={batch_axis} is for {len(each)} arguments of {len(arguments)}; give one for each."
            )
        given = [
            (jnp.asarray(leaf), axis)
            for argument, axis in zip(arguments, each, strict=True)
            for leaf in jax.tree.leaves(argument)
        ]
        lengths = [_length(leaf, axis) for leaf, axis in given]
        batched = [number for number, (_, axis) in enumerate(given) if axis is not None]
        size = lengths[batched[0]] if batched else None
        for number in batched if isinstance(batch_axis, tuple) else batched[:1]:
            leaf, axis = given[number]
            if lengths[number] != size or not size:
                raise ValueError(
                    f"batch_axis={batch_axis}: {as_text(leaf)} has {lengths[number] or 'no'} examples on axis {axis}, "
                    f"expected {size or 'some'}; give the axis of the examples, or None for a shape to be kept."
                )
        axes = tuple(
            axis % leaf.ndim if axis is not None and length == size else None
            for (leaf, axis), length in zip(given, lengths, strict=True)
        )
        return cls(tuple(leaf for leaf, _ in given), jax.tree.structure(arguments), axes, size)

    def abstract(self) -> Any:
        """Shapes and dtypes of the arguments, the batch a symbolic dimension of `jax.export`."""
        (batch,) = jax.export.symbolic_shape(BATCH)

        def shape(leaf: jax.Array, batch_axis: int | None) -> jax.ShapeDtypeStruct:
            sizes = [batch if axis == batch_axis else size for axis, size in enumerate(leaf.shape)]
            return jax.ShapeDtypeStruct(tuple(sizes), leaf.dtype)

        return jax.tree.unflatten(self.structure, map(shape, self.leaves, self.axes))

    def resized(self, size: int | None) -> Any:
        """The arguments with a batch of another size: the examples from the first on, and again."""
        if size is None or self.size is None:
            return jax.tree.unflatten(self.structure, self.leaves)
        idx = np.arange(size) % self.size

        def resize(leaf: jax.Array, axis: int | None) -> jax.Array:
            return leaf if axis is None else jnp.take(leaf, idx, axis=axis)

        return jax.tree.unflatten(self.structure, map(resize, self.leaves, self.axes))


def _length(leaf: jax.Array, axis: int | None) -> int:
    """Of an axis; 0 if the array has none such."""
    return leaf.shape[axis] if axis is not None and -leaf.ndim <= axis < leaf.ndim else 0


def as_text(array: Any) -> str:
    """Dtype and shape, such as "float32[batch, 784]"."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}]"
