"""What `experiments.gpu_check` runs, by value: on a GPU, and in a rehearsal on a CPU with tiny sizes.

A rehearsal has the same parts under the same names, and one more, which hangs and is stopped.
"""

import importlib.util
import os
from pathlib import Path

from experiments.gpu_check_pytest import VARIABLE
from experiments.gpu_check_run import ROOT, Part
from experiments.gpu_predictions import CONV_US, GEMM

TEST_PROCESSES = min(8, (os.cpu_count() or 2) // 2)  # tests compile much and compute little
BLOCK_SHAPES = ("64x4", "32x8", "16x16")
TRAINED = (("resnet18", "64x4"), ("resnet18", "16x16"), ("vgg16", "64x4"))
HALF = ("resnet18", "64x4")  # what is trained at sparsity 0.5, too
HANGS = "import time; open('{lines}', 'w').write('{\"line\": 1}\\n{\"li'); print('at it', flush=True); time.sleep(999)"


def rows_of(block_shape: str) -> int:
    """'64x4' -> 64."""
    return int(block_shape.split("x")[0])


def tests_with_gpu_marks() -> list[str]:
    """Files of tests that need a GPU; the others are not even imported."""
    found = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in found if path.name != "test_gpu_check.py"]


def tests_part(budget_s: float) -> Part:
    """The GPU tests of Pallas; a line a test. What pyproject.toml passes to pytest may need what is not installed."""
    arguments = ["-m", "pytest", "-o", "addopts=--strict-markers", "-v", "-p", "no:cacheprovider"]
    arguments += ["-p", "experiments.gpu_check_pytest", "-m", "gpu", "-k", "pallas", "--maxfail=20"]
    if importlib.util.find_spec("xdist") is not None and TEST_PROCESSES > 1:
        arguments += ["-n", str(TEST_PROCESSES)]
    # Several tests share the GPU's memory: none may take it all.
    variables = {VARIABLE: "{lines}", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Part("tests", (*arguments, *tests_with_gpu_marks()), budget_s, variables)


def smoke_parts(budget_s: float, rehearse: bool) -> list[Part]:
    """The smoke, and what is kept of a kernel that it finds wrong."""
    flags = ("--rehearse",) if rehearse else ()
    small = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    diagnosis = ("-m", "experiments.gpu_diagnosis", "--cases={failed}", "--ptx={ptx}", "--log={sanitizer}")
    return [
        Part("smoke", ("-m", "experiments.gpu_smoke", "--lines={lines}", *flags), budget_s, small,
             expected="failed" if rehearse else "done"),
        Part("diagnosis", (*diagnosis, "--lines={lines}", *flags), 75, small, strict=True),
    ]  # fmt: skip


def measured_parts() -> list[Part]:
    """What runs on a GPU, in this order."""

    def kernels(*arguments: str) -> tuple[str, ...]:
        return ("-m", "experiments.benchmark_kernels", "--sparsities=0.9", "--dtype=bfloat16", "--rounds=5", *arguments)

    def training(model: str, block_shape: str, sparsity: str) -> tuple[str, ...]:
        return (
            "-m", "experiments.benchmark_training", f"--model={model}", f"--sparsities={sparsity}",
            f"--block_shape={block_shape}", "--batch_size=512", "--dtype=bfloat16", "--distributions=uniform",
            "--rounds=5", "--nolayers", "--implementation={implementation}", "--json={file}",
        )  # fmt: skip

    # jax-triton is seldom there; without it nothing is gained by asking for its kernels.
    sparse = "pallas,triton" if importlib.util.find_spec("jax_triton") is not None else "pallas"
    gemm = (f"--shapes={GEMM}", f"--implementations={sparse},dense_fallback", "--nopeers", "--json={file}")
    tune = (
        "-m", "experiments.tune", f"--shapes={GEMM}", "--models=resnet18", "--sparsities=0.9",
        "--block_shapes=64x4,16x16", "--batch_size=512", "--dtype=bfloat16", "--tiles=once", "--rounds=3",
        "--limit_s=35", "--table={tuned}",
    )  # fmt: skip
    tuned = {"DSB_JAX_TUNED": "{tuned}"}
    adaptation = (
        "-m", "experiments.benchmark_adaptation", "--models=resnet18", "--block_shape=64x4", "--grow=norm",
        "--granularities=block", "--batch_size=512", "--rounds=3", "--json={file}",
    )  # fmt: skip
    return [
        *smoke_parts(45, rehearse=False),
        *(Part(f"gemm {shape}", kernels(*gemm, f"--block_shapes={shape}"), 22) for shape in BLOCK_SHAPES),
        # The first compiles the dense step as well, which the second finds in the cache.
        *(Part(f"training {model} {shape}", training(model, shape, "0.9"), budget_s, rows=rows_of(shape))
          for (model, shape), budget_s in zip(TRAINED, (75, 45, 60), strict=True)),
        tests_part(60),
        Part("tune", tune, 40),
        *(Part(f"tuned gemm {shape}", kernels(*gemm, f"--block_shapes={shape}"), 15, tuned, needs="tuned")
          for shape in ("64x4", "16x16")),
        Part("conv", kernels(f"--shapes={','.join(CONV_US)}", "--block_shapes=64x4", "--nopeers", "--json={file}",
                             f"--implementations={sparse}"), 25),
        Part("training {} {} 0.5".format(*HALF), training(*HALF, "0.5"), 25, rows=rows_of(HALF[1])),
        Part("adaptation", adaptation, 20),
        Part("peers", kernels(f"--shapes={GEMM}", "--implementations=pallas", "--block_shapes=16x16,64x64", "--peers",
                              "--json={file}"), 18),
    ]  # fmt: skip


def rehearsed_parts() -> list[Part]:
    """The same parts on a CPU: Pallas' interpreter in the place of the device, sizes as small as they may be.

    Blocks are larger than the names of the parts say where that compiles faster.
    """

    def kernels(shape: str, block_shape: str, implementations: str, *arguments: str) -> tuple[str, ...]:
        return (
            "-m", "experiments.benchmark_kernels", f"--shapes={shape}", f"--block_shapes={block_shape}",
            f"--implementations={implementations}", "--sparsities=0.5", "--dtype=float32", "--rounds=1", *arguments,
            "--json={file}",
        )  # fmt: skip

    def training(sparsity: str) -> tuple[str, ...]:
        return (
            "-m", "experiments.benchmark_training", "--model=convnet", f"--sparsities={sparsity}",
            "--block_shape=128x96", "--batch_size=4", "--image_size=8", "--distributions=uniform",
            "--rounds=1", "--nolayers", "--implementation={implementation}", "--json={file}",
        )  # fmt: skip

    tune = (
        "-m", "experiments.tune", "--shapes=64x32x8", "--models=", "--sparsities=0.5", "--block_shapes=64x4",
        "--rounds=1", "--limit_s=35", "--table={tuned}",
    )  # fmt: skip
    tuned = {"DSB_JAX_TUNED": "{tuned}"}
    adaptation = (
        "-m", "experiments.benchmark_adaptation", "--models=", "--layer=32x8x1x1", "--block_shape=16x4",
        "--sparsity=0.5", "--grow=norm", "--granularities=block", "--batch_size=2", "--rounds=1", "--json={file}",
    )  # fmt: skip
    gemm = {"64x4": "pallas_interpreted", "32x8": "dense_fallback", "16x16": "dense_fallback"}
    return [
        *smoke_parts(40, rehearse=True),
        Part("stopped", ("-c", HANGS), 3, strict=True, expected="stopped"),
        *(Part(f"gemm {shape}", kernels("64x32x8", shape, gemm[shape], "--nopeers"), 20) for shape in BLOCK_SHAPES),
        *(Part(f"training {model} {shape}", training("0.9"), 30, rows=rows_of(shape)) for model, shape in TRAINED),
        tests_part(30),
        Part("tune", tune, 20),
        *(Part(f"tuned gemm {shape}", kernels("64x32x8", shape, gemm[shape], "--nopeers"), 20, tuned, needs="tuned")
          for shape in ("64x4", "16x16")),
        Part("conv", kernels("64x16x1x1@2x2x4", "64x4", "dense_fallback", "--nopeers"), 20),
        Part("training {} {} 0.5".format(*HALF), training("0.5"), 30, rows=rows_of(HALF[1])),
        Part("adaptation", adaptation, 20),
        Part("peers", kernels("64x32x8", "16x16", "dense_fallback", "--peers"), 20),
    ]  # fmt: skip


def select(parts: list[Part], wanted: list[str] | None) -> list[Part]:
    """The parts of these names, or whose names begin with one of them and a space; all of them for None.

    Raises:
      ValueError: for a name of no part.
    """
    if wanted is None:
        return parts
    chosen: dict[str, None] = {}
    for name in wanted:
        found = [part.name for part in parts if part.name == name or part.name.startswith(f"{name} ")]
        if not found:
            first_words = dict.fromkeys(part.name.split()[0] for part in parts)
            raise ValueError(f"parts: {name!r} is unknown; choose of {', '.join(first_words)}.")
        chosen |= dict.fromkeys(found)
    return [part for part in parts if part.name in chosen]


def write_stand_in(folder: Path) -> None:
    """A program of the sanitizer's name, for rehearsals: it passes over the flags and runs the rest."""
    tool = folder / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n"$@"\n'
        'echo "========= ERROR SUMMARY: 0 errors (a stand-in)"\n'
    )
    tool.chmod(0o755)
