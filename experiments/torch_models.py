"""The image classifiers of `dsb_jax.training.models` as plain data, layer for layer, for `experiments.torch_peer`.

A model is a chain: layers that are applied one after another. `wrn-10-1` begins so,

    (Conv("stem", 3, 16, 3, 1),
     Norm("block_0_0/norm_0", 16), RELU,
     Sum((Conv("block_0_0/conv_0", 16, 16, 3, 1), Norm("block_0_0/norm_1", 16), RELU, ...), ()), ...)

Names are the paths in our models, by which a test compares the two. This file is read by a Python without jax, of 3.10
or newer: it imports the standard library alone, and PyTorch not either, so that it can be tested without.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

CHANNELS = 3  # of the images
RELU = "relu"
MAX_POOL = "max_pool"  # 2x2 with stride 2; an odd last row or column is dropped
MEAN = "mean"  # over height and width

_CONVNETS = {
    "convnet": ((32, 1), (64, 1), (128, 2), (128, 1)),
    "narrow_convnet": ((32, 1), (32, 2), (64, 2), (64, 1)),
}
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_RESNET18 = (64, 128, 256, 512)


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, `size` x `size`, padded so that stride 1 keeps height and width."""

    name: str
    inputs: int
    outputs: int
    size: int
    stride: int


@dataclass(frozen=True)
class Norm:
    """Batch norm: eps 1e-5, and a tenth of each batch in the running statistics."""

    name: str
    features: int


@dataclass(frozen=True)
class Linear:
    """A linear layer with bias."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Sum:
    """Two chains side by side, of which the outputs are added; an empty `skip` adds the input."""

    main: "Chain"
    skip: "Chain"


Layer = Conv | Norm | Linear | Sum | str
Chain = tuple[Layer, ...]


def describe(model: str, num_classes: int) -> Chain:
    """The layers of a model.

    Args:
      model: convnet, narrow_convnet, resnet18, vgg16, or wrn-DEPTH-WIDTH.
      num_classes: of the classifier.

    Raises:
      ValueError: if the name is none of these.
    """
    if model in _CONVNETS:
        body, features = _convnet(_CONVNETS[model])
    elif model == "vgg16":
        body, features = _vgg16()
    elif model == "resnet18":
        body, features = _resnet18()
    elif match := re.fullmatch(r"wrn-(\d+)-(\d+)", model):
        body, features = _wide_resnet(int(match[1]), int(match[2]))
    else:
        names = ", ".join((*_CONVNETS, "resnet18", "vgg16", "wrn-DEPTH-WIDTH"))
        raise ValueError(f"model={model!r} is not written for PyTorch; choose one of {names}.")
    return (*body, MEAN, Linear("head", features, num_classes))


def layers_of(chain: Chain) -> Iterator[Conv | Norm | Linear]:
    """The layers with weights, in the order in which PyTorch registers them: `main` of a sum before `skip`."""
    for layer in chain:
        if isinstance(layer, Sum):
            yield from layers_of(layer.main + layer.skip)
        elif not isinstance(layer, str):
            yield layer


def shapes(chain: Chain) -> dict[str, tuple[int, ...]]:
    """Path of each parameter in our models -> its shape in PyTorch's order of axes, in the order of `layers_of`."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers_of(chain):
        if isinstance(layer, Conv):
            found[f"{layer.name}/kernel"] = (layer.outputs, layer.inputs, layer.size, layer.size)
        elif isinstance(layer, Norm):
            found[f"{layer.name}/scale"] = found[f"{layer.name}/bias"] = (layer.features,)
        else:
            found[f"{layer.name}/kernel"] = (layer.outputs, layer.inputs)
            found[f"{layer.name}/bias"] = (layer.outputs,)
    return found


def _convnet(sizes: tuple[tuple[int, int], ...]) -> tuple[Chain, int]:
    layers: list[Layer] = []
    width = CHANNELS
    for i, (outputs, stride) in enumerate(sizes):
        layers += [Conv(f"conv_{i}" if i else "stem", width, outputs, 3, stride), Norm(f"norm_{i}", outputs), RELU]
        width = outputs
    return tuple(layers), width


def _vgg16() -> tuple[Chain, int]:
    layers: list[Layer] = []
    width = CHANNELS
    for i, widths in enumerate(_VGG16):
        for j, outputs in enumerate(widths):
            name = f"conv_{i}_{j}" if i or j else "stem"
            layers += [Conv(name, width, outputs, 3, 1), Norm(f"norm_{i}_{j}", outputs)]
            layers += [MAX_POOL, RELU] if j + 1 == len(widths) else [RELU]  # pooling first, as in ours
            width = outputs
    return tuple(layers), width


def _resnet18() -> tuple[Chain, int]:
    width = _RESNET18[0]
    layers: list[Layer] = [Conv("stem", CHANNELS, width, 3, 1), Norm("norm_stem", width), RELU]
    for stage, outputs in enumerate(_RESNET18):
        for block in range(2):
            name, stride = f"block_{stage}_{block}", 2 if stage and not block else 1
            main = (
                Conv(f"{name}/conv_0", width, outputs, 3, stride), Norm(f"{name}/norm_0", outputs), RELU,
                Conv(f"{name}/conv_1", outputs, outputs, 3, 1), Norm(f"{name}/norm_1", outputs),
            )  # fmt: skip
            skip = (Conv(f"{name}/conv_skip", width, outputs, 1, stride), Norm(f"{name}/norm_skip", outputs))
            layers += [Sum(main, skip if (width, stride) != (outputs, 1) else ()), RELU]
            width = outputs
    return tuple(layers), width


def _wide_resnet(depth: int, widening: int) -> tuple[Chain, int]:
    width = 16
    layers: list[Layer] = [Conv("stem", CHANNELS, width, 3, 1)]
    for stage, base in enumerate((16, 32, 64)):
        outputs = base * widening
        for block in range((depth - 4) // 6):
            name, stride = f"block_{stage}_{block}", 2 if stage and not block else 1
            first: Chain = (Norm(f"{name}/norm_0", width), RELU)
            main = (
                Conv(f"{name}/conv_0", width, outputs, 3, stride), Norm(f"{name}/norm_1", outputs), RELU,
                Conv(f"{name}/conv_1", outputs, outputs, 3, 1),
            )  # fmt: skip
            if (width, stride) == (outputs, 1):
                layers += [Sum(first + main, ())]
            else:  # the projection reads what is normalized
                layers += [*first, Sum(main, (Conv(f"{name}/conv_skip", width, outputs, 1, stride),))]
            width = outputs
    return (*layers, Norm("norm", width), RELU), width
