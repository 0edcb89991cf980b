"""Tables of measured layers: which implementation was fastest on a device, and with which tiles.

`python -m experiments.tune` writes a table, nothing else does; `implementation="auto"` reads it while a model is
traced. A table is JSON, one file for each kind of device:

    {
     "format": "dsb_jax tuned 1",
     "device_kind": "NVIDIA H200",
     "versions": {"jax": "0.12.0.1", ...},
     "command": "python -m experiments.tune --models=resnet18",
     "entries": [{
       "layer": {"out": 512, "in_channels": 512, "kernel_size": [3, 3], "strides": [1, 1], "padding": [[1, 1], [1, 1]],
                 "input_size": [4, 4], "batch": 128, "dtype": "bfloat16", "block_shape": [32, 8], "density": 0.1},
       "results": [{"implementation": "pallas", "seconds": 1.2e-4, "tiles": {"forward": {"positions": 128, ...}, ...}},
                   {"implementation": "dense", "seconds": 2.9e-4, "tiles": null}]
     }]
    }

Seconds are of forward and backward together. Files are searched in this order: the one that the environment
variable DSB_JAX_TUNED names, `~/.cache/dsb_jax/<device>.json`, and the one that comes with the package. A table of
another kind of device is passed over.
"""

import dataclasses
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from dsb_jax.layout import BlockLayout
from pallas_kernels.interface import ConvGeometry
from pallas_kernels.tiles import KernelTiles, Tiles

FORMAT = "dsb_jax tuned 1"
VARIABLE = "DSB_JAX_TUNED"
SHIPPED = Path(__file__).parent / "tables"
NEAR = 1.0  # a layer measured nearby differs, all sizes together, by 2 ** NEAR at the most


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """The static sizes of a sparse layer that its speed depends on.

    Attributes:
      out: output features.
      in_channels, kernel_size, strides, padding: as in `ConvGeometry`.
      input_size: height and width of the input; (1, 1) for a linear layer.
      batch: N.
      dtype: name of the dtype of activations and blocks.
      block_shape: (R, C).
      density: stored weights, phantom rows included, over `out * in`.
    """

    out: int
    in_channels: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    input_size: tuple[int, int]
    batch: int
    dtype: str
    block_shape: tuple[int, int]
    density: float

    @classmethod
    def of(
        cls, layout: BlockLayout, *, geometry: ConvGeometry, input_size: tuple[int, int], batch: int, dtype: Any
    ) -> "LayerSizes":
        """The sizes of a layer; the density is exact."""
        (out, in_), (rows, cols) = layout.shape, layout.block_shape
        return cls(
            out, geometry.in_channels, geometry.kernel_size, geometry.strides, geometry.padding, input_size, batch,
            jnp.dtype(dtype).name, layout.block_shape, layout.num_blocks * rows * cols / (out * in_),
        )  # fmt: skip

    @property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(self.in_channels, self.kernel_size, self.strides, self.padding)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the flattened matrix."""
        return self.out, self.geometry.in_features

    @property
    def num_blocks(self) -> int:
        """Exact if the density is."""
        return round(self.density * math.prod(self.shape) / math.prod(self.block_shape))

    @property
    def positions(self) -> int:
        """Output positions of the whole batch: how many products each weight takes part in."""
        return math.prod(self.geometry.output_size(*self.input_size)) * self.batch

    @property
    def is_linear(self) -> bool:
        """A matrix product without any image."""
        return self.geometry == ConvGeometry(self.in_channels) and self.input_size == (1, 1)

    def rounded(self) -> "LayerSizes":
        """The key in a table: two digits of the density, so that a block more or less is the same layer."""
        return dataclasses.replace(self, density=float(f"{self.density:.2g}"))

    def __str__(self) -> str:
        kernel, stride = "x".join(map(str, self.kernel_size)), max(self.strides)
        image = "" if self.is_linear else f", {kernel}/{stride} over {'x'.join(map(str, self.input_size))}"
        rows, cols = self.block_shape
        return (
            f"{self.out}x{self.shape[1]}{image}, batch {self.batch}, {self.dtype}, {rows}x{cols} blocks, "
            f"density {self.density:.2g}"
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """One implementation of a layer: seconds of forward and backward, tiles of its kernels (None: it has none)."""

    implementation: str
    seconds: float
    tiles: KernelTiles | None = None


class Table(NamedTuple):
    """What was measured on one kind of device. The keys of `entries` are rounded, their results fastest first."""

    device_kind: str
    versions: Mapping[str, str]
    command: str
    entries: Mapping[LayerSizes, tuple[Result, ...]]


class Found(NamedTuple):
    """An entry, and for which layer it was measured: the one that was looked up (`exact`) or one like it."""

    layer: LayerSizes
    results: tuple[Result, ...]
    exact: bool


def file_name(device_kind: str) -> str:
    """'NVIDIA H200' -> 'nvidia_h200.json'."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def user_path(device_kind: str) -> Path:
    """Where this user's own table of a device lies, unless DSB_JAX_TUNED says otherwise."""
    return Path.home() / ".cache" / "dsb_jax" / file_name(device_kind)


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
        results = tuple(sorted((_result(r) for r in entry["results"]), key=lambda r: r.seconds))
        names = [result.implementation for result in results]
        if "dense" not in names or len(set(names)) < len(names):
            raise ValueError(f"an entry has results of {', '.join(names)}; dense and each other once are needed")
        entries[_layer(entry["layer"])] = results
    return Table(_text(body["device_kind"]), {k: _text(v) for k, v in body["versions"].items()},
                 _text(body["command"]), entries)  # fmt: skip


def write(path: str | os.PathLike[str], table: Table) -> None:
    """Writes a table in one step: a reader, or a program that is killed, sees the old file or the new one."""
    path = Path(path)
    entries = [
        {"layer": dataclasses.asdict(layer), "results": [dataclasses.asdict(result) for result in results]}
        for layer, results in table.entries.items()
    ]
    head = {"format": FORMAT, "device_kind": table.device_kind, "versions": dict(table.versions)}
    lines = ",\n".join(json.dumps(entry) for entry in entries)  # one line an entry: a change shows as one line
    text = json.dumps({**head, "command": table.command}, indent=1)[:-2] + f',\n "entries": [\n{lines}\n ]\n}}\n'
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def tables(device_kind: str) -> list[Table]:
    """The tables of this kind of device, the user's before the one that comes with the package.

    Raises:
      ValueError: if one of the files is broken, or the one that DSB_JAX_TUNED names is missing.
    """
    paths = [path for path in (user_path(device_kind), SHIPPED / file_name(device_kind)) if path.is_file()]
    if named := os.environ.get(VARIABLE):
        paths.insert(0, Path(named))
    return [table for table in map(load, paths) if table.device_kind == device_kind]


def lookup(layer: LayerSizes, device_kind: str) -> Found | None:
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


def _distance(a: LayerSizes, b: LayerSizes) -> float:
    """The sum of the base-2 logarithms of how sizes differ; infinite if the layers are not of a kind."""

    def kind(s: LayerSizes) -> tuple[Any, ...]:
        return s.kernel_size, s.strides, s.dtype, s.block_shape[0]

    def sizes(s: LayerSizes) -> tuple[float, ...]:
        return s.out, s.in_channels, s.positions, s.density

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


def _layer(fields: dict[str, Any]) -> LayerSizes:
    """The key of an entry; TypeError, KeyError or ValueError if it is none."""
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
    layer = LayerSizes(**{name: read(fields[name]) for name, read in readers.items()})
    if len(layer.padding) != 2 or layer.positions < 1:
        raise ValueError(f"the padding {layer.padding} is not of two sides")
    return layer.rounded()


def _result(fields: dict[str, Any]) -> Result:
    tiles = fields["tiles"]
    if tiles is not None:
        tiles = KernelTiles(
            **{name: Tiles(**{k: _count(v) for k, v in sizes.items()}) for name, sizes in tiles.items()}
        )
    return Result(_text(fields["implementation"]), _positive(fields["seconds"]), tiles)
