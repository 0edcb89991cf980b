"""Which layers an adaptation changes and which it leaves alone, in models and loops of anybody."""

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
from dsb_jax.linen import SparseDense
from dsb_jax.measuring import Measured
from dsb_jax.methods import DSB, SET, LayerState, RigL, Static, TopKAST
from dsb_jax.methods.base import STATUS
from tests.topologies import (
    DrawnByNumPy,
    assert_same_bits,
    check_moved,
    node_of_counts,
    noise_like,
    stacked,
)

METHOD = DSB(drop_fraction=0.5, update_end_step=100)
ADAMW = optax.adamw(1e-2)
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
    run(*trees, 0, jax.random.key(0), X)
    assert len(traced) == first  # it measures the same
    jax.eval_shape(dsb.adaptation(loss_fn, DSB(grow="norm"), optimizer), *trees, 0, jax.random.key(0), X)
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
    trees = dsb.adaptation(PLAIN_LOSS, METHOD, state.tx, fill={"nu": "zero"})(
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


def test_a_stack_is_adapted_as_its_layers():
    """Along axis 1 (0 is in test_method_contract.py); the layers of the stack draw keys of their own."""
    each = [node_of_counts(seed, (16, 12), (8, 4), (1, 2)) for seed in (3, 4)]
    blocks = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
    tree = {"s": {"blocks": np.moveaxis(blocks, 0, 1)}}
    topology = {"s": {"blocks": stacked(each, 1)}}
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
            lambda leaf, i=i: np.take(leaf, i, 1), (new_params["s"]["blocks"], new_topology["s"]["blocks"].layout)
        )
        assert_same_bits(took, jax.device_get((state.blocks, state.layout)))


def test_one_layer_of_a_stack_that_is_not_finite_stays_as_it_is():
    """Its weights, layout and moments, bit by bit; the other layer adapts. The same of two layers by name."""
    each = [node_of_counts(seed, (16, 12), (8, 4), (1, 2)) for seed in (3, 4)]
    blocks = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
    tree = {"s": {"blocks": blocks}, "one": {"blocks": blocks[0]}, "two": {"blocks": blocks[1]}}
    topology = {name: {"blocks": node} for name, node in (("s", stacked(each)), ("one", each[0]), ("two", each[1]))}
    norms = np.random.default_rng(1).uniform(size=(2, 2, 12)).astype(np.float32)
    norms[1, 0, 3] = np.nan
    ones = np.ones(2, np.float32)
    statistics = {
        "s": {"blocks": Measured(norms, ones, 1)},
        "one": {"blocks": Measured(norms[0], ones[0], 1)},
        "two": {"blocks": Measured(norms[1], ones[0], 1)},
    }
    state = noise_like(jax.eval_shape(ADAMW.init, tree))
    new, moved, new_state, report = jax.device_get(
        dsb.update(METHOD, ADAMW, tree, topology, state, 3, jax.random.key(2), statistics)
    )
    np.testing.assert_array_equal(report[("s",)].status, [0, 5])
    assert [int(report[(name,)].status) for name in ("one", "two")] == [0, 5]

    def of(trees, name, i=...):
        params, nodes, (moments, *_) = trees
        found = params, nodes, moments.mu, moments.nu
        return [leaf[i] for part in found for leaf in jax.tree.leaves(part[name])]

    before, after = (tree, topology, state), (new, moved, new_state)
    for name, i in (("s", 1), ("two", ...)):
        assert_same_bits(of(after, name, i), of(before, name, i))
    for name, i in (("s", 0), ("one", ...)):
        assert all((a != b).any() for a, b in zip(of(after, name, i)[:2:2], of(before, name, i)[:2:2], strict=True))
