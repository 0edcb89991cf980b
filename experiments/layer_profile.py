"""Where the time of dense training goes by layer, and what sparse layers make of it: the paper's A.1, and measured.

    python -m experiments.layer_profile --models=wrn-22-2,resnet18,vgg16 --sparsities=0.5,0.8,0.9,0.95 --json=FILE

The paper (appendix A.1, figures 12 and 13) does not time sparse training: it takes the layer-wise times of dense
training and replaces those of convolutions and linear layers by the times of their sparse operations,

    estimated_step_s = dense_step_s - sum of dense_s + sum of sparse_s        over the layers that are replaced.

So does this program, and beside the estimate it says what the training step with these layers takes in fact
(`measured_step_s`). The two differ by what a layer does to its neighbours: fusion, memory that is found warm or cold,
the order of activations.

Deviations from the paper: a layer's time is that of its forward and backward pass alone (the first without the gradient
of the images) where the paper has a profiler's record of the whole step, so `layer_share`, the time of all convolutions
and linear layers over that of the dense step, can exceed 1 for tiny models, of which calls are most of the time. Layers
that the plan keeps dense are not replaced. The step includes the optimizer. No image is loaded or augmented.

Dense is XLA's, in the estimate and in both speed-ups. Beside them stands the whole step of the same dense model in
PyTorch, as in `experiments.benchmark_training`, which tells of `--peer_python` and `--cores`.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from dsb_jax.block_shapes import AUTO, shape_text
from dsb_jax.ops import IMPLEMENTATIONS
from dsb_jax.plan import DISTRIBUTIONS
from dsb_jax.training.build import build
from dsb_jax.training.config import DTYPES, Config
from experiments import cores, program, timing, torch_process
from experiments.flags import parse_block_shape_or_auto
from experiments.torch_process import TorchProcess
from experiments.training_times import DENSE, LayerTime, beside_torch, sparse_configs, time_layers, time_steps

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_list("models", ["wrn-22-2", "resnet18", "vgg16"], "Of convnet, resnet18, vgg16, wrn-DEPTH-WIDTH.")
    flags.DEFINE_list("sparsities", ["0.5", "0.8", "0.9", "0.95"], "Sparsities over the sparse layers.")
    flags.DEFINE_enum("distribution", "uniform", sorted(DISTRIBUTIONS), "Densities over the layers.")
    flags.DEFINE_string("block_shape", AUTO, "Rows x columns of a block: auto (by layer), 16x16, 32x8, ...")
    flags.DEFINE_integer("batch_size", 128, "Images in a step.", lower_bound=1)
    flags.DEFINE_integer("image_size", 32, "Height and width of the images.", lower_bound=1)
    flags.DEFINE_integer("num_classes", 10, "Of the classifier: 100 for CIFAR-100.", lower_bound=2)
    flags.DEFINE_integer("rounds", 7, "Turns; each times every candidate once.", lower_bound=1)
    flags.DEFINE_enum("implementation", "auto", IMPLEMENTATIONS, "Of the sparse products.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the computation.")
    flags.DEFINE_bool("all_layers", False, "Print the layers of every sparsity, not only of the highest.")
    flags.DEFINE_integer("cores", None, "Of this process and of PyTorch's; by default all that they may run on.")
    flags.DEFINE_string("peer_python", "", "Python that has PyTorch; by default this one, if it has. none: without.")
    flags.DEFINE_string("json", None, "Write the results to this file.")


def estimate(dense_step_s: float, layers: Sequence[LayerTime]) -> dict[str, float | None]:
    """The paper's arithmetic.

    Args:
      dense_step_s: seconds of the whole dense training step.
      layers: all linear layers and convolutions of the model; those without a sparse time are not replaced.

    Returns:
      `estimated_step_s`; `estimated_speedup`, dense over estimated, None if the estimate is not positive (layers that
      take longer alone than the step around them); `layer_share`, the layers' part of the dense step.
    """
    replaced = [layer for layer in layers if layer.sparse_s is not None]
    saved = math.fsum(layer.dense_s - (layer.sparse_s or 0.0) for layer in replaced)
    estimated = dense_step_s - saved
    return {
        "estimated_step_s": estimated,
        "estimated_speedup": dense_step_s / estimated if estimated > 0 else None,
        "layer_share": math.fsum(layer.dense_s for layer in layers) / dense_step_s,
    }


def layer_row(layer: LayerTime) -> dict[str, Any]:
    """One layer in the results; `sparse_s` and `speedup` are null if it stays dense."""
    return {
        "path": "/".join(layer.path), "shape": list(layer.shape), "input": list(layer.input_shape),
        **layer.blocks, "dense_s": layer.dense_s, "sparse_s": layer.sparse_s,
        "implementation": layer.implementation, "speedup": layer.speedup,
    }  # fmt: skip


def profile(
    dense: Config, sparsities: Sequence[str], distribution: str, rounds: int, torch: TorchProcess | None = None
) -> list[dict[str, Any]]:
    """Measures one model: an object for each sparsity.

    Args:
      dense: the config of the dense model.
      sparsities: as text.
      distribution: of the densities over the layers.
      rounds: turns of the whole steps, and of each layer.
      torch: whose steps take turns with ours.

    Raises:
      ValueError: if a config cannot be.
    """
    configs = sparse_configs(dense, sparsities, [dense.block_shape], distribution)
    steps = time_steps(dense, configs, rounds, torch)
    layers = time_layers(configs, rounds, dense_layers=True)
    dense_step_s = statistics.median(steps[DENSE])
    return [
        {
            "model": dense.model,
            "sparsity": config.sparsity,
            "block_shape": shape_text(config.block_shape),
            "distribution": distribution,
            "dense_step_s": dense_step_s,
            **estimate(dense_step_s, layers[name]),
            "measured_step_s": statistics.median(steps[name]),
            "measured_speedup": timing.median_ratio(steps[DENSE], steps[name]),
            **beside_torch(steps, name),
            "layers": [layer_row(layer) for layer in layers[name]],
        }
        for name, config in configs.items()
    ]


def main() -> None:
    """Flags -> library calls."""
    used_cores = cores.use(FLAGS.cores)
    console = program.console()
    path = timing.results_path(FLAGS.json)
    bases = [
        Config(
            dataset="random", input_shape=(FLAGS.image_size, FLAGS.image_size, 3), model=model, method="dense",
            num_classes=FLAGS.num_classes, block_shape=parse_block_shape_or_auto(FLAGS.block_shape),
            batch_size=FLAGS.batch_size, dtype=FLAGS.dtype, implementation=FLAGS.implementation,
        )
        for model in FLAGS.models
    ]  # fmt: skip
    for base in bases:  # what cannot be is refused before the first measurement, which takes minutes
        for config in sparse_configs(base, FLAGS.sparsities, [base.block_shape], FLAGS.distribution).values():
            build(config)
    results: list[dict[str, Any]] = []
    names = ("batch_size", "image_size", "num_classes", "dtype", "implementation", "rounds")
    settings = {name: FLAGS[name].value for name in names} | {"cores": used_cores}
    versions: dict[str, str] = {}
    python = torch_process.find_python(FLAGS.peer_python, console)
    for base in bases:
        console.print(f"{base.model}: {len(FLAGS.sparsities) + 1} training steps, then layer by layer ...")
        with torch_process.running(python, base, used_cores) as torch:
            if torch is not None:
                versions["torch"] = torch.version
            rows = profile(base, FLAGS.sparsities, FLAGS.distribution, FLAGS.rounds, torch)
        results += rows
        show(console, rows, all_layers=FLAGS.all_layers)
        if path is not None:
            timing.write_results(path, settings, results, **versions)  # now, in case that the next is interrupted


def show(console: Console, rows: list[dict[str, Any]], *, all_layers: bool) -> None:
    """The tables of one model: steps, and the layers at the highest sparsity, or at all."""
    console.print(step_table(rows))
    highest = max(rows, key=lambda row: row["sparsity"])
    for row in rows if all_layers else [highest]:
        console.print(layer_table(row))


def step_table(rows: list[dict[str, Any]]) -> Table:
    """One row for each sparsity of a model."""
    first = rows[0]
    torch = "" if first["torch_step_s"] is None else f"; PyTorch {timing.milliseconds(first['torch_step_s'])}"
    step = timing.milliseconds(first["dense_step_s"])
    table = Table(
        title=f"{first['model']}, blocks of {first['block_shape']}, {first['distribution']}: dense step {step}, "
        f"{first['layer_share']:.0%} of it convolutions and linear layers{torch}"
    )
    columns = ("estimated step", "estimated speed-up", "measured step", "measured speed-up", "over fastest")
    for name in ("sparsity", *columns):
        table.add_column(name, justify="right")
    for row in rows:
        over = row["speedup_over_fastest"]
        table.add_row(
            f"{row['sparsity']:g}", *_time_and_ratio(row["estimated_step_s"], row["estimated_speedup"]),
            *_time_and_ratio(row["measured_step_s"], row["measured_speedup"]), "-" if over is None else f"{over:.2f}x",
        )  # fmt: skip
    return table


def layer_table(row: dict[str, Any]) -> Table:
    """One row for each layer of a model at one sparsity."""
    table = Table(title=f"{row['model']}, sparsity {row['sparsity']:g}: forward and backward of each layer alone")
    for name in ("layer", "out x in", "input", "blocks", "dense", "of the step", "sparse", "speed-up", "chosen"):
        table.add_column(name, justify="left" if name in ("layer", "chosen") else "right")
    for layer in row["layers"]:
        stays = layer["sparse_s"] is None
        table.add_row(
            layer["path"], "x".join(map(str, layer["shape"])), "x".join(map(str, layer["input"])),
            "-" if stays else f"{layer['num_blocks']} of {shape_text(layer['block_shape'])}",
            timing.milliseconds(layer["dense_s"]), f"{layer['dense_s'] / row['dense_step_s']:.1%}",
            *_time_and_ratio(layer["sparse_s"], layer["speedup"]),
            "stays dense" if stays else layer["implementation"],
        )  # fmt: skip
    return table


def _time_and_ratio(seconds: float | None, ratio: float | None) -> tuple[str, str]:
    return timing.milliseconds(seconds), "-" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    define_flags()
    program.start(main)
