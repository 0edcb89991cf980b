"""Density in stages: a model whose layers get another number of blocks between steps, on the host's call.

Gradual sparsity and pruning of a pre-trained model are one mechanism: a plan for each stage, `restage` between them.
`dsb_jax.gradual` makes such plans, and says what they cost: weights, gradients and moments of a stage are those of its
plan, so a training that begins denser than it ends needs more memory at first.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import optax

from dsb_jax.filling import fill_pairs, move_and_fill, origins_of
from dsb_jax.methods.base import LayerState, Method
from dsb_jax.optimizer_states import check_storage, choose_fills, flatten_state, followers
from dsb_jax.paths import layer_path, nodes, path_name, replace_at, weights_at
from dsb_jax.plan import SparsityPlan, check_plan
from dsb_jax.spec import LayerSpec
from dsb_jax.step_and_key import check_key
from dsb_jax.topology import LayerTopology, join_stack, like_index, split_stack


def restage(
    params: Any,
    topology: Any,
    opt_state: Any,
    plan: SparsityPlan,
    method: Method,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    fill: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Brings every sparse layer to the number of blocks of a plan; the strongest weights stay, with their moments.

    Called between steps, outside of `jit`, because sizes change: it compiles once a stage, equal layers together, as do
    the steps after it. A layer that shrinks keeps what is largest in magnitude, as the method that it belongs to counts
    (a panel column for shuffled blocks, with `min_group_blocks` in every row group); layers do not compete. Until the
    old trees are let go, both stages' weights and moments exist.

    Args:
      params, topology, opt_state: as in `dsb_jax.adaptation`.
      plan: of the same model, with the same block shapes; it must have every layer that is sparse now.
      method: the one that the layers were made with.
      optimizer: the one that `opt_state` belongs to.
      key: for what is drawn where a layer grows.
      fill: what the moments of newly active weights begin with, as in `dsb_jax.adaptation`.

    Returns:
      The new params, topology and opt_state. Newly active weights are 0.

    Raises:
      ValueError: if the plan keeps a layer dense that is sparse now, or gives it another kernel or block shape; if the
        optimizer's state cannot follow or is of other parameters; if `fill` names a field that it does not have.
    """
    check_storage(method, topology)
    plan = check_plan(plan)
    specs = []
    for path, node in nodes(topology).items():
        layer = layer_path(path)
        planned = plan.get(layer)
        if not isinstance(planned, LayerSpec):
            raise ValueError(
                f"{path_name(layer)} is sparse, but the plan has {planned or 'no such layer'!r}; "
                "give a plan that keeps it sparse."
            )
        spec = method.stored(planned)
        if (spec.shape, spec.block_shape) != (node.spec.shape, node.spec.block_shape):
            raise ValueError(
                f"{path_name(layer)} is {node.spec.shape} in {node.spec.block_shape} blocks, but {spec.shape} in "
                f"{spec.block_shape} in the plan; only the number of blocks may change: give the plan the same block "
                "shapes, by its block_shape or by rules."
            )
        specs.append((path, spec))
    key, old = check_key(key), nodes(topology)
    weights = weights_at(params, old)
    following = followers(optimizer, params, topology)
    fills = choose_fills(following, fill_pairs(fill))
    leaves, structure = flatten_state(opt_state, following, topology)
    moved, new = {}, {}
    for i, (path, spec) in enumerate(specs):
        if spec != old[path].spec:
            own = [j for j, follower in following.items() if follower.path == path]
            moments, begins = (tuple(of[j] for j in own) for of in (leaves, fills))
            moved[path], new[path], moments = _resize(
                method, spec, begins, jax.random.fold_in(key, i), weights[path], old[path], moments
            )
            for j, leaf in zip(own, moments, strict=True):
                leaves[j] = leaf
    return replace_at(params, moved), replace_at(topology, new), jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _resize(
    method: Method,
    spec: LayerSpec,
    fills: tuple[Any, ...],
    key: jax.Array,
    blocks: jax.Array,
    node: LayerTopology,
    moments: tuple[Any, ...],
) -> tuple[jax.Array, LayerTopology, tuple[jax.Array, ...]]:
    """One node in the sizes of `spec`; equal layers share what is compiled."""

    def resize(key: jax.Array, state: LayerState) -> tuple[LayerState, Any]:
        state = method.resize(key, state, spec)
        return state, like_index(state.layout, node.index)

    axes, sizes = node.stack_axes, node.stack_shape
    keys = jax.random.split(key, node.num_layers)
    state = LayerState(*split_stack((blocks, node.layout, node.aux), axes))
    (blocks, layout, aux), index = join_stack(jax.vmap(resize)(keys, state), axes, sizes)
    new = LayerTopology(layout, aux, spec, index)
    if not moments:
        return blocks, new, ()
    origin = origins_of(node, new)
    return blocks, new, tuple(move_and_fill(leaf, origin, new, how) for leaf, how in zip(moments, fills, strict=True))
