"""What a training reports about itself, measured from its arrays: bytes, active weights, exploration."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsb_jax.layout import BlockLayout
from dsb_jax.paths import Path, layer_path, nodes, path_name
from dsb_jax.topology import LayerTopology, split_stack, without_index


def active_positions(layout: BlockLayout, active: Any = None) -> np.ndarray:
    """int64[num_active]: flat positions `row * in + column` of the real weights of one layer, on the host.

    With `active`, bool[num_blocks, R, C], those that are True there.
    """
    out_idx, in_idx, start = (np.asarray(a) for a in (layout.out_idx, layout.in_idx, layout.group_start))
    rows = out_idx[np.repeat(np.arange(layout.num_groups), np.diff(start))]
    flat = rows[:, :, None].astype(np.int64) * layout.shape[1] + in_idx[:, None, :]
    is_active = np.broadcast_to(rows[:, :, None] < layout.shape[0], flat.shape)
    return flat[is_active if active is None else is_active & np.asarray(active)]


def layers_of(node: LayerTopology) -> list[tuple[BlockLayout, Any]]:
    """Layout and aux of each layer of a stack, on the host."""
    stack = jax.device_get(split_stack((node.layout, node.aux), node.stack_axes))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(node.num_layers)]


def _positions(node: LayerTopology) -> np.ndarray:
    """Flat positions in the stack of a node: those of layer i begin at i * out * in."""
    each = [active_positions(layout, None if aux is None else aux.active) for layout, aux in layers_of(node)]
    return np.concatenate([positions + i * node.spec.size for i, positions in enumerate(each)])


def count_active(topology: Any) -> dict[Path, int]:
    """Distinct positions that each sparse layer computes with, counted from its index arrays; by the layer's path."""
    return {layer_path(path): np.unique(_positions(node)).size for path, node in nodes(topology).items()}


def count_bytes(params: Any, opt_state: Any, topology: Any) -> dict[str, int]:
    """Bytes held by the arrays of `params`, `opt_state` and `topology`, and by the gradient of `params`.

    What products derive from the topology is "index". Weights that a method keeps beside a layout without gradient
    (`Aux.reserve`) count as params.
    """

    def nbytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # The gradient has the structure of what is differentiated; nothing of it is stored between steps.
    gradient = jax.eval_shape(
        jax.grad(lambda p: sum(leaf.astype("float32").sum() for leaf in jax.tree.leaves(p))), params
    )
    bare = without_index(topology)
    reserve = nbytes([node.aux.reserve for node in nodes(topology).values() if node.aux is not None])
    return {
        "params": nbytes(params) + reserve,
        "grads": nbytes(gradient),
        "opt_state": nbytes(opt_state),
        "topology": nbytes(bare) - reserve,
        "index": nbytes(topology) - nbytes(bare),
    }


class Explored:
    """Which positions were ever active, one bit each, kept on the host: exploration is their share of all.

    (`exploration` is the in-time over-parameterization rate of Liu et al., ICML 2021.)
    """

    def __init__(self, bits: Mapping[str, np.ndarray] | None = None) -> None:
        self.bits: dict[str, np.ndarray] = {name: array.copy() for name, array in (bits or {}).items()}
        self._sizes: dict[str, int] = {}

    def update(self, topology: Any) -> None:
        """Adds what is active now."""
        for path, node in nodes(topology).items():
            name, size = path_name(layer_path(path)), node.spec.size * node.num_layers
            now = np.zeros(size, bool)
            now[_positions(node)] = True
            packed = np.packbits(now)
            self.bits[name] = packed | self.bits[name] if name in self.bits else packed
            self._sizes[name] = size

    def share(self) -> float:
        """Positions ever active over all positions of the sparse layers; 0 without sparse layers."""
        total = sum(self._sizes.values())
        return sum(int(np.bitwise_count(bits).sum()) for bits in self.bits.values()) / total if total else 0.0
