"""What an NNX model holds for its sparse layers, and the trees that the core knows: parameters and topology by path.

    module.blocks      nnx.Param                float[num_blocks, R, C], in the place of `kernel`
    module.topology    Topology(nnx.Variable)   a `LayerTopology`: where they lie, all integers

As `Topology` is no `nnx.Param`, gradients and optimizers that look for `nnx.Param` never meet it; as it is a Variable
of the layer, whatever lifts the layer (`nnx.scan`, `nnx.vmap`, `nnx.remat`, `nnx.jit`) lifts it, too.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from dsb_jax.ops.statistics import Zero
from dsb_jax.paths import WEIGHTS, Path, nested
from dsb_jax.topology import LayerTopology

TOPOLOGY = "topology"

Keys = tuple[Any, ...]  # of a Variable in a model: names of attributes, numbers in lists


class Topology(nnx.Variable[LayerTopology]):
    """The `LayerTopology` of one sparse layer; while a statistic is measured, `Observed`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """A node, and the zero whose cotangent is the statistic of its layer; in a copy of the model only."""

    node: LayerTopology
    zero: Zero


def names(keys: Keys) -> Path:
    """The path of the core, which is of texts."""
    return tuple(map(str, keys))


def modules_of(model: Any) -> Iterator[tuple[Keys, nnx.Module]]:
    """Every module, shared ones once, with the keys under which `nnx.split` has its Variables."""
    for keys, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield keys, node


def sparse_modules(model: Any) -> dict[Keys, Any]:
    """The layers that have blocks."""
    return {keys: module for keys, module in modules_of(model) if isinstance(vars(module).get(TOPOLOGY), Topology)}


def topology(model: Any) -> dict[str, Any]:
    """Where the weights of each sparse layer lie: nested dictionaries with a `LayerTopology` at each layer's `blocks`.

    With `params(model)` it is what `dsb_jax.report`, `masks`, `permutations`, `to_bsr` and other functions of the core
    take.
    """
    return nested({(*keys, WEIGHTS): module.topology.get_value() for keys, module in sparse_modules(model).items()})


def params(model: Any) -> dict[str, Any]:
    """The parameters of a model as nested dictionaries of arrays; those in a list by their numbers."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nested({keys: variable.get_value() for keys, variable in flat})


def check_model(model: Any) -> None:
    """Raises ValueError for what is no model of NNX."""
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model={model!r} is no nnx.Module; give a model of flax.nnx, built.")
