"""A prepared tfds set as one file, for machines without TensorFlow Datasets: NAME.npz in the place of its folder.

The images stay encoded, and are decoded when they are read, so both have the same pixels:

    train_images    uint8[bytes]   the encoded images one after the other
    train_lengths   int32[n]       bytes of each
    train_labels    int32[n]
    test_...        the same
    image_shape, num_classes
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dsb_jax.training.data.images import decode

SPLITS = ("train", "test")

# Images and labels of one split. Unnamed sizes, because the two splits of a set differ in n.
Examples = tuple[UInt8[np.ndarray, "_ H W C"], Int[np.ndarray, "_"]]


def pack(builder: Any, file: Path) -> None:
    """Writes a prepared set of images, with the splits "train" and "test", to one file.

    Args:
      builder: a `tfds.core.DatasetBuilder` of a set with images and labels as its supervised keys.
      file: its folder must exist.
    """
    import tensorflow_datasets as tfds

    image_key, label_key = builder.info.supervised_keys
    features = builder.info.features
    arrays: dict[str, Any] = {
        "image_shape": np.asarray(features[image_key].shape, np.int32),
        "num_classes": np.int32(features[label_key].num_classes),
    }
    for split in SPLITS:
        source = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
        records = source.__getitems__(range(len(source)))
        images = [record[image_key] for record in records]
        arrays[f"{split}_images"] = np.frombuffer(b"".join(images), np.uint8)
        arrays[f"{split}_lengths"] = np.asarray([len(image) for image in images], np.int32)
        arrays[f"{split}_labels"] = np.asarray([record[label_key] for record in records], np.int32)
    np.savez_compressed(file, **arrays)


def read_packed(file: Path) -> tuple[Examples, Examples, int]:
    """The splits "train" and "test" of a file of `pack`, and the number of classes.

    Raises:
      ValueError: if it is not such a file.
    """
    try:
        with np.load(file) as arrays:
            shape = tuple(int(size) for size in arrays["image_shape"])
            train, test = (_read_split(arrays, split, shape) for split in SPLITS)
            return train, test, int(arrays["num_classes"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is no packed data set ({error}); write it by experiments.pack_data.") from error


def _read_split(arrays: Any, split: str, shape: tuple[int, ...]) -> Examples:
    encoded, lengths = arrays[f"{split}_images"].tobytes(), arrays[f"{split}_lengths"]
    ends = np.cumsum(lengths, dtype=np.int64)
    images = np.empty((len(lengths), *shape), np.uint8)
    for i, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        images[i] = decode(encoded[end - length : end], (shape[0], shape[1], shape[2]))
    return images, arrays[f"{split}_labels"]
