"""Sparse layers for Flax's Linen."""

from dsb_jax.linen.layers import SparseConv as SparseConv
from dsb_jax.linen.layers import SparseDense as SparseDense

__all__ = ["SparseConv", "SparseDense"]
