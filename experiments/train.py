"""Trains a sparse network.

python -m experiments.train                                   digits, DSB, sparsity 0.9: a minute on a CPU
python -m experiments.train --dataset=cifar10 --data_dir=DIR --model=wrn-22-2 --distribution=erk
"""

import itertools
from pathlib import Path

from absl import flags

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


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    config = config_flags.config_from_flags()
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else default_workdir(config, FLAGS.resume)
    check_config(config)
    make_method(config)
    dataset = data.load(config.dataset, data_dir=FLAGS.data_dir)
    config = config_flags.with_default_interval(loop.for_dataset(config, dataset))
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
