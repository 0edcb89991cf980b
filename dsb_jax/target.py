"""The device that programs are traced for: that of this process, unless a context of this file says otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax

BACKENDS = ("cpu", "gpu", "tpu")


class Target(NamedTuple):
    """What a program is compiled for: a backend of jax and the name of a device, such as "NVIDIA H200"."""

    backend: str
    device_kind: str


ANY = Target("any", "any platform")  # a program may be lowered for several, of which tracing knows nothing

_given: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(backend: str, device_kind: str) -> Iterator[None]:
    """Inside, models are initialized and traced for a device that need not be here.

    with compiling_for("gpu", "NVIDIA H200"):
        compiled = pallas_kernels.aot.compile_for("H200", step, params, topology)

    "auto" chooses for it, and believes that its kernels are right there. What was traced before keeps what it was
    traced for: give functions to `jax.jit` inside.
    """
    _check_backend(backend)
    token = _given.set(Target(backend, device_kind))
    try:
        yield
    finally:
        _given.reset(token)


@contextlib.contextmanager
def compiling_for_any() -> Iterator[None]:
    """Inside, models are traced for programs that are lowered for several platforms, as `dsb_jax.export` does.

    "auto" takes what serves all of them. What was traced before keeps what it was traced for, as in `compiling_for`.
    """
    token = _given.set(ANY)
    try:
        yield
    finally:
        _given.reset(token)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is none of jax's; give one of {', '.join(BACKENDS)} (a CUDA device: gpu)."
        )


def given_target() -> Target | None:
    """What `compiling_for` says, or `ANY`, or None."""
    return _given.get()


def current_backend(asked_for: str | None = None) -> str:
    """Of jax: the one asked for, else that of `compiling_for` (or "any"), else this process' own.

    Raises:
      ValueError: for a name that is none of `BACKENDS`.
    """
    if asked_for is not None:
        _check_backend(asked_for)
        return asked_for
    given = _given.get()
    return jax.default_backend() if given is None else given.backend
