"""Are the GPU kernels right on this device? Asked once for each kind of device, R and dtype, and remembered.

No test of this library runs on the GPU of its user. So before "auto" takes a kernel there for the first time, its three
passes are compared with the specification (`pallas_kernels.reference`) on the device itself: a linear layer and a
strided convolution, some seconds. What came out lies in `~/.cache/dsb_jax/checks_DEVICE.json`, by the versions that it
was found out with; without a home it is known to this process alone. A kernel that fails is said once, and "auto" takes
the dense product in its place. An implementation that is asked for by name is not checked.
"""

import functools
import importlib
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsb_jax.drafts import write_text
from dsb_jax.layout import random_layout
from dsb_jax.ops import tuning
from dsb_jax.ops.implementations import kernels_of
from pallas_kernels.interface import ConvGeometry, Kernels, Passes, matmul_geometry

FORMAT = "dsb_jax checks 1"
PASSED = "passed"
# Of the largest entry of a result: TF32 has 10 bits, bfloat16 8, float16 10.
_TOLERANCES = {("float32", False): 5e-3, ("float32", True): 2e-5, ("bfloat16", False): 1e-2, ("float16", False): 5e-3}

# name: geometry, height and width, batch
_CASES = {
    "a linear layer": (matmul_geometry(256), (1, 1), 264),
    "a convolution": (ConvGeometry(24, (3, 3), (1, 2), ((1, 1), (1, 0))), (6, 7), 40),
}
_found: dict[tuple[str, str], str] = {}  # (device, what) -> PASSED or the failure
_lock = threading.Lock()


def failure(implementation: str, rows: int, dtype: str, exact: bool, device_kind: str) -> str | None:
    """What is wrong with the kernels of an implementation on this process' device; None if they are right.

    Args:
      implementation: "pallas" or "triton".
      rows: R.
      dtype: of activations and blocks.
      exact: whether float32 is multiplied in IEEE arithmetic.
      device_kind: name of the device.
    """
    exact = exact and dtype == "float32"
    what = f"{implementation} R={rows} {dtype}{' exact' if exact else ''}"
    with _lock:
        if (device_kind, what) not in _found:
            outcome = _remembered(device_kind).get(what)
            if outcome is None:
                # In a thread of its own: this one may be tracing a model, under settings that are nobody's here.
                with ThreadPoolExecutor(1) as pool:
                    outcome = pool.submit(check, kernels_of(implementation), rows, dtype, exact).result()
                _remember(device_kind, what, outcome)
            if outcome != PASSED:
                warnings.warn(
                    f"the {implementation} kernels for {rows} rows of {dtype} are wrong on {device_kind} ({outcome}): "
                    f'"auto" takes the dense product. Please report it; to check again, delete {_path(device_kind)}.',
                    stacklevel=2,
                )
            _found[device_kind, what] = outcome
        outcome = _found[device_kind, what]
    return None if outcome == PASSED else outcome


def check(kernels: Kernels, rows: int, dtype: str, exact: bool) -> str:
    """`PASSED`, or which pass of which case is off by how much, or what it raised."""
    try:
        for name, (geometry, input_size, batch) in _CASES.items():
            errors = _errors(kernels, geometry, input_size, batch, rows, dtype, exact)
            for of, error in errors._asdict().items():
                if not error <= _TOLERANCES[dtype, exact]:
                    return f"{of} of {name} is off by {error:.1e}, tolerated {_TOLERANCES[dtype, exact]:.0e}"
    except Exception as error:  # whatever a compiler or a device may say: the dense product serves
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return PASSED


def _errors(
    kernels: Kernels,
    geometry: ConvGeometry,
    input_size: tuple[int, int],
    batch: int,
    rows: int,
    dtype: str,
    exact: bool,
) -> Passes:
    """The largest deviation of each pass from the reference, over the largest entry."""
    reference: Kernels = importlib.import_module("pallas_kernels.reference").REFERENCE
    out, precision = 3 * rows - rows // 2, "highest" if exact else None  # the last group has phantom rows
    keys = jax.random.split(jax.random.key(0), 4)
    shape, cols = (out, geometry.in_features), 8

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def run(kernels: Kernels, dtype: str, precision: str | None, keys: jax.Array) -> Passes:
        layout = random_layout(keys[0], shape, block_shape=(rows, cols), num_blocks=3 * (shape[1] // cols) // 2)
        sizes = (geometry.in_channels, *input_size, batch), (out, *geometry.output_size(*input_size), batch)
        # Rounded first: both see the same numbers.
        x, dy = (jax.random.normal(k, s).astype(given).astype(dtype) for k, s in zip(keys[1:3], sizes, strict=True))
        blocks = jax.random.normal(keys[3], (layout.num_blocks, rows, cols)).astype(given).astype(dtype)
        index, options = layout.index, {"geometry": geometry, "precision": precision}
        return Passes(
            kernels.forward(x, blocks, index, out=out, **options),
            kernels.input_gradient(dy, blocks, index, input_size=input_size, **options),
            kernels.weight_gradient(x, dy, index, dtype=jnp.float32, **options),
        )

    given = dtype
    got, wanted = run(kernels, dtype, precision, keys), run(reference, "float32", "highest", keys)
    errors = []
    for a, b in zip(got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        errors.append(float(np.max(np.abs(a - b)) / np.max(np.abs(b))))
    return Passes(*errors)


def _versions() -> dict[str, str]:
    """What the kernels depend on beside the device."""
    return tuning.installed_versions(
        ("dsb-jax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "triton")
    )


def _path(device_kind: str) -> Path | None:
    folder = tuning.user_folder()
    return None if folder is None else folder / f"checks_{tuning.file_name(device_kind)}"


def _remembered(device_kind: str) -> dict[str, str]:
    """Outcomes by what was checked; nothing if there is no file, or it is damaged or of other versions."""
    path = _path(device_kind)
    if path is None or not os.access(path, os.R_OK):
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        same = body["format"] == FORMAT and body["device_kind"] == device_kind and body["versions"] == _versions()
        checks = body["checks"]
        known = {str(what): str(outcome) for what, outcome in checks.items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # damaged: what it held is found out anew and the file written over
    return known


def _remember(device_kind: str, what: str, outcome: str) -> None:
    path = _path(device_kind)
    if path is None:
        return
    body = {
        "format": FORMAT, "device_kind": device_kind, "versions": _versions(),
        "checks": {**_remembered(device_kind), what: outcome},
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(body, indent=1) + "\n")
    except OSError as error:  # a home that cannot be written: each process finds out for itself
        warnings.warn(f"what was checked on {device_kind} is not remembered: {path}: {error.strerror}.", stacklevel=2)
