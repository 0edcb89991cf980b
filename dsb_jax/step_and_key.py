"""Two arguments that are easily taken for one another: the number of a training step, and a PRNG key.

`shown` is how a value that is wrong stands in a message.
"""

from typing import Any

import jax
import jax.numpy as jnp


def check_step(step: Any) -> jax.Array:
    """The step as an array; raises ValueError for what is no whole number."""
    if step is None or jnp.shape(step) != () or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise ValueError(f"step={shown(step)} is no whole number; give that of the training step, as in state.step.")
    return jnp.asarray(step)


def check_key(key: Any) -> jax.Array:
    """The key itself, of either kind of JAX's; raises ValueError for what is no key, and for several."""
    dtype, shape = (key.dtype, key.shape) if hasattr(key, "dtype") else (None, None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not ((is_typed and shape == ()) or (dtype == jnp.uint32 and key.ndim == 1)):
        raise ValueError(f"key={shown(key)} is not one PRNG key; give jax.random.key(0) or another.")
    return key


def shown(value: Any) -> str:
    """The value, or the type of an array that is long or not known yet."""
    is_long = hasattr(value, "dtype") and (
        isinstance(value, jax.core.Tracer) or value.shape != () or jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    )
    return f"{value.dtype}{list(value.shape)}" if is_long else repr(value)
