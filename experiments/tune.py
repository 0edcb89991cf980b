"""Times the implementations of sparse layers on this device and writes the table that `implementation="auto"` reads.

    python -m experiments.tune --models=resnet18,vgg16 --sparsities=0.9,0.8 --block_shapes=32x8 --dtype=bfloat16

For every distinct layer of the models and of `--shapes`, sparsity and block shape: each pass of unpack-then-dense
against each sparse implementation for this backend, in turns. The tiles of the GPU kernels are tuned before. Whatever
computes something else than dense does, or fails, is left out.

The table is written after each layer, so a program that is stopped keeps what it has, and the same command goes on
where it ended. It lies in `~/.cache/dsb_jax/`, where "auto" finds it; for any other `--table=FILE` set
DSB_JAX_TUNED=FILE. On a CPU, `--table` must be given: there the cost model is fitted, and a table is rarely worth its
time.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsb_jax.layout import max_blocks
from dsb_jax.ops import tuning as tuned
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.tuning import Result
from dsb_jax.plan import MIN_BLOCKS
from dsb_jax.training.config import DTYPES
from experiments import program, timing
from experiments.flags import parse_block_shape
from experiments.kernel_shapes import layers_of
from experiments.tune_layer import SPARSE_IMPLEMENTATIONS, measure

FLAGS = flags.FLAGS

# Flags that say what was measured; they make the command in the table.
SETTINGS = ("models", "shapes", "sparsities", "block_shapes", "batch_size", "dtype", "rounds", "repeats", "tiles")


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_list("models", ["resnet18", "vgg16", "wrn-22-2"], "Models whose layers to time, at 32x32; or vit-b.")
    flags.DEFINE_list("shapes", [], "Layers: 4096x4096x8192 (out x in x N), 128x64x3x3/2@32x32x512 (a convolution).")
    flags.DEFINE_list("sparsities", ["0.9", "0.8", "0.95"], "Sparsities, the most wanted first.")
    flags.DEFINE_list("block_shapes", ["32x8", "16x16", "64x4"], "Rows x columns of blocks, the most wanted first.")
    flags.DEFINE_integer("batch_size", 128, "Images in a step.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of activations and blocks.")
    flags.DEFINE_string("table", None, "The table to write or to go on with; by default in ~/.cache/dsb_jax/.")
    flags.DEFINE_float("limit_s", None, "Begin no layer that would probably end later than this many seconds.")
    flags.DEFINE_integer("rounds", 7, "Turns; each times every candidate once.", lower_bound=1)
    flags.DEFINE_integer("repeats", None, "Passes in one timing; by default 16 on a GPU, else 1.", lower_bound=1)
    flags.DEFINE_enum("tiles", "each", ("each", "once", "default"),
                      "Tune tiles for each layer, or once for all sparsities of it, or take the defaults.")  # fmt: skip
    flags.DEFINE_bool("again", False, "Time the layers that the table has, too.")


def wanted_layers() -> list[LayerCall]:
    """Every distinct layer of the flags, in their order; a block shape that a layer cannot hold is passed over.

    Raises:
      ValueError: for a flag that cannot be, or if there is nothing to time.
    """
    try:
        sparsities = [float(text) for text in FLAGS.sparsities]
    except ValueError:
        raise ValueError(f"sparsities={FLAGS.sparsities} are not all numbers; give such as 0.9,0.8.") from None
    if any(not 0 < sparsity < 1 for sparsity in sparsities):
        raise ValueError(f"sparsities={FLAGS.sparsities} are not all between 0 and 1; give such as 0.9,0.8.")
    block_shapes = [parse_block_shape(text) for text in FLAGS.block_shapes]
    found: dict[LayerCall, LayerCall] = {}  # rounded -> exact
    layers = layers_of(FLAGS.shapes, [], FLAGS.models, FLAGS.batch_size)
    for sparsity, (rows, cols), layer in itertools.product(sparsities, block_shapes, layers):
        shape = layer.out, layer.in_features
        if rows > layer.out or cols > layer.in_features or max_blocks(shape, (rows, cols)) < MIN_BLOCKS:
            continue  # a plan keeps it dense
        try:
            call = layer.call(sparsity, (rows, cols), FLAGS.dtype)
        except ValueError:
            continue  # fewer weights than one block
        found.setdefault(call.rounded(), call)
    if not found:
        raise ValueError(
            f"no layer of models={','.join(FLAGS.models)} shapes={','.join(FLAGS.shapes)} can hold blocks of "
            f"{','.join(FLAGS.block_shapes)} at {','.join(FLAGS.sparsities)}; give others."
        )
    return list(found.values())


def versions() -> dict[str, str]:
    """What a table depends on beside the device; packages that are not installed are left out."""
    return tuned.installed_versions(("dsb-jax", "jax", "jaxlib", "jax-triton", "triton"))


def open_table(path: Path, device_kind: str, command: str) -> tuned.Table:
    """The table to go on with, or an empty one; `command` is added to its own.

    Raises:
      ValueError: if the file is no table, or was measured on another device or with other versions.
    """
    if not path.absolute().parent.is_dir():
        raise ValueError(f"table={path}: there is no folder {path.parent}; make it first.")
    if not path.exists():
        return tuned.Table(device_kind, versions(), command, {})
    old = tuned.load(path)
    for what, then, now in (("device", old.device_kind, device_kind), ("versions", dict(old.versions), versions())):
        if then != now:
            raise ValueError(f"table={path} was measured with {what} {then}, this is {now}; give another --table.")
    commands = dict.fromkeys([*old.command.split(" && "), command])  # each once
    return old._replace(command=" && ".join(commands))


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    begin = time.perf_counter()
    backend, device_kind = jax.default_backend(), jax.devices()[0].device_kind
    if backend not in SPARSE_IMPLEMENTATIONS:
        raise NotImplementedError(f"there is no sparse kernel to tune on the {backend}.")
    if FLAGS.table is None and backend == "cpu":
        raise ValueError(
            'on a CPU, --table=FILE is needed: "auto" has a fitted model there and reads no table unasked.'
        )
    path = Path(FLAGS.table) if FLAGS.table else tuned.user_path(device_kind)
    if path is None:
        raise ValueError("this user has no home for the table; give --table=FILE.")
    if FLAGS.table is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m experiments.tune", *(FLAGS[n].serialize() for n in SETTINGS if FLAGS[n].present)])
    table = open_table(path, device_kind, command)
    entries = dict(table.entries)
    layers = wanted_layers()
    todo = [layer for layer in layers if FLAGS.again or layer.rounded() not in entries]
    console.print(f"{len(layers)} layers for {escape(device_kind)}, {len(layers) - len(todo)} of them in the table")

    def keep(layer: LayerCall, results: tuple[Result, ...]) -> None:
        entries[layer.rounded()] = results
        tuned.write(path, table._replace(entries=entries))

    done = run_all(todo, backend, console, begin, keep)
    console.print(f"{len(entries)} layers in {escape(str(path))}")
    if left := todo[done:]:
        console.print(f"{len(left)} left after --limit_s={FLAGS.limit_s:g}; the same command goes on with")
        for layer in left[:5]:
            console.print(f"  {escape(str(layer))}")
        if len(left) > 5:
            console.print(f"  and {len(left) - 5} more")


def run_all(
    todo: list[LayerCall], backend: str, console: Console, begin: float, keep: Callable[[LayerCall, Any], None]
) -> int:
    """Measures one layer after another until the time is up, and says so; how many were measured."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                   console=console, disable=not console.is_interactive)  # fmt: skip
    longest, known = 0.0, {}  # type: ignore[var-annotated]
    with bar:
        task = bar.add_task("tuning", total=len(todo))
        for number, layer in enumerate(todo):
            start = time.perf_counter()
            if FLAGS.limit_s is not None and start - begin + longest > FLAGS.limit_s:
                return number
            bar.update(task, description=escape(str(layer)))
            results = measure(
                layer, backend, rounds=FLAGS.rounds, repeats=FLAGS.repeats or (16 if backend == "gpu" else 1),
                tiles=FLAGS.tiles, known=known, say=lambda text: console.print(escape(text)),
            )  # fmt: skip
            keep(layer, results)
            times = ", ".join(
                f"{result.implementation} {timing.milliseconds(sum(result.seconds))}" for result in results
            )
            console.print(f"{escape(str(layer))}: {times}")
            longest = max(longest, time.perf_counter() - start)
            bar.advance(task)
    return len(todo)


if __name__ == "__main__":
    define_flags()
    program.start(main)
