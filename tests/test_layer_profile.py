"""The layer profile: the paper's arithmetic by hand, and the program on a small model."""

import json

import jax
import pytest

from dsb_jax.linen import SparseDense
from dsb_jax.training.config import Config
from experiments import layer_profile
from experiments.layer_profile import estimate
from experiments.training_times import LayerTime, layer_candidates
from tests import fake_peer
from tests.conftest import make_spec
from tests.test_programs import call, call_here

SPEC = make_spec(64, 288, (3, 3)).with_blocks((8, 8), 7)


def layer(dense, sparse):
    return LayerTime((), (64, 288), (4, 8, 8, 32), None if sparse is None else SPEC, dense, sparse, "xla")


def test_the_estimate_by_hand():
    # Medians: 3 -> 1 and 4 -> 5 are replaced, 1 stays dense. 10 - (3 + 4) + (1 + 5) = 9; 8 of the 10 s are layers.
    layers = [layer([1, 3, 9], [2, 1, 1]), layer([4, 4, 4], [5, 5, 6]), layer([1, 1, 1], None)]
    assert estimate(10.0, layers) == {
        "estimated_step_s": 9.0,
        "estimated_speedup": pytest.approx(10 / 9),
        "layer_share": pytest.approx(0.8),
    }
    assert layers[0].speedup == 3  # the median of 1/2, 3 and 9
    assert layers[2].speedup is None


def test_a_step_shorter_than_its_layers_has_no_estimated_speedup():
    assert estimate(2.0, [layer([3], [1])])["estimated_speedup"] is None


def test_candidates_of_a_layer_may_differ_in_their_blocks():
    spec = make_spec(16, 12)
    specs = {"dense": None, "wide": spec.with_blocks((4, 6), 3), "tall": spec.with_blocks((8, 3), 2)}
    calls, chosen = layer_candidates(dict.fromkeys(specs, SparseDense(16)), (5, 12), specs, Config())
    sizes = {name: jax.eval_shape(call)[1][0] for name, call in calls.items()}
    assert sizes["dense"]["kernel"].shape == (12, 16)
    assert (sizes["wide"]["blocks"].shape, sizes["tall"]["blocks"].shape) == ((3, 4, 6), (2, 8, 3))
    assert set(chosen) == set(specs)


def test_the_program_on_a_small_model(tmp_path):
    file = tmp_path / "profile.json"
    call_here(
        layer_profile, "--models=convnet", "--sparsities=0.9", "--block_shape=128x96", "--batch_size=4",
        "--image_size=8", "--rounds=1", "--num_classes=5", f"--json={file}",
        f"--peer_python={fake_peer.write(tmp_path)}",
    )  # fmt: skip
    written = json.loads(file.read_text())
    assert written["num_classes"] == 5
    assert written["environment"]["torch"] == fake_peer.VERSION
    (row,) = written["results"]
    assert row["torch_step_s"] == fake_peer.SECONDS
    assert 0 < row["speedup_over_fastest"] <= row["measured_speedup"]
    assert [entry["path"] for entry in row["layers"]] == ["stem", "conv_1", "conv_2", "conv_3", "head"]
    sparse = [entry for entry in row["layers"] if entry["sparse_s"] is not None]
    assert [entry["path"] for entry in sparse] == ["conv_3"]  # alone it can hold such blocks: compiled fast
    assert sparse[0]["block_shape"] == [128, 96]
    assert row["layers"][-1]["shape"] == [5, 128]
    saved = sum(entry["dense_s"] - entry["sparse_s"] for entry in sparse)
    assert row["estimated_step_s"] == pytest.approx(row["dense_step_s"] - saved)
    assert row["measured_step_s"] > 0


@pytest.mark.parametrize(
    ("flag", "words"), [("--sparsities=0.9,many", "0.9,many"), ("--models=vgg17", "vgg17"), ("--block_shape=8", "'8'")]
)
def test_what_cannot_be_is_refused(flag, words, tmp_path):
    file = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=words):
        call_here(layer_profile, flag, f"--json={file}")
    assert not file.exists()


def test_a_refusal_ends_the_program_in_a_line(tmp_path):
    file = tmp_path / "profile.json"
    result = call("layer_profile", "--models=vgg17", f"--json={file}")
    assert result.returncode == 2
    assert "vgg17" in result.stderr
    assert "Traceback" not in result.stderr
    assert not file.exists()
