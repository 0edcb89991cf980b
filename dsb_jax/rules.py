"""Rules: what is to hold for some layers of a model, by their paths."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsb_jax.distributions import check_sparsity
from dsb_jax.paths import Path, path_name


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for the layers whose path matches; of several rules, the first that matches.

    Attributes:
      pattern: a regular expression that the whole path `a/b/c` of a layer must match, as in qwix.
      sparsity: of each of these layers, in [0, 1); the plan's target then holds over the others.
      block_shape: `(R, C)` of these layers.
      dense: they stay dense.

    Raises:
      ValueError: for a pattern that is none, a value out of range, or a rule that says nothing or contradicts itself.
    """

    pattern: str
    sparsity: float | None = None
    block_shape: tuple[int, int] | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression ({error}).") from None
        has_sizes = self.sparsity is not None or self.block_shape is not None
        if self.dense == has_sizes:
            raise ValueError(f"{self} says nothing, or both; give dense=True, or sparsity=, block_shape= or both.")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
            if self.sparsity == 1:
                raise ValueError("sparsity=1 leaves no weights; give less, such as 0.9.")
        if self.block_shape is not None:
            check_block_shape(self.block_shape)

    def matches(self, path: Path) -> bool:
        return re.fullmatch(self.pattern, path_name(path)) is not None


def check_rules(rules: Any) -> tuple[Rule, ...]:
    """The rules as a tuple; raises TypeError for what is no sequence of rules."""
    if isinstance(rules, str | Rule) or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(f"rules={rules!r} is no sequence of rules; give rules=(Rule('head', dense=True), ...).")
    return tuple(rules)


def first_match(rules: tuple[Rule, ...], path: Path) -> Rule | None:
    """The rule that holds for a layer."""
    return next((rule for rule in rules if rule.matches(path)), None)


def check_block_shape(block_shape: Any, or_word: str = "") -> None:
    """Raises ValueError unless it is two whole numbers above 0; `or_word` is what else could be given."""
    is_pair = isinstance(block_shape, tuple | list) and len(block_shape) == 2
    if not is_pair or not all(isinstance(size, int | np.integer) and size > 0 for size in block_shape):
        raise ValueError(
            f"block_shape={block_shape!r} is no pair of sizes above 0; give {or_word}(R, C), such as (16, 16)."
        )


def check_effects(
    rules: tuple[Rule, ...], rule_of: Mapping[Path, Rule | None], reasons: Mapping[Path, str | None]
) -> None:
    """Raises ValueError for a rule that changes nothing: a typing error, nearly always."""
    for rule in rules:
        matched = [path for path, first in rule_of.items() if first is rule]
        if not matched:
            taken = any(rule.matches(path) for path in rule_of)
            some = ", ".join(path_name(path) for path in list(rule_of)[:4])
            raise ValueError(
                f"the rule {rule.pattern!r} matches no layer{' that an earlier rule leaves' if taken else ''}; it must "
                f"match the whole path of one: {some}, ..."
            )
        if not rule.dense and all(reasons[path] is not None for path in matched):
            raise ValueError(
                f"the rule {rule.pattern!r} has no effect: {path_name(matched[0])} stays dense "
                f"({reasons[matched[0]]}); leave it away."
            )
