"""Checkpoints of version 0.1 (commit 8cce860), whose arrays and settings had other names.

    then                                             now
    recipe/, recipe.json                             config/, config.json
    batch_stats/...                                  collections/batch_stats/...
    topology/LAYER/layout/out_idx, in_idx, ...       topology/LAYER/blocks/layout/out_idx, in_idx, ...

There was one generator of random numbers, threefry2x32. What a method keeps beside the layout had another form, and is
refused.
"""

import re
from pathlib import Path

from dsb_jax.stored_step import CheckpointError, StoredStep
from dsb_jax.training.build import KEY_IMPL

_IS_TOPOLOGY = re.compile(r"^topology/")
_LAYOUT = re.compile(r"^(topology/.*)/layout/(out_idx|in_idx|group_start)$")
_NAMES = ((re.compile(r"^batch_stats/"), "collections/batch_stats/"), (_LAYOUT, r"\1/blocks/layout/\2"))


def is_old(directory: Path) -> bool:
    """Whether a step was written by version 0.1."""
    return (directory / "recipe").exists()


def renamed(stored: StoredStep) -> StoredStep:
    """An old step with the names of today, to be called after the checksums were compared.

    Raises:
      CheckpointError: if a layer keeps something beside its layout.
    """
    beside = next((name for name in stored.arrays if _IS_TOPOLOGY.match(name) and not _LAYOUT.match(name)), None)
    if beside is not None:
        raise CheckpointError(
            f"{stored.directory}: {beside} lies beside a layout as version 0.1 stored it for method "
            f"{stored.config.get('method')!r}, which is read no more; train anew."
        )
    return stored._replace(
        arrays={_new_name(name): array for name, array in stored.arrays.items()}, key_impls={"key": KEY_IMPL}
    )


def _new_name(name: str) -> str:
    for pattern, new in _NAMES:
        name = pattern.sub(new, name)
    return name
