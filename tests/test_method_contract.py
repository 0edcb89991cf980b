"""One contract for all methods, on a stack of layers with phantom rows: equal terms, sizes that stay, the same bits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.layout import to_mask
from dsb_jax.linen import SparseDense
from dsb_jax.methods import DSB, METHODS, SET, LayerState, RigL, Static, TopKAST
from dsb_jax.plan import PlannedLayer, SparsityPlan
from dsb_jax.spec import LayerSpec
from dsb_jax.telemetry import count_active
from tests.topologies import assert_same_bits, in_place

MADE = {
    "dsb": DSB(drop_fraction=0.5),
    "dsb, blocks": DSB(drop_fraction=0.5, granularity="block", block_aware_drop=False),
    "ssb": Static(),
    "rigl": RigL(drop_fraction=0.5),
    "set": SET(drop_fraction=0.5),
    "topkast": TopKAST(backward_factor=1.4, exploration=1e-4),
}
X = np.random.default_rng(0).normal(size=(6, 12)).astype(np.float32)
OPTIMIZER = optax.adamw(0.05)
KERNEL = LayerSpec((2, 12, 10), out_axes=(2,), in_axes=(1,), stack_axes=(0,))


class Net(nn.Module):
    """Two layers under `nn.scan`, dense without a method."""

    method: Any = None

    @nn.compact
    def __call__(self, x):
        how: dict[str, Any] = {}
        if self.method is not None:
            how = {"num_blocks": 6, "block_shape": (4, 3), "method": self.method, "implementation": "dense"}
        lifted = nn.scan(
            lambda layer, x, _: (x.at[:, :10].set(nn.tanh(layer(x))), None), length=2, split_rngs={"params": True},
            variable_axes={"params": 0, "topology": 0, "statistics": 0},
        )  # fmt: skip
        return lifted(SparseDense(10, name="stack", **how), x, None)[0]


def plan(num_blocks):
    return SparsityPlan((PlannedLayer(("stack",), KERNEL, KERNEL.with_blocks((4, 3), num_blocks), ""),))


class Life(NamedTuple):
    """What becomes of a model; pairs are (params, topology)."""

    first: Any
    trained: Any
    adapted: Any
    fewer: Any
    report: Any
    moments: Any
    average: Any
    dense: Any
    masks: Any
    chosen: Any
    back: Any
    outputs: Any


@functools.cache
def programs(method):
    """What becomes of a model, part by part: methods of one storage share the compiled programs of most parts."""
    model = Net(method)

    def loss_fn(variables, x):
        return jnp.square(model.apply(variables, x) - 1).mean()

    def init(key):
        variables = model.init(key, X)
        return variables["params"], variables["topology"]

    def train(params, topology):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss_fn({"params": p, "topology": topology}, X))(params)
            updates, state = OPTIMIZER.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, OPTIMIZER.init(params)), None, 3)[0]

    def restage(params, topology, state, key):
        return dsb.restage(params, topology, state, plan(4), method, OPTIMIZER, key)[:2]

    def outputs(params, topology, dense):
        return model.apply({"params": params, "topology": topology}, X), Net().apply({"params": dense}, X)

    def choose(dense, key):
        return dsb.from_dense(dense, plan(6), method=method, key=key)

    def pack(dense, topology):
        return dsb.from_dense(dense, topology=topology)[0]

    return {f.__name__: jax.jit(f) for f in (init, train, restage, outputs, choose, pack)} | {
        "adapt": dsb.adaptation(loss_fn, method, OPTIMIZER), "measure": dsb.measure(loss_fn, method),
    }  # fmt: skip


to_dense, masks, repack = jax.jit(dsb.to_dense), jax.jit(dsb.masks), jax.jit(dsb.repack)


def life(method, seed):
    """Initialized, trained for three steps, adapted, repacked, made smaller, dense and sparse again."""
    run, key = programs(method), jax.random.key(seed)
    params, topology = run["init"](key)
    trained, state = run["train"](params, topology)
    new, moved, new_state, report = run["adapt"](trained, topology, state, 3, key, X)
    dense = to_dense(new, moved)
    back = run["pack"](dense, moved)
    return Life(
        (params, topology), (trained, topology), (new, moved), run["restage"](new, moved, new_state, key), report,
        (state[0].mu, new_state[0].mu), repack(trained, topology, moved), dense, masks(moved),
        run["choose"](dense, key), (back, to_dense(back, moved)), run["outputs"](new, moved, dense),
    )  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def lived(request):
    method = MADE[request.param]
    return method, jax.device_get(life(method, 0))


def test_the_contract_holds_every_method():
    assert {method.name for method in MADE.values()} == set(METHODS)


def test_terms_are_equal(lived):
    """As many weights computed with as the plan says, whatever the method; valid layouts, sizes that stay."""
    method, one = lived
    for pair, count in ((one.first, 6), (one.trained, 6), (one.adapted, 6), (one.fewer, 4), (one.chosen, 6)):
        params, topology = pair
        dsb.validate_topology(topology)
        assert count_active(topology) == {("stack",): 2 * plan(count)[("stack",)].num_active}
        dsb.check_optimizer(OPTIMIZER, params, topology, method=method)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), pair) for pair in (one.first, one.adapted)]
    assert shapes[0] == shapes[1]
    # A layer under `nn.scan` knows of its stack by the shapes, one of `from_dense` by its spec.
    node, other = (pair[1]["stack"]["blocks"] for pair in (one.chosen, one.adapted))
    assert (node.kernel_shape, node.blocks_shape) == (other.kernel_shape, other.blocks_shape)
    assert node.kernel_shape == KERNEL.kernel_shape


def layers_of(tree, topology):
    """[out, in] of each layer of the stack."""
    blocks, node = tree["stack"]["blocks"], topology["stack"]["blocks"]
    return [in_place(*jax.tree.map(lambda leaf, i=i: leaf[i], (blocks, node.layout))) for i in range(2)]


def test_kept_weights_keep_their_bits(lived):
    """Those of the model, of a moment and of an average; all of what is new is 0."""
    method, one = lived
    some = 0
    for old, new in ((one.trained[0], one.adapted[0]), one.moments, (one.trained[0], one.average)):
        for was, now in zip(layers_of(old, one.trained[1]), layers_of(new, one.adapted[1]), strict=True):
            stays, is_new = ~np.isnan(was) & ~np.isnan(now), np.isnan(was) & ~np.isnan(now)
            some += is_new.sum()
            assert_same_bits(now[stays], was[stays])
            if method.storage != "backward_set" or new is not one.adapted[0]:  # whose new weights come from its reserve
                assert (now[is_new] == 0).all()
    assert (some > 0) == (method.name != "ssb")


def test_the_report(lived):
    method, one = lived
    assert set(one.report) == {("stack",)}
    layer = one.report[("stack",)]
    assert all(value.shape == (2,) for value in layer)
    assert (layer.status == 0).all()
    assert (layer.calls == (1 if method.statistic is not None else 0)).all()
    assert ((layer.accepted >= 0) & (layer.accepted <= layer.requested)).all()
    assert ((layer.turnover >= 0) & (layer.turnover <= 1) & (layer.collateral >= 0) & (layer.collateral <= 1)).all()
    assert (layer.requested == 0).all() == (method.name == "ssb")


def test_dense_and_back(lived):
    """The dense model computes the same, with exactly as many weights; the way there and back keeps all bits."""
    method, one = lived
    np.testing.assert_allclose(*one.outputs, atol=2e-5)
    kernel, mask = one.dense["stack"]["kernel"], one.masks["stack"]["kernel"]
    assert kernel.shape == mask.shape == KERNEL.kernel_shape
    assert mask.sum() == 2 * plan(6)[("stack",)].num_active
    assert not kernel[~mask].any()
    assert kernel[mask].any()
    back, dense = one.back
    assert_same_bits(dense, one.dense)
    if method.storage != "backward_set":  # which stores weights that it does not compute with
        assert_same_bits(back, one.adapted[0])
    # By a plan: the weights that stay are those of the dense model, bit by bit.
    chosen = jax.device_get(to_dense(*one.chosen))["stack"]["kernel"]
    assert_same_bits(chosen[chosen != 0], kernel[chosen != 0])
    assert np.count_nonzero(chosen) > 0.5 * np.count_nonzero(kernel)


def test_fewer_blocks_keep_the_strongest(lived):
    """Nothing comes in, and the values stay; more blocks are in test_method_layers.py."""
    method, one = lived
    for now, fewer in zip(*(layers_of(*pair) for pair in (one.adapted, one.fewer)), strict=True):
        before, after = ~np.isnan(now), ~np.isnan(fewer)
        assert after.sum() < before.sum()
        assert_same_bits(fewer[after], now[after])
        if method.storage != "blocks":
            assert np.abs(fewer[after]).min() >= np.abs(now[before & ~after]).max()


def test_each_layer_of_a_stack_is_adapted_by_itself(lived):
    """As the method alone, with the layer's own key and statistic; one method of each storage will do."""
    method, one = lived
    masks = [np.asarray(to_mask(jax.tree.map(lambda leaf, i=i: leaf[i], one.adapted[1]["stack"]["blocks"].layout)))
             for i in range(2)]  # fmt: skip
    assert (masks[0] != masks[1]).any()  # each layer has drawn its own
    if method not in (MADE["dsb"], MADE["rigl"], MADE["topkast"]):
        return
    (params, topology), node = one.trained, one.trained[1]["stack"]["blocks"]
    measured = programs(method)["measure"](params, topology, X) if method.statistic is not None else None
    (key,) = jax.random.split(jax.random.key(0), 1)  # one for each node
    update = jax.jit(method.update)
    for i, own in enumerate(jax.random.split(key, 2)):
        state, value = jax.tree.map(
            lambda leaf, i=i: leaf[i],
            (LayerState(params["stack"]["blocks"], node.layout, node.aux),
             None if measured is None else measured["stack"]["blocks"].value),
        )  # fmt: skip
        alone, _ = update(own, 3, state, value)
        blocks, now = (tree["stack"]["blocks"] for tree in one.adapted)
        both = jax.tree.map(lambda leaf, i=i: leaf[i], LayerState(blocks, now.layout, now.aux))
        assert_same_bits(jax.device_get(alone), both)


def test_the_same_seed_gives_the_same_bits(lived):
    method, one = lived
    assert_same_bits(jax.device_get(life(method, 0)), one)
    other = jax.device_get(life(method, 1))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(one.first), jax.tree.leaves(other.first), strict=True))
