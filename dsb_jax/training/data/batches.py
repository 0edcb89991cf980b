"""Batches from data that stay on the device as uint8: order, gather; of images random crop, flip, normalize.

A data set of this project's size (CIFAR: 150 MB) fits the device, so a batch is a gather inside the compiled
training step and the host sends nothing but the step. The augmentation is that of the paper's CIFAR runs (DSB,
NeurIPS 2022, appendix): zero padding, a random crop of the original size, a random horizontal flip.

The crop never builds the padded image. Each output pixel knows which input pixel it shows, or that it shows
padding; a worked row of W = 4 with pad = 1, shifted by +1:

    output column w          0  1  2  3
    source column w + 1      1  2  3  4     4 is outside 0..3: a zero
    flipped: 3 - w + 1       4  3  2  1     the same crop, mirrored

so images, crop and flip are one gather: 0.3 ms for 128 images of 32x32x3 on 2 CPU cores, where selecting among
shifted copies takes 10 ms.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt8


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images vary. Hashable, so that it can be a static argument of `jit`.

    Attributes:
      pad: pixels of zeros on each side before a random crop back to the original size; 0 does not crop.
      flip: whether to mirror half of the images left to right, at random.
    """

    pad: int
    flip: bool

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ValueError(f"pad={self.pad} is negative; give the pixels to add on each side, 0 for no crop.")


def epoch_order(key: Key[Array, ""], epoch: int | Int[Array, ""], num_examples: int) -> Int[Array, "num_examples"]:
    """The order in which epoch `epoch` visits the examples: a permutation, the same for the same key and epoch.

    Args:
      key: one key for the whole run.
      epoch: epoch number; any two epochs have independent orders.
      num_examples: static.

    Returns:
      int32[num_examples].
    """
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples).astype(jnp.int32)


def normalize(
    images_u8: UInt8[Array | np.ndarray, "*batch H W C"],
    mean: Sequence[float] | Float[Array | np.ndarray, "C"],
    std: Sequence[float] | Float[Array | np.ndarray, "C"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch H W C"]:
    """`(images / 255 - mean) / std` per channel, computed in float32 and rounded once to `dtype`.

    Args:
      images_u8: raw pixels, 0 to 255.
      mean, std: per channel, in units of 0..1, as a `Dataset` holds them.
      dtype: of the result.
    """
    images = jnp.asarray(images_u8)
    channel_axis = (1,) * (images.ndim - 1) + (-1,)
    mean = jnp.asarray(mean, jnp.float32).reshape(channel_axis)
    std = jnp.asarray(std, jnp.float32).reshape(channel_axis)
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def take_batch(
    inputs_u8: UInt8[Array, "n ..."],
    labels: Int[Array, "n ..."],
    idx: Int[Array, "B"],
    *,
    key: Key[Array, ""],
    augmentation: Augmentation | None,
    mean: Sequence[float] | Float[Array | np.ndarray, "C"],
    std: Sequence[float] | Float[Array | np.ndarray, "C"],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Array, Int[Array, "B ..."]]:
    """Gathers, augments and normalizes one training batch. Jit-able; `augmentation` and `dtype` are static.

    The padding is black (raw zeros, as in the usual CIFAR recipe), hence `-mean / std` in the result.

    Args:
      inputs_u8: the whole training set, on the device: images [n, H, W, C], or text [n, T].
      labels: int32, of the whole training set.
      idx: which examples, each in 0..n-1.
      key: of this batch; each image draws a crop and a flip of its own from it.
      augmentation: crop and flip of images; None for text.
      mean, std: per channel, in units of 0..1; of images.
      dtype: of the images returned.

    Returns:
      The images, floats, or the characters, int32; and their int32 labels.
    """
    if augmentation is None:
        return inputs_u8[idx].astype(jnp.int32), labels[idx].astype(jnp.int32)
    pixels = _crop_and_flip(inputs_u8, idx, key, augmentation)
    return normalize(pixels, mean, std, dtype), labels[idx].astype(jnp.int32)


def _crop_and_flip(
    images: UInt8[Array, "n H W C"], idx: Int[Array, "B"], key: Key[Array, ""], augmentation: Augmentation
) -> UInt8[Array, "B H W C"]:
    """The raw pixels of `images[idx]`, each image cropped and flipped at random. See the module docstring."""
    batch, (_, height, width, _) = idx.shape[0], images.shape
    if augmentation == Augmentation(pad=0, flip=False):
        return images[idx]
    y_key, x_key, flip_key = jax.random.split(key, 3)
    pad = augmentation.pad
    y_shift = jax.random.randint(y_key, (batch, 1), -pad, pad + 1)
    x_shift = jax.random.randint(x_key, (batch, 1), -pad, pad + 1)
    y = jnp.arange(height)[None, :]
    x = jnp.arange(width)[None, :]
    if augmentation.flip:
        x = jnp.where(jax.random.bernoulli(flip_key, shape=(batch, 1)), width - 1 - x, x)
    y, x = (y + y_shift)[:, :, None], (x + x_shift)[:, None, :]
    pixels = images[idx[:, None, None], jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return jnp.where(inside[..., None], pixels, 0)


def eval_batches(
    num_examples: int, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, "batch_size"], Float[np.ndarray, "batch_size"]]]:
    """Covers every example exactly once with batches of one static shape, so that evaluation compiles once.

    A weighted mean over all batches is the exact mean over the examples. With 5 examples and a batch size of 3:

        idx [0, 1, 2]  weight [1, 1, 1]
        idx [3, 4, 4]  weight [1, 1, 0]     the last example fills the last batch up, and does not count again

    Args:
      num_examples: examples to cover, 0 to num_examples - 1; with 0 there are no batches.
      batch_size: of every batch, the last one included.

    Returns:
      An iterator over `(idx, weight)`: int32[batch_size] and float32[batch_size] of 0 and 1.

    Raises:
      ValueError: if `batch_size` is below 1 or `num_examples` is negative.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds no example; give at least 1.")
    if num_examples < 0:
        raise ValueError(f"num_examples={num_examples} is negative; give the size of the set.")
    # A generator expression: the checks above run at the call, not at the first `next`.
    positions = (np.arange(start, start + batch_size) for start in range(0, num_examples, batch_size))
    return (
        (np.minimum(position, num_examples - 1).astype(np.int32), (position < num_examples).astype(np.float32))
        for position in positions
    )
