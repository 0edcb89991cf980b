"""The memory program: the paper's Table 3 counted from live arrays, for a model that is checked by hand."""

import json

import jax
import pytest
from absl.testing import flagsaver

from dsb_jax.topology import without_index
from dsb_jax.training.config import Config
from dsb_jax.training.loop import create
from experiments import memory

SPARSE = ("dsb", "ssb", "rigl", "set")


@pytest.fixture(scope="module")
def define():
    if "chart" not in memory.FLAGS:
        memory.define_flags()
    memory.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def results(define, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("memory")
    path, chart = tmp_path / "memory.json", tmp_path / "memory.png"
    with flagsaver.flagsaver(
        models=["convnet"], xla=False, json=str(path), chart=str(chart), batch_size=4, block_shape="16x16"
    ):
        memory.main()
    assert chart.read_bytes().startswith(b"\x89PNG")
    return {(r["method"], r["phase"]): r for r in json.loads(path.read_text())["results"]}


def test_table_three(results):
    dense = results["dense", "training"]
    active = results["dsb", "training"]["weights_bytes"]
    for method in SPARSE:
        row = results[method, "training"]
        assert row["weights_bytes"] == row["gradients_bytes"] == row["moments_bytes"] == active
        assert row["weights_bytes"] + row["dense_rest_bytes"] < 0.15 * dense["weights_bytes"]
        assert row["deviation_weights"] == row["deviation_gradients"] == 0
        assert (row["index_share"] < 0.07) == (method in ("dsb", "ssb"))
    row = results["topkast", "training"]
    assert row["weights_bytes"] == 4 * (64 * 288 + 128 * 576 + 128 * 1152) == row["formula_weights_bytes"]  # N
    assert row["gradients_bytes"] == row["moments_bytes"] == 2 * active == row["formula_gradients_bytes"]  # Nd + M
    assert results["topkast", "adaptation"]["gradients_bytes"] == 0
    assert ("ssb", "adaptation") not in results  # it never adapts
    # The convnet's sparse layers are 64x288, 128x576 and 128x1152: N of them all, and one of R rows each.
    positions = 64 * 288 + 128 * 576 + 128 * 1152
    assert results["rigl", "adaptation"]["gradients_bytes"] == 4 * positions
    assert results["dsb", "adaptation"]["gradients_bytes"] == 4 * positions // 16 < active
    assert results["set", "adaptation"]["gradients_bytes"] == 0
    small = results["small_dense", "training"]
    assert small["weights_bytes"] == pytest.approx(active + results["dsb", "training"]["dense_rest_bytes"], rel=0.1)


def test_the_account_is_that_of_a_real_state(results):
    _, state = create(Config(dataset="random", input_shape=(32, 32, 3), method="dsb", block_shape=(16, 16)))
    blocks = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if path[-1].key == "blocks"]
    row = results["dsb", "training"]
    assert row["weights_bytes"] == sum(leaf.nbytes for leaf in blocks)
    both = row["index_bytes"] + row["kernel_index_bytes"]
    assert both == sum(leaf.nbytes for leaf in jax.tree.leaves(state.topology))
    assert row["index_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(without_index(state.topology)))


def test_xla_counts_too(define):
    config = Config(
        dataset="random", input_shape=(8, 8, 3), method="dsb", batch_size=2, grow="random",
        keep_dense=("stem", "head", "conv_1", "conv_2"),
    )  # fmt: skip
    with flagsaver.flagsaver(xla=True):
        training, adaptation = memory.account(config)
    for row in (training, adaptation):
        assert row["xla_argument_bytes"] > row["weights_bytes"] + row["moments_bytes"] + row["index_bytes"]
        assert row["xla_temp_bytes"] > 0
