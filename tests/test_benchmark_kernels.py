"""The kernel benchmark on a CPU, and its arithmetic."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsb_jax.ops.native import loading
from experiments import benchmark_kernels, kernel_peers
from experiments.benchmark_kernels import parse_sparsities
from experiments.kernel_bounds import Device, bound, break_even
from experiments.kernel_candidates import Call, chained, compiled, dense_calls, unavailable
from experiments.kernel_measurement import Bench, measure_layer, speedups
from experiments.kernel_shapes import layers_of, matmul_layer, model_layers, parse_layer, unique
from pallas_kernels import ConvGeometry
from tests.test_programs import call, call_here

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what happens without a GPU")


def test_the_benchmark_writes_what_is_promised(tmp_path):
    file = tmp_path / "kernels.json"
    call_here(  # ends with exit code 1, an exception here, if something fails
        benchmark_kernels, "--shapes=32x8x3x3/2@6x6x4", "--sparsities=0.5", "--block_shapes=16x8,64x4",
        "--implementations=native,xla,pallas_interpreted,pallas", "--rounds=2", f"--json={file}",
    )  # fmt: skip
    body = json.loads(file.read_text())
    assert body["failures"] == []
    assert {"command", "environment", "bandwidth_bytes_per_s", "peak_flops_per_s", "peers"} <= set(body)
    has_native = loading.unavailable_reason() is None
    assert list(body["unavailable"]) == (["pallas"] if has_native else ["native", "pallas"])
    (left_out,) = body["left_out"]  # 64 rows are more than this layer has
    assert "64x4" in left_out
    measured = ["native"] * has_native + ["xla", "pallas_interpreted"]
    assert [entry["implementation"] for entry in body["results"]] == measured
    assert len(body["break_even"]) == len(measured)
    for entry in body["results"]:
        check_entry(entry)
        for of_pass in entry["passes"].values():  # blocks of 16x8 at the 3x3 positions of 4 images
            rate = 2 * entry["num_blocks"] * 16 * 8 * 3 * 3 * 4 / of_pass["s"]
            assert not has_native or of_pass["core_peak_fraction"] == pytest.approx(
                rate / body["core_peak_flops_per_s"]
            )


def check_entry(entry):
    assert set(entry["speedup"]) == {"forward", "input_gradient", "weight_gradient", "forward_backward"}
    for measured in entry["passes"].values():
        assert 0 <= measured["max_relative_error"] < 1e-4
        assert measured["s"] > 0
        assert measured["dense_s"] > 0
        assert measured["bound_fraction"] == pytest.approx(entry["bound_s"] / measured["s"])


def test_the_dense_fallback_of_a_matrix_is_measured_and_checked():
    bench = Bench("float32", 1, ("dense_fallback",), (), Device(1e9, 1e9))
    (entry,) = measure_layer(bench, matmul_layer(32, 48, 16), [(16, 8), (64, 4)], [0.5])
    check_entry(entry)
    assert bench.failures == []
    assert len(bench.left_out) == 1
    late = Bench("float32", 1, ("dense_fallback",), (), Device(1e9, 1e9), deadline=0)
    assert measure_layer(late, matmul_layer(32, 48, 16), [(16, 8)], [0.5, 0.8]) == []
    assert all(line.endswith("time limit") for line in late.left_out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes=4096x4096"], ["'4096x4096'", "out x in x N", "512x512x3x3@4x4x512"]),
        (["--shapes=32x32x8", "--implementations=cublas"], ["'cublas'", "dense_fallback"]),
    ],
    ids=["shapes", "implementations"],
)
def test_a_mistake_ends_in_a_short_message(arguments, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        call_here(benchmark_kernels, *arguments)
    (line,) = str(caught.value).splitlines()
    for word in words:
        assert word in line


def test_the_message_of_a_mistake_is_all_that_is_told():
    result = call("benchmark_kernels", "--shapes=4096x4096")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "'4096x4096'" in line


@pytest.mark.parametrize(
    ("text", "shape", "positions"),
    [
        ("4096x1024x8192", (4096, 1024), 8192),
        ("512x256x3x3@4x4x128", (512, 9 * 256), 16 * 128),
        ("128x64x3x3/2@32x16x8", (128, 9 * 64), 16 * 8 * 8),
        ("128x64x1x1/2@8x8x5", (128, 64), 16 * 5),
    ],
)
def test_a_shape_is_read_and_written(text, shape, positions):
    layer = parse_layer(text)
    assert ((layer.out, layer.in_features), layer.positions) == (shape, positions)
    assert str(layer) == text
    assert parse_layer(f" {text} ") == layer


@pytest.mark.parametrize(
    "text", ["", "16", "16x16", "16x16x0", "16x16x16x16", "8x8x3x3@4x4", "8x8x3x3/@4x4x2", "axbxc"]
)
def test_a_bad_shape_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="4096x4096x8192") as error:
        parse_layer(text)
    assert repr(text) in str(error.value)


@given(
    sizes=st.tuples(*[st.integers(1, 300)] * 4), stride=st.integers(1, 3), image=st.tuples(*[st.integers(1, 40)] * 2),
    batch=st.integers(1, 600),
)  # fmt: skip
def test_every_layer_is_read_as_it_is_written(sizes, stride, image, batch):
    out, channels, kernel_h, kernel_w = sizes
    text = f"{out}x{channels}x{kernel_h}x{kernel_w}/{stride}@{image[0]}x{image[1]}x{batch}"
    layer = parse_layer(text)
    if layer.is_matmul:
        assert str(layer) == f"{out}x{channels}x{batch}"
    else:
        assert parse_layer(str(layer)) == layer
    if stride == 1:
        assert layer.output_size == image  # padded like the models


def test_layers_of_models():
    layers = model_layers("resnet18", 2)
    assert len(layers) == 19  # 16 in the blocks, 3 projections; stem and head stay dense
    assert layers[0].names == ("resnet18/block_0_0/conv_0",)
    assert layers[-1].geometry == ConvGeometry(512, (3, 3), (1, 1), ((1, 1), (1, 1)))
    assert layers[-1].input_size == (4, 4)
    assert {layer.batch for layer in layers} == {2}
    merged = unique([*layers, *model_layers("vgg16", 2)])
    assert len(merged) == len(set(layers) | set(model_layers("vgg16", 2)))
    last = next(layer for layer in merged if layer == layers[-1])
    assert last.names[0].startswith("resnet18")
    assert last.names[-1].startswith("vgg16")
    assert [(layer.out, layer.in_features) for layer in model_layers("vit-b", 1)] == [
        (768, 768), (3072, 768), (768, 3072),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="resnet99"):
        model_layers("resnet99", 2)


def test_shapes_gemms_and_models_in_this_order():
    layers = layers_of(["64x32x16", "8x8x8"], ["8", "16"], [], 4)
    assert [str(layer) for layer in layers] == ["64x32x16", "8x8x8", "16x16x16"]
    with pytest.raises(ValueError, match="'0'"):
        layers_of([], ["0"], [], 4)


@pytest.mark.parametrize(("texts", "word"), [(["0.5", "x"], "0.5,x"), (["-0.1"], "-0.1"), (["1.0"], "1 is not")])
def test_bad_sparsities(texts, word):
    with pytest.raises(ValueError, match=word):
        parse_sparsities(texts)


SERIES = st.lists(
    st.tuples(st.integers(0, 99).map(lambda i: i / 100), st.floats(0.05, 20)),
    min_size=1, max_size=8, unique_by=lambda pair: pair[0],
)  # fmt: skip


@given(SERIES)
def test_break_even_separates_slow_from_fast(series):
    found = break_even(*zip(*series, strict=True))
    ordered = sorted(series)
    if found is None:
        assert ordered[-1][1] < 1
        return
    assert ordered[0][0] <= found <= ordered[-1][0]
    assert all(speedup >= 1 for sparsity, speedup in ordered if sparsity > found)
    below = [speedup for sparsity, speedup in ordered if sparsity < found]
    assert not below or below[-1] < 1


@given(SERIES, st.randoms())
def test_break_even_does_not_depend_on_the_order(series, random):
    shuffled = list(series)
    random.shuffle(shuffled)
    assert break_even(*zip(*series, strict=True)) == break_even(*zip(*shuffled, strict=True))


@given(SERIES, st.floats(1, 3))
def test_a_faster_kernel_breaks_even_earlier(series, factor):
    sparsities, before = zip(*series, strict=True)
    slow, fast = break_even(sparsities, before), break_even(sparsities, [factor * s for s in before])
    if slow is not None:
        assert fast is not None
        assert fast <= slow + 1e-9


@given(st.floats(0.02, 0.9), st.floats(0.02, 3))
def test_break_even_of_time_that_is_linear_in_the_work(fixed, each):
    """time / dense = fixed + each * density is met exactly between the measurements."""
    sparsities = (0.5, 0.8, 0.9, 0.95)
    found = break_even(sparsities, [1 / (fixed + each * (1 - s)) for s in sparsities])
    exact = 1 - (1 - fixed) / each
    if exact > 0.95 + 1e-9:
        assert found is None
    elif exact < 0.95 - 1e-9:
        assert found == pytest.approx(max(exact, 0.5), abs=1e-9)


def test_break_even_takes_each_sparsity_once():
    with pytest.raises(ValueError, match="once"):
        break_even([0.5, 0.5], [1.0, 2.0])


def test_the_bound_is_the_larger_of_memory_and_arithmetic():
    layer = matmul_layer(100, 50, 10)
    moved = (100 * 50 + 50 * 10 + 100 * 10) * 2 + 40
    assert bound(layer, 100 * 50, 40, 2, Device(bandwidth=1.0, flops=math.inf)) == moved
    assert bound(layer, 100 * 50, 40, 2, Device(bandwidth=math.inf, flops=1.0)) == 2 * 100 * 50 * 10
    assert bound(layer, 100 * 50, 40, 2, Device(bandwidth=1.0, flops=1.0)) == 2 * 100 * 50 * 10


def test_speedups_of_each_pass_and_of_all():
    dense = {"forward": [2.0, 4.0], "input_gradient": [2.0, 4.0], "weight_gradient": [4.0, 8.0]}
    sparse = {"forward": [1.0, 2.0], "input_gradient": [2.0, 4.0], "weight_gradient": [1.0, 2.0]}
    assert speedups(dense, sparse) == {
        "forward": 2, "input_gradient": 1, "weight_gradient": 4, "forward_backward": 2,
    }  # fmt: skip
    assert speedups(dense, {"forward": [1.0, 2.0]}) == {"forward": 2}


def test_chained_runs_give_each_its_result():
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    results = chained(lambda x, w: x @ w["kernel"])((x, {"kernel": x.T}), (2 * x, {"kernel": x.T}))
    for result, factor in zip(results, (1, 2), strict=True):
        np.testing.assert_allclose(result, factor * x @ x.T)


def test_a_gpu_compiler_merges_no_chained_runs():
    compiler = pytest.importorskip("pallas_kernels.aot.compiler")
    if (reason := compiler.unavailable()) is not None:
        pytest.skip(reason)
    layer = parse_layer("64x64x3x3@8x8x32")
    x = jax.numpy.zeros((64, 8, 8, 32), "bfloat16")
    spec = dense_calls(layer, x, x)["forward"]
    program = compiler.compile_for("H200", chained(spec.function), *[spec.operands] * 3)
    assert program.hlo.count('custom_call_target="__cudnn$convForward"') == 3


def test_a_wrong_result_is_a_failure():
    bench = Bench("float32", 1, (), (), Device(1.0, 1.0))
    x = jax.numpy.ones((4, 1, 1, 8))
    timed = {"forward": compiled(Call(lambda x: 2 * x, (x,)), 1)}
    assert bench.check(timed, {"forward": np.full((4, 1, 1, 3), 2.0)}, 3, "here") == {"forward": 0}
    assert bench.failures == []
    assert bench.check(timed, {"forward": np.full((4, 1, 1, 3), 2.5)}, 3, "here")["forward"] == pytest.approx(0.2)
    assert bench.check(
        {"forward": compiled(Call(lambda x: x / 0, (x,)), 1)}, {"forward": x[..., :3]}, 3, "elsewhere: a quotient"
    ) == {"forward": None}
    assert ["quotient" not in line for line in bench.failures] == [True, False]


def test_what_breaks_is_a_note_and_a_failure_only_if_it_is_ours():
    bench = Bench("float32", 1, (), (), Device(1.0, 1.0))

    def refuse():
        raise NotImplementedError("R is too large")

    assert bench.attempt(refuse, "here") == "not served: R is too large"
    assert bench.attempt(lambda: 1 / 0, "peer", ours=False) == "ZeroDivisionError: division by zero"
    assert bench.failures == []
    bench.attempt(lambda: 1 / 0, "here")
    assert bench.failures == ["here: ZeroDivisionError: division by zero"]


@on_a_cpu
def test_gpu_kernels_and_peers_are_missing_by_name():
    assert "cpu" in unavailable("pallas")
    assert unavailable("xla") is None
    with pytest.raises(ValueError, match="'cudnn'"):
        unavailable("cudnn")
    assert kernel_peers.usable({"torch_bsr": "not installed", "stk": "0.7.1", "third": "no CUDA"}) == ["stk"]
    assert set(kernel_peers.installed()) == {"torch_bsr", "stk"}
    layer = matmul_layer(256, 256, 8)
    assert kernel_peers.unsupported_reason("torch_bsr", layer, (32, 32)) is None
    assert "powers of two" in kernel_peers.unsupported_reason("torch_bsr", layer, (64, 4))
    assert "128x128" in kernel_peers.unsupported_reason("stk", layer, (32, 32))
    assert "convolutions" in kernel_peers.unsupported_reason("stk", parse_layer("128x128x3x3@8x8x4"), (128, 128))
