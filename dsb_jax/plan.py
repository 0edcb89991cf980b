"""The sparsity plan: for every linear layer of a model, how many blocks it holds, or why it stays dense.

A layer stays dense if its path matches one of the `keep_dense` patterns (by default the first convolution and
the classifier of this library's models, `stem` and `head`), if it is smaller than one block, or if it can hold
fewer than `min_blocks` blocks. The others are *eligible*: `sparsity` counts over their weights. An eligible
layer that the distribution gives density 1 is computed and stored densely.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsb_jax.distributions import erk, to_blocks, uniform
from dsb_jax.layout import max_blocks
from dsb_jax.paths import Path, by_path, path_name
from dsb_jax.spec import LayerSpec, conv_spec, linear_spec

DISTRIBUTIONS = {"uniform": uniform, "erk": erk}
KEEP_DENSE = ("stem", "head")
MIN_BLOCKS = 8
MIN_GROUP_BLOCKS = 1

DENSITY_1 = "density 1"  # the reason of an eligible layer that stays dense


class PlannedLayer(NamedTuple):
    """One layer of a plan.

    Attributes:
      path: of the layer, without the name of its parameter.
      dense: the sizes of the dense layer.
      planned: the layer in blocks, or the reason why it stays dense.
      note: where its density comes from, or again the reason.
    """

    path: Path
    dense: LayerSpec
    planned: LayerSpec | str
    note: str


@dataclasses.dataclass(frozen=True)
class SparsityPlan(Mapping[Path, LayerSpec | str]):
    """The plan of a whole model: path -> `LayerSpec` in blocks, or the reason (a text) why the layer stays dense.

    Hashable, so that it can be an attribute of Flax modules.
    """

    layers: tuple[PlannedLayer, ...]

    @functools.cached_property
    def _by_path(self) -> dict[Path, PlannedLayer]:
        return {layer.path: layer for layer in self.layers}

    def _layer(self, path: Path) -> PlannedLayer:
        if path in self._by_path:
            return self._by_path[path]
        known = ", ".join(path_name(layer.path) for layer in self.layers[:4])
        raise KeyError(
            f"no layer {path_name(path)!r} in the plan, which has {known}, ...; make the plan from this model."
        )

    def __getitem__(self, path: Path) -> LayerSpec | str:
        return self._layer(path).planned

    def __contains__(self, path: object) -> bool:
        return path in self._by_path

    def __iter__(self) -> Iterator[Path]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sparse(self) -> dict[Path, LayerSpec]:
        """The layers in blocks, in the order of the model."""
        return {layer.path: layer.planned for layer in self.layers if isinstance(layer.planned, LayerSpec)}

    @property
    def sizes(self) -> dict[Path, LayerSpec]:
        """Every layer as it would be dense."""
        return {layer.path: layer.dense for layer in self.layers}

    def note(self, path: Path) -> str:
        """Where the density of a layer comes from: the distribution, a raise for its row groups, or why it is dense."""
        return self._layer(path).note

    @property
    def eligible(self) -> dict[Path, LayerSpec]:
        """The layers that `sparsity` counts over, as they would be dense."""
        return {
            layer.path: layer.dense
            for layer in self.layers
            if isinstance(layer.planned, LayerSpec) or layer.planned == DENSITY_1
        }

    def sparsity(self, *, eligible_only: bool = True) -> float:
        """Fraction of zeros over the eligible layers, or over all linear layers and convolutions."""
        size = active = 0
        eligible = self.eligible
        for path, dense, planned, _ in self.layers:
            if path in eligible or not eligible_only:
                size += dense.num_layers * dense.size
                active += dense.num_layers * (planned if isinstance(planned, LayerSpec) else dense).num_active
        return 1 - active / size if size else 0.0


def find_layers(params: Mapping[str, Any]) -> dict[Path, LayerSpec]:
    """The linear layers and 2-D convolutions of a dense model: every `kernel` of rank 2 or 4 among its params."""
    layers = {}
    for path, leaf in by_path(params).items():
        if path[-1] == "kernel" and len(leaf.shape) in (2, 4):
            *kernel_size, c_in, out = leaf.shape
            layers[path[:-1]] = conv_spec(tuple(kernel_size), c_in, out) if kernel_size else linear_spec(c_in, out)
    return layers


def _dense_reason(
    path: Path, spec: LayerSpec, block_shape: tuple[int, int], keep_dense: tuple[str, ...], min_blocks: int
) -> str | None:
    for pattern in keep_dense:
        if any(fnmatch.fnmatchcase(text, pattern) for text in (path_name(path), *path)):
            return f"kept dense by {pattern!r}"
    rows, cols = block_shape
    if rows > spec.out or cols > spec.in_:
        return f"smaller than a {rows}x{cols} block"
    if (most := max_blocks(spec.shape, block_shape)) < min_blocks:
        return f"holds {most} blocks at the most"
    return None


def check_plan(plan: Any) -> SparsityPlan:
    """The plan itself; raises ValueError for what is none."""
    if not isinstance(plan, SparsityPlan):
        raise ValueError(f"plan={plan!r} is no SparsityPlan; make one with dsb_jax.make_plan.")
    return plan


def make_plan(
    layers: Mapping[Path, LayerSpec],
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
      layers: path -> sizes of the dense layers, as `find_layers` gives them.
      sparsity: fraction of zeros, in [0, 1).
      distribution: "uniform" or "erk".
      block_shape: `(R, C)`.
      keep_dense: patterns (as in a shell) matched against the path `a/b/c` and against each of its parts.
      min_blocks: layers that can hold fewer blocks stay dense.
      min_group_blocks: blocks for each row group; 0 takes the densities as they are.

    Raises:
      TypeError: if `keep_dense` is one text, whose characters would be patterns.
      ValueError: if the distribution is unknown, the sparsity impossible, or no layer can be sparse.
    """
    if isinstance(keep_dense, str):
        raise TypeError(f"keep_dense={keep_dense!r} is one text; give patterns, as in keep_dense=({keep_dense!r},).")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is unknown; choose one of {', '.join(DISTRIBUTIONS)}.")
    if not layers or not all(isinstance(spec, LayerSpec) for spec in layers.values()):
        raise ValueError("there are no layers to plan; give dsb_jax.find_layers(params), of a model that has some.")
    reasons = {path: _dense_reason(path, spec, block_shape, keep_dense, min_blocks) for path, spec in layers.items()}
    eligible = [path for path, reason in reasons.items() if reason is None]
    if not eligible:
        raise ValueError(
            f"no layer can hold {block_shape[0]}x{block_shape[1]} blocks: "
            + "; ".join(f"{path_name(path)} {reason}" for path, reason in list(reasons.items())[:3])
            + ". Use a smaller block_shape, a wider model, or method=dense."
        )
    densities = dict(
        zip(eligible, DISTRIBUTIONS[distribution]([layers[path] for path in eligible], sparsity), strict=True)
    )
    sparse = [path for path in eligible if densities[path] < 1]
    specs, wanted = [layers[path] for path in sparse], [densities[path] for path in sparse]
    counts = dict(zip(sparse, to_blocks(specs, wanted, block_shape, min_group_blocks=min_group_blocks), strict=True))
    planned = []
    for path, spec in layers.items():
        if path not in counts:
            reason = reasons[path] or DENSITY_1
            planned.append(PlannedLayer(path, spec, reason, reason))
            continue
        # Wanting less is the cause; more than a block above it tells the raise from rounding.
        wants_less = densities[path] * spec.in_ < min_group_blocks * block_shape[1]
        raised = wants_less and counts[path] > densities[path] * spec.size / math.prod(block_shape) + 1
        note = f"raised from {distribution} for the sake of every row group" if raised else distribution
        planned.append(PlannedLayer(path, spec, spec.with_blocks(block_shape, counts[path]), note))
    return SparsityPlan(tuple(planned))
