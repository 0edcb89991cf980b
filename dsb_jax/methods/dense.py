"""The dense model, trained in the same loop."""

from dsb_jax.methods.base import Method


def dense() -> Method:
    """N weights, gradients and moments; no topology."""
    return Method(name="dense", sparse=False, init=None, update=None, statistic=None)
