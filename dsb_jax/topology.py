"""Where the weights of one sparse layer lie: `LayerTopology`, one node of a pytree.

A *topology* is any tree that holds a `LayerTopology` where the tree of parameters holds the weights of a sparse layer:
`params["encoder"]["blocks"]` belongs to `topology["encoder"]["blocks"]`. Nothing is found by its name, only by this
path and by the type of the node, so modules may be called anything.

Layers that a model lifts (`nn.scan`, `nn.vmap`) share one node, whose arrays have the lifted axes on top of their own.
`split_stack` brings those to the front as one axis, `join_stack` puts them back.

A node may carry a `KernelIndex`, what the products derive from its layout: made when the layout changes, so that no
training step sorts or searches. Without one it is derived in every step: slower, never wrong. No checkpoint holds it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.serialization
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsb_jax.layout import BlockLayout
from dsb_jax.spec import LayerSpec
from dsb_jax.static_json import register_for_export
from dsb_jax.target import current_backend
from pallas_kernels.kernel_index import Inverse, KernelIndex, Pieces, derive, entries_for


class Aux(Protocol):
    """What only a layer's method knows: a registered dataclass, carried beside the layout."""

    @property
    def active(self) -> Bool[Array, "num_blocks R C"]:
        """Which of the stored weights the layer computes with."""
        ...

    @property
    def reserve(self) -> Float[Array, "..."]:
        """Weights that are kept but have no gradient."""
        ...

    def forward(self, blocks: Float[Array, "num_blocks R C"]) -> Float[Array, "num_blocks R C"]:
        """The blocks that the layer computes with; differentiable."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerTopology:
    """Where the weights of one sparse layer, or of a stack of equal ones, lie.

    Attributes:
      layout: the integers.
      aux: what only the method knows, or None.
      spec: the sizes of one layer, static.
      index: what the products derive from the layout, or None.
    """

    layout: BlockLayout
    aux: Any
    spec: LayerSpec = dataclasses.field(metadata={"static": True})
    index: KernelIndex | None = None

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The lifted axes of the arrays, those of layout, blocks and kernel alike: from the spec, else from shapes."""
        count = jnp.ndim(self.layout.out_idx) - 2
        if count == len(self.spec.stack_axes):
            return self.spec.stack_axes
        wanted = ((self.spec.num_groups, self.spec.block_shape[0]), (self.spec.num_blocks, self.spec.block_shape[1]),
                  (self.spec.num_groups + 1,))  # fmt: skip
        arrays = (self.layout.out_idx, self.layout.in_idx, self.layout.group_start)
        for axes in itertools.combinations(range(count + 1), count):  # group_start has one axis of its own
            if all(_drop(jnp.shape(a), axes) == own for a, own in zip(arrays, wanted, strict=True)):
                return axes
        raise ValueError(
            f"out_idx{list(jnp.shape(arrays[0]))}, in_idx{list(jnp.shape(arrays[1]))} are no stack of layers of "
            f"{self.spec.num_groups} groups and {self.spec.num_blocks} blocks; the layout belongs to another layer."
        )

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the lifted axes; () for a single layer."""
        return tuple(jnp.shape(self.layout.out_idx)[axis] for axis in self.stack_axes)

    @property
    def num_layers(self) -> int:
        """Layers that share this node."""
        return math.prod(self.stack_shape)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of the dense kernel, lifted axes included."""
        if self.spec.stack_axes:
            return self.spec.kernel_shape
        return insert_axes(self.spec.kernel_shape, self.stack_axes, self.stack_shape)

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Of the parameter, lifted axes included."""
        own = (self.spec.num_blocks, *self.spec.block_shape)
        return insert_axes(own, self.stack_axes, self.stack_shape)


def _drop(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def insert_axes(shape: tuple[Any, ...], axes: tuple[int, ...], sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    rest, lifted = iter(shape), dict(zip(axes, sizes, strict=True))
    return tuple(lifted[axis] if axis in lifted else next(rest) for axis in range(len(shape) + len(axes)))


def split_stack(tree: Any, axes: tuple[int, ...]) -> Any:
    """Every leaf with its lifted axes in front, as one axis; of length 1 if there are none."""

    def split(leaf: Any) -> Array:
        moved = jnp.moveaxis(jnp.asarray(leaf), axes, range(len(axes)))
        return moved.reshape(math.prod(moved.shape[: len(axes)]), *moved.shape[len(axes) :])  # leaves may be empty

    return jax.tree.map(split, tree)


def join_stack(tree: Any, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    """The inverse of `split_stack`."""

    def join(leaf: Array) -> Array:
        return jnp.moveaxis(leaf.reshape(*sizes, *leaf.shape[1:]), range(len(axes)), axes)

    return jax.tree.map(join, tree)


def by_layer(function: Callable[..., Any], node: LayerTopology, *trees: Any) -> Any:
    """`function(layout, aux, *trees)` of each layer of the stack; arguments and results are stacked as the node is."""
    axes = node.stack_axes
    if not axes:
        return function(node.layout, node.aux, *trees)
    mapped = jax.vmap(function)(*split_stack((node.layout, node.aux, *trees), axes))
    return join_stack(mapped, axes, node.stack_shape)


def kernel_index(layout: BlockLayout, spec: LayerSpec, backend: str | None = None) -> KernelIndex | None:
    """What the products of one layer read beyond its layout, on a backend of jax (by default that of `target`).

    None for a layer that stores single weights: it would be as large as they are, and their product is dense.
    """
    if spec.storage != "blocks":
        return None
    return derive(layout.index, spec.in_, entries_for(current_backend(backend)))


def like_index(layout: BlockLayout, old: KernelIndex | None) -> KernelIndex | None:
    """The index of a new layout of one layer with the entries of an old one; None if that is None."""
    return None if old is None else derive(layout.index, layout.shape[1], old.entries)


def with_index(topology: Any, backend: str | None = None) -> Any:
    """The topology with a `KernelIndex` in each node whose layer stores blocks, made anew from its layout.

    Layers make theirs at initialization, and adaptations keep it up to date. This is for topologies from elsewhere.

    Args:
      topology: any tree with `LayerTopology` nodes.
      backend: of jax, whose implementations are to find what they read; by default that of `target`.
    """
    entries = entries_for(current_backend(backend))

    def add(node: LayerTopology) -> LayerTopology:
        return _index_anew(node, entries) if node.spec.storage == "blocks" else node

    return _map_nodes(add, topology)


def without_index(topology: Any) -> Any:
    """The topology with nothing that is derived from its layouts."""
    return _map_nodes(lambda node: dataclasses.replace(node, index=None), topology)


def index_as(tree: Any, like: Any) -> Any:
    """A concrete tree without indexes with those that its nodes have in `like`, a tree of shapes; made anew."""

    def add(leaf: Any, old: Any) -> Any:
        if not is_node(leaf) or old.index is None:
            return leaf
        return _index_anew(leaf, old.index.entries)

    return jax.tree.map(add, tree, like, is_leaf=is_node)


def is_node(leaf: Any) -> bool:
    """Whether it is the topology of a layer, which functions over trees take for a leaf."""
    return isinstance(leaf, LayerTopology)


def _map_nodes(function: Callable[[LayerTopology], LayerTopology], tree: Any) -> Any:
    return jax.tree.map(lambda leaf: function(leaf) if is_node(leaf) else leaf, tree, is_leaf=is_node)


def _index_anew(node: LayerTopology, entries: tuple[str, ...]) -> LayerTopology:
    bare = dataclasses.replace(node, index=None)
    return dataclasses.replace(bare, index=_index_of(bare, entries))


@functools.partial(jax.jit, static_argnums=1)
def _index_of(node: LayerTopology, entries: tuple[str, ...]) -> KernelIndex:
    return by_layer(lambda layout, _: derive(layout.index, node.spec.in_, entries), node)


def _named_leaves(node: Any) -> list[tuple[tuple[str, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(node)
    return [(tuple(key.name for key in path), leaf) for path, leaf in leaves]  # dataclasses all the way


def _to_state_dict(node: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for names, leaf in _named_leaves(node):
        inner = state
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = leaf
    return state


def _from_state_dict(target: Any, state: Mapping[str, Any]) -> Any:
    leaves = []
    for names, _ in _named_leaves(target):
        leaf: Any = state
        for name in names:
            if name not in leaf:
                raise ValueError(f"the saved topology has no {'/'.join(names)}; it is of another kind of layer.")
            leaf = leaf[name]
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _layer_to_state_dict(node: LayerTopology) -> dict[str, Any]:
    return _to_state_dict(dataclasses.replace(node, index=None))


def _layer_from_state_dict(target: LayerTopology, state: Mapping[str, Any]) -> LayerTopology:
    """The saved arrays, with an index of their own if the target has one."""
    node = _resized(dataclasses.replace(target, index=None), state)
    return node if target.index is None else _index_anew(node, target.index.entries)


def _resized(target: LayerTopology, state: Mapping[str, Any]) -> LayerTopology:
    """The number of blocks is that of the saved arrays: it changes where density is changed in stages."""
    node = _from_state_dict(target, state)
    blocks_axis = next(axis for axis in range(jnp.ndim(node.layout.in_idx)) if axis not in target.stack_axes)
    num_blocks = node.layout.in_idx.shape[blocks_axis]
    if num_blocks == target.spec.num_blocks:
        return node
    if target.spec.storage == "backward_set":
        raise ValueError(
            f"the saved layer stores {num_blocks} weights and the target {target.spec.num_blocks}; make the target "
            "of the plan that was saved."
        )
    return dataclasses.replace(node, spec=dataclasses.replace(target.spec, num_blocks=num_blocks, num_active=0))


flax.serialization.register_serialization_state(BlockLayout, _to_state_dict, _from_state_dict)
flax.serialization.register_serialization_state(LayerTopology, _layer_to_state_dict, _layer_from_state_dict)
for _pytree in (BlockLayout, LayerTopology, KernelIndex, Pieces, Inverse):
    register_for_export(_pytree)
