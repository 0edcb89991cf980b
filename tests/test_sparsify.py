"""`sparsify`: foreign Linen models with sparse weights, as values, as parts of other models, by any method."""

import copy
import pickle

import flax.core
import jax
import numpy as np
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.methods import DSB, SET, RigL, Static, TopKAST
from dsb_jax.ops.dispatch import record_choices
from dsb_jax.paths import nodes
from tests.linen_models import (
    KEY,
    MODEL,
    PLAN,
    Layer,
    WithSetup,
    Wrapper,
    X,
    assert_close,
    assert_like_dense,
    plan_of,
    sparse,
)


class Attention(nn.Module):
    """Auto-named layers, several axes, a convolution with circular padding, a layer called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 1), padding="CIRCULAR", use_bias=False)(x.reshape(1, 4, 1, 16))[:, :, 0]
        x += nn.MultiHeadDotProductAttention(2)(x, x)
        shared = nn.Dense(16)
        x = nn.tanh(shared(nn.tanh(shared(x))))
        x = nn.Einsum((16, 4, 4))(x, einsum_str="...d,dhk->...hk")  # an equation of the call
        x = nn.Einsum((4, 4, 16), "...hk,hkd->...d", use_bias=False)(inputs=x)
        return nn.DenseGeneral((2, 8), axis=(0, -2))(inputs=x)


class Tied(nn.Module):
    """Its last product takes parameters of its own, which no plan knows."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.normal(), (16, 16))
        return nn.Dense(16, use_bias=False, parent=None).apply({"params": {"kernel": table.T}}, nn.Dense(16)(x))


class Recursive(nn.Module):
    depth: int = 1

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(16 + 8 * self.depth)(x))
        return type(self)(self.depth - 1)(x) if self.depth else x


class Calls(nn.Module):
    """Calls two methods of a model, one after the other."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner.decode(self.inner.encode(x))


class Inline(nn.Module):
    """Makes a model where it calls it; `sparsify` is what makes it sparse."""

    is_sparse: bool = True

    @nn.compact
    def __call__(self, x):
        model = WithSetup(parent=None) if self.is_sparse else WithSetup()
        model = sparse(model, plan=PLAN) if self.is_sparse else model
        return nn.Dense(16)(model.decode(x) + model(x))


MODELS = {
    "with setup": (WithSetup(), None),
    "a layer alone": (nn.Dense(16), None),
    "attention": (Attention(), None),
    "tied": (Tied(), None),
    "recursive": (Recursive(), None),
    "sequential": (nn.Sequential([nn.Dense(16), nn.tanh, Layer()]), None),
    "wrapper": (Wrapper(WithSetup()), None),  # finding 1
    "inside": (Wrapper(WithSetup()), Wrapper(MODEL)),
    "two methods": (Calls(WithSetup()), Calls(MODEL)),
    "inline": (Inline(False), Inline()),
    "twice sparse": (Wrapper(WithSetup()), sparse(Wrapper(MODEL), X)),
}
LAYERS = {"attention": 8, "wrapper": 3, "twice sparse": 3, "a layer alone": 1, "tied": 1}


@pytest.mark.parametrize("name", MODELS)
def test_sparse_models_are_dense_ones_with_zeros(name):
    model, made = MODELS[name]
    made = sparse(model, X) if made is None else made
    variables = assert_like_dense(made, model, X)
    found = nodes(variables["topology"])
    assert len(found) == LAYERS.get(name, 2)
    assert all(node.spec.density == 0.5 for node in found.values())


@pytest.mark.parametrize("method", [Static(), TopKAST()], ids=lambda method: method.name)
def test_weights_are_the_draw_of_the_dense_model(method):
    """Of the same key; blocks are scaled by sqrt(in / fan_in), alike in each row group."""
    model = sparse(WithSetup(), plan=PLAN, method=method)
    drawn = WithSetup().init(KEY, X)["params"]
    variables = model.init(KEY, X)
    kept = dsb.to_dense(variables["params"], variables["topology"])
    for name in ("encoder", "decoder"):
        weights, kernel = np.asarray(kept[name]["kernel"]), np.asarray(drawn[name]["kernel"])
        scale = np.sqrt(16 / (weights != 0).sum(axis=0)) if method.storage == "blocks" else np.ones(16)
        assert (weights != 0).sum() == 128
        np.testing.assert_allclose(weights, np.where(weights != 0, kernel * scale, 0), rtol=1e-6)


def test_parameters_after_the_first_method_are_the_draw_of_the_dense_model():
    class Late(nn.Module):
        def setup(self):
            self.early = nn.Dense(16)

        def encode(self, x):
            return self.early(x)

        @nn.compact
        def decode(self, x):
            return x * self.param("scale", nn.initializers.normal(1.0), (1, 16))

    model = sparse(Late(), X, call_method="encode")
    late = Calls(model).init(KEY, X)["params"]["inner"]
    assert set(late["early"]) == {"bias", "blocks"}
    np.testing.assert_array_equal(late["scale"], Calls(Late()).init(KEY, X)["params"]["inner"]["scale"])


def test_randomness_and_other_collections_are_those_of_the_dense_model():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(Layer()(x))
            self.sow("intermediates", "dropped", x)
            return nn.BatchNorm(use_running_average=False)(x + jax.random.normal(self.make_rng("noise"), x.shape))

    model, rngs = sparse(Noisy(), X), {"dropout": jax.random.key(1), "noise": jax.random.key(2)}
    variables, dense = (m.init({"params": KEY, **rngs}, X) for m in (model, Noisy()))
    dense["params"] = dsb.to_dense(variables["params"], variables["topology"])
    for options in (
        {"mutable": ["batch_stats"]},
        {"mutable": ["batch_stats", "intermediates"], "capture_intermediates": True},
        {"mutable": flax.core.DenyList(["params", "topology"])},
    ):
        results = [m.apply(v, X, rngs=rngs, **options) for m, v in ((model, variables), (Noisy(), dense))]
        assert_close(*results)
    y, new = model.apply(variables, X, rngs=rngs, mutable=True)
    assert_close(y, results[1][0])
    assert_close(new.pop("intermediates"), results[1][1]["intermediates"])
    assert_close(new.pop("batch_stats"), results[1][1]["batch_stats"])
    assert jax.tree.structure(new) == jax.tree.structure({name: variables[name] for name in ("params", "topology")})


def test_models_are_values():
    other = sparse(WithSetup(), plan=plan_of(WithSetup(), X, sparsity=0.75))
    for same in (sparse(WithSetup(), X), pickle.loads(pickle.dumps(MODEL)), copy.deepcopy(MODEL), MODEL.clone()):
        assert (same, hash(same), type(same)) == (MODEL, hash(MODEL), type(MODEL))
    unequal = [WithSetup(), other, sparse(WithSetup(), plan=PLAN, method=RigL()),
               sparse(WithSetup(), plan=PLAN, implementation="reference")]  # fmt: skip
    assert MODEL not in unequal
    assert len({MODEL, *unequal}) == 5
    assert isinstance(MODEL, WithSetup)
    assert (type(MODEL).__name__, repr(MODEL)) == ("WithSetup", repr(WithSetup()))
    traces = []

    def apply(model, variables, x):
        traces.append(model)
        return model.apply(variables, x)

    run, variables = jax.jit(apply, static_argnums=0), MODEL.init(KEY, X)
    np.testing.assert_array_equal(run(MODEL, variables, X), run(sparse(WithSetup(), X), variables, X))
    assert traces == [MODEL]


METHODS = {
    "name": "encode",
    "bound": MODEL.encode,
    "bound to the dense model": WithSetup().encode,
    "of the dense class": WithSetup.encode,
    "of the sparse class": type(MODEL).encode,
    "lambda": lambda model, x: model.encode(x),
    "lambda with a layer": lambda model, x: nn.tanh(model.encoder(x)),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    variables = MODEL.init(KEY, X)
    wanted = WithSetup().apply({"params": dsb.to_dense(variables["params"], variables["topology"])}, X, method="encode")
    assert_close(MODEL.apply(variables, X, method=METHODS[name]), wanted)
    assert_close(MODEL.bind(variables).encode(X), wanted)
    assert_close(nn.apply(lambda model, x: model.encode(x), MODEL)(variables, X), wanted)
    some = MODEL.init(KEY, X, method=METHODS[name])
    assert [list(some[collection]) for collection in ("params", "topology")] == [["encoder"], ["encoder"]]
    assert_close(some["params"]["encoder"], variables["params"]["encoder"])


def test_private_methods_and_doors_to_initialization():
    variables = MODEL.init(KEY, X)
    assert_close(MODEL.apply(variables, X, method="_last"), MODEL.apply(variables, X, method="decode"))
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for same in (
        MODEL.lazy_init(KEY, shape),
        MODEL.init_with_output(KEY, X)[1],
        nn.init(type(MODEL).__call__, MODEL)(KEY, X),
    ):
        assert_close(same, variables)
    assert MODEL.bind(variables).unbind()[0] == MODEL
    table = MODEL.tabulate(KEY, X, console_kwargs={"width": 200})
    assert table.count(" blocks: ") == 4
    assert "kernel" not in table.replace("kernel_shape", "")


def test_a_model_that_applies_itself():
    class Distilled(nn.Module):
        @nn.compact
        def __call__(self, x, teacher=None):
            y = nn.Dense(16)(x)
            return y if teacher is None else (y, self.clone(parent=None).apply(teacher, x))

    model = sparse(Distilled(), X)
    variables, teacher = (model.init(jax.random.key(seed), X) for seed in (0, 1))
    y, of_teacher = model.apply(variables, X, teacher)
    assert_close(of_teacher, model.apply(teacher, X))
    assert np.abs(y - of_teacher).max() > 0.1


def test_equal_models_side_by_side_draw_their_own():
    class Pair(nn.Module):
        one: nn.Module
        two: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.two(self.one(x))

    models = [sparse(WithSetup(), X, method=Static()) for _ in range(2)]
    topology = Pair(*models).init(KEY, X)["topology"]
    layouts = [node.layout.in_idx.tobytes() for node in jax.device_get(nodes(topology)).values()]
    assert len(set(layouts)) == 4
    assert list(Pair(MODEL, MODEL).init(KEY, X)["topology"]) == ["one"]  # shared


def test_the_implementation_is_the_one_that_was_asked_for():
    variables = MODEL.init(KEY, X)
    for name in ("dense", "reference", "xla"):
        with record_choices() as choices:
            y = sparse(WithSetup(), plan=PLAN, implementation=name).apply(variables, X)
        assert {path: choice.implementation for path, choice in choices.items()} == {
            ("encoder",): name,
            ("decoder",): name,
        }
        assert_close(y, MODEL.apply(variables, X))


@pytest.mark.parametrize("method", [RigL(), SET(), TopKAST(), DSB()], ids=lambda method: method.name)
def test_every_method_s_layers(method):
    model = sparse(WithSetup(), plan=PLAN, method=method)
    variables = model.init(KEY, X)
    PLAN.check(variables["params"])
    assert {node.spec.storage for node in nodes(variables["topology"]).values()} == {method.storage}
    dense = dsb.to_dense(variables["params"], variables["topology"])
    assert_close(model.apply(variables, X), WithSetup().apply({"params": dense}, X))


def test_wrappers_that_rewrite_kernels_keep_theirs_dense():
    """Report 15: in a foreign model."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.SpectralNorm(nn.Dense(16))(nn.WeightNorm(nn.Dense(16))(x), update_stats=False)
            return nn.Dense(16)(x)

    variables = sparse(Normed(), X).init(KEY, X)
    assert list(variables["topology"]) == ["Dense_2"]
