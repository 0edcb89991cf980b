"""`KernelIndex`: what products derive from a layout, by its laws; made when the layout changes, never in a step."""

import dataclasses
import functools
import re
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import dsb_jax as dsb
from dsb_jax.checkpoint import Checkpoints, restore
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import DSB, RigL
from dsb_jax.ops import sparse_matmul
from dsb_jax.paths import nodes
from pallas_kernels import KernelIndex
from pallas_kernels.kernel_index import CHUNK_COLUMNS, cut_panels, cut_pieces, derive, entries_for, invert
from tests.classifiers import by_numpy
from tests.conftest import make_layout

ALL = tuple(field.name for field in dataclasses.fields(KernelIndex))


@st.composite
def layouts(draw):
    rows, cols, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    in_ = draw(st.integers(cols, 20))
    counts = tuple(draw(st.integers(0, in_ // cols)) for _ in range(groups))
    counts = (*counts[:-1], max(1, counts[-1]))
    return make_layout(draw(st.integers(0, 9)), (groups * rows, in_), (rows, cols), counts)


@settings(max_examples=4)
@given(layouts())
def test_what_every_entry_means(layout):
    index = jax.tree.map(np.asarray, derive(layout.index, layout.shape[1], ALL))
    out_idx, in_idx, start = (np.asarray(array) for array in layout.index[:3])
    np.testing.assert_array_equal(index.row_place[out_idx.reshape(-1)], np.arange(out_idx.size))
    groups = np.repeat(np.arange(layout.num_groups), np.diff(start))
    np.testing.assert_array_equal(index.block_group, groups)
    # Pieces: every block once, in its place, none beside a block of another group.
    pieces = index.pieces
    np.testing.assert_array_equal(pieces.blocks.reshape(-1)[pieces.place], np.arange(layout.num_blocks))
    assert (pieces.blocks >= 0).sum() == layout.num_blocks
    for group, blocks in zip(pieces.group, pieces.blocks, strict=True):
        assert (groups[blocks[blocks >= 0]] == group).all()
    used = (pieces.blocks >= 0).any(axis=1)
    assert (np.sort(used)[::-1] == used).all()  # used ones first
    # The inverse: panel columns by the input column that they read, equal ones in their own order.
    first, rank = index.inverse
    order = np.argsort(rank.reshape(-1))
    np.testing.assert_array_equal(order, np.argsort(in_idx.reshape(-1), kind="stable"))
    for j in range(layout.shape[1]):
        assert (in_idx.reshape(-1)[order[first[j] : first[j + 1]]] == j).all()
    assert first[-1] == in_idx.size
    # Chunks: every panel column once, none beside one of another group.
    for columns, chunks in zip(CHUNK_COLUMNS, index.chunks, strict=True):
        covered = [k for _, begin, end in chunks for k in range(begin, end)]
        assert covered == list(range(in_idx.size))
        for group, begin, end in chunks:
            assert end - begin <= columns
            assert (groups[np.arange(begin, end) // in_idx.shape[1]] == group).all()


def test_worked_by_hand():
    """The example of the module's docstring; chunks and pieces of theirs."""
    layout = dsb.BlockLayout(
        np.array([[2, 0], [1, 3]], np.int32), np.array([[3, 1], [0, 2], [1, 2]], np.uint16),
        np.array([0, 2, 3], np.int32), (4, 4), (2, 2),
    )  # fmt: skip
    index = derive(layout.index, 4, ("row_place", "block_group", "inverse"))
    assert index.entries == ("row_place", "block_group", "inverse")
    assert index.row_place.tolist() == [1, 2, 0, 3]
    assert index.block_group.tolist() == [0, 0, 1]
    assert index.inverse.first.tolist() == [0, 1, 3, 5, 6]
    assert index.inverse.rank.tolist() == [[5, 1], [0, 3], [2, 4]]
    chunks = cut_panels(jnp.array([0, 2, 2, 3]), num_entries=9, cols=3, columns=4)
    assert chunks.tolist()[:3] == [[0, 0, 4], [0, 4, 6], [2, 6, 9]]
    assert (chunks[3:, 1] == chunks[3:, 2]).all()


def test_pieces_worked_by_hand():
    """3, 0 and 2 blocks of 200 columns in three groups, of which two make a piece."""
    index = make_layout(0, (6, 800), (2, 200), (3, 0, 2)).index
    pieces = cut_pieces(index)
    assert pieces.group.tolist()[:3] == [0, 0, 2]
    assert pieces.blocks.tolist()[:3] == [[0, 1], [2, -1], [3, 4]]
    assert pieces.place.tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(("count", "dtype"), [(2**16 - 4, np.uint16), (2**16, np.int32)])
def test_numbers_take_two_bytes_where_they_fit(count, dtype):
    first, rank = jax.eval_shape(functools.partial(invert, in_features=7), jax.ShapeDtypeStruct((count // 4, 4), "u2"))
    assert (first.dtype, rank.dtype) == (dtype, dtype)


class Net(nn.Module):
    method: object = DSB()

    @nn.compact
    def __call__(self, x):
        options = {"density": 0.3, "block_shape": (4, 4), "kernel_init": by_numpy, "method": self.method}
        x = nn.relu(SparseConv(16, (3, 3), **options)(x))
        return SparseDense(8, **options)(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def net():
    x = np.random.default_rng(0).standard_normal((4, 6, 6, 8)).astype(np.float32)
    return Net(), jax.jit(Net().init)(jax.random.key(0), x), x


def loss_fn(variables, x):
    return jnp.square(Net().apply(variables, x)).mean()


def assert_is_that_of_its_layouts(topology, backend="cpu"):
    for node in nodes(topology).values():
        assert node.index.entries == entries_for(backend)
    dsb.validate_topology(topology)


def test_layers_and_adaptations_make_it_and_none_stays_none(net):
    _, variables, x = net
    params, topology = variables["params"], variables["topology"]
    assert_is_that_of_its_layouts(topology)
    adapt = dsb.adaptation(loss_fn, DSB(update_interval=1, update_end_step=9), optax.sgd(0.1))
    state = optax.sgd(0.1).init(params)
    found = {}
    for name, given_topology in (("with", topology), ("without", dsb.without_index(topology))):
        found[name] = adapt(params, given_topology, state, 1, jax.random.key(1), x)
        assert jax.tree.structure(found[name][1]) == jax.tree.structure(given_topology)
    assert_is_that_of_its_layouts(found["with"][1])
    moved = [
        np.any(np.asarray(a.layout.in_idx) != np.asarray(b.layout.in_idx))
        for a, b in zip(nodes(topology).values(), nodes(found["with"][1]).values(), strict=True)
    ]
    assert any(moved)
    jax.tree.map(np.testing.assert_array_equal, dsb.without_index(found["with"]), found["without"])


def test_with_and_without_it_all_is_equal(net):
    _, variables, x = net

    @jax.jit
    def gradients(params, topology):
        return jax.value_and_grad(lambda p: loss_fn({"params": p, "topology": topology}, x))(params)

    params, topology = variables["params"], variables["topology"]
    wanted = gradients(params, topology)
    for other in (dsb.without_index(topology), dsb.with_index(topology, "gpu")):
        jax.tree.map(np.testing.assert_array_equal, gradients(params, other), wanted)


def test_single_weights_have_none():
    x = np.zeros((1, 6, 6, 8), np.float32)
    topology = jax.eval_shape(Net(RigL()).init, jax.random.key(0), x)["topology"]
    assert [node.index for node in nodes(dsb.with_index(topology)).values()] == [None, None]


def test_one_that_was_left_behind_is_found(net):
    topology = net[1]["topology"]
    (path, node), *_ = nodes(topology).items()
    other = dataclasses.replace(node.layout, out_idx=node.layout.out_idx[::-1])
    stale = {path[0]: {"blocks": dataclasses.replace(node, layout=other)}}
    with pytest.raises(ValueError, match=r"index/row_place is not that of the layout; make it anew by with_index"):
        dsb.validate_topology(stale)
    dsb.validate_topology(dsb.with_index(stale))


def test_a_kernel_index_of_another_layer_is_refused():
    layout, other = make_layout(0, (8, 12), (4, 3), (2, 1)), make_layout(0, (8, 12), (4, 3), (2, 2))
    x, blocks = np.zeros((2, 12), np.float32), np.zeros((3, 4, 3), np.float32)
    index = derive(other.index, 12, entries_for("cpu"))
    with pytest.raises(ValueError, match="kernel_index does not belong to the layout"):
        sparse_matmul(x, blocks, layout, kernel_index=index)


def test_it_is_in_no_checkpoint_and_made_again(net, tmp_path):
    variables = net[1]
    with Checkpoints(tmp_path / "run", {}) as checkpoints:
        checkpoints.save(variables, step=1, test_accuracy=0.5)
    restored, stored = restore(tmp_path / "run", jax.eval_shape(lambda: variables))
    assert not [name for name in stored.arrays if "index" in name.split("/")]
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    bare, _ = restore(tmp_path / "run", dsb.without_index(variables))
    assert all(node.index is None for node in nodes(bare["topology"]).values())

    state = flax.serialization.to_state_dict(variables["topology"])
    assert set(state["SparseDense_0"]["blocks"]) == {"layout"}
    again = flax.serialization.from_state_dict(variables["topology"], state)
    jax.tree.map(np.testing.assert_array_equal, again, variables["topology"])


def index_operations(compiled):
    """Operations of a compiled program that sort, loop or belong to making an index."""
    text = compiled.as_text()
    made = re.findall(r'op_name="[^"]*kernel_index[^"]*"', text)
    loops = [line for line in text.splitlines() if re.search(r"= \S.* while\(", line)]
    return len(re.findall(r" sort\(", text)), len(made), [line for line in loops if "kernel_index" in line]


def test_a_training_step_makes_nothing_of_it(net):
    """No sort, no search, no loop that builds an index; without one, they are there."""
    _, variables, x = net

    def step(params, topology):
        value, gradient = jax.value_and_grad(lambda p: loss_fn({"params": p, "topology": topology}, x))(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    params, topology = variables["params"], variables["topology"]
    assert index_operations(jax.jit(step).lower(params, topology).compile()) == (0, 0, [])
    _, made, _ = index_operations(jax.jit(step).lower(params, dsb.without_index(topology)).compile())
    assert made > 0


def test_the_specification_is_loaded_by_nobody_who_trains():
    program = (
        "import sys, jax, numpy as np, dsb_jax, dsb_jax.linen as linen\n"
        "layer = linen.SparseDense(8, density=0.5, block_shape=(4, 4))\n"
        "jax.jit(layer.init_with_output)(jax.random.key(0), np.zeros((2, 8), np.float32))\n"
        "assert 'pallas_kernels.reference' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
