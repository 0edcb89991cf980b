"""Sparse-training methods, one paper a file, each a value (`dsb_jax.methods.base.Method`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsb_jax.methods.base import LayerReport, LayerState, Method
from dsb_jax.methods.blocks import COLUMNS
from dsb_jax.methods.dsb import DSB, GRANULARITIES
from dsb_jax.methods.dsb_growth import GROW
from dsb_jax.methods.rigl import RigL
from dsb_jax.methods.set import SET
from dsb_jax.methods.static import Static
from dsb_jax.methods.topkast import TopKAST

# `import *` must not bring the module `set`, which is a word of Python.
__all__ = [
    "COLUMNS",
    "DSB",
    "GRANULARITIES",
    "GROW",
    "METHODS",
    "SET",
    "LayerReport",
    "LayerState",
    "Method",
    "RigL",
    "Static",
    "TopKAST",
    "from_json",
    "to_json",
]

METHODS: dict[str, type[Method]] = {method.name: method for method in (DSB, Static, RigL, SET, TopKAST)}


def to_json(method: Method) -> dict[str, Any]:
    """The method's name and fields, as JSON has them.

    Raises:
      ValueError: if it is not one of `METHODS`.
    """
    if type(method) not in METHODS.values():
        raise ValueError(f"{method!r} is not one of the methods {', '.join(METHODS)}; write its fields yourself.")
    return {"name": method.name, **dataclasses.asdict(method)}  # type: ignore[call-overload]


def from_json(values: Mapping[str, Any]) -> Method:
    """The inverse of `to_json`; a field that is missing has its default.

    Raises:
      ValueError: if the name or a field is unknown, or a value invalid.
    """
    fields = dict(values)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method name={name!r} is unknown; choose one of {', '.join(METHODS)}.")
    known = [field.name for field in dataclasses.fields(METHODS[name])]  # type: ignore[arg-type]
    if odd := [field for field in fields if field not in known]:
        raise ValueError(f"method {name!r} has no field {odd[0]!r}; it has {', '.join(known) or 'none'}.")
    try:
        return METHODS[name](**fields)
    except ValueError as error:
        raise ValueError(f"method {name!r}: {error}") from None
