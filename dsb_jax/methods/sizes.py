"""What the methods ask of the sizes that they are given: a layer in their own storage, arrays of its shape."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsb_jax.layout import BlockLayout
from dsb_jax.spec import LayerSpec


def check_storage(name: str, storage: str, spec: LayerSpec) -> None:
    """Raises ValueError unless the layer is stored as the method `name` does."""
    if spec.storage != storage:
        raise ValueError(
            f"method {name!r} stores {storage!r}, and this layer's storage is {spec.storage!r}; pass the spec that "
            "the method's `stored` gives."
        )


def check_init(
    name: str, storage: str, weights: Float[Array, "out in"], score: Float[Array, "out in"] | None, spec: LayerSpec
) -> tuple[jax.Array, jax.Array | None]:
    """Weights and score as JAX arrays.

    Raises:
      ValueError: if the layer has another storage, or one of them another shape than the layer's matrix.
    """
    check_storage(name, storage, spec)
    for argument, array in (("weights", weights), ("score", score)):
        if array is not None and jnp.shape(array) != spec.shape:
            raise ValueError(
                f"{argument} has shape {list(jnp.shape(array))}, the layer is {list(spec.shape)} (out, in); pass the "
                "kernel by `spec.to_matrix`."
            )
    return jnp.asarray(weights), None if score is None else jnp.asarray(score)


def check_resize(name: str, storage: str, layout: BlockLayout, spec: LayerSpec) -> None:
    """Raises ValueError unless `spec` differs from the layer of `layout` in its number of blocks alone."""
    check_storage(name, storage, spec)
    if (layout.shape, layout.block_shape) != (spec.shape, spec.block_shape):
        raise ValueError(
            f"a layer of {layout.shape} in {layout.block_shape} blocks cannot be resized to {spec.shape} in "
            f"{spec.block_shape} blocks; only the number of blocks may change."
        )
