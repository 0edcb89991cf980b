"""What a run reports about itself, measured from its arrays: bytes, sparsity, exploration."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsb_jax.layout import BlockLayout
from dsb_jax.train_state import Path, TrainState, kept_beside, layouts


def active_positions(layout: BlockLayout, forward_mask: jax.Array | None = None) -> np.ndarray:
    """int64[num_active]: flat positions `row * in + column` of the real weights, on the host.

    With a `forward_mask` (Top-KAST) those that the layer computes with.
    """
    out_idx, in_idx, start = (np.asarray(a) for a in (layout.out_idx, layout.in_idx, layout.group_start))
    rows = out_idx[np.repeat(np.arange(layout.num_groups), np.diff(start))]
    flat = rows[:, :, None].astype(np.int64) * layout.shape[1] + in_idx[:, None, :]
    active = rows[:, :, None] < layout.shape[0]
    if forward_mask is not None:
        active &= np.asarray(forward_mask)
    return flat[np.broadcast_to(active, flat.shape)]


def _positions(state: TrainState) -> dict[Path, np.ndarray]:
    masks = {path: kept_beside(state.topology, path).get("forward_mask") for path in layouts(state.topology)}
    return {path: active_positions(layout, masks[path]) for path, layout in layouts(state.topology).items()}


def count_active(state: TrainState) -> dict[Path, int]:
    """Distinct active positions of each sparse layer, counted from its index arrays."""
    return {path: np.unique(positions).size for path, positions in _positions(state).items()}


def count_bytes(state: TrainState) -> dict[str, int]:
    """Bytes held by the arrays of `params`, `opt_state` and `topology`, and by the gradient of `params`.

    Weights that are kept beside a layout (Top-KAST's reserve) count as params.
    """

    def nbytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # The gradient has the structure of what is differentiated; nothing of it is stored between steps.
    gradient = jax.eval_shape(jax.grad(lambda p: sum(leaf.astype("float32").sum() for leaf in jax.tree.leaves(p))),
                              state.params)  # fmt: skip
    reserve = nbytes([kept_beside(state.topology, path).get("reserve", ()) for path in layouts(state.topology)])
    return {
        "params": nbytes(state.params) + reserve,
        "grads": nbytes(gradient),
        "opt_state": nbytes(state.opt_state),
        "topology": nbytes(state.topology) - reserve,
    }


class Explored:
    """Which positions were ever active, one bit each, kept on the host: exploration is their share of all.

    (`exploration` is the in-time over-parameterization rate of Liu et al., ICML 2021.)
    """

    def __init__(self, bits: Mapping[str, np.ndarray] | None = None) -> None:
        self.bits: dict[str, np.ndarray] = {name: array.copy() for name, array in (bits or {}).items()}
        self._sizes: dict[str, int] = {}

    def update(self, state: TrainState) -> None:
        """Adds what is active now."""
        active = _positions(state)
        for path, layout in layouts(state.topology).items():
            name, size = "/".join(path), layout.shape[0] * layout.shape[1]
            now = np.zeros(size, bool)
            now[active[path]] = True
            packed = np.packbits(now)
            self.bits[name] = packed | self.bits[name] if name in self.bits else packed
            self._sizes[name] = size

    def share(self) -> float:
        """Positions ever active over all positions of the sparse layers; 0 without sparse layers."""
        total = sum(self._sizes.values())
        return sum(int(np.bitwise_count(bits).sum()) for bits in self.bits.values()) / total if total else 0.0
