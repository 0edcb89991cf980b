"""The train state: everything that a run is, as one pytree of arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dsb_jax.layout import BlockLayout, unpack

Path = tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Donated to every step and returned by it.

    Attributes:
      params: floats. A sparse layer holds `blocks[num_blocks, R, C]` where a dense one holds `kernel`.
      batch_stats: running statistics of batch norm.
      opt_state: of any optax optimizer; moments of blocks have the shape of blocks.
      topology: {..., layer: {"layout": BlockLayout}}, integers; with Top-KAST also what a layer keeps beside it.
      step: int32[], training steps done.
      key: uint32[2], the data of the run's PRNG key; steps derive theirs by folding in `step`.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    topology: Any
    step: jax.Array
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats, "topology": self.topology}


def create_train_state(
    model: nn.Module, optimizer: optax.GradientTransformation, key: jax.Array, images: Any
) -> TrainState:
    """Initializes parameters, topology and optimizer; `images` only gives shape and dtype. Jit-able."""
    init_key, run_key = jax.random.split(key)
    variables = model.init(init_key, jnp.zeros(images.shape, images.dtype))
    params = variables["params"]
    return TrainState(
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        topology=variables.get("topology", {}),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(run_key),
    )


def layouts(topology: Mapping[str, Any]) -> dict[Path, BlockLayout]:
    """Path of each sparse layer -> its layout."""
    leaves = jax.tree_util.tree_leaves_with_path(topology, is_leaf=lambda leaf: isinstance(leaf, BlockLayout))
    return {tuple(key.key for key in path[:-1]): leaf for path, leaf in leaves if isinstance(leaf, BlockLayout)}


def kept_beside(topology: Mapping[str, Any], path: Path) -> dict[str, jax.Array]:
    """What a sparse layer keeps beside its layout: nothing, or by name what its method needs."""
    return {name: value for name, value in leaf_at(topology, path).items() if not isinstance(value, BlockLayout)}


def with_layouts(
    topology: Mapping[str, Any],
    new: Mapping[Path, BlockLayout],
    beside: Mapping[Path, Mapping[str, jax.Array]] | None = None,
) -> Any:
    """The topology with some layouts replaced, and what is kept beside them."""

    def replaced(path: tuple[Any, ...], leaf: Any) -> Any:
        *layer, name = (key.key for key in path)
        if isinstance(leaf, BlockLayout):
            return new.get(tuple(layer), leaf)
        return (beside or {}).get(tuple(layer), {}).get(name, leaf)

    return jax.tree_util.tree_map_with_path(replaced, topology, is_leaf=lambda leaf: isinstance(leaf, BlockLayout))


def leaf_at(tree: Any, path: Path) -> Any:
    """The subtree or leaf at a path of keys."""
    for part in path:
        tree = tree[part]
    return tree


def dense_params(state: TrainState) -> Any:
    """The params of the equal dense model: every `blocks` unpacked to a `kernel` with zeros, [in, out].

    For looking at a trained model or handing it to code that knows nothing of blocks. A convolution's kernel comes
    flattened, [kernel_height * kernel_width * channels, out]; reshaped to HWIO it is that of `nn.Conv`.
    """

    def convert(tree: Any, path: Path) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        converted = {name: convert(value, (*path, name)) for name, value in tree.items()}
        if "blocks" in converted:
            blocks = jnp.where(kept_beside(state.topology, path).get("forward_mask", True), converted.pop("blocks"), 0)
            converted["kernel"] = unpack(blocks, found[path]).T
        return converted

    found = layouts(state.topology)
    return convert(state.params, ())
