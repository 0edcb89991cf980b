"""Leaves of trees by their paths: how weights, their topology and their statistics find each other.

A path is a tuple of names and stays one; text made of it is only shown.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsb_jax.layout import validate
from dsb_jax.topology import LayerTopology, index_as, split_stack

Path = tuple[str, ...]

# What the weights of a layer are called, sparse (with what belongs to them in other collections) and dense.
WEIGHTS, KERNEL = "blocks", "kernel"


def key_name(key: Any) -> str:
    """One step of a path of `jax.tree_util` as text."""
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def by_path(tree: Any, *, leaf: type = LayerTopology) -> dict[Path, Any]:
    """Every leaf of a tree by its path; nodes of type `leaf` are leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, leaf))
    return {tuple(map(key_name, path)): leaf for path, leaf in leaves}


def nodes(topology: Any) -> dict[Path, LayerTopology]:
    """Every sparse layer by the path of its weights.

    Raises:
      ValueError: for a tree of something else, such as the parameters.
    """
    leaves = by_path(topology)
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LayerTopology)}
    if leaves and not found:
        raise ValueError(
            f"this is no topology: it has {len(leaves)} leaves, such as {path_name(next(iter(leaves)))!r}, and no "
            "LayerTopology among them; pass what the model keeps in the collection `topology`."
        )
    return found


def weights_at(tree: Any, paths: Mapping[Path, Any]) -> dict[Path, Any]:
    """The leaf of a tree shaped like the parameters that belongs to each of `paths`.

    A leaf in a box (`nn.Partitioned`, an NNX variable) lies a step below the path.

    Raises:
      ValueError: if there is no such leaf, or more than one.
    """
    found: dict[Path, list[Any]] = {path: [] for path in paths}
    for path, leaf in by_path(tree).items():
        for prefix in (path, path[:-1]):
            if prefix in found:
                found[prefix].append(leaf)
    for path, leaves in found.items():
        if len(leaves) != 1:
            raise ValueError(
                f"the tree has {len(leaves)} arrays at {path_name(path)!r}, where the topology has a sparse layer; "
                "pass the topology that belongs to these parameters."
            )
    return {path: leaves[0] for path, leaves in found.items()}


def replace_at(tree: Any, values: Mapping[Path, Any]) -> Any:
    """The tree with other leaves (or nodes) at some paths, in the same boxes."""

    def replaced(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(map(key_name, path))
        return values[names] if names in values else values.get(names[:-1], leaf)

    return jax.tree_util.tree_map_with_path(replaced, tree, is_leaf=lambda node: isinstance(node, LayerTopology))


def nested(values: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """Nested dictionaries with a value at each path; the parts of a path, texts or numbers, are their keys."""
    tree: dict[Any, Any] = {}
    for path, value in values.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return tree


def layer_path(path: Path) -> Path:
    """The path of the layer whose weights are at `path`: without the name of the parameter."""
    return path[:-1] if path[-1:] == (WEIGHTS,) else path


def dense_path(path: Path) -> Path:
    """The path of the dense kernel that the blocks at `path` stand for."""
    return (*path[:-1], KERNEL) if path[-1] == WEIGHTS else path


def path_name(path: Path) -> str:
    """A path as text, to be shown and to be a key; never taken apart again. A "/" within a name is written %2F."""
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in path)


def validate_topology(topology: Any) -> None:
    """Checks every layout on the host, for topologies from files or of one's own making.

    Raises:
      ValueError: with the layer and the first rule that it breaks.
    """
    for path, node in nodes(topology).items():
        try:
            spec, layout = node.spec, node.layout
            if (layout.shape, layout.block_shape) != (spec.shape, spec.block_shape):
                raise ValueError(
                    f"the layout is of {layout.shape} in {layout.block_shape} blocks, the spec of {spec.shape} in "
                    f"{spec.block_shape}."
                )
            stack = jax.tree.map(np.asarray, split_stack(jax.device_get(layout), node.stack_axes))
            for i in range(node.num_layers):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
                validate(one)
                if one.num_blocks != spec.num_blocks:
                    raise ValueError(f"the layout holds {one.num_blocks} blocks, the spec {spec.num_blocks}.")
            _validate_aux(node)
            _validate_index(node)
        except ValueError as error:
            raise ValueError(f"topology/{path_name(path)}: {error}") from None


def _validate_index(node: LayerTopology) -> None:
    """Raises ValueError if the kernel index is not that of the layout: say of one that was replaced beside it."""
    if node.index is None:
        return
    right = index_as(dataclasses.replace(node, index=None), node).index
    for (keys, have), want in zip(jax.tree_util.tree_leaves_with_path(node.index), jax.tree.leaves(right), strict=True):
        if not np.array_equal(have, want):
            name = "/".join(map(key_name, keys))
            raise ValueError(f"index/{name} is not that of the layout; make it anew by with_index(topology).")


def _validate_aux(node: LayerTopology) -> None:
    """Raises ValueError unless the weights that the layer computes with are as many as its spec says."""
    spec = node.spec
    if node.aux is None:
        if spec.storage == "backward_set":
            raise ValueError("nothing beside the layout says which of the stored weights are computed with.")
        return
    if spec.storage == "blocks":
        raise ValueError(f"beside the layout lies {type(node.aux).__name__}, which belongs to no layer of blocks.")
    aux = split_stack(jax.device_get(node.aux), node.stack_axes)
    active, reserve = np.asarray(aux.active), np.asarray(aux.reserve)
    if active.dtype != bool or active.shape[1:] != (spec.num_blocks, *spec.block_shape):
        raise ValueError(
            f"active is {active.dtype}{list(active.shape[1:])}, expected bool{[spec.num_blocks, *spec.block_shape]}."
        )
    counts = active.sum(axis=(1, 2, 3))
    if (counts != spec.num_active).any():
        raise ValueError(f"{counts[counts != spec.num_active][0]} weights are active, the spec says {spec.num_active}.")
    if reserve.shape[1:] != (spec.size - spec.num_stored,):
        raise ValueError(f"reserve holds {list(reserve.shape[1:])} weights, expected {[spec.size - spec.num_stored]}.")
