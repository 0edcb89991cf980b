"""Invariants of the adaptation: what stays is bit-identical, what is new is zero, nothing else is touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.layer_updates import Layers, update_layers
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import DSB, LayerState
from dsb_jax.origins import move
from tests.conftest import make_layout
from tests.topologies import (
    MASK,
    PACK,
    REAL_ROWS,
    UNPACK,
    DrawnByNumPy,
    assert_same_bits,
    check_moved,
    noise_like,
)


class Net(nn.Module):
    """Two equal sparse layers, one with ragged rows, a convolution; batch norm, dropout and dense layers between."""

    @nn.compact
    def __call__(self, x, train=False):
        sparse = {"block_shape": (8, 4), "implementation": "dense", "method": DrawnByNumPy()}
        x = SparseConv(16, (3, 3), num_blocks=7, name="conv", **sparse)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x)).mean(axis=(1, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        x = nn.relu(SparseDense(16, num_blocks=4, name="equal_0", **sparse)(x))
        x = nn.relu(SparseDense(16, num_blocks=4, name="equal_1", **sparse)(x))
        x = nn.relu(SparseDense(21, num_blocks=6, name="ragged", **sparse)(x))
        return nn.Dense(3, name="head")(x)


MODEL = Net()
LAYERS = {("conv",), ("equal_0",), ("equal_1",), ("ragged",)}
IMAGES = np.random.default_rng(7).normal(size=(8, 5, 5, 4)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 3
METHOD = DSB(drop_fraction=0.5, update_end_step=100)
ADAMW = optax.adamw(1e-2)


def copy(tree):
    return jax.tree.map(jnp.array, tree)


@pytest.fixture(scope="module")
def adapted():
    """A state after two training steps, the same adapted twice, and what was given (donated)."""
    state = jax.jit(lambda key: dsb.create_train_state(MODEL, ADAMW, key, IMAGES))(jax.random.key(0))
    for _ in range(2):
        state, _ = dsb.train_step(state, IMAGES, LABELS, model=MODEL, optimizer=ADAMW)
    given, again = copy(state), copy(state)
    run = functools.partial(dsb.adapt_step, inputs=IMAGES, labels=LABELS, model=MODEL, method=METHOD, optimizer=ADAMW,
                            fill={"nu": "zero"})  # fmt: skip
    return state, given, run(given), run(again)


def test_adapt_step_keeps_the_invariants(adapted):
    before, _, (after, report), _ = adapted
    assert check_moved(before.params, after.params, before.topology, after.topology) == 4
    assert check_moved(before.opt_state, after.opt_state, before.topology, after.topology) == 8
    dsb.validate_topology(after.topology)
    for name in ("collections", "step", "key"):
        assert_same_bits(getattr(before, name), getattr(after, name))
    assert set(report) == LAYERS
    for path, layer in report.items():
        assert all(value.shape == () for value in layer)
        masks = [np.asarray(MASK(s.topology[path[0]]["blocks"].layout)) for s in (before, after)]
        assert layer.turnover == pytest.approx((masks[1] & ~masks[0]).sum() / masks[0].sum())
        assert 0 < layer.accepted <= layer.requested
        assert (layer.collateral, layer.calls, layer.status) == (0, 1, 0)
        assert layer.empty_groups == (np.diff(after.topology[path[0]]["blocks"].layout.group_start) == 0).sum()


def test_the_same_seed_gives_the_same_bits(adapted):
    *_, one, same = adapted
    assert_same_bits(one, same)


def test_the_state_is_donated(adapted):
    _, given, (after, _), _ = adapted
    sparse = [leaf for leaf in jax.tree.leaves((given.params, given.opt_state)) if leaf.ndim == 3]  # biases stay
    assert sparse
    assert all(leaf.is_deleted() for leaf in sparse)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_a_step_takes_what_a_step_gives(adapted):
    """Shapes, dtypes and structure never change, so nothing is ever compiled again."""
    before, _, (after, _), _ = adapted
    specs = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state) for state in (before, after)]
    assert specs[0] == specs[1]
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_the_model_says_the_same_of_weights_that_stayed(adapted):
    """New weights are zero: after the adaptation the model computes what the kept weights compute."""
    before, _, (after, _), _ = adapted
    params = dict(before.params)
    for (name,) in LAYERS:
        old, new = (state.topology[name]["blocks"].layout for state in (before, after))
        params[name] = {**params[name], "blocks": PACK(UNPACK(params[name]["blocks"], old) * MASK(new), old)}
    apply = jax.jit(MODEL.apply)
    wanted = apply({**before.variables, "params": params}, IMAGES)
    np.testing.assert_allclose(apply(after.variables, IMAGES), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [((3, 1, 0), (0, 2, 2)), ((1, 2, 1), (2, 1, 1))])
@pytest.mark.parametrize("shape", [(12, 14), (10, 14)])
def test_moving_is_unpack_and_pack(shape, counts):
    """The definition by way of a dense matrix; nothing of phantom rows is carried along."""
    if shape == (10, 14):
        counts = tuple((a, 3 - a, 1) for a in (3, 1))  # the ragged group always holds round(4 / 3)
    old, new = (make_layout(seed, shape, (4, 3), c) for seed, c in enumerate(counts))
    blocks = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    moved = jax.jit(move)
    assert_same_bits(moved(blocks, old, new), PACK(UNPACK(blocks, old), new))
    assert_same_bits(moved(blocks, old, old), jnp.where(REAL_ROWS(old), blocks, np.float32(0)))
    bits = blocks.astype(jnp.bfloat16)
    bits[0, 0, 0] = np.nan
    assert_same_bits(moved(bits, old, new), PACK(UNPACK(bits, old), new))


def test_repack_moves_any_tree_like_the_parameters(adapted):
    before, _, (after, _), _ = adapted
    tree = noise_like(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), before.params))
    moved = jax.jit(dsb.repack)(tree, before.topology, after.topology)
    # Noise lies on phantom rows, too, and is forgotten there.
    assert check_moved(tree, jax.device_get(moved), before.topology, after.topology) == 4
    only = [{"equal_0": t["equal_0"]} for t in jax.device_get((tree, before.topology, after.topology))]
    assert_same_bits(dsb.repack(*only)["equal_0"], moved["equal_0"])  # NumPy arrays, outside of `jit`
    filled = jax.jit(functools.partial(dsb.repack, fill=2))(tree, before.topology, after.topology)
    for (name,) in LAYERS:
        old, new = (state.topology[name]["blocks"].layout for state in (before, after))
        stays = np.asarray(PACK(UNPACK(jnp.ones(tree[name]["blocks"].shape), old), new)) > 0
        real = np.broadcast_to(REAL_ROWS(new), stays.shape)
        wanted = np.where(stays, moved[name]["blocks"], np.where(real, 2, 0).astype(jnp.bfloat16))
        assert_same_bits(np.asarray(filled[name]["blocks"]), wanted)
    with pytest.raises(ValueError, match="only one of the topologies has a layer conv; pass two topologies of one"):
        dsb.repack(tree, before.topology, {k: v for k, v in after.topology.items() if k != "conv"})


def test_layers_of_one_loop_are_updated_each_by_itself():
    """Equal and odd layers in any order, and stacks: as the method alone with the layer's own key."""
    method = DSB(update_end_step=10, grow="random")
    rng = np.random.default_rng(0)
    old = {
        ("a",): [make_layout(0, (16, 12), (8, 4), (2, 1))],
        ("b",): [make_layout(1, (16, 14), (8, 4), (1, 2))],
        ("c",): [make_layout(2, (16, 12), (8, 4), (0, 3))],
        ("stack",): [make_layout(seed, (16, 12), (8, 4), (1, 2)) for seed in (3, 4)],
    }
    states = {
        path: [LayerState(rng.normal(size=(3, 8, 4)).astype(np.float32), layout) for layout in layouts]
        for path, layouts in old.items()
    }
    key, step = jax.random.key(5), np.int32(0)
    layers = {}
    for path, each in states.items():
        every, count = jax.tree.map(lambda *leaves: np.stack(leaves), *each), len(each)
        layers[path] = (every, None, None, np.zeros(count, np.float32), np.zeros(count, np.int32))
    results = jax.jit(lambda layers: update_layers(
        method, list(jax.random.split(key, 4)), step, [Layers(*layer, False) for layer in layers])
    )(list(layers.values()))  # fmt: skip
    results = dict(zip(old, results, strict=True))
    update = jax.jit(method.update)
    assert set(results) == set(old)
    for path, layer_key in zip(old, jax.random.split(key, 4), strict=True):
        keys = jax.random.split(layer_key, 2) if path == ("stack",) else [layer_key]
        for i, (state, own) in enumerate(zip(states[path], keys, strict=True)):
            new, report = update(own, step, state, None)
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], results[path])
            calls_and_status = {"calls": jnp.int32(0), "status": jnp.int32(0)}
            assert_same_bits((mine.state, mine.report), (new, report._replace(**calls_and_status)))
