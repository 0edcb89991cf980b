"""Flax Linen layers whose weights are shuffled blocks: drop-in for `nn.Dense` and `nn.Conv`."""

from dsb_jax.nn.sparse_layers import SparseConv as SparseConv
from dsb_jax.nn.sparse_layers import SparseDense as SparseDense
