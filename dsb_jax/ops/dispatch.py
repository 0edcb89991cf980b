"""What computes each pass of a layer, and why: an explicit name, or "auto" by measurement or by a cost model.

    native      kernels of a CPU with AVX2 or AVX-512, compiled when dsb_jax is installed
    xla         shuffled-block product in plain XLA, fast on any CPU
    pallas      GPU kernels in Pallas
    triton      GPU kernels in jax-triton
    dense       unpack, then XLA's dense product; serves everything everywhere
    reference   the readable specification, slow
    portable    xla if the program is lowered for a CPU, else dense: for `jax.export`, which lowers for several

"auto" decides for forward, input gradient and weight gradient, whose bounds differ, each by itself. It looks the layer
up in the tuned tables (`dsb_jax.ops.tuning`), takes the fastest implementation that serves it, and falls back on the
cost model (`dsb_jax.ops.cost_model`) for layers that nothing near was measured of. All of it is plain Python on static
sizes, while a model is traced; but the first time that a GPU kernel would be taken on a device, the kernel is checked
there (`dsb_jax.ops.self_check`), and one that fails is not taken.

A batch of any size (a symbolic dimension of `jax.export`), or a program for any platform (`compiling_for_any`), has
neither sizes nor a device to measure on: there "auto" is portable or dense, by the cost model of a CPU.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
from jax import lax
from jax.export import is_symbolic_dim

from dsb_jax.layout import BlockLayout
from dsb_jax.ops import self_check, tuning
from dsb_jax.ops.cost_model import predicted_ratios
from dsb_jax.ops.cpu_model import CpuFacts, cpu_ratios
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.native import DTYPES as NATIVE_DTYPES
from dsb_jax.ops.native import loading
from dsb_jax.target import ANY, Target, given_target
from pallas_kernels import limits
from pallas_kernels.interface import ConvGeometry, Passes
from pallas_kernels.tiles import KernelTiles

Implementation = Literal["auto", "native", "xla", "dense", "reference", "portable", "pallas", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
GPU_KERNELS = ("pallas", "triton")
COMPILED_KERNELS = ("native", *GPU_KERNELS)  # for one kind of device and one batch size

A_DENSE_LAYER = "a dense layer"  # the reason of a layer that stores its whole kernel

# Models, and measurements of another layer, are good to some 20 to 30 % at the best: a small predicted gain is none.
CLEAR_WIN = 0.9

NOMINAL_BATCH = 64  # that the cost model is asked for where the batch may be any


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a layer.

    Attributes:
      passes: the name of each pass' implementation, never "auto".
      reason: in a few words.
      tiles: tile sizes of the GPU kernels; None for their defaults, and for all other implementations.
      elements: of the layer's input and output, filled in by what records the choice.
    """

    passes: Passes
    reason: str
    tiles: KernelTiles | None = None
    elements: int = dataclasses.field(default=0, compare=False)

    def __post_init__(self) -> None:
        for name in self.passes:
            check_implementation(name)
            if name == "auto":
                raise ValueError('implementation="auto" is no choice; dsb_jax.ops.choose makes one of it.')

    @classmethod
    def all(cls, implementation: str, reason: str, tiles: KernelTiles | None = None) -> "Choice":
        """One implementation for the three passes."""
        return cls(Passes(implementation, implementation, implementation), reason, tiles)

    @property
    def implementation(self) -> str:
        """One name if it is the same for all passes, else such as "pallas, dense input gradient"."""
        first = next((name for name in self.passes if name != "dense"), "dense")
        others = [f"{name} {of.replace('_', ' ')}" for of, name in self.passes._asdict().items() if name != first]
        return ", ".join([first, *others])


_recorder: contextvars.ContextVar[dict[tuple[str, ...], Choice] | None] = contextvars.ContextVar(
    "recorder", default=None
)
_without_tables: contextvars.ContextVar[bool] = contextvars.ContextVar("without_tables", default=False)


@contextlib.contextmanager
def record_choices(*, tuned: bool = True) -> Iterator[dict[tuple[str, ...], Choice]]:
    """Collects what is chosen for each layer (by its path) while a model is traced inside the context.

    With `tuned=False` the cost model alone decides there, whatever was measured or checked on this machine.
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
    """Called while a layer is traced; does nothing outside of `record_choices`."""
    if (choices := _recorder.get()) is not None:
        choices[path] = dataclasses.replace(choice, elements=elements)


def check_implementation(implementation: str) -> None:
    """Raises ValueError for a name that does not exist."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}.")


def unsupported_reason(
    implementation: str,
    layer: LayerCall,
    backend: str,
    precision: lax.PrecisionLike = None,
    passes: tuple[str, ...] = Passes._fields,
) -> str | None:
    """Why an implementation cannot compute these passes of a layer on a backend of jax, with the cure; None if it can.

    Raises:
      ValueError: if the layer's kernel does not fit its input.
    """
    if implementation == "native":
        return _no_native_reason(layer, backend)
    if implementation not in GPU_KERNELS:
        return None
    if backend != "gpu":
        return f"it needs a GPU and this process computes on the {backend}; use auto, xla or dense"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if implementation == "triton" and missing:
        return f"{missing[-1]} is not installed; pip install '.[triton]', or use pallas"
    spec = layer.spec
    for name in passes:
        limit = limits.unsupported_reason(
            layer.dtype, spec.block_shape, spec.num_blocks, spec.shape, layer.geometry, layer.input_size, layer.batch,
            precision, name,
        )  # fmt: skip
        if limit is not None:
            return f"{limit}; use auto or dense"
    return None


def _no_native_reason(layer: LayerCall, backend: str) -> str | None:
    if backend != "cpu":
        return f"it needs a CPU and this process computes on the {backend}; use auto or dense"
    if layer.dtype not in NATIVE_DTYPES:
        return f"it computes {' and '.join(NATIVE_DTYPES)}, not {layer.dtype}; use auto, xla or dense"
    return loading.unavailable_reason()


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
      batch: N, or a symbolic dimension of `jax.export`.
      dtype: of activations and blocks.
      precision: of the products, as in `jax.lax.dot`.
      backend: "cpu", "gpu", ...; by default that of `dsb_jax.target`.
      device_kind: the device's name, such as "NVIDIA H200"; by default likewise.

    Raises:
      ValueError: if the name is unknown, or a tuned table is broken.
      NotImplementedError: if an explicit implementation cannot compute the layer here, with the reason and the cure.
    """
    if isinstance(implementation, Choice):
        return implementation
    check_implementation(implementation)
    if implementation not in ("auto", *COMPILED_KERNELS):
        return Choice.all(implementation, "asked for")
    if implementation == "auto" and batch == 0:
        return Choice.all("dense", "an empty batch")
    any_batch = is_symbolic_dim(batch)
    layer = LayerCall.of(
        layout.shape[0],
        geometry,
        block_shape=layout.block_shape,
        num_blocks=layout.num_blocks,
        input_size=input_size,
        batch=NOMINAL_BATCH if any_batch else batch,
        dtype=dtype,
    )
    target, is_here = _find_target(backend, device_kind)
    if any_batch or target == ANY:
        return _choose_portable(implementation, layer, "a batch of any size" if any_batch else ANY.device_kind)
    if implementation == "auto":
        choice = _choose(layer, target, precision)
        return _checked(choice, layer, target, precision) if is_here else choice
    if reason := unsupported_reason(implementation, layer, target.backend, precision):
        raise NotImplementedError(f"implementation={implementation!r} cannot compute a layer of {layer}: {reason}.")
    return Choice.all(implementation, "asked for", _tuned_tiles(implementation, layer, target.device_kind))


def _find_target(backend: str | None, device_kind: str | None) -> tuple[Target, bool]:
    """What to choose for, and whether that is the device of this process."""
    if backend is not None:
        return Target(backend, device_kind or ("cpu" if backend == "cpu" else "an unknown device")), False
    if (given := given_target()) is not None:
        return given, False
    return Target(jax.default_backend(), device_kind or jax.local_devices()[0].device_kind), True


def _choose_portable(implementation: str, layer: LayerCall, any_what: str) -> Choice:
    """What "auto" takes for `any_what`, of what knows neither batch nor device before it is lowered."""
    if implementation != "auto":
        raise NotImplementedError(
            f"implementation={implementation!r} cannot compute a layer of {layer.spec.out}x{layer.spec.in_} for "
            f"{any_what}: its kernels are made for one kind of device and one batch size; use auto, xla or dense."
        )
    ratio = _mean(cpu_ratios(layer, CpuFacts())["xla"])  # of whichever CPU
    reason = f"for {any_what}: predicted {ratio:.2f} of the dense time on a CPU"
    return Choice.all("portable", f"{reason}, dense elsewhere") if ratio < CLEAR_WIN else Choice.all("dense", reason)


def _checked(choice: Choice, layer: LayerCall, target: Target, precision: lax.PrecisionLike) -> Choice:
    """The choice, with the dense product in the place of kernels that are wrong on this device."""
    kernels = set(choice.passes) & set(GPU_KERNELS)
    if not kernels or _without_tables.get():
        return choice
    rows, exact = layer.spec.block_shape[0], limits.is_exact(precision)
    failed = {
        name: failure for name in kernels
        if (failure := self_check.failure(name, rows, layer.dtype, exact, target.device_kind)) is not None
    }  # fmt: skip
    if not failed:
        return choice
    passes = Passes(*("dense" if name in failed else name for name in choice.passes))
    wrong = "; ".join(f"{name} failed its check here: {failure}" for name, failure in failed.items())
    return Choice(passes, wrong, choice.tiles)


def _choose(layer: LayerCall, target: Target, precision: lax.PrecisionLike) -> Choice:
    """What "auto" takes, by the tuned tables before the cost model."""
    backend, device_kind = target
    predicted = predicted_ratios(layer, backend, device_kind)
    if not predicted:
        return Choice.all("dense", f"no sparse kernel for {device_kind if backend == 'gpu' else backend}")
    if (found := _lookup(layer, device_kind)) is not None:
        return _from_table(found, layer, predicted, target, precision)
    names, ratios = [], []
    skipped: dict[str, str] = {}  # what would win but cannot serve, and why
    for i, of in enumerate(Passes._fields):
        taken, best = "dense", 1.0  # of those that serve
        for ratio, name in sorted((ratios_of[i], name) for name, ratios_of in predicted.items()):
            reason = unsupported_reason(name, layer, backend, precision, (of,))
            if reason is None:
                taken, best = name if ratio < CLEAR_WIN else "dense", ratio
                break
            if ratio < CLEAR_WIN:
                if name == "native":
                    loading.tell_missing()
                skipped.setdefault(name, reason.split(";")[0])
        names.append(taken)
        ratios.append(best)
    if skipped and set(names) == {"dense"}:
        return Choice.all("dense", next(iter(skipped.values())))
    on = f" on {device_kind}" if backend == "gpu" else ""
    why = "".join(f"; {name}: {reason}" for name, reason in skipped.items())
    return Choice(Passes(*names), f"predicted {_ratios_text(Passes(*ratios))} of the dense time{on}{why}")


def _mean(ratios: Passes) -> float:
    return sum(ratios) / len(ratios)


def _ratios_text(ratios: Passes) -> str:
    """One number if the passes share it, else those of forward / input gradient / weight gradient."""
    texts = [f"{ratio:.2f}" for ratio in ratios]
    return texts[0] if len({*ratios}) == 1 else " / ".join(texts)


def _from_table(
    found: tuning.Found, layer: LayerCall, predicted: dict[str, Passes], target: Target, precision: lax.PrecisionLike
) -> Choice:
    """For each pass the fastest measured implementation that can compute it and beats dense.

    Of a layer measured nearby, the ratio is scaled by what the cost model says of the difference.
    """
    backend, device_kind = target
    scales, margin, how = dict.fromkeys(predicted, Passes(1.0, 1.0, 1.0)), 1.0, "tuned"
    if not found.exact:
        there = predicted_ratios(found.layer, backend, device_kind)
        scales = {
            name: Passes(*(here / other for here, other in zip(ratios, there[name], strict=True)))
            for name, ratios in predicted.items()
        }
        margin, how = CLEAR_WIN, "tuned on a layer nearby"
    dense = next(result.seconds for result in found.results if result.implementation == "dense")
    sparse = [r for r in found.results if r.implementation in IMPLEMENTATIONS[1:] and r.implementation != "dense"]
    names, fastest, ratios, tiles, skipped = [], [], [], {}, ""

    def scale(implementation: str, of_pass: int) -> float:
        """Kernels without a model of their own share that of the first."""
        return scales.get(implementation, next(iter(scales.values())))[of_pass]

    for i, name in enumerate(Passes._fields):
        best = None
        for result in sorted(sparse, key=lambda result: result.seconds[i] * scale(result.implementation, i)):
            if reason := unsupported_reason(result.implementation, layer, backend, precision, (name,)):
                skipped = skipped or f"; {result.implementation}: {reason.split(';')[0]}"
                continue
            best = result
            fastest.append(result.implementation)
            break
        ratios.append(1.0 if best is None else best.seconds[i] / dense[i] * scale(best.implementation, i))
        taken = best if best is not None and ratios[-1] < margin else None
        names.append("dense" if taken is None else taken.implementation)
        if taken is not None and taken.tiles is not None:
            tiles[name] = getattr(taken.tiles, name)
    if not fastest:
        return Choice.all("dense", f"{how}: nothing that serves is faster on {device_kind}{skipped}")
    takes = "" if set(names) != {"dense"} else f"{', '.join(dict.fromkeys(fastest))} takes "
    reason = f"{how}: {takes}{_ratios_text(Passes(*ratios))} of dense on {device_kind}"
    return Choice(Passes(*names), reason, KernelTiles(**tiles) if tiles else None)


def _tuned_tiles(implementation: str, layer: LayerCall, device_kind: str) -> KernelTiles | None:
    """The measured tiles of a GPU kernel that is asked for by name, if this layer or one nearby was measured."""
    found = _lookup(layer, device_kind) if implementation in GPU_KERNELS else None
    results = found.results if found else ()
    return next((result.tiles for result in results if result.implementation == implementation), None)
