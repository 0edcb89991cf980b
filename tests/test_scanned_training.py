"""Training as compiled scans: the law of the loop over steps, for one seed and for several at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.train import adapt_step, train_step
from dsb_jax.training import data, loop
from dsb_jax.training.build import build, make_key
from dsb_jax.training.config import Config
from experiments import scanned_training
from experiments.scanned_training import DeviceData, begin, compile_programs, state_of, train, whole_segments
from tests.conftest import always

# 19 steps of 16, 16 of them in whole segments of 4; an epoch ends within a segment.
CONFIG = Config(
    model="narrow_convnet", epochs=2, batch_size=16, update_interval=4, update_end_fraction=0.8, adapt_batch_size=8,
    keep_dense=("stem", "head", "conv_1", "conv_2"),
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    full = data.load("digits")
    names = {"train_inputs": 160, "train_labels": 160, "test_inputs": 50, "test_labels": 50}
    return dataclasses.replace(full, **{name: getattr(full, name)[:count] for name, count in names.items()})


def trained_step_by_step(config, components, dataset, seed):
    """The state after all steps, and how many adaptations there were: what `dsb_jax.training.loop` does."""
    components, state = loop.create(dataclasses.replace(config, seed=seed))
    order_key, augment_key = jax.random.split(make_key(seed + 1))
    per_epoch, num_adaptations = len(dataset.train_labels) // config.batch_size, 0
    how = {"model": components.model, "optimizer": components.optimizer, "loss": components.loss}
    take = jax.jit(
        lambda idx, step: data.take_batch(
            jnp.asarray(dataset.train_inputs), jnp.asarray(dataset.train_labels), idx,
            key=jax.random.fold_in(augment_key, step), augmentation=dataset.augmentation,
            mean=dataset.mean, std=dataset.std,
        )
    )  # fmt: skip
    for step in range(config.total_steps):
        order = data.epoch_order(order_key, step // per_epoch, len(dataset.train_labels))
        at = step % per_epoch * config.batch_size
        batch = take(order[at : at + config.batch_size], step)
        if components.method.due(step):
            measured = (array[: config.adapt_batch_size] for array in batch)
            state, _ = adapt_step(state, *measured, method=components.method, fill=dict(components.fill), **how)
            num_adaptations += 1
        state, _ = train_step(state, *batch, **how)
    return state, num_adaptations


@pytest.mark.parametrize(
    ("method", "seeds"),
    always(("set", (0, 5)), of=[("dsb", (3,)), ("set", (0, 5))]),
    ids=["one seed", "two together"],
)
def test_scans_are_the_loop_over_steps(digits, method, seeds):
    config = whole_segments(loop.for_dataset(dataclasses.replace(CONFIG, method=method), digits), least_adaptations=1)
    assert (config.total_steps, config.update_interval) == (20, 4)
    components, arrays = build(config), DeviceData.of(digits)
    trainings = begin(config, len(digits.train_labels), seeds)
    programs = compile_programs(config, components, arrays, trainings)
    assert programs.num_seeds == len(seeds)
    done = []
    outcome = train(programs, config, components, arrays, trainings, advanced=done.append)
    assert done == [4, 8, 12, 16, 20]
    assert [step for step, _, _ in outcome.evaluations] == [12, 20]  # the first ends behind an epoch of 10 steps
    for i, seed in enumerate(seeds):
        expected, num_adaptations = trained_step_by_step(config, components, digits, seed)
        assert num_adaptations == len(outcome.adapt_s) == 3
        found = state_of(outcome.trainings, i)
        assert int(found.step) == 20
        for one, other in zip(jax.tree.leaves(found.topology), jax.tree.leaves(expected.topology), strict=True):
            np.testing.assert_array_equal(one, other)
        trees = [(state.params, state.collections, state.opt_state) for state in (found, expected)]
        for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        _, accuracy, loss = outcome.evaluations[-1]
        known = loop.evaluate(components, expected, digits, 16)
        assert accuracy[i] == pytest.approx(known["test_accuracy"], abs=0.021)  # one image on the boundary
        assert loss[i] == pytest.approx(known["test_loss"], rel=1e-3)


def test_an_incomplete_segment_is_left_out_and_short_runs_adapt_a_few_times(digits):
    config = loop.for_dataset(dataclasses.replace(CONFIG, epochs=40, update_interval=30), digits)
    assert (config.total_steps, config.update_end_step) == (400, 320)
    whole = whole_segments(config)
    assert (whole.update_interval, whole.total_steps, whole.steps) == (30, 390, 390)
    assert whole_segments(config, least_adaptations=12).update_interval == 26
    assert whole_segments(dataclasses.replace(config, update_end_fraction=0.0)).update_interval == 1


def test_the_order_is_that_of_the_loop(digits):
    config = whole_segments(loop.for_dataset(dataclasses.replace(CONFIG, method="dense"), digits), least_adaptations=1)
    trainings = begin(config, 160, (7,))
    batches = loop._Batches(dataclasses.replace(config, seed=7), digits)
    arrays = DeviceData.of(digits)
    assert trainings.order.shape == (20, 16)
    for epoch, step, first in ((0, 2, 0), (1, 13, 10)):
        (images, labels) = dict(batches.epoch(epoch, first))[step]
        mine = arrays.batch(trainings.order[step], trainings.key, jnp.int32(step))
        np.testing.assert_array_equal(mine[1], labels)
        np.testing.assert_allclose(mine[0], images, rtol=1e-6)


def test_what_cannot_be_scanned_is_refused(digits):
    config = whole_segments(loop.for_dataset(CONFIG, digits), least_adaptations=1)
    arrays, trainings = DeviceData.of(digits), begin(config, 160, (0,))
    odd = dataclasses.replace(config, total_steps=18, steps=18)
    with pytest.raises(ValueError, match="total_steps=18, update_interval=4"):
        compile_programs(odd, build(config), arrays, trainings)
    falling = dataclasses.replace(config, initial_density=0.4, density_stages=2)
    with pytest.raises(ValueError, match=r"initial_density=0\.4"):
        compile_programs(falling, build(falling), arrays, trainings)
    with pytest.raises(ValueError, match="dataset=digits is text"):
        DeviceData.of(dataclasses.replace(digits, augmentation=None))
    assert scanned_training.EVAL_BATCH > 50  # a batch is never larger than the test set
    assert arrays.test_idx.shape == (1, 50)
