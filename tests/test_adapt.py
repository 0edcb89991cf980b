"""Invariants of the adaptation: what stays is bit-identical, what is new is zero, nothing else is touched."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from dsb_jax.adapt import adapt_step, repack, repack_state, update_layers
from dsb_jax.layout import BlockLayout, pack, random_layout, real_rows, to_mask, unpack, validate
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import dense, dsb, ssb
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state, layouts
from tests.conftest import make_layout


class Net(nn.Module):
    """Two equal sparse layers, one with ragged rows, a convolution; batch norm, dropout and dense layers between."""

    @nn.compact
    def __call__(self, x, train=False):
        sparse = {"block_shape": (8, 4), "implementation": "dense"}
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
# Compiled once for each layout; step by step each operation would be a program of its own.
PACK, UNPACK, MASK, REAL_ROWS, REPACK = (jax.jit(f) for f in (pack, unpack, to_mask, real_rows, repack))
METHOD = dsb(update_end_step=100, alpha=0.5, grow="block_gradient", granularity="panel_column")
RATE = optax.cosine_decay_schedule(0.1, 100)
LAYOUT = jax.jit(random_layout, static_argnames=("shape", "block_shape", "num_blocks"))


def by_layer(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "sgd" if path[0].key == "conv" else "adam", params)


def is_sparse(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "blocks", params)


OPTIMIZERS = {
    "sgd with momentum": optax.sgd(RATE, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-2),
    "chain with a mask": optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.trace(0.9), is_sparse), optax.scale_by_adam(), optax.ema(0.9)
    ),
    "two optimizers": optax.multi_transform({"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(1e-2)}, by_layer),
    "several batches a step": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "adafactor": optax.adafactor(1e-2),
}  # fmt: skip


@functools.cache
def initial(name):
    """The first state, its float leaves of the optimizer filled with noise so that none is zero by chance."""
    state, rng = initial_without_optimizer(), np.random.default_rng(0)

    def noise(leaf):
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (rng.standard_normal if floats else np.zeros)(leaf.shape).astype(leaf.dtype)

    return dataclasses.replace(
        state, opt_state=jax.tree.map(noise, jax.eval_shape(OPTIMIZERS[name].init, state.params))
    )


@functools.cache
def initial_without_optimizer():
    return jax.jit(lambda key: create_train_state(MODEL, optax.identity(), key, IMAGES))(jax.random.key(0))


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def leaves_of(tree):
    """(names of the dictionary keys on the way, leaf) for each leaf."""
    return [
        (tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check_repacked(before, after):
    """Every block-shaped leaf of weights and optimizer followed its positions; every other leaf is the same."""
    old, new = layouts(before.topology), layouts(after.topology)
    assert set(old) == set(new) == LAYERS
    moved = 0
    for part in ("params", "opt_state"):
        was, now = getattr(before, part), getattr(after, part)
        assert jax.tree.structure(was) == jax.tree.structure(now)
        for (names, a), (_, b) in zip(leaves_of(was), leaves_of(now), strict=True):
            path = names[-2:-1]
            if names[-1:] != ("blocks",) or path not in old or a.size <= 1:
                same_bits(a, b)
                continue
            moved += 1
            mask_a, mask_b = (np.asarray(MASK(layout)) for layout in (old[path], new[path]))
            dense_a, dense_b = np.asarray(UNPACK(a, old[path])), np.asarray(UNPACK(b, new[path]))
            same_bits(dense_a[mask_a & mask_b], dense_b[mask_a & mask_b])
            same_bits(dense_b[mask_b & ~mask_a], np.zeros_like(dense_b[mask_b & ~mask_a]))
            assert not np.asarray(b)[~np.broadcast_to(REAL_ROWS(new[path]), b.shape)].any()  # phantom weights
            assert (mask_b & ~mask_a).any()  # the law would hold of layouts that never change
    for path, layout in new.items():
        validate(layout)
        assert layout.num_active == old[path].num_active
    for part in ("batch_stats", "step", "key"):
        for a, b in zip(jax.tree.leaves(getattr(before, part)), jax.tree.leaves(getattr(after, part)), strict=True):
            same_bits(a, b)
    return moved


@pytest.mark.parametrize("counts", [((3, 1, 0), (0, 2, 2)), ((1, 2, 1), (2, 1, 1))])
@pytest.mark.parametrize("shape", [(12, 14), (10, 14)])
def test_repack_is_unpack_and_pack(shape, counts):
    """The definition by way of a dense matrix; nothing of phantom rows is carried along."""
    if shape == (10, 14):
        counts = tuple((a, 3 - a, 1) for a in (3, 1))  # the ragged group always holds round(4 / 3)
    old, new = (make_layout(seed, shape, (4, 3), c) for seed, c in enumerate(counts))
    blocks = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    same_bits(REPACK(blocks, old, new), PACK(UNPACK(blocks, old), new))
    same_bits(REPACK(blocks, old, old), np.where(REAL_ROWS(old), blocks, np.float32(0)))
    bits = blocks.astype(jnp.bfloat16)
    bits[0, 0, 0] = np.nan
    same_bits(REPACK(bits, old, new), PACK(UNPACK(bits, old), new))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_any_optimizer_follow_their_weights(name):
    before = initial(name)
    new = {
        path: LAYOUT(jax.random.key(i), old.shape, block_shape=old.block_shape, num_blocks=old.num_blocks)
        for i, (path, old) in enumerate(sorted(layouts(before.topology).items()))
    }
    after = jax.jit(functools.partial(repack_state, optimizer=OPTIMIZERS[name]))(before, new)
    # Weights, and of each sparse layer: one moment; two; one; all three; one of conv, two of the others; ...
    assert check_repacked(before, after) == {
        "sgd with momentum": 8, "adamw": 12, "lion": 8, "chain with a mask": 20, "two optimizers": 11,
        "several batches a step": 16, "adafactor": 8,
    }[name]  # fmt: skip


def test_a_state_that_cannot_follow_is_refused():
    """Moments of one number for each block would have to be averaged when positions move."""

    def init(params):
        return optax.TraceState(trace=jax.tree.map(lambda p: jnp.zeros(p.shape[:1]), params))

    odd = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    state = jax.eval_shape(lambda key: create_train_state(MODEL, odd, key, IMAGES), jax.random.key(0))
    with pytest.raises(NotImplementedError, match=r"a state of shape \(7,\) for conv/blocks, .* \(SGD, Adam, Lion"):
        jax.eval_shape(lambda s: repack_state(s, layouts(s.topology), odd), state)


@pytest.fixture(scope="module")
def adapted():
    """A state after two training steps, the same adapted twice, and whether the buffers given were donated."""
    optimizer = OPTIMIZERS["adamw"]
    state = copy(initial("adamw"))
    for _ in range(2):
        state, _ = train_step(state, IMAGES, LABELS, model=MODEL, optimizer=optimizer)
    given, again = copy(state), copy(state)
    run = functools.partial(adapt_step, images=IMAGES, labels=LABELS, model=MODEL, method=METHOD, optimizer=optimizer)
    return state, given, run(given), run(again)


def test_adapt_step_keeps_the_invariants(adapted):
    before, _, (after, report), _ = adapted
    check_repacked(before, after)
    assert set(report) == {"/".join(path) for path in LAYERS}
    for path, layer in ((tuple(name.split("/")), layer) for name, layer in report.items()):
        assert all(value.shape == () for value in layer)
        masks = [np.asarray(MASK(layouts(state.topology)[path])) for state in (before, after)]
        assert layer.turnover == pytest.approx((masks[1] & ~masks[0]).sum() / masks[0].sum())
        assert 0 < layer.accepted <= layer.requested
        assert layer.collateral == 0


def test_the_same_seed_gives_the_same_bits(adapted):
    *_, one, same = adapted
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        same_bits(a, b)


def test_the_state_is_donated(adapted):
    _, given, (after, _), _ = adapted
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_a_step_takes_what_a_step_gives(adapted):
    """Shapes, dtypes and structure never change, so nothing is ever compiled again."""
    before, _, (after, _), _ = adapted
    specs = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (before, after)]
    assert specs[0] == specs[1]
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_the_model_says_the_same_of_weights_that_stayed(adapted):
    """New weights are zero: after the adaptation the model computes what the kept weights compute."""
    before, _, (after, _), _ = adapted
    kept = {}
    for path, old in layouts(before.topology).items():
        blocks = before.params[path[0]]["blocks"]
        kept[path[0]] = PACK(UNPACK(blocks, old) * MASK(layouts(after.topology)[path]), old)
    params = {name: {**p, "blocks": kept[name]} if name in kept else p for name, p in before.params.items()}
    apply = jax.jit(MODEL.apply)
    wanted = apply({**before.variables, "params": params}, IMAGES)
    np.testing.assert_allclose(apply(after.variables, IMAGES), wanted, rtol=1e-5, atol=1e-6)


def test_layers_of_one_loop_are_updated_each_by_itself():
    """Equal and odd layers in any order: as the method alone with the layer's own key."""
    method = dsb(update_end_step=10, grow="random", granularity="panel_column")
    old = {
        ("a",): make_layout(0, (16, 12), (8, 4), (2, 1)),
        ("b",): make_layout(1, (16, 14), (8, 4), (1, 2)),
        ("c",): make_layout(2, (16, 12), (8, 4), (0, 3)),
    }
    rng = np.random.default_rng(0)
    blocks = {path: rng.normal(size=(3, 8, 4)).astype(np.float32) for path in old}
    key, step = jax.random.key(5), np.int32(0)
    update = jax.jit(method.update)
    new, report, _ = jax.jit(functools.partial(update_layers, method))(key, step, blocks, old, {})
    assert set(new) == set(old)
    for path, layer_key in zip(old, jax.random.split(key, 3), strict=True):
        layout, alone = update(layer_key, step, blocks[path], old[path], None)
        assert isinstance(new[path], BlockLayout)
        for a, b in zip(jax.tree.leaves((new[path], report[path[0]])), jax.tree.leaves((layout, alone)), strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("method", [ssb(), dense()], ids=["ssb", "dense"])
def test_methods_that_never_adapt_are_refused(method):
    state = initial("lion")
    with pytest.raises(ValueError, match=f"method '{method.name}' never adapts; call adapt_step for methods with an"):
        adapt_step(copy(state), IMAGES, LABELS, model=MODEL, method=method, optimizer=OPTIMIZERS["lion"])


def test_a_stack_of_layouts_is_refused():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            layer = nn.scan(
                lambda layer, carry, _: (layer(carry), None),
                variable_axes={"params": 0, "topology": 0},
                split_rngs={"params": True},
                length=2,
            )
            return layer(SparseDense(16, density=0.5, block_shape=(4, 4), name="dense"), x, None)[0]

    model, optimizer = Stack(), optax.sgd(0.1)
    images, labels = jnp.ones((4, 16)), jnp.zeros(4, jnp.int32)
    state = jax.jit(lambda key: create_train_state(model, optimizer, key, images))(jax.random.key(0))
    with pytest.raises(NotImplementedError, match="stack of layouts"):
        adapt_step(state, images, labels, model=model, method=dsb(update_end_step=10), optimizer=optimizer)
