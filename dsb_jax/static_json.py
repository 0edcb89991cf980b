"""The static parts of this library's pytrees as JSON, and with it their registration with `jax.export`.

An exported function may take variables as arguments; the file then holds the types of their nodes:

    blob = jax.export.export(jax.jit(step))(variables, x).serialize()
    step = jax.export.deserialize(blob).call       # wherever dsb_jax is imported

Of each node that is its name, `dsb_jax.LayerTopology`, and what is no array: a `LayerSpec`, sizes, numbers.
"""

import dataclasses
import json
from typing import Any

import jax.export
import numpy as np

from dsb_jax.spec import LayerSpec


def to_json(static: Any) -> str:
    """A `LayerSpec`, a number, a text, None, or tuples of them."""
    return json.dumps(static, default=_plain)


def from_json(text: str | bytes) -> Any:
    """The inverse of `to_json`.

    Raises:
      ValueError: if the text is no JSON, or an object in it no `LayerSpec`.
    """
    return _static(json.loads(text))


def register_for_export[T](cls: type[T]) -> type[T]:
    """Registers a pytree with `jax.export`; a dataclass or a named tuple, of which jax knows already."""
    name = f"dsb_jax.{cls.__name__}"
    if issubclass(cls, tuple):
        return jax.export.register_namedtuple_serialization(cls, serialized_name=name)
    return jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        serialize_auxdata=lambda static: to_json(static).encode(),
        deserialize_auxdata=from_json,
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else dataclasses.asdict(value)


def _static(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_static, value))
    if not isinstance(value, dict):
        return value
    try:
        return LayerSpec(**{name: _static(item) for name, item in value.items()})
    except TypeError as error:  # a name that is missing or unknown, or a value of another type
        raise ValueError(f"{value} are not the sizes of a layer ({error}).") from error
