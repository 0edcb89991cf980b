"""Topology and statistics lie beside the parameters while a sparse model is applied, and kernels become blocks after it
was initialized: what is mapped on the way into a model and out of it, by `nn.map_variables`.

    outside     params/a/blocks             topology/a/blocks           statistics/a/blocks
    inside      params/a/blocks             params/a/blocks@topology    params/a/blocks@statistics

So whatever lifts the parameters (`nn.scan` along any axis, `nn.vmap`, `nn.remat`, `nn.jit`) lifts their topology, too,
though it has never heard of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from dsb_jax.boxes import boxed_as, unboxed
from dsb_jax.initialization import initialize
from dsb_jax.linen.products import without_topology
from dsb_jax.methods.base import Method
from dsb_jax.paths import KERNEL, WEIGHTS, Path, nested, path_name
from dsb_jax.plan import SparsityPlan
from dsb_jax.products import Weights

COLLECTIONS = ("params", "topology", "statistics")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beside:
    """A node of another collection, and what else the layer must know; static, so that caches of `nn.jit` know it."""

    value: Any
    implementation: str = dataclasses.field(metadata={"static": True})


def move_in(variables: Mapping[str, Any], implementation: str) -> dict[str, Any]:
    """Variables as they are outside -> as they are inside."""
    params = variables.get("params", {})
    for name in COLLECTIONS[1:]:
        params = _merged(params, _marked(variables.get(name, {}), name, implementation))
    return {"params": params} if params else {}


def _marked(tree: Mapping[str, Any], collection: str, implementation: str) -> dict[str, Any]:
    return {
        name if isinstance(leaf, Mapping) else f"{name}@{collection}": _marked(leaf, collection, implementation)
        if isinstance(leaf, Mapping)
        else _Beside(leaf, implementation)
        for name, leaf in tree.items()
    }


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for name, value in other.items():
        both[name] = _merged(both.get(name, {}), value) if isinstance(value, Mapping) else value
    return both


def move_out(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `move_in`; other collections stay what they are."""
    leaves: dict[str, dict[Path, Any]] = {name: {} for name in COLLECTIONS}

    def walk(tree: Mapping[str, Any], path: Path) -> None:
        for name, leaf in tree.items():
            if isinstance(leaf, _Beside):
                own, _, collection = name.rpartition("@")
                leaves[collection][(*path, own)] = leaf.value
            elif isinstance(leaf, Mapping):
                walk(leaf, (*path, name))
            else:
                leaves["params"][(*path, name)] = leaf

    walk(variables.get("params", {}), ())
    kept = {**variables, "params": {}}
    merged = {name: _merged(kept.get(name, {}), nested(leaves[name])) for name in COLLECTIONS}
    return {name: tree for name, tree in merged.items() if tree}


def weights_of(module: nn.Module) -> Weights | None:
    """What a module inside of a sparse model computes with, if it is sparse."""
    if not module.has_variable("params", WEIGHTS):
        return None
    if not module.has_variable("params", f"{WEIGHTS}@topology"):
        raise ValueError(without_topology(module))
    beside: Any = module.get_variable("params", f"{WEIGHTS}@topology")
    zero: Any = module.get_variable("params", f"{WEIGHTS}@statistics")
    blocks = nn.meta.unbox(module.get_variable("params", WEIGHTS))
    return Weights(blocks, beside.value, None if zero is None else zero.value, beside.implementation)


def convert(
    variables: Mapping[str, Any], plan: SparsityPlan, method: Method, key: Callable[[], jax.Array]
) -> dict[str, Any]:
    """Planned kernels -> blocks and topology.

    Args:
      variables: as they are outside, with kernels where the model was just initialized.
      plan, method: of the model.
      key: makes the PRNG key that the method draws from.
    """
    params = variables.get("params", {})
    kernels = {path: leaf for path in plan.sparse if (leaf := _at(params, (*path, KERNEL))) is not None}
    if not kernels:
        return dict(variables)
    arrays = {path: unboxed(leaf) for path, leaf in kernels.items()}
    for path, array in arrays.items():
        check_kernel(path, array, plan)
    states = initialize(method, key(), arrays, plan.sparse)
    new = {
        (*path, WEIGHTS): boxed_as(kernels[path], blocks, node.spec.stack_axes)
        for path, (blocks, node) in states.items()
    }
    topology = nested({(*path, WEIGHTS): node for path, (_, node) in states.items()})
    rest = _without(params, {(*path, KERNEL) for path in kernels})
    return {
        **variables,
        "params": _merged(rest, nested(new)),
        "topology": _merged(variables.get("topology", {}), topology),
    }


def check_kernel(path: Path, kernel: Any, plan: SparsityPlan) -> None:
    """Raises ValueError if a kernel is not of the sizes that were planned."""
    planned = plan.sizes[path].kernel_shape
    if kernel.shape != planned:
        raise ValueError(
            f"{path_name(path)} has a kernel of {tuple(kernel.shape)}, but its plan was made for {planned}; make the "
            "plan with inputs of the sizes that the model is initialized with."
        )


def refuse_dense(variables: Mapping[str, Any], plan: SparsityPlan) -> None:
    """Raises ValueError if parameters hold a dense kernel where the model is sparse."""
    params = variables.get("params", {})
    for path in plan.sparse:
        if _at(params, (*path, KERNEL)) is not None:
            raise ValueError(
                f"{path_name(path)} is sparse in this model, but its parameters hold a dense kernel; make them sparse "
                "by dsb_jax.from_dense(params, plan), or apply the dense model."
            )


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _without(tree: Mapping[str, Any], paths: set[Path], here: Path = ()) -> dict[str, Any]:
    return {
        name: _without(value, paths, (*here, name)) if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if (*here, name) not in paths
    }
