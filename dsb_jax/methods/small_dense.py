"""The small dense model: all widths scaled down until it has as many weights as the sparse model stores.

The baseline that sparse training has to beat (Evci et al. 2020, section 4, "Small-Dense"): the same memory and the same
storage of activations by the layer, but no topology.
"""

from dsb_jax.methods.base import Method


def small_dense() -> Method:
    """Nd weights, gradients and moments of a narrower dense net; no topology."""
    return Method(name="small_dense", sparse=False, init=None, update=None, statistic=None, equal_width=True)
