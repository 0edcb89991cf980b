"""Exports a checkpoint: one file that computes the logits without this library.

python -m experiments.export --checkpoint=runs/digits-convnet-dsb-0.9-seed0 --out=digits.jax

The function in the file takes what `evaluate` gives the model, a batch of any size, and returns float32 logits:
  images    float32[batch, height, width, channels], which are `(pixels / 255 - mean) / std` by channel, with the mean
            and std of the data set (`dsb_jax.training.data.load(name)` has both, `data.normalize` does it)
  text      int32[batch, length], characters
A process that has jax and flatbuffers, and nothing of ours, runs it:

    logits = jax.jit(jax.export.deserialize(open("digits.jax", "rb").read()).call)(images)
"""

from pathlib import Path

import numpy as np
from absl import flags

from dsb_jax.calling import call_model
from dsb_jax.exporting import PLATFORMS, export
from dsb_jax.safetensors_files import save_safetensors
from dsb_jax.training import checkpoints
from dsb_jax.training.config import Config
from experiments import program

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("checkpoint", None, "A workdir, its checkpoints folder, or one step's folder.", required=True)
    flags.DEFINE_integer("step", None, "Which checkpoint; by default the latest.")
    flags.DEFINE_bool("best", False, "Take the checkpoint of the best test accuracy.")
    flags.DEFINE_string("out", None, "The file to write.", required=True)
    flags.DEFINE_list("platforms", list(PLATFORMS), "What it is to run on: some of cpu, cuda, rocm, tpu.")
    flags.DEFINE_enum(
        "weights", None, ["packed", "dense"], "Write all variables, too, as OUT with .safetensors at its end."
    )


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    # Whatever the run was computed by: a file is for other machines.
    restored = checkpoints.restore(FLAGS.checkpoint, step=FLAGS.step, best=FLAGS.best, implementation="auto")
    model, variables = restored.components.model, restored.state.variables
    report = export(
        lambda variables, inputs: call_model(model, variables, inputs, train=False),
        variables,
        examples(restored.config),
        FLAGS.out,
        platforms=FLAGS.platforms,
    )
    console.print(report)
    if FLAGS.weights:
        topology = variables.pop("topology")
        path = Path(f"{FLAGS.out}.safetensors")
        save_safetensors(path, variables, {"params": topology}, dense=FLAGS.weights == "dense")
        console.print(f"{path}: {path.stat().st_size:,} bytes, {FLAGS.weights} weights")


def examples(config: Config) -> np.ndarray:
    """Seven inputs of a run's model that are like its data: normal pixels, or any characters."""
    shape, rng = config.abstract_inputs(7), np.random.default_rng(0)
    if np.issubdtype(shape.dtype, np.integer):
        return rng.integers(config.num_classes, size=shape.shape, dtype=shape.dtype)
    return rng.standard_normal(shape.shape, shape.dtype)


if __name__ == "__main__":
    define_flags()
    program.start(main)
