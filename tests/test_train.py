"""Steps of classifiers that nobody here wrote: any arguments, fields, streams, inputs and collections (finding 3)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.losses import smoothed_cross_entropy
from dsb_jax.methods import DSB
from tests.classifiers import FC, LABELS, MODELS, SGD, Base, Counts, Named, Plain, Requires, Shifted, Tokens, X, create
from tests.topologies import assert_same_bits

METHOD = DSB(drop_fraction=0.5)
SHIFTED = Shifted()  # where another method shows nothing more


@jax.jit
def dense_logits(params, topology, inputs):
    dense = dsb.to_dense(params, topology)
    hidden = nn.relu(inputs @ dense["fc"]["kernel"] + dense["fc"]["bias"][None])
    return hidden @ dense["head"]["kernel"] + dense["head"]["bias"][None]


def losses_of(logits, labels):
    """Cross entropies in NumPy."""
    logits = np.asarray(logits)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("name", MODELS)
def test_all_steps_take_any_model(name):
    model, inputs = MODELS[name]
    state = create(model, inputs)
    before = jax.device_get(state)
    state, metrics = dsb.train_step(state, inputs, LABELS, model=model, optimizer=SGD)
    assert np.isfinite(metrics["loss"])
    assert 0 <= metrics["accuracy"] <= 1
    assert (np.asarray(state.params["fc"]["blocks"]) != before.params["fc"]["blocks"]).any()
    trained = jax.device_get(state)
    state, report = dsb.adapt_step(state, inputs, LABELS, model=model, method=SHIFTED, optimizer=SGD)
    assert report[("fc",)].accepted > 0
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for field in ("collections", "step", "key"):
        assert_same_bits(getattr(trained, field), jax.device_get(getattr(state, field)))
    sums = dsb.eval_step(state, inputs, LABELS, np.ones(8, np.float32), model=model)
    # Evaluation draws nothing: it is the dense model's loss.
    image = inputs if name not in ("a dictionary by name", "a dictionary as one argument", "a tuple") else X + 1
    if name != "other collections":
        wanted = losses_of(dense_logits(state.params, state.topology, image), LABELS).sum()
        np.testing.assert_allclose(sums["loss"], wanted, rtol=1e-4)
    else:
        assert (before.collections["counts"]["calls"], trained.collections["counts"]["calls"]) == (0, 1)
        assert (trained.collections["batch_stats"]["norm"]["mean"] != 0).any()
    assert sums["count"] == 8


def test_randomness_is_that_of_the_step():
    """The same step draws the same, another step something else."""
    model = Requires()
    state = create(model)
    first, second = (dataclasses.replace(state, step=np.int32(step)) for step in (0, 1))
    losses = [float(dsb.train_step(s, X, LABELS, model=model, optimizer=SGD)[1]["loss"])
              for s in (first, first, second)]  # fmt: skip
    assert losses[0] == losses[1] != losses[2]


TRACED = []


class Counted(Base):
    """Notes each time that it is traced; equal ones are equal, though they have no hash."""

    widths: list

    @nn.compact
    def __call__(self, x):
        TRACED.append(1)
        return self.net(x)


def test_equal_models_compile_once():
    def steps(model):
        state = create(Plain())
        state, _ = dsb.train_step(state, X, LABELS, model=model, optimizer=SGD)
        state, _ = dsb.adapt_step(state, X, LABELS, model=model, method=Shifted(), optimizer=SGD)
        dsb.eval_step(state, X, LABELS, model=model)
        return len(TRACED)

    first = steps(Counted([1, [2]]))
    assert first == steps(Counted([1, [2]])) == steps(Counted([1, [2]]))
    assert steps(Counted([1, [3]])) > first


class Normed(Base):
    """Batch statistics over all devices."""

    @nn.compact
    def __call__(self, x, train=False):
        return self.net(x, nn.BatchNorm(use_running_average=not train, axis_name="batch", momentum=0.5, name="norm"))


@pytest.fixture(scope="module")
def shards():
    """The three steps on two halves of a batch, the state beside it on the whole batch."""
    whole_model = Counts()

    def split(tree):
        return jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), tree)

    def every(state, inputs, labels, model, axis_name):
        how = {"model": model, "optimizer": SGD, "axis_name": axis_name}
        state, metrics = dsb.train_step(state, inputs, labels, **how)
        state, report = dsb.adapt_step(state, inputs, labels, method=METHOD, **how)
        return state, metrics, report

    state = create(Normed())
    run = jax.vmap(lambda x, y: every(state, x, y, Normed(), "batch"), axis_name="batch")
    mapped = jax.device_get(jax.jit(run)(split(X), split(LABELS)))
    counts = create(whole_model)
    state = dataclasses.replace(counts, params=state.params, topology=state.topology, opt_state=state.opt_state)
    whole = jax.device_get(every(state, X, LABELS, whole_model, None))
    return mapped, whole


def test_a_mapped_axis_is_the_whole_batch(shards):
    (mapped, metrics, report), (whole, whole_metrics, whole_report) = shards
    for leaf in jax.tree.leaves((mapped, metrics, report)):
        assert (leaf[0] == leaf[1]).all()  # replicas agree
    one = jax.tree.map(lambda leaf: leaf[0], mapped)
    assert_same_bits(one.topology, whole.topology)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in ("mean", "var"):
        stats = (state.collections["batch_stats"]["norm"][name] for state in (one, whole))
        np.testing.assert_allclose(*stats, rtol=1e-4, atol=1e-6)
    for name in ("loss", "accuracy"):
        assert metrics[name][0] == pytest.approx(whole_metrics[name], rel=1e-5)
    assert report[("fc",)].accepted[0] == whole_report[("fc",)].accepted > 0


def test_pmap_of_one_device():
    """As an axis of devices; more of them are in test_sharding.py."""
    state = jax.tree.map(lambda leaf: leaf[None], create(Normed()))
    how = {"model": Normed(), "optimizer": SGD, "axis_name": "batch"}

    def both(state, inputs, labels):
        state, metrics = dsb.train_step(state, inputs, labels, **how)
        return dsb.adapt_step(state, inputs, labels, method=SHIFTED, **how), metrics

    (_, report), metrics = jax.pmap(both, axis_name="batch")(state, X[None], LABELS[None])
    assert np.isfinite(metrics["loss"][0])
    assert report[("fc",)].accepted[0] > 0


@pytest.mark.parametrize("loss", [dsb.losses.cross_entropy, smoothed_cross_entropy(0.1)], ids=["plain", "smoothed"])
def test_labels_that_are_no_class(loss):
    """NaN, said at once, instead of a class of the other end (report 1); length 1 for 8 images is refused (18)."""
    model = Named()
    step = functools.partial(dsb.train_step, model=model, optimizer=SGD, loss=loss)
    for label, right in ((2, True), (-1, False), (-100, False), (3, False)):
        _, metrics = step(create(model), X, np.where(np.arange(8) == 5, label, LABELS))
        assert np.isfinite(metrics["loss"]) == right
    state = create(model)
    adapt = functools.partial(dsb.adapt_step, model=model, optimizer=SGD, method=SHIFTED, loss=loss)
    for run, labels in ((step, LABELS[:1]), (step, LABELS[:7]), (step, LABELS.astype(np.float32)), (adapt, LABELS[:1])):
        with pytest.raises(ValueError, match=r"labels are .* for logits \[8, 3\]; give one integer for each"):
            run(state, X, labels)
    with pytest.raises(ValueError, match=r"labels are int32\[1\] for logits \[8, 3\]"):
        dsb.eval_step(create(model), X, LABELS[:1], model=model)


def test_padding_may_hold_anything():
    """What has weight 0 is not there, NaN or a label of no class (report 2)."""
    model, state = Named(), create(Named())
    weight = np.where(np.arange(8) == 7, 0, 1).astype(np.float32)
    run = functools.partial(dsb.eval_step, state, model=model)
    wanted = run(X[:7], LABELS[:7])
    padded = np.where(np.arange(8)[:, None] == 7, np.nan, X)
    for x, labels in ((padded, LABELS), (X, np.where(np.arange(8) == 7, -1, LABELS)), (X, LABELS)):
        sums = run(x, labels, weight)
        for name in wanted:
            np.testing.assert_allclose(sums[name], wanted[name], rtol=1e-5)
    assert np.isnan(run(padded, LABELS)["loss"])
    half = run(X, LABELS, np.full(8, 0.5, np.float32))
    np.testing.assert_allclose(half["count"], 4)
    np.testing.assert_allclose(half["loss"], run(X, LABELS)["loss"] / 2, rtol=1e-6)
    assert run(X, LABELS, np.ones(8, bool))["count"] == 8


def test_tokens_with_weights_by_example_and_by_token():
    model = Tokens()
    tokens = np.random.default_rng(1).normal(size=(4, 5, 12)).astype(np.float32)
    labels = np.arange(20, dtype=np.int32).reshape(4, 5) % 3
    state = create(model, tokens)
    state, metrics = dsb.train_step(state, tokens, labels, model=model, optimizer=SGD)
    assert np.isfinite(metrics["loss"])
    state, report = dsb.adapt_step(state, tokens, labels, model=model, method=SHIFTED, optimizer=SGD)
    assert report[("fc",)].accepted > 0
    run = functools.partial(dsb.eval_step, state, tokens, labels, model=model)
    by_example = np.array([1, 0, 2, 1], np.float32)
    by_token = np.broadcast_to(by_example[:, None], (4, 5))
    one, two = run(by_example), run(by_token)
    assert one["count"] == two["count"] == 20
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6)
    some = (np.arange(20).reshape(4, 5) % 4 > 0).astype(np.float32)
    logits = np.asarray(jax.jit(model.apply)(state.variables, tokens))
    losses = losses_of(logits, labels)
    np.testing.assert_allclose(run(some)["loss"], (losses * some).sum(), rtol=1e-5)
    assert run(some)["correct"] == ((logits.argmax(-1) == labels) * some).sum()
    assert run()["count"] == 20
    for wrong in ((5,), (1,), (4, 1), (5, 4), (4, 5, 1)):
        with pytest.raises(ValueError, match=r"weight has shape .* for labels \(4, 5\); give one for each label, or"):
            run(np.ones(wrong, np.float32))


@pytest.mark.parametrize(("impl", "method"), [("rbg", METHOD), ("threefry2x32", SHIFTED)])
def test_any_generator_of_keys(impl, method):
    """Report 4: the key's own generator, whatever the default is at the step."""
    model = Requires()
    state = create(model, key=jax.random.key(0, impl=impl))
    assert state.key_impl == impl
    state, metrics = dsb.train_step(state, X, LABELS, model=model, optimizer=SGD)
    state, report = dsb.adapt_step(state, X, LABELS, model=model, method=method, optimizer=SGD)
    assert np.isfinite(metrics["loss"])
    assert report[("fc",)].accepted > 0
    raw = jax.eval_shape(lambda: dsb.create_train_state(model, SGD, jax.random.PRNGKey(0), X))
    assert raw.key_impl == "threefry2x32"


NAMES = ("enc/fc", "layout", "blocks", "topology", "kernel", "statistics")


class AllNames(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(sum(FC(name=name)(x) for name in NAMES)))


def test_layers_may_be_called_anything():
    """Reports 5 and 6: what stays keeps its bits, and the dense form is found."""
    model = AllNames()
    state = create(model)
    dense = jax.jit(lambda state: dsb.to_dense(state.params, state.topology))
    before = jax.device_get(dense(state))
    state, report = dsb.adapt_step(state, X, LABELS, model=model, method=METHOD, optimizer=SGD)
    after = jax.device_get(dense(state))
    assert set(report) == {(name,) for name in NAMES}
    for name in NAMES:
        assert report[(name,)].accepted > 0
        was, now = before[name]["kernel"], after[name]["kernel"]
        stays = (was != 0) & (now != 0)
        assert 0 < stays.sum() < np.count_nonzero(was)
        assert_same_bits(now[stays], was[stays])


def test_a_batch_that_is_not_finite_changes_no_layer():
    model, state = Named(), create(Named())
    before = jax.device_get(state)
    state, report = dsb.adapt_step(state, X * np.inf, LABELS, model=model, method=SHIFTED, optimizer=SGD)
    assert_same_bits(jax.device_get(state), before)
    assert report[("fc",)].status == 5


def mean_square(outputs: Any, labels: Any) -> jax.Array:
    return jnp.square(outputs - labels["target"]).mean()


def test_a_loss_of_one_s_own():
    """Labels are whatever it takes; there is no accuracy where there are no classes."""
    model, labels = Named(), {"target": np.ones((8, 3), np.float32)}
    state, metrics = dsb.train_step(create(model), X, labels, model=model, optimizer=SGD, loss=mean_square)
    assert set(metrics) == {"loss"}
    state, report = dsb.adapt_step(
        state, X, labels, model=model, method=SHIFTED, optimizer=SGD, loss=mean_square, where=lambda path: False
    )
    assert report[("fc",)].status == 1


def test_a_model_without_collections_or_parameters_to_adapt():
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    state = create(Dense())
    assert (state.topology, state.collections) == ({}, {})
    state, _ = dsb.train_step(state, X, LABELS, model=Dense(), optimizer=SGD)
    state, report = dsb.adapt_step(state, X, LABELS, model=Dense(), method=SHIFTED, optimizer=SGD)
    assert report == {}
