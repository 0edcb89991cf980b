"""Between sparse and dense: the same model with its kernels whole, masks, permutations.

    dense_params = to_dense(params, topology)          what each layer computes with; loads into the dense model
    params, topology = from_dense(dense_params, plan, method=DSB(), key=key)     a pre-trained model made sparse

A sparse layer's `blocks` are the dense layer's `kernel`, in the kernel's own shape (HWIO, heads, lifted axes).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsb_jax.boxes import BOX, boxed_as, unboxed
from dsb_jax.initialization import initialize
from dsb_jax.layout import BlockLayout, pack, to_mask, unpack
from dsb_jax.methods import Static
from dsb_jax.methods.base import Method, check_method
from dsb_jax.paths import KERNEL, WEIGHTS, Path, by_path, dense_path, layer_path, nested, nodes, path_name, weights_at
from dsb_jax.plan import SparsityPlan, check_plan
from dsb_jax.step_and_key import check_key
from dsb_jax.topology import LayerTopology, by_layer


def to_dense(params: Any, topology: Any) -> Any:
    """The parameters of the equal dense model: every `blocks` becomes the `kernel` that its layer computes with.

    Args:
      params: nested dictionaries.
      topology: that belongs to them.

    Returns:
      Nested dictionaries of the dense model's names and shapes; zeros where no weight is.
    """
    found = nodes(topology)
    weights = weights_at(params, found)

    def kernel(path: Path) -> Array:
        node = found[path]

        def one(layout: BlockLayout, aux: Any, blocks: Array) -> Array:
            return node.spec.from_matrix(unpack(blocks if aux is None else aux.forward(blocks), layout))

        return by_layer(one, node, weights[path])

    return _renamed(params, {path: (dense_path(path), kernel(path), found[path].stack_axes) for path in found})


def from_dense(
    dense_params: Any,
    plan: SparsityPlan | None = None,
    *,
    topology: Any = None,
    method: Method | None = None,
    key: jax.Array | None = None,
    score: Callable[[Array], Array] = jnp.abs,
) -> tuple[Any, Any]:
    """Makes the parameters of a dense model sparse.

    Args:
      dense_params: nested dictionaries.
      plan: which layers, and how many blocks each: the pattern is then the best by `score` that the method finds, and
        the weights that stay keep their bits.
      topology: instead of a plan, a pattern that is there already: `to_dense` and back gives the same bits.
      method: of the layers; by default `Static()`, shuffled blocks, which `DSB` adapts.
      key: a PRNG key, for methods that draw where the score leaves a choice.
      score: of a kernel's values, elementwise, >= 0.

    Returns:
      Parameters and topology.

    Raises:
      ValueError: unless one of plan and topology is given, or if a planned layer is not there or has another shape.
    """
    if (plan is None) == (topology is None):
        raise ValueError(
            "from_dense takes a plan, which chooses a pattern, or a topology, which is one; give one of them."
        )
    leaves = by_path(dense_params, leaf=BOX)
    if topology is not None:
        found = nodes(topology)
        packed = {}
        for path, node in found.items():
            kernel = _kernel_at(leaves, dense_path(path), node.kernel_shape)
            blocks = by_layer(lambda layout, _, k, spec=node.spec: pack(spec.to_matrix(k), layout), node, kernel)
            packed[dense_path(path)] = (path, blocks, node.stack_axes)
        return _renamed(dense_params, packed), topology
    method = Static() if method is None else method
    check_method(method)
    plan = check_plan(plan)
    key = jax.random.key(0) if key is None else check_key(key)
    kernels = {layer: _kernel_at(leaves, (*layer, KERNEL), spec.kernel_shape) for layer, spec in plan.sparse.items()}
    states = initialize(method, key, kernels, plan.sparse, score)
    packed = {
        (*layer, KERNEL): ((*layer, WEIGHTS), blocks, node.stack_axes) for layer, (blocks, node) in states.items()
    }
    return _renamed(dense_params, packed), nested({(*layer, WEIGHTS): node for layer, (_, node) in states.items()})


def masks(topology: Any) -> Any:
    """True where a weight takes part: bool arrays in the kernels' own shapes, by the paths of the dense model."""

    def mask(node: LayerTopology) -> Array:
        def one(layout: BlockLayout, aux: Any) -> Array:
            if aux is None:
                return node.spec.from_matrix(to_mask(layout))
            return node.spec.from_matrix(unpack(aux.active.astype(jnp.int8), layout) > 0)

        return by_layer(one, node)

    return nested({dense_path(path): mask(node) for path, node in nodes(topology).items()})


def permutations(topology: Any) -> Any:
    """The order in which each layer groups its outputs: int32[out], by the paths of the layers.

    With `order = permutations(topology)["layer"]` and the matrix `W[out, in]` of a layer, `W[order]` has the rows of
    each group side by side, R of them.
    """

    def order(layout: BlockLayout, _: Any) -> Array:
        rows = layout.out_idx.reshape(-1)
        is_phantom = rows >= layout.shape[0]
        return rows[jnp.argsort(is_phantom, stable=True)][: layout.shape[0]]

    return nested({layer_path(path): by_layer(order, node) for path, node in nodes(topology).items()})


def _kernel_at(leaves: Mapping[Path, Any], path: Path, shape: tuple[int, ...]) -> Array:
    kernel = unboxed(leaves[path]) if path in leaves else None
    if kernel is None or jnp.shape(kernel) != shape:
        have = "is not among the parameters" if kernel is None else f"has shape {jnp.shape(kernel)}"
        raise ValueError(f"{path_name(path)} {have}, expected {shape}; give the dense model that this was made for.")
    return jnp.asarray(kernel)


def _renamed(tree: Any, replacements: Mapping[Path, tuple[Path, Array, tuple[int, ...]]]) -> Any:
    """Nested dictionaries in which some leaves have another name and array (of such lifted axes), in the same box."""

    def walk(node: Any, path: Path) -> Any:
        if not isinstance(node, Mapping):
            return node
        renamed = {}
        for name, value in node.items():
            here = (*path, str(name))
            if here in replacements:
                new_path, array, stack_axes = replacements[here]
                renamed[new_path[-1]] = boxed_as(value, array, stack_axes)
            else:
                renamed[name] = walk(value, here)
        return renamed

    return walk(tree, ())
