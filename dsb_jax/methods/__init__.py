"""Sparse-training methods, one paper a file, each an `init`/`update` pair (`dsb_jax.methods.base.Method`)."""

from dsb_jax.methods.base import LayerReport as LayerReport
from dsb_jax.methods.base import Method as Method
from dsb_jax.methods.dense import dense as dense
from dsb_jax.methods.dsb import GRANULARITIES as GRANULARITIES
from dsb_jax.methods.dsb import GROW as GROW
from dsb_jax.methods.dsb import dsb as dsb
from dsb_jax.methods.rigl import rigl as rigl
from dsb_jax.methods.set import set_ as set_
from dsb_jax.methods.small_dense import small_dense as small_dense
from dsb_jax.methods.ssb import ssb as ssb
from dsb_jax.methods.topkast import topkast as topkast

METHODS = ("dsb", "ssb", "rigl", "set", "topkast", "dense", "small_dense")
