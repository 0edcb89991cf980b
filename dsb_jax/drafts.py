"""Files that are whole or not there: written beside their place, and moved there when they are complete."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def draft_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` at the end of the block.

    If the block fails, the draft is removed and whatever lies at `path` stays.

    Raises:
      FileNotFoundError: if there is no folder to write into.
      ValueError: if `path` is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; make it, then write {path.name} there.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it.")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")  # on the same disk, so that moving is atomic
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes or replaces a text file in one step: whoever is interrupted leaves the old one or the new one."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")
