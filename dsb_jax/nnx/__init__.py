"""Sparse models of Flax's NNX: anyone's model by `plan` and `sparsify`, or layers to write models with.

    plan = dsb.nnx.plan(model, x, sparsity=0.9)
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1))                 in place
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)             after it
    report = dsb.nnx.adapt(model, optimizer, loss_fn, method, x, y, step=step, key=key)

(`import dsb_jax as dsb`: `from dsb_jax import nnx` would hide Flax's.)
"""

from dsb_jax.nnx.adapting import adapt as adapt
from dsb_jax.nnx.adapting import check_optimizer as check_optimizer
from dsb_jax.nnx.adapting import measure as measure
from dsb_jax.nnx.adapting import restage as restage
from dsb_jax.nnx.adapting import update as update
from dsb_jax.nnx.finding import find_layers as find_layers
from dsb_jax.nnx.layers import SparseConv as SparseConv
from dsb_jax.nnx.layers import SparseEinsum as SparseEinsum
from dsb_jax.nnx.layers import SparseLinear as SparseLinear
from dsb_jax.nnx.layers import SparseLinearGeneral as SparseLinearGeneral
from dsb_jax.nnx.planning import plan as plan
from dsb_jax.nnx.sparsifying import from_dense as from_dense
from dsb_jax.nnx.sparsifying import load_params as load_params
from dsb_jax.nnx.sparsifying import sparsify as sparsify
from dsb_jax.nnx.sparsifying import to_dense as to_dense
from dsb_jax.nnx.variables import Topology as Topology
from dsb_jax.nnx.variables import params as params
from dsb_jax.nnx.variables import topology as topology

__all__ = [
    "SparseConv",
    "SparseEinsum",
    "SparseLinear",
    "SparseLinearGeneral",
    "Topology",
    "adapt",
    "check_optimizer",
    "find_layers",
    "from_dense",
    "load_params",
    "measure",
    "params",
    "plan",
    "restage",
    "sparsify",
    "to_dense",
    "topology",
    "update",
]
