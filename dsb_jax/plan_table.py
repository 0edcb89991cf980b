"""A sparsity plan as a table: layers, densities, blocks, what stays dense and why, totals, bytes."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dsb_jax.layout import column_dtype
from dsb_jax.paths import path_name
from dsb_jax.spec import LayerSpec
from dsb_jax.tables import Table


def plan_table(plan: Any) -> Table:
    """The table of a `SparsityPlan`; its rows are all kernels, sparse or dense."""
    rows, weights, positions, dense = [], 0, 0, 0
    for layer in plan.layers:
        name, sizes = path_name(layer.path) or "(the model)", "x".join(map(str, layer.dense.kernel_shape))
        item = jnp.dtype(layer.dtype).itemsize
        size = layer.dense.size * layer.dense.num_layers
        dense += size * item
        if isinstance(layer.planned, str):
            weights += size * item
            rows.append((name, sizes, "1", f"{size:,}", "dense: " + layer.note, f"{size * item:,}"))
            continue
        spec, count = layer.planned, layer.dense.num_layers
        active, stored = spec.num_active * count, spec.num_blocks * spec.block_shape[0] * spec.block_shape[1] * count
        where = _layout_nbytes(spec) * count
        weights, positions = weights + stored * item, positions + where
        blocks = f"{count} x " * (count > 1) + f"{spec.num_blocks} of {spec.block_shape[0]}x{spec.block_shape[1]}"
        note = "" if layer.note in ("uniform", "erk") else f" ({layer.note})"
        rows.append((name, sizes, f"{spec.density:.4f}", f"{active:,}", blocks + note, f"{stored * item + where:,}"))
    kernels = plan.sparsity(eligible_only=False)
    notes = (
        f"sparse layers: {len(plan.sparse)} of {len(plan.layers)}, {plan.sparsity():.2%} of the weights that can be "
        f"sparse are zero, {kernels:.2%} of all kernels",
        f"parameters: {plan.num_params:,} of {plan.num_dense_params:,} in the dense model, {plan.num_other:,} of them "
        "biases, scales and the like",
        f"bytes: {weights + plan.other_nbytes:,} and {positions:,} for their positions; dense "
        f"{dense + plan.other_nbytes:,}",
    )
    return Table(("layer", "kernel", "density", "weights", "blocks", "bytes"), rows, notes)


def _layout_nbytes(spec: LayerSpec) -> int:
    """Bytes of one layer's layout (`BlockLayout`)."""
    columns = spec.num_blocks * spec.block_shape[1] * np.dtype(column_dtype(spec.in_)).itemsize
    return columns + 4 * (spec.num_groups * spec.block_shape[0] + spec.num_groups + 1)
