"""The tests of the native kernels once more, with kernels that stop at a wrong access to memory or undefined result."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "dsb_jax/ops/native").glob("*.cc"))
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"]


def preloaded() -> str | None:
    """What must be loaded before Python, as g++ finds it: the sanitizer, and the library whose `throw` it watches."""
    if not shutil.which("g++"):
        return None
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return " ".join(found) if all(os.path.isabs(path) for path in found) else None


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux" or not preloaded(), reason="needs g++ and its libasan")
def test_native_kernels_under_sanitizers():
    library = ROOT / "build/sanitized/library.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    include = ["-isystem", jax.ffi.include_dir()]
    subprocess.run(
        ["g++", "-std=c++17", "-fPIC", "-shared", "-w", *FLAGS, *include, *SOURCES, "-o", library], check=True
    )
    environment = {
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DSB_JAX_NATIVE_LIBRARY": str(library),
    }
    tests = [path for path in ROOT.glob("tests/test_native*.py") if path != Path(__file__).resolve()]
    assert tests
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout  # all are skipped if the library does not load
