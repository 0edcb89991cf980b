"""The device that programs are traced for: that of this process, unless `compiling_for` says otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """What a program is compiled for: a backend of jax and the name of a device, such as "NVIDIA H200"."""

    backend: str
    device_kind: str


_given: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(backend: str, device_kind: str) -> Iterator[None]:
    """Inside, models are initialized and traced for a device that need not be here.

    with compiling_for("gpu", "NVIDIA H200"):
        compiled = pallas_kernels.aot.compile_for("H200", step, params, topology)

    "auto" chooses for it, and believes that its kernels are right there. What was traced before keeps what it was
    traced for: give functions to `jax.jit` inside.
    """
    token = _given.set(Target(backend, device_kind))
    try:
        yield
    finally:
        _given.reset(token)


def given_target() -> Target | None:
    """What `compiling_for` says, or None."""
    return _given.get()


def current_backend() -> str:
    """Of jax: that of `compiling_for`, else this process' own."""
    given = _given.get()
    return jax.default_backend() if given is None else given.backend
