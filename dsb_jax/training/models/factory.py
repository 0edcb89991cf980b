"""Models by name: `convnet`, `wrn-DEPTH-WIDTH` such as `wrn-22-2`, `transformer-DEPTH-WIDTH`, ...; see `MODELS`."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dsb_jax.training.models.convnet import NARROW_CONVNET, ConvNet
from dsb_jax.training.models.layers import Layers
from dsb_jax.training.models.resnet import ResNet18
from dsb_jax.training.models.transformer import HEADS, Transformer
from dsb_jax.training.models.vgg import VGG16
from dsb_jax.training.models.wide_resnet import WideResNet

MODELS = ("convnet", "narrow_convnet", "resnet18", "vgg16", "wrn-DEPTH-WIDTH", "transformer-DEPTH-WIDTH")


def takes_text(name: str) -> bool:
    """Whether a model of this name takes characters, int32[N, T]; the others take images."""
    return name.startswith("transformer-")


def create(
    name: str,
    *,
    num_classes: int,
    conv: Callable[..., nn.Module] = nn.Conv,
    dense: Callable[..., nn.Module] = nn.Dense,
    dtype: Any = jnp.float32,
    dropout_rate: float = 0.0,
    width_multiplier: float = 1.0,
    feature_major: bool = False,
) -> nn.Module:
    """Builds a model; `__call__(x[N, H, W, C], train: bool) -> logits[N, num_classes]`, a transformer's for each token.

    Args:
      name: one of `MODELS`; `wrn-22-2` is a wide residual network of depth 22 and width 2.
      num_classes: size of the output.
      conv, dense: layer classes with the signatures of `nn.Conv` and `nn.Dense`.
      dtype: of the computation; parameters stay float32.
      dropout_rate: inside the residual blocks of a wide residual network; no other model has dropout.
      width_multiplier: scales every hidden width, as for a smaller dense model.
      feature_major: hidden activations of images are [C, H, W, N], without transposes between sparse layers; `conv`
        must take the argument `feature_major`, as `SparseConv` does.

    Raises:
      ValueError: if the name is unknown, the depth impossible, or dropout asked of a model without it.
    """
    feature_major = feature_major and not takes_text(name)
    if feature_major:
        conv = functools.partial(conv, feature_major=True)
    layers = Layers(conv, dense, dtype, width_multiplier, feature_major)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"model={name!r} does not exist: depth is 6n + 4 (10, 16, 22, ...), width >= 1.")
        return WideResNet(num_classes, depth=depth, width=width, dropout_rate=dropout_rate, layers=layers)
    if dropout_rate:
        raise ValueError(f"dropout_rate={dropout_rate} is for wrn models only; {name} has no dropout.")
    if match := re.fullmatch(r"transformer-(\d+)-(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 1 or width < HEADS or width % HEADS:
            raise ValueError(f"model={name!r} does not exist: depth is at least 1, width a multiple of {HEADS}.")
        return Transformer(num_classes, depth=depth, width=width, layers=layers)
    classes: dict[str, Callable[..., nn.Module]] = {
        "convnet": ConvNet,
        "narrow_convnet": functools.partial(ConvNet, sizes=NARROW_CONVNET),
        "resnet18": ResNet18,
        "vgg16": VGG16,
    }
    if name not in classes:
        raise ValueError(f"model={name!r} is unknown; choose one of {', '.join(MODELS)}.")
    return classes[name](num_classes, layers)
