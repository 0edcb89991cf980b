"""Calling a model whose code is not known: its inputs, abstract or not, and its argument for training mode."""

import inspect
from collections.abc import Mapping
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


def abstract_array(leaf: Any) -> jax.ShapeDtypeStruct | None:
    """What tracing must know of an argument, its axes of a mesh included; None for what is no array."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return None
    sharding = getattr(leaf, "sharding", None)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if isinstance(leaf, np.ndarray) else leaf.dtype
    return jax.ShapeDtypeStruct(
        leaf.shape, dtype, sharding=sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    )


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
