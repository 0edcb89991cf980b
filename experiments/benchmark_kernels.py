"""Time of each pass of the sparse kernels against the dense product, with the bound of the device and a check.

    python -m experiments.benchmark_kernels --shapes=4096x4096x4096 --block_shapes=64x4,32x8 --json=FILE
    python -m experiments.benchmark_kernels --models=resnet18 --dtype=bfloat16 --limit_s=600 --json=FILE

For each layer, block shape and sparsity, the implementations and the dense product (XLA's with a plain kernel, features
innermost, in the same dtype: cuBLAS and cuDNN on a GPU) take turns; a result is the median over the rounds, a speed-up
the median of the ratios round by round. One sample lasts 5 ms or more, so that neither clock nor dispatch counts: on a
GPU a short pass runs up to 16 times within one dispatch, one run behind the other, and dispatches are queued and waited
for once. Operands stay where they are from run to run, so that what fits a cache may be read from it, by all alike.
`forward_backward` is the sum of the three passes.

The bound is the larger of two times: every operand once through the memory, and every weight at every position; at the
rates of a large copy and a large dense product that are measured first. On a CPU with native kernels "of peak" is the
part, of the three passes, of what its cores do in registers alone; products with padding count as done, though some are
left out. Each pass is compared with the reference in float32 on a slice of N; exit code 1, after the results are
written, if one is off or fails.

Without --shapes, --gemms and --models, a GPU measures all the layers of four models and four square products: that
takes hours, and --limit_s ends it sooner. A CPU measures two small layers in a minute or two. --cores=1 keeps all
of it on one core; with and without, the two files say how the passes scale.
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from rich.table import Table

from experiments import cores, kernel_peers, program, timing
from experiments.flags import parse_block_shape
from experiments.kernel_bounds import measure_device
from experiments.kernel_candidates import IMPLEMENTATIONS, PASSES, default_implementations, unavailable
from experiments.kernel_measurement import BOTH, Bench, break_even_points, measure_layer
from experiments.kernel_shapes import Layer, layers_of

FLAGS = flags.FLAGS
HEAD = ("blocks", "sparsity", "implementation", "forward", "of bound", "dense")
COLUMNS = (*HEAD, "fwd", "dx", "dw", "all", "of peak, %", "error")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "shapes": ["512x512x1024", "128x128x3x3@8x8x32"], "gemms": [], "models": [], "sparsities": ["0.5", "0.9"],
        "block_shapes": ["16x16", "32x8"], "batch_size": 32, "dtype": "float32",
    },
    "gpu": {
        "shapes": [], "gemms": ["1024", "2048", "4096", "8192"],
        "models": ["wrn-22-2", "resnet18", "vgg16", "vit-b"], "sparsities": ["0.5", "0.8", "0.9", "0.95", "0.98"],
        "block_shapes": ["16x16", "32x8", "64x4", "32x32", "64x64"], "batch_size": 512, "dtype": "bfloat16",
    },
}  # fmt: skip


def define_flags() -> None:
    """Flags of this program; None stands for the default of the backend."""
    flags.DEFINE_list("shapes", None, "Layers: 4096x4096x8192 (out x in x N), 128x64x3x3/2@32x32x512 (a convolution).")
    flags.DEFINE_list("gemms", None, "Square products n x n x n, such as 1024,4096.")
    flags.DEFINE_list("models", None, "Layers of models: wrn-DEPTH-WIDTH, resnet18, vgg16, convnet, vit-b.")
    flags.DEFINE_list("sparsities", None, "Sparsities of each layer.")
    flags.DEFINE_list("block_shapes", None, "Rows x columns of a block.")
    flags.DEFINE_list("implementations", None, f"Of {', '.join(IMPLEMENTATIONS)}; by default what the backend has.")
    flags.DEFINE_integer("batch_size", None, "Images of a model's layers.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ("float32", "bfloat16"), "Of activations and weights.")
    flags.DEFINE_integer("rounds", 7, "Turns; each times every candidate once.", lower_bound=1)
    flags.DEFINE_bool("peers", True, "Measure PyTorch's BSR and stk, too, where they are installed.")
    flags.DEFINE_float("limit_s", None, "Begin nothing new after so many seconds.", lower_bound=0)
    flags.DEFINE_integer("cores", None, "Of a CPU, for all of it; by default all that this process may run on.")
    flags.DEFINE_string("json", None, "Write the results to this file.")


def settings_from_flags() -> dict[str, Any]:
    """The flags with the defaults of the backend filled in. One of shapes, gemms and models stands for itself alone."""
    names = ("shapes", "gemms", "models", "sparsities", "block_shapes", "batch_size", "dtype", "rounds")
    given = {name: FLAGS[name].value for name in names}
    if any(given[name] is not None for name in ("shapes", "gemms", "models")):
        given |= {name: given[name] or [] for name in ("shapes", "gemms", "models")}
    defaults = DEFAULTS["cpu" if jax.default_backend() == "cpu" else "gpu"]
    return {name: defaults[name] if value is None else value for name, value in given.items()}


def parse_sparsities(texts: Sequence[str]) -> list[float]:
    """['0.5', '0.9'] -> [0.5, 0.9].

    Raises:
      ValueError: if one is not a number in [0, 1).
    """
    try:
        values = [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"sparsities={','.join(texts)} are not all numbers; give such as 0.8,0.9.") from None
    for value in values:
        if not 0 <= value < 1:
            raise ValueError(f"sparsities: {value:g} is not in [0, 1).")
    return sorted(set(values))


def main() -> None:
    """Flags -> measurements, table, file."""
    used_cores = cores.use(FLAGS.cores)
    console = program.console()
    path = timing.results_path(FLAGS.json)
    settings = settings_from_flags() | {"cores": used_cores}
    sparsities = parse_sparsities(settings["sparsities"])
    block_shapes = [parse_block_shape(text) for text in settings["block_shapes"]]
    layers = layers_of(settings["shapes"], settings["gemms"], settings["models"], settings["batch_size"])
    peers = kernel_peers.installed() if FLAGS.peers else {}
    names = default_implementations() if FLAGS.implementations is None else FLAGS.implementations
    begin = time.monotonic()
    deadline = math.inf if FLAGS.limit_s is None else begin + FLAGS.limit_s
    missing = {name: reason for name in names if (reason := unavailable(name)) is not None}
    if len(missing) == len(names):
        raise ValueError("nothing to measure: " + "; ".join(f"{name} {reason}" for name, reason in missing.items()))
    bench = Bench(
        settings["dtype"], settings["rounds"], [name for name in names if name not in missing],
        kernel_peers.usable(peers), measure_device(settings["dtype"]), deadline,
    )  # fmt: skip
    console.print(
        f"{settings['dtype']}: {bench.device.bandwidth / 1e9:.0f} GB/s, {bench.device.flops / 1e12:.2f} TFLOP/s; "
        + ", ".join(f"{name} {version}" for name, version in {**peers, **missing}.items())
    )
    results: list[dict[str, Any]] = []

    def write() -> None:
        if path is None:
            return
        body = {
            **settings, "backend": jax.default_backend(), "seconds": time.monotonic() - begin,
            "bandwidth_bytes_per_s": bench.device.bandwidth, "peak_flops_per_s": bench.device.flops,
            "core_peak_flops_per_s": bench.device.core_peak, "peers": peers,
            "unavailable": missing, "failures": bench.failures, "left_out": bench.left_out,
            "break_even": break_even_points(results),
        }  # fmt: skip
        timing.write_results(path, body, results)

    for layer in layers:
        new = measure_layer(bench, layer, block_shapes, sparsities)
        results += new
        if new:
            console.print(layer_table(layer, new))
        write()  # after each layer: a run that is stopped leaves what it has
    write()
    for line in bench.left_out[:5]:
        console.print(f"left out: {line}")
    if len(bench.left_out) > 5:
        console.print(f"left out: {len(bench.left_out) - 5} more")
    if bench.failures:
        for line in bench.failures:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def layer_table(layer: Layer, results: Sequence[dict[str, Any]]) -> Table:
    """One row for each block shape, sparsity and implementation of a layer."""
    table = Table(title=", ".join([str(layer), *layer.names[:2]]))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "implementation" else "right")
    for r in results:
        head = r["block_shape"], f"{r['sparsity']:g}", r["implementation"]
        if "note" in r:
            table.add_row(*head, r["note"][:40])
            continue
        forward = r["passes"]["forward"]
        errors = [p["max_relative_error"] for p in r["passes"].values()]
        ratios = (r["speedup"].get(name) for name in (*PASSES, BOTH))
        of_peak = (r["passes"].get(name, {}).get("core_peak_fraction") for name in PASSES)
        table.add_row(
            *head, timing.milliseconds(forward["s"]), f"{forward['bound_fraction']:.0%}",
            timing.milliseconds(forward["dense_s"]), *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            "/".join("" if part is None else f"{part * 100:.0f}" for part in of_peak),
            "" if None in errors else f"{max(errors):.0e}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    define_flags()
    program.start(main)
