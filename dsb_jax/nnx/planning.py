"""`plan`: how sparse each layer of anyone's NNX model is to be."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from dsb_jax.block_shapes import AUTO, BlockShape
from dsb_jax.nnx.finding import find_layers
from dsb_jax.plan import MIN_BLOCKS, MIN_GROUP_BLOCKS, SparsityPlan, make_plan
from dsb_jax.rules import Rule


def plan(
    model: nnx.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    call_method: str | Callable[..., Any] | None = None,
    sparsity: float = 0.9,
    distribution: str = "uniform",
    block_shape: BlockShape = AUTO,
    rules: Sequence[Rule] = (),
    min_group_blocks: int = MIN_GROUP_BLOCKS,
    min_blocks: int = MIN_BLOCKS,
) -> SparsityPlan:
    """A plan of a dense model, which is called once, abstractly and as a copy: nothing of it is computed or changed.

    Sparse can be `nnx.Linear`, `nnx.Conv` (2-D, one feature group, dilation 1), `nnx.LinearGeneral`, and with it
    `nnx.MultiHeadAttention`, and `nnx.Einsum` where it is a matrix product; stacked along axis 0 or 1 or not at all.
    Everything else stays dense, and `print(plan)` says why: recurrent cells, layers that the call does not reach,
    kernels that the model's own code reads or shares.

    Args:
      model: built; abstract (`nnx.eval_shape(lambda: Model(nnx.Rngs(0)))`) will do.
      *args: what it is called with; arrays may be `jax.ShapeDtypeStruct`. What is no array is passed on as it is.
        Without any, it is not called, and every layer is taken to be.
      kwargs: likewise, by name.
      call_method: another method to call than `__call__`.
      sparsity, distribution, block_shape, rules, min_group_blocks, min_blocks: as in `dsb_jax.make_plan`.

    Raises:
      TypeError, ValueError: as `find_layers` and `dsb_jax.make_plan`.
    """
    return make_plan(
        find_layers(model, *args, kwargs=kwargs, call_method=call_method), sparsity=sparsity,
        distribution=distribution, block_shape=block_shape, rules=rules, min_blocks=min_blocks,
        min_group_blocks=min_group_blocks,
    )  # fmt: skip
