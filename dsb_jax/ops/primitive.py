"""The three passes of a sparse product as one primitive of jax, `shuffled_block_product`.

    forward          Y[out_idx[g]] = sum over blocks b of g of blocks[b] @ X[in_idx[b]]  (+ bias[out_idx[g]])
    input gradient   dX[in_idx[b]] += blocks[b]^T @ dY[out_idx[g]]
    weight gradient  dblocks[b] = dY[out_idx[g]] @ X[in_idx[b]]^T
    bias gradient    dbias = sum over positions and examples of dY

(Jiang et al. 2022, section 3.) The gradient of the blocks exists at the stored blocks only. Each pass is linear in both
of its operands, and its transposes are the other two:

    of                    with respect to its first operand     its second
    forward(x, w)         input_gradient(d, w)                  weight_gradient(x, d)
    input_gradient(y, w)  forward(d, w)                         weight_gradient(d, y)
    weight_gradient(x, y) input_gradient(y, d)                  forward(x, d)

Derivatives of any order, forward and in reverse, follow, and none of them looks into a kernel. `custom_vjp` would have
no forward mode, and `linear_call` no `vmap`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from dsb_jax.ops.partitioning import Operation, Pass, Product, join_batch, on_devices
from pallas_kernels.interface import Index, accumulator_dtype

# With respect to each operand of a pass: the pass that it is, and which of the operands it takes (None: d).
_TRANSPOSED: dict[str, tuple[tuple[Pass, tuple[int | None, ...]], ...]] = {
    "forward": (("input_gradient", (None, 1)), ("weight_gradient", (0, None))),
    "input_gradient": (("forward", (None, 1)), ("weight_gradient", (None, 0))),
    "weight_gradient": (("input_gradient", (1, None)), ("forward", (0, None))),
}

product_p = jax.extend.core.Primitive("shuffled_block_product")


def forward(
    product: Product, x: jax.Array, blocks: jax.Array, index: Index | None, bias: jax.Array | None = None
) -> jax.Array:
    """x[C, H, W, N], blocks[num_blocks, R, C'], bias[out] -> y[out, OH, OW, N]; no index where kernels need none."""
    arrays, structure = jax.tree.flatten(index)
    ranks = tuple(jnp.ndim(array) for array in arrays)
    operation = Operation(product, "forward", structure, ranks, has_bias=bias is not None)
    return _bind(operation, x, blocks, *arrays, *(() if bias is None else (bias,)))


def weight_gradient(product: Product, x: jax.Array, dy: jax.Array, index: Index, dtype: Any) -> jax.Array:
    """x[C, H, W, N], dy[out, OH, OW, N] -> dblocks[num_blocks, R, C'], as the gradient of `forward` has it."""
    arrays, structure = jax.tree.flatten(index)
    ranks = tuple(jnp.ndim(array) for array in arrays)
    return _bind(Operation(product, "weight_gradient", structure, ranks, jnp.dtype(dtype)), x, dy, *arrays)


def _bind(operation: Operation, *operands: Any) -> jax.Array:
    """Traced here, where mesh and settings are known, as a call whose inside jax can see but never differentiates."""
    # A tuple: as a parameter of its own, jax 0.12 would ask the primitive for rules of its experimental types.
    callee = jax.make_jaxpr(_jitted(operation))(*map(jax.typeof, operands))
    return product_p.bind(*operands, operation=operation, callees=(callee,))


@functools.cache  # one object for equal operations, so nothing is traced again
def _jitted(operation: Operation) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(on_devices, operation))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, operation: Operation, callees: Any) -> tuple[Any, Any]:
    result = product_p.bind(*primals, operation=operation, callees=callees)
    first, second, *rest = primals
    count = 2 + len(operation.index_ranks)
    index = rest[: count - 2]
    # Without the bias, levels of `vmap` that map nothing else are gone: there the product is the same for all.
    of_bias = [level for level, mapped in enumerate(operation.mapped) if not any(mapped[:count])]
    levels = tuple(mapped[:count] for mapped in operation.mapped if any(mapped[:count]))
    unbiased = dataclasses.replace(operation, has_bias=False, mapped=levels)
    sharding = jax.typeof(result).sharding
    sharding = sharding if sharding.mesh.explicit_axes else None

    def spread(term: jax.Array, axes: Sequence[int]) -> jax.Array:
        """A term of the sum that is the same along some axes of the result."""
        if not axes:
            return term
        grown = jnp.expand_dims(term, axes)
        return lax.broadcast_in_dim(grown, result.shape, range(result.ndim), out_sharding=sharding)

    terms = []
    if not isinstance(tangents[0], ad.Zero):
        terms.append(spread(_bind(unbiased, tangents[0], second, *index), of_bias))
    if not isinstance(tangents[1], ad.Zero):
        terms.append(spread(_bind(unbiased, first, tangents[1], *index), of_bias))
    if operation.has_bias and not isinstance(tangents[-1], ad.Zero):
        # In the dtype of sums, so that the transpose, a sum over positions and examples, is rounded once.
        bias = tangents[-1].astype(accumulator_dtype(result.dtype))
        missing = [level for level, mapped in enumerate(operation.mapped) if not mapped[-1]]
        terms.append(spread(bias, [*missing, *operation.axes_beside_features]).astype(result.dtype))
    return result, functools.reduce(ad.add_jaxvals, terms)


def _transpose(d: Any, *operands: Any, operation: Operation, callees: Any) -> list[Any]:
    cotangents: list[Any] = [None] * len(operands)
    at = 0 if ad.is_undefined_primal(operands[0]) else 1
    wanted = operands[at].aval
    if isinstance(d, ad.Zero):
        cotangents[at] = ad.Zero(wanted)
        return cotangents
    name, sources = _TRANSPOSED[operation.name][at]
    given = [d if source is None else operands[source] for source in sources]
    levels = []  # what each level of `vmap` maps of the operands of the new pass: d is mapped at all of them
    for mapped in operation.mapped:
        of_given = tuple(source is None or mapped[source] for source in sources)
        levels.append((*of_given, *mapped[2 : 2 + len(operation.index_ranks)]))
    lost = [level for level, mapped in enumerate(operation.mapped) if not mapped[at]]
    if name == "weight_gradient":
        # A sum over examples: where nothing but activations is mapped, they are examples like others.
        for level in [level for level in reversed(lost) if not any(levels[level][2:])]:
            if all(levels[level][:2]):
                given = [join_batch(a, sum(m[i] for m in levels[:level]), operation) for i, a in enumerate(given)]
            else:
                given = [a.sum(level) if source is None else a for source, a in zip(sources, given, strict=True)]
            del levels[level]
            lost = [other - (other > level) for other in lost if other != level]
    dtype = wanted.dtype if name == "weight_gradient" else None
    other = dataclasses.replace(operation, name=name, dtype=dtype, mapped=tuple(levels), has_bias=False)
    result = _bind(other, *given, *operands[2 : 2 + len(operation.index_ranks)])
    cotangents[at] = result.sum(axis=tuple(lost)) if lost else result
    return cotangents


def _batched(operands: Sequence[Any], axes: Sequence[Any], *, operation: Operation, callees: Any) -> tuple[Any, int]:
    is_mapped = tuple(axis is not None for axis in axes)
    moved = [jnp.moveaxis(a, axis, 0) if m else a for a, axis, m in zip(operands, axes, is_mapped, strict=True)]
    mapped = dataclasses.replace(operation, mapped=(is_mapped, *operation.mapped))
    return _bind(mapped, *moved), 0


def _evaluate(*operands: Any, operation: Operation, callees: Any) -> jax.Array:
    del callees
    return _jitted(operation)(*operands)


def _inlined(*operands: Any, operation: Operation, callees: Any) -> jax.Array:
    del operation
    (result,) = jax.extend.core.jaxpr_as_fun(callees[0])(*operands)
    return result


product_p.def_impl(_evaluate)
product_p.def_abstract_eval(lambda *operands, operation, callees: callees[0].out_avals[0])
ad.primitive_jvps[product_p] = _jvp
ad.primitive_transposes[product_p] = _transpose
batching.primitive_batchers[product_p] = _batched
mlir.register_lowering(product_p, mlir.lower_fun(_inlined, multiple_results=False))
