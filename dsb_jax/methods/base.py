"""What a method is: how the topology of a layer begins, and how it changes.

A method is a value: a frozen dataclass, one paper a file. It compares, hashes and prints, goes to JSON and back
(`dsb_jax.methods.to_json`), and refuses invalid settings when it is made. It knows the arrays of one layer, never a
model, an optimizer or a step loop; layers, adaptation, telemetry and checkpoints know no method by its name.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout
from dsb_jax.ops.statistics import Statistic
from dsb_jax.spec import LayerSpec


class LayerState(NamedTuple):
    """One sparse layer, as a method sees it; a pytree.

    Attributes:
      blocks: float[num_blocks, R, C], the weights that exist.
      layout: where they lie.
      aux: what only the method knows (`dsb_jax.topology.Aux`), or None.
    """

    blocks: jax.Array
    layout: BlockLayout
    aux: Any = None


class LayerReport(NamedTuple):
    """What one update did to one layer; scalars, or one number for each layer of a stack.

    Attributes:
      requested: positions that were to be grown.
      accepted: of these, how many are active afterwards.
      turnover: newly active positions over all active ones.
      collateral: share of the weights that were to be kept but are no longer active.
      empty_groups: row groups without any block, that is dead outputs in units of R.
      calls: how often the layer was observed while its statistic was measured; 0 for methods that measure nothing.
      status: 0 if the layer was updated, else the number of the reason in `STATUS`.
    """

    requested: jax.Array
    accepted: jax.Array
    turnover: jax.Array
    collateral: jax.Array
    empty_groups: jax.Array
    calls: jax.Array | np.int32 = np.int32(0)
    status: jax.Array | np.int32 = np.int32(0)


STATUS = (
    "updated",
    "excluded by where=",
    "frozen: the optimizer does not use its gradient",
    "not observed: the loss does not call it, or dropped the collection `statistics`",
    "observed more often than the loss names it: called in a loop, where norms do not add up",
    "its statistic is not finite",
)


def check_method(method: Any) -> None:
    """Raises ValueError for what is no method: its name, the class instead of a value."""
    if isinstance(method, type) or not hasattr(method, "statistic"):
        raise ValueError(f"method={method!r} is no method; give a value, such as dsb_jax.methods.DSB().")


class Method(Protocol):
    """A sparse-training method.

    Attributes:
      name: in the registry `dsb_jax.methods.METHODS`, in flags and in JSON.
      storage: what its layers hold, see `LayerSpec.storage`; an adaptation refuses a layer of another one.
      statistic: what an update must know of the backward pass, or None for nothing.
    """

    name: ClassVar[str]
    storage: ClassVar[str]

    @property
    def statistic(self) -> Statistic | None: ...

    def stored(self, spec: LayerSpec) -> LayerSpec:
        """What a layer holds that is planned as `spec`, in blocks: as many active weights, in this method's storage."""
        ...

    def due(self, step: int) -> bool:
        """Whether a loop on the host adapts before the training step `step`."""
        ...

    def init(
        self,
        key: jax.Array,
        weights: Float[Array, "out in"],
        spec: LayerSpec,
        *,
        score: Float[Array, "out in"] | None = None,
    ) -> LayerState:
        """The first state of a layer.

        Args:
          key: a PRNG key.
          weights: of the dense layer.
          spec: what the layer holds, as `stored` gives it.
          score: None draws the method's own first pattern and scales the values to the fan-in that each output has
            left. With a score, >= 0, it is the best pattern by that, and the values are those of `weights`, bit by bit.
        """
        ...

    def update(
        self, key: jax.Array, step: jax.Array | int, state: LayerState, statistic: Any
    ) -> tuple[LayerState, LayerReport]:
        """The state after one adaptation, all sizes the same; the identity before the start and from the end on.

        It must be jit-able, hold no more than one layer in dense form, and keep each weight that stays active bit by
        bit. `statistic` is what `self.statistic` measured, or None.
        """
        ...

    def resize(self, key: jax.Array, state: LayerState, spec: LayerSpec) -> LayerState:
        """The state in another number of blocks, that of `spec`: the strongest weights stay, all if it grows."""
        ...
