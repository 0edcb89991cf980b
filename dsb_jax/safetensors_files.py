"""Weights in the format of safetensors: packed, with all that makes the sparse model again, or dense for anybody else.

    save_safetensors("model.safetensors", params, topology)
    params, topology = load_safetensors("model.safetensors")            # the same bits

    save_safetensors("dense.safetensors", params, topology, dense=True)     # kernels, as `to_dense` makes them

A packed file has these tensors, and of each sparse layer its `LayerSpec` as JSON in the metadata, under the name of its
node (with the name and the setting of what Top-KAST keeps, if it is that):

    params/Conv_0/blocks                         float[num_blocks, R, C]
    params/Conv_0/bias                           whatever else there is, under its path
    topology/Conv_0/blocks/layout/out_idx        int32[num_groups, R], and so on: `BlockLayout`
    topology/Conv_0/blocks/aux/forward_mask      `ForwardSet`

A dense file has the parameters under their paths alone. No file holds a `KernelIndex`; loading makes it anew. A
character in a name that is no letter, digit or one of `_.-~` is written as in an URL, `%2F` for a slash.
"""

import os
import types
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np

from dsb_jax.boxes import BOX, unboxed
from dsb_jax.convert import to_dense
from dsb_jax.drafts import draft_of
from dsb_jax.layout import BlockLayout
from dsb_jax.methods.topkast import ForwardSet
from dsb_jax.paths import Path, nested, nodes, path_name, validate_topology, weights_at
from dsb_jax.static_json import from_json, to_json
from dsb_jax.topology import LayerTopology, with_index

PARAMS, TOPOLOGY = "params", "topology"  # the first part of the names in a packed file
FORMAT, VERSION, PACKED, DENSE = "dsb_jax", "1", "packed", "dense"
LAYOUT = ("out_idx", "in_idx", "group_start")
AUX = ("forward_mask", "reserve")  # of a `ForwardSet`
# What NumPy reads back from a file; safetensors has more.
DTYPES = {"bool", "float16", "bfloat16", "float32", "float64"} | {
    f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)
}


def save_safetensors(path: str | os.PathLike[str], params: Any, topology: Any = None, *, dense: bool = False) -> None:
    """Writes parameters, sparse or made dense. The file is whole or not there.

    Args:
      path: of the file; its folder is there already.
      params: nested dictionaries of arrays; boxes (`nn.Partitioned`) are opened. Whole variables are a tree like any:
        `{"params": params, "batch_stats": ...}` with `{"params": topology}`.
      topology: that belongs to them; None if nothing is sparse.
      dense: write the kernels of the equal dense model instead of blocks and topology.

    Raises:
      ValueError: if the trees do not belong together, or hold something else than arrays in dictionaries.
      ImportError: without safetensors.
    """
    safetensors = _safetensors()
    if not isinstance(params, Mapping):
        raise ValueError(f"params is a {type(params).__name__}; give nested dictionaries of arrays.")
    found = nodes({} if topology is None else topology)
    for at, weights in weights_at(params, found).items():
        if jnp.shape(weights) != found[at].blocks_shape:
            raise ValueError(
                f"{path_name(at)} has shape {jnp.shape(weights)}, its topology is of {found[at].blocks_shape}; pass "
                "the topology that belongs to these parameters."
            )
    metadata = {"format": FORMAT, "version": VERSION, "weights": DENSE if dense else PACKED}
    if dense:
        tensors = _tensors(to_dense(params, topology) if found else params, ())
    else:
        tensors = _tensors(params, (PARAMS,))
        for at, node in found.items():
            name = _name((TOPOLOGY, *at))
            tensors |= {f"{name}/layout/{field}": getattr(node.layout, field) for field in LAYOUT}
            if node.aux is not None:
                tensors |= {f"{name}/aux/{field}": getattr(node.aux, field) for field in AUX}
            metadata[name] = to_json((node.spec, None if node.aux is None else (ForwardSet.__name__, node.aux.penalty)))
    arrays = {name: _array(name, leaf) for name, leaf in tensors.items()}
    with draft_of(path) as draft:
        safetensors.numpy.save_file(arrays, draft, metadata=metadata)


def load_safetensors(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Reads what `save_safetensors` wrote, all of it checked.

    Returns:
      Parameters and topology, which is empty if the file is dense; nested dictionaries of arrays on the default device.

    Raises:
      ValueError: if the file is damaged, or of something else.
      FileNotFoundError: if there is none.
      ImportError: without safetensors.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            _check_format(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}); write or copy it again.") from error
    for name, array in arrays.items():
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise ValueError(f"{path}: {name} is {array.dtype}, of which jax keeps half; set jax_enable_x64.")
    if metadata["weights"] == DENSE:
        return nested({_path(name): jnp.asarray(array) for name, array in arrays.items()}), {}
    params = {_path(name)[1:]: array for name, array in arrays.items() if name.startswith(f"{PARAMS}/")}
    try:
        layers = {
            _path(name)[1:]: _node(name, static, arrays)
            for name, static in metadata.items()
            if name.startswith(f"{TOPOLOGY}/")
        }
        validate_topology(nested(layers))
        for at, node in layers.items():
            if at not in params or params[at].shape != node.blocks_shape:
                have = f"shape {params[at].shape}" if at in params else "no weights"
                raise ValueError(f"{path_name(at)} has {have}, its topology is of {node.blocks_shape}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; write or copy it again.") from error
    return jax.tree.map(jnp.asarray, nested(params)), with_index(jax.tree.map(jnp.asarray, nested(layers)))


def _safetensors() -> types.ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors is not installed; pip install 'dsb-jax[export]'.") from error
    return safetensors


def _name(path: Path) -> str:
    return "/".join(quote(part, safe="") for part in path)


def _path(name: str) -> Path:
    return tuple(map(unquote, name.split("/")))


def _tensors(tree: Any, at: Path) -> dict[str, Any]:
    """Every array of nested dictionaries by its name."""
    if isinstance(tree, Mapping):
        items = [_tensors(value, (*at, str(key))) for key, value in tree.items() if _check_key(key, at)]
        return {name: leaf for tensors in items for name, leaf in tensors.items()}
    return {_name(at): unboxed(tree) if isinstance(tree, BOX) else tree}


def _check_key(key: Any, at: Path) -> bool:
    if key == "" or not isinstance(key, str | int):
        raise ValueError(f"{path_name(at) or 'the tree'} has the key {key!r}; a file has texts or numbers for names.")
    return True


def _array(name: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "dtype") or str(leaf.dtype) not in DTYPES:
        what = f"{leaf.dtype}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
        raise ValueError(f"{name} is {what}, which no file holds; give nested dictionaries of arrays of numbers.")
    return np.array(jax.device_get(leaf), order="C")  # the format knows no strides


def _check_format(path: Any, metadata: Mapping[str, str]) -> None:
    found = metadata.get("format"), metadata.get("version"), metadata.get("weights")
    if found[0] != FORMAT:
        raise ValueError(f"{path} was not written by save_safetensors; load it as what it is, and use from_dense.")
    if found[1] != VERSION or found[2] not in (PACKED, DENSE):
        raise ValueError(
            f"{path} is version {found[1]} ({found[2]}), this library reads {VERSION}; use the version that wrote it."
        )


def _node(name: str, static: str, arrays: Mapping[str, Any]) -> LayerTopology:
    """One node, from its arrays and the JSON beside them.

    Raises:
      ValueError: if they do not make one.
    """
    try:
        spec, kept = from_json(static)
        out_idx, in_idx, group_start = (arrays[f"{name}/layout/{field}"] for field in LAYOUT)
        layout = BlockLayout(out_idx, in_idx, group_start, spec.shape, spec.block_shape)
        if kept is None:
            return LayerTopology(layout, None, spec)
        kind, penalty = kept
        if kind != ForwardSet.__name__:
            raise ValueError(f"{name} keeps {kind!r} beside its layout, which this version does not know")
        forward_mask, reserve = (arrays[f"{name}/aux/{field}"] for field in AUX)
        return LayerTopology(layout, ForwardSet(forward_mask, reserve, penalty), spec)
    except KeyError as error:
        raise ValueError(f"the tensor {error} is missing") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{static!r} describes no layer ({name})") from error
