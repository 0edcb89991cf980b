"""Training-step time of DSB against the dense model, measured in turns within one run, and layer by layer.

    python -m experiments.benchmark_training --model=vgg16 --sparsities=0.5,0.8,0.9,0.95 --block_shape=32x8 --json=FILE

The step is the whole of it: forward, backward, SGD with momentum and weight decay. Layer-wise times are forward and
backward of one layer at the input it meets in the model, dense (XLA's convolution) against what "auto" chose.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn
from rich.table import Table

from dsb_jax.nn import SparseConv, SparseDense
from dsb_jax.ops import IMPLEMENTATIONS, record_choices
from dsb_jax.plan import DISTRIBUTIONS
from dsb_jax.recipe import Assembly, Recipe, assemble
from dsb_jax.train import train_step
from experiments import program, timing
from experiments import run as runs
from experiments.flags import parse_block_shape

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("model", "vgg16", "convnet, resnet18, vgg16, or wrn-DEPTH-WIDTH.")
    flags.DEFINE_list("sparsities", ["0.5", "0.8", "0.9", "0.95"], "Sparsities over the sparse layers.")
    flags.DEFINE_string("block_shape", "16x16", "Rows x columns of a block.")
    flags.DEFINE_list("distributions", ["uniform", "erk"], "Densities over the layers: uniform, erk.")
    flags.DEFINE_integer("batch_size", 128, "Images in a step.")
    flags.DEFINE_integer("image_size", 32, "Height and width of the images.")
    flags.DEFINE_integer("rounds", 7, "Turns; each times every rival once.")
    flags.DEFINE_enum("implementation", "auto", IMPLEMENTATIONS, "Of the sparse products.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Of the computation.")
    flags.DEFINE_bool("layers", True, "Time each layer, too (of the first distribution).")
    flags.DEFINE_string("json", None, "Write the results to this file.")


def stepper(recipe: Recipe) -> Callable[[], Any]:
    """A call that makes one training step on fixed random images, carrying its state along."""
    assembly, state = runs.create(recipe)
    image_key, label_key = jax.random.split(jax.random.key(recipe.seed))
    images = jax.random.normal(image_key, (recipe.batch_size, *recipe.image_shape))
    labels = jax.random.randint(label_key, (recipe.batch_size,), 0, recipe.num_classes)
    held = [state]

    def step() -> Any:
        held[0], metrics = train_step(
            held[0], images, labels, model=assembly.model, optimizer=assembly.optimizer, loss=assembly.loss
        )
        return held[0].step, metrics

    return step


def find_inputs(recipe: Recipe, assembly: Assembly) -> dict[tuple[str, ...], tuple[nn.Module, tuple[int, ...]]]:
    """Path of each sparse layer -> (module, its input as [N, H, W, C] or [N, C]), seen while the model is traced."""
    seen: dict[tuple[str, ...], tuple[nn.Module, tuple[int, ...]]] = {}
    sparse = {layer.path for layer in assembly.plan.sparse_layers} if assembly.plan else set()

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.method_name == "__call__" and isinstance(context.module, SparseConv | SparseDense)
        if layer and context.module.path in sparse:
            shape = args[0].shape
            if context.module.feature_major:
                shape = (shape[-1], *shape[1:-1], shape[0])
            seen.setdefault(context.module.path, (context.module, shape))
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((recipe.batch_size, *recipe.image_shape), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(assembly.model.init, jax.random.key(0), images)
    return seen


def layer_rivals(modules: dict[str, Any], shape: tuple[int, ...], counts: dict[str, int | None], recipe: Recipe) -> Any:
    """Forward and backward of one layer for each number of blocks (None: dense), and what "auto" chose for it.

    Each takes its input in the order of activations that its model has: feature-major or not.
    """
    key = jax.random.key(0)
    x = jax.random.normal(key, shape, jnp.dtype(recipe.dtype))
    calls, chosen = {}, {}
    for name, count in counts.items():
        clone = modules[name].clone(
            parent=None, name=None, plan=None, block_shape=recipe.block_shape, num_blocks=count
        )  # fmt: skip
        given = jnp.moveaxis(x, (0, -1), (-1, 0)) if clone.feature_major else x
        with record_choices() as choices:
            variables = clone.init(key, given)
        chosen[name] = choices[()].implementation
        rest = {k: v for k, v in variables.items() if k != "params"}

        def both(params: Any, x: jax.Array, clone: Any = clone, rest: Any = rest) -> Any:
            y, backward = jax.vjp(lambda params, x: clone.apply({"params": params, **rest}, x), params, x)
            return y, backward(y)

        calls[name] = functools.partial(jax.jit(both), variables["params"], given)
    return calls, chosen


def time_layers(recipes: dict[str, Recipe], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Times of every sparse layer for every recipe; the recipes differ in sparsity alone.

    Dense and all sparsities of a layer take turns; layers of equal sizes are measured once.
    """
    assemblies = {name: assemble(recipe) for name, recipe in recipes.items()}
    plans = {name: a.plan for name, a in assemblies.items() if a.plan is not None}
    first = next(iter(recipes))
    inputs = {name: find_inputs(recipe, assemblies[name]) for name, recipe in recipes.items()}
    measured: dict[Any, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for path, (module, shape) in inputs[first].items():
        layers = {name: plan[path] for name, plan in plans.items()}
        counts = {name: layer.num_blocks for name, layer in layers.items()}
        sizes = layers[first].shape
        strides = getattr(module, "strides", None) or (1, 1)
        same = (shape, sizes, tuple(counts.values()), strides)
        if same not in measured:
            modules = {"dense": module.clone(feature_major=False)} | {n: inputs[n][path][0] for n in recipes}
            calls, chosen = layer_rivals(modules, shape, {"dense": None, **counts}, recipes[first])
            measured[same] = timing.in_turns(calls, rounds), chosen
        times, chosen = measured[same]
        for name, count in counts.items():
            rows[name].append(
                {
                    "layer": "/".join(path), "out": sizes.out, "in": sizes.in_, "input": list(shape),
                    "num_blocks": count,
                    "dense_s": statistics.median(times["dense"]),
                    "sparse_s": statistics.median(times[name]),
                    "speedup": timing.median_ratio(times["dense"], times[name]),
                    "implementation": chosen[name],
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    path = timing.results_path(FLAGS.json)
    try:
        sparsities = [float(text) for text in FLAGS.sparsities]
    except ValueError:
        raise ValueError(f"sparsities={FLAGS.sparsities} are not all numbers; give such as 0.8,0.9.") from None
    for name in FLAGS.distributions:
        if name not in DISTRIBUTIONS:
            raise ValueError(f"distributions: {name!r} is unknown; choose of {', '.join(DISTRIBUTIONS)}.")
    dense = Recipe(
        dataset="random", image_shape=(FLAGS.image_size, FLAGS.image_size, 3), model=FLAGS.model, method="dense",
        block_shape=parse_block_shape(FLAGS.block_shape), batch_size=FLAGS.batch_size, dtype=FLAGS.dtype,
        implementation=FLAGS.implementation,
    )  # fmt: skip
    results: list[dict[str, Any]] = []
    for distribution in FLAGS.distributions:
        recipes = {
            str(s): dataclasses.replace(dense, method="dsb", sparsity=s, distribution=distribution) for s in sparsities
        }
        console.print(f"{FLAGS.model}, {distribution}: compiling {len(recipes) + 1} training steps ...")
        times = timing.in_turns({"dense": stepper(dense)} | {n: stepper(r) for n, r in recipes.items()}, FLAGS.rounds)
        timed_layers = FLAGS.layers and distribution == FLAGS.distributions[0]
        layers = time_layers(recipes, FLAGS.rounds) if timed_layers else {}
        for name, recipe in recipes.items():
            results.append(
                {
                    "model": FLAGS.model,
                    "sparsity": recipe.sparsity,
                    "block_shape": FLAGS.block_shape,
                    "distribution": distribution,
                    "dense_step_s": statistics.median(times["dense"]),
                    "sparse_step_s": statistics.median(times[name]),
                    "speedup": timing.median_ratio(times["dense"], times[name]),
                    "layers": layers.get(name, []),
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
    table = Table(title=f"{results[0]['model']}, blocks of {results[0]['block_shape']}, {results[0]['distribution']}")
    for name in ("sparsity", "dense step", "sparse step", "speed-up"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            f"{r['sparsity']:g}", f"{r['dense_step_s'] * 1e3:.0f} ms", f"{r['sparse_step_s'] * 1e3:.0f} ms",
            f"{r['speedup']:.2f}x",
        )  # fmt: skip
    return table


def layer_table(result: dict[str, Any]) -> Table:
    """One row for each layer of one result."""
    table = Table(title=f"{result['model']}, {result['distribution']}, sparsity {result['sparsity']:g}: layers")
    for name in ("layer", "out x in", "input", "blocks", "dense", "sparse", "speed-up", "chosen"):
        table.add_column(name, justify="left" if name in ("layer", "chosen") else "right")
    for r in result["layers"]:
        table.add_row(
            r["layer"], f"{r['out']} x {r['in']}", "x".join(map(str, r["input"])), str(r["num_blocks"]),
            f"{r['dense_s'] * 1e3:.1f} ms", f"{r['sparse_s'] * 1e3:.1f} ms", f"{r['speedup']:.2f}x",
            r["implementation"],
        )  # fmt: skip
    return table


if __name__ == "__main__":
    define_flags()
    program.start(main)
