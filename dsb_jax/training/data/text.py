"""The source code of Python's own library as a set of characters, which every Python ships: a language to model.

The text is cut into windows of `CONTEXT` characters; the label of each is the next one. Every eighth file, in order of
its path, is held out; of these files the test windows are an even sample.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

NAME = "python_text"
CONTEXT = 96
VOCABULARY = 97  # 95 printable characters, the end of a line, and one for whatever else there is
NUM_TEST_WINDOWS = 896

_NEWLINE, _OTHER = 95, 96
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__")

Windows = tuple[UInt8[np.ndarray, "_ T"], Int[np.ndarray, "_ T"]]


def to_codes(text: bytes) -> UInt8[np.ndarray, "n"]:
    """One number below `VOCABULARY` for each byte."""
    table = np.full(256, _OTHER, np.uint8)
    table[32:127] = np.arange(95)
    table[ord("\n")] = _NEWLINE
    return table[np.frombuffer(text, np.uint8)]


def read_windows(folder: Path | None = None) -> tuple[Windows, Windows]:
    """Characters and next characters of the training and of the test windows.

    Args:
      folder: of Python files; by default the library of the Python that runs.

    Returns:
      For either split uint8[n, CONTEXT] and int32[n, CONTEXT].

    Raises:
      FileNotFoundError: if there are not enough files there.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    files = [path for path in sorted(root.rglob("*.py")) if not set(path.relative_to(root).parts) & set(_LEFT_OUT)]
    train, test = (_windows(some) for some in ([path for i, path in enumerate(files) if i % 8], files[::8]))
    if len(train) < NUM_TEST_WINDOWS or len(test) < NUM_TEST_WINDOWS:
        raise FileNotFoundError(
            f"data set {NAME!r} needs the sources of Python's library, and {root} has {len(files)} of its files; use a "
            "Python that was installed with them."
        )
    test = test[np.linspace(0, len(test) - 1, NUM_TEST_WINDOWS).astype(int)]
    return _split(train), _split(test)


def _windows(files: Sequence[Path]) -> UInt8[np.ndarray, "n T+1"]:
    """Windows that share one character with the next, so that every character but the first is predicted once."""
    codes = to_codes(b"\n".join(path.read_bytes() for path in files))
    count = max((len(codes) - 1) // CONTEXT, 0)
    starts = CONTEXT * np.arange(count)[:, None]
    return codes[starts + np.arange(CONTEXT + 1)]


def _split(windows: UInt8[np.ndarray, "n T+1"]) -> Windows:
    return windows[:, :-1].copy(), windows[:, 1:].astype(np.int32)
