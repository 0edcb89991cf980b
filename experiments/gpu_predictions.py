"""What a model predicts for the numbers that `experiments.gpu_check` measures. Nothing here was timed on a GPU.

The model is arithmetic over what the compiled kernels do: bytes through the L2 cache and device memory, instructions of
the tensor cores, launches. `ASSUMPTIONS` lists its rates. docs/gpu.md says what each number means.
"""

import dataclasses
import re

PASSES = ("forward", "input_gradient", "weight_gradient")
ASSUMPTIONS = {
    "dense matrix product": "790 TFLOP/s in bfloat16",
    "dense convolution": "500 TFLOP/s in bfloat16; every ratio of a convolution hangs on it: at 350 all rise 1.4 times",
    "L2 cache": "5.5 TB/s",
    "device memory": "4.3 TB/s on an H200, 3.0 TB/s on an H100",
    "mma.sync": "0.62 of the tensor cores' peak; wgmma reaches the peak",
    "reached": "85 % of each bound",
    "launch": "2 us a kernel",
    "elementwise": "nine passes over the output of each convolution in a training step",
}

# A product of 4096 x 4096 x 4096 at sparsity 0.9 in bfloat16 on an H200.
GEMM = "4096x4096x4096"
GEMM_DENSE_US = 174.0
# Block shape -> microseconds of each pass. The input gradient is the sparse kernel alone, without a sort of the index;
# the weight gradient is that of a program with 128 columns (with 32: 277, 185, 139).
GEMM_US = {"16x16": (210, 488, 212), "32x8": (117, 253, 121), "64x4": (70, 136, 75)}
# What "auto" would take at 16x16: unpack, then the dense product.
UNPACK_THEN_DENSE_US = 185.0

# Convolutions 3x3 of ResNet-18 at sparsity 0.9 in bfloat16, batch 512, on an H200: layer -> R -> us of each pass.
CONV_DENSE_US = 93.0  # 47 where the stride is 2
CONV_US = {
    "64x64x3x3@32x32x512": {16: (59, 97, 67), 32: (39, 97, 41), 64: (39, 73, 37)},
    "128x128x3x3@16x16x512": {16: (61, 97, 61), 32: (35, 89, 35), 64: (22, 56, 22)},
    "256x256x3x3@8x8x512": {16: (60, 98, 67), 32: (34, 79, 38), 64: (21, 46, 24)},
    "512x512x3x3@4x4x512": {16: (60, 99, 67), 32: (34, 75, 38), 64: (21, 42, 24)},
}

# Whole training steps at sparsity 0.9, batch 512, bfloat16, speed-up over dense, each pass by its faster product.
STEP_SPEEDUPS = {
    ("H200", "resnet18"): {"16x16": 1.16, "32x8": 1.40, "64x4": 1.69},
    ("H200", "vgg16"): {"16x16": 1.15, "32x8": 1.44, "64x4": 1.81},
    ("H200", "wrn-22-2"): {"16x16": 1.05, "32x8": 1.13, "64x4": 1.18},
    ("H100", "resnet18"): {"16x16": 1.14, "32x8": 1.27, "64x4": 1.41},
    ("H100", "vgg16"): {"16x16": 1.14, "32x8": 1.31, "64x4": 1.54},
    ("H100", "wrn-22-2"): {"16x16": 1.04, "32x8": 1.07, "64x4": 1.09},
}
DENSE_STEP_MS = {("H200", "resnet18"): 5.9}  # 1.7 of them elementwise operations and batch norm


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A number to hold a measurement against.

    Attributes:
      name: what is measured.
      part: the part of gpu_check that measures it.
      block_shape: such as "64x4".
      layer: the layer, or None for a training step.
      pass_name: one of `PASSES`, "forward_backward" for their sum, or None for a training step.
      us: microseconds of the sparse pass, or None for a training step.
      speedup: over dense.
    """

    name: str
    part: str
    block_shape: str
    layer: str | None
    pass_name: str | None
    us: float | None
    speedup: float


def gpu_of(device: str) -> str:
    """The GPU whose predictions serve a device: "H100" for an H100, else "H200"."""
    return "H100" if re.search(r"\bH100\b", device) else "H200"


def predictions(device: str) -> list[Prediction]:
    """All predictions that parts of gpu_check measure. Those of kernels are for an H200, whatever the device."""
    found = [
        each
        for block_shape, times in GEMM_US.items()
        for each in _kernel(
            f"GEMM 4096^3, {block_shape}", f"gemm {block_shape}", block_shape, GEMM, times, GEMM_DENSE_US
        )
    ]
    for model, block_shape in (("resnet18", "64x4"), ("resnet18", "16x16"), ("vgg16", "64x4")):
        speedup = STEP_SPEEDUPS[gpu_of(device), model][block_shape]
        part = f"training {model} {block_shape}"
        found.append(Prediction(f"training step, {model}, {block_shape}", part, block_shape, None, None, None, speedup))
    for layer, by_rows in CONV_US.items():
        found += _kernel(f"{layer}, 64x4", "conv", "64x4", layer, by_rows[64], CONV_DENSE_US)
    return found


def _kernel(
    name: str, part: str, block_shape: str, layer: str, times: tuple[float, ...], dense_us: float
) -> list[Prediction]:
    """One prediction for each pass, one for their sum."""
    each = {**dict(zip(PASSES, times, strict=True)), "forward_backward": sum(times)}
    dense = dict.fromkeys(PASSES, dense_us) | {"forward_backward": len(PASSES) * dense_us}
    return [
        Prediction(f"{name}, {pass_name}", part, block_shape, layer, pass_name, us, dense[pass_name] / us)
        for pass_name, us in each.items()
    ]
