"""Invariants of the adaptation: what stays is bit-identical, what is new is zero, nothing else is touched."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state

import dsb_jax as dsb
from dsb_jax.adapt import _Layers, _update_layers
from dsb_jax.layout import pack, real_rows, to_mask, unpack
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import DSB, SET, LayerState, RigL, Static, TopKAST
from dsb_jax.methods.base import STATUS
from dsb_jax.origins import move
from dsb_jax.paths import nodes
from tests.conftest import make_layout
from tests.topologies import DrawnByNumPy, assert_same_bits, node_of_counts, noise_like, stacked


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
PACK, UNPACK, MASK, REAL_ROWS = (jax.jit(f) for f in (pack, unpack, to_mask, real_rows))
METHOD = DSB(drop_fraction=0.5, update_end_step=100)
ADAMW = optax.adamw(1e-2)


def check_moved(before, after, old_topology, topology):
    """Every block-shaped leaf of a tree followed its weights, every other leaf is the same; how many followed."""
    old, new, moved = nodes(old_topology), nodes(topology), 0
    assert jax.tree.structure(before) == jax.tree.structure(after)
    leaves = jax.tree_util.tree_leaves_with_path(before)
    for (path, a), b in zip(leaves, jax.tree.leaves(after), strict=True):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))[-2:]
        if names not in old:
            assert_same_bits(a, b)
            continue
        moved += 1
        was, now = old[names].layout, new[names].layout
        assert_same_bits(np.asarray(b), np.asarray(PACK(UNPACK(a, was), now)))
        mask_a, mask_b = (np.asarray(MASK(layout)) for layout in (was, now))
        assert mask_a.sum() == mask_b.sum() == was.num_active
        assert (mask_b & ~mask_a).any()  # the law would hold of layouts that never change
        assert not np.asarray(b)[~np.broadcast_to(REAL_ROWS(now), b.shape)].any()  # phantom weights
    return moved


def copy(tree):
    return jax.tree.map(jnp.array, tree)


@pytest.fixture(scope="module")
def adapted():
    """A state after two training steps, the same adapted twice, and what was given (donated)."""
    state = jax.jit(lambda key: dsb.create_train_state(MODEL, ADAMW, key, IMAGES))(jax.random.key(0))
    for _ in range(2):
        state, _ = dsb.train_step(state, IMAGES, LABELS, model=MODEL, optimizer=ADAMW)
    given, again = copy(state), copy(state)
    run = functools.partial(dsb.adapt_step, inputs=IMAGES, labels=LABELS, model=MODEL, method=METHOD, optimizer=ADAMW)
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
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.params, given.opt_state)))
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
        layers[path] = (every, None, np.zeros(count, np.float32), np.zeros(count, np.int32))
    results = jax.jit(lambda layers: _update_layers(
        method, key, step, {path: _Layers(*layer, False) for path, layer in layers.items()}))(layers)  # fmt: skip
    update = jax.jit(method.update)
    assert set(results) == set(old)
    for path, layer_key in zip(old, jax.random.split(key, 4), strict=True):
        keys = jax.random.split(layer_key, 2) if path == ("stack",) else [layer_key]
        for i, (state, own) in enumerate(zip(states[path], keys, strict=True)):
            new, report = update(own, step, state, None)
            assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], results[path]), (new, report._replace(
                calls=jnp.int32(0), status=jnp.int32(0))))  # fmt: skip


X = np.random.default_rng(1).normal(size=(6, 12)).astype(np.float32)


class Plain(nn.Module):
    """Two equal layers, in methods' own storage."""

    method: object = DrawnByNumPy()

    @nn.compact
    def __call__(self, x):
        sparse = {"num_blocks": 3, "block_shape": (8, 4), "implementation": "dense", "method": self.method}
        x = nn.relu(SparseDense(16, name="one", **sparse)(x))
        return SparseDense(16, name="two", **sparse)(x[:, :12])


def squares(model, variables, x):
    return jnp.square(model.apply(variables, x) - 1).mean()


PLAIN_LOSS = functools.partial(squares, Plain())


STATIC = Static()


@functools.cache
def plain(method=STATIC):
    variables = jax.device_get(jax.jit(Plain(method).init)(jax.random.key(0), X))
    return variables["params"], variables["topology"]


def adapt(optimizer=ADAMW, *, loss_fn=PLAIN_LOSS, x=X, step=3, method=METHOD, opt_state=None, **options):
    params, topology = plain()
    state = noise_like(jax.eval_shape(optimizer.init, params)) if opt_state is None else opt_state
    run = dsb.adaptation(loss_fn, method, optimizer, **options)
    new = jax.device_get(run(params, topology, state, step, jax.random.key(1), x))
    return (params, topology, state), new


def layer_of(trees, name):
    """Weights, node and moments of one layer."""
    params, topology, state = trees[:3]
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
               if any(getattr(key, "key", None) == name for key in path)]  # fmt: skip
    return params[name], topology[name], moments


def label(params):
    return {name: "zero" if name == "one" else "adam" for name in params}


FROZEN = {
    "multi_transform": optax.multi_transform({"zero": optax.set_to_zero(), "adam": optax.adam(1e-2)}, label),
    "masked, last": optax.chain(
        optax.adam(1e-2), optax.masked(optax.set_to_zero(), lambda p: {name: name == "one" for name in p})),
    "masked, first": optax.chain(
        optax.masked(optax.set_to_zero(), lambda p: {name: name == "one" for name in p}), optax.sgd(0.1, 0.9)),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers_stay_bit_by_bit(name):
    """The other layer adapts; at step 0 of a warm-up both do (finding 13)."""
    before, after = adapt(FROZEN[name])
    assert_same_bits(layer_of(after, "one"), layer_of(before, "one"))
    one, two = after[3][("one",)], after[3][("two",)]
    assert STATUS[one.status] == "frozen: the optimizer does not use its gradient"
    assert (one.requested, one.accepted, one.turnover) == (0, 0, 0)
    assert (two.status, two.accepted > 0) == (0, True)
    rest = [{"two": trees[0]["two"]} for trees in (before, after)]
    assert check_moved(*rest, before[1], after[1]) == 1


def test_a_warm_up_freezes_nothing():
    warm = optax.adam(optax.linear_schedule(0.0, 0.1, 10))
    _, after = adapt(warm, step=0, opt_state=warm.init(plain()[0]))
    assert all(layer.status == 0 and layer.accepted > 0 for layer in after[3].values())


def test_layers_that_are_excluded():
    before, after = adapt(where=lambda path: path != ("two",))
    assert_same_bits(layer_of(after, "two"), layer_of(before, "two"))
    assert STATUS[after[3][("two",)].status] == "excluded by where="
    assert after[3][("one",)].accepted > 0
    before, after = adapt(where=lambda path: False)
    assert_same_bits(after[:3], before)
    assert {int(layer.status) for layer in after[3].values()} == {1}


def without_statistics(variables, x):
    return PLAIN_LOSS({name: variables[name] for name in ("params", "topology")}, x)


def only_the_first(variables, x):
    y = SparseDense(16, num_blocks=3, block_shape=(8, 4), implementation="dense").apply(
        {name: variables[name]["one"] for name in variables}, x)  # fmt: skip
    return jnp.square(y - 1).mean()


def test_layers_that_are_not_observed():
    before, after = adapt(loss_fn=without_statistics)
    assert_same_bits(after[:3], before)
    assert {STATUS[layer.status][:12] for layer in after[3].values()} == {"not observed"}
    before, after = adapt(loss_fn=only_the_first)
    assert_same_bits(layer_of(after, "two"), layer_of(before, "two"))
    assert [int(after[3][(name,)].calls) for name in ("one", "two")] == [1, 0]
    assert after[3][("one",)].accepted > 0


def test_a_batch_that_is_not_finite_changes_nothing():
    """Report 12; the neighbours NaN and -inf."""
    before, after = adapt(x=X)
    assert all(layer.accepted > 0 for layer in after[3].values())
    for bad in (np.inf, np.nan, -np.inf):
        before, after = adapt(x=np.where(np.arange(6)[:, None] == 2, np.float32(bad), X))
        assert_same_bits(after[:3], before)
        for layer in after[3].values():
            assert STATUS[layer.status] == "its statistic is not finite"
            assert layer.turnover == 0


METHODS = [DSB(), Static(), RigL(), SET(), TopKAST()]


@pytest.mark.parametrize("made", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_layers_of_another_storage_are_refused(made, method):
    """Every pair of methods: one line with the cure, from every door (finding 11)."""
    params, topology = plain(made)
    optimizer = optax.sgd(0.1)
    run = dsb.adaptation(PLAIN_LOSS, method, optimizer)
    doors = {
        "adaptation": lambda: jax.eval_shape(run, params, topology, optimizer.init(params), 3, jax.random.key(0), X),
        "update": lambda: dsb.update(
            method, optimizer, params, topology, optimizer.init(params), 3, jax.random.key(0), {}
        ),
        "check_optimizer": lambda: dsb.check_optimizer(optimizer, params, topology, method=method),
        "restage": lambda: dsb.restage(
            params, topology, (), dsb.SparsityPlan(()), method, optimizer, jax.random.key(0)
        ),
    }
    if made.storage == method.storage:
        doors["check_optimizer"]()
        return
    for name, door in doors.items():
        wanted = (
            rf"^{type(method).__name__} adapts layers with storage '{method.storage}', but one has '{made.storage}'; "
        )
        with pytest.raises(
            ValueError, match=rf"{wanted}make the layers with method={type(method).__name__}\("
        ) as error:
            door()
        assert "\n" not in str(error.value), name


def test_equal_methods_compile_once():
    """Built anew in a loop, with everything else that is equal (finding 12)."""
    traced = []

    def loss_fn(variables, x):
        traced.append(1)
        return PLAIN_LOSS(variables, x)

    params, topology = plain()
    optimizer = optax.sgd(0.1)
    trees = params, topology, optimizer.init(params)
    for step in range(4):
        method = DSB(drop_fraction=0.5, update_end_step=100)
        run = dsb.adaptation(loss_fn, method, optimizer, fill={})
        *trees, _ = run(*trees, step, jax.random.key(step), X)
        if step == 0:
            first = len(traced)
    assert len(traced) == first > 0
    run = dsb.adaptation(loss_fn, DSB(drop_fraction=0.25, update_end_step=100), optimizer)
    jax.eval_shape(run, *trees, 0, jax.random.key(0), X)
    assert len(traced) > first
    assert run == dsb.adaptation(loss_fn, DSB(drop_fraction=0.25, update_end_step=100), optimizer)
    assert hash(run) == hash(dsb.adaptation(loss_fn, DSB(drop_fraction=0.25, update_end_step=100), optimizer))


def test_measure_and_update_are_an_adaptation():
    before, after = adapt()
    params, topology, state = before
    statistics = dsb.measure(PLAIN_LOSS, METHOD)(params, topology, X)
    assert_same_bits(
        jax.device_get(dsb.update(METHOD, ADAMW, params, topology, state, 3, jax.random.key(1), statistics)), after
    )


def test_outside_of_the_schedule_nothing_changes():
    before, after = adapt(step=100)
    assert_same_bits(after[:3], before)


class FlaxState(train_state.TrainState):
    topology: dict = flax.struct.field(default_factory=dict)


def test_flax_s_train_state_comes_back_whole():
    """Finding 4: a field `topology` and `dsb.adaptation`, in somebody's own loop."""
    params, topology = plain()
    state = FlaxState.create(apply_fn=Plain().apply, params=params, tx=ADAMW, topology=topology)

    @jax.jit
    def train(state, x):
        grads = jax.grad(lambda p: PLAIN_LOSS({"params": p, "topology": state.topology}, x))(state.params)
        return state.apply_gradients(grads=grads)

    state = train(state, X)
    before = jax.device_get(state)
    trees = dsb.adaptation(PLAIN_LOSS, METHOD, state.tx)(
        state.params, state.topology, state.opt_state, state.step, jax.random.key(1), X
    )
    new = state.replace(params=trees[0], topology=trees[1], opt_state=trees[2])
    assert isinstance(new, FlaxState)
    assert (new.apply_fn, new.tx) == (state.apply_fn, state.tx)
    check = functools.partial(check_moved, old_topology=before.topology, topology=new.topology)
    assert check(before.params, new.params) == 2
    assert check(before.opt_state, new.opt_state) == 4
    assert train(new, X).step == 2


def test_an_average_of_the_weights_follows():
    """Report 14: its loss stays low after an adaptation if it is repacked, and does not if it is not."""
    params, topology = plain()
    optimizer = optax.adam(3e-2)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state, ema = carry
            grads = jax.grad(lambda p: PLAIN_LOSS({"params": p, "topology": topology}, X))(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state, optax.incremental_update(params, ema, 0.1)), None

        return jax.lax.scan(step, (params, optimizer.init(params), params), None, 200)[0]

    params, state, ema = train(params)
    few = DSB(drop_fraction=0.1)
    *new, _ = dsb.adaptation(PLAIN_LOSS, few, optimizer)(params, topology, state, 3, jax.random.key(1), X)
    moved = dsb.repack(ema, topology, new[1])
    losses = [float(PLAIN_LOSS({"params": p, "topology": t}, X))
              for p, t in ((params, topology), (ema, topology), (moved, new[1]), (ema, new[1]))]  # fmt: skip
    trained, average, repacked, left_behind = losses
    assert average < 0.05 + 2 * trained
    assert repacked < average + 0.1
    assert left_behind > 2 * repacked


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_is_adapted_as_its_layers(axis):
    """Along any axis; the layers of the stack draw keys of their own."""
    each = [node_of_counts(seed, (16, 12), (8, 4), (1, 2)) for seed in (3, 4)]
    blocks = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
    tree = {"s": {"blocks": np.moveaxis(blocks, 0, axis)}}
    topology = {"s": {"blocks": stacked(each, axis)}}
    how = DSB(drop_fraction=0.5, grow="random")
    new_params, new_topology, _, report = jax.device_get(
        dsb.update(how, optax.identity(), tree, topology, optax.EmptyState(), 3, jax.random.key(2), {})
    )
    dsb.validate_topology(new_topology)
    assert report[("s",)].accepted.shape == (2,)
    keys = jax.random.split(jax.random.split(jax.random.key(2), 1)[0], 2)
    for i, node in enumerate(each):
        state, _ = jax.jit(how.update)(keys[i], 3, LayerState(blocks[i], node.layout), None)
        took = jax.tree.map(
            lambda leaf, i=i: np.take(leaf, i, axis), (new_params["s"]["blocks"], new_topology["s"]["blocks"].layout)
        )
        assert_same_bits(took, jax.device_get((state.blocks, state.layout)))
