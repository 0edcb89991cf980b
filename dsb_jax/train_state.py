"""The train state of a classifier: everything that a training is, as one pytree of arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsb_jax.calling import call_model
from dsb_jax.step_and_key import check_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Donated to every step and returned by it.

    Attributes:
      params: floats. A sparse layer holds `blocks[num_blocks, R, C]` where a dense one holds `kernel`.
      collections: every other collection of the model by its name, such as `batch_stats`.
      opt_state: of any optax optimizer; moments of blocks have the shape of blocks.
      topology: a `LayerTopology` for each sparse layer, at the path of its blocks.
      step: int32[], training steps done.
      key: uint32, the data of the training's PRNG key; steps derive theirs by folding in `step`.
      key_impl: static, the name of the generator that the key belongs to.
    """

    params: Any
    collections: dict[str, Any]
    opt_state: Any
    topology: Any
    step: jax.Array
    key: jax.Array
    key_impl: str = dataclasses.field(default="threefry2x32", metadata={"static": True})

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {**self.collections, "params": self.params, "topology": self.topology}


def create_train_state(model: Any, optimizer: optax.GradientTransformation, key: jax.Array, inputs: Any) -> TrainState:
    """Initializes parameters, topology and optimizer. Jit-able.

    Args:
      model: with `init` and `apply` as a Linen module has them; its argument for training mode, if any, is False here.
      optimizer: any optax transformation.
      key: a PRNG key of any generator.
      inputs: shapes and dtypes of what the model takes, as in `train_step`; values do not matter.
    """
    init_key, run_key = jax.random.split(check_key(key))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
    variables = dict(call_model(model, init_key, zeros, train=False, method="init"))
    params, topology = variables.pop("params", {}), variables.pop("topology", {})
    return TrainState(
        params=params,
        collections=variables,
        opt_state=optimizer.init(params),
        topology=topology,
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(run_key),
        key_impl=str(jax.random.key_impl(key)),
    )


def step_key(state: TrainState) -> jax.Array:
    """The PRNG key of the current step."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=state.key_impl), state.step)
