"""Linen models of `transformers` in small configurations: module, batch, outputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import linen as nn

WORDS, BATCH, LENGTH, CLASSES = 48, 4, 8, 10
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
IMAGES = {"image_size": 16, "patch_size": 4, "num_labels": CLASSES}


@dataclasses.dataclass(frozen=True)
class Foreign:
    """One model.

    Attributes:
      make: () -> module.
      inputs: PRNG key -> arguments of its call for a batch.
      options: of its call in training, by name.
      logits: its outputs -> logits[batch, ..., classes].
      num_sparse: layers that a plan makes sparse.
      mutable: collections that its call updates.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[jax.Array], tuple[Any, ...]]
    options: dict[str, Any]
    num_sparse: int
    mutable: tuple[str, ...] = ()

    def outputs(self, model: nn.Module, variables: Any, inputs: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        """Logits in training mode, and updated collections."""
        out, updated = model.apply(
            variables, *inputs, **self.options, rngs={"dropout": key}, mutable=list(self.mutable)
        )
        return out.logits, updated


def words(key, length=LENGTH):
    return jax.random.randint(key, (BATCH, length), 0, WORDS)


def text(key):
    """Words, attention mask, types, positions, head mask."""
    ids = words(key)
    return ids, jnp.ones_like(ids), jnp.zeros_like(ids), jnp.broadcast_to(jnp.arange(LENGTH), ids.shape), None


def image(key):
    return (jax.random.normal(key, (BATCH, 16, 16, 3)),)


def translation(key):
    source, target = words(key), words(jax.random.fold_in(key, 1), 6)
    positions = [jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) for ids in (source, target)]
    return source, jnp.ones_like(source), target, jnp.ones_like(target), *positions


def speech(key):
    """Mel features, of which a convolution with stride 2 keeps every other; words, their mask and their positions."""
    features, (*_, target, mask, _, positions) = jax.random.normal(key, (BATCH, 8, 2 * LENGTH)), translation(key)
    return features, target, mask, positions


def bert():
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=16, num_labels=CLASSES, **SIZES)
    return transformers.FlaxBertForSequenceClassification.module_class(config)


def vit():
    return transformers.FlaxViTForImageClassification.module_class(transformers.ViTConfig(**SIZES, **IMAGES))


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )
    return transformers.FlaxResNetForImageClassification.module_class(config)


def regnet():
    config = transformers.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, layer_type="y", num_labels=CLASSES
    )
    return transformers.FlaxRegNetForImageClassification.module_class(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=WORDS, max_position_embeddings=16, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    return transformers.FlaxBartForConditionalGeneration.module_class(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=WORDS, num_mel_bins=8, max_source_positions=LENGTH, max_target_positions=16, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
        decoder_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.FlaxWhisperForConditionalGeneration.module_class(config)


TRAIN = {"deterministic": False}
MODELS = {
    "bert": Foreign(bert, text, TRAIN, num_sparse=8),  # q, k, v, out, two of the MLP; pooler, classifier
    "vit": Foreign(vit, image, TRAIN, num_sparse=8),  # the same six; patches, classifier
    "resnet": Foreign(resnet, image, TRAIN, num_sparse=7, mutable=("batch_stats",)),
    "regnet": Foreign(regnet, image, TRAIN, num_sparse=10, mutable=("batch_stats",)),  # its grouped ones are dense
    "bart": Foreign(bart, translation, TRAIN, num_sparse=16),  # encoder 4 + 2, decoder 8 + 2; the tied head is dense
    "whisper": Foreign(whisper, speech, TRAIN, num_sparse=16),  # likewise, and two 1-D convolutions
}
