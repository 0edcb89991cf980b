"""Pictures of layouts by hand and read back; single weights, Top-KAST, and checkpoints that have no masks."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.checkpoint import Checkpoints
from dsb_jax.layout import BlockLayout
from dsb_jax.paths import nodes, replace_at
from dsb_jax.training.build import build
from dsb_jax.training.checkpoints import abstract_state
from dsb_jax.training.config import Config
from experiments import layout_views, show_layout
from experiments.outcomes import read_adaptations
from tests.conftest import make_layout


def test_the_example_of_the_layout_by_hand():
    out_idx, in_idx, start = [[2, 0], [1, 3]], [[3, 1], [0, 2], [1, 2]], [0, 2, 3]
    layout = BlockLayout(*(np.array(a, np.int32) for a in (out_idx, in_idx, start)), (4, 4), (2, 2))
    blocks = (np.arange(1, 13) * np.tile([1, -1], 6)).reshape(3, 2, 2)
    layer, nan = layout_views.view("layer", layout, blocks), np.nan
    stored = layout_views.as_stored(layer)
    np.testing.assert_array_equal(stored, [[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    np.testing.assert_array_equal(
        layout_views.rows_in_groups(stored, layer), [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]]
    )
    np.testing.assert_array_equal(layout_views.panel_columns(layer), [[3, 1, 0, 2], [1, 2, -1, -1]])
    np.testing.assert_array_equal(
        layout_views.panels(layer), [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, nan, nan], [11, 12, nan, nan]]
    )
    assert show_layout.caption(layer) == (
        "layer: 4 x 4 (out x in), density 0.7500, 3 blocks of 2x2 in 2 row groups of 1 to 2, 0 empty groups"
    )


def single_weights(active):
    """The layout of 1x1 blocks at the True positions of a mask."""
    rows, cols = np.nonzero(active)
    start = np.searchsorted(rows, np.arange(len(active) + 1))
    arrays = (np.asarray(a, np.int32) for a in (np.arange(len(active))[:, None], cols[:, None], start))
    return BlockLayout(*arrays, active.shape, (1, 1))


@st.composite
def layers(draw):
    """Random layouts with empty and ragged groups, or of single weights: (view, |w| [out, in] by the definition)."""
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    out, in_ = draw(st.integers(1, 9)), draw(st.integers(2, 9))
    if draw(st.booleans()):
        active = rng.random((out, in_)) < 0.4
        active[rng.integers(out), rng.integers(in_)] = True
        layout = single_weights(active)
    else:
        rows, cols = draw(st.integers(1, out)), draw(st.integers(1, in_))
        groups, most = -(-out // rows), in_ // cols
        counts = [1] * groups if out % rows else draw(st.lists(st.integers(0, most), min_size=groups, max_size=groups))
        if not sum(counts):
            counts[-1] = 1
        layout = make_layout(seed, (out, in_), (rows, cols), tuple(counts))
    blocks = rng.uniform(0.5, 2, (layout.num_blocks, *layout.block_shape))
    out_idx, in_idx, start = (np.asarray(array) for array in (layout.out_idx, layout.in_idx, layout.group_start))
    weights = np.zeros((out, in_))
    for group in range(layout.num_groups):
        for block in range(start[group], start[group + 1]):
            for i, row in enumerate(out_idx[group]):
                if row < out:
                    weights[row, in_idx[block]] = blocks[block, i]
    return layout_views.view("layer", layout, -blocks), weights


@given(layers())
def test_the_pictures_read_back_are_the_weights(case):
    layer, weights = case
    np.testing.assert_array_equal(layout_views.as_stored(layer), weights > 0)
    assert layer.num_active == (weights > 0).sum()
    picture, columns, back = layout_views.panels(layer), layout_views.panel_columns(layer), np.zeros(layer.shape)
    for y, x in np.argwhere(np.isfinite(picture)):
        place = layer.out_idx.reshape(-1)[y], columns[y // layer.block_shape[0], x]
        assert back[place] == 0  # no position is drawn twice
        back[place] = picture[y, x]
    np.testing.assert_array_equal(back, weights)
    # The rows of a group are the same, but for phantom rows: that is what the permutation is for.
    bands = layout_views.rows_in_groups(layout_views.as_stored(layer), layer)
    for band, phantom in zip(bands.reshape(layer.num_groups, layer.block_shape[0], -1), layer.phantom, strict=True):
        assert np.isnan(band[phantom]).all()
        assert (band[~phantom] == band[~phantom][0]).all()


@given(*[st.tuples(st.integers(1, high), st.integers(1, high)) for high in (30, 12)], st.integers(0, 99))
def test_occupancy_keeps_the_number_of_active_weights(shape, most, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.3
    means, tile = layout_views.occupancy(mask.astype(float), most)
    assert all(size <= limit for size, limit in zip(means.shape, most, strict=True))
    heights, widths = (np.minimum(t, s - np.arange(0, s, t)) for t, s in zip(tile, shape, strict=True))
    assert (means * np.outer(heights, widths)).sum() == pytest.approx(mask.sum())


def test_top_kast_shows_what_it_computes_with():
    active = np.array([[1, 1, 0], [1, 0, 1]], bool)
    blocks = np.array([1.0, 2, 3, 4]).reshape(4, 1, 1)
    forward = np.array([False, True, True, False]).reshape(4, 1, 1)
    layer, only = layout_views.view("layer", single_weights(active), blocks, forward), layout_views.BACKWARD_ONLY
    np.testing.assert_array_equal(layout_views.as_stored(layer), [[only, 1, 0], [1, 0, only]])
    np.testing.assert_array_equal(layout_views.panels(layer), [[2], [3]])
    assert show_layout.caption(layer) == (
        "layer: 2 x 3 (out x in), density 0.3333, with a gradient 0.6667, 2 single weights, 1 in a row, 0 empty rows"
    )


def test_the_metrics_beside_a_checkpoint(tmp_path):
    for path in ("run", "run/checkpoints", "run/checkpoints/40"):
        assert show_layout.find_metrics(tmp_path / path) == tmp_path / "run"
    text = "".join(json.dumps({"kind": kind, "step": 2}) + "\n" for kind in ("eval", "adapt"))
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "adapt", "st')
    assert read_adaptations(tmp_path) == [{"kind": "adapt", "step": 2}]
    assert read_adaptations(tmp_path / "nothing") == []


def random_state(config):
    """A train state of the config with random layouts and weights; nothing is compiled for it."""
    components, rng = build(config), np.random.default_rng(0)
    abstract = abstract_state(config, components)
    state = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), abstract)
    new = {}
    for path, node in nodes(state.topology).items():
        layout, aux = node.layout, node.aux
        if config.method == "dsb":
            counts = [len(part) for part in np.array_split(np.arange(layout.num_blocks), layout.num_groups)]
            drawn = make_layout(0, layout.shape, layout.block_shape, tuple(counts))
        else:
            places = rng.permutation(layout.shape[0] * layout.shape[1])
            drawn = single_weights((places < layout.num_blocks).reshape(layout.shape))
            forward_mask = (rng.permutation(layout.num_blocks) % 2 == 0).reshape(-1, 1, 1)
            aux = dataclasses.replace(aux, forward_mask=forward_mask)
        drawn = dataclasses.replace(drawn, in_idx=np.asarray(drawn.in_idx).astype(layout.in_idx.dtype))
        new[path] = dataclasses.replace(node, layout=drawn, aux=aux)
    topology = replace_at(state.topology, new)
    return dataclasses.replace(state, topology=topology, step=np.zeros((), np.int32))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of workdirs by method, each with a checkpoint of step 0; the one of dsb has metrics."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("dsb", "topkast", "dense"):
        config = Config(method=method)
        with Checkpoints(folder / method, config.to_json()) as saver:
            saver.save(random_state(config), step=0, test_accuracy=0.1)
    layers = {f"conv_{i}": {"turnover": 0.1 * i} for i in (1, 2, 3)}
    entries = [json.dumps({"kind": "adapt", "step": step, "layers": layers}) + "\n" for step in (0, 40, 80)]
    (folder / "dsb" / "metrics.jsonl").write_text("".join(entries))
    return folder


@pytest.fixture
def call(monkeypatch):
    """Values of the flags -> the program's main with them."""

    def main(**values):
        given_flags = {"step": None, "layers": None, **values}
        monkeypatch.setattr(show_layout, "FLAGS", type("Flags", (), given_flags))
        show_layout.main()

    return main


@pytest.mark.parametrize(
    ("method", "name", "words"),
    [
        ("dsb", "a.png", "conv_2: 128 x 576 (out x in), density 0.1007, 29 blocks of 16x16 in 8 row groups of 3 to 4"),
        ("topkast", "b.pdf", "density 0.1007, with a gradient 0.2014, 7,424 single weights"),
    ],
)
def test_every_kind_of_layout_is_drawn(method, name, words, checkpoints, call, tmp_path, capsys):
    call(checkpoint=str(checkpoints / method / "checkpoints"), layers=["conv_2", "conv_3"], out=str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG" if name == "a.png" else b"%PDF")
    told = capsys.readouterr().out
    assert words in told
    assert "not shown: conv_1; " in told
    assert ("no adaptations are noted" in told) == (method == "topkast")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"checkpoint": "dense"}, r"of a dense model \(method=dense\), which has no masks; give one of dsb,"),
        ({"checkpoint": "dsb", "layers": ["conv_9"]}, "layers='conv_9' is none of the sparse layers conv_1, conv_2"),
        ({"checkpoint": "dsb", "step": 7}, "no checkpoint of step 7"),
        ({"checkpoint": "dsb", "out": "none/a.png"}, "there is no folder none"),
        ({"checkpoint": "none"}, "none does not exist"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_overwritten(values, words, checkpoints, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_text("an older picture")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        call(**{"out": "a.png", **values, "checkpoint": str(checkpoints / values["checkpoint"])})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.png", "an older picture")]
