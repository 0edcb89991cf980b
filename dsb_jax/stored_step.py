"""One step of a checkpoint on disk: which files make it whole, and reading them, with every bit checked.

Only `dsb_jax.checkpoint` writes and finds such steps. All arrays come back as numpy arrays by their names, so that
nothing has to be known of the tree that was saved; `fill` puts them into the structure of such a tree.

The checksums are needed: Orbax notices files that are gone or cut short, but reads flipped bits of a weight or of an
index without a word.
"""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dsb_jax.paths import key_name, path_name
from dsb_jax.topology import without_index
from dsb_jax.train_state import TrainState

JSON_FILE = "metadata"  # Orbax's name for the file of a JSON item
CONFIG_ITEMS = ("config", "recipe")  # the second was its name until version 0.1
_ARRAY_FILES = ("_METADATA", "manifest.ocdbt")  # of an item of arrays; without the second Orbax finds no array


class CheckpointError(ValueError):
    """A checkpoint or a working directory that cannot be used: its path, what is wrong with it, and the cure."""


class StoredStep(NamedTuple):
    """What one step holds, on the host.

    Attributes:
      directory: of the step.
      config: of the run.
      arrays: of the state, by names such as `params/conv_1/blocks`.
      key_impls: name of each array that is the data of a PRNG key -> its implementation.
      extra: nested dicts of numpy arrays, as saved.
      host: values of the host.
    """

    directory: Path
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    key_impls: dict[str, str]
    extra: dict[str, Any]
    host: dict[str, Any]


def by_name(tree: Any) -> dict[str, Any]:
    """Leaves by names such as `params/conv_1/blocks`: equal for a dataclass and for the dicts that Orbax returns."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(tuple(map(key_name, path))): leaf for path, leaf in leaves}


def checksums(arrays: dict[str, Any], **texts: Any) -> dict[str, int]:
    """CRC-32 by name of arrays, and of values that go to JSON."""
    sums = {name: zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)) for name, leaf in arrays.items()}
    return sums | {name: zlib.crc32(json.dumps(value, sort_keys=True).encode()) for name, value in texts.items()}


def brief(error: BaseException) -> str:
    """One line of at most 200 characters; Orbax's messages run to thousands."""
    text = str(error).split(" [tensorstore_spec", 1)[0].split("\n", 1)[0]
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"


def config_item(directory: Path) -> str:
    """The name of the item that holds the config."""
    return next((name for name in CONFIG_ITEMS if (directory / name).exists()), CONFIG_ITEMS[0])


def missing_file(directory: Path) -> str | None:
    """The first file without which a step is no step, relative to it; None if the step is whole.

    A step that is being removed loses its files in any order, and a process can be killed in between.
    """
    files = [f"{item}/{JSON_FILE}" for item in (config_item(directory), "host", "checksums")]
    files += ["metrics/metrics", *(f"state/{name}" for name in _ARRAY_FILES)]
    for file in files:
        if not (directory / file).exists():
            return file
    try:
        expected = read_json(directory / "checksums" / JSON_FILE, "")
    except CheckpointError:
        return None  # damaged, not missing; whoever reads the step is told
    files = [f"keys/{JSON_FILE}"] if "keys" in expected else []
    files += [f"extra/{name}" for name in _ARRAY_FILES] if _has_extra(expected) else []
    return next((file for file in files if not (directory / file).exists()), None)


def read_step(directory: Path, cure: str) -> StoredStep:
    """Everything in a step, after its checksums were compared.

    Args:
      directory: of the step.
      cure: the last sentence of every error.

    Raises:
      CheckpointError: if a file is missing, or anything differs from what was saved.
    """
    config_name = config_item(directory)
    config, host, expected = (
        read_json(directory / item / JSON_FILE, cure) for item in (config_name, "host", "checksums")
    )
    texts: dict[str, Any] = {config_name: config, "host": host}
    if "keys" in expected:
        texts["keys"] = read_json(directory / "keys" / JSON_FILE, cure)
    state = _read_arrays(directory / "state", cure)
    extra = _read_arrays(directory / "extra", cure) if _has_extra(expected) else {}
    found = checksums(by_name({"state": state, "extra": extra}), **texts)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{directory}: {name} has checksum {found.get(name)}, but {expected.get(name)} was saved; "
                f"its bits have changed. {cure}"
            )
    return StoredStep(directory, config, by_name(state), texts.get("keys", {}), extra, host)


def fill(like: Any, stored: StoredStep, cure: str) -> Any:
    """The stored arrays in the structure of `like`, on the host, after names, shapes, dtypes and keys were compared.

    Args:
      like: a tree of arrays or of `jax.ShapeDtypeStruct`; the indexes of its nodes, which no step holds, are left out.
      stored: as `read_step` returns it.
      cure: the last sentence of every error.

    Raises:
      CheckpointError: for the first name that differs.
    """
    like = without_index(like)
    wanted = by_name(like)
    data = by_name(jax.eval_shape(lambda tree: jax.tree.map(_key_data, tree), like))
    for name in data | stored.arrays:
        have, want = (f"{x[name].dtype}{list(x[name].shape)}" if name in x else "absent" for x in (stored.arrays, data))
        if have != want:
            raise CheckpointError(
                f"{stored.directory}: {name} is {have}, but {want} in the model to be restored; "
                f"the state is of another model. {cure}"
            )
    impls = key_impls(like)
    for name, impl in impls.items():
        if stored.key_impls.get(name) != impl:
            raise CheckpointError(
                f"{stored.directory}: {name} is a key of {stored.key_impls.get(name)!r}, not of {impl!r}; "
                "restore with a key of that implementation."
            )
    leaves = [
        jax.random.wrap_key_data(jnp.asarray(stored.arrays[name]), impl=impls[name])
        if is_key(leaf)
        else stored.arrays[name]
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key, which no file can hold as it is."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impls(tree: Any) -> dict[str, str]:
    """The implementation of every PRNG key in a tree, by the name of its array."""
    keys = {name: leaf for name, leaf in by_name(tree).items() if is_key(leaf)}
    impls: dict[str, str] = {}
    # Traced, as `key_impl` takes no jax.ShapeDtypeStruct.
    jax.eval_shape(lambda x: impls.update({name: str(jax.random.key_impl(key)) for name, key in x.items()}), keys)
    return impls | ({"key": tree.key_impl} if isinstance(tree, TrainState) else {})


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _has_extra(expected: dict[str, Any]) -> bool:
    return any(name.startswith("extra/") for name in expected)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Reads arrays in turn: of concurrent reads, those pending at the first error print tracebacks of their own."""

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        arrays: list[np.ndarray] = []
        for info, arg in zip(infos, args or [ocp.RestoreArgs()] * len(infos), strict=True):
            arrays += await super().deserialize([info], [arg])
        return arrays


def _handler() -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _OneByOne()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is saved, but Orbax warns of a registry without
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


_ERRORS_OF_ORBAX = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)  # deleted, cut, overwritten


def _read_arrays(directory: Path, cure: str) -> Any:
    """Nested dicts of numpy arrays."""
    try:
        return ocp.Checkpointer(_handler()).restore(directory)
    except _ERRORS_OF_ORBAX as error:
        what = "missing or incomplete" if isinstance(error, FileNotFoundError) else "damaged"
        raise CheckpointError(f"{directory} is {what} ({brief(error)}). {cure}") from error


def check_readable(directory: Path, cure: str) -> None:
    """Raises CheckpointError unless the step is whole and Orbax finds each of its arrays; reads no values."""
    if file := missing_file(directory):
        raise CheckpointError(f"{directory} lacks {file}; it was not written to the end. {cure}")
    expected = read_json(directory / "checksums" / JSON_FILE, cure)
    for item in ("state", "extra") if _has_extra(expected) else ("state",):
        try:
            found = by_name({item: _handler().metadata(directory / item).tree})
        except _ERRORS_OF_ORBAX as error:
            raise CheckpointError(f"{directory / item} cannot be read back ({brief(error)}). {cure}") from error
        lost = [name for name in expected if name.startswith(f"{item}/") and name not in found]
        if lost:
            raise CheckpointError(f"{directory / item} was written without {lost[0]}. {cure}")


def read_json(file: Path, cure: str) -> dict[str, Any]:
    """The named values of a JSON file; anything else is a CheckpointError."""
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is no regular file. {cure}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise CheckpointError(f"{file} is {what} ({brief(error)}). {cure}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds {str(values)[:40]!r}, not named values. {cure}")
    return values
