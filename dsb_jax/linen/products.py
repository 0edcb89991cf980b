"""What a sparse layer of Linen computes: the attributes of its module, handed to the products of `dsb_jax.products`.

`SparseDense` and `SparseConv` call these, and so do `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum` and `nn.Conv` in a model
that `sparsify` made sparse. Weights and bias come as they are stored.
"""

from typing import Any

import flax.linen.module
import jax
from flax import linen as nn

from dsb_jax import products
from dsb_jax.equations import Equation
from dsb_jax.paths import path_name
from dsb_jax.products import Call, Weights

REWRITE_KERNELS = (nn.WeightNorm, nn.SpectralNorm)


def _call(module: Any) -> Call:
    return Call(
        layer_name(module), module.path, lambda *arrays: module.promote_dtype(*arrays, dtype=module.dtype),
        module.precision,
    )  # fmt: skip


def linear(
    module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None, *, feature_major: bool = False
) -> jax.Array:
    """x[..., in] -> [..., out], or [in, N] -> [out, N] if `feature_major`."""
    return products.linear(_call(module), x, weights, bias, out=module.features, feature_major=feature_major)


def general(module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None) -> jax.Array:
    """The contraction of `module.axis` of x with all input axes of the kernel."""
    return products.general(_call(module), x, weights, bias, axis=module.axis, features=module.features)


def einsum(
    module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None, einsum_str: str | None = None
) -> jax.Array:
    """The result of the module's equation, or of that of the call."""
    equation = Equation.parse(equation_of(module, einsum_str))
    return products.einsum(_call(module), x, weights, bias, equation=equation, kernel_shape=tuple(module.shape))


def convolution(
    module: Any, x: jax.Array, weights: Weights, bias: jax.Array | None, *, feature_major: bool = False
) -> jax.Array:
    """x[..., H, W, C] -> [..., OH, OW, out], or [C, H, W, N] -> [out, OH, OW, N] if `feature_major`."""
    return products.convolution(
        _call(module), x, weights, bias, out=module.features, kernel_size=module.kernel_size, strides=module.strides,
        padding=module.padding, feature_major=feature_major,
    )  # fmt: skip


def feature_major_convolution(module: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """That of a layer which stays dense: x[C, H, W, N] -> [out, OH, OW, N]."""
    return products.feature_major_convolution(
        _call(module), x, kernel, bias, strides=module.strides, padding=module.padding
    )


def inputs_of(args: Any, kwargs: Any) -> tuple[jax.Array, str | None]:
    """What a layer is called with: its input, and the equation that an `nn.Einsum` may be given here."""
    x, *rest = args if args else (kwargs["inputs"],)
    return x, rest[0] if rest else kwargs.get("einsum_str")


def equation_of(module: nn.Einsum, einsum_str: str | None) -> str:
    """Of a module and its call, of which one has an equation."""
    return nn.merge_param("einsum_str", module.einsum_str, einsum_str)


def layer_name(module: nn.Module) -> str:
    """The path of a module as text, for messages."""
    return path_name(module.path) or "the layer"


def without_topology(module: nn.Module) -> str:
    """What is wrong with variables whose topology was left behind."""
    return (
        f"{layer_name(module)} has sparse weights but no topology; pass all collections, model.apply(variables, ...), "
        "not the parameters alone."
    )


def refuse_normalized(module: nn.Module) -> None:
    """NotImplementedError inside of a wrapper that rewrites kernels: blocks are none, so it would do nothing."""
    for outer in flax.linen.module._context.module_stack:
        if isinstance(outer, REWRITE_KERNELS):
            raise NotImplementedError(
                f"{type(outer).__name__} cannot normalize {layer_name(module)}, whose weights are sparse; keep this "
                "layer dense."
            )
