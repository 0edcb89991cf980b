"""`python -m experiments.tune`: the table it writes is the one that "auto" reads; what fails is left out, and said."""

import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.linen import SparseConv
from dsb_jax.ops import record_choices
from dsb_jax.ops import tuning as tuned
from dsb_jax.ops.cpu_model import available_cores
from dsb_jax.ops.dispatch import unsupported_reason
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.native import loading
from dsb_jax.ops.tuning import Result
from dsb_jax.training.build import build
from dsb_jax.training.config import Config
from experiments import tune, tune_layer
from pallas_kernels import REFERENCE, ConvGeometry, Kernels, matmul_geometry
from pallas_kernels.interface import Passes
from pallas_kernels.kernel_index import derive
from pallas_kernels.tiles import KernelTiles, Tiles
from tests.conftest import make_layout
from tests.test_programs import call_here

ROOT = Path(__file__).parent.parent
SIZES = {"block_shape": (4, 2), "num_blocks": 8, "batch": 3, "dtype": "float32"}
LAYER = LayerCall.of(8, ConvGeometry(4, (3, 3), (1, 1), ((1, 1), (1, 1))), input_size=(4, 4), **SIZES)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != tuned.VARIABLE}
    return subprocess.run(
        [sys.executable, "-m", "experiments.tune", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_the_table_is_what_auto_reads_and_the_program_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cpu.json"
    flags = (
        "--models=",
        "--shapes=16x8x3x3@4x4x2,32x16x3",
        "--block_shapes=4x2,64x64",
        "--rounds=1",
        f"--table={path}",
    )
    first = call(*flags, "--sparsities=0.5")
    assert first.returncode == 0, first.stderr
    assert "16x72, 3x3/1 over 4x4, batch 2, float32, 4x2 blocks, density 0.5: " in first.stdout
    table = tuned.load(path)
    assert table.device_kind == "cpu"
    assert table.versions["jax"] == jax.__version__
    assert table.command == (
        "python -m experiments.tune --models= --shapes=16x8x3x3@4x4x2,32x16x3 --sparsities=0.5 "
        "--block_shapes=4x2,64x64 --rounds=1"
    )
    assert [layer.spec.shape for layer in table.entries] == [(16, 72), (32, 16)]  # no layer holds blocks of 64x64
    for results in table.entries.values():
        native = {"native"} if loading.unavailable_reason() is None else set()
        assert {result.implementation for result in results} == {"dense", "xla"} | native

    # A second program, in this process, adds to the table, does nothing twice, and ends at its limit.
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    call_here(tune, *flags, "--sparsities=0.5,0.8", "--limit_s=0")
    told = capsys.readouterr().out
    assert "4 layers for cpu, 2 of them in the table" in told
    assert "2 left after --limit_s=0; the same command goes on with\n  16x72, 3x3/1" in told
    assert tuned.load(path).entries == table.entries

    # The layer of a model finds its measurement, whatever it says.
    (key, _), *_ = table.entries.items()
    told = table._replace(entries={key: (Result("xla", Passes(*[0.125] * 3)), Result("dense", Passes(*[1.0] * 3)))})
    tuned.write(path, told)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    layer = SparseConv(16, (3, 3), density=0.5, block_shape=(4, 2))
    with record_choices() as choices:
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 4, 4, 8)))
    assert choices[()].reason == "tuned: 0.12 of dense on cpu"


def test_the_layers_of_a_model_are_those_that_it_looks_up(monkeypatch):
    settings = {"models": ["resnet18"], "shapes": [], "sparsities": ["0.9"], "block_shapes": ["32x8"]}
    monkeypatch.setattr(tune, "FLAGS", types.SimpleNamespace(**settings, batch_size=4, dtype="bfloat16"))
    asked: list[LayerCall] = []
    monkeypatch.setattr(tuned, "lookup", lambda layer, device_kind: asked.append(layer))
    config = Config(
        dataset="random", input_shape=(32, 32, 3), model="resnet18", block_shape=(32, 8), batch_size=4,
        dtype="bfloat16", label_smoothing=0.125,  # so that no other test has built it before
    )  # fmt: skip
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    jax.eval_shape(build(config).model.init, jax.random.key(0), images)
    # A plan may move a block from one layer to another.
    wanted, asked_for = (
        {layer.with_density(round(layer.density, 1)) for layer in layers if layer.batch == 4}
        for layers in (tune.wanted_layers(), asked)
    )
    assert wanted == asked_for
    assert len(wanted) > 8


def test_a_mistake_ends_in_a_short_message(tmp_path):
    path = tmp_path / "new.json"
    result = call()
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "--table=FILE is needed" in result.stderr
    with pytest.raises(ValueError, match="no layer of models= shapes=16x16x2 can hold") as caught:
        call_here(tune, f"--table={path}", "--models=", "--shapes=16x16x2")
    assert len(str(caught.value).splitlines()) == 1
    assert not path.exists()


def test_only_a_table_of_its_own_kind_is_gone_on_with(tmp_path):
    table = tuned.Table("NVIDIA H200", tune.versions(), "first", {})
    path = tmp_path / "table.json"
    tuned.write(path, table)
    twice = tune.open_table(path, "NVIDIA H200", "second")
    assert twice == table._replace(command="first && second")
    tuned.write(path, twice)
    assert tune.open_table(path, "NVIDIA H200", "first") == twice
    with pytest.raises(
        ValueError, match=r"table\.json was measured with device NVIDIA H200, this is cpu; give another"
    ):
        tune.open_table(path, "cpu", "third")
    tuned.write(path, table._replace(versions={"jax": "0.1"}))
    with pytest.raises(ValueError, match=r"table\.json was measured with versions \{'jax': '0.1'\}, this is "):
        tune.open_table(path, "NVIDIA H200", "third")
    with pytest.raises(ValueError, match=r"there is no folder .*none; make it first"):
        tune.open_table(tmp_path / "none" / "table.json", "cpu", "third")
    path.write_text(json.dumps({"results": []}))
    with pytest.raises(ValueError, match=r"table\.json is no tuned table"):
        tune.open_table(path, "cpu", "third")


@pytest.mark.parametrize("batch", [3, 16 * available_cores()])  # native takes some with the batch first
def test_candidates_agree_on_linear_layers(batch):
    linear = LayerCall.of(8, matmul_geometry(36), input_size=(1, 1), **SIZES | {"batch": batch})
    example = tune_layer.Example(linear, 1)
    right = {name: example.result("dense", call) for name, call in example.passes("dense", None).items()}
    for implementation in tune_layer.SPARSE_IMPLEMENTATIONS["cpu"]:
        if unsupported_reason(implementation, linear, "cpu") is None:
            for name, call in example.passes(implementation, None).items():
                assert tune_layer.error_of(example.result(implementation, call), right[name]) < 1e-5


def test_repeats_compute_the_same_as_once():
    for implementation in ("dense", "reference"):
        once, thrice = (tune_layer.Example(LAYER, n).passes(implementation, None) for n in (1, 3))
        for name, call in once.items():
            np.testing.assert_allclose(call(), thrice[name](), rtol=1e-5, atol=1e-5)


def test_repeats_are_repeated():
    """Each pass is computed anew, and NaN in a result does no harm."""
    count = []

    def counted(x, index):
        jax.debug.callback(lambda: count.append(1))
        return x / 0 + index.out_idx[0, 0]

    layout = make_layout(0, (4, 4), (2, 2), (1, 1))
    index = layout.index._replace(derived=derive(layout.index, 4, ["row_place"]))
    jax.block_until_ready(tune_layer.repeated(counted, 5)(jnp.zeros(3), index))
    jax.effects_barrier()
    assert len(count) == 5


def test_tiles_are_tuned_pass_by_pass():
    """Kernels of which each pass is quick with its own tiles, and fails with some others."""
    best = KernelTiles(Tiles(64), Tiles(32), Tiles(16))

    def factory(tiles):
        def slow(name):
            function, mine = getattr(REFERENCE, name), getattr(tiles, name)

            def run(*arguments, **options):
                if mine == Tiles(128):
                    raise RuntimeError("out of shared memory\nand more")
                result = function(*arguments, **options)
                delay = 0 if mine == getattr(best, name) else 300_000
                return result + 0 * jax.lax.fori_loop(0, delay, lambda i, a: jnp.sin(a + i), jnp.float32(0))

            return run

        return Kernels(*map(slow, Kernels._fields))

    example = tune_layer.Example(LAYER, 1)
    candidates = Passes(*[[Tiles(size) for size in (128, 64, 32, 16)]] * 3)
    assert tune_layer.tune_tiles(example, factory, 1, candidates) == best
    with pytest.raises(tune_layer.Untunable, match=r"^no tiles serve its forward: RuntimeError: out of shared memory$"):
        tune_layer.tune_tiles(example, factory, 1, Passes(*[[Tiles(128)]] * 3))


def test_what_fails_or_is_wrong_is_left_out_and_said(monkeypatch):
    said: list[str] = []
    options = {"rounds": 1, "repeats": 1, "tiles": "each", "known": {}, "say": said.append}
    monkeypatch.setattr(tune_layer, "SPARSE_IMPLEMENTATIONS", {"cpu": ("xla", "reference", "pallas")})
    measured = tune_layer.measure(LAYER, "cpu", **options)
    assert {result.implementation for result in measured} == {"dense", "xla", "reference"}
    assert [text.split(": ", 1)[1] for text in said] == [
        "pallas left out: it needs a GPU and this process computes on the cpu; use auto, xla or dense"
    ]
    assert list(measured) == sorted(measured, key=lambda result: sum(result.seconds))

    right = tune_layer.Example.passes

    def wrong(self, implementation, tiles):
        calls = right(self, implementation, tiles)
        if implementation == "xla":
            run = calls["input_gradient"]
            calls["input_gradient"] = functools.partial(jax.jit(lambda *args: run.func(*args) * 1.1), *run.args)
        return calls

    monkeypatch.setattr(tune_layer.Example, "passes", wrong)
    measured = tune_layer.measure(LAYER, "cpu", **options)
    assert {result.implementation for result in measured} == {"dense", "reference"}
    assert said[1].endswith("xla left out: its input_gradient is off by 0.1 of its norm")
