"""Which implementation is chosen, and that it says why."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dsb_jax.layout import random_layout
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.ops import IMPLEMENTATIONS, Choice, choose, record_choices, sparse_matmul
from dsb_jax.ops import tuning as tuned
from dsb_jax.ops.cost_model import GENERIC, device_facts, gpu_dense_seconds, gpu_sparse_seconds, predicted_ratios
from dsb_jax.ops.dispatch import record
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.native import loading
from dsb_jax.ops.tuning import Result
from dsb_jax.paths import nodes
from dsb_jax.target import compiling_for, compiling_for_any
from dsb_jax.topology import with_index
from pallas_kernels import ConvGeometry, matmul_geometry
from pallas_kernels.interface import Passes
from pallas_kernels.kernel_index import entries_for
from pallas_kernels.tiles import KernelTiles, Tiles

KIND = "NVIDIA H200"
SIZES = {"geometry": ConvGeometry(256, (3, 3), (1, 1), ((1, 1), (1, 1))), "input_size": (8, 8), "batch": 64}
TILES = KernelTiles(forward=Tiles(positions=256))


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    """No table of whoever runs the tests, and none of the package."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuned.Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv(tuned.VARIABLE, raising=False)


def layout_of(density, shape=(256, 2304), block_shape=(32, 8)):
    num_blocks = round(density * shape[0] * shape[1] / (block_shape[0] * block_shape[1]))
    return jax.eval_shape(
        lambda key: random_layout(key, shape, block_shape=block_shape, num_blocks=num_blocks), jax.random.key(0)
    )


def call_of(layout, *, geometry, **sizes):
    sizes |= {"block_shape": layout.block_shape, "num_blocks": layout.num_blocks}
    return LayerCall.of(layout.shape[0], geometry, **sizes)


def ratios_of(layout, backend="cpu", device_kind="cpu", dtype="float32", **sizes):
    """Of the best implementation that the cost model knows there."""
    layer = call_of(layout, **{**SIZES, **sizes}, dtype=dtype)
    return next(iter(predicted_ratios(layer, backend, device_kind).values()))


def in_words(ratios):
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def seconds(value):
    """The same for each pass, or those of the three."""
    return Passes(*value) if isinstance(value, tuple) else Passes(value, value, value)


def result(implementation, value, tiles=None):
    return Result(implementation, seconds(value), tiles)


def write_table(monkeypatch, path, layout, *results, device_kind=KIND, dtype="bfloat16", **changes):
    layer = call_of(layout, **{**SIZES, **changes}, dtype=dtype).rounded()
    tuned.write(path, tuned.Table(device_kind, {}, "by hand", {layer: results}))
    monkeypatch.setenv(tuned.VARIABLE, str(path))


def on_h200(implementation, layout, **sizes):
    return choose(implementation, layout, backend="gpu", device_kind=KIND, **{**SIZES, "dtype": jnp.bfloat16, **sizes})


@pytest.mark.parametrize("implementation", ["xla", "dense", "reference"])
@pytest.mark.parametrize("backend", ["cpu", "gpu", None])
def test_explicit_names_pass_through(implementation, backend):
    for density in (0.01, 0.99):
        assert choose(implementation, layout_of(density), backend=backend, **SIZES) == Choice.all(
            implementation, "asked for"
        )


@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_auto_follows_the_predicted_break_even(monkeypatch, implementation):
    if implementation == "native" and (reason := loading.unavailable_reason()):
        pytest.skip(reason)
    if implementation == "xla":
        monkeypatch.setattr(loading, "unavailable_reason", lambda: "they are not here; install a compiler")
        monkeypatch.setattr(loading, "tell_missing", lambda: None)

    def predicted(layout):
        return predicted_ratios(call_of(layout, **SIZES, dtype="float32"), "cpu", "cpu")[implementation]

    densities = (0.05, 0.1, 0.3, 0.6, 0.95)
    of_density = [predicted(layout_of(density)) for density in densities]
    for ratios in zip(*of_density, strict=True):
        assert list(ratios) == sorted(ratios)
    why = "" if implementation == "native" else "; native: they are not here"
    choice = choose("auto", layout_of(0.05), backend="cpu", **SIZES)
    assert choice == Choice.all(implementation, f"predicted {in_words(of_density[0])} of the dense time{why}")
    choice = choose("auto", layout_of(0.3), backend="cpu", **SIZES)  # a pass may be dense: its ratio is of what serves
    assert choice.reason == f"predicted {in_words(of_density[2])} of the dense time{why}"
    taken = choose("auto", layout_of(0.95), backend="cpu", **SIZES).passes
    assert taken == Passes(*(implementation if ratio < 0.9 else "dense" for ratio in of_density[-1]))
    # Arithmetic intensity depends on R alone: taller blocks are not slower at equal density.
    for tall, wide in zip(predicted(layout_of(0.1, block_shape=(64, 4))), of_density[1], strict=True):
        assert tall <= wide


@pytest.mark.parametrize("device_kind", [KIND, "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA L4",
                                         "NVIDIA GeForce RTX 4090", "NVIDIA Unheard-of"])  # fmt: skip
def test_auto_predicts_each_pass_on_gpus(device_kind):
    """A layer large enough that products and bandwidths count, not launches."""
    sizes = {"batch": 2048, "dtype": "bfloat16"}
    densities = (0.02, 0.05, 0.1, 0.3, 0.9)
    predicted = [ratios_of(layout_of(d), "gpu", device_kind, **sizes) for d in densities]
    tall = ratios_of(layout_of(0.1, block_shape=(64, 4)), "gpu", device_kind, **sizes)
    for i in range(3):
        ratios = [of_density[i] for of_density in predicted]
        assert ratios == sorted(ratios)
        assert ratios[0] < 0.9 < ratios[-1]
        assert tall[i] <= ratios[2]
    for density, ratios in zip(densities, predicted, strict=True):
        choice = choose("auto", layout_of(density), backend="gpu", device_kind=device_kind, **{**SIZES, **sizes})
        assert choice.passes == Passes(*("pallas" if ratio < 0.9 else "dense" for ratio in ratios))
        assert choice.reason == f"predicted {in_words(ratios)} of the dense time on {device_kind}"


def test_seconds_on_a_gpu_worked_by_hand():
    """4096^3, bfloat16, 16x16 blocks at 0.1 on an H200: 1.374e10 operations.

    Forward: 1/16 + 1/128 bytes of L2 for each, 966 MB at 5.5 TB/s and 85 % of that: 207 us and a launch. Input
    gradient: the scratch of 104,858 panel columns, written and read, 1,718 MB, and 67 MB, at 4.3 TB/s. Weight
    gradient: as forward with 128 columns. Dense: 1.374e11 operations at 80 % of the peak, and to unpack three passes
    over 33.6 MB.
    """
    layout = layout_of(0.1, (4096, 4096), (16, 16))
    layer = call_of(layout, geometry=matmul_geometry(4096), input_size=(1, 1), batch=4096, dtype="bfloat16")
    facts = device_facts(KIND)
    sparse = [round(s * 1e6) for s in gpu_sparse_seconds(layer, facts)]
    assert sparse == [209, 492, 211]
    assert [round(s * 1e6) for s in gpu_dense_seconds(layer, facts)] == [205, 205, 205]
    choice = on_h200("auto", layout, geometry=matmul_geometry(4096), input_size=(1, 1), batch=4096)
    assert choice.passes == Passes("dense", "dense", "dense")
    tall = layout_of(0.1, (4096, 4096), (32, 8))
    choice = on_h200("auto", tall, geometry=matmul_geometry(4096), input_size=(1, 1), batch=4096)
    assert choice.passes == Passes("pallas", "dense", "pallas")
    assert choice.implementation == "pallas, dense input gradient"


def test_a_pass_that_overflows_is_dense_and_the_others_are_not(monkeypatch, tmp_path):
    """The issue's layer: 73,728 panel columns over 4,096 positions of 8 examples are more than int32 counts."""
    geometry = ConvGeometry(512, (3, 3), (1, 1), ((1, 1), (1, 1)))
    layout, sizes = layout_of(0.5, (512, 4608), (16, 16)), {"geometry": geometry, "input_size": (64, 64), "batch": 8}
    with pytest.raises(NotImplementedError, match="an input gradient whose scratch has 2415919104 elements for 8 exa"):
        on_h200("pallas", layout, **sizes)
    assert on_h200("pallas", layout_of(0.1, (512, 4608), (16, 16)), **sizes) == Choice.all("pallas", "asked for")
    # At 0.5 the model takes it nowhere; where a table says that it is fast, it is taken but for that pass.
    assert "pallas" not in on_h200("auto", layout, **sizes).passes
    write_table(monkeypatch, tmp_path / "table.json", layout, result("pallas", 0.5), result("dense", 1.0), **sizes)
    assert on_h200("auto", layout, **sizes).passes == Passes("pallas", "dense", "pallas")


def test_device_facts_by_name():
    known = ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "NVIDIA H200"]
    assert len({device_facts(kind) for kind in known} - {GENERIC}) == len(known)
    assert device_facts("NVIDIA L40S") == device_facts("NVIDIA RTX 2000 Ada Generation") == GENERIC
    assert device_facts("Tesla V100-SXM2-16GB") is device_facts("Tesla T4") is None
    assert choose("auto", layout_of(0.05), backend="gpu", device_kind="Tesla T4", **SIZES) == Choice.all(
        "dense", "no sparse kernel for Tesla T4"
    )


def test_auto_says_why_it_is_dense_elsewhere():
    assert choose("auto", layout_of(0.05), backend="tpu", **SIZES) == Choice.all("dense", "no sparse kernel for tpu")


def test_auto_asks_for_the_backend_in_use(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sizes = {"geometry": matmul_geometry(2304), "input_size": (1, 1), "batch": 4}
    assert choose("auto", layout_of(0.05), **sizes).reason == "no sparse kernel for tpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("pallas", layout_of(0.05), **sizes) == Choice.all("pallas", "asked for")


def test_what_the_kernels_cannot_serve_falls_through_to_dense():
    tall = layout_of(0.05, block_shape=(256, 4))
    assert on_h200("auto", tall, batch=2048) == Choice.all("dense", "R=256 rows in a block")
    assert on_h200("auto", layout_of(0.02), batch=2048, dtype="float64") == Choice.all("dense", "dtype float64")


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGHEST, ("default", "float32")])
def test_float32_at_highest_precision_falls_through_to_dense_above_64_rows(precision):
    layout, sizes = layout_of(0.02, block_shape=(128, 4)), {"batch": 2048, "dtype": "float32"}
    assert on_h200("auto", layout, **sizes).implementation == "pallas"
    exact = Choice.all("dense", "float32 at highest precision with R=128, more than 64")
    assert on_h200("auto", layout, **sizes, precision=precision) == exact
    assert on_h200("auto", layout, **{**sizes, "dtype": "bfloat16"}, precision=precision).implementation == "pallas"
    with jax.default_matmul_precision("highest"):
        assert on_h200("auto", layout, **sizes) == exact


@pytest.mark.parametrize(
    ("implementation", "backend", "rows", "words"),
    [
        ("pallas", "cpu", 32, "it needs a GPU and this process computes on the cpu; use auto, xla or dense"),
        ("triton", "tpu", 32, "it needs a GPU and this process computes on the tpu"),
        ("triton", "gpu", 32, r"jax_triton is not installed; pip install '.\[triton\]'"),
        ("pallas", "gpu", 256, "R=256 rows in a block; the GPU kernels take 128 at the most; use auto or dense"),
    ],
)
def test_a_name_that_cannot_serve_is_refused(monkeypatch, implementation, backend, rows, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    layout = layout_of(0.1, block_shape=(rows, 8))
    with pytest.raises(NotImplementedError, match=words) as caught:
        choose(implementation, layout, backend=backend, **SIZES)
    assert str(caught.value).startswith(f"implementation='{implementation}' cannot compute a layer of 256x2304, 3x3/1")
    assert "\n" not in str(caught.value)


def test_a_layer_refuses_where_it_is_traced():
    layer = SparseDense(32, density=0.5, implementation="pallas")
    with pytest.raises(NotImplementedError, match="implementation='pallas' cannot compute a layer of 32x64, batch 2"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 64)))


def test_an_empty_batch_is_dense_and_divides_nothing():
    sizes = {"geometry": matmul_geometry(2304), "input_size": (1, 1), "batch": 0}
    for backend in ("cpu", "gpu", "tpu"):
        assert choose("auto", layout_of(0.05), backend=backend, **sizes) == Choice.all("dense", "an empty batch")
    assert choose("xla", layout_of(0.05), **sizes) == Choice.all("xla", "asked for")
    empty = call_of(layout_of(0.05), **sizes, dtype="float32")
    for backend, kind in (("cpu", "cpu"), ("gpu", KIND)):
        assert min(map(min, predicted_ratios(empty, backend, kind).values())) > 0


def test_a_choice_that_was_made_is_taken_as_it_is():
    choice = Choice.all("pallas", "tuned", TILES)
    assert choose(choice, layout_of(0.05), **SIZES) is choice
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        Choice.all("cuda", "asked for")
    with pytest.raises(ValueError, match='implementation="auto" is no choice'):
        Choice.all("auto", "asked for")
    layout = random_layout(jax.random.key(0), (8, 12), block_shape=(4, 3), num_blocks=3)
    x, blocks = jnp.ones((2, 12)), jnp.ones((3, 4, 3))
    traced = jax.make_jaxpr(lambda: sparse_matmul(x, blocks, layout, implementation=Choice.all("xla", "tuned")))()
    assert "shuffled_block_product" in str(traced)
    assert "while[" in str(traced)  # over pieces
    traced = jax.make_jaxpr(lambda: sparse_matmul(x, blocks, layout, implementation=Choice.all("dense", "tuned")))()
    assert "while[" not in str(traced)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="implementation='cuda' is unknown; choose one of auto, native, xla, dense, "):
        choose("cuda", layout_of(0.1), **SIZES)
    assert set(IMPLEMENTATIONS) == {"auto", "native", "pallas", "triton", "xla", "dense", "reference", "portable"}


def test_without_a_batch_or_a_device_the_choice_serves_all():
    (batch,) = jax.export.symbolic_shape("b")
    with compiling_for_any():
        anywhere = [choose("auto", layout_of(density), **SIZES) for density in (0.05, 0.95)]
    of_any_batch = [choose("auto", layout_of(d), backend="gpu", **{**SIZES, "batch": batch}) for d in (0.05, 0.95)]
    for what, choices in (("any platform", anywhere), ("a batch of any size", of_any_batch)):
        assert [choice.implementation for choice in choices] == ["portable", "dense"]
        reason = rf"for {what}: predicted \d\.\d\d of the dense time on a CPU"
        assert re.fullmatch(f"{reason}, dense elsewhere", choices[0].reason)
        assert re.fullmatch(reason, choices[1].reason)
    for name in ("xla", "dense", "reference", "portable"):
        assert choose(name, layout_of(0.1), **{**SIZES, "batch": batch}) == Choice.all(name, "asked for")
    for name in ("pallas", "triton"):
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot .* for a batch of any size: "):
            choose(name, layout_of(0.1), backend="gpu", **{**SIZES, "batch": batch})


def test_a_measured_layer_takes_the_winner_and_its_tiles(monkeypatch, tmp_path):
    layout = layout_of(0.9)  # no model would take the sparse product
    results = result("pallas", 4.1e-5, TILES), result("triton", 4e-5, KernelTiles()), result("dense", 1e-4)
    write_table(monkeypatch, tmp_path / "table.json", layout, *results)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # triton is skipped
    assert on_h200("auto", layout) == Choice.all("pallas", f"tuned: 0.41 of dense on {KIND}", TILES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert on_h200("auto", layout) == Choice.all("triton", f"tuned: 0.40 of dense on {KIND}", KernelTiles())
    assert on_h200("pallas", layout) == Choice.all("pallas", "asked for", TILES)
    assert on_h200("auto", layout, dtype="float32").reason.startswith("predicted ")
    other = choose("auto", layout, backend="gpu", device_kind="NVIDIA L4", **SIZES, dtype="bfloat16")
    assert other.reason.startswith("predicted ")


def test_a_measured_layer_that_is_slower_stays_dense(monkeypatch, tmp_path):
    layout = layout_of(0.02)
    results = result("pallas", 1.31e-4, TILES), result("dense", 1e-4)
    write_table(monkeypatch, tmp_path / "table.json", layout, *results)
    assert on_h200("auto", layout) == Choice.all("dense", f"tuned: pallas takes 1.31 of dense on {KIND}")
    write_table(monkeypatch, tmp_path / "table.json", layout, result("triton", 1e-5), result("dense", 1e-4))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = on_h200("auto", layout)
    assert choice.implementation == "dense"
    assert choice.reason.endswith("; triton: jax_triton is not installed")


def test_each_pass_takes_its_own_winner_with_its_tiles(monkeypatch, tmp_path):
    mine = KernelTiles(Tiles(256), Tiles(64), Tiles(32, 64)), KernelTiles(Tiles(16), Tiles(32), None)
    results = (
        result("pallas", (1e-5, 3e-5, 2e-5), mine[0]),
        result("triton", (2e-5, 1e-5, 3e-5), mine[1]),
        result("dense", (3e-5, 2e-5, 1e-5)),
    )
    write_table(monkeypatch, tmp_path / "table.json", layout_of(0.1), *results)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    choice = on_h200("auto", layout_of(0.1))
    assert choice.passes == Passes("pallas", "triton", "dense")
    assert choice.tiles == KernelTiles(Tiles(256), Tiles(32), None)
    assert choice.reason == f"tuned: 0.33 / 0.50 / 2.00 of dense on {KIND}"


def test_the_device_to_compile_for_can_be_given():
    layer = SparseDense(4096, density=0.1, block_shape=(64, 4))
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    for kind, wanted in ((KIND, "pallas"), ("Tesla T4", "dense")):
        with compiling_for("gpu", kind), record_choices() as choices:
            variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        assert choices[()].passes.forward == wanted
        assert [node.index.entries for node in nodes(variables["topology"]).values()] == [entries_for("gpu")]
    with record_choices() as choices:
        jax.eval_shape(layer.init, jax.random.key(0), x)
    assert "pallas" not in choices[()].passes
    with (
        pytest.raises(ValueError, match="backend='cuda' is none of jax's; give one of cpu, gpu, tpu"),
        compiling_for("cuda", KIND),
    ):
        pass
    with pytest.raises(ValueError, match="backend='cuda' is none of jax's"):
        with_index(variables["topology"], "cuda")


def test_a_layer_nearby_is_scaled_by_the_model(monkeypatch, tmp_path):
    """Measured at density 0.1, asked for at 0.12 and twice the batch; at 0.3 the measurement says nothing."""
    measured, asked = layout_of(0.1), layout_of(0.12)
    write_table(monkeypatch, tmp_path / "table.json", measured, result("pallas", 3e-5, TILES), result("dense", 1e-4))
    here, there = (ratios_of(layout, "gpu", KIND, "bfloat16") for layout in (asked, layout_of(0.1)))
    text = " / ".join(f"{0.3 * a / b:.2f}" for a, b in zip(here, there, strict=True))
    choice = on_h200("auto", asked)
    assert choice.implementation == "pallas"
    assert choice.tiles == TILES
    assert choice.reason == f"tuned on a layer nearby: {text} of dense on {KIND}"
    assert on_h200("auto", layout_of(0.3)).reason.startswith("predicted ")
    assert on_h200("auto", layout_of(0.1, block_shape=(16, 16))).reason.startswith("predicted ")
    assert on_h200("auto", layout_of(0.1, block_shape=(32, 16))).tiles == TILES  # C is nothing to the kernels


def test_a_table_of_the_user_serves_a_cpu(monkeypatch, tmp_path):
    layout = layout_of(0.95)
    results = result("xla", 2e-3), result("dense", 4e-3)
    write_table(monkeypatch, tmp_path / "cpu.json", layout, *results, device_kind="cpu", dtype="float32")
    assert choose("auto", layout, backend="cpu", **SIZES) == Choice.all("xla", "tuned: 0.50 of dense on cpu")


def test_a_broken_table_is_named(monkeypatch, tmp_path):
    (tmp_path / "table.json").write_text("{")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "table.json"))
    with pytest.raises(ValueError, match=r"table\.json is no tuned table"):
        choose("auto", layout_of(0.1), backend="cpu", **SIZES)
    assert choose("xla", layout_of(0.1), backend="cpu", **SIZES).implementation == "xla"


class Model(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        x = SparseConv(16, (3, 3), name="stem")(x)
        x = SparseConv(32, (3, 3), density=0.2, implementation=self.implementation, name="conv")(x)
        return SparseDense(16, density=0.5, implementation="reference", name="head")(x)


def test_a_layer_chooses_once(monkeypatch):
    asked = []
    monkeypatch.setattr("dsb_jax.ops.api.choose", lambda *args, **sizes: asked.append(1) or choose(*args, **sizes))
    model, x = Model("auto"), jnp.zeros((2, 4, 4, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    asked.clear()
    jax.eval_shape(model.apply, variables, x)
    assert len(asked) == 2  # of its sparse layers


@pytest.mark.parametrize("implementation", ["xla", "auto"])
def test_choices_are_recorded_by_path_while_tracing(implementation):
    def trace():
        jax.eval_shape(Model(implementation).init, jax.random.key(0), jnp.zeros((2, 4, 4, 3)))

    record(("outside",), Choice.all("xla", "nobody listens"))
    with record_choices() as choices:
        trace()
        with record_choices() as inner:
            pass
    trace()
    assert inner == {}
    assert set(choices) == {("stem",), ("conv",), ("head",)}
    assert choices["stem",] == Choice.all("dense", "a dense layer")
    assert choices["head",] == Choice.all("reference", "asked for")
    if implementation == "xla":
        assert choices["conv",] == Choice.all("xla", "asked for")
    else:
        assert choices["conv",].implementation != "auto"
        assert choices["conv",].reason.startswith(("predicted ", "no sparse kernel for "))
