"""Checkpoints of version 0.1 (commit 8cce860), whose arrays and settings had other names.

    then                                             now
    recipe/, recipe.json                             config/, config.json
    batch_stats/...                                  collections/batch_stats/...
    topology/LAYER/layout/out_idx, in_idx, ...       topology/LAYER/blocks/layout/out_idx, in_idx, ...

There was one generator of random numbers, threefry2x32. Top-KAST kept its weights in another way and is refused.
"""

import re
from pathlib import Path

from dsb_jax.stored_step import CheckpointError, StoredStep
from dsb_jax.training.build import KEY_IMPL

_NAMES = (
    (re.compile(r"^batch_stats/"), "collections/batch_stats/"),
    (re.compile(r"^(topology/.*)/layout/(out_idx|in_idx|group_start)$"), r"\1/blocks/layout/\2"),
)


def is_old(directory: Path) -> bool:
    """Whether a step was written by version 0.1."""
    return (directory / "recipe").exists()


def renamed(stored: StoredStep) -> StoredStep:
    """An old step with the names of today, to be called after the checksums were compared.

    Raises:
      CheckpointError: for a run of Top-KAST.
    """
    if stored.config.get("method") == "topkast":
        raise CheckpointError(
            f"{stored.directory} is of Top-KAST in version 0.1, which stored it in another way; train anew."
        )
    return stored._replace(
        arrays={_new_name(name): array for name, array in stored.arrays.items()}, key_impls={"key": KEY_IMPL}
    )


def _new_name(name: str) -> str:
    for pattern, new in _NAMES:
        name = pattern.sub(new, name)
    return name
