"""What is sparse in a model and what is not, counted from its arrays; `print(report(params, topology))`."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from dsb_jax.convert import to_dense
from dsb_jax.optimizer_states import undecayed_layers
from dsb_jax.paths import Path, by_path, layer_path, nodes, path_name, weights_at
from dsb_jax.plan import SparsityPlan, check_plan
from dsb_jax.tables import AsTable, Table
from dsb_jax.telemetry import active_positions, layers_of
from dsb_jax.topology import LayerTopology, without_index


@dataclasses.dataclass(frozen=True)
class SparseLayer:
    """One sparse layer, or a stack of equal ones: numbers are sums over the stack.

    Attributes:
      path: of the layer.
      kernel_shape: of the dense kernel, lifted axes included.
      block_shape, num_blocks, storage: of one layer, see `LayerSpec`.
      num_active: weights that are computed with.
      size: weights of the dense kernel.
      dead_outputs: outputs without any weight.
      unread_inputs: input channels that no weight reads.
      nbytes: of its weights, with what its topology and its kernel index take.
    """

    path: Path
    kernel_shape: tuple[int, ...]
    block_shape: tuple[int, int]
    num_blocks: int
    storage: str
    num_active: int
    size: int
    dead_outputs: int
    unread_inputs: int
    nbytes: int

    @property
    def density(self) -> float:
        return self.num_active / self.size


@dataclasses.dataclass(frozen=True)
class ModelReport(AsTable):
    """The sparse layers, the kernels that stay dense with the reason if a plan tells it, and bytes.

    Attributes:
      layers: the sparse ones.
      dense: `(path of the kernel, shape, reason)`.
      nbytes: "params", "topology", "index" (what the products derive from the topology), and "opt_state" if an
        optimizer was given.
      undecayed: sparse layers that the optimizer's weight decay does not reach, but would if they were dense.
    """

    layers: tuple[SparseLayer, ...]
    dense: tuple[tuple[Path, tuple[int, ...], str], ...]
    nbytes: dict[str, int]
    undecayed: tuple[Path, ...] = ()

    @property
    def sparsity(self) -> float:
        """Zeros over the weights of the sparse layers; 0 without any."""
        size = sum(layer.size for layer in self.layers)
        return 1 - sum(layer.num_active for layer in self.layers) / size if size else 0.0

    @property
    def sparsity_all(self) -> float:
        """Zeros over these and all dense kernels."""
        kernels = sum(math.prod(shape) for _, shape, _ in self.dense)
        size = sum(layer.size for layer in self.layers) + kernels
        return 1 - (sum(layer.num_active for layer in self.layers) + kernels) / size if size else 0.0

    @property
    def table(self) -> Table:
        """What `print`, rich and a notebook show."""
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            blocks = f"{layer.num_blocks} of {'x'.join(map(str, layer.block_shape))}"
            sizes = "x".join(map(str, layer.kernel_shape))
            numbers = layer.dead_outputs, layer.unread_inputs, layer.nbytes
            rows.append((path_name(layer.path), sizes, f"{layer.density:.4f}", blocks, *map(str, numbers)))
        for path, shape, reason in self.dense:
            rows.append((path_name(path), "x".join(map(str, shape)), "1", reason or "dense", "", "", ""))
        totals = ", ".join(f"{name} {count:,} bytes" for name, count in self.nbytes.items())
        notes = [f"sparsity {self.sparsity:.2%} over the sparse layers, {self.sparsity_all:.2%} over all; {totals}"]
        if self.undecayed:
            notes.append(
                f"weight decay does not reach the blocks of {len(self.undecayed)} layers (such as "
                f"{path_name(self.undecayed[0])}), but would their kernel: name `blocks` in its mask, too"
            )
        return Table(
            ("layer", "kernel", "density", "blocks", "dead outputs", "unread inputs", "bytes"), rows, tuple(notes)
        )


def report(
    params: Any,
    topology: Any,
    plan: SparsityPlan | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> ModelReport:
    """What is sparse in a model, counted from its index arrays, on the host.

    Args:
      params, topology: concrete, of one model.
      plan: tells why layers stay dense.
      optimizer: adds the bytes of its state, and what its weight decay does not reach.
    """
    plan = None if plan is None else check_plan(plan)
    found = nodes(topology)
    weights = weights_at(params, found)
    layers = tuple(_sparse_layer(path, node, weights[path]) for path, node in found.items())
    dense = []
    for path, leaf in by_path(params).items():
        if path[-1] == "kernel" and np.ndim(leaf) > 1:
            reason = plan.get(path[:-1], "") if plan is not None else ""
            dense.append((path, tuple(np.shape(leaf)), reason if isinstance(reason, str) else ""))
    bare = _nbytes(without_index(topology))
    nbytes = {"params": _nbytes(params), "topology": bare, "index": _nbytes(topology) - bare}
    undecayed: tuple[Path, ...] = ()
    if optimizer is not None:
        nbytes["opt_state"] = _nbytes(jax.eval_shape(optimizer.init, params))
        dense_params = jax.eval_shape(to_dense, params, topology)
        paths = undecayed_layers(optimizer, params, dense_params, topology)
        undecayed = tuple(layer_path(path) for path in found if path in paths)
    return ModelReport(layers, tuple(dense), nbytes, undecayed)


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _sparse_layer(path: Path, node: LayerTopology, blocks: Any) -> SparseLayer:
    spec = node.spec
    num_active, dead_outputs, unread_inputs = 0, 0, 0
    for layout, aux in layers_of(node):
        positions = np.unique(active_positions(layout, None if aux is None else aux.active))
        num_active += positions.size
        dead_outputs += spec.out - np.unique(positions // spec.in_).size
        unread_inputs += spec.c_in - np.unique(positions % spec.in_ % spec.c_in).size  # columns are taps by channels
    return SparseLayer(
        path=layer_path(path),
        kernel_shape=node.kernel_shape,
        block_shape=spec.block_shape,
        num_blocks=spec.num_blocks,
        storage=spec.storage,
        num_active=num_active,
        size=spec.size * node.num_layers,
        dead_outputs=dead_outputs,
        unread_inputs=unread_inputs,
        nbytes=_nbytes(blocks) + _nbytes(node),
    )
