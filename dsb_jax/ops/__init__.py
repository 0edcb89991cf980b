"""Sparse products: one primitive over array-level kernels, with a choice of implementation."""

from dsb_jax.ops.api import sparse_conv as sparse_conv
from dsb_jax.ops.api import sparse_matmul as sparse_matmul
from dsb_jax.ops.dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from dsb_jax.ops.dispatch import Choice as Choice
from dsb_jax.ops.dispatch import choose as choose
from dsb_jax.ops.dispatch import record_choices as record_choices
from dsb_jax.target import compiling_for as compiling_for
