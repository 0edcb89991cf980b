"""The sparsity plan: for every linear layer of a model, how many blocks it holds, or why it stays dense.

A plan is made from what is found in a model (`dsb_jax.linen.plan`), by a target sparsity, a distribution and rules. A
layer stays dense if a rule says so, if it has no sparse form, if it is smaller than one block, or if it can hold fewer
than `min_blocks` blocks. The others are *eligible*: `sparsity` counts over their weights, but for those that a rule
gives a sparsity of their own. An eligible layer that gets density 1 is computed and stored densely.

No name is dense by default: `rules=(Rule("stem", dense=True), Rule("head", dense=True))` keeps two layers of a model
that are called so.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dsb_jax.block_shapes import AUTO, BlockShape, shape_of, shape_text
from dsb_jax.distributions import at_density, check_sparsity, erk, to_blocks, uniform
from dsb_jax.layout import max_blocks
from dsb_jax.paths import Path, by_path, path_name
from dsb_jax.plan_table import plan_table
from dsb_jax.rules import Rule, check_block_shape, check_effects, check_rules, first_match
from dsb_jax.spec import LayerSpec
from dsb_jax.tables import AsTable, Table

DISTRIBUTIONS = {"uniform": uniform, "erk": erk}
MIN_BLOCKS = 8
MIN_GROUP_BLOCKS = 1

DENSITY_1 = "density 1"  # the reason of an eligible layer that stays dense


class FoundLayer(NamedTuple):
    """A kernel of a model, as it is dense.

    Attributes:
      spec: its sizes.
      reason: why it has no sparse form, or None.
      dtype: of its parameters.
    """

    spec: LayerSpec
    reason: str | None = None
    dtype: str = "float32"


class FoundModel(NamedTuple):
    """All parameters of a model.

    Attributes:
      layers: its kernels, by the paths of their layers.
      num_other: numbers in all other parameters: biases, scales, what belongs to no layer.
      other_nbytes: bytes of those.
    """

    layers: Mapping[Path, FoundLayer]
    num_other: int = 0
    other_nbytes: int = 0


class PlannedLayer(NamedTuple):
    """One layer of a plan.

    Attributes:
      path: of the layer, without the name of its parameter.
      dense: the sizes of the dense layer.
      planned: the layer in blocks, or the reason why it stays dense.
      note: where its density comes from, or again the reason.
      own: whether a rule gives it a sparsity of its own.
      dtype: of its parameters.
    """

    path: Path
    dense: LayerSpec
    planned: LayerSpec | str
    note: str
    own: bool = False
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class SparsityPlan(AsTable, Mapping[Path, LayerSpec | str]):
    """The plan of a whole model: path -> `LayerSpec` in blocks, or the reason (a text) why the layer stays dense.

    Hashable, so that it can be an attribute of Flax modules. `print(plan)` shows it as a table.

    Attributes:
      layers: every kernel, in the order of the model.
      num_other, other_nbytes: of all other parameters, see `FoundModel`.
    """

    layers: tuple[PlannedLayer, ...]
    num_other: int = 0
    other_nbytes: int = 0

    @functools.cached_property
    def _by_path(self) -> dict[Path, PlannedLayer]:
        return {layer.path: layer for layer in self.layers}

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.layers, self.num_other, self.other_nbytes))

    def __hash__(self) -> int:
        return self._hash

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
        """The layers that can be sparse, as they would be dense."""
        return {
            layer.path: layer.dense
            for layer in self.layers
            if isinstance(layer.planned, LayerSpec) or layer.planned == DENSITY_1
        }

    def sparsity(self, *, eligible_only: bool = True) -> float:
        """Fraction of zeros over the eligible layers, or over all kernels."""
        size = active = 0
        eligible = self.eligible
        for layer in self.layers:
            if layer.path in eligible or not eligible_only:
                size += layer.dense.num_layers * layer.dense.size
                active += layer.dense.num_layers * _as_planned(layer).num_active
        return 1 - active / size if size else 0.0

    @property
    def num_params(self) -> int:
        """Parameters of the sparse model, those that are computed with."""
        return self.num_other + sum(_as_planned(layer).num_active * layer.dense.num_layers for layer in self.layers)

    @property
    def num_dense_params(self) -> int:
        """Parameters of the dense model."""
        return self.num_other + sum(layer.dense.size * layer.dense.num_layers for layer in self.layers)

    def check(self, params: Any) -> None:
        """Compares the parameters of a model with the plan, by their arrays.

        Args:
          params: nested dictionaries of arrays or shapes, as the sparse model has them.

        Raises:
          ValueError: if a planned layer is not sparse or has another number of weights, or if another is not dense.
        """
        leaves = {path[:-1] if path[-2:-1] == ("blocks",) else path: leaf for path, leaf in by_path(params).items()}
        for layer in self.layers:
            planned, blocks = layer.planned, leaves.get((*layer.path, "blocks"))
            if isinstance(planned, str):
                wrong = None if blocks is None else f"has blocks, but the plan keeps it dense ({planned})"
            else:
                have = "none" if blocks is None else f"those of {list(blocks.shape)}"
                wrong = None if _holds(planned, blocks) else f"is planned with {planned.num_active} weights, not {have}"
            if wrong:
                raise ValueError(
                    f"{path_name(layer.path)} {wrong}; pass the parameters of the model that `sparsify` made with this "
                    "plan."
                )
        sparse = sum(path[-1:] == ("blocks",) and path not in self for path in leaves)  # in: sparse on its own account
        if sparse > len(self.sparse):
            raise ValueError(
                f"{sparse} layers have blocks and the plan has {len(self.sparse)}; the plan is of another model."
            )

    @property
    def table(self) -> Table:
        """What `print`, rich and a notebook show."""
        return plan_table(self)

    def __repr__(self) -> str:
        kept = len(self.layers) - len(self.sparse)
        return f"<SparsityPlan: {len(self.sparse)} layers sparse ({self.sparsity():.2%}), {kept} dense; print it>"


def _holds(spec: LayerSpec, blocks: Any) -> bool:
    """Whether an array is what a layer stores: its blocks, or at least as many single weights (Top-KAST has more)."""
    if blocks is None:
        return False
    own = tuple(size for axis, size in enumerate(blocks.shape) if axis not in spec.stack_axes)
    if own[1:] == (1, 1) != spec.block_shape:
        return own[0] >= spec.num_active
    return own == (spec.num_blocks, *spec.block_shape)


def _as_planned(layer: PlannedLayer) -> LayerSpec:
    return layer.planned if isinstance(layer.planned, LayerSpec) else layer.dense


def check_plan(plan: Any) -> SparsityPlan:
    """The plan itself; raises ValueError for what is none."""
    if not isinstance(plan, SparsityPlan):
        raise ValueError(f"plan={plan!r} is no SparsityPlan; make one with dsb_jax.linen.plan or dsb_jax.make_plan.")
    return plan


def make_plan(
    model: FoundModel | Mapping[Path, LayerSpec],
    *,
    sparsity: float,
    distribution: str = "uniform",
    block_shape: BlockShape = AUTO,
    rules: Sequence[Rule] = (),
    min_blocks: int = MIN_BLOCKS,
    min_group_blocks: int = MIN_GROUP_BLOCKS,
) -> SparsityPlan:
    """Spreads blocks over a model so that `sparsity` is met over its eligible layers within one block.

    A layer has `min_group_blocks` blocks for each of its row groups at the least, whatever the distribution says, and
    the others have as much less: narrow layers, above all the 1x1 convolutions of shortcuts, would else begin with
    outputs that have no weights. Only if `sparsity` leaves too few weights for that, some do.

    Args:
      model: what was found in it, or path -> sizes of its dense layers.
      sparsity: fraction of zeros, in [0, 1), over the eligible layers without a sparsity of their own.
      distribution: "uniform" or "erk".
      block_shape: `(R, C)`, or "auto" for one by the size and density of each layer (`dsb_jax.block_shapes`).
      rules: exceptions; of those that match a layer's path, the first.
      min_blocks: layers that can hold fewer blocks stay dense.
      min_group_blocks: blocks for each row group; 0 takes the densities as they are.

    Raises:
      TypeError: if `rules` is a text or holds what is no rule.
      ValueError: if the distribution is unknown, the sparsity impossible, a rule without effect, or no layer can be
        sparse.
    """
    rules = check_rules(rules)
    check_sparsity(sparsity)
    if block_shape != AUTO:
        check_block_shape(block_shape, f"{AUTO!r} or ")
    for name, count in (("min_blocks", min_blocks), ("min_group_blocks", min_group_blocks)):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name}={count!r} is no number of blocks; give 0 or more.")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is unknown; choose one of {', '.join(DISTRIBUTIONS)}.")
    layers, *other = _found(model)
    rule_of = {path: first_match(rules, path) for path in layers}
    shapes = {
        path: (rule.block_shape if rule else None) or shape_of(block_shape, layers[path].spec)
        for path, rule in rule_of.items()
    }
    reasons = {path: _dense_reason(found, rule_of[path], shapes[path], min_blocks) for path, found in layers.items()}
    check_effects(rules, rule_of, reasons)
    eligible = [path for path, reason in reasons.items() if reason is None]
    if not eligible:
        examples: dict[str | None, Path] = {}
        for path, reason in reasons.items():
            examples.setdefault(reason, path)
        raise ValueError(
            f"no layer can be sparse in {shape_text(block_shape)} blocks: "
            + "; ".join(f"{path_name(path)} {reason}" for reason, path in examples.items())
            + ". Use other rules, a smaller block_shape or a wider model, or train it dense."
        )
    own = {path: rule.sparsity for path, rule in rule_of.items() if rule is not None and rule.sparsity is not None}
    shared = [path for path in eligible if path not in own]
    densities = dict(
        zip(shared, DISTRIBUTIONS[distribution]([layers[path].spec for path in shared], sparsity), strict=True)
    )
    densities |= {path: 1 - value for path, value in own.items()}
    for path in eligible:
        if (rule := rule_of[path]) is None or rule.block_shape is None:
            shapes[path] = shape_of(block_shape, layers[path].spec, densities[path])
    sparse = [path for path in shared if densities[path] < 1]
    counts = to_blocks(
        [layers[path].spec for path in sparse],
        [densities[path] for path in sparse],
        [shapes[path] for path in sparse],
        min_group_blocks=min_group_blocks,
    )
    planned = {
        path: layers[path].spec.with_blocks(shapes[path], count) for path, count in zip(sparse, counts, strict=True)
    }
    planned |= {
        path: at_density(layers[path].spec, 1 - own[path], shapes[path], min_group_blocks)
        for path in eligible
        if own.get(path)
    }
    result = []
    for path, found in layers.items():
        if path not in planned:
            reason = reasons[path] or DENSITY_1
            result.append(PlannedLayer(path, found.spec, reason, reason, path in own, found.dtype))
            continue
        # Wanting less is the cause; more than a block above it tells the raise from rounding.
        spec, (rows, cols) = found.spec, shapes[path]
        wants_less = densities[path] * spec.in_ < min_group_blocks * cols
        raised = wants_less and planned[path].num_blocks > densities[path] * spec.size / (rows * cols) + 1
        source = f"by the rule {rule_of[path].pattern!r}" if path in own else distribution  # type: ignore[union-attr]
        note = f"{source}, raised for the sake of every row group" if raised else source
        result.append(PlannedLayer(path, spec, planned[path], note, path in own, found.dtype))
    return SparsityPlan(tuple(result), *other)


def _found(model: Any) -> FoundModel:
    if not isinstance(model, FoundModel):
        model = FoundModel({path: FoundLayer(spec) for path, spec in dict(model).items()})
    if not model.layers or not all(isinstance(found.spec, LayerSpec) for found in model.layers.values()):
        raise ValueError(
            "there are no layers to plan; give dsb_jax.linen.find_layers(model, x), of a model that has some."
        )
    return model


def _dense_reason(found: FoundLayer, rule: Rule | None, block_shape: tuple[int, int], min_blocks: int) -> str | None:
    if rule is not None and rule.dense:
        return f"kept dense by {rule.pattern!r}"
    if found.reason is not None:
        return found.reason
    rows, cols = block_shape
    if rows > found.spec.out or cols > found.spec.in_:
        return f"smaller than a {rows}x{cols} block"
    if (most := max_blocks(found.spec.shape, block_shape)) < min_blocks:
        return f"holds {most} blocks at the most"
    return None
