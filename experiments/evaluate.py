"""Evaluates a checkpoint: a path in, test accuracy and a sparsity report out.

python -m experiments.evaluate --checkpoint=runs/digits-convnet-dsb-0.9-seed0
"""

import json
from pathlib import Path

from absl import flags

from dsb_jax import checkpoint
from dsb_jax.telemetry import Explored, count_bytes
from dsb_jax.training import data
from experiments import program, terminal
from experiments import run as runs

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("checkpoint", None, "A workdir, its checkpoints folder, or one step's folder.", required=True)
    flags.DEFINE_integer("step", None, "Which checkpoint; by default the latest.")
    flags.DEFINE_bool("best", False, "Take the checkpoint of the best test accuracy.")
    flags.DEFINE_string("data_dir", None, "Where tfds finds the data set.")
    flags.DEFINE_string("json", None, "Write the report to this file, too.")


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    restored = checkpoint.restore(FLAGS.checkpoint, step=FLAGS.step, best=FLAGS.best)
    recipe, assembly, state = restored.recipe, restored.assembly, restored.state
    dataset = data.load(recipe.dataset, data_dir=FLAGS.data_dir)
    explored = Explored(restored.extra)
    explored.update(state)
    report = {
        "checkpoint": str(FLAGS.checkpoint),
        "step": restored.step,
        **runs.evaluate(assembly, state, dataset, max(recipe.batch_size, 256)),
        **runs.measure_sparsity(assembly, state),
        "bytes": count_bytes(state),
        "exploration": explored.share(),
        "recipe": recipe.to_json(),
    }
    console.print(terminal.layer_table(recipe, assembly, state))
    console.print(terminal.outcome_table(report))
    if FLAGS.json:
        runs.write_atomically(Path(FLAGS.json), json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    define_flags()
    program.start(main)
