"""Time of an adaptation: of one layer alone, and of a whole model beside its training step.

    python -m experiments.benchmark_adaptation --json=FILE

`amortized_share` is the adaptation's time over that of `update_interval` training steps (of the layer alone: over its
forward and backward passes at `--batch_size`, at 4x4 positions as in ResNet-18). The authors' public code takes 41.7 s
for the re-blocking of the same layer on a CPU.
"""

import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.table import Table

from dsb_jax import methods
from dsb_jax.adapt import adapt_step, repack
from dsb_jax.distributions import LayerShape, to_blocks
from dsb_jax.layout import BlockLayout, random_layout
from dsb_jax.ops import sparse_conv
from dsb_jax.ops.statistics import make_probe
from dsb_jax.train import train_step
from dsb_jax.training.config import Recipe
from experiments import program, timing
from experiments import run as runs
from experiments.flags import parse_block_shape
from pallas_kernels import ConvGeometry

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_list("models", ["resnet18"], "Models to adapt as a whole; empty for none.")
    flags.DEFINE_string("layer", "512x512x3x3", "out x channels x height x width of the layer to adapt alone.")
    flags.DEFINE_float("sparsity", 0.9, "Of the layer and over the model's sparse layers.")
    flags.DEFINE_string("block_shape", "16x16", "Rows x columns of a block.")
    flags.DEFINE_list("grow", ["norm", "block_gradient"], "Growth criteria to time.")
    flags.DEFINE_list("granularities", ["block", "panel_column"], "What is dropped and grown.")
    flags.DEFINE_integer("update_interval", 100, "Training steps between adaptations.")
    flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    flags.DEFINE_integer("adapt_batch_size", 32, "Images that an adaptation measures on, as in a run.")
    flags.DEFINE_integer("rounds", 5, "Turns; each times every rival once.")
    flags.DEFINE_string("json", None, "Write the results to this file.")


def layer_calls(grow: str, granularity: str) -> dict[str, Any]:
    """Adaptation (drop, grow, re-block, repack one weight and one moment) and training of one layer."""
    try:
        out, channels, height, width = (int(size) for size in FLAGS.layer.split("x"))
    except ValueError:
        raise ValueError(f"layer={FLAGS.layer!r} is not out x channels x height x width, as in 512x512x3x3.") from None
    block_shape = parse_block_shape(FLAGS.block_shape)
    shape = LayerShape(out, channels * height * width, (height, width))
    (count,) = to_blocks([shape], [1 - FLAGS.sparsity], block_shape)
    key = jax.random.key(0)
    layout = random_layout(key, (out, shape.in_), block_shape=block_shape, num_blocks=count)
    blocks = jax.random.normal(key, (count, *block_shape))
    method = methods.dsb(update_end_step=10_000, grow=grow, granularity=granularity)
    assert method.update is not None
    zeros = make_probe(method.statistic, layout) if method.statistic else {}
    # An argument: XLA would fold a constant, and what follows from it, when it compiles, for seconds.
    statistic = jax.tree.map(lambda z: jax.random.uniform(key, z.shape), zeros)
    update = method.update

    @jax.jit
    def adapt(blocks: jax.Array, layout: BlockLayout, statistic: Any) -> Any:
        new, report = update(key, jnp.zeros((), jnp.int32), blocks, layout, statistic)
        return repack(blocks, layout, new), repack(blocks * 2, layout, new), new, report

    padding = ((height // 2, height // 2), (width // 2, width // 2))
    geometry = ConvGeometry(channels, (height, width), (1, 1), padding)
    x = jax.random.normal(key, (FLAGS.batch_size, 4, 4, channels))

    @jax.jit
    def train(x: jax.Array, blocks: jax.Array) -> Any:
        y, backward = jax.vjp(lambda x, b: sparse_conv(x, b, layout, geometry=geometry), x, blocks)
        return backward(y)

    return {"adapt": lambda: adapt(blocks, layout, statistic), "train": lambda: train(x, blocks)}


def model_calls(name: str, grow: str, granularity: str) -> dict[str, Any]:
    """Adaptation and training step of a whole model."""
    recipe = Recipe(
        dataset="random", image_shape=(32, 32, 3), model=name, sparsity=FLAGS.sparsity, grow=grow,
        granularity=granularity, block_shape=parse_block_shape(FLAGS.block_shape), batch_size=FLAGS.batch_size,
        total_steps=10_000,
    )  # fmt: skip
    assembly, state = runs.create(recipe)
    images = jax.random.normal(jax.random.key(0), (recipe.batch_size, *recipe.image_shape))
    labels = jax.random.randint(jax.random.key(1), (recipe.batch_size,), 0, recipe.num_classes)
    held = [state]
    common: Any = {"model": assembly.model, "optimizer": assembly.optimizer, "loss": assembly.loss}

    few = FLAGS.adapt_batch_size

    def adapt() -> Any:
        held[0], report = adapt_step(held[0], images[:few], labels[:few], method=assembly.method, **common)
        return held[0].step, report

    def train() -> Any:
        held[0], metrics = train_step(held[0], images, labels, **common)
        return held[0].step, metrics

    return {"adapt": adapt, "train": train}


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    path = timing.results_path(FLAGS.json)
    results: list[dict[str, Any]] = []
    for name, values, known in (
        ("grow", FLAGS.grow, methods.GROW),
        ("granularities", FLAGS.granularities, methods.GRANULARITIES),
    ):
        if odd := [value for value in values if value not in known]:
            raise ValueError(f"{name}: {odd[0]!r} is unknown; choose of {', '.join(known)}.")
    for granularity, grow in itertools.product(FLAGS.granularities, FLAGS.grow):
        subjects = [("layer", FLAGS.layer, layer_calls(grow, granularity))]
        subjects += [("model", name, model_calls(name, grow, granularity)) for name in FLAGS.models]
        for kind, name, calls in subjects:
            console.print(f"{name}, {granularity}, grow={grow}: compiling and measuring ...")
            times = timing.in_turns(calls, FLAGS.rounds)
            adapt, train = statistics.median(times["adapt"]), statistics.median(times["train"])
            results.append(
                {
                    kind: name,
                    "grow": grow,
                    "granularity": granularity,
                    "block_shape": FLAGS.block_shape,
                    "sparsity": FLAGS.sparsity,
                    "adapt_s": adapt,
                    "train_step_s": train,
                    "update_interval": FLAGS.update_interval,
                    "amortized_share": timing.median_ratio(times["adapt"], times["train"]) / FLAGS.update_interval,
                }
            )
    table = Table(title=f"adaptation, blocks of {FLAGS.block_shape}, sparsity {FLAGS.sparsity:g}")
    for column in (
        "layer or model",
        "granularity",
        "grow",
        "adaptation",
        "training step",
        f"share over {FLAGS.update_interval} steps",
    ):
        table.add_column(column, justify="left" if column in ("layer or model", "granularity", "grow") else "right")
    for r in results:
        table.add_row(
            r.get("layer") or r["model"], r["granularity"], r["grow"], f"{r['adapt_s'] * 1e3:.0f} ms",
            f"{r['train_step_s'] * 1e3:.0f} ms", f"{r['amortized_share']:.2%}",
        )  # fmt: skip
    console.print(table)
    if path is not None:
        settings = {name: FLAGS[name].value for name in ("batch_size", "adapt_batch_size", "rounds")}
        timing.write_results(path, settings, results)


if __name__ == "__main__":
    define_flags()
    program.start(main)
