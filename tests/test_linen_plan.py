"""What a plan finds in foreign Linen models, and why the rest stays dense; nothing here is computed."""

import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

import dsb_jax as dsb
from dsb_jax import Rule
from dsb_jax.linen import SparseDense
from tests.linen_models import KEY, Layer, WithSetup, Wrapper, X, plan_of, sparse

pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")

IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
IMAGE = jax.ShapeDtypeStruct((2, 6, 6, 16), jnp.float32)
TEXT = jax.ShapeDtypeStruct((2, 6, 16), jnp.float32)
RULES = [Rule("(mha|sa)/.*", sparsity=0.75), Rule("head", dense=True)]


def own_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


class Doubled(nn.Dense):
    """Computes something else than the class that it comes from."""

    @nn.compact
    def __call__(self, x):
        return 2 * x @ self.param("kernel", self.kernel_init, (16, 16))


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (16, 16))


class Everything(nn.Module):
    """One of each kind of layer."""

    @nn.compact
    def __call__(self, ids, image, text):
        x = text[:, 0]
        nn.Embed(16, 16, name="embed")(ids)
        nn.Dense(16, name="linear")(inputs=x)
        nn.Conv(16, (3, 3), name="conv")(image)
        nn.DenseGeneral((2, 8), name="out_axes")(x)
        nn.DenseGeneral(16, axis=(1, -1), name="in_axes")(text)
        nn.DenseGeneral(16, axis=(1, 2), name="leading")(image)
        nn.Einsum((16, 2, 8), "btd,dhk->bthk", name="einsum")(text)
        nn.MultiHeadDotProductAttention(2, name="mha")(text, text)
        nn.SelfAttention(2, name="sa")(text)
        nn.remat(nn.Dense)(16, name="rematted")(x)
        nn.jit(nn.Dense)(16, name="jitted")(x)
        SparseDense(16, name="of_ours")(x)
        nn.ConvTranspose(16, (3, 3), name="transposed")(image)
        nn.Conv(16, (3, 3), feature_group_count=2, name="grouped")(image)
        nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(image)
        nn.Conv(16, (3, 3), kernel_dilation=2, name="dilated")(image)
        nn.Conv(16, (3, 3), input_dilation=2, padding=1, name="input_dilated")(image)
        nn.Conv(16, (3,), name="conv_1d")(text)
        nn.Conv(16, (3, 3, 3), name="conv_3d")(image[:, None])
        nn.Conv(16, (3, 3), mask=jnp.ones((3, 3, 16, 16)), name="masked")(image)
        nn.Dense(16, dot_general=own_product, name="own_product")(x)
        nn.DenseGeneral(16, batch_dims=(0,), name="batched")(text)
        nn.Einsum((2, 8, 8), name="by_head")(text.reshape(2, 6, 2, 8), "bthk,hkj->bthj")
        nn.RNN(nn.LSTMCell(16, name="lstm"))(text)
        nn.RNN(nn.GRUCell(16, name="gru"))(text)
        nn.WeightNorm(nn.Dense(16, name="weight_normed"))(x)
        nn.SpectralNorm(nn.Dense(16, name="spectral_normed"))(x, update_stats=False)
        tanh = nn.map_variables(nn.Dense, "params", lambda tree: jax.tree.map(jnp.tanh, tree), init=True)
        tanh(16, name="rewritten")(x)
        Doubled(16, name="doubled")(x)
        Own(name="own")(x)
        self.param("table", nn.initializers.normal(), (16, 16))
        table = self.variables["params"]["embed"]["embedding"]
        x = nn.Dense(16, use_bias=False, parent=None).apply({"params": {"kernel": table.T}}, x)
        return nn.Dense(16, name="head")(nn.BatchNorm(True)(x))


GATES = [f"lstm/{kind}{gate}" for gate in "ifgo" for kind in "ih"]
ATTENTION = [f"{name}/{part}" for name in ("mha", "sa") for part in ("query", "key", "value", "out")]
SPARSE = ["linear", "conv", "out_axes", "in_axes", "leading", "einsum", *ATTENTION, "rematted", "jitted", "of_ours"]
DENSE = {
    "embed": "Embed looks its rows up",
    "transposed": "a parameter of ConvTranspose, which is none of Dense, DenseGeneral, Einsum, Conv",
    "grouped": "feature_group_count=2 has no sparse form",
    "depthwise": "feature_group_count=16 has no sparse form",
    "dilated": "kernel_dilation=2 has no sparse form",
    "input_dilated": "input_dilation=2 has no sparse form",
    "conv_1d": "kernel_size=(3,) has no sparse form",
    "conv_3d": "kernel_size=(3, 3, 3) has no sparse form",
    "masked": "mask=an array (3, 3, 16, 16) has no sparse form",
    "own_product": "dot_general=own_product has no sparse form",
    "batched": "batch_dims=(0,) has no sparse form",
    "by_head": "einsum_str=bthk,hkj->bthj has no sparse form",
    **dict.fromkeys(GATES, "inside of LSTMCell, a recurrent cell"),
    **{f"gru/{kind}{gate}": "inside of GRUCell, a recurrent cell" for gate in "rzn" for kind in "ih"},
    "weight_normed": "WeightNorm rewrites its kernel",
    "spectral_normed": "SpectralNorm rewrites its kernel",
    "rewritten": "nn.map_variables rewrites its kernel",
    "doubled": "a parameter of Doubled, which is none of Dense, DenseGeneral, Einsum, Conv",
    "own": "a parameter of Own, which is none of Dense, DenseGeneral, Einsum, Conv",
    "table": "a parameter of Everything, which is none of Dense, DenseGeneral, Einsum, Conv",
    "head": "kept dense by 'head'",
}


@pytest.fixture(scope="module")
def everything():
    return plan_of(Everything(), IDS, IMAGE, TEXT, rules=RULES)


@pytest.fixture(scope="module")
def shapes(everything):
    """Variables of the dense model and of the sparse one."""
    models = Everything(), sparse(Everything(), plan=everything)
    return tuple(jax.eval_shape(model.init, KEY, IDS, IMAGE, TEXT) for model in models)


def test_every_kind_of_layer(everything):
    assert {"/".join(path) for path in everything.sparse} == set(SPARSE)
    reasons = {"/".join(path): why for path, why in everything.items() if isinstance(why, str)}
    assert reasons == DENSE
    sizes = {"/".join(path): spec for path, spec in everything.sizes.items()}
    assert (sizes["in_axes"].kernel_shape, sizes["in_axes"].shape) == ((6, 16, 16), (16, 96))
    assert (sizes["leading"].kernel_shape, sizes["leading"].shape) == ((6, 6, 16), (16, 36))
    assert (sizes["mha/query"].kernel_shape, sizes["mha/query"].shape) == ((16, 2, 8), (16, 16))
    assert (sizes["mha/out"].kernel_shape, sizes["mha/out"].shape) == ((2, 8, 16), (16, 16))
    assert (sizes["conv"].kernel_size, sizes["conv"].shape) == ((3, 3), (16, 144))


def test_layers_are_in_the_order_of_calls(everything):
    names = ["/".join(path) for path in everything]
    positions = [names.index(name) for name in [*SPARSE, *list(DENSE)[1:]] if name != "table"]
    assert positions == sorted(positions)
    assert names.index("embed") < positions[0]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_totals_are_those_of_the_arrays(everything, shapes):
    """Finding 5: with recurrent cells, grouped convolutions and attention in the model."""
    dense, variables = shapes
    assert everything.num_dense_params == count(dense["params"])
    assert everything.num_params == count(variables["params"])
    kernels = {path: spec.size for path, spec in everything.sizes.items()}
    saved = count(dense["params"]) - count(variables["params"])
    assert everything.sparsity(eligible_only=False) == pytest.approx(saved / sum(kernels.values()))
    of_layers = [kernels[path] for path in everything.sparse]
    assert everything.sparsity() == pytest.approx(saved / sum(of_layers))
    shared = [path for path in everything.sparse if path[0] not in ("mha", "sa")]
    active = sum(everything.sparse[path].num_active for path in shared)
    assert active == pytest.approx(0.5 * sum(kernels[path] for path in shared), abs=32)  # the target, within a block
    assert {everything.sparse["mha", part].density for part in ("query", "out")} == {0.25}


def test_check_compares_with_arrays(everything, shapes):
    dense, variables = shapes
    everything.check(variables["params"])
    with pytest.raises(ValueError, match="linear is planned with 128 weights, not none; pass the parameters"):
        everything.check(dense["params"])
    other = plan_of(Everything(), IDS, IMAGE, TEXT)
    with pytest.raises(ValueError, match=r"is planned with .* weights, not those of \[2, 8, 4\]"):
        other.check(variables["params"])
    fewer = plan_of(Everything(), IDS, IMAGE, TEXT, rules=[*RULES, Rule("linear", dense=True)])
    with pytest.raises(ValueError, match="linear has blocks, but the plan keeps it dense"):
        fewer.check(variables["params"])


def test_the_table_in_a_terminal_and_in_a_notebook(everything):
    terminal = rich.console.Console(file=io.StringIO(), width=200)
    terminal.print(everything)
    texts = [str(everything), everything._repr_html_(), terminal.file.getvalue()]
    for text in texts:
        for name in (*SPARSE, *DENSE):
            assert name in text
        assert "inside of LSTMCell, a recurrent cell" in text
        assert f"{everything.num_params:,} of {everything.num_dense_params:,}" in text
    assert re.search(r"^linear +16x16 +0.5000 +128 +4 of 8x4", texts[0], re.MULTILINE)


def test_plans_are_values(everything):
    again = plan_of(Everything(), IDS, IMAGE, TEXT, rules=RULES)
    assert (again, hash(again)) == (everything, hash(everything))
    assert plan_of(Everything(), IDS, IMAGE, TEXT) != everything


def paths(model, *args, **options):
    return ["/".join(path) for path in plan_of(model, *args, **options).sparse]


def test_layers_of_models_that_are_fields():
    assert paths(Wrapper(WithSetup()), X) == ["inner/encoder", "inner/decoder", "Dense_0"]
    assert paths(nn.Sequential([nn.Dense(16), nn.relu, Layer()]), X) == ["layers_0", "layers_2/Dense_0"]
    assert paths(nn.Dense(16), X) == [""]


def test_sparse_layers_are_named_with_their_reason():
    class Mixed(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return SparseDense(16, density=0.5, block_shape=(8, 4), name="ours")(self.inner(x))

    inner = sparse(WithSetup(), X, rules=[Rule("decoder", dense=True)])
    found = dsb.linen.find_layers(Wrapper(Mixed(inner)), X).layers
    assert {"/".join(path): layer.reason for path, layer in found.items()} == {
        "inner/inner/encoder/blocks": "sparse by a plan of its own",
        "inner/inner/decoder": "kept dense by a plan of its own",
        "inner/ours/blocks": "sparse by its own arguments",
        "Dense_0": None,
    }


class Strict(nn.Module):
    """Takes what is no array, and insists on streams of randomness of its own."""

    @nn.compact
    def __call__(self, batch, kind, train, *, scale):
        assert (kind, train, scale, batch["name"]) == ("text", True, None, "a batch")
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(16)(batch["x"]))
        assert self.has_rng("noise")
        return nn.Dense(16)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    @nn.compact
    def other(self, x):
        return nn.Dense(24, name="other_layer")(x)


def test_arguments_that_are_no_arrays_and_streams_of_randomness():
    batch = {"x": jax.ShapeDtypeStruct((4, 16), jnp.float32), "name": "a batch", "rest": None}
    options = {"kwargs": {"scale": None}, "rngs": dict.fromkeys(("params", "noise", "dropout"), KEY)}
    assert paths(Strict(), batch, "text", True, **options) == ["Dense_0", "Dense_1"]
    with pytest.raises(AssertionError):
        paths(Strict(), batch, "text", True, kwargs={"scale": None})
    with pytest.raises(AssertionError):
        paths(Strict(), batch, "text", False, **options)


@pytest.mark.parametrize(
    "method",
    ["other", Strict.other, Strict().other, lambda model, x: model.other(x)],
    ids=["name", "function", "bound", "lambda"],
)
def test_another_method(method):
    assert paths(Strict(), X, call_method=method) == ["other_layer"]


def test_nothing_is_computed():
    huge = plan_of(nn.Dense(2**19), jax.ShapeDtypeStruct((2**20, 2**15), jnp.float32), block_shape=(16, 16))
    assert huge.num_dense_params == 2**34 + 2**19


def test_a_jitted_layer_is_found_after_it_was_traced_and_still_runs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return JITTED(16)(x)

    variables = Model().init(KEY, X)
    y = Model().apply(variables, X)
    assert paths(Model(), X) == ["JitDense_0"] == paths(Model(), X)
    np.testing.assert_array_equal(Model().apply(Model().init(KEY, X), X), y)


JITTED = nn.jit(nn.Dense)


def test_the_trace_leaves_the_model_as_it_is():
    """Also if it fails halfway, within a layer."""
    calls = []

    def promote(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the first time")
        return promote_dtype(*args, **kwargs)

    model = nn.Dense(16, promote_dtype=promote)
    before = dict(model.__dict__)
    with pytest.raises(RuntimeError, match="the first time"):
        plan_of(model, X)
    assert paths(model, X) == [""]
    assert model.__dict__ == before
    assert isinstance(model.init(KEY, X)["params"]["kernel"], jax.Array)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dense, "is no Linen module; give an instance"),
        ("encoder", "model='encoder' is no Linen module"),
        (nn.Dense(16).bind({}), "this Dense belongs to a parent already; make it with parent=None"),
        (sparse(Layer(), X), "this Layer is sparse already; give the dense model"),
    ],
    ids=["class", "text", "bound", "sparse"],
)
def test_what_cannot_be_planned(model, message):
    for make in (lambda: plan_of(model, X), lambda: dsb.linen.sparsify(model, plan_of(Layer(), X))):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def test_rules():
    rules = (Rule("decoder", dense=True),)
    assert paths(WithSetup(), X, rules=rules) == ["encoder"]
    with pytest.raises(TypeError, match="rules='decoder' is no sequence of rules"):  # report 13
        plan_of(WithSetup(), X, rules="decoder")
    with pytest.raises(ValueError, match="the rule 'decode' matches no layer"):
        plan_of(WithSetup(), X, rules=[Rule("decode", dense=True)])
    with pytest.raises(ValueError, match=r"the rule 'own' has no effect: own stays dense \(a parameter of Own"):
        plan_of(Everything(), IDS, IMAGE, TEXT, rules=[Rule("own", sparsity=0.5)])


class OwnLayer(nn.Module):
    """Somebody's linear layer, with a box around its kernel, and a second array beside it."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
        kernel, table = self.param("kernel", init, (32, 16)), self.param("embedding", init, (16, 16))
        return nn.Dense(32)(x @ kernel @ table)


def test_boxed_parameters_of_other_layers_are_counted():
    found = dsb.linen.find_layers(OwnLayer(), jnp.ones((2, 32)))
    assert {path: layer.spec.size for path, layer in found.layers.items()} == {
        ("Dense_0",): 512,
        (): 256,
        ("kernel",): 512,
    }
    assert found.num_other == 32
    assert "none of Dense, DenseGeneral, Einsum, Conv" in found.layers["kernel",].reason
