"""Layers and nodes made by NumPy, and comparisons by bits, which the tests of the core share."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dsb_jax.layout import BlockLayout, column_dtype, pack, ragged_blocks, real_rows, to_mask, unpack
from dsb_jax.methods import LayerState, Static
from dsb_jax.methods.blocks import scale_to_fan_in
from dsb_jax.paths import nodes
from dsb_jax.spec import LayerSpec, linear_spec
from dsb_jax.topology import LayerTopology
from tests.conftest import make_layout


def make_node(layout: BlockLayout, *, spec: LayerSpec | None = None) -> LayerTopology:
    """The node of a linear layer with this layout, or of a layer whose dense spec is given."""
    dense = linear_spec(layout.shape[1], layout.shape[0]) if spec is None else spec
    return LayerTopology(layout, None, dense.with_blocks(layout.block_shape, layout.in_idx.shape[0]))


def node_of_counts(seed: int, shape: tuple[int, int], block_shape: tuple[int, int], counts: tuple[int, ...]) -> Any:
    """The node of a linear layer whose group g holds `counts[g]` blocks, of random rows and columns."""
    return make_node(make_layout(seed, shape, block_shape, counts))


@dataclasses.dataclass(frozen=True)
class DrawnByNumPy(Static):
    """Static blocks whose layout is a constant of the program, spread evenly: a model that compiles sooner.

    Or with `counts`, so many blocks in each group.
    """

    seed: int = 0
    counts: tuple[int, ...] = ()

    def init(self, key, weights, spec, *, score=None):
        ragged, groups = ragged_blocks(spec.shape, spec.block_shape, spec.num_blocks), spec.num_groups
        rest, full = spec.num_blocks - (ragged or 0), groups - (ragged is not None)
        counts = [rest // full + (g < rest % full) for g in range(full)] + [ragged] * (ragged is not None)
        with jax.ensure_compile_time_eval():
            layout = make_layout(self.seed, spec.shape, spec.block_shape, self.counts or tuple(counts))
            layout = dataclasses.replace(layout, in_idx=layout.in_idx.astype(column_dtype(spec.in_)))
        return LayerState(scale_to_fan_in(weights, layout), layout)


def in_place(leaf: Any, layout: BlockLayout) -> np.ndarray:
    """An array shaped like the blocks as [out, in], on the host; NaN where nothing is stored."""
    out_idx, in_idx, start = (np.asarray(a) for a in (layout.out_idx, layout.in_idx, layout.group_start))
    rows = out_idx[np.repeat(np.arange(len(out_idx)), np.diff(start))]
    rows, columns = np.broadcast_arrays(rows[:, :, None], in_idx[:, None, :])
    real = rows < layout.shape[0]
    dense = np.full(layout.shape, np.nan, leaf.dtype)
    dense[rows[real], columns[real]] = np.asarray(leaf)[real]
    return dense


def stacked(layers: list[LayerTopology], axis: int = 0) -> LayerTopology:
    """One node of several equal layers, as a model that lifts its layers along `axis` holds it."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves], axis), *layers)


def assert_same_bits(one: Any, other: Any) -> None:
    """Equal structures, dtypes, shapes and bits (NaN equals NaN; 0 and -0 differ)."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(getattr(a, "dtype", None), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def noise_like(tree: Any, seed: int = 0) -> Any:
    """Random numbers for every float leaf, so that none is zero by chance; zeros for the others."""
    rng = np.random.default_rng(seed)

    def noise(leaf: Any) -> Any:
        floats = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return (rng.standard_normal(leaf.shape) if floats else np.zeros(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(noise, tree)


PACK, UNPACK, MASK, REAL_ROWS = (jax.jit(f) for f in (pack, unpack, to_mask, real_rows))


def check_moved(before: Any, after: Any, old_topology: Any, topology: Any) -> int:
    """Every block-shaped leaf of a tree followed its weights, every other leaf is the same; how many followed."""
    old, new, moved = nodes(old_topology), nodes(topology), 0
    assert jax.tree.structure(before) == jax.tree.structure(after)
    leaves = jax.tree_util.tree_leaves_with_path(before)
    for (path, a), b in zip(leaves, jax.tree.leaves(after), strict=True):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))[-2:]
        if names not in old:
            assert_same_bits(a, b)
            continue
        moved += 1
        was, now = old[names].layout, new[names].layout
        assert_same_bits(np.asarray(b), np.asarray(PACK(UNPACK(a, was), now)))
        mask_a, mask_b = (np.asarray(MASK(layout)) for layout in (was, now))
        assert mask_a.sum() == mask_b.sum() == was.num_active
        assert (mask_b & ~mask_a).any()  # the law would hold of layouts that never change
        assert not np.asarray(b)[~np.broadcast_to(REAL_ROWS(now), b.shape)].any()  # phantom weights
    return moved
