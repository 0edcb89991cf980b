"""What has no sparse form, and why: read off the modules of Flax, whose Linen and NNX have the same attributes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from dsb_jax.equations import Equation
from dsb_jax.ops.convolution import conv_general_dilated

KEPT_DENSE = "kept dense"
LOOKED_UP = "Embed looks its rows up"


def as_tuple(value: Any) -> tuple[int, ...]:
    """Sizes or axes that Flax also takes as one number."""
    return (value,) if isinstance(value, int) else tuple(value)


def _ones(value: Any) -> bool:
    return value is None or all(v == 1 for v in as_tuple(value))


def _is_product(einsum_str: Any) -> bool:
    return einsum_str is None or Equation.parse(einsum_str).is_product  # None: it comes with the call


# For each attribute that changes what a layer computes, the values that the sparse product has an answer to.
_SERVED: Mapping[str, Callable[[Any], bool]] = {
    "kernel_size": lambda value: len(as_tuple(value)) == 2,
    "kernel_dilation": _ones,
    "input_dilation": _ones,
    "feature_group_count": lambda value: value == 1,
    "mask": lambda value: value is None,
    "conv_general_dilated": lambda value: value in (None, lax.conv_general_dilated, conv_general_dilated),
    "conv_general_dilated_cls": lambda value: value is None,
    "dot_general": lambda value: value in (None, lax.dot_general),
    "dot_general_cls": lambda value: value is None,
    "batch_dims": lambda value: not as_tuple(value),
    "batch_axis": lambda value: not value,
    "einsum_str": _is_product,
    "einsum_op": lambda value: value is jnp.einsum,
    "preferred_element_type": lambda value: value is None,
}


def unserved(module: Any) -> str | None:
    """The first attribute of a layer that the sparse product has no answer to, as `name=value`; None if it has."""
    for name, is_served in _SERVED.items():
        if hasattr(module, name) and not is_served(value := getattr(module, name)):
            return f"{name}={_shown(value)}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(dict(value))
    return getattr(value, "__name__", None) or (f"an array {value.shape}" if hasattr(value, "shape") else str(value))


def refuse_unserved(module: Any, name: str) -> None:
    """NotImplementedError for a layer with an attribute that the sparse product has no answer to."""
    if why := unserved(module):
        raise NotImplementedError(
            f"{why} of {name} has no sparse form (2-D, dilation 1, one feature group, the product of this library); "
            "keep this layer dense."
        )


def no_sparse_form(why: str) -> str:
    """The reason of a plan for what `unserved` found."""
    return f"{why} has no sparse form"


def inside_of_cell(cell: Any) -> str:
    """The reason for the layers of a recurrent cell: it calls them in a loop, where norms do not add up."""
    return f"inside of {type(cell).__name__}, a recurrent cell"


def rewritten_by(wrapper: Any) -> str:
    """The reason for a layer whose kernel a wrapper (weight norm, spectral norm) rewrites at every call."""
    return f"{type(wrapper).__name__} rewrites its kernel"


def of_foreign_module(kind: str, layers: str) -> str:
    """The reason for a parameter of a module that is none of those that can be sparse."""
    return f"a parameter of {kind or 'a module'}, which is none of {layers}"
