"""`sparsify` and `from_dense`: layers of a model that is built become sparse in place; `to_dense`: a dense copy.

Surgery, not replacement: the layers get another class and other Variables, so that their identity, sharing, dtype,
strides and padding stay what they are, and so does everything around them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dsb_jax import convert
from dsb_jax.boxes import BOX, unboxed
from dsb_jax.initialization import initialize
from dsb_jax.methods import Static
from dsb_jax.methods.base import Method, check_method
from dsb_jax.nnx.layers import make_dense, make_sparse, sparse_class
from dsb_jax.nnx.variables import check_model, modules_of, names, params, sparse_modules, topology
from dsb_jax.ops.dispatch import check_implementation
from dsb_jax.paths import KERNEL, WEIGHTS, Path, by_path, dense_path, layer_path, nodes, path_name, weights_at
from dsb_jax.plan import SparsityPlan, check_plan
from dsb_jax.step_and_key import check_key


def sparsify[Model: nnx.Module](
    model: Model,
    plan: SparsityPlan,
    *,
    method: Method | None = None,
    rngs: nnx.Rngs | jax.Array,
    implementation: str = "auto",
) -> Model:
    """Makes the planned layers of a model sparse, in place; its code, its names and its methods stay.

    Where a layer had `kernel`, it has `blocks`, an `nnx.Param` of float[num_blocks, R, C], and `topology`. Values are
    those of the dense draw, scaled to the fan-in that is left to each output by all methods but Top-KAST. An optimizer
    is made after this: `nnx.Optimizer(model, tx, wrt=nnx.Param)`.

    Args:
      model: the dense model that the plan was made of. If anything is wrong, it stays as it is.
      plan: see `dsb_jax.nnx.plan`.
      method: how layers begin and what they store; by default shuffled blocks, which `DSB` adapts.
      rngs: what the method draws from, its stream `params`; or a PRNG key. Not of the model's own seed, from which its
        first kernel was drawn.
      implementation: of the products, see `dsb_jax.ops.dispatch`.

    Returns:
      The model itself.

    Raises:
      ValueError: for what is no model, plan, method or implementation, and if the plan is of another model or its
        layers are sparse already.
    """
    method = Static() if method is None else method
    check_method(method)
    check_implementation(implementation)
    layers = _planned(model, check_plan(plan))
    key = _key(rngs)
    kernels = {path: module.kernel.get_value() for path, module in layers.items()}
    for path, (blocks, node) in initialize(method, key, kernels, plan.sparse).items():
        make_sparse(layers[path], blocks, node, implementation)
    return model


def from_dense[Model: nnx.Module](
    model: Model,
    plan: SparsityPlan | None = None,
    *,
    topology: Any = None,
    method: Method | None = None,
    key: jax.Array | None = None,
    score: Callable[[Array], Array] = jnp.abs,
    implementation: str = "auto",
) -> Model:
    """Makes the planned layers of a pre-trained model sparse, in place: its largest weights stay, bit by bit.

    Args:
      model: the dense model. If anything is wrong, it stays as it is.
      plan, topology, method, key, score: as in `dsb_jax.from_dense`; `topology` as `dsb_jax.nnx.topology` gives it.
      implementation: of the products, see `dsb_jax.ops.dispatch`.

    Returns:
      The model itself. `restage` makes it sparser in stages.

    Raises:
      ValueError: as `sparsify` and `dsb_jax.from_dense`.
    """
    check_implementation(implementation)
    paths = plan.sparse if isinstance(plan, SparsityPlan) else {layer_path(path) for path in nodes(topology)}
    layers = _layers(model, paths)
    sparse, where = convert.from_dense(params(model), plan, topology=topology, method=method, key=key, score=score)
    found = nodes(where)
    for path, blocks in weights_at(sparse, found).items():
        make_sparse(layers[layer_path(path)], blocks, found[path], implementation)
    return model


def load_params[Model: nnx.Module](
    model: Model, params: Any, topology: Any = None, *, implementation: str = "auto"
) -> Model:
    """Gives a dense model the parameters of a sparse one, from a file or of another face, in place.

    Args:
      model: as its code builds it, dense. If anything is wrong, it stays as it is.
      params: nested dictionaries with the names of the model, as `dsb_jax.nnx.params`, `load_safetensors` or a Linen
        model of the same names give them. What is in a list may be called by its number or by that as a text.
      topology: that belongs to them: its layers become sparse.
      implementation: of the products, see `dsb_jax.ops.dispatch`.

    Returns:
      The model itself.

    Raises:
      ValueError: if a parameter is missing, unknown or of another shape.
    """
    check_implementation(implementation)
    found = nodes({} if topology is None else topology)
    layers = _layers(model, {layer_path(path) for path in found})
    variables = {names(keys): variable for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    wanted = {path: tuple(variable.get_value().shape) for path, variable in variables.items()}
    for path, node in found.items():
        wanted.pop(dense_path(path), None)
        kernel = tuple(layers[layer_path(path)].kernel.get_value().shape)
        if node.kernel_shape != kernel:
            raise ValueError(
                f"{path_name(layer_path(path))} has a kernel of {kernel}, its topology is of {node.kernel_shape}; give "
                "the parameters of this model, and their topology."
            )
        wanted[path] = node.blocks_shape
    arrays = by_path(params, leaf=BOX)
    for path in sorted(wanted.keys() | arrays.keys()):
        have = tuple(jnp.shape(unboxed(arrays[path]))) if path in arrays else None
        if have != wanted.get(path):
            raise ValueError(
                f"{path_name(path)} is {have or 'missing'} in params and {wanted.get(path) or 'missing'} in the model; "
                "give the parameters of this model, and their topology."
            )
    for path, node in found.items():
        make_sparse(layers[layer_path(path)], jnp.asarray(unboxed(arrays.pop(path))), node, implementation)
    for path, array in arrays.items():
        variables[path].set_value(jnp.asarray(unboxed(array)))
    return model


def to_dense[Model: nnx.Module](model: Model) -> Model:
    """A dense copy that computes the same: kernels in their own shapes, zeros where no weight is.

    Its layers are of the classes of `flax.nnx` again, so its state loads into the model as it was written:
    `nnx.update(dense_model, nnx.state(dsb_jax.nnx.to_dense(model)))`.
    """
    check_model(model)
    dense = nnx.clone(model)
    kernels = convert.to_dense(params(model), topology(model))
    for keys, module in sparse_modules(dense).items():
        inner = kernels
        for key in keys:
            inner = inner[key]
        make_dense(module, inner[KERNEL])
    return dense


def _key(rngs: Any) -> jax.Array:
    if isinstance(rngs, nnx.Rngs):
        return rngs.params()
    if not isinstance(rngs, jax.Array):
        raise ValueError(f"rngs={rngs!r} is neither nnx.Rngs nor a PRNG key; give nnx.Rngs(0) or another.")
    return check_key(rngs)


def _planned(model: Any, plan: SparsityPlan) -> dict[Path, Any]:
    """The modules of a plan's sparse layers, whose kernels are of the sizes that were planned."""
    layers = _layers(model, plan.sparse)
    for path, module in layers.items():
        shape, planned = tuple(module.kernel.get_value().shape), plan.sizes[path].kernel_shape
        if shape != planned:
            raise ValueError(
                f"{path_name(path)} has a kernel of {shape}, but its plan was made for {planned}; make the plan of "
                "this model."
            )
    return layers


def _layers(model: Any, paths: Any) -> dict[Path, Any]:
    """The dense layers at some paths."""
    check_model(model)
    modules = {names(keys): module for keys, module in modules_of(model) if sparse_class(module)}
    for path in paths:
        module = modules.get(path)
        if module is None:
            raise ValueError(f"the model has no layer {path_name(path)}; give the model that the plan was made of.")
        if WEIGHTS in vars(module):
            raise ValueError(f"{path_name(path)} is sparse already; give the dense model (dsb_jax.nnx.to_dense).")
    return {path: modules[path] for path in paths}
