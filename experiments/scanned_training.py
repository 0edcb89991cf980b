"""Training as a few compiled scans over steps, for one seed or several at a time: what `dsb_jax.training.loop` does.

The law of a run is that of the loop: the first state, the order of the examples, their crops and flips and the batch of
an adaptation are the same functions of the seed and the step, and steps are `dsb_jax.train`'s own. No file is written,
and the host does next to nothing:

    segment    `update_interval` steps, one `lax.scan` of gather, augmentation and `train_step`
    adapt      between two segments, on the batch of the step that follows
    evaluate   the whole test set, after the first segment that ends with or behind an epoch

All segments are of one length, so each of the three programs is compiled once; the last incomplete segment of a run is
left out (`whole_segments`). Adaptations lie between segments and not within: the host waits for the device once in
`update_interval` steps, where it can look at the clock, and a scan with an adaptation in each iteration would be a
larger program to compile for a call less.

Several seeds at a time are a leading axis of everything but the data, and the programs are `jax.vmap`ped over it. Every
seed has layouts of its own, for which the products run in a loop over the seeds (`dsb_jax.ops.partitioning`): what
`vmap` can save is the launches of all else.
"""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from dsb_jax.ops.dispatch import record_choices
from dsb_jax.paths import nodes
from dsb_jax.train import adapt_step, eval_step, train_step
from dsb_jax.train_state import TrainState
from dsb_jax.training import data, loop
from dsb_jax.training.build import Components
from dsb_jax.training.config import LEAST_ADAPTATIONS, Config

EVAL_BATCH = 1000  # test images at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceData:
    """A data set of images on the device.

    Attributes:
      train_inputs, test_inputs: raw pixels.
      train_labels, test_labels: int32.
      test_idx, test_weight: batches that cover every test image once, see `dsb_jax.training.data.eval_batches`.
      augmentation, mean, std: static, of the data set.
    """

    train_inputs: UInt8[Array, "n H W C"]
    train_labels: Int[Array, "n"]
    test_inputs: UInt8[Array, "m H W C"]
    test_labels: Int[Array, "m"]
    test_idx: Int[Array, "batches B"]
    test_weight: Float[Array, "batches B"]
    augmentation: data.Augmentation | None = dataclasses.field(metadata={"static": True})
    mean: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    std: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, dataset: data.Dataset) -> "DeviceData":
        """Sends a data set to the device; raises ValueError for text."""
        if dataset.augmentation is None:
            raise ValueError(f"dataset={dataset.name} is text; scanned training takes images, such as cifar10.")
        num_test = len(dataset.test_labels)
        idx, weight = zip(*data.eval_batches(num_test, min(EVAL_BATCH, num_test)), strict=True)
        return cls(
            train_inputs=jnp.asarray(dataset.train_inputs),
            train_labels=jnp.asarray(dataset.train_labels),
            test_inputs=jnp.asarray(dataset.test_inputs),
            test_labels=jnp.asarray(dataset.test_labels),
            test_idx=jnp.asarray(np.stack(idx)),
            test_weight=jnp.asarray(np.stack(weight)),
            augmentation=dataset.augmentation,
            mean=dataset.mean,
            std=dataset.std,
        )

    def batch(self, idx: Int[Array, "B"], key: Key[Array, ""], step: Int[Array, ""]) -> tuple[Array, Array]:
        """Images and labels of one step, augmented."""
        return data.take_batch(
            self.train_inputs, self.train_labels, idx, key=jax.random.fold_in(key, step),
            augmentation=self.augmentation, mean=self.mean, std=self.std,
        )  # fmt: skip


class Trainings(NamedTuple):
    """Where one training stands, or several: then every array has an axis for them in front.

    Attributes:
      state: the train state.
      order: int32[total_steps, batch_size], the examples of each step.
      key: of the augmentation.
    """

    state: TrainState
    order: Int[Array, "*seeds steps B"]
    key: Key[Array, "*seeds"]


class Programs(NamedTuple):
    """The compiled programs of a config.

    Attributes:
      segment: (data, state, order, key, start) -> state, loss over the segment.
      adapt: (data, state, order, key, start) -> state; None for methods that do not adapt.
      evaluate: (data, state) -> sums over the test set, as those of `eval_step`.
      num_seeds: that they train at a time.
      seconds: of tracing, and of compiling each; they are compiled side by side.
      choices: implementation -> number of layers' forward passes that it computes.
    """

    segment: Callable[..., Any]
    adapt: Callable[..., Any] | None
    evaluate: Callable[..., Any]
    num_seeds: int
    seconds: dict[str, float]
    choices: dict[str, int]


class Outcome(NamedTuple):
    """What came of some trainings; lists by evaluation or segment hold one number for each seed.

    Attributes:
      trainings: as they ended.
      evaluations: (step, test accuracies, test losses).
      train_losses: of each segment.
      segment_s, adapt_s, eval_s: seconds of each, all seeds together.
    """

    trainings: Trainings
    evaluations: list[tuple[int, list[float], list[float]]]
    train_losses: list[list[float]]
    segment_s: list[float]
    adapt_s: list[float]
    eval_s: list[float]


def whole_segments(config: Config, least_adaptations: int = LEAST_ADAPTATIONS) -> Config:
    """The config with a number of steps that whole segments make up, and no fewer adaptations than these.

    Args:
      config: completed by `loop.for_dataset`.
      least_adaptations: if its interval allows fewer, it is shortened.
    """
    config = config.with_adaptations(least_adaptations)
    steps = config.total_steps // config.update_interval * config.update_interval
    return dataclasses.replace(config, steps=steps, total_steps=steps)


def begin(config: Config, num_train: int, seeds: Sequence[int]) -> Trainings:
    """The first states of some seeds, those of `loop.create`; of one seed without an axis.

    Args:
      config: of all of them, but for the seed.
      num_train: examples of the data set.
      seeds: at least one.
    """
    per_epoch = num_train // config.batch_size
    each = []
    for seed in seeds:
        _, state = loop.create(dataclasses.replace(config, seed=seed))
        order_key, augment_key = loop.data_keys(seed)
        order = _orders(order_key, -(-config.total_steps // per_epoch), num_train, per_epoch, config.batch_size)
        each.append(Trainings(state, order[: config.total_steps], augment_key))
    return each[0] if len(each) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _orders(key: Key[Array, ""], epochs: int, num_train: int, per_epoch: int, batch_size: int) -> Int[Array, "steps B"]:
    orders = jax.vmap(lambda epoch: data.epoch_order(key, epoch, num_train))(jnp.arange(epochs))
    return orders[:, : per_epoch * batch_size].reshape(-1, batch_size)


def compile_programs(config: Config, components: Components, arrays: DeviceData, trainings: Trainings) -> Programs:
    """Compiles what trains these trainings and others of the same shapes.

    Args:
      config: completed by `whole_segments`.
      components: of the config.
      arrays: the data.
      trainings: one, or several with an axis in front.

    Raises:
      ValueError: if an adaptation is due within a segment, or the density changes.
      NotImplementedError: if an implementation cannot compute a layer, or not several at a time.
    """
    length, method, model = config.update_interval, components.method, components.model
    how: dict[str, Any] = {"model": model, "optimizer": components.optimizer, "loss": components.loss}
    if len(components.stages) > 1:
        raise ValueError(f"initial_density={config.initial_density}: the density of a scanned training is constant.")
    due = [step for step in range(config.total_steps) if method is not None and method.due(step)]
    if config.total_steps % length or any(step % length for step in due):
        raise ValueError(
            f"total_steps={config.total_steps}, update_interval={length}: adaptations are not between whole segments."
        )

    def segment(arrays: DeviceData, state: TrainState, order: Array, key: Array, start: Array) -> Any:
        def step(state: TrainState, idx: Array) -> Any:
            state, measured = train_step(state, *arrays.batch(idx, key, state.step), **how)
            return state, measured["loss"]

        state, losses = lax.scan(step, state, lax.dynamic_slice_in_dim(order, start, length))
        return state, losses.mean()

    def adapt(arrays: DeviceData, state: TrainState, order: Array, key: Array, start: Array) -> Any:
        idx = lax.dynamic_index_in_dim(order, start, keepdims=False)
        batch = (array[: config.adapt_batch_size] for array in arrays.batch(idx, key, state.step))
        assert method is not None  # it was due
        return adapt_step(state, *batch, method=method, fill=dict(components.fill), **how)[0]

    def evaluate(arrays: DeviceData, state: TrainState) -> Any:
        def one(batch: tuple[Array, Array]) -> Any:
            idx, weight = batch
            images = data.normalize(arrays.test_inputs[idx], arrays.mean, arrays.std)
            return eval_step(state, images, arrays.test_labels[idx], weight, model=model)

        return jax.tree.map(lambda sums: sums.sum(axis=0), lax.map(one, (arrays.test_idx, arrays.test_weight)))

    is_one = trainings.key.ndim == 0
    full = (arrays, *trainings, np.int32(0))
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {"segment": (segment, full)}
    if due and nodes(trainings.state.topology):
        programs["adapt"] = adapt, full
    programs["evaluate"] = evaluate, full[:2]
    seconds, lowered = {}, {}
    begin = time.perf_counter()
    with record_choices() as choices:
        for name, (function, args) in programs.items():
            axes = (None, 0, 0, 0, None)[: len(args)]
            mapped = function if is_one else jax.vmap(function, in_axes=axes)
            donated = () if name == "evaluate" else (1,)
            lowered[name] = jax.jit(mapped, donate_argnums=donated).lower(*args)
    seconds["trace"] = time.perf_counter() - begin

    def compiled(name: str) -> Any:
        begin = time.perf_counter()
        program = lowered[name].compile()
        seconds[name] = time.perf_counter() - begin
        return program

    with ThreadPoolExecutor(len(lowered)) as pool:
        done = dict(zip(lowered, pool.map(compiled, lowered), strict=True))
    seconds["all"] = time.perf_counter() - begin
    chosen = Counter(choice.passes.forward for choice in choices.values())
    num_seeds = 1 if is_one else trainings.key.shape[0]
    return Programs(done["segment"], done.get("adapt"), done["evaluate"], num_seeds, seconds, dict(chosen))


def train(
    programs: Programs, config: Config, components: Components, arrays: DeviceData, trainings: Trainings,
    *, advanced: Callable[[int], None] = lambda step: None,
) -> Outcome:  # fmt: skip
    """Trains to the end. The trainings are donated.

    Args:
      programs: of this config, for as many trainings at a time.
      config, components, arrays: as they were compiled with.
      trainings: at step 0.
      advanced: is called after each segment with the steps done; what it raises ends the training.
    """
    state, order, key = trainings
    outcome = Outcome(trainings, [], [], [], [], [])
    per_epoch, length, method = len(arrays.train_labels) // config.batch_size, config.update_interval, components.method

    def timed(seconds: list[float], call: Callable[..., Any], *args: Any) -> Any:
        begin = time.perf_counter()
        result = jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - begin)
        return result

    for start in range(0, config.total_steps, length):
        now = np.int32(start)
        if programs.adapt is not None and method is not None and method.due(start):
            state = timed(outcome.adapt_s, programs.adapt, arrays, state, order, key, now)
        state, loss = timed(outcome.segment_s, programs.segment, arrays, state, order, key, now)
        outcome.train_losses.append(np.atleast_1d(loss).tolist())
        done = start + length
        if done // per_epoch > start // per_epoch or done == config.total_steps:
            sums = jax.device_get(timed(outcome.eval_s, programs.evaluate, arrays, state))
            accuracy, loss = (np.atleast_1d(sums[name] / sums["count"]).tolist() for name in ("correct", "loss"))
            outcome.evaluations.append((done, accuracy, loss))
        advanced(done)
    return outcome._replace(trainings=Trainings(state, order, key))


def state_of(trainings: Trainings, number: int) -> TrainState:
    """The state of one of the trainings."""
    return trainings.state if trainings.key.ndim == 0 else jax.tree.map(lambda leaf: leaf[number], trainings.state)
