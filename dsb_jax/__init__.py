"""Dynamic shuffled-block sparse training in JAX: truly sparse from the first step to the last.

    your model   linen.plan, linen.sparsify, Rule        any Linen model made sparse, its code unchanged
                 nnx.plan, nnx.sparsify, nnx.adapt       any NNX model, in place
    layers       linen.SparseDense, nnx.SparseLinear     and others: layers of Flax with a density, to write models with
    plans        make_plan, SparsityPlan                 how many blocks each layer of a model holds
    methods      methods.DSB() and others, methods.METHODS
    any model    adaptation, measure, update, restage, GradualDensity, repack, check_optimizer
                 report, masks, permutations, to_dense, from_dense, validate_topology, with_index, without_index
    files        export, save_safetensors, load_safetensors, to_bsr
    classifiers  TrainState, create_train_state, train_step, eval_step, adapt_step
    structure    LayerSpec, LayerTopology, KernelIndex, BlockLayout, pack, unpack, to_mask, validate, random_layout,
                 reblock, block_aware_drop
    products     sparse_matmul, sparse_conv

`linen` and `nnx` are loaded when they are touched (`from dsb_jax import SparseDense` touches the first). Say `dsb.nnx`:
`from dsb_jax import nnx` would hide Flax's. Checkpoints are in `dsb_jax.checkpoint`; data sets, models and whole
trainings in `dsb_jax.training`.
"""

import importlib
from typing import Any

from dsb_jax import methods as methods
from dsb_jax.adapt import Adaptation as Adaptation
from dsb_jax.adapt import adaptation as adaptation
from dsb_jax.adapt import repack as repack
from dsb_jax.adapt import update as update
from dsb_jax.bsr import to_bsr as to_bsr
from dsb_jax.convert import from_dense as from_dense
from dsb_jax.convert import masks as masks
from dsb_jax.convert import permutations as permutations
from dsb_jax.convert import to_dense as to_dense
from dsb_jax.drop import block_aware_drop as block_aware_drop
from dsb_jax.exporting import ExportReport as ExportReport
from dsb_jax.exporting import export as export
from dsb_jax.gradual import GradualDensity as GradualDensity
from dsb_jax.layout import BlockLayout as BlockLayout
from dsb_jax.layout import pack as pack
from dsb_jax.layout import random_layout as random_layout
from dsb_jax.layout import to_mask as to_mask
from dsb_jax.layout import unpack as unpack
from dsb_jax.layout import validate as validate
from dsb_jax.measuring import measure as measure
from dsb_jax.model_report import ModelReport as ModelReport
from dsb_jax.model_report import report as report
from dsb_jax.ops import sparse_conv as sparse_conv
from dsb_jax.ops import sparse_matmul as sparse_matmul
from dsb_jax.optimizer_states import check_optimizer as check_optimizer
from dsb_jax.paths import validate_topology as validate_topology
from dsb_jax.plan import SparsityPlan as SparsityPlan
from dsb_jax.plan import make_plan as make_plan
from dsb_jax.reblocking import reblock as reblock
from dsb_jax.rules import Rule as Rule
from dsb_jax.safetensors_files import load_safetensors as load_safetensors
from dsb_jax.safetensors_files import save_safetensors as save_safetensors
from dsb_jax.spec import LayerSpec as LayerSpec
from dsb_jax.stages import restage as restage
from dsb_jax.topology import KernelIndex as KernelIndex
from dsb_jax.topology import LayerTopology as LayerTopology
from dsb_jax.topology import with_index as with_index
from dsb_jax.topology import without_index as without_index
from dsb_jax.train import adapt_step as adapt_step
from dsb_jax.train import eval_step as eval_step
from dsb_jax.train import train_step as train_step
from dsb_jax.train_state import TrainState as TrainState
from dsb_jax.train_state import create_train_state as create_train_state

# Without modules: `from dsb_jax import *` must not hide flax's `linen` or anybody's `methods`.
__all__ = [
    "Adaptation",
    "BlockLayout",
    "ExportReport",
    "GradualDensity",
    "KernelIndex",
    "LayerSpec",
    "LayerTopology",
    "ModelReport",
    "Rule",
    "SparsityPlan",
    "TrainState",
    "adapt_step",
    "adaptation",
    "block_aware_drop",
    "check_optimizer",
    "create_train_state",
    "eval_step",
    "export",
    "from_dense",
    "load_safetensors",
    "make_plan",
    "masks",
    "measure",
    "pack",
    "permutations",
    "random_layout",
    "reblock",
    "repack",
    "report",
    "restage",
    "save_safetensors",
    "sparse_conv",
    "sparse_matmul",
    "to_bsr",
    "to_dense",
    "to_mask",
    "train_step",
    "unpack",
    "update",
    "validate",
    "validate_topology",
    "with_index",
    "without_index",
]


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f"dsb_jax.{name}")
    if name in ("SparseConv", "SparseDense"):
        return getattr(importlib.import_module("dsb_jax.linen"), name)
    raise AttributeError(f"module 'dsb_jax' has no attribute {name!r}")
