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

# Nanoseconds for forward and backward together, fitted by least squares of the logarithms to 98 times of 14 layers
# (64 channels at 32x32 to a 512x512 linear layer, strides 1 and 2, batch 128, float32; densities 0.1, 0.2, 0.5; 16x16
# and 32x8 blocks, feature-major). Good to some 20 to 30 %, so that a small predicted gain is none.
_DENSE_ACTIVATION = 8.1  # each element of the input and the output
_DENSE_PRODUCT = 0.035  # each weight at each position
_DENSE_WEIGHT = 9.1  # each weight of the unpacked kernel
_SPARSE_ACTIVATION = 3.4  # each element of the input and the output
_SPARSE_COPY = 1.3  # each column of a panel at each position: the gather
_SPARSE_PRODUCT = 0.031  # each stored weight at each position
_SPARSE_WEIGHT = 20.0  # each stored weight
_CLEAR_WIN = 0.9

A_DENSE_LAYER = "a dense layer"  # the reason of a layer that stores its whole kernel


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
    activations = (geometry.in_channels * input_size[0] * input_size[1] + out * out_h * out_w) * batch
    columns = layout.num_blocks * cols
    sparse = _SPARSE_ACTIVATION * activations + columns * run * (_SPARSE_COPY + rows * _SPARSE_PRODUCT)
    sparse += columns * rows * _SPARSE_WEIGHT
    dense = _DENSE_ACTIVATION * activations + out * in_ * (run * _DENSE_PRODUCT + _DENSE_WEIGHT)
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
    return Choice("xla" if ratio < _CLEAR_WIN else "dense", f"predicted {ratio:.2f} of the dense time")
