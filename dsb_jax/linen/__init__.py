"""Flax Linen layers whose weights are shuffled blocks: drop-in for `nn.Dense` and `nn.Conv`."""

from dsb_jax.linen.layers import SparseConv as SparseConv
from dsb_jax.linen.layers import SparseDense as SparseDense
