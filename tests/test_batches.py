"""Batches are crops of their own examples, and evaluation counts every example once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.training import data
from tests.test_data import random_images


@functools.partial(jax.jit, static_argnames=("augmentation", "dtype"))
def raw_batch(images, labels, idx, key, augmentation, dtype=jnp.float32):
    """A batch in raw pixel values: normalized by mean 0 and std 1/255."""
    channels = images.shape[-1]
    return data.take_batch(
        images,
        labels,
        idx,
        key=key,
        augmentation=augmentation,
        mean=(0.0,) * channels,
        std=(1 / 255,) * channels,
        dtype=dtype,
    )


def test_crop_by_hand():
    # One image of 2x2 pixels 1 2 / 3 4, padded by 1 and mirrored or not: the nine crops and their mirror images.
    image = np.array([[1, 2], [3, 4]], np.uint8)[None, :, :, None]
    padded = np.pad([[1, 2], [3, 4]], 1)
    crops = {
        tuple(padded[y : y + 2, x : x + 2][:, ::flip].ravel()) for y in range(3) for x in range(3) for flip in (1, -1)
    }
    idx = np.zeros(400, np.int32)
    got, _ = raw_batch(image, np.zeros(1, np.int32), idx, jax.random.key(0), data.Augmentation(pad=1, flip=True))
    seen = {tuple(row) for row in np.rint(np.asarray(got)).astype(int).reshape(400, 4)}
    assert seen == crops


@settings(max_examples=25, deadline=None)
@given(how=st.sampled_from([(0, True), (1, False), (3, True)]), seed=st.integers(0, 1000))
def test_every_image_of_a_batch_is_a_crop_of_its_own_example(how, seed):
    pad, flip = how
    height, width = 6, 5
    images, labels = random_images((5, height, width, 3), seed)
    images = np.maximum(images, 1)  # so that zeros are padding
    idx = np.random.default_rng(seed).integers(0, 5, 7, dtype=np.int32)
    augmentation = data.Augmentation(pad=pad, flip=flip)
    got, got_labels = raw_batch(images, labels.astype(np.int32), idx, jax.random.key(seed), augmentation)
    np.testing.assert_array_equal(got_labels, labels[idx])
    for i, result in zip(idx, np.rint(np.asarray(got)).astype(np.uint8), strict=True):
        padded = np.pad(images[i], ((pad, pad), (pad, pad), (0, 0)))
        windows = (padded[y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1))
        candidates = [w for window in windows for w in ((window, window[:, ::-1]) if flip else (window,))]
        assert any(np.array_equal(result, candidate) for candidate in candidates)


def test_without_augmentation_a_batch_is_the_normalized_images():
    images, labels = random_images((9, 4, 4, 3))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    idx = np.array([8, 0, 0, 3], np.int32)

    def both(images, labels):
        augmentation, moments = data.Augmentation(pad=0, flip=False), {"mean": mean, "std": std}
        batch, _ = data.take_batch(images, labels, idx, key=jax.random.key(0), augmentation=augmentation, **moments)
        return batch, data.normalize(images[idx], **moments)

    got, normalized = jax.jit(both)(images, labels)
    np.testing.assert_allclose(got, (images[idx] / 255 - np.array(mean)) / np.array(std), atol=1e-6)
    np.testing.assert_array_equal(got, normalized)


def test_a_batch_has_the_dtype_asked_for_and_needs_no_rank_promotion():
    images, labels = random_images((4, 8, 8, 3))
    arguments = (images, labels.astype(np.int32), np.arange(4, dtype=np.int32), jax.random.key(0))
    with jax.numpy_rank_promotion("raise"):
        got, got_labels = raw_batch(*arguments, augmentation=data.Augmentation(pad=2, flip=True), dtype=jnp.bfloat16)
    assert (got.dtype, got.shape, got_labels.dtype) == (jnp.bfloat16, (4, 8, 8, 3), jnp.int32)


def test_the_same_key_gives_the_same_batch_and_another_key_another():
    images, labels = random_images((4, 8, 8, 3))
    batch = functools.partial(raw_batch, images, labels.astype(np.int32), np.arange(4, dtype=np.int32))
    how = {"augmentation": data.Augmentation(pad=2, flip=True), "dtype": jnp.bfloat16}  # compiled for the test above
    first, same, other = (np.asarray(batch(jax.random.key(k), **how)[0]) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_epoch_orders_are_permutations_that_depend_on_key_and_epoch():
    key = jax.random.key(3)
    order = np.asarray(data.epoch_order(key, 2, 1000))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    traced = jax.jit(data.epoch_order, static_argnums=2)
    np.testing.assert_array_equal(order, traced(key, np.int32(2), 1000))
    for other in (traced(key, np.int32(3), 1000), traced(jax.random.key(4), np.int32(2), 1000)):
        assert (order != np.asarray(other)).mean() > 0.9


def test_eval_batches_by_hand():
    batches = list(data.eval_batches(5, 3))
    np.testing.assert_array_equal([idx for idx, _ in batches], [[0, 1, 2], [3, 4, 4]])
    np.testing.assert_array_equal([weight for _, weight in batches], [[1, 1, 1], [1, 1, 0]])


@given(num_examples=st.integers(0, 200), batch_size=st.integers(1, 70))
def test_evaluation_counts_every_example_once(num_examples, batch_size):
    counts = np.zeros(num_examples)
    for idx, weight in data.eval_batches(num_examples, batch_size):
        assert idx.shape == weight.shape == (batch_size,)
        assert (idx.dtype, weight.dtype) == (np.int32, np.float32)
        np.add.at(counts, idx, weight)
    assert (counts == 1).all()


def test_bad_sizes_are_named_at_the_call():
    with pytest.raises(ValueError, match="batch_size=0"):
        data.eval_batches(5, 0)
    with pytest.raises(ValueError, match="num_examples=-1"):
        data.eval_batches(-1, 5)
    with pytest.raises(ValueError, match="pad=-2"):
        data.Augmentation(pad=-2, flip=False)
