"""Trains a sparse network.

python -m experiments.train                                   digits, DSB, sparsity 0.9: a minute on a CPU
python -m experiments.train --dataset=cifar10 --data_dir=DIR --model=wrn-22-2 --distribution=erk
python -m experiments.train --seeds=0,1,2                     one after another in one process: nothing compiles twice
"""

import dataclasses
import itertools
from pathlib import Path

from absl import flags
from rich.console import Console

from dsb_jax.training import data, loop
from dsb_jax.training.build import make_method
from dsb_jax.training.config import Config, check_config
from experiments import curves, program, terminal
from experiments import flags as config_flags

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The config's flags and where the run lives."""
    config_flags.define()
    flags.adopt_module_key_flags(config_flags)  # so that --help shows them
    flags.DEFINE_list("seeds", None, "Several runs instead of the one of --seed; --workdir then contains {seed}.")
    flags.DEFINE_string("workdir", None, "Where the run is written; by default a new folder in runs/.")
    flags.DEFINE_bool("resume", False, "Continue the run in workdir from its latest checkpoint.")
    flags.DEFINE_integer("keep_last", 2, "Checkpoints to keep, beside the best.")


def default_workdir(config: Config, resume: bool) -> Path:
    """runs/DATASET-MODEL-METHOD-SPARSITY-seedN, with -2, -3, ... if taken; the latest of these to resume."""
    name = f"{config.dataset}-{config.model}-{config.method}-{config.sparsity:g}-seed{config.seed}"
    candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    taken = list(itertools.takewhile(Path.exists, candidates))
    if resume and taken:
        return taken[-1]
    return Path("runs") / (name if not taken else f"{name}-{len(taken) + 1}")


def configs_from_flags() -> list[tuple[Config, Path]]:
    """The runs that the flags ask for, and where each is written.

    Raises:
      ValueError: if a flag is invalid.
    """
    config = config_flags.config_from_flags()
    seeds = [config.seed] if FLAGS.seeds is None else config_flags.parse_seeds(FLAGS.seeds)
    if len(seeds) > 1 and FLAGS.workdir is not None and "{seed}" not in FLAGS.workdir:
        raise ValueError(f"workdir={FLAGS.workdir!r} is one folder for {len(seeds)} runs; write {{seed}} into it.")
    runs = []
    for seed in seeds:
        config = dataclasses.replace(config, seed=seed)
        check_config(config)
        own = FLAGS.workdir and FLAGS.workdir.replace("{seed}", str(seed))
        runs.append((config, Path(own) if own else default_workdir(config, FLAGS.resume)))
    return runs


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    runs = configs_from_flags()
    make_method(runs[0][0])
    dataset = data.load(runs[0][0].dataset, data_dir=FLAGS.data_dir)
    for config, workdir in runs:
        config = loop.for_dataset(config, dataset)
        if FLAGS.update_interval is None and FLAGS.protocol is None:
            config = config_flags.with_default_interval(config)
        train(config, dataset, workdir, console)


def train(config: Config, dataset: data.Dataset, workdir: Path, console: Console) -> None:
    """One run, its curves and its outcome."""
    progress = terminal.TerminalProgress(console)
    try:
        summary = loop.run(config, dataset, workdir, resume=FLAGS.resume, progress=progress, keep_last=FLAGS.keep_last)
    except KeyboardInterrupt:
        progress.stop()
        console.print(f"\ninterrupted; continue with --resume --workdir={workdir}", soft_wrap=True)
        raise SystemExit(130) from None
    finally:
        progress.stop()
    curves.draw(workdir, f"{config.dataset}, {config.model}, {config.method}, sparsity {summary['sparsity']:.1%}")
    console.print(terminal.outcome_table(summary))
    console.print(f"written: {workdir}/summary.json, metrics.jsonl, curves.png, checkpoints/", soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    program.start(main)
