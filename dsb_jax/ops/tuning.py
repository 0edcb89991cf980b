"""Tables of measured layers: which implementation was fastest on a device, and with which tiles.

`python -m experiments.tune` writes a table, nothing else does; `implementation="auto"` reads it while a model is
traced. A table is JSON, one file for each kind of device:

    {
     "format": "dsb_jax tuned 2",
     "device_kind": "NVIDIA H200",
     "versions": {"jax": "0.12.0.1", ...},
     "command": "python -m experiments.tune --models=resnet18",
     "entries": [{
       "layer": {"out": 512, "in_channels": 512, "kernel_size": [3, 3], "strides": [1, 1], "padding": [[1, 1], [1, 1]],
                 "input_size": [4, 4], "batch": 128, "dtype": "bfloat16", "block_shape": [32, 8], "density": 0.1},
       "results": [{"implementation": "pallas", "seconds": {"forward": 2.9e-5, ...},
                    "tiles": {"forward": {"positions": 128, ...}, ...}},
                   {"implementation": "dense", "seconds": {"forward": 9.5e-5, ...}, "tiles": null}]
     }]
    }

The density is of stored weights over `out * in`, rounded to two digits. Seconds are of each pass: "auto" chooses for
each of them.
Files are searched in this order: the one that the environment variable DSB_JAX_TUNED names,
`~/.cache/dsb_jax/<device>.json`, and the one that comes with the package. A table of another kind of device is passed
over, and so is a home that does not exist or cannot be read.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from dsb_jax.drafts import write_text
from dsb_jax.ops.layer_call import LayerCall
from pallas_kernels.interface import ConvGeometry, Passes
from pallas_kernels.tiles import KernelTiles, Tiles

FORMAT = "dsb_jax tuned 2"
VARIABLE = "DSB_JAX_TUNED"
SHIPPED = Path(__file__).parent / "tables"
NEAR = 1.0  # a layer measured nearby differs, all sizes together, by 2 ** NEAR at the most


@dataclasses.dataclass(frozen=True)
class Result:
    """One implementation of a layer: seconds of each pass, tiles of its kernels (None: it has none)."""

    implementation: str
    seconds: Passes
    tiles: KernelTiles | None = None


class Table(NamedTuple):
    """What was measured on one kind of device. The keys of `entries` are rounded."""

    device_kind: str
    versions: Mapping[str, str]
    command: str
    entries: Mapping[LayerCall, tuple[Result, ...]]


class Found(NamedTuple):
    """An entry, and for which layer it was measured: the one that was looked up (`exact`) or one like it."""

    layer: LayerCall
    results: tuple[Result, ...]
    exact: bool


def file_name(device_kind: str) -> str:
    """'NVIDIA H200' -> 'nvidia_h200.json'."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def user_path(device_kind: str) -> Path | None:
    """Where this user's own table of a device lies, unless DSB_JAX_TUNED says otherwise; None without a home."""
    folder = user_folder()
    return None if folder is None else folder / file_name(device_kind)


def user_folder() -> Path | None:
    """Where what was found out on this user's devices is remembered; None without a home."""
    try:
        return Path.home() / ".cache" / "dsb_jax"
    except RuntimeError:  # no HOME, and no entry for the user: a container with a bare user id
        return None


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of these packages; those that are not installed are left out."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def load(path: str | os.PathLike[str]) -> Table:
    """Reads a table; a file that did not change is read once.

    Raises:
      ValueError: if the file cannot be read or is no table, in one line that names it.
    """
    path = Path(path)
    try:
        status = path.stat()
        return _load(path, (status.st_mtime_ns, status.st_size, status.st_ino))
    except OSError as error:
        raise ValueError(f"the tuned table {path} cannot be read: {error.strerror}.") from None
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} is no tuned table ({why}); delete it and write it anew with python -m experiments.tune."
        ) from None


@functools.lru_cache(maxsize=32)
def _load(path: Path, version: tuple[int, ...]) -> Table:
    del version  # part of the key: a file that was replaced is read again
    body = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"it does not begin with the format {FORMAT!r}")
    entries = {}
    for entry in body["entries"]:
        results = tuple(map(_result, entry["results"]))
        names = [result.implementation for result in results]
        if "dense" not in names or len(set(names)) < len(names):
            raise ValueError(f"an entry has results of {', '.join(names)}; dense and each other once are needed")
        entries[_layer(entry["layer"])] = results
    versions = {name: _text(version) for name, version in body["versions"].items()}
    return Table(_text(body["device_kind"]), versions, _text(body["command"]), entries)


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Writes a table in one step: a reader, or a program that is killed, sees the old file or the new one."""
    path = Path(path)
    entries = [
        {"layer": _layer_fields(layer), "results": [_result_fields(result) for result in results]}
        for layer, results in table.entries.items()
    ]
    head = {"format": FORMAT, "device_kind": table.device_kind, "versions": dict(table.versions)}
    lines = ",\n".join(json.dumps(entry) for entry in entries)  # one line an entry: a change shows as one line
    text = json.dumps({**head, "command": table.command}, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n'
    write_text(path, text)


def tables(device_kind: str) -> list[Table]:
    """The tables of this kind of device, the user's before the one that comes with the package.

    Raises:
      ValueError: if one of the files is broken, or the one that DSB_JAX_TUNED names is missing.
    """
    known = user_path(device_kind), SHIPPED / file_name(device_kind)
    # `access` says no where `is_file` raises: folders of somebody else, names that are too long.
    paths = [path for path in known if path is not None and os.access(path, os.R_OK) and path.is_file()]
    if named := os.environ.get(VARIABLE):
        paths.insert(0, Path(named))
    return [table for table in map(load, paths) if table.device_kind == device_kind]


def lookup(layer: LayerCall, device_kind: str) -> Found | None:
    """The entry of a layer, else that of the nearest one measured, else None.

    Near is a layer of the same kernel, strides, dtype and R whose out, in_channels, positions and density differ by no
    more than a factor of 2, all together: twice the batch, or 1.4 times the density at 1.4 times the channels.

    Raises:
      ValueError: as in `tables`.
    """
    found = tables(device_kind)
    key = layer.rounded()
    for table in found:
        if key in table.entries:
            return Found(key, table.entries[key], exact=True)
    for table in found:
        distances = {other: _distance(key, other) for other in table.entries}
        if distances and distances[nearest := min(distances, key=distances.__getitem__)] <= NEAR:
            return Found(nearest, table.entries[nearest], exact=False)
    return None


def _distance(a: LayerCall, b: LayerCall) -> float:
    """The sum of the base-2 logarithms of how sizes differ; infinite if the layers are not of a kind."""

    def kind(call: LayerCall) -> tuple[Any, ...]:
        return call.geometry.kernel_size, call.strides, call.dtype, call.spec.block_shape[0]

    def sizes(call: LayerCall) -> tuple[float, ...]:
        return call.spec.out, call.spec.c_in, call.positions, call.rounded_density

    if kind(a) != kind(b) or not min(*sizes(a), *sizes(b)) > 0:
        return math.inf
    return sum(abs(math.log2(x / y)) for x, y in zip(sizes(a), sizes(b), strict=True))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is not a positive number")
    return float(value)


def _count(value: Any, least: float = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is not a whole number of at least {least}")
    return value


def _pair(value: Any, least: float = 1) -> tuple[int, int]:
    first, second = value
    return _count(first, least), _count(second, least)


def _layer_fields(call: LayerCall) -> dict[str, Any]:
    """The key of an entry as JSON has it."""
    return {
        "out": call.spec.out,
        "in_channels": call.spec.c_in,
        "kernel_size": call.geometry.kernel_size,
        "strides": call.strides,
        "padding": call.padding,
        "input_size": call.input_size,
        "batch": call.batch,
        "dtype": call.dtype,
        "block_shape": call.spec.block_shape,
        "density": call.rounded_density,
    }


def _layer(fields: dict[str, Any]) -> LayerCall:
    """The inverse of `_layer_fields`; TypeError, KeyError or ValueError if it is none."""
    readers: dict[str, Any] = {
        "out": _count,
        "in_channels": _count,
        "kernel_size": _pair,
        "strides": _pair,
        "padding": lambda value: tuple(_pair(sides, -math.inf) for sides in value),
        "input_size": _pair,
        "batch": _count,
        "dtype": _text,
        "block_shape": _pair,
        "density": _positive,
    }
    if set(fields) != set(readers):
        raise ValueError(f"a layer has the fields {', '.join(sorted(fields))}")
    read = {name: reader(fields[name]) for name, reader in readers.items()}
    if len(read["padding"]) != 2:
        raise ValueError(f"the padding {read['padding']} is not of two sides")
    geometry = ConvGeometry(read["in_channels"], read["kernel_size"], read["strides"], read["padding"])
    sizes = {name: read[name] for name in ("block_shape", "input_size", "batch", "dtype")}
    call = LayerCall.of(read["out"], geometry, num_blocks=1, **sizes)
    call.geometry.output_size(*call.input_size)  # a kernel larger than its input
    return call.with_density(read["density"])


def _result_fields(result: Result) -> dict[str, Any]:
    tiles = None if result.tiles is None else dataclasses.asdict(result.tiles)
    return {"implementation": result.implementation, "seconds": result.seconds._asdict(), "tiles": tiles}


def _result(fields: dict[str, Any]) -> Result:
    tiles = fields["tiles"]
    if tiles is not None:
        read: dict[str, Any] = {
            name: None if sizes is None else Tiles(**{k: _count(v) for k, v in sizes.items()})
            for name, sizes in tiles.items()
        }
        tiles = KernelTiles(**read)
    seconds = Passes(**{name: _positive(value) for name, value in fields["seconds"].items()})
    return Result(_text(fields["implementation"]), seconds, tiles)
