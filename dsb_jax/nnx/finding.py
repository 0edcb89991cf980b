"""Which kernels an NNX model has, and which of them have a sparse form: by type of their modules, and by a call.

A model that is built shows its layers; how many of them a stack holds (`nnx.vmap` over an initialization) is in the
shapes of its kernels. What only a call can show is traced abstractly, on a copy: layers that are never called, and
kernels that the model's own code reads.
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from dsb_jax.calling import abstract_arguments, method_of
from dsb_jax.nnx.layers import SPARSE, dense_spec, sparse_class
from dsb_jax.nnx.variables import Keys, check_model, modules_of, names
from dsb_jax.paths import KERNEL, WEIGHTS, Path
from dsb_jax.plan import FoundLayer, FoundModel
from dsb_jax.refusals import (
    LOOKED_UP,
    inside_of_cell,
    no_sparse_form,
    of_foreign_module,
    rewritten_by,
    unserved,
)
from dsb_jax.spec import LayerSpec, kept_spec

REWRITE_KERNELS = (nnx.WeightNorm, nnx.SpectralNorm)
_NAMES = ", ".join(layer.__name__ for layer in SPARSE)


def find_layers(
    model: nnx.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    call_method: str | Callable[..., Any] | None = None,
) -> FoundModel:
    """Every kernel of an NNX model, with its sizes and, if it has no sparse form, the reason.

    Args:
      model: built; abstract (`nnx.eval_shape`) will do. It stays as it is.
      *args: what it is called with; arrays may be `jax.ShapeDtypeStruct`, and nothing is computed. What is no array
        (`train=True`) is passed on as it is. Without any, it is not called, and every layer is taken to be.
      kwargs: likewise, by name.
      call_method: another method to call than `__call__`.

    Raises:
      ValueError: for what is no model of NNX.
    """
    check_model(model)
    modules = dict(modules_of(model))
    reasons: dict[Keys, str] = {}
    order: dict[Keys, int] = {}
    if args or kwargs:
        order, seen = _watch(model, args, dict(kwargs or {}), call_method)
        reasons = {keys: "never called by this call of the model" for keys in _candidates(modules) if keys not in order}
        reasons |= seen
    reasons |= _by_structure(modules)
    layers: dict[Path, FoundLayer] = {}
    num_other = other_nbytes = 0
    found = list(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for keys, variable in sorted(found, key=lambda item: order.get(item[0][:-1], len(order))):
        array = variable.get_value()
        layer = _layer(keys, array, modules.get(keys[:-1]), reasons)
        if layer is None:
            num_other += array.size
            other_nbytes += array.size * array.dtype.itemsize
        else:
            path = names(keys[:-1])
            layers[names(keys) if keys[-1] not in (KERNEL, "embedding") or path in layers else path] = layer
    return FoundModel(layers, num_other, other_nbytes)


def _candidates(modules: Mapping[Keys, nnx.Module]) -> dict[Keys, nnx.Module]:
    """The layers that are of a class with a sparse form, and dense."""
    return {keys: module for keys, module in modules.items() if sparse_class(module) and WEIGHTS not in vars(module)}


def _by_structure(modules: Mapping[Keys, nnx.Module]) -> dict[Keys, str]:
    """Why layers have no sparse form, by their attributes and by the modules around them."""
    variables = Counter(
        id(value) for module in modules.values() for value in vars(module).values() if isinstance(value, nnx.Variable)
    )
    reasons = {}
    for keys, module in modules.items():
        if sparse_class(module) is None:
            continue
        if WEIGHTS in vars(module):
            reasons[keys] = "sparse already"
            continue
        around = [modules[keys[:i]] for i in range(len(keys)) if keys[:i] in modules]
        cell = next((outer for outer in around if isinstance(outer, nnx.RNNCellBase)), None)
        wrapper = next((outer for outer in around if isinstance(outer, REWRITE_KERNELS)), None)
        kernel: Any = vars(module)[KERNEL]
        if cell is not None:
            reasons[keys] = inside_of_cell(cell)
        elif wrapper is not None:
            reasons[keys] = rewritten_by(wrapper)
        elif why := unserved(module):
            reasons[keys] = no_sparse_form(why)
        elif variables[id(kernel)] > 1:
            reasons[keys] = "shares its kernel with another module"
    return reasons


def _layer(keys: Keys, array: Any, module: nnx.Module | None, reasons: Mapping[Keys, str]) -> FoundLayer | None:
    """A parameter as a layer; None for biases, scales and the like."""
    shape, dtype = tuple(array.shape), str(array.dtype)
    if keys[-1] == WEIGHTS and keys[:-1] in reasons:
        return FoundLayer(kept_spec(shape), reasons[keys[:-1]], dtype)
    if keys[-1] == KERNEL and module is not None and sparse_class(module):
        own = dense_spec(module) if unserved(module) is None else kept_spec(shape)
        spec, reason = stacked_spec(own, shape), reasons.get(keys[:-1])
        if spec is None:
            reason = reason or f"its kernel {list(own.kernel_shape)} became {list(shape)} in an unknown way"
        return FoundLayer(spec or kept_spec(shape), reason, dtype)
    if len(shape) < 2 or min(shape) < 1 or keys[-1] in ("bias", "scale"):
        return None
    reason = LOOKED_UP if isinstance(module, nnx.Embed) else of_foreign_module(type(module).__name__, _NAMES)
    return FoundLayer(kept_spec(shape), reason, dtype)


def stacked_spec(own: LayerSpec, shape: tuple[int, ...]) -> LayerSpec | None:
    """The spec of a layer by the shape of its kernel, which is lifted along leading axes if it has more than `own`.

    None if that shape is no stack of such layers. If several axes could be the lifted ones, they are the first.
    """
    extra = len(shape) - len(own.kernel_shape)
    if extra == 0:
        return own if own.kernel_shape == shape else None
    for axes in itertools.combinations(range(extra + 1), max(extra, 0)):  # blocks and layouts have no more in common
        stacked = own.stacked(axes, tuple(shape[axis] for axis in axes))
        if stacked.kernel_shape == shape:
            return stacked
    return None


def _watch(
    model: nnx.Module, args: Any, kwargs: Any, call_method: str | Callable[..., Any] | None
) -> tuple[dict[Keys, int], dict[Keys, str]]:
    """Traces a call of a copy: when each layer is called first, and what keeps some of them dense."""
    order: dict[Keys, int] = {}
    reasons: dict[Keys, str] = {}
    running: list[Keys] = []
    graphdef, state = nnx.split(model)
    arrays, with_arrays = abstract_arguments(args, kwargs)

    def run(state: Any, arrays: Mapping[int, Any]) -> None:
        copy = nnx.merge(graphdef, state, copy=True)
        for keys, module in _candidates(dict(modules_of(copy))).items():
            module.__class__ = _watched(type(module), order, reasons, running)
            module.dsb_keys = keys  # type: ignore[attr-defined]
        args, kwargs = with_arrays(arrays)
        method_of(copy, call_method)(copy, *args, **kwargs)

    jax.eval_shape(run, nnx.as_pure(state), arrays)
    return order, reasons


def _watched(base: Any, order: dict[Keys, int], reasons: dict[Keys, str], running: list[Keys]) -> type:
    """The class of a layer, whose calls and whose kernel are watched."""
    signature = inspect.signature(base.__call__)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        order.setdefault(self.dsb_keys, len(order))
        if signature.bind(self, *args, **kwargs).arguments.get("out_sharding") is not None:
            reasons[self.dsb_keys] = "called with out_sharding"
        running.append(self.dsb_keys)
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            running.pop()

    def get(self: Any) -> Any:
        if running[-1:] != [self.dsb_keys]:
            reasons[self.dsb_keys] = "the model's own code reads its kernel"
        return vars(self)[KERNEL]

    kernel = property(get, lambda self, value: vars(self).__setitem__(KERNEL, value))
    return type(base)(base.__name__, (base,), {"__call__": call, KERNEL: kernel})
