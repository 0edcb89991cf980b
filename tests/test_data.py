"""Data sets are read exactly, and what is not as declared is named: set, split and example."""

import io
import pathlib
import re
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from dsb_jax.training import data
from dsb_jax.training.data import datasets
from dsb_jax.training.data.packed import pack

TFDS_DIR = pathlib.Path(__file__).parents[2] / "shared" / "tfds"


def write_image_set(folder, name, images, labels, *, splits=("train", "test")):
    """Writes `images` (of one shape) as a tfds set of PNGs: the last third of them in the second split."""
    import tensorflow_datasets as tfds

    def example(i):
        file = io.BytesIO()
        Image.fromarray(images[i].squeeze()).save(file, "PNG")
        return {"image": io.BytesIO(file.getvalue()), "label": int(labels[i])}

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=images.shape[1:]),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
    )
    version_dir = folder / name / "1.0.0"
    version_dir.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(version_dir), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, supervised_keys=("image", "label"))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=8, file_format="array_record")
    writer.initialize_splits(list(splits))
    cut = len(images) * 2 // 3
    ranges = (range(cut), range(cut, len(images)))
    writer.add_examples({split: [example(i) for i in ids] for split, ids in zip(splits, ranges, strict=True)})
    writer.close_all()


def random_images(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, 3, shape[0])


def test_digits_split_is_fixed_and_stratified():
    digits, again = data.load("digits"), data.load("digits")
    assert digits.train_inputs.shape == (1437, 8, 8, 1)
    assert digits.test_inputs.shape == (360, 8, 8, 1)
    assert digits.train_inputs.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    assert digits.train_inputs.min() == 0
    assert digits.train_inputs.max() == 255
    np.testing.assert_array_equal(digits.train_inputs, again.train_inputs)
    np.testing.assert_array_equal(digits.test_labels, again.test_labels)
    train_share, test_share = (np.bincount(y) / len(y) for y in (digits.train_labels, digits.test_labels))
    np.testing.assert_allclose(train_share, test_share, atol=0.003)
    assert (digits.num_classes, digits.augmentation) == (10, data.Augmentation(pad=1, flip=False))


def test_moments_are_those_of_the_training_images():
    digits = data.load("digits")
    np.testing.assert_allclose(digits.mean, [(digits.train_inputs / 255).mean()], rtol=1e-12)
    np.testing.assert_allclose(digits.std, [(digits.train_inputs / 255).std()], rtol=1e-12)
    pixels = np.asarray(jax.jit(data.normalize)(digits.train_inputs, digits.mean, digits.std))
    assert pixels.mean() == pytest.approx(0, abs=1e-4)
    assert pixels.std() == pytest.approx(1, abs=1e-4)


def test_a_constant_channel_is_not_divided_by_zero():
    images = np.zeros((2, 4, 4, 2), np.uint8)
    images[0, ..., 1] = 255
    assert datasets._channel_moments(images) == ((0.0, 0.5), (1.0, 0.5))


@pytest.mark.parametrize(
    ("shape", "augmentation"),
    [((24, 32, 32, 3), data.Augmentation(pad=4, flip=True)), ((24, 16, 12, 1), data.Augmentation(pad=2, flip=False))],
)
def test_a_tfds_set_is_read_exactly_and_in_order(tmp_path, shape, augmentation):
    images, labels = random_images(shape)
    write_image_set(tmp_path, "tiny_set", images, labels, splits=("train", "validation"))
    loaded = data.load("tiny_set", data_dir=tmp_path)
    np.testing.assert_array_equal(np.concatenate([loaded.train_inputs, loaded.test_inputs]), images)
    np.testing.assert_array_equal(np.concatenate([loaded.train_labels, loaded.test_labels]), labels)
    assert loaded.train_inputs.shape[0] == 16  # two shards of 8: order holds across them
    assert loaded.train_labels.dtype == np.int32
    assert (loaded.num_classes, loaded.augmentation) == (3, augmentation)
    assert "tensorflow" not in sys.modules
    other = data.Augmentation(pad=0, flip=True)
    assert data.load("tiny_set", data_dir=tmp_path, augmentation=other).augmentation == other


def test_house_numbers_are_never_mirrored():
    assert datasets._default_augmentation("svhn_cropped", (32, 32, 3)) == data.Augmentation(pad=4, flip=False)


@pytest.mark.skipif(not (TFDS_DIR / "cifar10").is_dir(), reason="needs a prepared CIFAR-10 in ../shared/tfds")
def test_a_few_records_of_cifar10():
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=TFDS_DIR)
    images, labels = datasets.read_split(builder, "test[:20]")
    expected = list(builder.as_data_source(split="test[:20]"))
    np.testing.assert_array_equal(images, np.stack([record["image"] for record in expected]))
    np.testing.assert_array_equal(labels, [record["label"] for record in expected])


def test_unknown_sets_are_named_with_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"'no_such_set'.*spelling") as error:
        data.load("no_such_set", data_dir=tmp_path)
    assert str(tmp_path) in str(error.value)


def test_without_network_the_error_names_the_cure_at_once(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(datasets.urllib.request, "getproxies", dict)
    with pytest.raises(FileNotFoundError, match="tfds build cifar100 --file_format=array_record") as error:
        data.load("cifar100", data_dir=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_hosts_are_probed_once_each_and_not_behind_a_proxy(monkeypatch):
    hosts = datasets._download_hosts(["https://a.org/x.zip", "https://a.org/y.zip", "http://b.org:81/z", "manual.tar"])
    assert hosts == [("a.org", 443), ("b.org", 81)]
    assert datasets._unreachable([]) is None
    monkeypatch.setattr(datasets.urllib.request, "getproxies", lambda: {"https": "proxy:80"})
    assert datasets._unreachable(hosts) is None


def test_sets_of_varying_sizes_or_without_labels_are_rejected_before_any_download(tmp_path):
    with pytest.raises(ValueError, match=r"'cats_vs_dogs' has images of uint8\[None, None, 3\]"):
        data.load("cats_vs_dogs", data_dir=tmp_path)
    with pytest.raises(ValueError, match="'kitti' is not an image-classification set"):
        data.load("kitti", data_dir=tmp_path)
    images, labels = random_images((6, 8, 8, 1))
    write_image_set(tmp_path, "no_test", images, labels, splits=("train", "extra"))
    with pytest.raises(ValueError, match=r"splits \['extra', 'train'\]"):
        data.load("no_test", data_dir=tmp_path)
    write_image_set(tmp_path, "unlabelled", images, np.full(6, -1))
    with pytest.raises(
        ValueError, match="example 0 of split 'train' of data set 'unlabelled': its label -1 is outside"
    ):
        data.load("unlabelled", data_dir=tmp_path)


def test_a_set_stored_as_tfrecord_is_rejected_with_the_command_that_converts_it(tmp_path):
    write_image_set(tmp_path, "old_set", *random_images((6, 8, 8, 1)))
    info = tmp_path / "old_set" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"'old_set' is stored as tfrecord.*tfds build old_set"):
        data.load("old_set", data_dir=tmp_path)


@pytest.mark.parametrize("splits", [("train", "test"), ("test", "train")])
def test_an_empty_split_is_named(tmp_path, splits):
    write_image_set(tmp_path, "half", *random_images((1, 8, 8, 1)), splits=splits)  # the first split gets none
    with pytest.raises(ValueError, match=f"split '{splits[0]}' of data set 'half' has no example"):
        data.load("half", data_dir=tmp_path)


def test_damaged_files_are_named_with_their_folder(tmp_path):
    write_image_set(tmp_path, "damaged", *random_images((6, 8, 8, 1)))
    (file,) = (tmp_path / "damaged" / "1.0.0").glob("*test.array_record*")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"split 'test' of data set 'damaged' cannot be read from '.*/1.0.0' .*delete"):
        data.load("damaged", data_dir=tmp_path)


def builder_of(*records, shape=(8, 8, 1)):
    """A prepared set without its files."""

    class Source(list):
        def __getitems__(self, ids):
            return [self[i] for i in ids]

    features = {"image": types.SimpleNamespace(shape=shape)}
    source = Source({"image": image, "label": label} for image, label in records)
    return types.SimpleNamespace(
        name="made", info=types.SimpleNamespace(features=features), as_data_source=lambda **_: source
    )


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


GOOD = png(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (png(np.zeros((4, 16), np.uint8)), 0, "its image has 4x16 pixels, but the set declares 8x8; prepare"),
        (png(np.zeros((9, 8), np.uint8)), 0, "its image has 9x8 pixels"),
        (GOOD[:-30], 0, r"its image is damaged \(OSError\); prepare the set again"),
        (b"", 0, "its image is damaged"),
        (GOOD, -1, r"its label -1 is outside 0\.\.2; choose"),
        (GOOD, np.int64(3), r"its label 3 is outside 0\.\.2"),
        (GOOD, 2**32 + 1, r"its label 4294967297 is outside 0\.\.2"),  # 1, if it wrapped
        (GOOD, 1.5, "its label 1.5 is not an integer; choose"),
        (GOOD, np.float32(1), r"its label np.float32\(1.0\) is not an integer"),
        (GOOD, "1", "its label '1' is not an integer"),
        (GOOD, None, "its label None is not an integer"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_an_example_that_is_not_as_declared_is_named(image, label, message):
    builder = builder_of((GOOD, 0), (GOOD, np.int64(2)), (image, label), (GOOD, 1))
    with pytest.raises(ValueError, match=rf"^example 2 of split 'train' of data set 'made': {message}") as error:
        datasets.read_split(builder, "train", num_classes=3)
    assert len(str(error.value).splitlines()) == 1


def test_examples_are_counted_over_all_reads(monkeypatch):
    monkeypatch.setattr(datasets, "_READ_BATCH", 2)
    images, labels = datasets.read_split(builder_of(*[(GOOD, i) for i in range(5)]), "train")
    np.testing.assert_array_equal(images[..., 0], np.broadcast_to(np.arange(64).reshape(8, 8), (5, 8, 8)))
    np.testing.assert_array_equal(labels, range(5))
    with pytest.raises(ValueError, match="example 3 of split"):
        datasets.read_split(builder_of(*[(GOOD, i) for i in range(5)]), "train", num_classes=3)
    with pytest.raises(ValueError, match=r"split 'test\[:0\]' of data set 'made' has no example"):
        datasets.read_split(builder_of(), "test[:0]")


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [
        ("tensorflow_datasets", "cifar10", "data"),
        ("PIL", "tiny", "data"),
        ("sklearn", "digits", "train"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, name, extra, tmp_path, monkeypatch):
    write_image_set(tmp_path, "tiny", *random_images((6, 8, 8, 1)))
    for loaded in [key for key in sys.modules if key.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself takes for "not there"
    command = re.escape(f"pip install 'dsb-jax[{extra}]'")
    with pytest.raises(ImportError, match=f"^data set '{name}' needs {package}, .*: {command}$"):
        data.load(name, data_dir=tmp_path)


def test_a_missing_reader_is_named_however_late_it_is_imported():
    def as_data_source(**_):
        raise ModuleNotFoundError("*** this probably means that you are running on macOS or Windows ***")

    builder = builder_of()
    builder.as_data_source = as_data_source
    with pytest.raises(ImportError, match=r"^data set 'made' needs array_record, .*dsb-jax\[data\]'$"):
        datasets.read_split(builder, "train")


def test_only_the_sets_that_need_a_package_load_it():
    code = "import sys, dsb_jax.training.data as d; print(*{'PIL', 'sklearn', 'tensorflow_datasets'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def test_a_packed_set_is_the_same_and_needs_no_tfds(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    images, labels = random_images((12, 8, 8, 3))
    write_image_set(tmp_path / "tfds", "tiny", images, labels)
    (tmp_path / "packed").mkdir()
    pack(tfds.builder("tiny", data_dir=tmp_path / "tfds"), tmp_path / "packed" / "tiny.npz")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    tiny = data.load("tiny@4x4", data_dir=tmp_path / "packed")
    np.testing.assert_array_equal(tiny.train_inputs, datasets.pool(images[:8], (4, 4)))
    np.testing.assert_array_equal(np.append(tiny.train_labels, tiny.test_labels), labels)
    assert tiny.num_classes == 3
    (tmp_path / "packed" / "tiny.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"tiny\.npz is no packed data set"):
        data.load("tiny", data_dir=tmp_path / "packed")
