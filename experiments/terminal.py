"""What a run shows in the terminal: the table of layers, a progress bar, the outcome."""

from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dsb_jax.block_shapes import shape_text
from dsb_jax.ops import record_choices
from dsb_jax.paths import Path, layer_path, nodes, path_name, weights_at
from dsb_jax.train_state import TrainState
from dsb_jax.training.build import Components
from dsb_jax.training.config import DENSE_METHODS, Config
from dsb_jax.training.summary import measure_sparsity


def format_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def layer_table(config: Config, components: Components, state: TrainState) -> Table:
    """One row for each linear layer and convolution: shape, density, blocks, implementation, bytes."""
    images = config.abstract_inputs()
    with record_choices() as choices:
        jax.eval_shape(lambda state, x: components.model.apply(state.variables, x, train=False), state, images)
    found = nodes(state.topology)
    blocks = {layer_path(path): weights for path, weights in weights_at(state.params, found).items()}
    layers = {layer_path(path): node for path, node in found.items()}
    kernels = _kernels(state.params)
    table = Table(title=f"{config.model}, {config.method}, block shape {shape_text(config.block_shape)}")
    for name in ("layer", "out x in", "density", "blocks", "implementation", "bytes"):
        table.add_column(name, justify="left" if name in ("layer", "implementation") else "right")
    # With a plan every layer records what it chose, in the order of the forward pass.
    for path in choices if components.plan is not None else kernels:
        if path in layers:
            node, choice = layers[path], choices[path]
            nbytes = sum(array.nbytes for array in jax.tree.leaves((node, blocks[path])))
            row = (
                f"{node.spec.out} x {node.spec.in_}",
                f"{node.spec.density:.4f}",
                str(node.spec.num_blocks),
                f"{choice.implementation} ({choice.reason})",
            )
        else:
            kernel = kernels[path]
            out, nbytes = kernel.shape[-1], kernel.nbytes
            reason = "dense model" if components.plan is None else components.plan[path]
            row = (f"{out} x {kernel.size // out}", "1", "-", f"dense ({reason})")
        table.add_row(path_name(path), *row, format_bytes(nbytes))
    return table


def _kernels(params: Any) -> dict[Path, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path[:-1]): leaf for path, leaf in leaves if path[-1].key == "kernel"}


class TerminalProgress:
    """The table of layers, then a bar with loss, accuracy, sparsity, turnover; without a terminal, a line an epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.sparsity = 0.0
        self.bar = Progress(
            TextColumn("[bold]{task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  acc {task.fields[accuracy]:.1%}  test {task.fields[test]}  "
                       "sparsity {task.fields[sparsity]:.1%}  turnover {task.fields[turnover]:.1%}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,
        )  # fmt: skip
        self.last: dict[str, float] = {}

    def begin(self, config: Config, components: Components, state: TrainState, done: int) -> None:
        self.console.print(layer_table(config, components, state))
        self.sparsity = measure_sparsity(components, state)["sparsity"]
        self.epochs = config.epochs
        epoch = done * config.epochs // config.total_steps
        self.task = self.bar.add_task(
            "train", total=config.total_steps, completed=done, epoch=f"epoch {epoch + 1}/{self.epochs}", test="-",
            loss=float("nan"), accuracy=0.0, sparsity=self.sparsity, turnover=0.0,
        )  # fmt: skip
        self.bar.start()

    def advance(self, step: int, values: dict[str, float]) -> None:
        self.last = values
        self.sparsity = values.get("sparsity", self.sparsity)
        self.bar.update(self.task, completed=step, **values)  # type: ignore[arg-type]

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        accuracy = f"{values['test_accuracy']:.2%}"
        self.bar.update(self.task, epoch=f"epoch {min(epoch + 1, self.epochs)}/{self.epochs}", test=accuracy)
        if not self.console.is_interactive:
            self.console.print(
                f"epoch {epoch}/{self.epochs}  loss {self.last['loss']:.3f}  test accuracy {accuracy}  "
                f"sparsity {self.sparsity:.1%}  turnover {self.last['turnover']:.1%}",
                highlight=False,  # colors inside the line would hide it from grep
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)

    def stop(self) -> None:
        self.bar.stop()


def outcome_table(summary: dict[str, Any]) -> Table:
    """The numbers of a summary that one looks at first."""
    table = Table(title="outcome", show_header=False)
    nbytes = summary["bytes"]
    rows = [("test accuracy", f"{summary['test_accuracy']:.2%}")]
    if summary["config"]["method"] not in DENSE_METHODS:
        rows += [
            ("sparsity", f"{summary['sparsity']:.2%} over the sparse layers, {summary['sparsity_all']:.2%} over all"),
            ("active weights", f"{summary['num_active']:,} in the sparse layers"),
        ]
    rows.append(("bytes", ", ".join(f"{name} {format_bytes(count)}" for name, count in nbytes.items())))
    if len(stages := summary.get("stages", ())) > 1:
        average, peak = (
            f"{format_bytes(sum(summary[when]['bytes'].values()))} at density {summary[when]['density']:.3f}"
            for when in ("average", "peak")
        )
        rows.append((f"{len(stages)} stages", f"{peak} at the peak, {average} on average over the steps"))
    if summary.get("step_time_s"):
        rows.append(("time", f"{summary['step_time_s'] * 1e3:.1f} ms a step, {summary['train_time_s']:.1f} s in all"))
    if summary.get("adaptations"):
        took = f", {summary['adapt_time_s'] * 1e3:.0f} ms each" if summary.get("adapt_time_s") else ""
        rows += [
            ("adaptations", f"{summary['adaptations']}{took}"),
            ("growth accepted", f"{summary['accepted_growth']:.1%}"),
            ("turnover, collateral", f"{summary['turnover']:.1%}, {summary['collateral']:.1%} an adaptation"),
            ("exploration", f"{summary['exploration']:.1%} of all positions were active at some time"),
        ]
    for row in rows:
        table.add_row(*row)
    return table
