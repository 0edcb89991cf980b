"""Data sets as uint8 arrays in memory: scikit-learn's digits, those of TensorFlow Datasets, and Python's own text.

TensorFlow itself is not needed to read: a prepared set in the array_record format is read through
`builder.as_data_source`, and its JPEG or PNG bytes are decoded here. To *prepare* a set, tfds downloads it, and for
most sets encodes its images with TensorFlow; where that cannot be done, the error says what to run where.
"""

import contextlib
import dataclasses
import importlib
import operator
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
from jaxtyping import Int, UInt8

from dsb_jax.training.data import text
from dsb_jax.training.data.batches import Augmentation
from dsb_jax.training.data.images import MODES, decode
from dsb_jax.training.data.packed import Examples, read_packed

# Records read at a time: enough to amortise array_record's own thread pool, small enough not to hold a set twice.
_READ_BATCH = 2048

_POOLED = re.compile(r"(.+)@(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One set of labelled images or of text, in memory on the host.

    Attributes:
      name: as given to `load`.
      train_inputs, test_inputs: uint8[n, H, W, C], raw pixels; of text uint8[n, T], characters.
      train_labels, test_labels: int32[n], in 0..num_classes-1; of text int32[n, T], the next characters.
      num_classes: number of classes.
      mean, std: per channel, over the pixels of the training images, in units of 0..1; empty for text.
      augmentation: how to vary the training images; None for text.
    """

    name: str
    train_inputs: UInt8[np.ndarray, "n ..."]
    train_labels: Int[np.ndarray, "n ..."]
    test_inputs: UInt8[np.ndarray, "m ..."]
    test_labels: Int[np.ndarray, "m ..."]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None


def load(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, augmentation: Augmentation | None = None
) -> Dataset:
    """Loads a whole data set: CIFAR-10's 60000 images take about 10 s.

    Args:
      name: `digits` (bundled with scikit-learn: 1797 gray images of 8x8, split 80/20 by class, always in the same
        way), `python_text` (`dsb_jax.training.data.text`), or the name of a tfds image-classification set with images
        of one size, such as `cifar10`. `cifar10@8x8` is the same set with images averaged down to that size.
      data_dir: folder of the tfds sets; by default `TFDS_DATA_DIR` or `~/tensorflow_datasets`. A set that is not
        prepared there is downloaded and prepared there first. If it holds a file NAME.npz, as
        `dsb_jax.training.data.packed` writes it, that is read, without tfds.
      augmentation: instead of the default, which is a crop after padding by H // 8, and a flip for color photographs
        of 32x32 pixels before pooling. Text is not varied.

    Raises:
      ValueError: if tfds does not know the set, or it is not one of 8-bit images of one size with one label each; the
        first example that is not so is named. If images cannot be averaged down to the size asked for.
      FileNotFoundError: if the set is not prepared in `data_dir` and cannot be prepared here.
      ImportError: if a package that the set needs is not installed.
    """
    if name == text.NAME:
        (train_inputs, train_labels), (test_inputs, test_labels) = text.read_windows()
        return Dataset(name, train_inputs, train_labels, test_inputs, test_labels, text.VOCABULARY, (), (), None)
    pooled = _POOLED.fullmatch(name)
    original = pooled[1] if pooled else name
    if original == "digits":
        (train_inputs, train_labels), (test_inputs, test_labels), num_classes = _read_digits()
    else:
        (train_inputs, train_labels), (test_inputs, test_labels), num_classes = _read_tfds(original, data_dir)
    augmentation = augmentation or _default_augmentation(original, train_inputs.shape[1:])
    if pooled:
        size = int(pooled[2]), int(pooled[3])
        pad = augmentation.pad * size[0] // train_inputs.shape[1]
        augmentation = dataclasses.replace(augmentation, pad=pad)
        train_inputs, test_inputs = (pool(images, size) for images in (train_inputs, test_inputs))
    mean, std = _channel_moments(train_inputs)
    return Dataset(
        name=name,
        train_inputs=train_inputs,
        train_labels=train_labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        num_classes=num_classes,
        mean=mean,
        std=std,
        augmentation=augmentation,
    )


def pool(images: UInt8[np.ndarray, "n H W C"], size: tuple[int, int]) -> UInt8[np.ndarray, "n h w C"]:
    """Images averaged down to `size`, rounded to whole numbers.

    Raises:
      ValueError: if the size does not divide that of the images.
    """
    count, height, width, channels = images.shape
    if min(size) < 1 or height % size[0] or width % size[1]:
        raise ValueError(
            f"images of {height}x{width} cannot be averaged down to {size[0]}x{size[1]}; give a size that divides "
            f"theirs, such as {height // 2}x{width // 2}."
        )
    tiles = images.reshape(count, size[0], height // size[0], size[1], width // size[1], channels)
    sums = tiles.sum(axis=(2, 4), dtype=np.uint32)
    area = (height // size[0]) * (width // size[1])
    return ((sums + area // 2) // area).astype(np.uint8)


def _default_augmentation(name: str, image_shape: tuple[int, ...]) -> Augmentation:
    # Street View House Numbers are 32x32 photographs too, but a mirrored digit is not a digit.
    if image_shape == (32, 32, 3) and not name.startswith("svhn"):
        return Augmentation(pad=4, flip=True)
    return Augmentation(pad=image_shape[0] // 8, flip=False)


def _channel_moments(images: UInt8[np.ndarray, "n H W C"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel in units of 0..1, from counts of the 256 values."""
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), _READ_BATCH):
        for c in range(channels):
            counts[c] += np.bincount(images[start : start + _READ_BATCH, ..., c].ravel(), minlength=256)
    values = np.arange(256) / 255
    frequency = counts / counts.sum(axis=1, keepdims=True)
    mean = frequency @ values
    variance = (frequency * np.square(values[None, :] - mean[:, None])).sum(axis=1)
    # A channel that never varies would be divided by zero; any other scale does.
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def _read_digits() -> tuple[Examples, Examples, int]:
    sklearn_datasets = _import("sklearn.datasets", name="digits", extra="train")
    train_test_split = _import("sklearn.model_selection", name="digits", extra="train").train_test_split
    bunch = sklearn_datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test]), 10


def _read_tfds(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[Examples, Examples, int]:
    if data_dir is not None and (packed := Path(data_dir) / f"{name}.npz").is_file():
        _import("PIL.Image", name=name, extra="data")
        return read_packed(packed)
    tfds = _import("tensorflow_datasets", name=name, extra="data")
    where = f"data_dir={os.fspath(data_dir or tfds.core.constants.DATA_DIR)!r}"
    with _quiet():
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except (ValueError, AssertionError) as error:  # tfds asserts that it has the version asked for
            raise ValueError(
                f"tfds cannot find data set {name!r}, nor is it prepared in {where} ({_first_line(error)}); check the "
                "spelling, for example 'cifar10', 'cifar100' or 'digits'."
            ) from None
        image_key, label_key = _feature_keys(builder, name)
        prepared = builder.is_prepared()
    if not prepared:
        _prepare(builder, name, where)
    splits = builder.info.splits
    test_split = "test" if "test" in splits else "validation"
    if "train" not in splits or test_split not in splits:
        raise ValueError(
            f"data set {name!r} in {where} has the splits {sorted(splits)}; choose one with 'train' and 'test' (or "
            "'validation')."
        )
    for split in ("train", test_split):
        if not splits[split].num_examples:
            raise _empty_split(name, split)
    num_classes = builder.info.features[label_key].num_classes
    keys: dict[str, Any] = {"image_key": image_key, "label_key": label_key, "num_classes": num_classes}
    train, test = (read_split(builder, split, **keys) for split in ("train", test_split))
    return train, test, num_classes


def _feature_keys(builder: Any, name: str) -> tuple[str, str]:
    """The names of the image and of the label, from the metadata alone: nothing has been downloaded yet."""
    import tensorflow_datasets as tfds

    keys, features = builder.info.supervised_keys, builder.info.features
    if not (
        keys
        and len(keys) == 2
        and all(isinstance(key, str) and key in features for key in keys)
        and isinstance(features[keys[0]], tfds.features.Image)
        and isinstance(features[keys[1]], tfds.features.ClassLabel)
        and features[keys[1]].num_classes
    ):
        raise ValueError(
            f"data set {name!r} is not an image-classification set: its supervised keys are {keys}; choose one that "
            "maps an image to one label of a known number of classes, such as 'cifar10'."
        )
    image = features[keys[0]]
    if None in image.shape or image.shape[-1] not in MODES or image.np_dtype != np.uint8:
        raise ValueError(
            f"data set {name!r} has images of {np.dtype(image.np_dtype)}{list(image.shape)} (None: of varying size); "
            "choose a set of 8-bit images of one size, or prepare a resized copy, such as 'imagenet_resized/64x64'."
        )
    return keys


def _prepare(builder: Any, name: str, where: str) -> None:
    """Downloads and prepares a set in the array_record format, or says in two lines why not and what to do."""
    cure = (
        f"prepare it once where both can be had: `tfds build {name} --file_format=array_record`, "
        "and give the folder it wrote to as data_dir."
    )
    try:
        hosts = _download_hosts(builder.url_infos or ())
        unreachable = _unreachable(hosts)
        if not unreachable:
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever a data set's own script raises: the caller wants the cure
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {where}, and tfds could not prepare it "
            f"({type(error).__name__}: {_first_line(error)}).\nPreparing, unlike reading, may need network and "
            f"TensorFlow; {cure}"
        ) from error
    if unreachable:
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {where}, and {unreachable} cannot be reached from here.\n"
            f"Preparing, unlike reading, may need network and TensorFlow; {cure}"
        )


def _download_hosts(urls: Iterable[str]) -> list[tuple[str, int]]:
    """Host and port of each URL, without repetition."""
    ports = {"http": 80, "https": 443, "ftp": 21}
    parts = [urllib.parse.urlsplit(url) for url in urls]
    pairs = {(p.hostname, p.port or ports[p.scheme]): None for p in parts if p.hostname and p.scheme in ports}
    return list(pairs)


def _unreachable(hosts: list[tuple[str, int]], timeout_s: float = 3.0) -> str | None:
    """The first of the hosts if it takes no connection, else None.

    tfds retries a failed download for more than three minutes and then prints pages; one try shows a missing
    network at once. Behind a proxy a direct connection tells nothing, so there the question is left to tfds.
    """
    if not hosts or urllib.request.getproxies():
        return None
    try:
        socket.create_connection(hosts[0], timeout=timeout_s).close()
    except OSError:
        return hosts[0][0]
    return None


def read_split(
    builder: Any, split: str, *, image_key: str = "image", label_key: str = "label", num_classes: int | None = None
) -> tuple[UInt8[np.ndarray, "n H W C"], Int[np.ndarray, "n"]]:
    """Reads and decodes one split of a prepared tfds set, without TensorFlow.

    Args:
      builder: a `tfds.core.DatasetBuilder` of a prepared set with uint8 images of one size.
      split: any tfds split, also a part of one, such as `test[:100]`.
      image_key, label_key: names of the features.
      num_classes: labels outside 0..num_classes-1 are refused; with None any int32 will do.

    Returns:
      Images, uint8, and labels, int32.

    Raises:
      ValueError: if the set is stored in a format without random access, such as tfrecord; its files are damaged; the
        split is empty; or an example is not as the set declares. An example is named by its place in the split, from 0.
      ImportError: if a package that reads or decodes is not installed.
    """
    name = getattr(builder, "name", "?")  # only messages need it
    tfds = _import("tensorflow_datasets", name=name, extra="data")
    _import("PIL.Image", name=name, extra="data")
    shape = builder.info.features[image_key].shape
    whose = f"split {split!r} of data set {name!r}"
    try:
        # Decoding here instead of by tfds halves the time, which is all overhead for images this small.
        source = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise ValueError(
            f"data set {name!r} is stored as {builder.info.file_format.value} in {os.fspath(builder.data_path)!r}, "
            f"which only TensorFlow reads; prepare it in another data_dir with "
            f"`tfds build {name} --file_format=array_record`."
        ) from None
    except ImportError as error:  # tfds imports the reader of its format as late as this
        raise _missing_package("array_record", name=name, extra="data") from error
    if not len(source):
        raise _empty_split(name, split)
    lowest, highest = (np.iinfo(np.int32).min, np.iinfo(np.int32).max) if num_classes is None else (0, num_classes - 1)
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    # One thread on purpose: images of 32x32 hold the interpreter's lock for most of their decoding, and two threads
    # took 1.5 times as long as one.
    for start in range(0, len(source), _READ_BATCH):
        stop = min(start + _READ_BATCH, len(source))
        try:
            records = source.__getitems__(range(start, stop))
        except Exception as error:  # the reader's own types
            raise ValueError(
                f"{whose} cannot be read from {os.fspath(builder.data_path)!r} ({_first_line(error)}); delete this "
                "folder and prepare the set again."
            ) from error
        for i, record in zip(range(start, stop), records, strict=True):
            try:
                images[i] = decode(record[image_key], shape)
                labels[i] = _checked_label(record[label_key], lowest, highest)
            except ValueError as error:
                raise ValueError(f"example {i} of {whose}: {error}") from error
    return images, labels


def _checked_label(label: Any, lowest: int, highest: int) -> int:
    try:
        number = operator.index(label)  # unlike int(), takes no 1.5 and no "1"
    except TypeError:
        raise ValueError(f"its label {label!r} is not an integer; choose a set with one class label each.") from None
    if not lowest <= number <= highest:
        raise ValueError(f"its label {number} is outside {lowest}..{highest}; choose a set whose split is labelled.")
    return number


def _empty_split(name: str, split: str) -> ValueError:
    return ValueError(f"split {split!r} of data set {name!r} has no example; choose another set or prepare it again.")


def _import(module: str, *, name: str, extra: str) -> Any:
    """Imports what only some data sets need: it takes seconds, and the base install does not have it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing_package(module, name=name, extra=extra) from error


def _missing_package(module: str, *, name: str, extra: str) -> ImportError:
    package = module.partition(".")[0]
    return ImportError(f"data set {name!r} needs {package}, which cannot be imported: pip install 'dsb-jax[{extra}]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides tfds' warnings about folders it looked into in vain; an error follows where it matters."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
