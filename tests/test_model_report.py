"""What a model's report says is what its arrays say, counted by hand."""

import jax
import numpy as np
import optax

import dsb_jax as dsb
from dsb_jax.layout import BlockLayout
from dsb_jax.methods import TopKAST
from dsb_jax.plan import PlannedLayer, SparsityPlan
from dsb_jax.spec import conv_spec, linear_spec
from dsb_jax.topology import LayerTopology
from tests.conftest import make_layout
from tests.topologies import make_node, node_of_counts, stacked

# A 2x1 convolution of 3 channels to 4: group 1 (rows 2, 3) has no block, channel 2 is read by no weight.
CONV = LayerTopology(
    BlockLayout(
        np.array([[0, 1], [2, 3]], np.int32), np.array([[0, 4], [3, 1]], np.uint16), np.array([0, 2, 2], np.int32),
        (4, 6), (2, 2),
    ),
    None,
    conv_spec((2, 1), 3, 4).with_blocks((2, 2), 2),
)  # fmt: skip
STACK = stacked([node_of_counts(0, (10, 12), (4, 3), (2, 1, 1)), node_of_counts(1, (10, 12), (4, 3), (3, 0, 1))])
TOPOLOGY = {"a/b": {"blocks": CONV}, "stack": {"blocks": STACK}}
PARAMS = {
    "a/b": {"blocks": np.ones((2, 2, 2), np.float32), "bias": np.ones(4, np.float32)},
    "stack": {"blocks": np.ones((2, 4, 4, 3), np.float16)},
    "head": {"kernel": np.ones((4, 5), np.float32), "bias": np.ones(5, np.float32)},
    "norm": {"scale": np.ones(4, np.float32), "kernel": np.ones(4, np.float32)},
}


def indices_of(topology):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(topology))


def test_a_report_by_hand():
    head = linear_spec(4, 5)
    plan = SparsityPlan((PlannedLayer(("head",), head, "kept dense by 'head'", ""),))
    report = dsb.report(PARAMS, TOPOLOGY, plan=plan, optimizer=optax.adam(1e-3))
    conv, stack = report.layers
    assert (conv.path, conv.kernel_shape, conv.block_shape, conv.num_blocks) == (("a/b",), (2, 1, 3, 4), (2, 2), 2)
    assert (conv.num_active, conv.size, conv.density, conv.storage) == (8, 24, 8 / 24, "blocks")
    assert (conv.dead_outputs, conv.unread_inputs) == (2, 1)
    assert conv.nbytes == 8 * 4 + (4 * 4 + 4 * 2 + 3 * 4)
    assert (stack.kernel_shape, stack.num_blocks) == ((2, 12, 10), 4)
    assert (stack.num_active, stack.size) == (2 * (3 * 12 + 6), 2 * 120)
    assert stack.dead_outputs == 4  # the second layer's group 1
    masks = np.asarray(dsb.masks(TOPOLOGY)["stack"]["kernel"])
    assert stack.unread_inputs == (~masks.any(axis=2)).sum()
    assert report.dense == ((("head", "kernel"), (4, 5), "kept dense by 'head'"),)
    assert report.sparsity == 1 - (8 + 84) / (24 + 240)
    assert report.sparsity_all == 1 - (8 + 84 + 20) / (24 + 240 + 20)
    floats = 8 + 4 + 20 + 5 + 4 + 4
    indices = 36 + 2 * (3 * 4 * 4 + 4 * 3 * 4 + 4 * 4)
    assert report.nbytes == {
        "params": 4 * floats + 2 * 96, "topology": indices, "index": 0, "opt_state": 2 * (4 * floats + 2 * 96) + 4,
    }  # fmt: skip


def test_a_report_is_read_by_people():
    indexed = dsb.report(PARAMS, dsb.with_index(TOPOLOGY, "cpu"))
    assert (indexed.nbytes["index"] > 0, indexed.nbytes["topology"]) == (True, indices_of(TOPOLOGY))
    text = str(dsb.report(PARAMS, TOPOLOGY))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "a%2Fb", "stack", "head/kernel", "sparsity"]
    assert lines[1].split() == ["a%2Fb", "2x1x3x4", "0.3333", "2", "of", "2x2", "2", "1", "68"]
    assert lines[3].split() == ["head/kernel", "4x5", "1", "dense"]
    assert "65.15% over the sparse layers" in text
    assert "opt_state" not in text


def test_what_a_method_keeps_counts_as_bytes_not_as_weights():
    method = TopKAST()
    spec = method.stored(linear_spec(12, 8).with_single(20))
    weights = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    blocks, layout, aux = jax.jit(lambda w: method.init(jax.random.key(0), w, spec))(weights)
    report = dsb.report({"fc": {"blocks": blocks}}, {"fc": {"blocks": LayerTopology(layout, aux, spec)}})
    (layer,) = report.layers
    assert (layer.num_active, layer.num_blocks, layer.storage) == (20, 40, "backward_set")
    largest = np.abs(weights) >= np.sort(np.abs(weights), axis=None)[-20]
    assert layer.dead_outputs == (~largest.any(axis=1)).sum()
    assert layer.unread_inputs == (~largest.any(axis=0)).sum()
    assert layer.nbytes > 4 * 96  # all weights lie somewhere


def test_models_without_sparse_layers():
    report = dsb.report({"head": PARAMS["head"]}, {})
    assert (report.layers, report.sparsity, report.sparsity_all) == ((), 0, 0)
    assert (len(report.dense), report.nbytes) == (1, {"params": 100, "topology": 0, "index": 0})
    nothing = dsb.report({}, {})
    assert (nothing.sparsity, nothing.sparsity_all, nothing.nbytes["params"]) == (0, 0, 0)
    assert "0.00% over the sparse layers" in str(nothing)


def test_layers_that_weight_decay_no_longer_reaches():
    """By a mask that looks for the name `kernel` (finding 19); not without a mask, a decay, or a name of ours in it."""

    def decayed(*names):
        def mask(tree):
            return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, tree)

        return optax.adamw(1e-3, weight_decay=0.1, mask=mask)

    params, topology = {"a/b": PARAMS["a/b"], "head": PARAMS["head"]}, {"a/b": TOPOLOGY["a/b"]}
    report = dsb.report(params, topology, optimizer=decayed("kernel"))
    assert report.undecayed == (("a/b",),)
    assert "weight decay does not reach the blocks of 1 layers (such as a%2Fb)" in str(report)
    for optimizer in (decayed("kernel", "blocks"), optax.adamw(1e-3), optax.adam(1e-3), optax.sgd(0.1), None):
        report = dsb.report(params, topology, optimizer=optimizer)
        assert report.undecayed == ()
        assert "decay" not in str(report)


def test_the_host_and_a_device_say_the_same():
    node = make_node(make_layout(0, (8, 12), (4, 3), (2, 1)))
    trees = {"fc": {"blocks": np.ones((3, 4, 3), np.float32)}}, {"fc": {"blocks": node}}
    assert dsb.report(*jax.device_put(trees)) == dsb.report(*jax.device_get(trees))
