"""Einsum equations that are matrix products, as `nn.Einsum` and `nnx.Einsum` take them: one operand is the kernel.

    ...d,dhk->...hk     a projection into heads: [d, heads, head_dim]
    bqhk,hkd->bqd       and out of them
    bthd,hdk->bthk      none: each head has a matrix of its own

What is a product is computed as one, between two transposes.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from dsb_jax.spec import LayerSpec

_ELLIPSIS = "."  # one character for every entry of an operand


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation with two operands, inputs and kernel; hashable.

    Attributes:
      inputs, kernel, result: a character for each axis, "." for an ellipsis.
    """

    inputs: str
    kernel: str
    result: str

    @classmethod
    def parse(cls, text: str) -> "Equation":
        """From a text that Flax takes: two operands and an explicit result."""
        operands, _, result = text.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
        inputs, _, kernel = operands.partition(",")
        return cls(inputs, kernel, result)

    @property
    def summed(self) -> str:
        """What it sums over, in the order of the kernel: the columns of the matrix."""
        return "".join(letter for letter in self.kernel if letter in self.inputs)

    @property
    def features(self) -> str:
        """The axes of the outputs, in the order of the result: the rows of the matrix."""
        return "".join(letter for letter in self.result if letter in self.kernel)

    @property
    def _kept(self) -> str:
        """The other axes of the inputs, in their order."""
        return "".join(letter for letter in self.inputs if letter not in self.kernel)

    @property
    def is_product(self) -> bool:
        """Whether it is a product with one matrix, the same for all other axes of the inputs."""
        return (
            all(len(set(part)) == len(part) for part in (self.inputs, self.kernel, self.result))
            and _ELLIPSIS not in self.kernel
            and bool(self.summed and self.features)
            and set(self.summed).isdisjoint(self.result)
            and set(self.summed + self.features) == set(self.kernel)
            and set(self._kept + self.features) == set(self.result)
        )

    def spec(self, kernel_shape: tuple[int, ...]) -> LayerSpec:
        """The sizes of a layer with such a kernel; only of what is a product."""
        out_axes, in_axes = (tuple(map(self.kernel.index, letters)) for letters in (self.features, self.summed))
        return LayerSpec(kernel_shape, out_axes, in_axes)

    def product(self, x: jax.Array, sizes: tuple[int, ...], matmul: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The result, by a function [..., in] -> [..., out].

        Args:
          x: the inputs.
          sizes: of the features, in the order of the result.
          matmul: multiplies with the matrix, whose columns and rows are ordered as in `spec`.
        """
        full = self._expanded(x.ndim)
        kept = full._kept
        columns = x.transpose([full.inputs.index(letter) for letter in kept + full.summed])
        shape = columns.shape[: len(kept)]
        y = matmul(columns.reshape(*shape, math.prod(columns.shape[len(kept) :]))).reshape(*shape, *sizes)
        return y.transpose([(kept + full.features).index(letter) for letter in full.result])

    def _expanded(self, rank: int) -> "Equation":
        """With an axis of its own for each that the ellipsis stands for."""
        count = rank - len(self.inputs) + 1 if _ELLIPSIS in self.inputs else 0
        axes = "".join(map(str, range(count)))  # no letters
        return Equation(self.inputs.replace(_ELLIPSIS, axes), self.kernel, self.result.replace(_ELLIPSIS, axes))
