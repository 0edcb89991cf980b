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
from dsb_jax.distributions import to_blocks
from dsb_jax.methods.base import LayerState
from dsb_jax.ops import sparse_conv
from dsb_jax.origins import move
from dsb_jax.spec import conv_spec
from dsb_jax.train import adapt_step, train_step
from dsb_jax.training.config import Config
from dsb_jax.training.loop import create
from experiments import program, timing
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
    flags.DEFINE_integer("update_interval", 100, "Training steps between adaptations.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    flags.DEFINE_integer("adapt_batch_size", 32, "Images that an adaptation measures on, as in a run.")
    flags.DEFINE_integer("rounds", 5, "Turns; each times every candidate once.", lower_bound=1)
    flags.DEFINE_string("json", None, "Write the results to this file.")


def layer_calls(grow: str, granularity: str) -> dict[str, Any]:
    """Adaptation (drop, grow, re-block, repack one weight and one moment) and training of one layer."""
    try:
        out, channels, height, width = (int(size) for size in FLAGS.layer.split("x"))
    except ValueError:
        raise ValueError(f"layer={FLAGS.layer!r} is not out x channels x height x width, as in 512x512x3x3.") from None
    block_shape = parse_block_shape(FLAGS.block_shape)
    dense = conv_spec((height, width), channels, out)
    (count,) = to_blocks([dense], [1 - FLAGS.sparsity], [block_shape])
    key = jax.random.key(0)
    method = methods.DSB(update_end_step=10_000, grow=grow, granularity=granularity)
    spec = method.stored(dense.with_blocks(block_shape, count))
    state = jax.jit(lambda key: method.init(key, jax.random.normal(key, dense.shape), spec))(key)
    zeros = method.statistic.zeros(spec) if method.statistic else None
    # An argument: XLA would fold a constant, and what follows from it, when it compiles, for seconds.
    statistic = jax.tree.map(lambda z: jax.random.uniform(key, z.shape), zeros)

    @jax.jit
    def adapt(state: LayerState, statistic: Any) -> Any:
        new, report = method.update(key, jnp.zeros((), jnp.int32), state, statistic)
        return new, move(state.blocks * 2, state.layout, new.layout), report

    padding = ((height // 2, height // 2), (width // 2, width // 2))
    geometry = ConvGeometry(channels, (height, width), (1, 1), padding)
    x = jax.random.normal(key, (FLAGS.batch_size, 4, 4, channels))

    @jax.jit
    def train(x: jax.Array, blocks: jax.Array) -> Any:
        y, backward = jax.vjp(lambda x, b: sparse_conv(x, b, state.layout, geometry=geometry), x, blocks)
        return backward(y)

    return {"adapt": lambda: adapt(state, statistic), "train": lambda: train(x, state.blocks)}


def model_calls(name: str, grow: str, granularity: str) -> dict[str, Any]:
    """Adaptation and training step of a whole model."""
    config = Config(
        dataset="random", input_shape=(32, 32, 3), model=name, sparsity=FLAGS.sparsity, grow=grow,
        granularity=granularity, block_shape=parse_block_shape(FLAGS.block_shape), batch_size=FLAGS.batch_size,
        total_steps=10_000,
    )  # fmt: skip
    components, state = create(config)
    images = jax.random.normal(jax.random.key(0), (config.batch_size, *config.input_shape))
    labels = jax.random.randint(jax.random.key(1), (config.batch_size,), 0, config.num_classes)
    held = [state]
    method: Any = components.method
    common: Any = {"model": components.model, "optimizer": components.optimizer, "loss": components.loss}

    few = FLAGS.adapt_batch_size

    def adapt() -> Any:
        held[0], report = adapt_step(held[0], images[:few], labels[:few], method=method, **common)
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
            r.get("layer") or r["model"], r["granularity"], r["grow"], timing.milliseconds(r["adapt_s"]),
            timing.milliseconds(r["train_step_s"]), f"{r['amortized_share']:.2%}",
        )  # fmt: skip
    console.print(table)
    if path is not None:
        settings = {name: FLAGS[name].value for name in ("batch_size", "adapt_batch_size", "rounds")}
        timing.write_results(path, settings, results)


if __name__ == "__main__":
    define_flags()
    program.start(main)
