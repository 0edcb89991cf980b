"""Kernels are checked on the device before "auto" takes them; here the interpreter stands in for the device."""

import json
import warnings

import jax
import jax.numpy as jnp
import pytest

from dsb_jax.linen import SparseDense
from dsb_jax.ops import Choice, choose, record_choices, self_check, tuning
from dsb_jax.ops.self_check import PASSED, check, failure
from dsb_jax.ops.tuning import Result
from pallas_kernels import REFERENCE, matmul_geometry
from pallas_kernels.interface import Passes
from pallas_kernels.pallas_gpu import pallas_kernels
from pallas_kernels.tiles import KernelTiles, Tiles
from tests.test_dispatch import call_of, layout_of

KIND = "NVIDIA H200"
SIZES = {"geometry": matmul_geometry(2304), "input_size": (1, 1), "batch": 4096, "dtype": "bfloat16"}
SMALL = Tiles(positions=64, columns=32)


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    """A process on an H200 of somebody without tables; `counted` says which checks were made."""
    counted = []

    def counting(kernels, *case):
        counted.append(case)
        return PASSED

    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning.Path, "home", lambda: tmp_path)
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setattr(self_check, "_found", {})
    monkeypatch.setattr(self_check, "check", counting)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), {"device_kind": KIND})])
    return counted


@pytest.fixture
def one_case(monkeypatch):
    """The linear layer alone, which compiles soonest."""
    monkeypatch.setattr(self_check, "_CASES", dict([*self_check._CASES.items()][:1]))


def another_process(monkeypatch):
    monkeypatch.setattr(self_check, "_found", {})


def file_of(tmp_path):
    return tmp_path / ".cache" / "dsb_jax" / "checks_nvidia_h200.json"


@pytest.mark.parametrize("name", ["forward", "input_gradient", "weight_gradient"])
def test_a_wrong_pass_is_found(name, one_case):
    """And right kernels pass. (Here the specification stands in, which compiles sooner than the interpreter.)"""

    def wrong(*arrays, **options):
        result = getattr(REFERENCE, name)(*arrays, **options)
        return result.at[(0,) * result.ndim].add(1.0)

    assert check(REFERENCE, 16, "float32", True) == PASSED
    outcome = check(REFERENCE._replace(**{name: wrong}), 16, "float32", True)
    assert outcome.startswith(f"{name} of a linear layer is off by ")
    assert outcome.endswith("tolerated 2e-05")


def test_the_kernels_of_the_interpreter_pass():
    kernels = pallas_kernels(KernelTiles(SMALL, SMALL, SMALL), interpret=True)
    assert check(kernels, 16, "bfloat16", False) == PASSED


def test_what_a_kernel_raises_is_its_failure():
    def broken(*arrays, **options):
        raise RuntimeError("out of registers\nand more")

    assert check(REFERENCE._replace(forward=broken), 16, "float32", False) == "RuntimeError: out of registers"


def test_each_case_is_checked_once_and_remembered(device, monkeypatch, tmp_path):
    for _ in range(2):
        assert failure("pallas", 32, "bfloat16", True, KIND) is None  # exact means nothing to bfloat16
        assert failure("pallas", 32, "float32", True, KIND) is None
        another_process(monkeypatch)
    assert device == [(32, "bfloat16", False), (32, "float32", True)]
    body = json.loads(file_of(tmp_path).read_text())
    assert body["checks"] == {"pallas R=32 bfloat16": PASSED, "pallas R=32 float32 exact": PASSED}
    assert body["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"checks"', '"Checks"'),
        lambda text: text.replace(self_check.FORMAT, "dsb_jax checks 0"),
        lambda text: text.replace(jax.__version__, "0.1"),
        lambda text: text.replace(KIND, "NVIDIA L4"),
    ],
)
def test_a_damaged_or_foreign_memory_is_made_anew(device, monkeypatch, tmp_path, damage):
    failure("pallas", 32, "bfloat16", False, KIND)
    whole = file_of(tmp_path).read_text()
    file_of(tmp_path).write_text(damage(whole))
    another_process(monkeypatch)
    assert failure("pallas", 32, "bfloat16", False, KIND) is None
    assert len(device) == 2
    assert file_of(tmp_path).read_text() == whole


def test_without_a_home_each_process_finds_out(device, monkeypatch, tmp_path):
    def nowhere():
        raise RuntimeError("no home")

    monkeypatch.setattr(tuning.Path, "home", nowhere)
    for _ in range(2):
        assert failure("pallas", 32, "bfloat16", False, KIND) is None
        another_process(monkeypatch)
    assert len(device) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning.Path, "home", lambda: tmp_path / "file")  # where no folder can be made
    with pytest.warns(UserWarning, match=r"what was checked on NVIDIA H200 is not remembered: .*Not a directory"):
        assert failure("pallas", 32, "bfloat16", False, KIND) is None


def test_auto_takes_what_passed_and_leaves_what_failed(device, monkeypatch, tmp_path):
    taken = choose("auto", layout_of(0.05), **SIZES)
    assert "pallas" in taken.passes
    assert device == [(32, "bfloat16", False)]
    monkeypatch.setattr(self_check, "check", lambda *_: "forward of a convolution is off by 1.0e+00, tolerated 1e-02")
    tall = layout_of(0.05, block_shape=(64, 4))
    with pytest.warns(UserWarning, match=r"pallas kernels for 64 rows of bfloat16 are wrong on NVIDIA H200 \(forward"):
        refused = choose("auto", tall, **SIZES)
    assert refused.passes == Passes("dense", "dense", "dense")
    assert refused.reason == (
        "pallas failed its check here: forward of a convolution is off by 1.0e+00, tolerated 1e-02"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert choose("auto", tall, **SIZES) == refused
        assert choose("auto", layout_of(0.05), **SIZES) == taken
        # Whoever asks by name is not checked, nor who asks for the model alone, or for a device that is not here.
        assert choose("pallas", tall, **SIZES) == Choice.all("pallas", "asked for")
        with record_choices(tuned=False):
            assert "pallas" in choose("auto", tall, **SIZES).passes
        assert "pallas" in choose("auto", tall, backend="gpu", device_kind=KIND, **SIZES).passes


def test_a_table_is_no_proof_of_a_right_kernel(device, monkeypatch, tmp_path):
    layer = call_of(layout_of(0.05), **SIZES).rounded()
    results = Result("pallas", Passes(1e-5, 1e-5, 1e-5)), Result("dense", Passes(1.0, 1.0, 1.0))
    tuning.write(tmp_path / "table.json", tuning.Table(KIND, {}, "", {layer: results}))
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "table.json"))
    assert choose("auto", layout_of(0.05), **SIZES).reason.startswith("tuned: ")
    assert len(device) == 1


def test_it_is_asked_while_a_model_is_traced(monkeypatch, one_case):
    """The check computes, inside of somebody's trace."""
    monkeypatch.setattr(self_check, "check", check)
    monkeypatch.setattr(self_check, "kernels_of", lambda name: REFERENCE)
    layer = SparseDense(4096, density=0.05, block_shape=(64, 4), param_dtype=jnp.float32)
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    with record_choices() as choices:
        jax.eval_shape(layer.init, jax.random.key(0), x)
    assert "pallas" in choices[()].passes
