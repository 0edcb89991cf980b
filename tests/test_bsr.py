"""Layers as block sparse rows: the same products, no padding but phantom rows."""

import jax
import numpy as np
import pytest

import dsb_jax as dsb
from dsb_jax.bsr import to_bsr
from dsb_jax.layout import BlockLayout
from dsb_jax.methods import TopKAST
from dsb_jax.plan import PlannedLayer, SparsityPlan
from dsb_jax.spec import conv_spec
from tests.topologies import make_node, node_of_counts, stacked


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_the_example_of_the_docstring():
    arrays = ([[2, 0], [1, 3]], [[3, 1], [0, 2], [1, 2]], [0, 2, 3])
    layout = BlockLayout(*(np.array(array, np.int32) for array in arrays), (4, 4), (2, 2))
    blocks = np.arange(1, 13, dtype=np.float32).reshape(3, 2, 2)
    ((path, layer),) = to_bsr({"fc": {"blocks": blocks}}, {"fc": {"blocks": make_node(layout)}}).items()
    assert path == ("fc",)
    assert layer.matrix.blocksize == (2, 1)
    assert [a.tolist() for a in (layer.rows, layer.matrix.indptr, layer.matrix.indices)] == [
        [2, 0, 1, 3], [0, 4, 6], [0, 1, 2, 3, 1, 2]
    ]  # fmt: skip
    # Row 2 reads columns 3, 1, 0, 2 with the weights 1, 2, 5, 6.
    np.testing.assert_array_equal(layer.matrix.toarray()[0], [5, 2, 6, 1])
    np.testing.assert_array_equal(layer.product(np.eye(4, dtype=np.float32))[2], [5, 2, 6, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_the_kernel(dtype):
    """Of a ragged layer, an empty group, and stacks along the second axis and along two."""
    one, other = (node_of_counts(seed, (10, 12), (4, 3), counts) for seed, counts in ((0, (3, 0, 2)), (1, (1, 2, 2))))
    topology = {"one": one, "stack": stacked([one, other], 1), "deep": stacked([stacked([one, other])] * 2)}
    topology = {name: {"blocks": node} for name, node in topology.items()}
    params = {name: {"blocks": normal(*node["blocks"].blocks_shape).astype(dtype)} for name, node in topology.items()}
    layers, dense = to_bsr(params, topology), jax.device_get(dsb.to_dense(params, topology))
    assert set(layers) == {("one",), ("stack", 0), ("stack", 1), *(("deep", i, j) for i in (0, 1) for j in (0, 1))}
    x = normal(12, 3)
    for (name, *place), layer in layers.items():
        kernel = dense[name]["kernel"].astype(np.float32)
        kernel = kernel[:, place[0]] if name == "stack" else kernel[tuple(place)]
        assert (layer.matrix.shape, layer.matrix.nnz, layer.matrix.dtype) == ((12, 12), 5 * 12, np.float32)
        assert not layer.matrix.toarray()[layer.rows >= 10].any()
        np.testing.assert_allclose(layer.product(x), kernel.T @ x, atol=1e-5)
        np.testing.assert_allclose(layer.product(x[:, 0]), kernel.T @ x[:, 0], atol=1e-5)


def test_top_kast_comes_as_it_computes():
    spec = conv_spec((3, 2), 2, 6)
    plan = SparsityPlan((PlannedLayer(("conv",), spec, spec.with_single(20), ""),))
    dense = {"conv": {"kernel": normal(*spec.kernel_shape)}}
    params, topology = dsb.from_dense(dense, plan, method=TopKAST())
    (layer,) = to_bsr(params, topology).values()
    assert layer.matrix.nnz == 20
    kernel = np.asarray(dsb.to_dense(params, topology)["conv"]["kernel"])
    np.testing.assert_array_equal(layer.product(np.eye(12, dtype=np.float32)), kernel.reshape(12, 6).T)


def test_what_does_not_belong_together_is_refused():
    node = node_of_counts(0, (8, 12), (4, 3), (2, 1))
    with pytest.raises(ValueError, match=r"fc/blocks has shape \(2, 4, 3\), its topology is of \(3, 4, 3\)"):
        to_bsr({"fc": {"blocks": normal(2, 4, 3)}}, {"fc": {"blocks": node}})
