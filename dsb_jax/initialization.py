"""How sparse layers begin: kernels of a dense model become blocks and nodes, by the method of the layers.

Equal layers share one compiled function. Under a `jit` of somebody's own, which would compile it again for each of
them, layers of one signature (equal matrix, blocks and dtype) follow each other in a loop instead.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from dsb_jax.methods.base import Method
from dsb_jax.paths import Path, path_name
from dsb_jax.spec import LayerSpec, conv_spec
from dsb_jax.topology import LayerTopology, join_stack, kernel_index, split_stack

Score = Callable[[Array], Array]


def initialize(
    method: Method,
    key: jax.Array,
    kernels: Mapping[Path, Array],
    specs: Mapping[Path, LayerSpec],
    score: Score | None = None,
) -> dict[Path, tuple[jax.Array, LayerTopology]]:
    """Blocks and node of every layer.

    Args:
      method: whose first state the layers get.
      key: a PRNG key. What a layer draws depends on it and on the layer's path alone.
      kernels: the dense ones by the paths of the layers, in their own shapes, lifted axes included.
      specs: of the same layers, as they are planned, in blocks.
      score: of a kernel's values, elementwise, >= 0: the best pattern by it. None for the method's own first pattern.
    """
    is_traced = any(isinstance(kernel, jax.core.Tracer) for kernel in kernels.values())
    stored = {path: method.stored(specs[path]) for path in kernels}
    together: dict[Any, list[Path]] = {}
    for path, kernel in kernels.items():
        signature = _matrix_spec(stored[path]), jnp.dtype(kernel.dtype)
        together.setdefault(signature if is_traced else path, []).append(path)
    result: dict[Path, tuple[jax.Array, LayerTopology]] = {}
    for paths in together.values():
        numbers = np.concatenate([_layer_numbers(path, stored[path]) for path in paths])
        arrays = tuple(jnp.asarray(kernels[path]) for path in paths)
        states = _initialize(method, tuple(stored[path] for path in paths), score, key, numbers, arrays)
        result.update(zip(paths, states, strict=True))
    return {path: result[path] for path in kernels}


def _layer_numbers(path: Path, spec: LayerSpec) -> Int[np.ndarray, "num_layers"]:
    """What is folded into the key for each layer of a stack; the same whatever other layers there are."""
    name = path_name(path)
    return np.array([zlib.crc32(f"{name}[{i}]".encode()) for i in range(spec.num_layers)], np.uint32)


def _matrix_spec(spec: LayerSpec) -> LayerSpec:
    """All that a method sees of a layer: its matrix, its input channels, and what is stored of it."""
    matrix = conv_spec((spec.in_ // spec.c_in,), spec.c_in, spec.out)
    return dataclasses.replace(
        matrix, block_shape=spec.block_shape, num_blocks=spec.num_blocks, num_active=spec.num_active,
        storage=spec.storage,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _initialize(
    method: Method,
    specs: tuple[LayerSpec, ...],
    score: Score | None,
    key: jax.Array,
    numbers: Int[np.ndarray, "num_layers"],
    kernels: tuple[jax.Array, ...],
) -> list[tuple[jax.Array, LayerTopology]]:
    spec = _matrix_spec(specs[0])

    def one(each: tuple[jax.Array, jax.Array]) -> Any:
        number, weights = each
        own = jax.random.fold_in(key, number)
        state = method.init(own, weights, spec, score=None if score is None else score(weights))
        return state.blocks.astype(weights.dtype), *state[1:], kernel_index(state.layout, spec)

    matrices = [
        jax.vmap(spec.to_matrix)(split_stack(kernel, spec.stack_axes))
        for spec, kernel in zip(specs, kernels, strict=True)
    ]
    states = lax.map(one, (jnp.asarray(numbers), jnp.concatenate(matrices)))
    result, start = [], 0
    for spec in specs:
        mine = jax.tree.map(lambda leaf, a=start, b=start + spec.num_layers: leaf[a:b], states)
        sizes = tuple(spec.kernel_shape[axis] for axis in spec.stack_axes)
        blocks, layout, aux, index = join_stack(mine, spec.stack_axes, sizes)
        result.append((blocks, LayerTopology(layout, aux, spec, index)))
        start += spec.num_layers
    return result
