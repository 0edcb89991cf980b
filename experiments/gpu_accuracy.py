"""One command on a machine with an NVIDIA GPU: how accurate WRN-22-2 is on CIFAR-10, by method, in nine minutes.

    make gpu-accuracy ARGS=--data_dir=DIR                   # a virtual environment with jax[cuda13]
    make gpu-accuracy BIN=/usr/bin ARGS=--data_dir=DIR      # the machine's own python, nothing is installed
    python -m experiments.gpu_accuracy --rehearse           # the same on a CPU, tiny: its numbers measure nothing

The authors' protocol (`dsb_jax.training.config.PROTOCOLS`: ERK, batch 128, dropout 0.3, steps of the learning rate at
half and three quarters) with its schedule scaled to `--epochs`, in bfloat16. How it is trained is in
`experiments.scanned_training`; the arms, by what they tell, are in `experiments.gpu_accuracy_arms`.

The results are written anew after each seed. The same command goes on where it ended: seeds that the file has of the
same config, device and versions are not trained again. An arm is begun only if compiling it and training its seeds is
expected to end within `--limit_s`, by the slowest arm so far; what is left out is named.

Why 10 epochs and 4 seeds: docs/gpu.md.

Exit code 0 if all arms that were begun ended, 1 if one failed, 2 without a GPU.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console

from dsb_jax.ops import IMPLEMENTATIONS
from dsb_jax.telemetry import count_bytes
from dsb_jax.training import data
from dsb_jax.training.build import build
from dsb_jax.training.config import Config
from dsb_jax.training.summary import measure_sparsity
from experiments import program, scanned_training, timing
from experiments.flags import parse_seeds
from experiments.gpu_accuracy_arms import Arm, Budget, OutOfTime, groups, make_config, select
from experiments.gpu_accuracy_results import Results, outcome_table, seed_records
from experiments.gpu_check import gpu_facts
from experiments.scanned_training import DeviceData, Programs, Trainings

FLAGS = flags.FLAGS
RESULTS = "experiments/results/gpu_accuracy/gpu.json"
LIMIT_S = 540.0
EPOCHS = 10
SEEDS = 4
TITLE = "test accuracy in per cent, after all steps"
NOTE = "A rehearsal on a CPU with a tiny model. No number in it is a measurement."

# What a rehearsal trains. One sparse layer compiles in seconds; on a CPU, XLA computes dense convolutions more than ten
# times slower within a loop than outside, so batches are small.
REHEARSED: Mapping[str, Any] = {
    "dataset": "digits", "model": "narrow_convnet", "dropout_rate": 0.0, "epochs": 2, "batch_size": 8,
    "keep_dense": ("stem", "head", "conv_1", "conv_2"),
}  # fmt: skip
REHEARSED_IMAGES = 160


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("json", None, f"The file of results; by default {RESULTS}, of a rehearsal none.")
    flags.DEFINE_bool("rehearse", False, "Run all of it on a CPU with a tiny model; its numbers measure nothing.")
    flags.DEFINE_string("data_dir", None, "Folder of cifar10.npz (experiments.pack_data), or of the tfds sets.")
    flags.DEFINE_integer("epochs", None, f"Passes over the training images; {EPOCHS} by default.", lower_bound=1)
    flags.DEFINE_list("seeds", None, f"Trained for each arm; by default 0 to {SEEDS - 1}, in a rehearsal 0 and 1.")
    flags.DEFINE_integer("seeds_together", 1, "Seeds trained at a time, by vmap.", lower_bound=1)
    flags.DEFINE_list("arms", None, "Run these arms only, such as dsb,rigl; by default all that fit.")
    flags.DEFINE_float("limit_s", LIMIT_S, "Seconds for all of it, the start included.", lower_bound=0)
    flags.DEFINE_enum("implementation", "auto", IMPLEMENTATIONS, "Of the sparse products.")


def prepare_device(rehearse: bool) -> None:
    """The CPU for a rehearsal, compiling fast.

    Raises:
      NotImplementedError: if jax finds no GPU, unless this is a rehearsal.
    """
    if rehearse:
        jax.config.update("jax_platforms", "cpu")
        os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
    elif jax.default_backend() != "gpu":
        raise NotImplementedError(
            f"no GPU: jax {jax.__version__} computes on the {jax.default_backend()} here. gpu-accuracy needs an NVIDIA "
            "GPU and jax with CUDA: pip install '.[cuda]'. Without one, --rehearse runs it on the CPU."
        )


def read_data(rehearse: bool, data_dir: str | None) -> data.Dataset:
    """CIFAR-10, or a few of the digits."""
    if not rehearse:
        return data.load("cifar10", data_dir=data_dir)
    digits, images = data.load("digits"), slice(REHEARSED_IMAGES)
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    return dataclasses.replace(digits, **{name: getattr(digits, name)[images] for name in names})


def compile_arm(
    config: Config, arrays: DeviceData, seeds: Sequence[int], together: int
) -> tuple[Programs, Trainings, str | None]:
    """The programs of an arm, the trainings of its first seeds, and why these are fewer than `together` if they are."""
    components, num_train, reason = build(config), len(arrays.train_labels), None
    if together > 1:
        trainings = scanned_training.begin(config, num_train, groups(seeds, together)[0])
        try:
            return scanned_training.compile_programs(config, components, arrays, trainings), trainings, None
        except NotImplementedError as error:
            reason = f"one seed after the other: {error}"
    trainings = scanned_training.begin(config, num_train, seeds[:1])
    return scanned_training.compile_programs(config, components, arrays, trainings), trainings, reason


def run_arm(
    arm: Arm, config: Config, arrays: DeviceData, seeds: Sequence[int], together: int, results: Results, budget: Budget,
    console: Console,
) -> None:  # fmt: skip
    """Trains the seeds of an arm that are not done, writing after each group.

    Raises:
      OutOfTime: if the arm, or a further group of its seeds, is not begun, or one is broken off.
    """
    record = results.record(arm, config)
    missing = [seed for seed in seeds if str(seed) not in record["seeds"]]
    record.pop("error", None)
    if not missing:
        console.print(f"{arm.name}: done before")
        return
    budget.require(budget.expected(len(groups(missing, together))), f"seeds {missing}")
    console.print(f"{arm.name}: compiling ...")
    begin = time.perf_counter()
    programs, trainings, reason = compile_arm(config, arrays, missing, together)
    budget.compile_s.append(time.perf_counter() - begin)
    record["compile_s"] = {**programs.seconds, "arm": budget.compile_s[-1]}
    record |= {"choices": programs.choices, **({"note": reason} if reason else {})}
    components, slowest, todo = build(config), 0.0, groups(missing, programs.num_seeds)
    for number, group in enumerate(todo):
        left = f"seeds {missing[number * programs.num_seeds :]}"
        budget.require(slowest, left)

        def advanced(step: int, left: str = left) -> None:
            budget.require(0.0, f"{left}, step {step}")

        begin = time.perf_counter()
        if number > 0:
            trainings = scanned_training.begin(config, len(arrays.train_labels), group)
        outcome = scanned_training.train(programs, config, components, arrays, trainings, advanced=advanced)
        seconds = time.perf_counter() - begin
        slowest = max(slowest, seconds)
        budget.group_s.append(seconds)
        state = scanned_training.state_of(outcome.trainings, 0)
        record["bytes"] = count_bytes(state.params, state.opt_state, state.topology)
        added = seed_records(config, group, outcome, seconds)
        record |= measure_sparsity(components, state) | {"seeds": record["seeds"] | added}
        results.write()
        for seed, values in added.items():
            console.print(
                f"{arm.name}, seed {seed}: accuracy {values['test_accuracy']:.2%}, loss {values['test_loss']:.4f}, "
                f"{1e3 * values['step_s']:.2f} ms a step; {budget.seconds:.0f} of {budget.limit_s:.0f} s"
            )


def run_arms(
    configs: Sequence[tuple[Arm, Config]], arrays: DeviceData, seeds: Sequence[int], together: int, results: Results,
    budget: Budget, console: Console,
) -> list[str]:  # fmt: skip
    """Runs arms in order; names of those that failed. What an earlier command measured is what is expected now."""
    for arm, config in configs:
        record = results.record(arm, config)
        known = [values["group_s"] for values in record["seeds"].values() if values["seeds_together"] == together]
        budget.group_s += known
        budget.compile_s += [record["compile_s"]["arm"]] if known else []
    failed = []
    for arm, config in configs:
        try:
            run_arm(arm, config, arrays, seeds, together, results, budget, console)
        except OutOfTime as error:
            results.left_out[arm.name] = str(error)
            console.print(f"{arm.name}, left out: {error}", markup=False)
        except Exception as error:  # whatever fails: other arms tell something
            first = (str(error).strip().splitlines() or [""])[0]
            results.arms[arm.name]["error"] = f"{type(error).__name__}: {first[:300]}"
            console.print(f"{arm.name}: {results.arms[arm.name]['error']}", markup=False)
            failed.append(arm.name)
        results.beside["seconds"] = round(budget.seconds, 1)
        results.write()
    return failed


def main() -> None:
    """Runs the arms, writes the file and prints the table."""
    budget, console, rehearse = Budget(FLAGS.limit_s), program.console(), FLAGS.rehearse
    chosen = select(FLAGS.arms)
    seeds = list(dict.fromkeys(parse_seeds(FLAGS.seeds))) if FLAGS.seeds else list(range(2 if rehearse else SEEDS))
    prepare_device(rehearse)
    environment = timing.environment()
    path = Path(FLAGS.json) if FLAGS.json else None if rehearse else Path(RESULTS)
    results = Results(path, environment, {"rehearsal": NOTE} if rehearse else {"nvidia-smi": gpu_facts()})
    console.print(f"{NOTE + ' ' if rehearse else ''}{environment['device']}, jax {environment['jax']}")
    dataset = read_data(rehearse, FLAGS.data_dir)
    common: dict[str, Any] = {"implementation": FLAGS.implementation, **(REHEARSED if rehearse else {})}
    common |= {"epochs": FLAGS.epochs} if FLAGS.epochs is not None else {}
    configs = [(arm, make_config(arm, dataset, EPOCHS, common)) for arm in chosen]
    arrays = DeviceData.of(dataset)
    failed = run_arms(configs, arrays, seeds, FLAGS.seeds_together, results, budget, console)
    console.print(outcome_table({arm.name: results.arms[arm.name] for arm in chosen}, NOTE if rehearse else TITLE))
    for name, why in results.left_out.items():
        console.print(f"left out: {name}, {why}", markup=False)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    program.start(main)
