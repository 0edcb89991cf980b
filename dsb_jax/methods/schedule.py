"""How much to adapt, and when: the schedules of the topology.

Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019, and Evci et al., "Rigging the Lottery",
ICML 2020, decay the share of weights that an adaptation replaces with a cosine; DSB (Jiang, Hu, Song, NeurIPS
2022, appendix) does the same:

    drop_fraction(t) = alpha / 2 * (1 + cos(pi * t / T_end))

Learning rates are optax's (`optax.piecewise_constant_schedule` for the step decay of the paper).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def drop_fraction(
    step: int | Int[Array | np.ndarray, "*steps"], *, alpha: float, update_end_step: int
) -> Float[Array, "*steps"]:
    """The share of a layer's active weights to drop at `step`. Traceable in `step`.

    Args:
      step: training step, or an array of them.
      alpha: share at step 0, in [0, 1]; the paper uses 0.3.
      update_end_step: T_end of the cosine; at and past it the share is exactly 0.

    Returns:
      float32, from `alpha` down to 0.

    Raises:
      ValueError: if `alpha` is not in [0, 1] or `update_end_step` is not positive.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not a share of the active weights; give 0 to 1, such as 0.3.")
    if update_end_step < 1:
        raise ValueError(f"update_end_step={update_end_step} leaves no step to adapt at; give at least 1.")
    # The quotient of float32 keeps steps apart up to 2^24; the clip makes every later step the last one.
    time = jnp.clip(jnp.asarray(step, jnp.float32) / update_end_step, 0, 1)
    cosine = alpha / 2 * (1 + jnp.cos(jnp.pi * time))
    # cos(float32 pi) is -1 on every backend met so far, but exactly 0 is a promise, so it is not left to cos.
    return jnp.where(jnp.asarray(step) < update_end_step, cosine, 0.0)


def update_due(step: int, *, update_interval: int, update_end_step: int) -> bool:
    """Whether the host loop adapts the topology at `step`.

    True at `update_interval`, `2 * update_interval`, ... below `update_end_step`: not at step 0, where nothing
    has been learned yet, nor at `update_end_step`, where `drop_fraction` is 0.

    Args:
      step: training step, an integer on the host (not a traced value).
      update_interval: steps between adaptations; the paper uses 100 (CIFAR) and 800 (ImageNet).
      update_end_step: the first step without adaptation; 0 means never to adapt.

    Raises:
      ValueError: if `update_interval` is below 1.
    """
    if update_interval < 1:
        raise ValueError(f"update_interval={update_interval} is not a number of steps; give at least 1.")
    return 0 < step < update_end_step and step % update_interval == 0
