"""Training-step time of DSB against the dense model, measured in turns within one run, and layer by layer.

    python -m experiments.benchmark_training --model=vgg16 --sparsities=0.8,0.9 --block_shapes=auto,32x8 --json=FILE

The step is the whole of it: forward, backward, SGD with momentum and weight decay. Layer-wise times are forward and
backward of one layer at the input it meets in the model, dense (XLA's convolution) against what "auto" chose.
"""

import statistics
from typing import Any

from absl import flags
from rich.table import Table

from dsb_jax.block_shapes import shape_text
from dsb_jax.ops import IMPLEMENTATIONS
from dsb_jax.plan import DISTRIBUTIONS
from dsb_jax.training.config import Config
from experiments import program, timing
from experiments.flags import parse_block_shape_or_auto
from experiments.training_times import LayerTime, sparse_configs, stepper, time_layers

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("model", "vgg16", "convnet, resnet18, vgg16, or wrn-DEPTH-WIDTH.")
    flags.DEFINE_list("sparsities", ["0.5", "0.8", "0.9", "0.95"], "Sparsities over the sparse layers.")
    flags.DEFINE_list("block_shapes", ["auto"], "Rows x columns of a block: auto (by layer), 16x16, 32x8, ...")
    flags.DEFINE_list("distributions", ["uniform", "erk"], "Densities over the layers: uniform, erk.")
    flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    flags.DEFINE_integer("image_size", 32, "Height and width of the images.")
    flags.DEFINE_integer("rounds", 7, "Turns; each times every candidate once.")
    flags.DEFINE_enum("implementation", "auto", IMPLEMENTATIONS, "Of the sparse products.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the computation.")
    flags.DEFINE_bool("layers", True, "Time each layer, too (of the first distribution).")
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
    console = program.console()
    path = timing.results_path(FLAGS.json)
    for name in FLAGS.distributions:
        if name not in DISTRIBUTIONS:
            raise ValueError(f"distributions: {name!r} is unknown; choose of {', '.join(DISTRIBUTIONS)}.")
    dense = Config(
        dataset="random", input_shape=(FLAGS.image_size, FLAGS.image_size, 3), model=FLAGS.model, method="dense",
        batch_size=FLAGS.batch_size, dtype=FLAGS.dtype, implementation=FLAGS.implementation,
    )  # fmt: skip
    shapes = [parse_block_shape_or_auto(text) for text in FLAGS.block_shapes]
    results: list[dict[str, Any]] = []
    for distribution in FLAGS.distributions:
        configs = sparse_configs(dense, FLAGS.sparsities, shapes, distribution)
        console.print(f"{FLAGS.model}, {distribution}: compiling {len(configs) + 1} training steps ...")
        times = timing.in_turns({"dense": stepper(dense)} | {n: stepper(r) for n, r in configs.items()}, FLAGS.rounds)
        timed_layers = FLAGS.layers and distribution == FLAGS.distributions[0]
        layers = time_layers(configs, FLAGS.rounds) if timed_layers else {}
        for name, config in configs.items():
            results.append(
                {
                    "model": FLAGS.model,
                    "sparsity": config.sparsity,
                    "block_shape": shape_text(config.block_shape),
                    "distribution": distribution,
                    "dense_step_s": statistics.median(times["dense"]),
                    "sparse_step_s": statistics.median(times[name]),
                    "speedup": timing.median_ratio(times["dense"], times[name]),
                    "layers": [layer_row(layer) for layer in layers.get(name, [])],
                }
            )
        console.print(step_table([r for r in results if r["distribution"] == distribution]))
    for result in results:
        if result["layers"]:
            console.print(layer_table(result))
    if path is not None:
        settings = {name: FLAGS[name].value for name in ("batch_size", "dtype", "rounds")}
        timing.write_results(path, settings, results)


def step_table(results: list[dict[str, Any]]) -> Table:
    """One row for each sparsity."""
    table = Table(title=f"{results[0]['model']}, {results[0]['distribution']}")
    for name in ("sparsity", "blocks", "dense step", "sparse step", "speed-up"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            f"{r['sparsity']:g}", r["block_shape"], f"{r['dense_step_s'] * 1e3:.0f} ms",
            f"{r['sparse_step_s'] * 1e3:.0f} ms", f"{r['speedup']:.2f}x",
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
            f"{r['dense_s'] * 1e3:.1f} ms", f"{r['sparse_s'] * 1e3:.1f} ms", f"{r['speedup']:.2f}x",
            r["implementation"],
        )  # fmt: skip
    return table


if __name__ == "__main__":
    define_flags()
    program.start(main)
