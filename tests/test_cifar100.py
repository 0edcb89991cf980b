"""CIFAR-100 through the same code as CIFAR-10: random images in tfds' own format, features and folder of that set."""

import io

import jax
import numpy as np
from PIL import Image

from dsb_jax.training import data, loop
from dsb_jax.training.checkpoints import restore
from dsb_jax.training.config import Config
from tests.test_loop import Silent


def write_random_cifar100(folder, counts):
    """The set as `tfds build` leaves it, but of random images; returns their labels by split."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    info = tfds.builder("cifar100", data_dir=folder, file_format="array_record").info
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=40, file_format="array_record")
    (folder / "cifar100" / "3.0.2").mkdir(parents=True)
    writer.initialize_splits(list(counts))
    labels = {split: rng.integers(0, 100, count) for split, count in counts.items()}

    def example(i, label):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        image = io.BytesIO(file.getvalue())
        return {"id": f"{i:05d}", "image": image, "label": int(label), "coarse_label": int(label) // 5}

    writer.add_examples({split: [example(i, label) for i, label in enumerate(labels[split])] for split in counts})
    writer.close_all()
    return labels


def test_cifar100_is_read_trained_and_evaluated(tmp_path):
    labels = write_random_cifar100(tmp_path / "data", {"train": 64, "test": 30})
    dataset = data.load("cifar100", data_dir=tmp_path / "data")
    assert dataset.num_classes == 100  # the fine labels
    assert dataset.augmentation == data.Augmentation(pad=4, flip=True)
    np.testing.assert_array_equal(dataset.train_labels, labels["train"])
    np.testing.assert_array_equal(dataset.test_labels, labels["test"])
    config = Config(dataset="cifar100", method="dense", epochs=1, batch_size=16)  # compiles fastest
    config = loop.for_dataset(config, dataset)
    assert (config.input_shape, config.num_classes, config.total_steps) == ((32, 32, 3), 100, 4)
    summary = loop.run(config, dataset, tmp_path / "run", resume=False, progress=Silent())
    assert np.isfinite(summary["test_loss"])
    restored = restore(tmp_path / "run")
    components, state = restored.components, restored.state
    assert state.params["head"]["kernel"].shape == (128, 100)
    logits = jax.eval_shape(lambda s, x: components.model.apply(s.variables, x), state, dataset.test_inputs[:2] / 255)
    assert logits.shape == (2, 100)
