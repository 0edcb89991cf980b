"""One run: a config and a data set in; metrics, checkpoints and a summary out.

workdir/config.json     what the run is
workdir/metrics.jsonl   what happened, see `dsb_jax.training.metrics`
workdir/checkpoints/    Orbax; a run that was killed and resumed ends with the same bits as one that was not
workdir/summary.json    the outcome
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsb_jax import checkpoint
from dsb_jax.methods import Static
from dsb_jax.paths import nodes
from dsb_jax.stages import restage
from dsb_jax.telemetry import Explored, count_bytes
from dsb_jax.train import adapt_step, eval_step, train_step
from dsb_jax.train_state import TrainState, create_train_state, step_key
from dsb_jax.training import data, models
from dsb_jax.training.build import Components, Stage, build, make_key
from dsb_jax.training.checkpoints import check_workdir, restore
from dsb_jax.training.config import Config
from dsb_jax.training.json_files import write_json
from dsb_jax.training.metrics import Metrics, report_by_layer, report_totals
from dsb_jax.training.summary import measure_sparsity, summarize

LOG_EVERY = 10  # steps between two reads of the metrics, each of which waits for the device


class Progress(Protocol):
    """What a run tells while it runs."""

    def begin(self, config: Config, components: Components, state: TrainState, done: int) -> None: ...

    def advance(self, step: int, values: dict[str, float]) -> None: ...

    def epoch(self, epoch: int, values: dict[str, float]) -> None: ...

    def note(self, text: str) -> None: ...


def for_dataset(config: Config, dataset: data.Dataset) -> Config:
    """Fills in what depends on the data.

    Raises:
      ValueError: if a batch is larger than the data set, or the model takes something else.
    """
    num_train = len(dataset.train_labels)
    if config.batch_size > num_train:
        raise ValueError(f"batch_size={config.batch_size} is more than the {num_train} images of {dataset.name}.")
    if models.takes_text(config.model) != (dataset.augmentation is None):
        raise ValueError(
            f"model={config.model!r} does not take {dataset.name}; give text a transformer, such as transformer-2-128, "
            "and images any other model."
        )
    steps_per_epoch = num_train // config.batch_size
    total_steps = config.steps or steps_per_epoch * config.epochs
    return dataclasses.replace(
        config,
        input_shape=dataset.train_inputs.shape[1:],
        num_classes=dataset.num_classes,
        epochs=-(-total_steps // steps_per_epoch),
        total_steps=total_steps,
    )


def create(config: Config) -> tuple[Components, TrainState]:
    """The objects of a config and the first train state, a function of the seed alone."""
    components = build(config)
    make = _initializer(components.model, components.optimizer, config.abstract_inputs())
    return components, make(make_key(config.seed))


@functools.lru_cache(maxsize=8)  # the seeds of one config share what is compiled
def _initializer(model: Any, optimizer: Any, inputs: jax.ShapeDtypeStruct) -> Any:
    return jax.jit(functools.partial(create_train_state, model, optimizer, inputs=inputs))


def evaluate(components: Components, state: TrainState, dataset: data.Dataset, batch_size: int) -> dict[str, float]:
    """Accuracy and mean loss over the whole test split."""
    totals: dict[str, Any] = {}
    inputs, labels = dataset.test_inputs, dataset.test_labels
    for idx, weight in data.eval_batches(len(dataset.test_labels), batch_size):
        batch = _as_inputs(dataset, inputs[idx])
        sums = eval_step(state, batch, labels[idx], jnp.asarray(weight), model=components.model)
        totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
    totals = jax.device_get(totals)
    return {
        "test_accuracy": float(totals["correct"] / totals["count"]),
        "test_loss": float(totals["loss"] / totals["count"]),
    }


def _as_inputs(dataset: data.Dataset, raw: np.ndarray) -> jax.Array:
    """What the model takes, of raw test examples."""
    if dataset.augmentation is None:
        return jnp.asarray(raw, jnp.int32)
    return data.normalize(raw, dataset.mean, dataset.std)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _take(
    size: int, augmentation: data.Augmentation | None, mean: tuple[float, ...], std: tuple[float, ...],
    inputs: jax.Array, labels: jax.Array, order: jax.Array, key: jax.Array, start: np.int32, step: np.int32,
) -> Any:  # fmt: skip
    """The batch of one step, in one call: for small models each costs as much as a part of the step.

    Everything that differs between the seeds of a sweep is an argument, so that it is compiled once for all of them.
    """
    idx = jax.lax.dynamic_slice_in_dim(order, start, size)
    key = jax.random.fold_in(key, step)
    return data.take_batch(inputs, labels, idx, key=key, augmentation=augmentation, mean=mean, std=std)


def data_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of the order of the examples and of their augmentation."""
    order_key, augment_key = jax.random.split(make_key(seed + 1))
    return order_key, augment_key


class _Batches:
    """The training data on the device, and the batch of any step: a function of the seed and the step alone."""

    def __init__(self, config: Config, dataset: data.Dataset) -> None:
        self.size = config.batch_size
        self.num_train = len(dataset.train_labels)
        self.steps_per_epoch = self.num_train // config.batch_size
        self.total_steps = config.total_steps
        self.inputs, self.labels = jnp.asarray(dataset.train_inputs), jnp.asarray(dataset.train_labels)
        self.order_key, self.augment_key = data_keys(config.seed)
        self._how = self.size, dataset.augmentation, dataset.mean, dataset.std

    def end(self, epoch: int) -> int:
        """The first step that is not of this epoch: of the next one, or none."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
        """(step, (images, labels)) from `first_step` to the end of the epoch."""
        order = data.epoch_order(self.order_key, epoch, self.num_train)
        for step in range(first_step, self.end(epoch)):
            start = (step - epoch * self.steps_per_epoch) * self.size
            numbers = np.int32(start), np.int32(step)
            yield step, _take(*self._how, self.inputs, self.labels, order, self.augment_key, *numbers)


class _Training:
    """The state of a run and what is noted of it."""

    def __init__(
        self,
        config: Config,
        components: Components,
        state: TrainState,
        explored: Explored,
        metrics: Metrics,
        progress: Progress,
    ) -> None:
        self.config, self.components, self.state = config, components, state
        self.explored, self.metrics, self.progress = explored, metrics, progress
        self.turnover = 0.0  # of the latest adaptation
        self.skipped: dict[str, str] = {}  # layers that it left as they were
        self.is_compiled = self.adapting_is_compiled = False
        self.later_stages = {stage.step: stage for stage in components.stages[1:]}
        self.density: dict[str, float] = {}  # what is told of it once it has changed

    def note_stage(self, stage: Stage, **values: float) -> None:
        """The stage that begins now, in the metrics, if there are several."""
        if not self.later_stages:
            return
        sparsity = measure_sparsity(self.components, self.state)["sparsity"]
        nbytes = count_bytes(self.state.params, self.state.opt_state, self.state.topology)
        self.metrics.write("stage", stage.step, density=1 - sparsity, bytes=nbytes, **values)
        number, count = self.components.stages.index(stage) + 1, len(self.components.stages)
        self.progress.note(
            f"step {stage.step}: stage {number} of {count}, density {1 - sparsity:.3f}, "
            f"{sum(nbytes.values()) / 2**20:.1f} MiB"
        )
        self.density = {"sparsity": sparsity}

    def note_if_static(self) -> None:
        """Tells of a dynamic method without any adaptation: a short run with a long interval."""
        config, method = self.config, self.components.method
        if method is None or isinstance(method, Static) or not nodes(self.state.topology):
            return
        if not any(map(method.due, range(config.total_steps))):
            self.progress.note(
                f"nothing is adapted: no step of {config.total_steps} is due with update_interval="
                f"{config.update_interval}, update_end_fraction={config.update_end_fraction}; give a shorter interval"
            )

    def _restage(self, stage: Stage) -> None:
        """Brings the layers to the plan of a stage that begins.

        Before an adaptation of the same step, as GraNet prunes before it regrows: what an adaptation grows is 0 and
        would be the first to go.
        """
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        state, method = self.state, self.components.method
        assert method is not None  # without sparse layers there is one stage
        assert stage.plan is not None
        key = jax.random.fold_in(step_key(state), 3)  # 1 and 2 are an adaptation's and the model's
        params, topology, opt_state = restage(
            state.params, state.topology, state.opt_state, stage.plan, method, self.components.optimizer, key,
            fill=dict(self.components.fill),
        )  # fmt: skip
        self.state = dataclasses.replace(state, params=params, topology=topology, opt_state=opt_state)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - begin
        self.explored.update(self.state.topology)
        self.note_stage(stage, seconds=seconds)
        self.is_compiled = self.adapting_is_compiled = False  # the next step is another program

    def _is_due(self, step: int) -> bool:
        method = self.components.method
        return method is not None and method.due(step) and bool(nodes(self.state.topology))

    def _adapt(self, step: int, batch: tuple[jax.Array, jax.Array]) -> None:
        """One adaptation, noted in the metrics."""
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        images, labels = (array[: self.config.adapt_batch_size] for array in batch)
        method = self.components.method
        assert method is not None  # it was due
        state, report = adapt_step(
            self.state,
            images,
            labels,
            model=self.components.model,
            method=method,
            optimizer=self.components.optimizer,
            loss=self.components.loss,
            fill=dict(self.components.fill),
        )
        self.state, report = state, jax.device_get(jax.block_until_ready((state, report))[1])
        seconds = time.perf_counter() - begin
        self.explored.update(state.topology)
        totals = report_totals(report)
        self.metrics.write(
            "adapt",
            step,
            **totals,
            exploration=self.explored.share(),
            **({"seconds": seconds} if self.adapting_is_compiled else {}),
            layers=report_by_layer(report),
        )
        self.adapting_is_compiled = True
        self.turnover = totals["turnover"]
        if totals["skipped"] != self.skipped:
            self.skipped = totals["skipped"]
            told = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            self.progress.note(f"step {step}: layers that stay as they are: {told or 'none'}")

    def epoch(self, epoch: int, batches: _Batches) -> None:
        """The rest of one epoch, from the state's step on."""
        pending: list[dict[str, jax.Array]] = []
        end = batches.end(epoch)
        begin, num_timed = time.perf_counter(), 0
        for step, batch in batches.epoch(epoch, int(self.state.step)):
            if step in self.later_stages or self._is_due(step):
                before = time.perf_counter()
                if step in self.later_stages:
                    self._restage(self.later_stages[step])
                if self._is_due(step):
                    self._adapt(step, batch)
                begin += time.perf_counter() - before
            self.state, measured = train_step(
                self.state,
                *batch,
                model=self.components.model,
                optimizer=self.components.optimizer,
                loss=self.components.loss,
            )
            pending.append(measured)
            num_timed += 1
            if not self.is_compiled:  # the first step of a process or a stage holds the compilation and is not timed
                jax.block_until_ready(measured)
                self.is_compiled, begin, num_timed = True, time.perf_counter(), 0
            done = step + 1
            if (done - end) % LOG_EVERY == 0:
                values = jax.device_get(pending)
                seconds = {"seconds": (time.perf_counter() - begin) / num_timed} if num_timed else {}
                self._log(done, values, seconds)
                pending, begin, num_timed = [], time.perf_counter(), 0

    def _log(self, done: int, values: list[dict[str, Any]], seconds: dict[str, float]) -> None:
        means = {k: float(np.mean([v[k] for v in values])) for k in ("loss", "accuracy")}
        if not np.isfinite(means["loss"]):
            raise ValueError(f"the loss is {means['loss']} at step {done}; try a lower --learning_rate.")
        learning_rate = float(self.components.learning_rate(done - 1))
        self.metrics.write("train", done, **means, learning_rate=learning_rate, **seconds)
        self.progress.advance(done, {**means, "turnover": self.turnover, **self.density})


def run(
    config: Config, dataset: data.Dataset, workdir: Path, *, resume: bool, progress: Progress, keep_last: int = 2
) -> dict[str, Any]:
    """Trains to the end and returns what it wrote to summary.json.

    Args:
      config: completed by `for_dataset`.
      dataset: the images.
      workdir: new or empty, or with `resume` the one of an earlier run of the same config.
      resume: continue from the latest checkpoint, if there is one.
      progress: is told of every step.
      keep_last: checkpoints to keep beside the best.

    Raises:
      ValueError: if the config is invalid, or the workdir belongs to another run; nothing is overwritten then.
    """
    config, resumed = check_workdir(workdir, config, resume=resume)
    step, explored = resumed or 0, Explored()
    if resumed is None:
        components, state = create(config)
    else:
        restored = restore(workdir, step=resumed, implementation=config.implementation)
        components, state, explored = restored.components, restored.state, Explored(restored.extra)
    explored.update(state.topology)
    started = time.perf_counter()
    # Closed after Ctrl-C, too: what is being saved is finished.
    with checkpoint.Checkpoints(workdir, config.to_json(), keep_last=keep_last) as checkpoints:
        metrics = Metrics(workdir / "metrics.jsonl", step)
        training = _Training(config, components, state, explored, metrics, progress)
        progress.begin(config, components, state, step)
        if resumed is None:
            training.note_stage(components.stages[0])
            training.note_if_static()
        batches = _Batches(config, dataset)
        first = step // batches.steps_per_epoch if step < config.total_steps else config.epochs
        for epoch in range(first, config.epochs):
            training.epoch(epoch, batches)
            test = evaluate(components, training.state, dataset, max(config.batch_size, 256))
            step = int(training.state.step)
            metrics.write("eval", step, epoch=epoch + 1, **test)
            checkpoints.save(training.state, step=step, test_accuracy=test["test_accuracy"], extra=explored.bits)
            progress.epoch(epoch + 1, test)
        if not metrics.of_kind("eval"):  # a finished run whose metrics.jsonl is gone
            test = evaluate(components, training.state, dataset, max(config.batch_size, 256))
            metrics.write("eval", step, epoch=config.epochs, **test)
    summary = summarize(config, components, training.state, metrics, explored)
    summary |= {"train_time_s": time.perf_counter() - started, "resumed_at_step": resumed or 0}
    write_json(workdir / "summary.json", summary)
    return summary
