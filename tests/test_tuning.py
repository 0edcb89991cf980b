"""Tables of measured layers: what is written is read, what is broken is named, the user's come first."""

import dataclasses
import json
import os

import pytest

from dsb_jax.ops import tuning as tuned
from dsb_jax.ops.tuning import LayerSizes, Result, Table, load, lookup, write
from pallas_kernels.tiles import KernelTiles, Tiles

LAYER = LayerSizes(512, 512, (3, 3), (1, 1), ((1, 1), (1, 1)), (4, 4), 128, "bfloat16", (32, 8), 0.1)
TILES = KernelTiles(forward=Tiles(256, 64, 8, 2), weight_gradient=Tiles(32))
RESULTS = (Result("pallas", 1.2e-4, TILES), Result("dense", 2.9e-4))
TABLE = Table("NVIDIA H200", {"jax": "0.12.0"}, "python -m experiments.tune", {LAYER: RESULTS})


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """An empty home, no table of the package, no variable."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuned.Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    return tmp_path


def of_speed(seconds, device_kind="NVIDIA H200", layer=LAYER):
    return Table(device_kind, {}, "", {layer: (Result("pallas", seconds), Result("dense", 1.0))})


def test_round_trip(tmp_path):
    linear = dataclasses.replace(LAYER, kernel_size=(1, 1), padding=((0, 0), (0, 0)), input_size=(1, 1))
    odd = dataclasses.replace(LAYER, padding=((0, -1), (2, 1)), dtype="float32", density=0.33)
    table = TABLE._replace(entries={LAYER: RESULTS, linear: (Result("dense", 1.0),), odd: RESULTS})
    path = tmp_path / "table.json"
    write(path, table)
    assert load(path) == table
    assert linear.is_linear
    assert not odd.is_linear
    write(tmp_path / "again.json", load(path))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    write(path, table._replace(entries={}))
    assert load(path).entries == {}  # a file that was replaced is read again


def test_results_are_read_fastest_first(tmp_path):
    write(tmp_path / "table.json", TABLE._replace(entries={LAYER: RESULTS[::-1]}))
    assert load(tmp_path / "table.json").entries[LAYER] == RESULTS


def test_sizes_worked_by_hand():
    """512 filters of 512 x 3 x 3 over 4x4 images: 16 positions each; 10 % of 512 * 4608 weights in blocks of 256."""
    assert LAYER.shape == (512, 4608)
    assert LAYER.positions == 16 * 128
    assert LAYER.num_blocks == 922
    assert str(LAYER) == "512x4608, 3x3/1 over 4x4, batch 128, bfloat16, 32x8 blocks, density 0.1"
    assert dataclasses.replace(LAYER, density=922 * 256 / (512 * 4608)).rounded() == LAYER
    assert tuned.file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


def body():
    return {
        "format": tuned.FORMAT, "device_kind": "NVIDIA H200", "versions": {}, "command": "",
        "entries": [
            {
                "layer": {**dataclasses.asdict(LAYER)},
                "results": [{"implementation": "dense", "seconds": 1.0, "tiles": None}],
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
        broken(("format",), "dsb_jax tuned 2"),
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
        broken((*RESULT_PATH, 0, "seconds"), 0),
        broken((*RESULT_PATH, 0, "seconds"), float("nan")),
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
    assert load(path).entries == {LAYER: (Result("dense", 1.0),)}


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
        assert lookup(LAYER, kind).results[0].seconds == seconds
    write(named, of_speed(0.1, device_kind="cpu"))  # of another device: passed over
    assert lookup(LAYER, kind).results[0].seconds == 0.2
    assert lookup(LAYER, "cpu").results[0].seconds == 0.1
    # An exact entry of a later table is worth more than one nearby of an earlier one.
    write(own, of_speed(0.2, layer=dataclasses.replace(LAYER, batch=100)))
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
    found = lookup(dataclasses.replace(LAYER, **changes), "NVIDIA H200")
    assert found == (tuned.Found(LAYER, RESULTS, exact=False) if near else None)


def test_the_nearest_of_several_is_taken(home, monkeypatch):
    table = TABLE._replace(
        entries={dataclasses.replace(LAYER, density=d): (Result("dense", d),) for d in (0.07, 0.1, 0.14)}
    )
    write(home / "table.json", table)
    monkeypatch.setenv(tuned.VARIABLE, str(home / "table.json"))
    assert lookup(dataclasses.replace(LAYER, density=0.123), "NVIDIA H200").layer.density == 0.14


def test_shipped_tables_are_sound(monkeypatch):
    monkeypatch.undo()
    for path in tuned.SHIPPED.glob("*.json"):
        assert path.name == tuned.file_name(load(path).device_kind)
        assert load(path).command.startswith("python -m experiments.tune")
