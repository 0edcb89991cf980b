"""Data sets beside labelled images of full size: Python's own text, and images averaged down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.training import data, models
from dsb_jax.training.config import Config
from dsb_jax.training.data import text
from dsb_jax.training.data.datasets import pool
from dsb_jax.training.loop import for_dataset


@pytest.fixture(scope="module")
def python_text():
    return data.load("python_text")


def test_characters_by_hand():
    assert list(text.to_codes(b" A\n\t~\xff")) == [0, 33, 95, 96, 94, 96]


def test_windows_predict_the_next_character(python_text):
    assert python_text.num_classes == text.VOCABULARY
    assert python_text.test_inputs.shape == (text.NUM_TEST_WINDOWS, text.CONTEXT)
    assert len(python_text.train_inputs) > 20_000
    for inputs, labels in (
        (python_text.train_inputs, python_text.train_labels), (python_text.test_inputs, python_text.test_labels),
    ):  # fmt: skip
        np.testing.assert_array_equal(inputs[:100, 1:], labels[:100, :-1])
        assert labels.max() < text.VOCABULARY
    # Windows follow each other: the last label of one is the first input of the next.
    np.testing.assert_array_equal(python_text.train_labels[:100, -1], python_text.train_inputs[1:101, 0])


def test_every_eighth_file_is_held_out(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.py").write_bytes(b"a" * 100_000 if i % 8 else b"b" * 100_000)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_bytes(b"c" * 100_000)
    (train, _), (test, _) = text.read_windows(tmp_path)
    assert (train == text.to_codes(b"a")[0]).mean() > 0.999  # all but the ends of files
    assert (test == text.to_codes(b"b")[0]).mean() > 0.999
    with pytest.raises(FileNotFoundError, match="has 0 of its files"):
        text.read_windows(tmp_path / "nowhere")


def test_text_is_batched_as_it_is(python_text):
    idx = jnp.array([3, 1])
    inputs, labels = data.take_batch(
        jnp.asarray(python_text.train_inputs[:5]), jnp.asarray(python_text.train_labels[:5]), idx,
        key=jax.random.key(0), augmentation=None, mean=(), std=(),
    )  # fmt: skip
    assert inputs.dtype == labels.dtype == jnp.int32
    np.testing.assert_array_equal(inputs, python_text.train_inputs[[3, 1]])
    np.testing.assert_array_equal(labels, python_text.train_labels[[3, 1]])


def test_the_model_must_fit_the_data(python_text):
    config = for_dataset(Config(dataset="python_text", model="transformer-1-8", batch_size=6, steps=7), python_text)
    assert (config.input_shape, config.num_classes, config.total_steps, config.epochs) == ((96,), 97, 7, 1)
    assert config.abstract_inputs().dtype == jnp.int32
    with pytest.raises(ValueError, match="model='convnet' does not take python_text; give text a transformer"):
        for_dataset(Config(), python_text)
    with pytest.raises(ValueError, match="model='transformer-1-8' does not take digits"):
        for_dataset(Config(model="transformer-1-8"), data.load("digits"))
    for name in ("transformer-1-6", "transformer-0-8"):
        with pytest.raises(ValueError, match="does not exist: depth is at least 1, width a multiple of 4"):
            models.create(name, num_classes=3)


def test_a_decoder_does_not_see_the_future():
    model = models.create("transformer-1-8", num_classes=97)
    tokens = jnp.arange(12).reshape(1, 12)
    variables = model.init(jax.random.key(0), tokens)
    changed = model.apply(variables, tokens.at[0, 7].set(50))
    plain = model.apply(variables, tokens)
    np.testing.assert_array_equal(plain[0, :7], changed[0, :7])
    assert (plain[0, 7:] != changed[0, 7:]).any(axis=-1).all()


def test_pooling_by_hand():
    image = np.array([[1, 2, 10, 20], [3, 4, 30, 41]], np.uint8).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(pool(image, (1, 2)).ravel(), [3, 25])  # 2.5 is rounded up, 25.25 down
    np.testing.assert_array_equal(pool(image, (2, 4)), image)
    with pytest.raises(ValueError, match="images of 2x4 cannot be averaged down to 2x3; give a size that divides"):
        pool(image, (2, 3))


def test_a_pooled_set_is_the_same_set_in_small():
    digits, small = data.load("digits"), data.load("digits@4x4")
    assert small.train_inputs.shape == (len(digits.train_inputs), 4, 4, 1)
    np.testing.assert_array_equal(small.test_labels, digits.test_labels)
    assert small.augmentation == data.Augmentation(pad=0, flip=False)  # a pixel of 8 is half a pixel of 4
    assert small.mean == pytest.approx(digits.mean, abs=0.002)
