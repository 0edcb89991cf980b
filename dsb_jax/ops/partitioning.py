"""One pass of a sparse product under `vmap` and over several devices.

To XLA's partitioner a kernel is opaque (and a loop over tiles of the batch nearly so): given activations that are
sharded over the batch it gathers the whole batch on every device. What it may do instead is told here. N is the
batch, V stands for axes that `vmap` has put in front:

    operation         operands                        sharded over                        result
    forward           x[V, C, H, W, N], blocks, bias  V, N                                y[V, out, OH, OW, N]
    input_gradient    dy[V, out, OH, OW, N], blocks   V, N                                dx[V, C, H, W, N]
    weight_gradient   x, dy                           V, N (one all-reduce over N)        dblocks[V, num_blocks, R, C]

Everything else is replicated, and a weight gradient is packed into blocks before it is summed over devices, whatever
computes it. On one device nothing of this is left in the compiled program. Where mesh axes are manual already
(`jax.shard_map`), the kernel is called as it is, and the caller sums the weight gradients; loops that start from zeros
need `check_vma=False` there.

The partitioner learns the mesh from the program's arguments or constraints. If none of them names one (arguments on
one device under `jax.set_mesh`), it gathers: right, but no scaling.

`vmap` over activations alone puts the mapped axis beside N, one call of the kernel on a larger batch. Any other
`vmap` (over blocks, bias or index arrays, or of the weight gradient) calls it in a loop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.interface import ConvGeometry, Index, Kernels, accumulator_dtype

# Every operation has two operands that differ, the activations first, then the arrays of the index. Forward may have a
# bias, the last.
_RANKS = {  # of the first two and of the result, without mapped axes
    "forward": (4, 3, 4),
    "input_gradient": (4, 3, 4),
    "weight_gradient": (4, 4, 3),
}


Pass = Literal["forward", "input_gradient", "weight_gradient"]


@dataclasses.dataclass(frozen=True)
class Product:
    """The static sizes of one product, which its three operations share.

    Attributes:
      kernels: what computes each pass; they may be of several implementations.
      geometry: kernel size, strides, padding.
      out: output features.
      input_size: height and width of the input.
      precision: as in `jax.lax.dot`.
      feature_major: whether activations are [C, H, W, N], or [N, H, W, C].
    """

    kernels: Kernels
    geometry: ConvGeometry
    out: int
    input_size: tuple[int, int]
    precision: lax.PrecisionLike = None
    feature_major: bool = True


@dataclasses.dataclass(frozen=True)
class Operation:
    """One pass with its static sizes, and the axes that `vmap` has put before its operands.

    A kernel is asked for the shapes of one device, too, while the program is compiled: what it refuses there
    (NotImplementedError) ends the compilation, with its reason.

    Attributes:
      product: sizes and implementation.
      name: which of the three.
      index_structure: of the `Index` whose arrays follow the first two operands.
      index_ranks: of its arrays, without mapped axes.
      dtype: of the weight gradient.
      has_bias: whether a bias follows them.
      mapped: for each level of `vmap`, outermost first, which of the operands have an axis of it.
    """

    product: Product
    name: Pass
    index_structure: Any
    index_ranks: tuple[int, ...]
    dtype: Any = None
    has_bias: bool = False
    mapped: tuple[tuple[bool, ...], ...] = ()

    @property
    def sums_over_batch(self) -> bool:
        return self.name == "weight_gradient"

    @property
    def batch_axis(self) -> int:
        """Of activations, from their end."""
        return -1 if self.product.feature_major else -4

    @property
    def axes_beside_features(self) -> tuple[int, int, int]:
        """Of an output, from its end: along them a bias is the same."""
        return (-3, -2, -1) if self.product.feature_major else (-4, -3, -2)

    def dimensions(self) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
        """Names of the dimensions of the operands and of the result.

        "n" is the batch, "v0", "v1", ... are mapped axes; every other dimension has a name of its own.
        """
        *ranks, result_rank = _RANKS[self.name]
        operands = []
        for i, rank in enumerate((*ranks, *self.index_ranks, *((1,) if self.has_bias else ()))):
            own = [f"v{level}" for level, mapped in enumerate(self.mapped) if mapped[i]]
            operands.append((*own, *self._own_dimensions(f"a{i}x", rank)))
        result = (*(f"v{level}" for level in range(len(self.mapped))), *self._own_dimensions("rx", result_rank))
        return tuple(operands), result

    def _own_dimensions(self, prefix: str, rank: int) -> tuple[str, ...]:
        """Arrays of rank 4 are activations, one of whose dimensions is the batch."""
        names = [f"{prefix}{i}" for i in range(rank)]
        if rank == 4:
            names[self.batch_axis] = "n"
        return tuple(names)

    def compute(self, *operands: jax.Array) -> jax.Array:
        """Calls the kernel on local arrays, mapped axes and all."""
        if not self.mapped:
            first, second, *rest = operands
            product, count = self.product, len(self.index_ranks)
            index: Index = jax.tree.unflatten(self.index_structure, rest[:count])
            options: dict[str, Any] = {"geometry": product.geometry, "precision": product.precision}
            own: dict[str, dict[str, Any]] = {
                "forward": {"out": product.out},
                "input_gradient": {"input_size": product.input_size},
                "weight_gradient": {"dtype": self.dtype},
            }
            options |= own[self.name]
            if self.has_bias:
                options["bias"] = rest[count]
            return getattr(product.kernels, self.name)(first, second, index, **options)
        mapped, inner = self.mapped[0], dataclasses.replace(self, mapped=self.mapped[1:])
        first = operands[0]
        if mapped[0] and not any(mapped[1:]) and not self.sums_over_batch and first.size > 0:
            result = inner.compute(join_batch(first, 0, self), *operands[1:])
            return split_batch(result, first.shape[0], self)

        def step(varying: list[jax.Array]) -> jax.Array:
            rest = iter(varying)
            return inner.compute(*(next(rest) if m else a for m, a in zip(mapped, operands, strict=True)))

        return lax.map(step, [a for m, a in zip(mapped, operands, strict=True) if m])


def join_batch(a: jax.Array, axis: int, operation: Operation) -> jax.Array:
    """Activations whose axis `axis`, which `vmap` has put in front, is part of the batch: V of them, then N."""
    moved = jnp.moveaxis(a, axis, operation.batch_axis - 1)
    at = moved.ndim + operation.batch_axis
    return moved.reshape(*moved.shape[: at - 1], -1, *moved.shape[at + 1 :])


def split_batch(a: jax.Array, size: int, operation: Operation) -> jax.Array:
    """The inverse of `join_batch` for V = size and axis 0."""
    at = a.ndim + operation.batch_axis
    return jnp.moveaxis(a.reshape(*a.shape[:at], size, -1, *a.shape[at + 1 :]), at, 0)


def _is_shardable(name: str) -> bool:
    return name == "n" or name[0] == "v"


def _mesh_axes(operation: Operation, mesh: Mesh | AbstractMesh, arrays: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each shardable dimension: those of the first array that is sharded over it.

    `arrays` are the operands, and the result where its sharding is known. A dimension that a mesh axis does not
    divide stays whole: a kernel would count its padding in.
    """
    operand_names, result_names = operation.dimensions()
    axes: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for array, names in zip(arrays, (*operand_names, result_names), strict=False):
        spec = getattr(array.sharding, "spec", ())  # no spec: a sharding over devices of unknown mesh
        for name, entry, size in zip(names, spec, array.shape, strict=False):
            entry = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            if not _is_shardable(name) or name in axes or not entry or used.intersection(entry):
                continue
            if size % math.prod(mesh.shape[axis] for axis in entry) == 0:
                axes[name] = entry
                used.update(entry)
    return axes


def _shardings(operation: Operation, mesh: Mesh | AbstractMesh, axes: dict[str, tuple[str, ...]]):
    """Of the operands (a tuple) and of the result."""
    operands, result = operation.dimensions()
    *arrays, last = (NamedSharding(mesh, P(*(axes.get(name) for name in names))) for names in (*operands, result))
    return tuple(arrays), last


def _sharding_rule(operation: Operation, mesh: Mesh, operand_types: Any, result_types: Any) -> SdyShardingRule:
    operands, result = operation.dimensions()
    replicated = {name: None for names in (*operands, result) for name in names if not _is_shardable(name)}
    return SdyShardingRule(
        tuple(ArrayMapping(*names) for names in operands),
        (ArrayMapping(*result),),
        reduction_factors=("n",) if operation.sums_over_batch else (),
        need_replication_factors=tuple(replicated),
    )


def _infer_sharding(operation: Operation, mesh: Mesh, operands: Sequence[Any], result: Any) -> NamedSharding:
    return _shardings(operation, mesh, _mesh_axes(operation, mesh, operands))[1]


def _partition(operation: Operation, mesh: Mesh | AbstractMesh, operands: Sequence[Any], *results: Any):
    axes = _mesh_axes(operation, mesh, (*operands, *results))
    operand_shardings, result_sharding = _shardings(operation, mesh, axes)
    batch_axes = axes.get("n", ())

    def summed(*local: jax.Array) -> jax.Array:
        # Summed in float32 and rounded once, as on one device.
        wide = dataclasses.replace(operation, dtype=accumulator_dtype(operation.dtype))
        return lax.psum(wide.compute(*local), batch_axes).astype(operation.dtype)

    local = summed if operation.sums_over_batch and batch_axes else operation.compute
    return mesh, local, result_sharding, operand_shardings


@functools.cache  # one object for equal operations, so nothing recompiles
def _partitioned(operation: Operation) -> Callable[..., jax.Array]:
    """The operation with rules for XLA's partitioner. Closures: a static argument of the call would keep tracers."""
    call = custom_partitioning(operation.compute)
    call.def_partition(
        partition=functools.partial(_partition, operation),
        infer_sharding_from_operands=functools.partial(_infer_sharding, operation),
        sharding_rule=functools.partial(_sharding_rule, operation),
    )
    return call


def _compute_explicit(operation: Operation, mesh: AbstractMesh, operands: Sequence[jax.Array]) -> jax.Array:
    """Where types carry shardings: those say at trace time what the partitioner says later."""
    _, function, result_sharding, shardings = _partition(operation, mesh, [jax.typeof(a) for a in operands])
    local = jax.shard_map(
        function,
        in_specs=tuple(sharding.spec for sharding in shardings),
        out_specs=result_sharding.spec,
        mesh=mesh,
        axis_names=set(mesh.explicit_axes),
        check_vma=False,
    )
    return local(*(jax.sharding.reshard(a, s) for a, s in zip(operands, shardings, strict=True)))


def on_devices(operation: Operation, *operands: jax.Array) -> jax.Array:
    """The result of an operation, wherever its operands lie."""
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.typeof(operands[0]).sharding.mesh if mesh.empty else mesh
    if mesh.manual_axes:  # the partitioner's callbacks would not know the mesh
        return operation.compute(*operands)
    if mesh.explicit_axes:
        return _compute_explicit(operation, mesh, operands)
    return _partitioned(operation)(*operands)
