"""The adaptation step: statistics, new layouts, repacked weights and moments, in one jit-compiled function.

It maps (train state, batch) to (train state, report) outside of the gradient path: the batch is used to measure,
never to update. Weights that stay active keep their values and moments bit by bit, wherever their block goes; newly
active positions start with weight 0 and moments 0. Layers of equal sizes share one compiled loop and loops follow
each other, so that one layer at a time is scored in dense form. Repacking needs no dense form at all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Int

from dsb_jax.layout import BlockLayout, block_group, block_rows, real_rows, row_places
from dsb_jax.methods.base import LayerReport, Method
from dsb_jax.ops.statistics import make_probe
from dsb_jax.train import Loss, cross_entropy, forward, step_key
from dsb_jax.train_state import Path, TrainState, kept_beside, layouts, leaf_at, with_layouts

Report = dict[str, LayerReport]


def origins(old: BlockLayout, new: BlockLayout) -> Int[Array, "num_blocks R C"]:
    """Where each weight of `new` is stored in `old`: a flat index into its blocks, past their end if nowhere.

    Nothing of size `out * in` is made. Row i is found by its place among the rows in the order of the groups, column j
    by its place in the panel of that row's group: `[num_groups, in]` integers.
    """
    rows, cols = old.block_shape
    num_columns = old.in_idx.size
    place = row_places(old.out_idx)
    column = jnp.full((old.num_groups, old.shape[1]), -1, jnp.int32)
    numbers = jnp.arange(num_columns, dtype=jnp.int32).reshape(old.in_idx.shape)
    column = column.at[block_group(old)[:, None], old.in_idx].set(numbers)
    row = place[block_rows(new)][:, :, None]
    column = column[row // rows, new.in_idx[:, None, :]]
    index = (column // cols * rows + row % rows) * cols + column % cols
    return jnp.where((column >= 0) & real_rows(new), index, num_columns * rows)


def repack(blocks: jax.Array, old: BlockLayout, new: BlockLayout) -> jax.Array:
    """Moves values to where their positions went: bit-identical if active in both layouts, 0 if newly active."""
    return _take(blocks, origins(old, new))


def _take(blocks: jax.Array, origin: jax.Array) -> jax.Array:
    return blocks.reshape(-1).at[origin].get(mode="fill", fill_value=0)


def measure(
    state: TrainState, images: jax.Array, labels: jax.Array, *, model: nn.Module, kind: str, loss: Loss
) -> dict[Path, Any]:
    """The statistic `kind` of every sparse layer on one batch, by differentiating with respect to the probes."""

    def probes_tree(topology: Any) -> Any:
        if isinstance(topology, BlockLayout):
            return make_probe(kind, topology)
        return {("statistic" if name == "layout" else name): probes_tree(value) for name, value in topology.items()}

    def objective(probes: Any) -> jax.Array:
        logits, _ = forward(model, {**state.variables, "probes": probes}, images, dropout_key=step_key(state))
        return loss(logits, labels)

    statistics = jax.grad(objective)(probes_tree(state.topology))
    return {path: leaf_at(statistics, (*path, "statistic")) for path in layouts(state.topology)}


def _signature(blocks: jax.Array, layout: BlockLayout) -> tuple[Any, ...]:
    return layout.shape, layout.block_shape, blocks.shape, str(blocks.dtype)


def _one_by_one(update: Callable[..., Any], args: list[Any], zero: jax.Array) -> Any:
    """Stacked results of `update(*arg)`, computed so that no two of them hold their dense scratch at the same time.

    XLA assigns memory by data dependencies, when optimization barriers are gone already. So two numbers here are 0 and
    XLA does not know: `zero`, which comes out of the loop before, keeps this loop from being unrolled or starting
    early; `min(i, 0)`, added to the layout, keeps the update of a single layer from being moved out of the loop.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *args)

    def update_one(i: jax.Array) -> Any:
        key, blocks, layout, statistic = jax.tree.map(lambda leaf: leaf[i], stacked)
        layout = dataclasses.replace(layout, group_start=layout.group_start + jnp.minimum(i, 0))
        return update(key, blocks, layout, statistic)

    def turn(i: jax.Array, results: Any) -> Any:
        return jax.tree.map(lambda every, one: every.at[i].set(one), results, update_one(i))

    shapes = jax.eval_shape(update_one, jnp.int32(0))
    empty = jax.tree.map(lambda leaf: jnp.zeros((len(args), *leaf.shape), leaf.dtype), shapes)
    return lax.fori_loop(0, len(args) + zero, turn, empty)


def update_layers(
    method: Method,
    key: jax.Array,
    step: jax.Array,
    blocks: Mapping[Path, jax.Array],
    old: Mapping[Path, BlockLayout],
    statistics: Mapping[Path, Any],
) -> tuple[dict[Path, BlockLayout], Report, dict[Path, Any]]:
    """New layouts, report, and what `method.exchange` returns for every layer (statistics are what is kept then).

    Layers of one signature share one compiled loop.
    """
    method_update, exchange = method.update, method.exchange
    assert method_update is not None

    def update(key: jax.Array, blocks: jax.Array, layout: BlockLayout, statistic: Any) -> Any:
        layout_and_report = method_update(key, step, blocks, layout, statistic)
        return *layout_and_report, exchange and exchange(blocks, layout, layout_and_report[0], statistic)

    same: dict[tuple[Any, ...], list[Path]] = {}
    for path in old:
        same.setdefault(_signature(blocks[path], old[path]), []).append(path)
    new: dict[Path, BlockLayout] = {}
    report: Report = {}
    exchanged: dict[Path, Any] = {}
    keys = dict(zip(old, jax.random.split(key, max(len(old), 1)), strict=False))
    zero = jnp.minimum(step, 0)
    for paths in same.values():
        args = [(keys[p], blocks[p], old[p], statistics.get(p)) for p in paths]
        results = _one_by_one(update, args, zero)
        zero = jnp.minimum(results[0].out_idx[0, 0, 0], 0)
        for i, path in enumerate(paths):
            new[path], report["/".join(path)], swapped = jax.tree.map(lambda leaf, i=i: leaf[i], results)
            if swapped is not None:
                exchanged[path] = swapped
    return new, report, exchanged


def repack_state(
    state: TrainState,
    new: Mapping[Path, BlockLayout],
    optimizer: optax.GradientTransformation,
    exchanged: Mapping[Path, Any] | None = None,
) -> TrainState:
    """Repacks the blocks and every block-shaped leaf of the optimizer state, for any optax optimizer.

    Where something is `exchanged`, (blocks, what is kept beside) by layer, these are the blocks.

    Raises:
      NotImplementedError: if the optimizer keeps a state for blocks that has another shape than they have.
    """
    old = layouts(state.topology)
    origin = {path: origins(old[path], new[path]) for path in new}

    def move(leaf: Any, name: str) -> Any:
        path = tuple(name.split("/"))
        if path[-1] != "blocks" or path[:-1] not in new or not hasattr(leaf, "shape"):
            return leaf
        before = old[path[:-1]]
        if leaf.shape != (before.num_blocks, *before.block_shape):
            if leaf.size <= 1:  # a placeholder, such as Adafactor's unused factors
                return leaf
            raise NotImplementedError(
                f"the optimizer keeps a state of shape {leaf.shape} for {name}, which cannot follow its "
                "blocks; use one whose moments have the shape of the weights (SGD, Adam, Lion, ...)."
            )
        return _take(leaf, origin[path[:-1]])

    def place(leaf: Any, name: str) -> Any:
        layer = tuple(name.split("/"))[:-1]
        return (
            exchanged[layer][0] if exchanged and layer in exchanged and name.endswith("/blocks") else move(leaf, name)
        )

    names = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(key.key for key in path), state.params)
    return TrainState(
        params=jax.tree.map(place, state.params, names),
        batch_stats=state.batch_stats,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer, move, state.opt_state, names, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
        ),
        topology=with_layouts(state.topology, new, {path: beside for path, (_, beside) in (exchanged or {}).items()}),
        step=state.step,
        key=state.key,
    )


@functools.partial(jax.jit, static_argnames=("model", "method", "optimizer", "loss"), donate_argnums=0)
def adapt_step(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    *,
    model: nn.Module,
    method: Method,
    optimizer: optax.GradientTransformation,
    loss: Loss = cross_entropy,
) -> tuple[TrainState, Report]:
    """Adapts the topology of every sparse layer. The state is donated.

    Args:
      state: the train state.
      images, labels: the adaptation batch, used for the statistics that growing needs.
      model: the model that `state` belongs to.
      method: with an `update`, such as `methods.dsb(...)`.
      optimizer: the one whose state is to follow the weights.
      loss: as in training.

    Returns:
      The new state (same shapes, same number of active weights) and a report for each layer by its path.

    Raises:
      ValueError: if the method does not adapt.
    """
    if method.update is None:
        raise ValueError(f"method {method.name!r} never adapts; call adapt_step for methods with an update only.")
    old = layouts(state.topology)
    for path, layout in old.items():
        if layout.out_idx.ndim != 2:
            raise NotImplementedError(
                f"{'/'.join(path)} holds a stack of layouts (nn.scan or nn.vmap), which cannot be adapted yet; write "
                "the layers out, or train them with method ssb."
            )
    statistics: dict[Path, Any] = {}
    if method.statistic is not None:
        statistics = measure(state, images, labels, model=model, kind=method.statistic, loss=loss)
    blocks = {path: leaf_at(state.params, (*path, "blocks")) for path in old}
    key = jax.random.fold_in(step_key(state), 1)  # apart from the key of the training step
    if method.exchange is not None:
        statistics = {path: kept_beside(state.topology, path) for path in old}
    new, report, exchanged = update_layers(method, key, state.step, blocks, old, statistics)
    return repack_state(state, new, optimizer, exchanged), report
