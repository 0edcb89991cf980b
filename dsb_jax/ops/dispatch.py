"""Which implementation computes a layer, and why: an explicit name, or "auto" by measurement or by a cost model.

    xla         shuffled-block product in plain XLA, fast on a CPU
    pallas      GPU kernels in Pallas
    triton      GPU kernels in jax-triton
    dense       unpack, then XLA's dense product; serves everything everywhere
    reference   the readable specification, slow

"auto" looks a layer up in the tuned tables (`dsb_jax.ops.tuning`), takes the fastest implementation that serves it, and
falls back on the cost model (`dsb_jax.ops.cost_model`) for layers that nothing near was measured of. All of it is plain
Python on static sizes, while a model is traced.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
from jax import lax

from dsb_jax.layout import BlockLayout
from dsb_jax.ops import tuning
from dsb_jax.ops.cost_model import cpu_time_ratio, device_facts, gpu_time_ratio
from dsb_jax.ops.layer_call import LayerCall
from pallas_kernels import limits
from pallas_kernels.interface import ConvGeometry
from pallas_kernels.tiles import KernelTiles

Implementation = Literal["auto", "xla", "dense", "reference", "pallas", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
GPU_KERNELS = ("pallas", "triton")

A_DENSE_LAYER = "a dense layer"  # the reason of a layer that stores its whole kernel

# Models, and measurements of another layer, are good to some 20 to 30 % at the best: a small predicted gain is none.
CLEAR_WIN = 0.9


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a layer.

    Attributes:
      implementation: its name, never "auto".
      reason: in a few words.
      tiles: tile sizes of the GPU kernels; None for their defaults, and for all other implementations.
      elements: of the layer's input and output, filled in by what records the choice.
    """

    implementation: str
    reason: str
    tiles: KernelTiles | None = None
    elements: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        if self.implementation == "auto":
            raise ValueError('implementation="auto" is no choice; dsb_jax.ops.choose makes one of it.')


_recorder: contextvars.ContextVar[dict[tuple[str, ...], Choice] | None] = contextvars.ContextVar(
    "recorder", default=None
)


_without_tables: contextvars.ContextVar[bool] = contextvars.ContextVar("without_tables", default=False)


@contextlib.contextmanager
def record_choices(*, tuned: bool = True) -> Iterator[dict[tuple[str, ...], Choice]]:
    """Collects what is chosen for each layer (by its path) while a model is traced inside the context.

    With `tuned=False` the cost model alone decides there, whatever was measured on this machine.
    """
    choices: dict[tuple[str, ...], Choice] = {}
    tokens = _recorder.set(choices), _without_tables.set(not tuned)
    try:
        yield choices
    finally:
        _recorder.reset(tokens[0])
        _without_tables.reset(tokens[1])


def _lookup(layer: LayerCall, device_kind: str) -> tuning.Found | None:
    return None if _without_tables.get() else tuning.lookup(layer, device_kind)


def record(path: tuple[str, ...], choice: Choice, elements: int = 0) -> None:
    """Called by a module while it is traced; does nothing outside of `record_choices`."""
    if (choices := _recorder.get()) is not None:
        choices[path] = dataclasses.replace(choice, elements=elements)


def check_implementation(implementation: str) -> None:
    """Raises ValueError for a name that does not exist."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}.")


def unsupported_reason(
    implementation: str, layer: LayerCall, backend: str, precision: lax.PrecisionLike = None
) -> str | None:
    """Why an implementation cannot compute a layer on a backend of jax, with the cure; None if it can.

    Raises:
      ValueError: if the layer's kernel does not fit its input.
    """
    if implementation not in GPU_KERNELS:
        return None
    if backend != "gpu":
        return f"it needs a GPU and this process computes on the {backend}; use auto, xla or dense"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if implementation == "triton" and missing:
        return f"{missing[-1]} is not installed; pip install '.[triton]', or use pallas"
    spec = layer.spec
    limit = limits.unsupported_reason(
        layer.dtype, spec.block_shape, spec.shape, layer.geometry, layer.input_size, layer.batch, precision
    )
    return limit and f"{limit}; use auto or dense"


def choose(
    implementation: str | Choice,
    layout: BlockLayout,
    *,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    batch: int,
    dtype: Any = "float32",
    precision: lax.PrecisionLike = None,
    backend: str | None = None,
    device_kind: str | None = None,
) -> Choice:
    """Resolves "auto" for one layer from static sizes alone; any other name is taken as it is, or refused.

    Args:
      implementation: one of IMPLEMENTATIONS, or a choice that was made before, which is returned.
      layout: of the layer.
      geometry: kernel size, strides, padding.
      input_size: height and width of the input; (1, 1) for a linear layer.
      batch: N.
      dtype: of activations and blocks.
      precision: of the products, as in `jax.lax.dot`.
      backend: "cpu", "gpu", ...; by default that of this process.
      device_kind: the device's name, such as "NVIDIA H200"; by default that of this process' first device.

    Raises:
      ValueError: if the name is unknown, or a tuned table is broken.
      NotImplementedError: if an explicit implementation cannot compute the layer here, with the reason and the cure.
    """
    if isinstance(implementation, Choice):
        return implementation
    check_implementation(implementation)
    if implementation not in ("auto", *GPU_KERNELS):
        return Choice(implementation, "asked for")
    if implementation == "auto" and batch == 0:
        return Choice("dense", "an empty batch")
    layer = LayerCall.of(
        layout.shape[0],
        geometry,
        block_shape=layout.block_shape,
        num_blocks=layout.num_blocks,
        input_size=input_size,
        batch=batch,
        dtype=dtype,
    )
    if backend is None:
        backend = jax.default_backend()
        device_kind = device_kind or jax.devices()[0].device_kind
    device_kind = device_kind or ("cpu" if backend == "cpu" else "an unknown device")
    if implementation == "auto":
        return _choose(layer, backend, device_kind, precision)
    if reason := unsupported_reason(implementation, layer, backend, precision):
        raise NotImplementedError(f"implementation={implementation!r} cannot compute a layer of {layer}: {reason}.")
    return Choice(implementation, "asked for", _tuned_tiles(implementation, layer, device_kind))


def predicted_time_ratio(layer: LayerCall, backend: str, device_kind: str) -> float | None:
    """Predicted training-step time of the sparse product over that of the dense fallback; None without a model."""
    if backend == "cpu":
        return cpu_time_ratio(layer)
    facts = device_facts(device_kind) if backend == "gpu" else None
    return None if facts is None else gpu_time_ratio(layer, facts)


def _choose(layer: LayerCall, backend: str, device_kind: str, precision: lax.PrecisionLike) -> Choice:
    """What "auto" takes, by the tuned tables before the cost model."""
    predicted = predicted_time_ratio(layer, backend, device_kind)
    if predicted is None:
        return Choice("dense", f"no sparse kernel for {device_kind if backend == 'gpu' else backend}")
    if (found := _lookup(layer, device_kind)) is not None:
        return _from_table(found, layer, predicted, backend, device_kind, precision)
    on_gpu = backend == "gpu"
    implementation = "pallas" if on_gpu else "xla"
    reason = f"predicted {predicted:.2f} of the dense time" + (f" on {device_kind}" if on_gpu else "")
    if predicted >= CLEAR_WIN:
        return Choice("dense", reason)
    if unsupported := unsupported_reason(implementation, layer, backend, precision):
        return Choice("dense", unsupported.split(";")[0])
    return Choice(implementation, reason)


def _from_table(
    found: tuning.Found,
    layer: LayerCall,
    predicted: float,
    backend: str,
    device_kind: str,
    precision: lax.PrecisionLike,
) -> Choice:
    """The fastest measured implementation that can compute the layer and beats dense.

    Of a layer measured nearby, the ratio is scaled by what the cost model says of the difference.
    """
    scale, margin, how = 1.0, 1.0, "tuned"
    if not found.exact:
        there = predicted_time_ratio(found.layer, backend, device_kind)
        assert there is not None  # the same device has a model for `layer`
        scale, margin, how = predicted / there, CLEAR_WIN, "tuned on a layer nearby"
    dense_s = next(result.seconds for result in found.results if result.implementation == "dense")
    candidates = [result for result in found.results if result.implementation in IMPLEMENTATIONS[1:]]
    skipped = ""
    for result in candidates:  # fastest first
        if result.implementation == "dense":
            continue
        ratio = result.seconds / dense_s * scale
        if reason := unsupported_reason(result.implementation, layer, backend, precision):
            skipped = skipped or f"; {result.implementation}: {reason.split(';')[0]}"
            continue
        if ratio < margin:
            return Choice(result.implementation, f"{how}: {ratio:.2f} of dense on {device_kind}", result.tiles)
        return Choice("dense", f"{how}: {result.implementation} takes {ratio:.2f} of dense on {device_kind}")
    return Choice("dense", f"{how}: nothing that serves is faster on {device_kind}{skipped}")


def _tuned_tiles(implementation: str, layer: LayerCall, device_kind: str) -> KernelTiles | None:
    """The measured tiles of a GPU kernel that is asked for by name, if this layer or one nearby was measured."""
    found = _lookup(layer, device_kind) if implementation in GPU_KERNELS else None
    results = found.results if found else ()
    return next((result.tiles for result in results if result.implementation == implementation), None)
