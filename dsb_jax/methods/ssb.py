"""Static shuffled blocks: a random layout that never changes. The companion that tells what adapting brings."""

from dsb_jax.layout import random_layout
from dsb_jax.methods.base import Method


def ssb() -> Method:
    """Nd weights, gradients and moments; no adaptation."""
    return Method(name="ssb", sparse=True, init=random_layout, update=None, statistic=None)
