"""Which implementation computes a layer, and why: an explicit name, or "auto" by a cost model.

The model counts what each way does for one training step (forward, input gradient, weight gradient) and
multiplies by rates measured on a 2-core x86 CPU (`python -m experiments.benchmark_training` measures the
outcome on yours). Only ratios matter, so the choice carries over to CPUs with another clock. On other devices
there is no sparse kernel yet, so "auto" takes the dense product there.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import jax

from dsb_jax.layout import BlockLayout
from pallas_kernels.interface import ConvGeometry

Implementation = Literal["auto", "xla", "dense", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

# Nanoseconds, forward and backward together.
_DENSE_FLOP = 1 / 170  # a large dense product or convolution
_SPARSE_FLOP = 1 / 90  # products with R rows on one side
_COPIED_ELEMENT = 0.25  # one element of a gathered row
_COLUMN = 400.0  # starting the copy of one column
_UNPACKED_WEIGHT = 4.0  # unpack the kernel, pack its gradient: per dense weight


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a layer: the implementation's name, and the reason in a few words."""

    implementation: str
    reason: str


_recorder: contextvars.ContextVar[dict[tuple[str, ...], Choice] | None] = contextvars.ContextVar(
    "recorder", default=None
)


@contextlib.contextmanager
def record_choices() -> Iterator[dict[tuple[str, ...], Choice]]:
    """Collects what is chosen for each layer (by its path) while a model is traced inside the context."""
    choices: dict[tuple[str, ...], Choice] = {}
    token = _recorder.set(choices)
    try:
        yield choices
    finally:
        _recorder.reset(token)


def record(path: tuple[str, ...], choice: Choice) -> None:
    """Called by a module while it is traced; does nothing outside of `record_choices`."""
    if (choices := _recorder.get()) is not None:
        choices[path] = choice


def check_implementation(implementation: str) -> None:
    """Raises ValueError for a name that does not exist."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}.")


def predicted_time_ratio(layout: BlockLayout, geometry: ConvGeometry, input_size: tuple[int, int], batch: int) -> float:
    """Predicted training-step time of the `xla` product of one layer over that of its dense fallback."""
    out, in_ = layout.shape
    rows, cols = layout.block_shape
    out_h, out_w = geometry.output_size(*input_size)
    run = out_h * out_w * batch  # positions that each weight meets
    columns = layout.num_blocks * cols
    tiles = max(1, run // 2048)
    sparse = 3 * columns * (run * (2 * rows * _SPARSE_FLOP + _COPIED_ELEMENT) + tiles * _COLUMN)
    dense = 3 * 2 * out * in_ * run * _DENSE_FLOP + out * in_ * _UNPACKED_WEIGHT
    return sparse / dense


def choose(
    implementation: str,
    layout: BlockLayout,
    *,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    batch: int,
    backend: str | None = None,
) -> Choice:
    """Resolves "auto" for one layer from static sizes alone; an explicit name is taken as it is.

    Raises:
      ValueError: if the name is unknown.
    """
    check_implementation(implementation)
    if implementation != "auto":
        return Choice(implementation, "asked for")
    backend = backend or jax.default_backend()
    if backend != "cpu":
        return Choice("dense", f"no sparse kernel for {backend}")
    ratio = predicted_time_ratio(layout, geometry, input_size, batch)
    return Choice("xla" if ratio < 1 else "dense", f"predicted {ratio:.2f}x the dense time")
