"""Any optax optimizer: its moments follow their weights, bit by bit, or it is refused before the first step."""

import dataclasses
import warnings
from typing import Any, ClassVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsb_jax as dsb
from dsb_jax.layout import pack, unpack
from dsb_jax.measuring import Measured
from dsb_jax.methods import DSB, SET, LayerState, RigL, TopKAST
from dsb_jax.methods.identity import identity
from dsb_jax.optimizer_states import SECOND_MOMENTS, check_optimizer, followers, frozen_layers
from dsb_jax.origins import move
from dsb_jax.paths import nodes
from dsb_jax.telemetry import active_positions
from dsb_jax.topology import LayerTopology
from tests.topologies import assert_same_bits, node_of_counts, noise_like, stacked


class TheLayout:
    """A statistic in the form of a layout."""

    def zeros(self, spec):
        return TOPOLOGY["one"]["blocks"].layout

    def finish(self, value, axis_name=None):
        return value


@dataclasses.dataclass(frozen=True)
class Given:
    """Takes the layout that is passed for a statistic, so that every kind of move happens."""

    name: ClassVar[str] = "given"
    storage: ClassVar[str] = "blocks"
    statistic: ClassVar[Any] = TheLayout()

    def update(self, key, step, state, statistic):
        return LayerState(move(state.blocks, state.layout, statistic), statistic), identity(state)[1]


def topology_of(seed: int) -> dict[str, Any]:
    """Two layers of one shape, and two stacked layers."""
    one, same, first, second = (
        node_of_counts(4 * seed + i, (8, 12), (4, 3), ((2, 1), (1, 2))[(seed + i) % 2]) for i in range(4)
    )
    nodes = {"one": one, "same": same, "stack": {"fc": stacked([first, second])}}
    return jax.tree.map(lambda node: {"blocks": node}, nodes, is_leaf=lambda node: isinstance(node, LayerTopology))


TOPOLOGY, NEW = topology_of(0), topology_of(1)
STATISTICS = jax.tree.map(
    lambda node: Measured(node.layout, jnp.ones(node.stack_shape), 0),
    NEW,
    is_leaf=lambda node: isinstance(node, LayerTopology),
)
PARAMS = {
    "one": {"blocks": np.ones((3, 4, 3), np.float32), "bias": np.ones(8, np.float32)},
    "same": {"blocks": np.ones((3, 4, 3), np.float32)},
    "stack": {"fc": {"blocks": np.ones((2, 3, 4, 3), jnp.bfloat16)}},
    "head": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)},
}
LAYERS = {path[:-1]: (node, nodes(NEW)[path]) for path, node in nodes(TOPOLOGY).items()}


def label(path, _):
    return "sgd" if path[0] == "one" else "adam"


def by_name(params):
    return flax.traverse_util.path_aware_map(label, params)


def is_blocks(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "blocks", params)


TWO = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(1e-2)}
# name: (optimizer, how many arrays of its state follow one of the three nodes).
FOLLOWING = {
    "sgd": (optax.sgd(0.1), 0),
    "momentum": (optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9, nesterov=True), 3),
    "adamw": (optax.adamw(1e-2), 6),
    "adamw with a mask": (optax.adamw(1e-2, mask=is_blocks), 6),
    "adam with moments in bfloat16": (optax.adam(1e-2, mu_dtype=jnp.bfloat16), 6),
    "amsgrad": (optax.amsgrad(1e-2), 9),
    "lion": (optax.lion(1e-2), 3),
    "novograd": (optax.novograd(1e-2), 3),
    "lamb": (optax.lamb(1e-2), 6),
    "lars": (optax.lars(1e-2), 3),
    "adafactor, nothing to factor": (optax.adafactor(1e-2), 3),
    "a chain with a masked trace and an average": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.trace(0.9), is_blocks), optax.ema(0.9)), 6),
    "labels by path_aware_map": (optax.multi_transform(TWO, by_name), 5),
    "a full tree of labels": (optax.multi_transform(TWO, by_name(PARAMS)), 5),
    "accumulation": (optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(), 9),
    "injected": (optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.0, 1.0, 9)), 6),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(1e-2), 3), 6),
    "dog": (optax.contrib.dog(), 3),
    "prodigy": (optax.contrib.prodigy(1e-2), 12),
    "schedule_free": (optax.contrib.schedule_free_adamw(1e-2), 6),
    "sam": (optax.contrib.sam(optax.sgd(0.1, momentum=0.9), optax.sgd(0.05), sync_period=2), 6),
    "plateau": (optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()), 6),
    "lookahead_of_nothing": (optax.chain(optax.scale_by_belief(), optax.add_noise(0.1, 0.5, jax.random.key(0))), 6),
    "muon": (optax.contrib.muon(1e-2), 6),
}  # fmt: skip
REFUSED = {
    "flatten": optax.flatten(optax.adam(1e-2)),
    "sm3": optax.sm3(0.1),
    "adafactor that factors": optax.adafactor(1e-2, min_dim_size_to_factor=3),
    "lbfgs": optax.lbfgs(),
}


def at_layers(tree):
    """(path of the layer or None, leaf), the layer's path found by the names of dictionaries on the way."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        tails = [names[i:-1] for i in range(len(names)) if names[-1] == "blocks" and names[i:-1] in LAYERS]
        found.append((tails[0] if tails and np.ndim(leaf) > 1 else None, leaf))
    return found


@jax.jit
def packed(leaf, old, new):
    return pack(unpack(leaf, old), new)


def noise_like_state(optimizer):
    """A state of whose float arrays none is zero by chance."""
    state = jax.eval_shape(lambda: optimizer.init(jax.tree.map(jnp.asarray, PARAMS)))
    return jax.tree.map(
        lambda leaf: jax.random.key(0) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else noise_like(leaf),
        state,
    )


@pytest.mark.parametrize("name", FOLLOWING)
def test_moments_follow_their_weights(name):
    optimizer, count = FOLLOWING[name]
    check_optimizer(optimizer, PARAMS, TOPOLOGY, method=Given())
    params, opt_state = noise_like(PARAMS), noise_like_state(optimizer)
    fields = {follower.field for follower in followers(optimizer, PARAMS, TOPOLOGY).values()}
    fill = {field: "zero" for field in SECOND_MOMENTS if field in fields}
    with jax.disable_jit():  # operations one by one are compiled once for all optimizers
        new_params, topology, new_state, _ = jax.device_get(
            dsb.update(Given(), optimizer, params, TOPOLOGY, opt_state, 3, jax.random.key(7), STATISTICS, fill=fill)
        )
    assert_same_bits(topology, NEW)
    moved = 0
    for was, now in ((params, new_params), (opt_state, new_state)):
        assert jax.tree.structure(was) == jax.tree.structure(now)
        for (layer, a), (_, b) in zip(at_layers(was), at_layers(now), strict=True):
            if layer is None:
                assert_same_bits(a, b)
                continue
            moved += 1
            old, new = (node.layout for node in LAYERS[layer])
            if layer == ("stack", "fc"):
                each = [packed(a[i], *jax.tree.map(lambda leaf, i=i: leaf[i], (old, new))) for i in range(2)]
                assert_same_bits(b, np.stack(each))
            else:
                assert_same_bits(b, np.asarray(packed(a, old, new)))
    assert moved == 3 + count


def test_the_move_of_these_tests_keeps_some_and_loses_some():
    for path, (old, new) in LAYERS.items():
        if path[0] != "stack":
            old, new = (set(active_positions(node.layout).tolist()) for node in (old, new))
            assert old & new
            assert old - new


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("abstract", [False, True])
def test_what_cannot_follow_is_refused_before_the_first_step(name, abstract):
    params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS)) if abstract else PARAMS
    with pytest.raises(
        ValueError, match=r"the optimizer keeps a state of shape \(.*\) at .*, which cannot follow .*SGD, Adam, Lion"
    ):
        check_optimizer(REFUSED[name], params, TOPOLOGY)
    if name != "lbfgs":
        with pytest.raises(ValueError, match="cannot follow the blocks"):
            jax.eval_shape(
                lambda state: dsb.update(
                    Given(), REFUSED[name], PARAMS, TOPOLOGY, state, 3, jax.random.key(0), STATISTICS
                ),
                jax.eval_shape(REFUSED[name].init, jax.tree.map(jnp.asarray, PARAMS)),
            )


def test_layers_that_have_nothing_to_do_with_it_may_be_factored():
    """What a masked transformation keeps for the dense layers need not follow anything."""
    dense = optax.masked(
        optax.sm3(0.1), lambda params: jax.tree.map(lambda is_sparse: not is_sparse, is_blocks(params))
    )
    assert followers(dense, PARAMS, TOPOLOGY) == {}
    assert len(followers(optax.chain(dense, optax.trace(0.9)), PARAMS, TOPOLOGY)) == 3


def test_each_follower_has_its_field_and_its_layer():
    optimizer = optax.chain(optax.clip(1.0), optax.multi_transform(TWO, by_name), optax.ema(0.9))
    leaves = jax.tree_util.tree_leaves_with_path(optimizer.init(PARAMS))
    found = followers(optimizer, PARAMS, TOPOLOGY)
    assert len(found) == 5 + 3
    for i, follower in found.items():
        names = [getattr(key, "name", getattr(key, "key", None)) for key in leaves[i][0]]
        assert tuple(names[-len(follower.path) :]) == follower.path
        assert follower.field in names
    fields = {(f.path[0], f.field) for f in found.values()}
    assert {("one", "trace"), ("same", "mu"), ("same", "nu"), ("one", "ema")} <= fields
    assert ("one", "mu") not in fields


def test_a_tree_of_other_sizes_is_refused():
    params = {**PARAMS, "one": {"blocks": np.ones((5, 4, 3), np.float32)}}
    with pytest.raises(ValueError, match=r"one/blocks has shape \(5, 4, 3\), but its topology holds \(3, 4, 3\)"):
        check_optimizer(optax.adam(1e-2), params, TOPOLOGY)
    with pytest.raises(ValueError, match="the tree has 0 arrays at 'one/blocks'"):
        check_optimizer(optax.adam(1e-2), {"head": PARAMS["head"]}, TOPOLOGY)


@pytest.mark.parametrize("method", [RigL(), SET(), TopKAST()])
def test_the_method_is_checked_with_it(method):
    check_optimizer(optax.adam(1e-2), PARAMS, TOPOLOGY, method=DSB.for_adam())
    with pytest.raises(ValueError, match=f"^{type(method).__name__} adapts layers with storage '{method.storage}', but "
                       "one has 'blocks'; make the layers with method="):  # fmt: skip
        check_optimizer(optax.adam(1e-2), PARAMS, TOPOLOGY, method=method)


def test_growth_by_gradients_and_an_optimizer_that_normalizes_do_not_go_together():
    with pytest.warns(UserWarning, match=r"^DSB grows by gradients, .* Growth at random does better: DSB.for_adam\(\)"):
        check_optimizer(optax.adam(1e-2), PARAMS, TOPOLOGY, method=DSB())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_optimizer(optax.adam(1e-2), PARAMS, TOPOLOGY, method=DSB.for_adam())
        check_optimizer(optax.sgd(1e-2, momentum=0.9), PARAMS, TOPOLOGY, method=DSB())


ZERO = optax.set_to_zero()
FREEZE_ONE = {"sgd": ZERO, "adam": optax.adam(1e-2)}
WARM = optax.linear_schedule(0.0, 0.1, 10)


def only_one(params):
    return flax.traverse_util.path_aware_map(lambda path, _: path[0] == "one", params)


@pytest.mark.parametrize(("optimizer", "frozen"), [
    (optax.sgd(0.1), set()),
    (optax.adam(WARM), set()),
    (optax.inject_hyperparams(optax.adamw)(learning_rate=WARM), set()),
    (optax.sgd(0.0), set()),
    (ZERO, {"one", "same", "stack"}),
    (optax.multi_transform(FREEZE_ONE, by_name), {"one"}),
    (optax.multi_transform(FREEZE_ONE, by_name(PARAMS)), {"one"}),
    (optax.chain(optax.adam(1e-2), optax.masked(ZERO, only_one)), {"one"}),
    (optax.chain(optax.masked(ZERO, only_one), optax.adam(WARM)), {"one"}),
    (optax.chain(optax.masked(ZERO, only_one), optax.add_decayed_weights(0.1), optax.sgd(0.1)), {"one"}),
    (optax.MultiSteps(optax.multi_transform(FREEZE_ONE, by_name), 2).gradient_transformation(), {"one"}),
    (optax.apply_if_finite(optax.multi_transform(FREEZE_ONE, by_name), 3), {"one"}),
    (optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(FREEZE_ONE, by_name)), {"one"}),
    (optax.partition(FREEZE_ONE, by_name), {"one"}),
    (optax.freeze(only_one(PARAMS)), {"one"}),
    (optax.selective_transform(optax.adam(1e-2), freeze_mask=only_one(PARAMS)), {"one"}),
    (optax.polyak_sgd(), set()),
])  # fmt: skip
def test_frozen_layers_are_found_by_data_flow(optimizer, frozen):
    """A rate that is zero now is no reason: it is another number at the next step."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    assert {path[0] for path in frozen_layers(optimizer, params, optimizer.init(params), TOPOLOGY)} == frozen
