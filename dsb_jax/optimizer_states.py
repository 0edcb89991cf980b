"""Which arrays of an optimizer's state follow the weights of a sparse layer; for any optax optimizer, without names.

The optimizer is initialized abstractly twice, the second time with some more blocks in every sparse layer. What has
grown as the blocks have is shaped like them and follows them. What has changed in any other way (factored, flattened or
stacked moments) cannot follow, and is refused before training begins.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsb_jax.dataflow import dependencies
from dsb_jax.filling import check_fill
from dsb_jax.methods.base import check_method
from dsb_jax.paths import Path, dense_path, layer_path, nodes, path_name, replace_at, weights_at

SECOND_MOMENTS = ("nu", "nu_max")  # as optax names them in Adam and all that is like it


@dataclasses.dataclass(frozen=True)
class Follower:
    """A leaf of an optimizer's state that is shaped like the weights at `path`; `field` is its name in the state."""

    path: Path
    field: str


def choose_fills(following: Mapping[int, Follower], fill: tuple[tuple[str, Any], ...]) -> dict[int, Any]:
    """What each leaf that follows weights begins with where they are new, by its number.

    A second moment of zero did harm in experiments/RESULTS.md: the first updates are as large as the learning rate.

    Args:
      following: as `followers` gives it.
      fill: what a user chose, as `dsb_jax.filling.fill_pairs` gives it.

    Raises:
      ValueError: if a field is filled that the state does not have.
    """
    check_fill(fill, {follower.field for follower in following.values()})
    chosen = dict(fill)
    return {
        i: chosen.get(follower.field, "group_mean" if follower.field in SECOND_MOMENTS else "zero")
        for i, follower in following.items()
    }


def check_transformation(optimizer: Any) -> None:
    """Raises ValueError for what is no optimizer."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"optimizer={optimizer!r} is no optax optimizer; give the one that opt_state belongs to.")


def followers(optimizer: optax.GradientTransformation, params: Any, topology: Any) -> dict[int, Follower]:
    """The leaves of `optimizer.init(params)`, by number, that belong to sparse layers.

    Raises:
      ValueError: if the optimizer keeps something for a sparse layer that cannot follow its weights.
    """
    check_transformation(optimizer)
    found = nodes(topology)
    weights = weights_at(params, found)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    enlarged, growth = {}, {}
    same_shape: dict[tuple[int, ...], int] = {}
    for path, node in found.items():
        shape = jnp.shape(weights[path])
        if shape != node.blocks_shape:
            raise ValueError(
                f"{path_name(path)} has shape {shape}, but its topology holds {node.blocks_shape}; "
                "pass the topology that belongs to these parameters."
            )
        same_shape[shape] = same_shape.get(shape, 0) + 1
        axis = next(i for i in range(len(shape)) if i not in node.stack_axes)
        grown = (*shape[:axis], shape[axis] + same_shape[shape], *shape[axis + 1 :])
        growth[shape, grown] = path
        enlarged[path] = jax.ShapeDtypeStruct(grown, weights[path].dtype)
    # Within one function, so that masks and labels that are made of the parameters see arrays.
    before = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, abstract))
    after = jax.tree.leaves(jax.eval_shape(optimizer.init, replace_at(abstract, enlarged)))
    if len(before) != len(after):
        raise ValueError(f"{_name_of(optimizer)} keeps a state whose structure depends on the number of blocks.")
    following = {}
    for i, ((keys, leaf), other) in enumerate(zip(before, after, strict=True)):
        if leaf.shape == other.shape:
            continue
        follows = growth.get((leaf.shape, other.shape))
        if follows is None:
            raise ValueError(
                f"the optimizer keeps a state of shape {leaf.shape} at {jax.tree_util.keystr(keys)}, which cannot "
                "follow the blocks of a sparse layer; use one whose moments have the shape of the weights (SGD, Adam, "
                "Lion, ...), without optax.flatten and without factored moments."
            )
        following[i] = Follower(follows, _field(keys))
    return following


def frozen_layers(optimizer: optax.GradientTransformation, params: Any, opt_state: Any, topology: Any) -> set[Path]:
    """Sparse layers whose update does not depend on their own gradient, such as those of `optax.set_to_zero`.

    By data flow, not by values. An optimizer that must be given more than gradients (a value, a key) freezes none.
    """
    paths = dict.fromkeys(nodes(topology))
    return {
        path for path, (gradient, _) in _what_updates_use(optimizer, params, opt_state, paths).items() if not gradient
    }


def undecayed_layers(
    optimizer: optax.GradientTransformation, params: Any, dense_params: Any, topology: Any
) -> set[Path]:
    """Sparse layers that weight decay does not reach, but would if they were dense: its mask looks for `kernel`.

    By data flow: the update of a weight that decays depends on the weight.

    Args:
      optimizer: any optax transformation.
      params, topology: of the sparse model; abstract ones will do.
      dense_params: of the dense model, as `to_dense` gives them.
    """
    used = []
    for tree, paths in ((params, nodes(topology)), (dense_params, map(dense_path, nodes(topology)))):
        state = jax.eval_shape(optimizer.init, tree)
        used.append(_what_updates_use(optimizer, tree, state, dict.fromkeys(paths)))
    sparse, dense = used
    return {path for path, (_, weight) in sparse.items() if not weight and dense[dense_path(path)][1]}


def _what_updates_use(
    optimizer: optax.GradientTransformation, params: Any, opt_state: Any, paths: Mapping[Path, Any]
) -> dict[Path, tuple[bool, bool]]:
    """Whether the update of each weight depends on its own gradient, and on itself; both if nobody can tell."""
    leaves, structure = jax.tree.flatten(params)
    count = len(leaves)
    numbers = weights_at(jax.tree.unflatten(structure, range(count)), paths)

    def update(gradients: list[Any], params: list[Any], opt_state: Any) -> list[Any]:
        unflatten = functools.partial(jax.tree.unflatten, structure)
        updates, _ = optimizer.update(unflatten(gradients), opt_state, unflatten(params))
        return jax.tree.leaves(updates)

    try:
        reached = dependencies(jax.make_jaxpr(update)(leaves, leaves, opt_state))
    except TypeError:  # an argument is missing
        return dict.fromkeys(paths, (True, True))
    return {path: (i in reached[i], count + i in reached[i]) for path, i in numbers.items()}


def check_optimizer(optimizer: optax.GradientTransformation, params: Any, topology: Any, method: Any = None) -> None:
    """Checks before the first step whether an optimizer's state can follow the weights when the topology changes.

    Args:
      optimizer: any optax transformation.
      params: of the model; abstract ones will do.
      topology: of the same model.
      method: checks as well that the layers hold what this method adapts, and warns if it grows by raw gradients
        while the optimizer normalizes them.

    Raises:
      ValueError: if not, with what the optimizer keeps and where, or with the layer and its storage.
    """
    following = followers(optimizer, params, topology)
    if method is None:
        return
    check_storage(method, topology)
    normalizes = any(follower.field in SECOND_MOMENTS for follower in following.values())
    if normalizes and method.statistic is not None:
        warnings.warn(
            f"{type(method).__name__} grows by gradients, and this optimizer divides them by their second moments: a "
            "large one is then no sign of a useful weight. Growth at random does better: DSB.for_adam(), SET().",
            stacklevel=2,
        )


def flatten_state(opt_state: Any, following: dict[int, Follower], topology: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of an optimizer's state.

    Raises:
      ValueError: if what is to follow a layer does not have its shape: the state is of other parameters.
    """
    leaves, structure = jax.tree.flatten(opt_state)
    found = nodes(topology)
    for i, follower in following.items():
        shape = jnp.shape(leaves[i]) if i < len(leaves) else None
        if shape != found[follower.path].blocks_shape:
            raise ValueError(
                f"opt_state has {'nothing' if shape is None else shape} for {follower.field or 'the state'} of "
                f"{path_name(follower.path)}, whose shape is {found[follower.path].blocks_shape}; pass the state that "
                "this optimizer made of these parameters."
            )
    return leaves, structure


def check_storage(method: Any, topology: Any) -> None:
    """Raises ValueError if a layer holds something else than what `method` adapts."""
    check_method(method)
    for path, node in nodes(topology).items():
        if node.spec.storage != method.storage:
            raise ValueError(
                f"{type(method).__name__} adapts layers with storage {method.storage!r}, but "
                f"{path_name(layer_path(path))} has {node.spec.storage!r}; make the layers with method={method!r}."
            )


def _field(keys: tuple[Any, ...]) -> str:
    """The name of the innermost field of a state, such as "nu" of `ScaleByAdamState`."""
    return next((key.name for key in reversed(keys) if isinstance(key, jax.tree_util.GetAttrKey)), "")


def _name_of(optimizer: Any) -> str:
    return getattr(optimizer.init, "__qualname__", "the optimizer").split(".")[0]
