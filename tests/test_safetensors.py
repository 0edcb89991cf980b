"""Weights in safetensors: the same bits come back, and a file that is not whole or not ours says so."""

import builtins
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx

import dsb_jax as dsb
from dsb_jax.methods import TopKAST
from dsb_jax.plan import PlannedLayer, SparsityPlan
from dsb_jax.safetensors_files import load_safetensors, save_safetensors
from dsb_jax.spec import conv_spec
from dsb_jax.topology import with_index
from tests.conftest import make_layout
from tests.topologies import assert_same_bits, make_node, node_of_counts, stacked


def conv_node():
    """Of 6 outputs, which 4 does not divide."""
    return make_node(make_layout(0, (6, 12), (4, 3), (2, 2)), spec=conv_spec((3, 2), 2, 6))


def of_blocks():
    """A convolution and a stack along axis 1 of two layers in bfloat16, one with a group without blocks."""
    nodes = [node_of_counts(seed, (8, 12), (4, 3), counts) for seed, counts in ((0, (3, 0)), (1, (1, 2)))]
    topology = {"conv": {"blocks": conv_node()}, "a/b %": {"blocks": stacked(nodes, 1)}}
    rng = np.random.default_rng(0)
    params = {name: {"blocks": rng.normal(size=node["blocks"].blocks_shape)} for name, node in topology.items()}
    return {"conv": to(np.float32, params["conv"]), "a/b %": to(jnp.bfloat16, params["a/b %"])}, topology


def of_topkast():
    spec = conv_spec((3, 2), 2, 6)
    plan = SparsityPlan((PlannedLayer(("conv",), spec, spec.with_single(20), ""),))
    kernel = np.random.default_rng(0).normal(size=spec.kernel_shape).astype(np.float32)
    return dsb.from_dense({"conv": {"kernel": kernel}}, plan, method=TopKAST(exploration=0.1))


def to(dtype, tree):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.fixture(scope="module", params=[of_blocks, of_topkast], ids=["blocks", "topkast"])
def model(request):
    """Parameters of several dtypes and their topology, on the host."""
    params, topology = jax.device_get(request.param())
    others = {"scale": np.float16([0.5, np.nan]), "seen": np.uint16(3), "none": np.zeros((0, 2), bool)}
    return {"body": params, "others": others}, {"body": topology}


def test_the_same_bits_come_back(model, tmp_path):
    params, topology = model
    path = tmp_path / "model.safetensors"
    save_safetensors(path, params, dsb.without_index(topology))
    loaded, loaded_topology = load_safetensors(path)
    assert_same_bits(jax.device_get(loaded), params)
    # With an index that is made anew, and specs and settings among the structure.
    assert_same_bits(jax.device_get(loaded_topology), jax.device_get(with_index(topology)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((loaded, loaded_topology)))
    with safetensors.safe_open(path, "np") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["topology/body/conv/blocks"])[0]["kernel_shape"] == [3, 2, 2, 6]
    assert {"params/body/conv/blocks", "topology/body/conv/blocks/layout/in_idx", "params/others/seen"} <= names
    assert ("params/body/a%2Fb%20%25/blocks" in names) == ("a/b %" in params["body"])
    assert not any("index" in name for name in names)


def test_dense_weights_are_those_of_to_dense(model, tmp_path):
    params, topology = model
    save_safetensors(tmp_path / "dense.safetensors", params, topology, dense=True)
    loaded, none = load_safetensors(tmp_path / "dense.safetensors")
    assert none == {}
    assert_same_bits(jax.device_get(loaded), jax.device_get(dsb.to_dense(params, topology)))
    with safetensors.safe_open(tmp_path / "dense.safetensors", "np") as file:
        assert file.get_slice("body/conv/kernel").get_shape() == [3, 2, 2, 6]


def test_whole_variables_boxes_and_models_without_sparse_layers(tmp_path):
    node = node_of_counts(0, (8, 12), (4, 3), (2, 1))
    blocks = np.arange(36, dtype=np.float32).reshape(3, 4, 3)
    variables = {"params": {"fc": {"blocks": blocks}}, "batch_stats": {"mean": np.ones(8, np.float32)}}
    save_safetensors(tmp_path / "one", variables, {"params": {"fc": {"blocks": node}}})
    loaded, topology = load_safetensors(tmp_path / "one")
    assert_same_bits(jax.device_get(loaded), variables)
    assert topology["params"]["fc"]["blocks"].spec == node.spec
    save_safetensors(tmp_path / "two", {"fc": {"blocks": nn.Partitioned(blocks.T, (None, None, None))}})
    loaded, topology = load_safetensors(tmp_path / "two")
    assert_same_bits(jax.device_get(loaded), {"fc": {"blocks": np.array(blocks.T, order="C")}})
    assert topology == {}


def test_models_of_nnx_whose_lists_have_numbers(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])

    model = Net(nnx.Rngs(0))
    plan = dsb.nnx.plan(model, sparsity=0.5, block_shape=(4, 4), min_blocks=1)
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1))
    save_safetensors(tmp_path / "net", dsb.nnx.params(model), dsb.nnx.topology(model))
    other = dsb.nnx.load_params(Net(nnx.Rngs(2)), *load_safetensors(tmp_path / "net"))
    assert_same_bits(nnx.state(other), nnx.state(model))


NODE = node_of_counts(0, (8, 12), (4, 3), (2, 1))
PARAMS, TOPOLOGY = {"fc": {"blocks": np.ones((3, 4, 3), np.float32)}}, {"fc": {"blocks": NODE}}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fc": {"blocks": np.ones((2, 4, 3))}}, r"fc/blocks has shape \(2, 4, 3\), its topology is of \(3, 4, 3\)"),
        ({"other": np.ones(3)}, "the tree has 0 arrays at 'fc/blocks'"),
        ({**PARAMS, "list": [np.ones(3)]}, "params/list is a list, which no file holds"),
        ({**PARAMS, "n": {"": np.ones(3)}}, "params/n has the key ''; a file has texts or numbers for names"),
        ({**PARAMS, "key": jax.random.key(0)}, "params/key is key<fry>, which no file holds"),
        (np.ones(3), "params is a ndarray; give nested dictionaries"),
    ],
)
def test_what_no_file_holds_leaves_the_one_that_is_there(params, message, tmp_path):
    (tmp_path / "model").write_text("the last good one")
    with pytest.raises(ValueError, match=message):
        save_safetensors(tmp_path / "model", params, TOPOLOGY)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last good one"]


def damaged(change, tmp_path):
    """A file of one layer whose tensors and metadata were changed."""
    path = tmp_path / "model"
    save_safetensors(path, PARAMS, TOPOLOGY)
    with safetensors.safe_open(path, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    return path


def without(name):
    return lambda tensors, metadata: tensors.pop(name)


def with_tensor(name, array):
    return lambda tensors, metadata: tensors.update({name: array})


def with_metadata(**changes):
    return lambda tensors, metadata: metadata.update(changes)


LAYOUT = "topology/fc/blocks/layout"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{LAYOUT}/in_idx"), f"is damaged: the tensor '{LAYOUT}/in_idx' is missing"),
        (without("params/fc/blocks"), r"is damaged: fc/blocks has no weights, its topology is of \(3, 4, 3\)"),
        (
            with_tensor("params/fc/blocks", np.ones((3, 4, 2), np.float32)),
            r"is damaged: fc/blocks has shape \(3, 4, 2\)",
        ),
        (
            with_tensor(f"{LAYOUT}/in_idx", np.full((3, 3), 12, np.uint16)),
            r"is damaged: topology/fc/blocks: in_idx holds 12, outside 0\.\.11",
        ),
        (with_metadata(**{"topology/fc/blocks": "[1"}), "is damaged: "),
        (with_metadata(**{"topology/fc/blocks": "[3, null]"}), r"is damaged: '\[3, null\]' describes no layer"),
        (with_metadata(**{"topology/fc/blocks": '[{"sizes": 3}, null]'}), "are not the sizes of a layer"),
        (with_metadata(version="7"), "is version 7 .*, this library reads 1"),
        (with_metadata(format="pt"), "was not written by save_safetensors"),
        (with_tensor("params/wide", np.ones(3)), "params/wide is float64, of which jax keeps half; set jax_enable_x64"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(change, message, tmp_path):
    path = damaged(change, tmp_path)
    with pytest.raises(ValueError, match=f"{path}.*{message}") as caught:
        load_safetensors(path)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_none(tmp_path):
    path = damaged(lambda *_: None, tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{path} is damaged, or no safetensors file"):
        load_safetensors(path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_safetensors(tmp_path / "nothing")


def test_unknown_parts_beside_a_layout_are_refused(tmp_path):
    path = damaged(lambda *_: None, tmp_path)
    spec = json.dumps([dataclasses.asdict(NODE.spec), ["Mask", 0.5]])
    with pytest.raises(ValueError, match="keeps 'Mask' beside its layout, which this version does not know"):
        load_safetensors(damaged(with_metadata(**{"topology/fc/blocks": spec}), path.parent))


def test_without_the_package(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (lambda: save_safetensors(tmp_path / "model", PARAMS, TOPOLOGY), lambda: load_safetensors("model")):
        with pytest.raises(ImportError, match=r"safetensors is not installed; pip install 'dsb-jax\[export\]'"):
            call()
