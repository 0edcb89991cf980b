"""One run: a recipe and a data set in; metrics, checkpoints and a summary out.

workdir/metrics.jsonl   one object a line: kind "train" (every few steps), "adapt", "eval" (every epoch)
workdir/summary.json    the outcome
workdir/checkpoints/    Orbax; a run that was killed and resumed ends with the same bits as one that was not
workdir/curves.png      loss, accuracy, turnover, exploration
"""

import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsb_jax import checkpoint, flops
from dsb_jax.adapt import Report, adapt_step
from dsb_jax.methods.schedule import update_due
from dsb_jax.telemetry import Explored, count_active, count_bytes
from dsb_jax.train import eval_step, train_step
from dsb_jax.train_state import TrainState, create_train_state
from dsb_jax.training import data, models
from dsb_jax.training.config import Assembly, Recipe, assemble

LOG_EVERY = 10  # steps between two reads of the metrics, each of which waits for the device


class Progress(Protocol):
    """What a run tells while it runs."""

    def begin(self, recipe: Recipe, assembly: Assembly, state: TrainState, done: int) -> None: ...

    def advance(self, step: int, values: dict[str, float]) -> None: ...

    def epoch(self, epoch: int, values: dict[str, float]) -> None: ...


def for_dataset(recipe: Recipe, dataset: data.Dataset) -> Recipe:
    """Fills in what depends on the data.

    Raises:
      ValueError: if a batch is larger than the data set.
    """
    num_train = len(dataset.train_labels)
    if recipe.batch_size > num_train:
        raise ValueError(f"batch_size={recipe.batch_size} is more than the {num_train} images of {dataset.name}.")
    height, width, channels = dataset.train_images.shape[1:]
    return dataclasses.replace(
        recipe,
        image_shape=(height, width, channels),
        num_classes=dataset.num_classes,
        total_steps=num_train // recipe.batch_size * recipe.epochs,
    )


def create(recipe: Recipe) -> tuple[Assembly, TrainState]:
    """The objects of a recipe and the first train state, a function of the seed alone."""
    assembly = assemble(recipe)
    images = jax.ShapeDtypeStruct((recipe.batch_size, *recipe.image_shape), jnp.float32)
    make = jax.jit(functools.partial(create_train_state, assembly.model, assembly.optimizer, images=images))
    return assembly, make(jax.random.key(recipe.seed))


def evaluate(assembly: Assembly, state: TrainState, dataset: data.Dataset, batch_size: int) -> dict[str, float]:
    """Accuracy and mean loss over the whole test split."""
    totals: dict[str, Any] = {}
    images, labels = dataset.test_images, dataset.test_labels
    for idx, weight in data.eval_batches(len(dataset.test_labels), batch_size):
        batch = data.normalize(images[idx], dataset.mean, dataset.std)
        sums = eval_step(state, batch, labels[idx], jnp.asarray(weight), model=assembly.model)
        totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
    totals = jax.device_get(totals)
    return {
        "test_accuracy": float(totals["correct"] / totals["count"]),
        "test_loss": float(totals["loss"] / totals["count"]),
    }


def report_totals(report: Report) -> dict[str, float]:
    """One adaptation over all layers: growth accepted, turnover and collateral as means over layers."""
    layers = list(report.values())
    requested = sum(int(layer.requested) for layer in layers)
    return {
        "requested": requested,
        "accepted": sum(int(layer.accepted) for layer in layers),
        "accepted_growth": sum(int(layer.accepted) for layer in layers) / max(requested, 1),
        "turnover": float(np.mean([layer.turnover for layer in layers])),
        "collateral": float(np.mean([layer.collateral for layer in layers])),
        "empty_groups": sum(int(layer.empty_groups) for layer in layers),
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, without the line that a killed run was writing, if there is one.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class _Metrics:
    """metrics.jsonl, cut back to the restored step when a run resumes, and what the summary needs of it."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.started = False  # whether this process has trained a step
        self.turnover = 0.0  # of the latest adaptation
        if resumed_at and path.exists():
            self.lines = [
                entry
                for entry in read_metrics(path)
                if entry["step"] <= resumed_at and (entry["kind"] != "adapt" or entry["step"] < resumed_at)
            ]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.lines))

    def write(self, kind: str, step: int, **values: Any) -> None:
        self.lines.append({"kind": kind, "step": step, **values})
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")


class _Batches:
    """The training images on the device, and the batch of any step: a function of the seed and the step alone."""

    def __init__(self, recipe: Recipe, dataset: data.Dataset) -> None:
        self.size = recipe.batch_size
        self.num_train = len(dataset.train_labels)
        self.steps_per_epoch = self.num_train // recipe.batch_size
        self.images, self.labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
        self.order_key, augment_key = jax.random.split(jax.random.key(recipe.seed + 1))

        def take(images: jax.Array, labels: jax.Array, order: jax.Array, start: np.int32, step: np.int32) -> Any:
            idx = jax.lax.dynamic_slice_in_dim(order, start, self.size)
            return data.take_batch(
                images, labels, idx, key=jax.random.fold_in(augment_key, step), augmentation=dataset.augmentation,
                mean=dataset.mean, std=dataset.std,
            )  # fmt: skip

        self._take = jax.jit(take)  # one call a step: for small models each costs as much as a part of the step

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
        """(step, (images, labels)) from `first_step` to the end of the epoch."""
        order = data.epoch_order(self.order_key, epoch, self.num_train)
        for step in range(first_step, (epoch + 1) * self.steps_per_epoch):
            start = (step - epoch * self.steps_per_epoch) * self.size
            yield step, self._take(self.images, self.labels, order, np.int32(start), np.int32(step))


def _adapt(
    assembly: Assembly,
    state: TrainState,
    batch: tuple[jax.Array, jax.Array],
    adapt_batch_size: int,
    step: int,
    explored: Explored,
    metrics: _Metrics,
) -> TrainState:
    """One adaptation, noted in the metrics."""
    jax.block_until_ready(state)
    begin = time.perf_counter()
    images, labels = (array[:adapt_batch_size] for array in batch)
    state, report = adapt_step(
        state,
        images,
        labels,
        model=assembly.model,
        method=assembly.method,
        optimizer=assembly.optimizer,
        loss=assembly.loss,
    )
    report = jax.device_get(jax.block_until_ready((state, report))[1])
    seconds = time.perf_counter() - begin
    explored.update(state)
    totals = report_totals(report)
    by_layer = {name: {k: float(v) for k, v in r._asdict().items()} for name, r in report.items()}
    metrics.write("adapt", step, **totals, exploration=explored.share(), seconds=seconds, layers=by_layer)
    metrics.turnover = totals["turnover"]
    return state


def _epoch(
    recipe: Recipe,
    assembly: Assembly,
    state: TrainState,
    epoch: int,
    batches: _Batches,
    explored: Explored,
    metrics: _Metrics,
    progress: Progress,
) -> TrainState:
    """The rest of one epoch, from the state's step on."""
    pending: list[dict[str, jax.Array]] = []
    begin = time.perf_counter()
    for step, batch in batches.epoch(epoch, int(state.step)):
        if assembly.method.update is not None and update_due(
            step, update_interval=recipe.update_interval, update_end_step=recipe.update_end_step
        ):
            before = time.perf_counter()
            state = _adapt(assembly, state, batch, recipe.adapt_batch_size, step, explored, metrics)
            begin += time.perf_counter() - before
        state, measured = train_step(
            state, *batch, model=assembly.model, optimizer=assembly.optimizer, loss=assembly.loss
        )
        pending.append(measured)
        done = step + 1
        compiled = not metrics.started  # the first step of a process holds the compilation
        if compiled or len(pending) >= LOG_EVERY or done == (epoch + 1) * batches.steps_per_epoch:
            values = jax.device_get(pending)
            timed = {} if compiled else {"seconds": (time.perf_counter() - begin) / len(pending)}
            means = {k: float(np.mean([v[k] for v in values])) for k in ("loss", "accuracy")}
            if not np.isfinite(means["loss"]):
                raise ValueError(f"the loss is {means['loss']} at step {done}; try a lower --learning_rate.")
            metrics.write("train", done, **means, learning_rate=float(assembly.learning_rate(step)), **timed)
            metrics.started = True
            progress.advance(done, {**means, "turnover": metrics.turnover})
            pending, begin = [], time.perf_counter()
    return state


def run(
    recipe: Recipe, dataset: data.Dataset, workdir: Path, *, resume: bool, progress: Progress, keep_last: int = 2
) -> dict[str, Any]:
    """Trains to the end and returns what it wrote to summary.json.

    Args:
      recipe: completed by `for_dataset`.
      dataset: the images.
      workdir: new or empty, or with `resume` the one of an earlier run of the same recipe.
      resume: continue from the latest checkpoint, if there is one.
      progress: is told of every step.
      keep_last: checkpoints to keep beside the best.

    Raises:
      ValueError: if the recipe cannot be, or the workdir belongs to another run; nothing is overwritten then.
    """
    assembly, state = create(recipe)
    resumed = checkpoint.check_workdir(workdir, recipe, resume=resume)
    explored = Explored()
    step = 0
    if resumed is not None:
        restored = checkpoint.restore(workdir, implementation=recipe.implementation)
        state, step, explored = restored.state, restored.step, Explored(restored.extra)
    explored.update(state)
    with checkpoint.Checkpoints(workdir, recipe, keep_last=keep_last) as saver:  # also after Ctrl-C: saves are finished
        metrics = _Metrics(workdir / "metrics.jsonl", step)
        progress.begin(recipe, assembly, state, step)
        started = time.perf_counter()
        batches = _Batches(recipe, dataset)
        for epoch in range(step // batches.steps_per_epoch, recipe.epochs):
            state = _epoch(recipe, assembly, state, epoch, batches, explored, metrics, progress)
            test = evaluate(assembly, state, dataset, max(recipe.batch_size, 256))
            metrics.write("eval", int(state.step), epoch=epoch + 1, **test)
            saver.save(state, test_accuracy=test["test_accuracy"], extra=explored.bits)
            progress.epoch(epoch + 1, test)
    summary = summarize(recipe, assembly, state, metrics.lines, explored)
    summary |= {
        "step_time_s": _median_seconds(metrics.lines, "train"),
        "adapt_time_s": _median_seconds(metrics.lines, "adapt"),
        "train_time_s": time.perf_counter() - started,
        "resumed_at_step": resumed or 0,
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _median_seconds(lines: list[dict[str, Any]], kind: str) -> float | None:
    seconds = [entry["seconds"] for entry in lines if entry["kind"] == kind and "seconds" in entry]
    return statistics.median(seconds) if seconds else None


def summarize(
    recipe: Recipe, assembly: Assembly, state: TrainState, lines: list[dict[str, Any]], explored: Explored
) -> dict[str, Any]:
    """What can be said of a finished run from its state and its metrics; times are added by the run itself."""
    evals = [entry for entry in lines if entry["kind"] == "eval"]
    adapts = [entry for entry in lines if entry["kind"] == "adapt"]
    trains = [entry for entry in lines if entry["kind"] == "train"]

    def mean(name: str) -> float | None:
        return float(np.mean([entry[name] for entry in adapts])) if adapts else None

    layers: dict[str, Any] = {}
    for entry in adapts:
        for name, values in entry["layers"].items():
            for key, value in values.items():
                layers.setdefault(name, {}).setdefault(key, []).append(value)
    return {
        "test_accuracy": evals[-1]["test_accuracy"],
        "test_loss": evals[-1]["test_loss"],
        "train_loss": trains[-1]["loss"],
        **measure_sparsity(assembly, state),
        "bytes": count_bytes(state),
        "flops": measure_flops(recipe, assembly),
        "adaptations": len(adapts),
        "accepted_growth": sum(e["accepted"] for e in adapts) / max(1, sum(e["requested"] for e in adapts))
        if adapts
        else None,
        "turnover": mean("turnover"),
        "collateral": mean("collateral"),
        "empty_groups": adapts[-1]["empty_groups"] if adapts else None,
        "exploration": explored.share() if assembly.plan else None,
        "layers": {name: {k: float(np.mean(v)) for k, v in values.items()} for name, values in layers.items()},
        "recipe": recipe.to_json(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__,
                     "optax": optax.__version__},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
    }  # fmt: skip


def measure_flops(recipe: Recipe, assembly: Assembly) -> dict[str, float]:
    """`train_ratio` and `inference_ratio`: operations against the dense model of the recipe, see `dsb_jax.flops`."""
    share = flops.share_of_adaptations(
        total_steps=recipe.total_steps, update_interval=recipe.update_interval,
        update_end_step=recipe.update_end_step, batch_size=recipe.batch_size, adapt_batch_size=recipe.adapt_batch_size,
    )  # fmt: skip
    return flops.measure(
        assembly.model,
        assembly.plan,
        models.create(recipe.model, num_classes=recipe.num_classes),
        recipe.image_shape,
        statistic=assembly.method.statistic,
        adapt_share=share,
        backward_factor=assembly.method.backward_factor,
    )


def measure_sparsity(assembly: Assembly, state: TrainState) -> dict[str, Any]:
    """`sparsity` over the eligible layers and `sparsity_all` over all linear layers, counted from the arrays."""
    kernels = sum(
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "kernel"
    )
    if assembly.plan is None:
        return {"sparsity": 0.0, "sparsity_all": 0.0, "num_active": kernels}
    active = count_active(state)
    eligible = [layer for layer in assembly.plan.layers if layer.eligible]
    stored = sum(active.get(layer.path, layer.shape.size) for layer in eligible)
    everything = sum(layer.shape.size for layer in assembly.plan.layers)
    return {
        "sparsity": 1 - stored / sum(layer.shape.size for layer in eligible),
        "sparsity_all": 1 - (sum(active.values()) + kernels) / everything,
        "num_active": sum(active.values()),
    }


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step, so that an interruption leaves the old one or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
