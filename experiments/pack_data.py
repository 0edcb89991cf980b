"""Writes a prepared tfds set as one file, to take to a machine without TensorFlow Datasets, array_record or a network.

    python -m experiments.pack_data --data_dir=DIR --out=FOLDER        # FOLDER/cifar10.npz

There, `--data_dir=FOLDER` finds it. The images stay encoded as they are (`dsb_jax.training.data.packed`).
"""

from pathlib import Path

from absl import flags

from dsb_jax.training.data.packed import pack
from experiments import program

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("dataset", "cifar10", "A tfds image classification set that is prepared in --data_dir.")
    flags.DEFINE_string("data_dir", None, "Folder of the tfds sets; by default tfds' own.")
    flags.DEFINE_string("out", None, "Folder of the file; it is made.", required=True)


def main() -> None:
    """Flags -> library calls."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(FLAGS.dataset, data_dir=FLAGS.data_dir)
    if not builder.is_prepared():
        raise FileNotFoundError(f"dataset={FLAGS.dataset} is not prepared in data_dir={FLAGS.data_dir}.")
    file = Path(FLAGS.out) / f"{FLAGS.dataset}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    pack(builder, file)
    program.console().print(f"written: {file}, {file.stat().st_size / 2**20:.1f} MiB", soft_wrap=True)


if __name__ == "__main__":
    define_flags()
    program.start(main)
