"""Density in stages: a model whose layers get another number of blocks between steps, on the host's call.

Gradual sparsity and pruning of a pre-trained model are one mechanism: a plan for each stage, `restage` between them.
"""

import functools
from typing import Any

import jax
import optax

from dsb_jax.filling import move_leaf, origins_of
from dsb_jax.methods.base import LayerState, Method
from dsb_jax.optimizer_states import check_storage, flatten_state, followers
from dsb_jax.paths import Path, layer_path, nodes, path_name, replace_at, weights_at
from dsb_jax.plan import SparsityPlan, check_plan
from dsb_jax.spec import LayerSpec
from dsb_jax.static_values import as_static, original
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
) -> tuple[Any, Any, Any]:
    """Brings every sparse layer to the number of blocks of a plan; the strongest weights stay, with their moments.

    Called between steps, outside of `jit`, because sizes change: it compiles once a stage, as do the steps after it.

    Args:
      params, topology, opt_state: as in `dsb_jax.adaptation`.
      plan: of the same model, with the same block shapes; it must have every layer that is sparse now.
      method: the one that the layers were made with.
      optimizer: the one that `opt_state` belongs to.
      key: for what is drawn where a layer grows.

    Returns:
      The new params, topology and opt_state. Newly active weights and moments are 0.

    Raises:
      ValueError: if the plan keeps a layer dense that is sparse now, or gives it another kernel or block shape; if the
        optimizer's state cannot follow or is of other parameters.
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
                f"{spec.block_shape} in the plan; only the number of blocks may change."
            )
        specs.append((path, spec))
    trees = (params, topology, opt_state)
    return _restage(method, as_static(optimizer), tuple(specs), trees, check_key(key))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _restage(
    method: Method, optimizer: Any, specs: tuple[tuple[Path, LayerSpec], ...], trees: Any, key: jax.Array
) -> tuple[Any, Any, Any]:
    params, topology, opt_state = trees
    old = nodes(topology)
    weights = weights_at(params, old)
    following = followers(original(optimizer), params, topology)
    leaves, structure = flatten_state(opt_state, following, topology)
    new, moved = {}, {}
    for i, (path, spec) in enumerate(specs):
        node = old[path]
        if spec == node.spec:
            continue

        def resize(key: jax.Array, state: LayerState, spec: LayerSpec = spec) -> LayerState:
            return method.resize(key, state, spec)

        axes, sizes = node.stack_axes, node.stack_shape
        keys = jax.random.split(jax.random.fold_in(key, i), node.num_layers)
        states = jax.vmap(resize)(keys, LayerState(*split_stack((weights[path], node.layout, node.aux), axes)))
        index = jax.vmap(lambda layout, old=node.index: like_index(layout, old))(states.layout)
        blocks, layout, aux, index = join_stack((*states, index), axes, sizes)
        moved[path], new[path] = blocks, LayerTopology(layout, aux, spec, index)
    origin = {path: origins_of(old[path], new[path]) for path in new}
    for i, follower in following.items():
        if follower.path in new:
            leaves[i] = move_leaf(leaves[i], origin[follower.path], new[follower.path], 0)
    return replace_at(params, moved), replace_at(topology, new), jax.tree.unflatten(structure, leaves)
