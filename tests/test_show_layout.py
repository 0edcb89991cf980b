"""Pictures of layouts: every view holds exactly the active weights, and the program draws a checkpoint."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.checkpoint import Checkpoints
from dsb_jax.layout import to_mask
from dsb_jax.training.config import Config
from experiments import layout_views, show_layout
from experiments.show_layout import caption, choose
from tests.conftest import make_layout
from tests.test_layout_views import random_state
from tests.test_programs import call, call_here


@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), ragged=st.booleans())
def test_every_view_holds_the_active_weights(seed, ragged):
    layout = make_layout(seed, (10 if ragged else 12, 12), (4, 3), (3, 0, 2))
    blocks = np.random.default_rng(seed).uniform(1, 2, (5, 4, 3))
    layer = layout_views.view("layer", layout, blocks)
    mask = np.asarray(to_mask(layout))
    stored = layout_views.as_stored(layer)
    np.testing.assert_array_equal(stored, mask)
    assert layer.num_active == mask.sum()
    assert layer.group_counts.tolist() == [3, 0, 2]
    # The permutation loses no row: back in their own order they are the matrix again.
    permuted = layout_views.rows_in_groups(stored, layer)
    real = ~layer.phantom.reshape(-1)
    back = np.empty_like(stored)
    back[layer.out_idx.reshape(-1)[real]] = permuted[real]
    np.testing.assert_array_equal(back, mask)
    assert np.isnan(permuted[~real]).all()
    # In the panels each group's blocks stand side by side, as wide as the widest group.
    panels = layout_views.panels(layer)
    assert panels.shape == (12, 9)
    assert np.isfinite(panels).sum() == mask.sum()
    assert np.isnan(panels[4:8]).all()
    np.testing.assert_array_equal(panels[:4, 3:6], blocks[1])
    assert layout_views.panel_columns(layer)[0].tolist() == np.asarray(layout.in_idx)[:3].ravel().tolist()


def test_occupancy_by_hand():
    picture = np.array([[1.0, 0, 1], [0, np.nan, np.nan]])
    small, tile = layout_views.occupancy(picture, (1, 2))
    assert tile == (2, 2)
    assert small.tolist() == [[pytest.approx(1 / 3), 1.0]]
    same, tile = layout_views.occupancy(picture, (5, 5))
    assert tile == (1, 1)
    np.testing.assert_array_equal(same, picture)


def test_which_layers_and_what_is_said_of_them():
    names = ["a/conv_1", "a/conv_2", "b/conv_1", "b/conv_2", "c"]
    assert choose(names, None) == ["a/conv_1", "b/conv_1", "c"]
    assert choose(names, ["c", "*conv_1"]) == ["a/conv_1", "b/conv_1", "c"]
    with pytest.raises(ValueError, match="layers='d' is none of the sparse layers a/conv_1"):
        choose(names, ["d"])
    layer = layout_views.view("a", make_layout(0, (12, 12), (4, 3), (3, 0, 2)), np.ones((5, 4, 3)))
    assert "a: 12 x 12 (out x in), density 0.4167" in caption(layer)


def test_the_program_draws_a_checkpoint(tmp_path):
    config = Config(total_steps=10, epochs=1)
    with Checkpoints(tmp_path / "run", config.to_json()) as checkpoints:
        checkpoints.save(random_state(config), step=0, test_accuracy=0.5)
    out = tmp_path / "layout.png"
    result = call("show_layout", f"--checkpoint={tmp_path / 'run'}", "--layers=conv_1,conv_2", f"--out={out}")
    assert result.returncode == 0, result.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "conv_1: 64 x 288" in result.stdout
    assert "not shown: conv_3" in result.stdout
    with pytest.raises(ValueError, match=r"ends in neither \.png nor \.pdf"):
        call_here(show_layout, f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'layout.txt'}")
    assert not (tmp_path / "layout.txt").exists()
