"""What a run writes as JSON: whole files or none, and numbers that every reader of JSON knows."""

import json
import math
from pathlib import Path
from typing import Any

from dsb_jax.drafts import write_text


def finite(value: Any) -> Any:
    """The value with None in place of every number that is not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes a value that JSON can hold, indented."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")
