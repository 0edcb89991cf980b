"""A small tree such as somebody else's training may have, and a run of it on disk."""

import jax
import jax.numpy as jnp
import numpy as np

from dsb_jax.checkpoint import Checkpoints
from dsb_jax.layout import random_layout
from dsb_jax.spec import linear_spec
from dsb_jax.topology import LayerTopology

CONFIG = {"width": 64, "sizes": [4, 4]}
SPEC = linear_spec(128, 64).with_blocks((8, 8), 40)


def make_state(step=0, seed=0):
    """What somebody else's training may be: a topology, weights, a scalar, a typed key, an empty and a missing part."""
    rng = np.random.default_rng(seed)
    layout = random_layout(jax.random.key(seed), SPEC.shape, block_shape=(8, 8), num_blocks=40)
    return {
        "params": {"fc": {"blocks": jnp.array(rng.normal(size=(40, 8, 8)), jnp.float32), "bias": jnp.zeros(64)}},
        "topology": {"fc": {"blocks": LayerTopology(layout, None, SPEC)}},
        "opt_state": (jnp.zeros((40, 8, 8), jnp.bfloat16), None, {}),
        "step": jnp.int32(step),
        "key": jax.random.key(3, impl="rbg"),
    }


LIKE = jax.eval_shape(make_state)


def bits(tree):
    """Every leaf as dtype, shape and bytes, and the structure with its static parts."""
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves], jax.tree.structure(tree)


def save_run(workdir):
    """A run with checkpoints of steps 2 and 5, the first the better."""
    with Checkpoints(workdir, CONFIG) as checkpoints:
        for step, accuracy in ((2, 0.75), (5, 0.5)):
            extra = {"a/b": np.arange(9, dtype=np.uint8)}
            checkpoints.save(make_state(step), step=step, test_accuracy=accuracy, extra=extra, host={"n": step})
    return workdir
