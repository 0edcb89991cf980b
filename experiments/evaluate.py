"""Evaluates a checkpoint: a path in, test accuracy and a sparsity report out.

python -m experiments.evaluate --checkpoint=runs/digits-convnet-dsb-0.9-seed0
"""

from pathlib import Path

from absl import flags

from dsb_jax.telemetry import Explored, count_bytes
from dsb_jax.training import checkpoints, data
from dsb_jax.training.json_files import write_json
from dsb_jax.training.loop import evaluate
from dsb_jax.training.summary import measure_sparsity
from experiments import program, terminal

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
    restored = checkpoints.restore(FLAGS.checkpoint, step=FLAGS.step, best=FLAGS.best)
    config, components, state = restored.config, restored.components, restored.state
    dataset = data.load(config.dataset, data_dir=FLAGS.data_dir)
    explored = Explored(restored.extra)
    explored.update(state.topology)
    report = {
        "checkpoint": str(FLAGS.checkpoint),
        "step": restored.step,
        **evaluate(components, state, dataset, max(config.batch_size, 256)),
        **measure_sparsity(components, state),
        "bytes": count_bytes(state.params, state.opt_state, state.topology),
        "exploration": explored.share(),
        "config": config.to_json(),
    }
    console.print(terminal.layer_table(config, components, state))
    console.print(terminal.outcome_table(report))
    if FLAGS.json:
        write_json(Path(FLAGS.json), report)


if __name__ == "__main__":
    define_flags()
    program.start(main)
