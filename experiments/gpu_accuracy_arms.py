"""What `experiments.gpu_accuracy` trains, by what it tells, and whether there is time for it."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dsb_jax.training import data, loop
from dsb_jax.training.config import PROTOCOLS, Config
from experiments import scanned_training


class Arm(NamedTuple):
    """A cell of the comparison: its name, what its config sets, and the name of the arm that it is compared with."""

    name: str
    settings: Mapping[str, Any]
    against: str


def arms() -> list[Arm]:
    """All arms, by what they tell."""
    found = [Arm(name, {"method": name}, "dsb") for name in ("dsb", "rigl", "ssb", "dense")]
    found += [Arm("dsb 16x16", {"method": "dsb", "block_shape": (16, 16)}, "dsb"), Arm("set", {"method": "set"}, "dsb")]
    found += [Arm(f"{name} 0.95", {"method": name, "sparsity": 0.95}, "dsb 0.95") for name in ("dsb", "rigl", "ssb")]
    sixteen = {"method": "dsb", "block_shape": (16, 16), "sparsity": 0.95}
    return [*found, Arm("dsb 16x16 0.95", sixteen, "dsb 0.95"), Arm("small_dense", {"method": "small_dense"}, "dsb")]


def select(wanted: Sequence[str] | None) -> list[Arm]:
    """The arms of these names, in the order of `arms`; all for None.

    Raises:
      ValueError: for a name of no arm.
    """
    known = arms()
    if odd := [name for name in wanted or () if name not in {arm.name for arm in known}]:
        raise ValueError(f"arms: {odd[0]!r} is unknown; choose of {', '.join(arm.name for arm in known)}.")
    return [arm for arm in known if wanted is None or arm.name in wanted]


def make_config(arm: Arm, dataset: data.Dataset, epochs: int, common: Mapping[str, Any]) -> Config:
    """The config of an arm, for any seed: the authors' protocol in bfloat16, what is `common`, and the arm's own.

    Raises:
      ValueError: if a batch is larger than the data set, or the model does not take it.
    """
    protocol = {**PROTOCOLS["authors"], "dataset": "cifar10", "dtype": "bfloat16", "epochs": epochs}
    return scanned_training.whole_segments(
        loop.for_dataset(Config(**{**protocol, **common, **arm.settings}), dataset)  # type: ignore[arg-type]
    )


def groups(seeds: Sequence[int], size: int) -> list[list[int]]:
    """Seeds that are trained together, `size` each.

    The last group is filled up with its last seed, so that nothing compiles again.
    """
    cut = [list(seeds[i : i + size]) for i in range(0, len(seeds), size)]
    return [group + group[-1:] * (size - len(group)) for group in cut]


class OutOfTime(Exception):
    """The limit is reached."""


class Budget:
    """The time that is left, and what an arm is expected to take: as long as the slowest so far, nothing at first.

    Attributes:
      limit_s: seconds from the start.
      compile_s, group_s: measured, of each arm that was compiled and each group of seeds that was trained.
    """

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._now, self._begin = limit_s, now, now()
        self.compile_s: list[float] = []
        self.group_s: list[float] = []

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._now() - self._begin

    def expected(self, num_groups: int) -> float:
        """Seconds of an arm that is to be compiled and trained."""
        return max(self.compile_s, default=0.0) + num_groups * max(self.group_s, default=0.0)

    def require(self, seconds: float, what: str) -> None:
        """Raises OutOfTime unless this much is left."""
        if self.seconds + seconds >= self.limit_s:
            needs = f"{seconds:.0f} s do not fit" if seconds else "its time was over"
            raise OutOfTime(f"{what}: {needs}, {self.seconds:.0f} of {self.limit_s:.0f} s were over")
