"""Labels that are no class make the loss NaN; everything else is optax's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsb_jax.losses import cross_entropy, losses_of_labels, smoothed_cross_entropy

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(6, 5)).astype(np.float32), np.array([0, 4, 2, 2, 1, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, -5, -100, 5, 1000])
def test_a_label_that_is_no_class(smoothing, label):
    """-1 would count from the end, -100 would be trained on, and smoothing would swallow both (report 1)."""
    losses = losses_of_labels(LOGITS, np.where(np.arange(6) == 3, label, LABELS), smoothing=smoothing)
    assert np.isnan(losses).tolist() == [False, False, False, True, False, False]
    labels = np.where(np.arange(6) == 3, label, LABELS)
    assert np.isnan(smoothed_cross_entropy(smoothing)(LOGITS, labels))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64])
def test_right_labels_have_optax_s_loss(dtype):
    labels = LABELS.astype(dtype)
    wanted = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_array_equal(losses_of_labels(LOGITS, labels), wanted)
    assert cross_entropy(LOGITS, labels) == wanted.mean()
    smoothed = optax.softmax_cross_entropy(LOGITS, optax.smooth_labels(jax.nn.one_hot(LABELS, 5), 0.1))
    np.testing.assert_allclose(losses_of_labels(LOGITS, labels, smoothing=0.1), smoothed, rtol=1e-6)


def test_the_gradient_is_that_of_optax():
    ours = jax.grad(cross_entropy)(LOGITS, LABELS)
    theirs = jax.grad(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS).mean())(LOGITS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_tokens_and_single_examples():
    logits, labels = RNG.normal(size=(2, 3, 5)).astype(np.float32), np.array([[0, 4, 2], [2, 1, 0]])
    losses = losses_of_labels(logits, labels)
    assert losses.shape == (2, 3)
    np.testing.assert_allclose(losses[1], losses_of_labels(logits[1], labels[1]), rtol=1e-6)
    assert losses_of_labels(LOGITS[0], LABELS[0]).shape == ()


@pytest.mark.parametrize("labels", [
    LABELS[:1], LABELS[:5], LABELS[:, None], LABELS[None], LABELS[0], LABELS.astype(np.float32),
    np.eye(5, dtype=np.int32)[LABELS], LABELS > 0,
])  # fmt: skip
def test_labels_of_other_sizes_and_kinds(labels):
    """One label for many images would be broadcast (finding 18)."""
    for smoothing in (0.0, 0.1):
        with pytest.raises(ValueError, match=r"labels are \w+\[.*\] for logits \[6, 5\]; give one integer for each "
                           r"vector of logits, \[6\], or a loss of your own"):  # fmt: skip
            losses_of_labels(jnp.asarray(LOGITS), jnp.asarray(labels), smoothing=smoothing)


def test_equal_settings_are_one_function():
    assert smoothed_cross_entropy(0.1) is smoothed_cross_entropy(0.1)
    assert smoothed_cross_entropy(0) is cross_entropy
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing=.* is not in \[0, 1\)"):
            smoothed_cross_entropy(wrong)
