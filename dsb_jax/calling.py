"""Calling a model whose code is not known: its inputs, abstract or not, and its argument for training mode."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# Names of the argument that tells training from evaluation, and what it is in training.
_TRAIN_ARGUMENTS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "inference": False,
}


def abstract_arguments(args: Any, kwargs: Any) -> tuple[dict[int, Any], Callable[[Mapping[int, Any]], Any]]:
    """The arrays among the arguments of a call, to be traced.

    Returns:
      What tracing must know of each, by number, and a function that gives `(args, kwargs)` with other arrays in their
      places; what is no array (`train=True`) stays.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))

    def with_arrays(arrays: Mapping[int, Any]) -> Any:
        return jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])

    return {i: _abstract(leaf) for i, leaf in enumerate(leaves) if _is_array(leaf)}, with_arrays


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    """With its axes of a mesh, and in a dtype that jax has."""
    sharding = getattr(array, "sharding", None)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype) if isinstance(array, np.ndarray) else array.dtype
    return jax.ShapeDtypeStruct(
        array.shape, dtype, sharding=sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    )


def method_of(model: Any, method: str | Callable[..., Any] | None) -> Callable[..., Any]:
    """The function of a model's class that is meant, by default `__call__`; it takes the model first."""
    if callable(method):
        return getattr(method, "__func__", method)  # of a bound one, `model.encode`
    return getattr(type(model), "__call__" if method is None else method)


def call_model(model: Any, first: Any, inputs: Any, *, train: bool, method: str = "apply", **options: Any) -> Any:
    """`model.apply(first, inputs, ...)` or `model.init(first, inputs, ...)`.

    Args:
      model: with `init` and `apply` as a Linen module has them.
      first: the variables, or for `init` the key.
      inputs: a dictionary whose keys are arguments of the model goes in by name, a tuple argument by argument, anything
        else (an array, another dictionary) as the one argument.
      train: training mode; passed on if the model has an argument for it: train, training, is_training, deterministic
        or inference.
      method: "apply" or "init".
      **options: of that method, such as `rngs` and `mutable`.
    """
    parameters = inspect.signature(type(model).__call__).parameters
    named = {name: train == value for name, value in _TRAIN_ARGUMENTS.items() if name in parameters}
    if isinstance(inputs, Mapping) and inputs.keys() <= parameters.keys():
        return getattr(model, method)(first, **options, **named, **inputs)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    return getattr(model, method)(first, *arguments, **options, **named)
