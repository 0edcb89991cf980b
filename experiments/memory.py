"""Memory of weights, gradients, moments and indices, counted from the live arrays: Table 3 of the paper, measured.

    python -m experiments.memory --json=FILE [--chart=FILE.png]

N is the number of weights of the sparse layers in dense form, d their density. By the paper (appendix A.3):

              training               adaptation
              weights   gradients    weights   gradients
    dsb       Nd        Nd           Nd        Nd
    rigl      Nd        Nd           Nd        N
    topkast   N         Nd + M       N         -

Weights, gradients and moments are those of the layers that the plan makes sparse, as in the paper; what stays dense
beside them (stem, head, norms) is reported apart, `dense_rest_bytes`. Gradients of the training step have the shapes of
what it differentiates. Those of an adaptation are the statistic that the method measures in its place: `dsb` holds less
than Nd there, and nothing at all but two norms a layer with `--grow=norm`. With `--xla`, the buffers that XLA plans for
the compiled steps stand beside; they hold the activations, too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from dsb_jax.block_shapes import AUTO
from dsb_jax.methods import GROW
from dsb_jax.paths import nodes, weights_at
from dsb_jax.topology import without_index
from dsb_jax.train import adapt_step, train_step
from dsb_jax.train_state import TrainState
from dsb_jax.training.build import Components, build
from dsb_jax.training.checkpoints import abstract_state
from dsb_jax.training.config import METHODS, Config
from experiments import program, timing
from experiments.flags import parse_block_shape_or_auto

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_list("models", ["wrn-22-2", "resnet18", "vgg16"], "Models.")
    flags.DEFINE_list("methods", list(METHODS), "Methods.")
    flags.DEFINE_float("sparsity", 0.9, "Over the sparse layers.")
    flags.DEFINE_string("distribution", "uniform", "Densities over the layers: uniform, erk.")
    flags.DEFINE_string("block_shape", AUTO, "Rows x columns of a block: auto (by layer), 16x16, 32x8, ...")
    flags.DEFINE_enum("grow", "block_gradient", GROW, "Growth criterion of dsb.")
    flags.DEFINE_enum("optimizer", "sgd", ("sgd", "adamw"), "Whose moments are counted.")
    flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    flags.DEFINE_bool("xla", True, "Compile the steps and report XLA's own account, too (takes minutes).")
    flags.DEFINE_string("json", None, "Write the results to this file.")
    flags.DEFINE_string("chart", None, "Draw the results into this PNG file.")


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def account(config: Config) -> list[dict[str, Any]]:
    """Bytes of one method on one model: an object for each phase."""
    components = build(config)
    images = config.abstract_inputs()
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    state = abstract_state(config, components)
    found = nodes(state.topology)
    specs = [node.spec for node in found.values()]
    if specs:
        sparse = list(weights_at(state.params, found).values())
        dense_weights = sum(spec.size for spec in specs)
        active, stored = sum(spec.num_active for spec in specs), sum(spec.num_stored for spec in specs)
    else:  # every layer is dense: the formulas are those of N weights
        sparse = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "kernel"]
        dense_weights = active = stored = sum(leaf.size for leaf in sparse)
    weights = nbytes(sparse)
    # Gradients and moments are those of what is differentiated; a reserve of weights (Top-KAST) has none.
    reserve = nbytes([node.aux.reserve for node in found.values() if node.aux is not None])
    bare = without_index(state.topology)
    moments = (nbytes(state.opt_state) // nbytes(state.params)) * weights
    common: dict[str, Any] = {
        "method": config.method, "model": config.model, "sparsity": config.sparsity, "optimizer": config.optimizer,
        "weights_bytes": weights + reserve, "moments_bytes": moments, "index_bytes": nbytes(bare) - reserve,
        "index_share": (nbytes(bare) - reserve) / (weights + reserve),
        "kernel_index_bytes": nbytes(state.topology) - nbytes(bare),
        "dense_rest_bytes": nbytes(state.params) - weights,
        "formula_weights_bytes": 4 * (dense_weights if config.method == "topkast" else active),
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {**common, "phase": "training", "gradients_bytes": weights, "formula_gradients_bytes": 4 * stored}
    ]
    method = components.method
    if method is not None and any(method.due(step) for step in range(config.total_steps)):
        statistics = 0
        if (statistic := method.statistic) is not None:
            statistics = nbytes([jax.eval_shape(functools.partial(statistic.zeros, spec)) for spec in specs])
        formula = 4 * (dense_weights if config.method == "rigl" else active if config.method == "dsb" else 0)
        rows.append(
            {**common, "phase": "adaptation", "gradients_bytes": statistics, "formula_gradients_bytes": formula}
        )
    for row in rows:
        for what in ("weights", "gradients"):
            formula = row[f"formula_{what}_bytes"]
            row[f"deviation_{what}"] = row[f"{what}_bytes"] / formula - 1 if formula else None
        if FLAGS.xla:
            row |= compiled(row["phase"], components, state, images, labels)
    return rows


def compiled(phase: str, components: Components, state: TrainState, images: Any, labels: Any) -> dict[str, int]:
    """XLA's account of the compiled step of a phase: bytes of arguments, outputs, scratch, and what is shared."""
    options: dict[str, Any] = {"model": components.model, "optimizer": components.optimizer, "loss": components.loss}
    step: Any = train_step
    if phase == "adaptation":
        step, options = adapt_step, {**options, "method": components.method}
    jitted = jax.jit(functools.partial(step, **options), donate_argnums=0)
    memory: Any = jitted.lower(state, images, labels).compile().memory_analysis()
    return {
        "xla_argument_bytes": memory.argument_size_in_bytes, "xla_output_bytes": memory.output_size_in_bytes,
        "xla_temp_bytes": memory.temp_size_in_bytes, "xla_alias_bytes": memory.alias_size_in_bytes,
    }  # fmt: skip


def table_of(model: str, rows: list[dict[str, Any]]) -> Table:
    """One row for each method and phase of a model."""
    table = Table(title=f"{model}, sparsity {FLAGS.sparsity:g}, KiB of the sparse layers")
    for name in ("method", "phase", "weights", "by formula", "gradients", "by formula", "moments", "indices"):
        table.add_column(name, justify="left" if name in ("method", "phase") else "right")
    for row in rows:
        numbers = [row[f"{name}_bytes"] for name in
                   ("weights", "formula_weights", "gradients", "formula_gradients", "moments")]  # fmt: skip
        table.add_row(
            row["method"], row["phase"], *(f"{number / 1024:,.0f}" for number in numbers),
            f"{row['index_bytes'] / 1024:,.0f} ({row['index_share']:.1%})",
        )  # fmt: skip
    return table


def draw(results: list[dict[str, Any]], path: str) -> None:
    """Stacked bars of weights, gradients, moments and indices for each method and phase, a panel for each model."""
    by_model = {
        model: [r for r in results if r["model"] == model] for model in dict.fromkeys(r["model"] for r in results)
    }
    figure = Figure(figsize=(4.5 * len(by_model), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (model, rows) in zip(figure.subplots(1, len(by_model), squeeze=False)[0], by_model.items(), strict=True):
        names = [f"{row['method']}\n{row['phase']}" for row in rows]
        bottom = [0.0] * len(rows)
        for part in ("weights", "gradients", "moments", "index"):
            heights = [row[f"{part}_bytes"] / 2**20 for row in rows]
            axes.bar(names, heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set(title=model, ylabel="MiB")
        axes.tick_params(axis="x", rotation=90, labelsize=7)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    path = timing.results_path(FLAGS.json)
    base = Config(
        dataset="random", input_shape=(32, 32, 3), sparsity=FLAGS.sparsity, distribution=FLAGS.distribution,
        block_shape=parse_block_shape_or_auto(FLAGS.block_shape), grow=FLAGS.grow, optimizer=FLAGS.optimizer,
        batch_size=FLAGS.batch_size, adapt_batch_size=FLAGS.batch_size,
    ).to_json()  # fmt: skip
    results: list[dict[str, Any]] = []
    for model in FLAGS.models:
        rows: list[dict[str, Any]] = []
        for method in FLAGS.methods:
            rows += account(Config.from_json({**base, "model": model, "method": method}))
        console.print(table_of(model, rows))
        results += rows
    if FLAGS.chart:
        draw(results, str(timing.results_path(FLAGS.chart)))
    if path is not None:
        settings = {name: FLAGS[name].value for name in ("sparsity", "block_shape", "grow", "optimizer", "batch_size")}
        timing.write_results(path, settings, results)


if __name__ == "__main__":
    define_flags()
    program.start(main)
