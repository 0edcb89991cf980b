"""What a run writes as JSON: whole files or none, and numbers that every reader of JSON knows."""

import json
import math
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """The value with None in place of every number that is not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step, so that an interruption leaves the old one or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value that JSON can hold, indented."""
    write_atomically(path, json.dumps(finite(value), indent=2) + "\n")
