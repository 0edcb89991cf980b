"""The training step of a dense model in PyTorch, made and timed at another program's word; see `torch_process`.

    PYTHON -m experiments.torch_peer --model=resnet18 --batch_size=128 --image_size=32 --num_classes=10 ...

As a user of PyTorch on a CPU would have it: eager modules, oneDNN's convolutions, images and weights channels last,
`torch.optim.SGD`. Its first line of output is {"torch": VERSION, "threads": N, "parameters": N}; then, for each line
"step" of its input, {"seconds": S} of one step, before which one was made that is not timed, as in `timing.in_turns`.
It ends with its input. bfloat16 is autocast: parameters stay float32, as in ours.

The only file here that needs PyTorch. It may run in a Python of its own (3.10 or newer), so that nothing of jax or of
`dsb_jax` is imported; and in a process of its own, where OpenMP's threads and XLA's do not meet.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.torch_models import CHANNELS, MAX_POOL, MEAN, RELU, Chain, Conv, Layer, Linear, Norm, Sum, describe

DTYPES = ("float32", "bfloat16")


class Added(nn.Module):
    """The outputs of two chains, added in place: neither's last layer reads its output in the backward pass."""

    def __init__(self, main: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.main, self.skip = main, skip

    def forward(self, x: Any) -> Any:
        y = self.main(x)
        y += self.skip(x)
        return y


def module(layer: Layer) -> nn.Module:
    """One layer, with PyTorch's initial weights."""
    if isinstance(layer, Conv):
        return nn.Conv2d(
            layer.inputs, layer.outputs, layer.size, stride=layer.stride, padding=layer.size // 2, bias=False
        )
    if isinstance(layer, Norm):
        return nn.BatchNorm2d(layer.features, eps=1e-5, momentum=0.1)
    if isinstance(layer, Linear):
        return nn.Linear(layer.inputs, layer.outputs)
    if isinstance(layer, Sum):
        return Added(build(layer.main), build(layer.skip))
    return {
        RELU: lambda: nn.ReLU(inplace=True),
        MAX_POOL: lambda: nn.MaxPool2d(2),
        MEAN: lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    }[layer]()


def build(chain: Chain) -> nn.Sequential:
    """The modules of a chain; an empty one gives back what it is given."""
    return nn.Sequential(*map(module, chain))


def stepper(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    dtype: str,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Callable[[], Any]:
    """A call that makes one training step and returns its loss.

    Args:
      model: is put into training mode, channels last.
      images: [N, C, H, W].
      labels: int64[N].
      dtype: of the computation, one of `DTYPES`.
      learning_rate, momentum, weight_decay: of SGD; weight decay is L2 and reaches all parameters.
    """
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=momentum, weight_decay=weight_decay)

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def parse() -> argparse.Namespace:
    """The arguments; all are required, since the program that asks knows them."""
    parser = argparse.ArgumentParser(description="Times training steps of a dense model in PyTorch.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True, choices=DTYPES)
    for name in ("batch_size", "image_size", "num_classes", "threads"):
        parser.add_argument(f"--{name}", required=True, type=int)
    for name in ("learning_rate", "momentum", "weight_decay"):
        parser.add_argument(f"--{name}", required=True, type=float)
    return parser.parse_args()


def main() -> None:
    """Arguments -> a model, then a time for each word."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = build(describe(arguments.model, arguments.num_classes))
    images = torch.randn(arguments.batch_size, CHANNELS, arguments.image_size, arguments.image_size)
    labels = torch.randint(arguments.num_classes, (arguments.batch_size,))
    settings = {name: getattr(arguments, name) for name in ("dtype", "learning_rate", "momentum", "weight_decay")}
    step = stepper(model, images, labels, **settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first = {"torch": torch.__version__, "threads": torch.get_num_threads(), "parameters": parameters}
    print(json.dumps(first), file=answers)
    for line in sys.stdin:
        if line.strip() != "step":
            raise ValueError(f"{line.strip()!r} is no request; 'step' is the only one.")
        step()
        begin = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - begin}), file=answers)


if __name__ == "__main__":
    main()
