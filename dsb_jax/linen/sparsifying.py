"""`sparsify`: anyone's Linen model, unchanged, with shuffled-block weights where a plan says so.

The sparse model is of a subclass of the model's class, of the same name. It wraps each method in `nn.map_variables`
(`dsb_jax.linen.lifting`): the dense model initializes itself, and its planned kernels become blocks on the way out.
When it is applied, those of its layers that hold blocks are intercepted, wherever Flax lifts them, and compute the
sparse product. No module of the model knows of it.
"""

import contextvars
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from dsb_jax.linen import lifting
from dsb_jax.linen.finding import check_model
from dsb_jax.linen.layers import SparseConv, SparseDense
from dsb_jax.linen.products import convolution, einsum, general, inputs_of, linear, refuse_normalized
from dsb_jax.methods import Static
from dsb_jax.methods.base import Method, check_method
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.paths import Path
from dsb_jax.plan import SparsityPlan, check_plan

_PRODUCTS: Mapping[type, Callable[..., jax.Array]] = {
    nn.Dense: linear,
    nn.DenseGeneral: general,
    nn.Einsum: einsum,
    nn.Conv: convolution,
    SparseDense: lambda module, *args: linear(module, *args, feature_major=module.feature_major),
    SparseConv: lambda module, *args: convolution(module, *args, feature_major=module.feature_major),
}
_KEY = 0x5B  # folded into the module's PRNG key: the dense model draws what it would draw without us
_RUNNING: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("dsb_jax_running", default=())


@dataclasses.dataclass(frozen=True)
class _Sparsified:
    """What a sparse class was made of."""

    base: type[nn.Module]
    plan: SparsityPlan
    method: Method
    implementation: str


def sparsify[Model: nn.Module](
    model: Model, plan: SparsityPlan, *, method: Method | None = None, implementation: str = "auto"
) -> Model:
    """The model with sparse weights where the plan says so; its code, its names and its methods stay.

    `init` gives what the dense model has, but for `blocks` where a planned `kernel` was, and the collection `topology`.
    Values are those of the dense draw, scaled to the fan-in that is left to each output by all methods but Top-KAST.
    It runs the dense model first, and holds it until its last layer is sparse; nothing dense exists after that. So the
    output that `init_with_output` gives is the dense model's, too.

    Args:
      model: the dense model that the plan was made of, not bound. Its lifts (`nn.scan`, `nn.vmap`, `nn.remat`,
        `nn.jit`), wrappers and shared layers stay what they are.
      plan: see `dsb_jax.linen.plan`.
      method: how layers begin and what they store; by default shuffled blocks, which `DSB` adapts.
      implementation: of the products, see `dsb_jax.ops.dispatch`.

    Returns:
      A model of a subclass of the same name. Equal models, plans and methods give equal models; they hash, pickle,
      clone, and serve as a field of other modules.

    Raises:
      ValueError: for what is no unbound Linen module, no plan, no method or no implementation, and for a model that is
        sparse already.
    """
    check_model(model)
    method = Static() if method is None else method
    check_method(method)
    check_implementation(implementation)
    cls = _sparse_class(_Sparsified(type(model), check_plan(plan), method, implementation))
    return cls(**_fields(model, type(model)))


@functools.cache  # for a class is compared by identity: models must not become unequal with time
def _sparse_class(how: _Sparsified) -> Any:
    base = how.base
    body: dict[str, Any] = {
        name: _wrapped(getattr(base, name), how) for name in dir(base) if _is_method_of_model(base, name)
    }
    body |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__sparsified__": how,
        "__reduce__": nn.nowrap(lambda self: (_rebuild, (how, _fields(self, base)))),
        "apply": nn.nowrap(_with_method(base.apply, how)),
        "init_with_output": nn.nowrap(_with_method(base.init_with_output, how)),
        "init": nn.nowrap(_with_method(base.init, how)),
    }
    return types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(body))


def _fields(model: nn.Module, base: type[nn.Module]) -> dict[str, Any]:
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(base) if f.init and f.name != "parent"}


def _rebuild(how: _Sparsified, values: dict[str, Any]) -> nn.Module:
    return sparsify(how.base(**values), how.plan, method=how.method, implementation=how.implementation)


def _is_method_of_model(base: type[nn.Module], name: str) -> bool:
    """Whether people call it with a model: no field, property, class method, or method of every module."""
    if name == "__call__":
        return True
    if name.startswith("_") or name == "setup" or name in dir(nn.Module) or name in base.__dataclass_fields__:
        return False
    found = inspect.getattr_static(base, name)
    return inspect.isfunction(found) and not hasattr(found, "nowrap")


def _with_method(function: Callable[..., Any], how: _Sparsified) -> Callable[..., Any]:
    """`apply` or `init`, with a `method` that may be any function of the model, also one of the dense class."""

    @functools.wraps(function)
    def call(self: nn.Module, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        if isinstance(method, str):
            method = getattr(type(self), method, method)
        if callable(method):
            method = _wrapped(getattr(method, "__func__", method), how)  # of a bound one, `model.encode`
        token = _RUNNING.set(())  # also within a method of the same model, which then applies other variables
        try:
            return function(self, *args, method=method, **kwargs)
        finally:
            _RUNNING.reset(token)

    return call


def _wrapped(method: Callable[..., Any], how: _Sparsified) -> Callable[..., Any]:
    """A method of the dense model, run with sparse variables."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.scope is None or _is_running(how, self.path):  # unbound: Flax says so; or called by another method
            return method(self, *args, **kwargs)
        token = _RUNNING.set((*_RUNNING.get(), (how, self.path)))
        try:
            mapped = _mapped(method, self, how)
            with nn.intercept_methods(_intercept):
                return mapped(self, *args, **kwargs)
        finally:
            _RUNNING.reset(token)

    return call


def _is_running(how: _Sparsified, path: Path) -> bool:
    """Whether the variables of this module are mapped already, by one of its methods or by a module around it."""
    return any(other == how and path[: len(outer)] == outer for other, outer in _RUNNING.get())


def _mapped(method: Callable[..., Any], module: nn.Module, how: _Sparsified) -> Callable[..., Any]:
    refuse_normalized(module)
    creates = module.is_mutable_collection("params")

    def into(variables: Mapping[str, Any]) -> Mapping[str, Any]:
        if not module.is_initializing():
            lifting.refuse_dense(variables, how.plan)
        return lifting.move_in(variables, how.implementation)

    def out_of(variables: Mapping[str, Any]) -> Mapping[str, Any]:
        return lifting.convert(lifting.move_out(variables), how.plan, how.method, lambda: _key_of_new_layers(module))

    return nn.map_variables(
        lambda module, *args, **kwargs: method(module, *args, **kwargs),
        list(lifting.COLLECTIONS), into, out_of, mutable=creates,
    )  # fmt: skip


def _key_of_new_layers(module: nn.Module) -> jax.Array:
    """A key of its own that leaves the counters of `make_rng` alone."""
    if not module.is_mutable_collection("topology"):
        raise ValueError(
            f"{type(module).__name__} makes the collection `topology` here, where it may not change; initialize with "
            "mutable=True, or where a model around this one is lifted, lift `topology` as `params`."
        )
    key: Any = module.scope.rngs["params"]  # type: ignore[union-attr]
    return jax.random.fold_in(key.as_jax_rng(), _KEY)


def _intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    how = getattr(type(module), "__sparsified__", None)
    kind = type(module) if how is None else how.base
    product = _PRODUCTS.get(kind) if context.method_name == "__call__" else None
    if product is None or (weights := lifting.weights_of(module)) is None:
        return call(*args, **kwargs)
    bias = nn.meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
    x, equation = inputs_of(args, kwargs)
    return product(module, x, weights, bias, *(() if equation is None else (equation,)))
