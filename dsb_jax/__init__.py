"""Dynamic shuffled-block sparse training in JAX: truly sparse from the first step to the last.

    layer        SparseDense, SparseConv                 drop-in for nn.Dense and nn.Conv
    model        find_layers, make_plan                  how many blocks each layer of a model holds
    training     create_train_state, train_step, eval_step, adapt_step, methods.dsb(...)
    structure    BlockLayout, pack, unpack, to_mask, validate, random_layout, reblock, block_aware_drop
    products     sparse_matmul, sparse_conv

Checkpoints are in `dsb_jax.checkpoint`, data sets, models and whole runs in `dsb_jax.training`.
"""

from dsb_jax import methods as methods
from dsb_jax.adapt import adapt_step as adapt_step
from dsb_jax.drop import block_aware_drop as block_aware_drop
from dsb_jax.layout import BlockLayout as BlockLayout
from dsb_jax.layout import pack as pack
from dsb_jax.layout import random_layout as random_layout
from dsb_jax.layout import to_mask as to_mask
from dsb_jax.layout import unpack as unpack
from dsb_jax.layout import validate as validate
from dsb_jax.linen import SparseConv as SparseConv
from dsb_jax.linen import SparseDense as SparseDense
from dsb_jax.ops import sparse_conv as sparse_conv
from dsb_jax.ops import sparse_matmul as sparse_matmul
from dsb_jax.plan import SparsityPlan as SparsityPlan
from dsb_jax.plan import find_layers as find_layers
from dsb_jax.plan import make_plan as make_plan
from dsb_jax.reblocking import reblock as reblock
from dsb_jax.train import eval_step as eval_step
from dsb_jax.train import train_step as train_step
from dsb_jax.train_state import TrainState as TrainState
from dsb_jax.train_state import create_train_state as create_train_state
from dsb_jax.train_state import dense_params as dense_params
