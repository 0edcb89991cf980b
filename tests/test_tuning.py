"""Tables of measured layers: what is written is read, what is broken is named, the user's come first."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsb_jax.layout import max_blocks
from dsb_jax.ops import tuning as tuned
from dsb_jax.ops.layer_call import LayerCall
from dsb_jax.ops.tuning import Result, Table, load, lookup, write
from pallas_kernels.interface import ConvGeometry, Passes
from pallas_kernels.tiles import KernelTiles, Tiles

SIZES = {
    "out": 512, "in_channels": 512, "kernel_size": (3, 3), "strides": (1, 1), "padding": ((1, 1), (1, 1)),
    "input_size": (4, 4), "batch": 128, "dtype": "bfloat16", "block_shape": (32, 8), "density": 0.1,
}  # fmt: skip


def layer_of(**changes):
    """The key of a layer, from what a table says of it."""
    sizes = {**SIZES, **changes}
    geometry = ConvGeometry(*(sizes.pop(name) for name in ("in_channels", "kernel_size", "strides", "padding")))
    out, density = sizes.pop("out"), sizes.pop("density")
    return LayerCall.of(out, geometry, num_blocks=1, **sizes).with_density(density)


def result(implementation, seconds, tiles=None):
    """One that takes as long in each pass."""
    return Result(implementation, Passes(seconds, seconds, seconds), tiles)


LAYER = layer_of()
TILES = KernelTiles(forward=Tiles(256, 64, 8, 2), weight_gradient=Tiles(32))
RESULTS = (result("pallas", 1.2e-4, TILES), result("dense", 2.9e-4))
TABLE = Table("NVIDIA H200", {"jax": "0.12.0"}, "python -m experiments.tune", {LAYER: RESULTS})


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """An empty home, no table of the package, no variable."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuned.Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    return tmp_path


def of_speed(seconds, device_kind="NVIDIA H200", layer=LAYER):
    return Table(device_kind, {}, "", {layer: (result("pallas", seconds), result("dense", 1.0))})


def test_round_trip(tmp_path):
    linear = layer_of(kernel_size=(1, 1), padding=((0, 0), (0, 0)), input_size=(1, 1))
    odd = layer_of(padding=((0, -1), (2, 1)), dtype="float32", density=0.33)
    table = TABLE._replace(entries={LAYER: RESULTS, linear: (result("dense", 1.0),), odd: RESULTS})
    path = tmp_path / "table.json"
    write(path, table)
    assert load(path) == table
    assert linear.is_linear
    assert not odd.is_linear
    write(tmp_path / "again.json", load(path))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    write(path, table._replace(entries={}))
    assert load(path).entries == {}  # a file that was replaced is read again


def test_sizes_worked_by_hand():
    """512 filters of 512 x 3 x 3 over 4x4 images: 16 positions each; 10 % of 512 * 4608 weights in blocks of 256."""
    assert LAYER.spec.shape == (512, 4608)
    assert LAYER.positions == 16 * 128
    assert LAYER.spec.num_blocks == 922
    assert LAYER.density == 922 * 256 / (512 * 4608)
    assert (LAYER.input_elements, LAYER.output_elements) == (512 * 16 * 128, 512 * 16 * 128)
    assert str(LAYER) == "512x4608, 3x3/1 over 4x4, batch 128, bfloat16, 32x8 blocks, density 0.1"
    near, far = (LAYER.with_density(density) for density in (0.1004, 0.106))
    assert near.spec.num_blocks == 925
    assert near.rounded() == LAYER.rounded() == LAYER
    assert far.rounded() != LAYER
    assert tuned.file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


SECONDS = {"forward": 1.0, "input_gradient": 2.0, "weight_gradient": 3.0}


def body():
    return {
        "format": tuned.FORMAT, "device_kind": "NVIDIA H200", "versions": {}, "command": "",
        "entries": [
            {
                "layer": dict(SIZES),
                "results": [{"implementation": "dense", "seconds": dict(SECONDS), "tiles": None}],
            }
        ],
    }  # fmt: skip


def broken(path, value):
    """The JSON of a good table with the entry at `path` replaced, or removed if `value` is `del`."""
    whole = body()
    *way, last = path
    target = whole
    for key in way:
        target = target[key]
    if value is del_:
        del target[last]
    else:
        target[last] = value
    return json.dumps(whole)


del_ = object()
LAYER_PATH, RESULT_PATH = ("entries", 0, "layer"), ("entries", 0, "results")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"results": []}',
        "\xff",
        broken(("format",), "dsb_jax tuned 1"),
        broken(("device_kind",), 3),
        broken(("versions",), [1]),
        broken(("command",), del_),
        broken(("entries",), {}) .replace('"entries": {}', '"entries": 1'),
        broken((*LAYER_PATH, "out"), 0),
        broken((*LAYER_PATH, "out"), 5.5),
        broken((*LAYER_PATH, "strides"), [1]),
        broken((*LAYER_PATH, "padding"), [[1, 1]]),
        broken((*LAYER_PATH, "kernel_size"), [9, 9]),  # larger than the image
        broken((*LAYER_PATH, "density"), "high"),
        broken((*LAYER_PATH, "density"), del_),
        broken((*LAYER_PATH, "speed"), 1),
        broken(RESULT_PATH, []),
        broken((*RESULT_PATH, 0, "seconds"), 1.0),
        broken((*RESULT_PATH, 0, "seconds"), {"forward": 1.0}),
        broken((*RESULT_PATH, 0, "seconds"), {**SECONDS, "backward": 1.0}),
        broken((*RESULT_PATH, 0, "seconds", "forward"), 0),
        broken((*RESULT_PATH, 0, "seconds", "forward"), float("nan")),
        broken((*RESULT_PATH, 0, "tiles"), {"forward": {"positions": 3}}),
        broken((*RESULT_PATH, 0, "tiles"), {"backward": {}}),
        broken((*RESULT_PATH, 0, "implementation"), "pallas"),  # dense is missing
    ],
)  # fmt: skip
def test_a_broken_or_foreign_file_is_named_in_one_line(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text, encoding="latin-1")
    for _ in range(2):  # a failure is not cached as a success
        with pytest.raises(
            ValueError, match=r"table\.json is no tuned table .*; delete it and write it anew"
        ) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(body()))
    assert load(path).entries == {LAYER: (Result("dense", Passes(1.0, 2.0, 3.0)),)}


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nothing\.json cannot be read: No such file"):
        load(tmp_path / "nothing.json")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"nothing\.json cannot be read"):
        lookup(LAYER, "cpu")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write(path, TABLE)
    before = path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, of_speed(0.5))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_the_users_tables_come_before_the_shipped_one(home, monkeypatch):
    kind = "NVIDIA H200"
    assert lookup(LAYER, kind) is None
    named, own, shipped = home / "named.json", tuned.user_path(kind), tuned.SHIPPED / "nvidia_h200.json"
    assert own == home / "home" / ".cache" / "dsb_jax" / "nvidia_h200.json"
    for folder in (own.parent, shipped.parent):
        folder.mkdir(parents=True)
    for path, seconds in ((shipped, 0.3), (own, 0.2), (named, 0.1)):
        write(path, of_speed(seconds))
        if path == named:
            monkeypatch.setenv(tuned.VARIABLE, str(named))
        assert lookup(LAYER, kind).results[0].seconds.forward == seconds
    write(named, of_speed(0.1, device_kind="cpu"))  # of another device: passed over
    assert lookup(LAYER, kind).results[0].seconds.forward == 0.2
    assert lookup(LAYER, "cpu").results[0].seconds.forward == 0.1
    # An exact entry of a later table is worth more than one nearby of an earlier one.
    write(own, of_speed(0.2, layer=layer_of(batch=100)))
    assert lookup(LAYER, kind) == tuned.Found(LAYER, load(shipped).entries[LAYER], exact=True)


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"batch": 64}, True),
        ({"batch": 40}, False),
        ({"density": 0.13, "out": 700}, True),
        ({"density": 0.15, "out": 1024}, False),
        ({"padding": ((0, 2), (1, 1))}, True),
        ({"block_shape": (32, 16)}, True),
        ({"block_shape": (16, 16)}, False),
        ({"dtype": "float32"}, False),
        ({"strides": (2, 2), "input_size": (8, 8)}, False),
        ({"kernel_size": (1, 1), "padding": ((0, 0), (0, 0))}, False),
        ({"batch": 0}, False),
    ],
)
def test_which_layers_are_near(home, monkeypatch, changes, near):
    write(home / "table.json", TABLE)
    monkeypatch.setenv(tuned.VARIABLE, str(home / "table.json"))
    found = lookup(layer_of(**changes), "NVIDIA H200")
    assert found == (tuned.Found(LAYER, RESULTS, exact=False) if near else None)


@given(
    out=st.integers(1, 70),
    in_=st.integers(1, 70),
    block_shape=st.sampled_from([(1, 1), (4, 2), (16, 16), (3, 5)]),
    share=st.floats(0, 1),
)
def test_rounding_is_done_once(out, in_, block_shape, share):
    """A key is its own key, whatever whole blocks make of two digits; the block count of a small layer is exact."""
    assume(block_shape[0] <= out and block_shape[1] <= in_)
    most = max_blocks((out, in_), block_shape)
    sizes = {"block_shape": block_shape, "input_size": (1, 1), "batch": 3, "dtype": "float32"}
    call = LayerCall.of(out, ConvGeometry(in_), num_blocks=max(1, round(share * most)), **sizes)
    assert call.rounded().rounded() == call.rounded()
    if most <= 10:
        assert call.rounded() == call


def test_without_a_home_there_is_no_table_of_the_user(home, monkeypatch):
    """No HOME and no entry for the user; a home that does not exist, is a file, or has a name that is too long."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    (home / "file").touch()
    write(home / "named.json", of_speed(0.1))
    for where in (nobody, lambda: home / "nonexistent", lambda: home / "file", lambda: Path("/" + "x" * 5000)):
        monkeypatch.setattr(tuned.Path, "home", where)
        monkeypatch.delenv(tuned.VARIABLE, raising=False)
        assert lookup(LAYER, "NVIDIA H200") is None
        monkeypatch.setenv(tuned.VARIABLE, str(home / "named.json"))
        assert lookup(LAYER, "NVIDIA H200").results[0].seconds.forward == 0.1
    monkeypatch.setattr(tuned.Path, "home", nobody)
    assert tuned.user_path("cpu") is None


def test_a_home_of_somebody_else_is_passed_over(home, monkeypatch):
    path = tuned.user_path("NVIDIA H200")
    path.parent.mkdir(parents=True)
    write(path, of_speed(0.2))
    assert lookup(LAYER, "NVIDIA H200") is not None
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be root
    assert lookup(LAYER, "NVIDIA H200") is None


def test_the_nearest_of_several_is_taken(home, monkeypatch):
    table = TABLE._replace(entries={layer_of(density=d): (result("dense", d),) for d in (0.07, 0.1, 0.14)})
    write(home / "table.json", table)
    monkeypatch.setenv(tuned.VARIABLE, str(home / "table.json"))
    assert lookup(layer_of(density=0.123), "NVIDIA H200").layer == layer_of(density=0.14)


def test_shipped_tables_are_sound(monkeypatch):
    monkeypatch.undo()
    for path in tuned.SHIPPED.glob("*.json"):
        assert path.name == tuned.file_name(load(path).device_kind)
        assert load(path).command.startswith("python -m experiments.tune")
