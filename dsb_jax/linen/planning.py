"""`plan`: how sparse each layer of anyone's Linen model is to be."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from dsb_jax.block_shapes import AUTO, BlockShape
from dsb_jax.linen.finding import find_layers
from dsb_jax.paths import Path
from dsb_jax.plan import MIN_BLOCKS, MIN_GROUP_BLOCKS, SparsityPlan, make_plan
from dsb_jax.rules import Rule, check_rules, first_match


def plan(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    rngs: Any = None,
    call_method: str | Callable[..., Any] | None = None,
    sparsity: float = 0.9,
    distribution: str = "uniform",
    block_shape: BlockShape = AUTO,
    rules: Sequence[Rule] = (),
    min_group_blocks: int = MIN_GROUP_BLOCKS,
    min_blocks: int = MIN_BLOCKS,
) -> SparsityPlan:
    """A plan of a dense model, which is traced abstractly: nothing of it is computed.

    Sparse can be `nn.Dense`, `nn.Conv` (2-D, one feature group, dilation 1), `nn.DenseGeneral`, and with it
    `nn.MultiHeadDotProductAttention` and `nn.SelfAttention`, and `nn.Einsum` where it is a matrix product; lifted along
    axis 0 or 1 or not at all. Everything else stays dense, and `print(plan)` says why. A kernel that the model's
    own code reads (`self.dense.variables`) must be kept dense by a rule.

    Args:
      model: any Linen module, not bound.
      *args: what it is initialized with; arrays may be `jax.ShapeDtypeStruct`. What is no array is passed on as it is.
      kwargs: likewise, by name.
      rngs: a PRNG key or a dictionary of them, for a model that insists on streams of its own.
      call_method: another method to initialize with than `__call__`.
      sparsity: fraction of zeros over all layers that can be sparse and have none of their own by a rule.
      distribution: "uniform" or "erk".
      block_shape: `(R, C)`, or "auto" for one by the size and density of each layer (`dsb_jax.block_shapes`).
      rules: exceptions by path; of those that match, the first.
      min_group_blocks: blocks that each row group has at the least.
      min_blocks: layers that can hold fewer blocks stay dense.

    Raises:
      TypeError, ValueError: as `find_layers` and `dsb_jax.make_plan`.
    """
    rules = check_rules(rules)

    def keep_dense(path: Path) -> bool:
        rule = first_match(rules, path)
        return rule is not None and rule.dense

    found = find_layers(model, *args, kwargs=kwargs, rngs=rngs, call_method=call_method, keep_dense=keep_dense)
    return make_plan(
        found, sparsity=sparsity, distribution=distribution, block_shape=block_shape, rules=rules,
        min_blocks=min_blocks, min_group_blocks=min_group_blocks,
    )  # fmt: skip
