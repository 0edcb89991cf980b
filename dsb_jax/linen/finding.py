"""Which kernels a Linen model has, and which of them have a sparse form: by type and call of their modules.

The model is traced abstractly, nothing is computed. Each kernel of a layer that could be sparse lies in a box while it
is initialized, so that Flax itself tells along which axes it is lifted (`nn.scan`, `nn.vmap`), whatever lies between.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import DenyList, init, meta

from dsb_jax.boxes import BOX, unboxed
from dsb_jax.calling import abstract_arguments, method_of
from dsb_jax.equations import Equation
from dsb_jax.linen.layers import SparseConv, SparseDense
from dsb_jax.linen.products import REWRITE_KERNELS, equation_of, inputs_of
from dsb_jax.paths import Path, by_path
from dsb_jax.plan import FoundLayer, FoundModel
from dsb_jax.refusals import (
    KEPT_DENSE,
    LOOKED_UP,
    as_tuple,
    inside_of_cell,
    no_sparse_form,
    of_foreign_module,
    rewritten_by,
    unserved,
)
from dsb_jax.spec import LayerSpec, conv_spec, kept_spec, linear_spec

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)
_NAMES = ", ".join(layer.__name__ for layer in LAYERS)
_EXACTLY = (*LAYERS, SparseDense, SparseConv)  # any other subclass may compute anything

_COUNTER = itertools.count()


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class _Found(meta.AxisMetadata[Any]):
    """A kernel in a box that follows it through the lifts of Flax.

    Attributes:
      value: the kernel, in a box of the model's own if it has one.
      spec: static, of one layer.
      lifted: static, the axes that were added, in order, as Flax numbers them.
    """

    value: Any
    spec: LayerSpec
    lifted: tuple[int, ...] = ()

    def unbox(self) -> Any:
        return meta.unbox(self.value)

    def replace_boxed(self, val: Any) -> "_Found":
        return dataclasses.replace(self, value=meta.replace_boxed(self.value, val))

    def add_axis(self, index: int, params: dict[Any, Any]) -> "_Found":
        return dataclasses.replace(self, value=meta.add_axis(self.value, index, params), lifted=(*self.lifted, index))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Found":
        return dataclasses.replace(self, value=meta.remove_axis(self.value, index, params), lifted=self.lifted[:-1])

    def tree_flatten_with_keys(self) -> Any:
        return ((jax.tree_util.GetAttrKey("value"), self.value),), (self.spec, self.lifted)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "_Found":
        return cls(children[0], *static)


class _Watch:
    """Sees every call of a model while it is traced.

    Attributes:
      reasons: path of a module -> why its kernel has no sparse form.
      kinds: path of a module -> the name of its type.
    """

    def __init__(self, keep_dense: Callable[[Path], bool]) -> None:
        self.flag = next(_COUNTER)
        self.keep_dense = keep_dense
        self.reasons: dict[Path, str] = {}
        self.kinds: dict[Path, str] = {}
        self._inside: list[nn.Module] = []

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or module.scope.flags.get("dsb_jax") != self.flag:  # applied with foreign parameters
            return call(*args, **kwargs)
        self._inside.append(module)
        try:
            if context.method_name == "__call__" or type(module) is nn.Embed:
                self.kinds.setdefault(module.path, type(module).__name__)
            if context.method_name != "__call__" or not isinstance(module, LAYERS):
                return call(*args, **kwargs)
            if reason := self._reason(module, args, kwargs):
                self.reasons.setdefault(module.path, reason)
                return call(*args, **kwargs)
            if type(module) not in _EXACTLY:  # a lifted one (nn.remat(nn.Dense)), inside of which the layer is called
                return call(*args, **kwargs)
            self.kinds[module.path] = type(module).__name__
            if self.keep_dense(module.path):
                self.reasons.setdefault(module.path, KEPT_DENSE)
                return call(*args, **kwargs)
            with _boxed_kernel(module, _spec(module, *inputs_of(args, kwargs))):
                return call(*args, **kwargs)
        finally:
            self._inside.pop()

    def _reason(self, module: Any, args: Any, kwargs: Any) -> str | None:
        if isinstance(module, SparseDense | SparseConv) and module.has_weights_of_its_own:
            return "sparse by its own arguments"
        for outer in reversed(self._inside):
            how = getattr(type(outer), "__sparsified__", None)
            if how is not None:
                is_sparse = module.path[len(outer.path) :] in how.plan.sparse
                return f"{'sparse' if is_sparse else 'kept dense'} by a plan of its own"
            if isinstance(outer, nn.RNNCellBase):
                return inside_of_cell(outer)
            if isinstance(outer, REWRITE_KERNELS):
                return rewritten_by(outer)
        if any("map_variables(" in name for name in module.scope.debug_path):
            return "nn.map_variables rewrites its kernel"
        why = unserved(module)
        if why is None and isinstance(module, nn.Einsum):
            text = equation_of(module, inputs_of(args, kwargs)[1])
            why = None if Equation.parse(text).is_product else f"einsum_str={text}"
        return None if why is None else no_sparse_form(why)


def _spec(module: Any, x: Any, einsum_str: str | None) -> LayerSpec:
    """The sizes of a layer, from its attributes and its input."""
    if isinstance(module, nn.Einsum):
        return Equation.parse(equation_of(module, einsum_str)).spec(tuple(module.shape))
    channels = jnp.shape(x)[0 if getattr(module, "feature_major", False) else -1]
    if isinstance(module, nn.Dense):
        return linear_spec(channels, module.features)
    if isinstance(module, nn.Conv):
        return conv_spec(as_tuple(module.kernel_size), channels, module.features)
    sizes = tuple(jnp.shape(x)[axis] for axis in as_tuple(module.axis))
    features = as_tuple(module.features)
    count = len(sizes)
    return LayerSpec((*sizes, *features), tuple(range(count, count + len(features))), tuple(range(count)))


@contextlib.contextmanager
def _boxed_kernel(module: Any, spec: LayerSpec) -> Iterator[None]:
    """The module initializes its kernel in a box."""
    init = module.kernel_init
    object.__setattr__(module, "kernel_init", lambda *args, **kwargs: _Found(init(*args, **kwargs), spec))
    try:
        yield
    finally:
        object.__setattr__(module, "kernel_init", init)


def find_layers(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    rngs: Any = None,
    call_method: str | Callable[..., Any] | None = None,
    keep_dense: Callable[[Path], bool] = lambda path: False,
) -> FoundModel:
    """Every kernel of a Linen model, with its sizes and, if it has no sparse form, the reason.

    Args:
      model: any Linen module, not bound.
      *args: what it is initialized with; arrays may be `jax.ShapeDtypeStruct`, and nothing is computed. What is no
        array (`train=True`) is passed on as it is.
      kwargs: likewise, by name.
      rngs: a PRNG key or a dictionary of them, for a model that insists on streams of its own.
      call_method: another method to initialize with than `__call__`.
      keep_dense: whether the layer at a path stays dense in any case; the model's own code may read its kernel.

    Raises:
      ValueError: for what is no Linen module, or one that is bound or sparse already; if the model's own code reads the
        kernel of a layer.
    """
    check_model(model)
    arrays, with_arrays = abstract_arguments(args, dict(kwargs or {}))
    rngs = jax.random.key(0) if rngs is None else rngs
    watch = _Watch(keep_dense)

    def run(scope: Any, *args: Any, **kwargs: Any) -> Any:
        return method_of(model, call_method)(model.clone(parent=scope, _deep_clone=True), *args, **kwargs)

    def params_of(arrays: Mapping[int, Any]) -> Any:
        args, kwargs = with_arrays(arrays)
        # The flag belongs to the cache key of `nn.jit`, whose trace of the unwatched model would not be watched.
        begin = init(run, mutable=DenyList("intermediates"), flags={"dsb_jax": watch.flag})
        with nn.intercept_methods(watch):
            return begin(rngs, *args, **kwargs)[1].get("params", {})

    try:
        params = by_path(jax.eval_shape(params_of, arrays), leaf=BOX)
    except (AttributeError, TypeError) as error:
        if _Found.__name__ not in str(error):
            raise
        raise ValueError(
            f"{type(model).__name__} reads the kernel of a layer in its own code, where a sparse layer has none; keep "
            "that layer dense by a rule: rules=[Rule('path/of/the/layer', dense=True)]."
        ) from error
    order = {path: i for i, path in enumerate(watch.kinds)}
    layers: dict[Path, FoundLayer] = {}
    num_other = other_nbytes = 0
    for path, leaf in sorted(params.items(), key=lambda item: order.get(item[0][:-1], len(order))):
        found = _layer(path, leaf, watch)
        leaf = unboxed(leaf)
        if found is None:
            num_other += leaf.size
            other_nbytes += leaf.size * leaf.dtype.itemsize
        else:
            layers[path if found[0] in layers else found[0]] = found[1]
    return FoundModel(layers, num_other, other_nbytes)


def check_model(model: Any) -> None:
    """Raises ValueError for what cannot be planned or made sparse."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is no Linen module; give an instance of a flax.linen.Module.")
    if model.scope is not None or model.parent is not None:
        raise ValueError(
            f"this {type(model).__name__} belongs to a parent already; make it with parent=None, outside of any module."
        )
    if hasattr(type(model), "__sparsified__"):
        raise ValueError(f"this {type(model).__name__} is sparse already; give the dense model.")


def _layer(path: Path, leaf: Any, watch: _Watch) -> tuple[Path, FoundLayer] | None:
    """A parameter as a layer by its path; None for biases, scales and the like."""
    if isinstance(leaf, _Found):
        kernel = leaf.unbox()
        spec, reason = _lifted(leaf.spec, leaf.lifted, kernel.shape)
        return path[:-1], FoundLayer(spec, watch.reasons.get(path[:-1]) or reason, str(kernel.dtype))
    leaf = unboxed(leaf)
    if len(leaf.shape) < 2 or min(leaf.shape) < 1 or path[-1] in ("bias", "scale"):
        return None
    is_kernel = path[-1] in ("kernel", "embedding")
    layer = path[:-1] if is_kernel else path
    kind = watch.kinds.get(path[:-1], "")
    if (reason := watch.reasons.get(path[:-1])) is None:
        reason = LOOKED_UP if kind == nn.Embed.__name__ else of_foreign_module(kind, _NAMES)
    return layer, FoundLayer(kept_spec(leaf.shape), reason, str(leaf.dtype))


def _lifted(spec: LayerSpec, lifted: tuple[int, ...], shape: tuple[int, ...]) -> tuple[LayerSpec, str | None]:
    """The spec with the axes that lifts added, or of the shape alone with the reason why they are not served."""
    axes: list[int] = []
    for index in lifted:
        if not 0 <= index <= 1 + len(axes):
            return _unstacked(spec, shape), f"lifted along axis {index}; blocks and layouts have axes 0 and 1 in common"
        axes = [axis + (axis >= index) for axis in axes] + [index]
    axes.sort()
    stacked = spec.stacked(tuple(axes), tuple(shape[axis] for axis in axes))
    if stacked.kernel_shape != shape:
        return _unstacked(spec, shape), f"its kernel {list(spec.kernel_shape)} becomes {list(shape)} in an unknown way"
    return stacked, None


def _unstacked(spec: LayerSpec, shape: tuple[int, ...]) -> LayerSpec:
    if math.prod(shape) == spec.size:
        return spec
    return kept_spec(shape)
