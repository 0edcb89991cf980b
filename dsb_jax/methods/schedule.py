"""How much to adapt, and when: the schedule that the adapting methods share.

Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019, and Evci et al., "Rigging the Lottery",
ICML 2020, decay the share of weights that an adaptation replaces with a cosine; DSB (Jiang, Hu, Song, NeurIPS
2022, appendix) does the same:

    drop_fraction(t) = drop_fraction / 2 * (1 + cos(pi * t / anneal_steps))    from update_start_step to update_end_step

Annealing and the end are two settings. The authors of DSB anneal over 75,000 steps and stop at 37,500 of 62,560, where
half of the drop fraction is left (`AUTHORS`); annealing until the stop, the default here, explores half as much.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The schedule of the authors' CIFAR runs: 62,560 steps of batch 128, 160 epochs.
AUTHORS: Mapping[str, Any] = MappingProxyType(
    {"drop_fraction": 0.3, "update_interval": 100, "update_end_step": 37_500, "anneal_steps": 75_000}
)


class Scheduled(Protocol):
    """The settings of a schedule, fields of every method that adapts.

    Attributes:
      update_interval: steps between adaptations; the paper uses 100 (CIFAR) and 800 (ImageNet).
      update_start_step: the first step that may adapt.
      update_end_step: the first step without adaptation; None for never.
    """

    @property
    def update_interval(self) -> int: ...
    @property
    def update_start_step(self) -> int: ...
    @property
    def update_end_step(self) -> int | None: ...


class Annealed(Scheduled, Protocol):
    """A schedule with a drop fraction that falls.

    Attributes:
      drop_fraction: share of the active weights that is dropped at step 0, in [0, 1].
      anneal_steps: steps after which the share is 0; None for `update_end_step`. If that is None, too, it is constant.
    """

    @property
    def drop_fraction(self) -> float: ...
    @property
    def anneal_steps(self) -> int | None: ...


def check_schedule(method: Scheduled) -> None:
    """Raises ValueError for the first setting of the schedule that is invalid."""
    check_steps("update_interval", method.update_interval, least=1)
    check_steps("update_start_step", method.update_start_step, least=0)
    if method.update_end_step is not None:
        check_steps("update_end_step", method.update_end_step, least=1)


def check_annealing(method: Annealed) -> None:
    """`check_schedule`, and the same of drop fraction and annealing."""
    check_schedule(method)
    check_number("drop_fraction", method.drop_fraction, 0, 1, hint="the paper uses 0.3")
    if method.anneal_steps is not None:
        check_steps("anneal_steps", method.anneal_steps, least=1)


def check_steps(name: str, value: Any, *, least: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least` that an int32, as steps are, can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        below = " below 2**31" if isinstance(value, int) and value >= 2**31 else ""
        raise ValueError(f"{name}={value!r} is no whole number of at least {least}{below}; give a Python int.")


def check_number(name: str, value: Any, low: float, high: float, *, hint: str) -> None:
    """Raises ValueError unless `value` is a number in [low, high]."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # which NaN is not
        raise ValueError(f"{name}={value!r} is not in [{low:g}, {high:g}]; {hint}.")


def drop_fraction(method: Annealed, step: int | Int[Array, "*steps"]) -> Float[Array, "*steps"]:
    """The share of active weights to drop at `step`: float32, exactly 0 outside of the schedule. Traceable."""
    anneal_steps = method.anneal_steps or method.update_end_step
    step = jnp.asarray(step)
    fraction = jnp.full(step.shape, method.drop_fraction, jnp.float32)
    if anneal_steps is not None:
        # The quotient of float32 keeps steps apart up to 2^24; the clip makes every later step the last one.
        time = jnp.clip(step.astype(jnp.float32) / anneal_steps, 0, 1)
        fraction = method.drop_fraction / 2 * (1 + jnp.cos(jnp.pi * time))
        # cos(float32 pi) is -1 on every backend met so far, but exactly 0 is a promise, so it is not left to cos.
        fraction = jnp.where(step < anneal_steps, fraction, 0.0)
    return jnp.where(is_within(method, step), fraction, 0.0)


def is_within(method: Scheduled, step: int | Int[Array, "*steps"]) -> Bool[Array, "*steps"]:
    """Whether `step` lies between start and end. Traceable."""
    step = jnp.asarray(step)
    within = step >= method.update_start_step
    return within if method.update_end_step is None else within & (step < method.update_end_step)


def is_due(method: Scheduled, step: int) -> bool:
    """Whether the loop on the host adapts at `step`: at each multiple of the interval within the schedule.

    Not at step 0, where nothing has been learned yet.
    """
    begun = step > 0 and step >= method.update_start_step
    ended = method.update_end_step is not None and step >= method.update_end_step
    return begun and not ended and step % method.update_interval == 0
