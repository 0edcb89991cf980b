"""The sparsity plan: for every linear layer of a model, how many blocks it holds, or why it stays dense.

A layer stays dense if its path matches one of the `keep_dense` patterns (by default the first convolution and
the classifier of this library's models, `stem` and `head`), if it is smaller than one block, or if it can hold
fewer than `min_blocks` blocks. The others are *eligible*: `sparsity` counts over their weights. An eligible
layer that the distribution gives density 1 is computed and stored densely.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax

from dsb_jax.distributions import LayerShape, erk, to_blocks, uniform
from dsb_jax.layout import max_blocks, num_active

DISTRIBUTIONS = {"uniform": uniform, "erk": erk}
KEEP_DENSE = ("stem", "head")
MIN_BLOCKS = 8
MIN_GROUP_BLOCKS = 1

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One linear layer or convolution: its sizes, its number of blocks (None: dense) and the reason."""

    path: Path
    shape: LayerShape
    num_blocks: int | None
    reason: str
    eligible: bool


@dataclasses.dataclass(frozen=True)
class SparsityPlan:
    """The plan of a whole model; hashable, so that it can be an attribute of Flax modules."""

    layers: tuple[LayerPlan, ...]
    block_shape: tuple[int, int]

    def __getitem__(self, path: Path) -> LayerPlan:
        for layer in self.layers:
            if layer.path == path:
                return layer
        known = ", ".join("/".join(layer.path) for layer in self.layers[:4])
        raise KeyError(
            f"no layer {'/'.join(path)!r} in the plan, which has {known}, ...; make the plan from this model."
        )

    @property
    def sparse_layers(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.num_blocks is not None)

    def num_active(self, layer: LayerPlan) -> int:
        """Weights that the layer stores."""
        if layer.num_blocks is None:
            return layer.shape.size
        return num_active((layer.shape.out, layer.shape.in_), self.block_shape, layer.num_blocks)

    def sparsity(self, *, eligible_only: bool = True) -> float:
        """Fraction of zeros over the eligible layers, or over all linear layers and convolutions."""
        layers = [layer for layer in self.layers if layer.eligible or not eligible_only]
        size = sum(layer.shape.size for layer in layers)
        return 1 - sum(self.num_active(layer) for layer in layers) / size if size else 0.0


def unstructured(plan: SparsityPlan) -> SparsityPlan:
    """The plan with as many single weights in each layer, stored as 1x1 blocks, as its blocks hold."""
    layers = tuple(
        layer if layer.num_blocks is None else dataclasses.replace(layer, num_blocks=plan.num_active(layer))
        for layer in plan.layers
    )
    return SparsityPlan(layers, (1, 1))


def find_layers(params: Mapping[str, Any]) -> dict[Path, LayerShape]:
    """The linear layers and 2-D convolutions of a dense model: every `kernel` of rank 2 or 4 among its params."""
    layers = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(key.key for key in keys)
        if path[-1] == "kernel" and len(leaf.shape) in (2, 4):
            *kernel_size, channels, out = leaf.shape
            in_ = channels
            for size in kernel_size:
                in_ *= size
            layers[path[:-1]] = LayerShape(out=out, in_=in_, kernel_size=tuple(kernel_size))
    return layers


def _dense_reason(path: Path, shape: LayerShape, block_shape: tuple[int, int], keep_dense: tuple[str, ...],
                  min_blocks: int) -> str | None:  # fmt: skip
    for pattern in keep_dense:
        if fnmatch.fnmatchcase("/".join(path), pattern) or any(fnmatch.fnmatchcase(part, pattern) for part in path):
            return f"kept dense by {pattern!r}"
    rows, cols = block_shape
    if rows > shape.out or cols > shape.in_:
        return f"smaller than a {rows}x{cols} block"
    if (most := max_blocks((shape.out, shape.in_), block_shape)) < min_blocks:
        return f"holds {most} blocks at the most"
    return None


def make_plan(
    layers: Mapping[Path, LayerShape],
    *,
    sparsity: float,
    distribution: str = "uniform",
    block_shape: tuple[int, int] = (16, 16),
    keep_dense: tuple[str, ...] = KEEP_DENSE,
    min_blocks: int = MIN_BLOCKS,
    min_group_blocks: int = MIN_GROUP_BLOCKS,
) -> SparsityPlan:
    """Spreads blocks over a model so that `sparsity` is met over its eligible layers within one block.

    A layer has `min_group_blocks` blocks for each of its row groups at the least, whatever the distribution says, and
    the others have as much less: narrow layers, above all the 1x1 convolutions of shortcuts, would else begin with
    outputs that have no weights. Only if `sparsity` leaves too few weights for that, some do.

    Args:
      layers: path -> sizes, as `find_layers` gives them.
      sparsity: fraction of zeros, in [0, 1).
      distribution: "uniform" or "erk".
      block_shape: `(R, C)`.
      keep_dense: patterns (as in a shell) matched against the path `a/b/c` and against each of its parts.
      min_blocks: layers that can hold fewer blocks stay dense.
      min_group_blocks: blocks for each row group; 0 takes the densities as they are.

    Raises:
      ValueError: if the distribution is unknown, the sparsity impossible, or no layer can be sparse.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is unknown; choose one of {', '.join(DISTRIBUTIONS)}.")
    reasons = {path: _dense_reason(path, shape, block_shape, keep_dense, min_blocks) for path, shape in layers.items()}
    eligible = [path for path, reason in reasons.items() if reason is None]
    if not eligible:
        raise ValueError(
            f"no layer can hold {block_shape[0]}x{block_shape[1]} blocks: "
            + "; ".join(f"{'/'.join(path)} {reason}" for path, reason in list(reasons.items())[:3])
            + ". Use a smaller block_shape, a wider model, or method=dense."
        )
    densities = dict(
        zip(eligible, DISTRIBUTIONS[distribution]([layers[path] for path in eligible], sparsity), strict=True)
    )
    sparse = [path for path in eligible if densities[path] < 1]
    shapes, wanted = [layers[path] for path in sparse], [densities[path] for path in sparse]
    counts = dict(zip(sparse, to_blocks(shapes, wanted, block_shape, min_group_blocks=min_group_blocks), strict=True))
    plans = []
    for path, shape in layers.items():
        reason, count = reasons[path], counts.get(path)
        if reason is None:
            reason = distribution if count is not None else "density 1"
            # Wanting less is the cause; more than a block above it tells the raise from rounding.
            wants_less = densities[path] * shape.in_ < min_group_blocks * block_shape[1]
            if count is not None and wants_less and count > densities[path] * shape.size / math.prod(block_shape) + 1:
                reason = f"raised from {distribution} for the sake of every row group"
        plans.append(LayerPlan(path, shape, count, reason, eligible=reasons[path] is None))
    return SparsityPlan(tuple(plans), block_shape)
