"""Sparse models of Flax's Linen: anyone's model by `plan` and `sparsify`, or layers to write models with."""

from dsb_jax.linen.finding import find_layers as find_layers
from dsb_jax.linen.layers import SparseConv as SparseConv
from dsb_jax.linen.layers import SparseDense as SparseDense
from dsb_jax.linen.planning import plan as plan
from dsb_jax.linen.sparsifying import sparsify as sparsify

__all__ = ["SparseConv", "SparseDense", "find_layers", "plan", "sparsify"]
