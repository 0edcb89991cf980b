"""What a method is: how a layer's topology begins, and how it changes; pure functions, no inheritance."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from dsb_jax.layout import BlockLayout

Beside = dict[str, jax.Array]  # what a layer keeps beside its layout, by name


class LayerReport(NamedTuple):
    """What one adaptation did to one layer; scalars.

    Attributes:
      requested: positions that were to be grown.
      accepted: of these, how many are active afterwards.
      turnover: newly active positions over all active ones.
      collateral: share of the weights that were to be kept but are no longer active.
      empty_groups: row groups without any block, that is dead outputs in units of R.
    """

    requested: jax.Array
    accepted: jax.Array
    turnover: jax.Array
    collateral: jax.Array
    empty_groups: jax.Array


class Method(NamedTuple):
    """A sparse-training method for layers that store shuffled blocks.

    Attributes:
      name: as in the flags.
      sparse: False if every layer stays dense.
      init: `(key, shape, *, block_shape, num_blocks) -> BlockLayout`.
      update: `(key, step, blocks, layout, statistic) -> (BlockLayout, LayerReport)`, or None if the topology never
        changes. It must be jit-able, keep every static size, and hold no more than one layer in dense form.
      statistic: which probe of `dsb_jax.ops.statistics` the update needs, or None for none.
      unstructured: layers store single weights, blocks of 1x1, as many as the plan's blocks hold.
      store: `(weights[out, in], num_active) -> (BlockLayout, blocks, Beside)` for a layer that keeps more than its
        active weights: how it holds a first draw of all of them; or None. `init` is not asked then.
      exchange: with `store`, `(blocks, old, new, Beside) -> (blocks, Beside)` after an update from layout `old` to
        `new`: what is kept changes places. The `update` gets what is kept as its `statistic`.
      backward_factor: weights that have a gradient over those that the layer computes with.
      equal_width: whether a dense model is made narrower, until it has as many weights as the sparse one would have.
    """

    name: str
    sparse: bool
    init: Callable[..., BlockLayout] | None
    update: Callable[..., tuple[BlockLayout, LayerReport]] | None
    statistic: str | None
    unstructured: bool = False
    equal_width: bool = False
    store: Callable[..., tuple[BlockLayout, jax.Array, Beside]] | None = None
    exchange: Callable[..., tuple[jax.Array, Beside]] | None = None
    backward_factor: float = 1.0
