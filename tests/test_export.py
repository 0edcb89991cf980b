"""Files that compute without this library: what the model computes, for any batch size, or none is written.

Finding 10 of foreign models, "export", is met by this file, by `flax.serialization.to_bytes(variables)` in
test_topology.py, and by `to_dense`, whose kernels load into `nn.Conv`, in test_linen_layers.py.
"""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export as jax_export

import dsb_jax as dsb
from dsb_jax.checkpoint import Checkpoints
from dsb_jax.exporting import export
from dsb_jax.methods import TopKAST
from dsb_jax.ops import sparse_conv, xla
from dsb_jax.safetensors_files import load_safetensors
from dsb_jax.train import eval_step
from dsb_jax.train_state import create_train_state
from dsb_jax.training.build import build, make_key
from dsb_jax.training.checkpoints import restore
from dsb_jax.training.config import Config
from experiments import export as program
from pallas_kernels import ConvGeometry
from tests.conftest import make_layout
from tests.linen_models import KEY, QUICK, sparse
from tests.test_programs import call_here
from tests.topologies import assert_same_bits


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x))


MODELS = {"mlp": (MLP(), (24,)), "cnn": (CNN(), (6, 6, 8)), "attention": (Attention(), (5, 16))}
SIZES = (1, 7, 64)
ALONE = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("dsb_jax", "pallas_kernels", "experiments", "flax"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
import jax, numpy as np
import jax.export

for name in sys.argv[1:]:
    call = jax.jit(jax.export.deserialize(open(name + ".jax", "rb").read()).call)
    cases = np.load(name + ".npz")
    np.savez(name + "_out.npz", **{size: call(x) for size, x in cases.items()})
try:
    import dsb_jax
except ImportError as error:
    print(error)
"""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def made(name):
    """A sparse model with its variables; "auto" would take the dense product for layers as small as these."""
    model, shape = MODELS[name]
    rules = [dsb.Rule(".*(key|value)", dense=True)] if name == "attention" else ()  # fewer layers compile faster
    model = sparse(model, normal(2, *shape), sparsity=0.6, rules=rules, implementation="portable")
    return model, jax.jit(model.init)(KEY, normal(2, *shape))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """All models exported, and run by a process that has nothing of ours: reports and the folder."""
    folder = tmp_path_factory.mktemp("files")
    reports = {}
    for name, (_, shape) in MODELS.items():
        model, variables = made(name)
        reports[name] = export(model, variables, normal(7, *shape), folder / f"{name}.jax")
        np.savez(folder / f"{name}.npz", **{str(size): normal(size, *shape, seed=size) for size in SIZES})
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *MODELS], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "dsb_jax is not here\n"
    return folder, reports


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_this_library_computes_the_same(name, files):
    """As the dense model with zeros does, whose parameters `to_dense` makes."""
    folder, reports = files
    variables = made(name)[1]
    others = {name: tree for name, tree in variables.items() if name not in ("params", "topology")}
    dense = {"params": dsb.to_dense(variables["params"], variables["topology"]), **others}
    inputs, outputs = np.load(folder / f"{name}.npz"), np.load(folder / f"{name}_out.npz")
    for size in map(str, SIZES):
        wanted = np.asarray(jax.jit(MODELS[name][0].apply)(dense, inputs[size]))
        assert outputs[size].shape == wanted.shape
        np.testing.assert_allclose(outputs[size], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    report = reports[name]
    assert list(report.differences) == [7, 1]
    assert max(report.differences.values()) < 1e-5
    assert report.nbytes == (folder / f"{name}.jax").stat().st_size
    assert {choice.implementation for choice in report.choices.values()} == {"portable"}
    assert {path.name for path in folder.iterdir()} == {
        f"{n}{end}" for n in MODELS for end in (".jax", ".npz", "_out.npz")
    }


def test_the_report_is_short_to_read(files):
    folder, reports = files
    lines = str(reports["cnn"]).splitlines()
    assert re.sub(" +", " ", "\n".join(lines[:6])) == (
        f"file {folder / 'cnn.jax'}\nbytes {reports['cnn'].nbytes:,}\nplatforms cpu, cuda, tpu\n"
        "inputs float32[batch, 6, 6, 8]\noutputs float32[batch, 10]\n"
        "sparse layers portable (xla on a CPU, dense elsewhere)"
    )
    assert [line.split("  ")[0] for line in lines[6:]] == ["batch 7", "batch 1"]
    assert reports["mlp"].choices["Dense_0",].reason == "asked for"
    assert "<table>" in reports["mlp"]._repr_html_()


def test_weights_are_stored_once_and_packed(files):
    _, reports = files
    for name, report in reports.items():
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(made(name)[1]))
        assert report.nbytes < nbytes + 60_000, name  # of the program; dense weights would add as much for these


@pytest.mark.parametrize("implementation", ["xla", "dense", "reference", "portable"])
def test_every_implementation_and_its_derivatives_take_a_batch_of_any_size(implementation, monkeypatch):
    """In tiles of 8 of the 12 positions of an example: of two examples, three times; of one, once."""
    layout, geometry = make_layout(0, (12, 36), (4, 4), (3, 0, 5)), ConvGeometry(4, (3, 3), (2, 1), ((1, 1), (0, 1)))
    blocks = normal(8, 4, 4)

    def passes(x, blocks, implementation):
        product = functools.partial(sparse_conv, layout=layout, geometry=geometry, implementation=implementation)
        y, transposed = jax.vjp(product, x, blocks)
        return y, transposed(jnp.tanh(y))

    (batch,) = jax_export.symbolic_shape("b")
    monkeypatch.setattr(xla, "TILE_POSITIONS", 8)
    compute = jax.jit(functools.partial(passes, implementation=implementation))
    exported = jax_export.export(compute)(jax.ShapeDtypeStruct((batch, 6, 5, 4), jnp.float32), blocks)
    call = jax.jit(jax_export.deserialize(exported.serialize()).call)
    for size in (1, 5):
        x = normal(size, 6, 5, 4)
        for a, b in zip(*map(jax.tree.leaves, (call(x, blocks), passes(x, blocks, "reference"))), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()))


def test_where_it_is_no_cpu_the_product_is_dense():
    model, variables = made("mlp")
    inputs = jax.ShapeDtypeStruct(jax_export.symbolic_shape("b,24"), jnp.float32)

    def lowered(platform):
        return jax_export.export(jax.jit(lambda x: model.apply(variables, x)), platforms=[platform])(
            inputs
        ).mlir_module()

    assert "stablehlo.while" in lowered("cpu")
    for platform in ("cuda", "tpu"):
        assert "stablehlo.while" not in lowered(platform)


@pytest.mark.parametrize("any_what", ["a batch of any size", "any platform"])
def test_kernels_of_one_gpu_are_refused(any_what, tmp_path):
    model = sparse(MLP(), normal(2, 24), implementation="pallas")
    options = {"batch_axis": None} if any_what == "any platform" else {}
    message = f"implementation='pallas' cannot compute a layer of 32x24 for {any_what}: .*; use auto, xla or dense"
    with pytest.raises(NotImplementedError, match=message):
        export(model, made("mlp")[1], normal(2, 24), tmp_path / "model.jax", **options)


@pytest.mark.parametrize("method", [QUICK, TopKAST(exploration=0.1)], ids=lambda method: method.name)
def test_variables_may_be_arguments_of_an_exported_function(method):
    x = normal(2, 24)
    model = sparse(MLP(), x, sparsity=0.6, method=method)
    variables = jax.jit(model.init)(KEY, x)
    exported = jax_export.export(jax.jit(model.apply))(variables, x)
    again = jax_export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree  # with specs, shapes and settings, by value
    np.testing.assert_array_equal(again.call(variables, x), jax.jit(model.apply)(variables, x))


def add(x, scale):
    return x + scale.sum()


@pytest.mark.parametrize(
    ("inputs", "batch_axis", "shapes"),
    [
        ((normal(3, 4), normal(4)), 0, ("float32[batch, 4]", "float32[4]")),
        ((normal(4, 3), np.float32(2)), 1, ("float32[4, batch]", "float32[]")),
        ((normal(4, 3), np.float32(2)), -1, ("float32[4, batch]", "float32[]")),
        ((normal(3, 3), normal(3)), (0, None), ("float32[batch, 3]", "float32[3]")),
        ((normal(3, 3), normal(3)), None, ("float32[3, 3]", "float32[3]")),
    ],
)
def test_which_inputs_have_a_batch(inputs, batch_axis, shapes, tmp_path):
    report = export(add, None, inputs, tmp_path / "add.jax", batch_axis=batch_axis, platforms="cpu")
    assert report.inputs == shapes
    assert list(report.differences) == ([None] if batch_axis is None else [3, 1, 7])
    call = jax_export.deserialize(bytearray((tmp_path / "add.jax").read_bytes())).call
    np.testing.assert_allclose(call(*inputs), add(*inputs), rtol=1e-6)


def test_functions_of_variables_and_dictionaries(tmp_path):
    def compute(variables, batch, *, times):
        return {"y": batch["x"] @ variables["w"] * times, "best": batch["x"].argmax(axis=1)}

    report = export(
        compute, {"w": normal(4, 2)}, {"x": normal(3, 4), "mask": normal(3, 4) > 0}, tmp_path / "f.jax",
        kwargs={"times": 2}, platforms=("cpu",),
    )  # fmt: skip
    assert report.inputs == ("bool[batch, 4]", "float32[batch, 4]")
    assert report.outputs == ("int32[batch]", "float32[batch, 2]")
    assert report.choices == {}


def test_an_nnx_model_with_transformations_inside_stays_whole(tmp_path):
    """`nnx.scan`, `nnx.remat` and `sow` change what they are given: a copy, here."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 8, rngs=rngs)
            self.stack = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0, out_axes=0)(rngs.split(2))

        def __call__(self, x):
            x = nnx.remat(lambda layer, x: layer(x))(self.first, x)
            self.sow(nnx.Intermediate, "x", x)
            return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.stack, x)

    model, x = Net(nnx.Rngs(0)), jnp.ones((3, 8))
    plan = dsb.nnx.plan(model, x, sparsity=0.5, block_shape=(4, 2), min_blocks=1)
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1))
    wanted = model(x)
    report = dsb.export(model, None, x, tmp_path / "net.jax")
    assert max(report.differences.values()) < 1e-5
    np.testing.assert_allclose(model(x), wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="variables are given beside an NNX model, which holds its own"):
        dsb.export(model, {"params": {}}, x, tmp_path / "net.jax")


def test_a_stock_nnx_model(tmp_path):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.first(x))

    model, path = Net(nnx.Rngs(0)), tmp_path / "net.jax"
    with pytest.raises(
        ValueError, match=r"wants to be trained: norm .BatchNorm. is in training mode.* after model\.eval\(\)"
    ):
        export(model, None, normal(3, 4), path, platforms="cpu")
    model.eval()
    assert export(model, None, normal(3, 4), path, platforms="cpu").inputs == ("float32[batch, 4]",)


def counting(x, calls=[0]):  # noqa: B006 - that it remembers is the point
    calls[0] += 1
    return x + calls[0]


def small_batch(x):
    return x if x.shape[0] < 3 else x + 1


def one_of_two(x):
    return x[:1] if x.shape[0] == 2 else x


def batch_of_two(x):
    return x if x.shape[0] == 2 else x + 1


@pytest.mark.parametrize(
    ("model", "variables", "options", "message"),
    [
        ("cnn", "cnn", {"kwargs": {"train": True}}, r"wants to be trained: Cannot update variable .mean.*batch_stats"),
        ("cnn", None, {}, "CNN is a Linen module; give its variables"),
        (jnp.log, None, {}, "output 0 of a batch of 2 is not finite in the model itself"),
        (counting, None, {}, r"batch of 2 differs from the model's by 1, of .* needs more than tolerance=1e-05, "),
        (
            small_batch,
            None,
            {},
            r"needs to know its batch size: Symbolic dimension.* is inconclusive\. Give batch_axis=",
        ),
        # Which jax takes for "no": a case that only the comparison finds.
        (batch_of_two, None, {}, "output 0 of a batch of 2 differs from the model's by 1, "),
        (one_of_two, None, {}, r"output 0 of a batch of 2 has shape \(2, 6, 6, 8\), the model's \(1, 6, 6, 8\)"),
        (jnp.tanh, None, {"platforms": ("gpu",)}, r"platforms=\('gpu',\): give some of .*an NVIDIA GPU: cuda"),
        (jnp.tanh, None, {"platforms": ("tpu",)}, "computes on cpu, so it could not check the file; add 'cpu'"),
        (jnp.tanh, None, {"batch_axis": 4}, r"batch_axis=4: float32\[2, 6, 6, 8\] has no examples on axis 4"),
        (jnp.tanh, None, {"batch_axis": (0, 0)}, "is for 2 arguments of 1; give one for each"),
        (jnp.tanh, None, {"method": "encode"}, "method='encode' is for Linen modules"),
        (3, None, {}, "3 is neither a Linen module nor a function"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exported_leaves_the_file_that_is_there(model, variables, options, message, tmp_path):
    path = tmp_path / "model.jax"
    path.write_text("the last good one")
    model, variables = made(model)[0] if isinstance(model, str) else model, variables and made(variables)[1]
    with pytest.raises(ValueError, match=message) as caught:
        export(model, variables, -np.abs(normal(2, 6, 6, 8)), path, **{"platforms": "cpu", **options})
    assert len(str(caught.value).splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.jax"]
    assert path.read_text() == "the last good one"


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nothing is no folder; make it, then write model\.jax there"):
        export(jnp.tanh, None, normal(2, 3), tmp_path / "nothing" / "model.jax")
    with pytest.raises(ValueError, match="is a folder; give the name of a file in it"):
        export(jnp.tanh, None, normal(2, 3), tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"flatbuffers, which is not here; pip install 'dsb-jax\[export\]'"):
        export(jnp.tanh, None, normal(2, 3), tmp_path / "model.jax")


CONFIG = Config(
    model="narrow_convnet", batch_size=4, total_steps=40, grow="random", keep_dense=("stem", "head", "conv_[12]")
)


def test_the_program_exports_a_run(tmp_path, capsys):
    built, images = build(CONFIG), normal(7, 8, 8, 1)
    make = jax.jit(lambda key: create_train_state(built.model, built.optimizer, key, images[:4]))
    with Checkpoints(tmp_path / "run", CONFIG.to_json()) as checkpoints:
        checkpoints.save(make(make_key(0)), step=0, test_accuracy=0.5)
    out = tmp_path / "digits.jax"
    call_here(program, f"--checkpoint={tmp_path / 'run'}", f"--out={out}", "--weights=packed", "--platforms=cpu,cuda")
    text = capsys.readouterr().out
    assert "platforms      cpu, cuda" in text
    assert "portable (xla on a CPU" in text
    logits = jax_export.deserialize(bytearray(out.read_bytes())).call(images)
    state = restore(tmp_path / "run").state
    sums = eval_step(state, images, jnp.zeros(7, jnp.int32), model=built.model)
    losses = -jax.nn.log_softmax(logits)[:, 0]
    assert math.isclose(float(losses.sum()), float(sums["loss"]), rel_tol=1e-5)
    variables, topology = load_safetensors(f"{out}.safetensors")
    assert_same_bits(jax.device_get({**variables, "topology": topology["params"]}), jax.device_get(state.variables))
