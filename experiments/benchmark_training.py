"""Training-step time of DSB against the dense model, measured in turns within one run, and layer by layer.

    python -m experiments.benchmark_training --model=vgg16 --sparsities=0.8,0.9 --block_shapes=auto,32x8 --json=FILE
    python -m experiments.benchmark_training --model=transformer-7-128 --batch_size=8 --text_length=72

The step is the whole of it: forward, backward, SGD with momentum and weight decay. Layer-wise times are forward and
backward of one layer at the input it meets in the model, dense (XLA's convolution) against what "auto" chose.

On a CPU, XLA's dense step is no measure: PyTorch's can be twice as fast (ResNet-18, VGG-16). So the same model in
PyTorch takes its turns too, in a process of its own (`experiments.torch_process`): that of this Python if PyTorch is
installed (`pip install 'dsb-jax[peers]'`), or of any other, `--peer_python=PATH`. Where no PyTorch comes for this
version of Python, take another: `python3.11 -m venv DIR; DIR/bin/pip install torch numpy`, and DIR/bin/python.
"speed-up" is over XLA's dense step, "over fastest" over the faster of the two in each round.
`--cores=1` keeps all of it on one core; a run has one number of cores. The transformer is not written for PyTorch.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from rich.table import Table

from dsb_jax.block_shapes import shape_text
from dsb_jax.ops import IMPLEMENTATIONS
from dsb_jax.plan import DISTRIBUTIONS
from dsb_jax.training import models
from dsb_jax.training.build import build
from dsb_jax.training.config import Config
from experiments import cores, program, timing, torch_process
from experiments.flags import parse_block_shape_or_auto
from experiments.training_times import DENSE, LayerTime, beside_torch, sparse_configs, time_layers, time_steps

FLAGS = flags.FLAGS
VOCABULARY = 97  # characters of Python's sources, our text


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("model", "vgg16", "convnet, resnet18, vgg16, wrn-DEPTH-WIDTH, or transformer-DEPTH-WIDTH.")
    flags.DEFINE_list("sparsities", ["0.5", "0.8", "0.9", "0.95"], "Sparsities over the sparse layers.")
    flags.DEFINE_list("block_shapes", ["auto"], "Rows x columns of a block: auto (by layer), 16x16, 32x8, ...")
    flags.DEFINE_list("distributions", ["uniform", "erk"], "Densities over the layers: uniform, erk.")
    flags.DEFINE_integer("batch_size", 128, "Images or texts in a step.")
    flags.DEFINE_integer("image_size", 32, "Height and width of the images.")
    flags.DEFINE_integer("text_length", 128, "Tokens of a text.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Turns; each times every candidate once.", lower_bound=1)
    flags.DEFINE_enum("implementation", "auto", IMPLEMENTATIONS, "Of the sparse products.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the computation.")
    flags.DEFINE_bool("layers", True, "Time each layer, too (of the first distribution).")
    flags.DEFINE_integer("cores", None, "Of this process and of PyTorch's; by default all that they may run on.")
    flags.DEFINE_string("peer_python", "", "Python that has PyTorch; by default this one, if it has. none: without.")
    flags.DEFINE_string("json", None, "Write the results to this file.")


def layer_row(layer: LayerTime) -> dict[str, Any]:
    """One layer in the results."""
    return {
        "layer": "/".join(layer.path), "out": layer.shape[0], "in": layer.shape[1], "input": list(layer.input_shape),
        **layer.blocks, "dense_s": layer.dense_s, "sparse_s": layer.sparse_s, "speedup": layer.speedup,
        "implementation": layer.implementation,
    }  # fmt: skip


def main() -> None:
    """Flags -> library calls."""
    used_cores = cores.use(FLAGS.cores)
    console = program.console()
    path = timing.results_path(FLAGS.json)
    for name in FLAGS.distributions:
        if name not in DISTRIBUTIONS:
            raise ValueError(f"distributions: {name!r} is unknown; choose of {', '.join(DISTRIBUTIONS)}.")
    is_text = models.takes_text(FLAGS.model)
    dense = Config(
        dataset="random", input_shape=(FLAGS.text_length,) if is_text else (FLAGS.image_size, FLAGS.image_size, 3),
        num_classes=VOCABULARY if is_text else 10, model=FLAGS.model, method="dense",
        batch_size=FLAGS.batch_size, dtype=FLAGS.dtype, implementation=FLAGS.implementation,
    )  # fmt: skip
    shapes = [parse_block_shape_or_auto(text) for text in FLAGS.block_shapes]
    grid = {name: sparse_configs(dense, FLAGS.sparsities, shapes, name) for name in FLAGS.distributions}
    for config in (dense, *(config for configs in grid.values() for config in configs.values())):
        build(config)  # what cannot be is refused before anything is started or compiled
    results: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    unwritten = "PyTorch has no transformer here, only the models of images" if is_text else None
    python = torch_process.find_python(FLAGS.peer_python, console, unwritten)
    with torch_process.running(python, dense, used_cores) as torch:
        if torch is not None:
            versions["torch"] = torch.version
        for distribution, configs in grid.items():
            console.print(f"{FLAGS.model}, {distribution}: compiling {len(configs) + 1} training steps ...")
            times = time_steps(dense, configs, FLAGS.rounds, torch)
            timed_layers = FLAGS.layers and distribution == FLAGS.distributions[0]
            layers = time_layers(configs, FLAGS.rounds) if timed_layers else {}
            rows = [result_row(config, times, name, layers.get(name, [])) for name, config in configs.items()]
            console.print(step_table(rows))
            results += rows
    for result in results:
        if result["layers"]:
            console.print(layer_table(result))
    if path is not None:
        settings = {name: FLAGS[name].value for name in ("batch_size", "dtype", "rounds")}
        timing.write_results(path, settings | {"cores": used_cores}, results, **versions)


def result_row(
    config: Config, times: Mapping[str, list[float]], name: str, layers: Sequence[LayerTime]
) -> dict[str, Any]:
    """One config in the results, by its name in the times of the steps; those of PyTorch are null without it."""
    return {
        "model": config.model,
        "sparsity": config.sparsity,
        "block_shape": shape_text(config.block_shape),
        "distribution": config.distribution,
        "dense_step_s": statistics.median(times[DENSE]),
        "sparse_step_s": statistics.median(times[name]),
        "speedup": timing.median_ratio(times[DENSE], times[name]),
        **beside_torch(times, name),
        "layers": [layer_row(layer) for layer in layers],
    }


def step_table(results: list[dict[str, Any]]) -> Table:
    """One row for each sparsity."""
    table = Table(title=f"{results[0]['model']}, {results[0]['distribution']}")
    for name in ("sparsity", "blocks", "dense step", "PyTorch step", "sparse step", "speed-up", "over fastest"):
        table.add_column(name, justify="right")
    for r in results:
        over = r["speedup_over_fastest"]
        table.add_row(
            f"{r['sparsity']:g}", r["block_shape"], timing.milliseconds(r["dense_step_s"]),
            timing.milliseconds(r["torch_step_s"]), timing.milliseconds(r["sparse_step_s"]),
            f"{r['speedup']:.2f}x", "-" if over is None else f"{over:.2f}x",
        )  # fmt: skip
    return table


def layer_table(result: dict[str, Any]) -> Table:
    """One row for each layer of one result."""
    table = Table(
        title=f"{result['model']}, {result['distribution']}, sparsity {result['sparsity']:g}, blocks of "
        f"{result['block_shape']}: layers"
    )
    for name in ("layer", "out x in", "input", "blocks", "dense", "sparse", "speed-up", "chosen"):
        table.add_column(name, justify="left" if name in ("layer", "chosen") else "right")
    for r in result["layers"]:
        table.add_row(
            r["layer"], f"{r['out']} x {r['in']}", "x".join(map(str, r["input"])),
            f"{r['num_blocks']} of {shape_text(r['block_shape'])}",
            timing.milliseconds(r["dense_s"]), timing.milliseconds(r["sparse_s"]), f"{r['speedup']:.2f}x",
            r["implementation"],
        )  # fmt: skip
    return table


if __name__ == "__main__":
    define_flags()
    program.start(main)
