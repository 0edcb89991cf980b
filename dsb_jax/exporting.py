"""A model as one file that computes without this library: `export` traces, lowers, checks and writes.

    print(dsb.export(model, variables, x, "model.jax"))

and then, in any process that has jax (and flatbuffers, which `jax.export` reads its files with), for any batch size:

    call = jax.jit(jax.export.deserialize(open("model.jax", "rb").read()).call)
    y = call(x)

The weights are constants of the program, in blocks as they are stored, so the file is as large as the sparse model. On
a CPU it computes with the shuffled-block product, on everything else with the dense one (`dsb_jax.ops.portable`).
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.errors
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dsb_jax.drafts import draft_of
from dsb_jax.example_batch import BatchAxis, ExampleBatch, as_text
from dsb_jax.ops.dispatch import A_DENSE_LAYER, Choice, record_choices
from dsb_jax.tables import AsTable, Table
from dsb_jax.target import compiling_for, compiling_for_any
from dsb_jax.topology import is_node, with_index
from pallas_kernels.kernel_index import entries_for

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")
TOLERANCE = 1e-5
_EXPLAINED = {"portable": " (xla on a CPU, dense elsewhere)"}
CHECKED_SIZES = (1, 7)  # beside the one that is given: the smallest, and an odd one


@dataclasses.dataclass(frozen=True)
class ExportReport(AsTable):
    """What was written, and how near it comes to the model.

    Attributes:
      path: of the file.
      nbytes: of the file.
      platforms: that it can run on.
      inputs, outputs: dtypes and shapes, such as "float32[batch, 784]".
      choices: what computes each sparse layer, by its path (in an NNX model, whose layers have none, the last one's).
      differences: for each batch size that was tried, the largest absolute difference to the model, over all outputs;
        of None if the batch is fixed.
    """

    path: Path
    nbytes: int
    platforms: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    choices: Mapping[tuple[str, ...], Choice]
    differences: Mapping[int | None, float]

    @property
    def table(self) -> Table:
        """What `print`, rich and a notebook show."""
        names = {choice.implementation for choice in self.choices.values() if choice.reason != A_DENSE_LAYER}
        rows = [
            ("bytes", f"{self.nbytes:,}"),
            ("platforms", ", ".join(self.platforms)),
            ("inputs", ", ".join(self.inputs)),
            ("outputs", ", ".join(self.outputs)),
            ("sparse layers", ", ".join(name + _EXPLAINED.get(name, "") for name in sorted(names)) or "none"),
        ]
        for size, difference in self.differences.items():
            rows.append((f"batch {size}" if size else "checked", f"differs from the model by {difference:.1e}"))
        return Table(("file", str(self.path)), rows)


def export(
    model: Any,
    variables: Any,
    inputs: Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    method: Any = None,
    batch_axis: BatchAxis = 0,
    platforms: Sequence[str] = PLATFORMS,
    tolerance: float | None = None,
) -> ExportReport:
    """Writes a file that computes what a model computes in evaluation mode.

    The file is complete as soon as it has its name: before that, it is read back and run on `inputs`, and on batches of
    1 and 7 made of them, on a CPU if that is among the platforms. If that fails, a file that is there already stays.

    Args:
      model: a Linen module, called as `model.apply(variables, *inputs, **kwargs)`; or any function, called as
        `model(variables, *inputs, **kwargs)`, or without variables if they are None, such as an NNX model in evaluation
        mode (`model.eval()`).
      variables: of the model, all collections; None for a model that holds its own.
      inputs: an example: one array (or dictionary of arrays), or a tuple of arguments.
      path: of the file; its folder is there already.
      kwargs: further arguments, which are fixed: `{"train": False}`.
      method: of a Linen module, another than `__call__`.
      batch_axis: the axis of the examples. All arrays that have as many of them there as the first one get a batch of
        any size; give two or more, so that nothing else is as long by chance. A tuple says it for each argument, None
        for one without a batch; None alone fixes all shapes.
      platforms: to lower for, of cpu, cuda, rocm, tpu.
      tolerance: the largest difference over the largest output that passes. None is 1e-5, or four units of precision of
        an output in less than float32. A model that computes in less, or a check on a GPU, needs more.

    Returns:
      What was written; `print` shows it.

    Raises:
      ValueError: if an argument is invalid, the model wants to be trained or needs to know its batch size, or the file
        gives something else than the model.
      NotImplementedError: if a layer is to be computed by `implementation="pallas"` or "triton".
      ImportError: without flatbuffers.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("jax.export writes files with flatbuffers, which is not here; pip install 'dsb-jax[export]'.")
    platforms = _check_platforms(platforms)
    device = _device_for(platforms)
    examples = ExampleBatch.of(inputs if isinstance(inputs, tuple) else (inputs,), batch_axis)
    compute = _as_function(model, variables, kwargs, method)
    with draft_of(path) as draft:
        with compiling_for_any(), record_choices() as choices, _readable_errors():
            exported = jax.export.export(jax.jit(compute), platforms=platforms)(*examples.abstract())
        draft.write_bytes(exported.serialize())
        differences = _compare(draft, compute, examples, device, tolerance)
        nbytes = draft.stat().st_size
    inputs_text, outputs_text = (tuple(map(as_text, avals)) for avals in (exported.in_avals, exported.out_avals))
    return ExportReport(Path(path), nbytes, platforms, inputs_text, outputs_text, choices, differences)


def _check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    names = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    wrong = [name for name in names if name not in KNOWN_PLATFORMS]
    if wrong or not names:
        raise ValueError(f"platforms={platforms!r}: give some of {', '.join(KNOWN_PLATFORMS)} (an NVIDIA GPU: cuda).")
    return tuple(dict.fromkeys(names))


def _device_for(platforms: Sequence[str]) -> jax.Device:
    """Where the file is tried: a CPU if it may, where nothing is rounded to less than float32 in between."""
    if "cpu" in platforms:
        return jax.local_devices(backend="cpu")[0]
    here = jax.export.default_export_platform()
    if here not in platforms:
        raise ValueError(
            f"platforms={tuple(platforms)}: this process computes on {here}, so it could not check the file; add 'cpu'."
        )
    return jax.local_devices()[0]


def _as_function(model: Any, variables: Any, kwargs: Mapping[str, Any] | None, method: Any) -> Callable[..., Any]:
    """`(*inputs) -> outputs`, all else closed over."""
    options, before = dict(kwargs or {}), () if variables is None else (_with_cpu_index(variables),)
    if hasattr(model, "apply") and hasattr(model, "init"):
        if variables is None:
            raise ValueError(f"{type(model).__name__} is a Linen module; give its variables, all collections of them.")
        model, options = model.apply, options | ({} if method is None else {"method": method})
    elif method is not None:
        raise ValueError(f"method={method!r} is for Linen modules; give the method itself as the model.")
    elif _is_nnx(model):
        if variables is not None:
            raise ValueError("variables are given beside an NNX model, which holds its own; give None.")
        model = _pure(model)
    elif not callable(model):
        raise ValueError(f"{model!r} is neither a Linen module nor a function; give what computes the outputs.")
    return lambda *inputs: model(*before, *inputs, **options)


def _is_nnx(model: Any) -> bool:
    """Whether it is a model of NNX, which nobody has who did not import it."""
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def _pure(model: Any) -> Callable[..., Any]:
    """A function of the inputs that leaves the model alone: transformations inside of it change what they are given.

    Raises:
      ValueError: if a module of it is in training mode.
    """
    nnx: Any = sys.modules["flax.nnx"]
    for path, module in nnx.iter_modules(model):
        drops = getattr(module, "deterministic", None) is False and getattr(module, "rate", 1) != 0
        if drops or getattr(module, "use_running_average", None) is False:
            where = "/".join(map(str, path)) or "the model"
            raise ValueError(
                f"the model wants to be trained: {where} ({type(module).__name__}) is in training mode. Export it "
                "after model.eval()."
            )
    graphdef, state = nnx.split(model)
    return lambda *inputs, **options: nnx.merge(graphdef, state, copy=True)(*inputs, **options)


def _with_cpu_index(variables: Any) -> Any:
    """Variables whose layouts have beside them what the product on a CPU reads: nobody derives that in a call, then."""
    nodes = filter(is_node, jax.tree.leaves(variables, is_leaf=is_node))
    lacking = (
        node for node in nodes
        if node.spec.storage == "blocks" and (node.index is None or not {*entries_for("cpu")} <= {*node.index.entries})
    )  # fmt: skip
    return variables if next(lacking, None) is None else with_index(variables, "cpu")


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """What a model may do wrong while it is traced, in a line or two."""
    try:
        yield
    except (flax.errors.TraceContextError, flax.errors.ModifyScopeVariableError, flax.errors.InvalidRngError) as error:
        what = str(error).split(" (https://")[0].rstrip(".")
        raise ValueError(
            f"the model wants to be trained: {what}. Export it in evaluation mode: kwargs={{'train': False}}, or what "
            "its argument is called; an NNX model after model.eval()."
        ) from error
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"the model needs to know its batch size: {str(error).splitlines()[0].rstrip('.')}. Give batch_axis=None, "
            "which fixes it, or change the model."
        ) from error


def _compare(
    draft: Path, compute: Callable[..., Any], examples: ExampleBatch, device: jax.Device, tolerance: float | None
) -> dict[int | None, float]:
    """The largest absolute difference between file and model, for each batch size.

    Raises:
      ValueError: if one is too large, or an output is not finite.
    """
    call = jax.jit(jax.export.deserialize(bytearray(draft.read_bytes())).call)
    differences = {}
    for size in dict.fromkeys((examples.size, *(CHECKED_SIZES if examples.size else ()))):
        arguments = jax.device_put(examples.resized(size), device)
        # "auto" asks for the target, not for the default device.
        here = compiling_for("cpu", device.device_kind) if device.platform == "cpu" else contextlib.nullcontext()
        with jax.default_device(device), here:
            have = jax.tree.leaves(jax.device_get(call(*arguments)))
            # A function of its own, because `compute` itself was traced for any platform.
            want = jax.tree.leaves(jax.device_get(jax.jit(lambda *inputs: compute(*inputs))(*arguments)))
        of_outputs = (
            _difference(*pair, f"output {number} of {'a batch of ' * bool(size)}{size or 'the inputs'}", tolerance)
            for number, pair in enumerate(zip(have, want, strict=True))
        )
        differences[size] = max(of_outputs, default=0.0)
    return differences


def _difference(have: np.ndarray, want: np.ndarray, what: str, tolerance: float | None) -> float:
    """The largest absolute difference of one output, which passes."""
    if have.shape != want.shape:
        raise ValueError(
            f"{what} has shape {have.shape}, the model's {want.shape}; give batch_axis=None, which fixes it."
        )
    wide = np.result_type(want.dtype, np.float64)
    a, b = have.astype(wide), want.astype(wide)
    if not np.isfinite(b).all():
        raise ValueError(f"{what} is not finite in the model itself; give variables and inputs that it works with.")
    difference, scale = (float(np.abs(array).max(initial=0)) for array in (a - b, b))
    if tolerance is None:
        eps = float(jnp.finfo(want.dtype).eps) if jnp.issubdtype(want.dtype, jnp.inexact) else 0.0
        tolerance = max(TOLERANCE, 4 * eps)
    if not difference <= tolerance * scale:  # NaN is not less either
        raise ValueError(
            f"{what} differs from the model's by {difference:.2g}, of {scale:.2g} at the most; nothing was written. A "
            f"model of less than float32 needs more than tolerance={tolerance:.2g}, one that asks for its batch size "
            "batch_axis=None."
        )
    return difference
