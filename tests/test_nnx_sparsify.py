"""`dsb.nnx.sparsify`, `from_dense` and `to_dense`: surgery on models that are built; layers made by hand."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dsb_jax as dsb
from dsb_jax.nnx.layers import SPARSE
from tests.nnx_models import BOTH, CNN, MLP, WIDTH, Attention

SIZES = {"sparsity": 0.75, "block_shape": (8, 4), "min_blocks": 1}
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, WIDTH))


def arrays(tree):
    """Without PRNG keys, which numpy does not know."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(a, b)


def sparse(model, x=X, *, seed=1, **options):
    how = {name: options.pop(name) for name in ("method", "implementation") if name in options}
    return dsb.nnx.sparsify(model, dsb.nnx.plan(model, x, **SIZES | options), rngs=nnx.Rngs(seed), **how)


@pytest.mark.parametrize("name", BOTH)
def test_the_dense_copy_computes_the_same_and_the_way_back_is_bit_equal(name):
    _, cls, shape = BOTH[name]
    x = jax.random.normal(KEY, shape)
    model = sparse(cls(nnx.Rngs(0)), x)
    dense = dsb.nnx.to_dense(model)
    np.testing.assert_allclose(dense(x), model(x), rtol=1e-5, atol=1e-5)
    assert not {type(module) for _, module in nnx.iter_modules(dense)} & set(SPARSE.values())
    as_written = cls(nnx.Rngs(2))
    nnx.update(as_written, nnx.state(dense))  # which loads into the model of the user
    np.testing.assert_array_equal(as_written(x), dense(x))
    back = dsb.nnx.from_dense(dense, topology=dsb.nnx.topology(model))
    assert_same_bits(nnx.state(back), nnx.state(model))


def test_only_planned_kernels_change():
    dense = CNN(nnx.Rngs(0))
    model = nnx.clone(dense)
    first, bias = model.first, model.first.bias
    assert sparse(model, jnp.zeros((2, 6, 6, 8))) is model
    assert model.first is first
    assert model.first.bias is bias
    assert isinstance(model.first, nnx.Conv)
    assert type(model.second).__name__ == "SparseConv"
    assert model.second.padding == "CIRCULAR"
    assert type(model.third) is nnx.Linear  # smaller than a block
    paths = {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert paths == {"first/blocks", "first/bias", "second/blocks", "second/bias", "third/kernel", "third/bias"}
    with pytest.raises(AttributeError, match="SparseConv 3x3x8x16 is sparse and has `blocks`, no kernel; if its"):
        model.first.kernel  # noqa: B018


def test_values_are_the_dense_draw_scaled_to_the_fan_in_that_is_left():
    dense = MLP(nnx.Rngs(0))
    kernel = dense.first.kernel[...]
    model = sparse(dense)
    mask = dsb.masks(dsb.nnx.topology(model))["first"]["kernel"]
    weights = dsb.nnx.to_dense(model).first.kernel[...]
    left = mask.sum(axis=0)
    wanted = jnp.where(mask, kernel * jnp.sqrt(WIDTH / left)[None], 0)
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_layers_draw_by_their_path_and_the_key_alone():
    assert_same_bits(nnx.state(sparse(MLP(nnx.Rngs(0)))), nnx.state(sparse(MLP(nnx.Rngs(0)))))
    one, other = sparse(MLP(nnx.Rngs(0))), sparse(MLP(nnx.Rngs(0)), seed=2)
    assert np.any(one.first.topology.layout.in_idx != other.first.topology.layout.in_idx)
    plan = dsb.nnx.plan(MLP(nnx.Rngs(0)), X, **SIZES)
    by_key = dsb.nnx.sparsify(MLP(nnx.Rngs(0)), plan, rngs=nnx.Rngs(1).params())
    assert_same_bits(nnx.state(by_key), nnx.state(one))


def test_pre_trained_kernels_keep_their_largest_weights_bit_by_bit():
    dense = Attention(nnx.Rngs(0))
    kernels = dsb.nnx.params(dense)
    model = dsb.nnx.from_dense(dense, dsb.nnx.plan(dense, jnp.zeros((2, 5, WIDTH)), **SIZES))
    kept = dsb.nnx.params(dsb.nnx.to_dense(model))
    masks = dsb.masks(dsb.nnx.topology(model))
    for name in ("query", "out"):
        kernel, mask = kernels["attention"][name]["kernel"], masks["attention"][name]["kernel"]
        np.testing.assert_array_equal(kept["attention"][name]["kernel"], jnp.where(mask, kernel, 0))
        assert abs(kernel[mask]).mean() > 1.1 * abs(kernel).mean()


@pytest.mark.parametrize("method", [dsb.methods.RigL(), dsb.methods.TopKAST(backward_factor=1.5)], ids=lambda m: m.name)
def test_layers_hold_what_their_method_stores(method):
    model = sparse(MLP(nnx.Rngs(0)), method=method)
    assert model.first.topology.spec.storage == method.storage
    np.testing.assert_allclose(dsb.nnx.to_dense(model)(X), model(X), rtol=1e-5, atol=1e-5)
    dsb.validate_topology(dsb.nnx.topology(model))


def test_sparse_models_are_copied_shown_and_traced_like_others():
    model = sparse(MLP(nnx.Rngs(0)), implementation="dense")
    wanted = model(X)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nnx.clone(model),
        nnx.merge(*nnx.split(model)),
    ):
        np.testing.assert_array_equal(other(X), wanted)
        assert other.first.implementation == "dense"
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, X), wanted, rtol=1e-5, atol=1e-6)
    assert "blocks" in nnx.tabulate(model, X)
    assert "SparseLinear" in repr(model)
    gradients = nnx.grad(lambda model: model(X).sum())(model)  # of nnx.Param alone, without a word
    assert set(gradients["first"]) == {"blocks", "bias"}


def test_abstract_and_compiled_initialization():
    plan = dsb.nnx.plan(nnx.eval_shape(lambda: MLP(nnx.Rngs(0))), X, **SIZES)

    def make():
        return dsb.nnx.sparsify(MLP(nnx.Rngs(0)), plan, rngs=nnx.Rngs(1))

    concrete, compiled = nnx.state(make()), nnx.state(nnx.jit(make)())
    assert jax.tree.structure(nnx.state(nnx.eval_shape(make))) == jax.tree.structure(concrete)
    for a, b in zip(arrays(compiled), arrays(concrete), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_sharding_metadata_follows():
    """Lifted axes keep their names; no axis of blocks is an input or an output."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            names = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.linear = nnx.Linear(WIDTH, WIDTH, kernel_init=names, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    with nnx.use_eager_sharding(False):
        model = sparse(Net(nnx.Rngs(0)))
        assert model.linear.blocks.get_metadata("out_sharding") == (None, None, None)
        assert dsb.nnx.to_dense(model).linear.kernel.get_metadata("out_sharding") == (None, None)


@settings(max_examples=3)  # the geometry is what Linen layers have, and tested there
@given(
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.sampled_from([None, 1, 2, (2, 1)]),
    padding=st.sampled_from(["SAME", "VALID", "CIRCULAR", "REFLECT", 1, (1, 2), ((0, 1), (2, 0))]),
    use_bias=st.booleans(),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    dtype=st.sampled_from([None, jnp.bfloat16]),
)
def test_convolutions_are_those_of_flax(kernel_size, strides, padding, use_bias, batch, dtype):
    layer = dsb.nnx.SparseConv(
        4, 8, kernel_size, strides, padding=padding, use_bias=use_bias, dtype=dtype, rngs=nnx.Rngs(0), density=0.5,
        block_shape=(4, 2), implementation="dense",
    )  # fmt: skip
    x = jax.random.normal(KEY, (*batch, 5, 6, 4))
    ours, theirs = layer(x), dsb.nnx.to_dense(layer)(x)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    tolerance = 1e-5 if dtype is None else 3e-2
    np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=tolerance, atol=tolerance)


def test_layers_by_hand():
    rngs, sizes = nnx.Rngs(0), {"density": 0.25, "block_shape": (8, 4)}
    image = jax.random.normal(KEY, (2, 5, 5, 16))
    layers = [
        (dsb.nnx.SparseLinear(WIDTH, 64, rngs=rngs, **sizes), X),
        (dsb.nnx.SparseLinearGeneral((4, 8), 64, axis=(-2, -1), rngs=rngs, **sizes), X.reshape(4, 4, 8)),
        (dsb.nnx.SparseEinsum("...d,df->...f", (WIDTH, 64), (64,), rngs=rngs, **sizes), X),
        (dsb.nnx.SparseConv(16, 64, (3, 3), padding=1, rngs=rngs, **sizes), image),
        (dsb.nnx.SparseConv(16, 64, (3, 3), rngs=rngs, **sizes), image[0]),  # without a batch
    ]
    for layer, x in layers:
        assert layer.topology.spec.density == 0.25
        np.testing.assert_allclose(dsb.nnx.to_dense(layer)(x), layer(x), rtol=1e-5, atol=1e-5)
    dense = dsb.nnx.SparseLinear(WIDTH, 64, rngs=rngs)
    assert dense.kernel.shape == (WIDTH, 64)
    assert sparse(dense).topology.spec.num_blocks == 16  # which a plan makes sparse


@pytest.mark.parametrize("density", [None, 0.25], ids=["dense", "sparse"])
def test_feature_major_layers(density):
    sizes = {} if density is None else {"density": density, "block_shape": (8, 4)}
    linear, other = (
        dsb.nnx.SparseLinear(WIDTH, 64, rngs=nnx.Rngs(0), feature_major=major, **sizes) for major in (True, False)
    )
    np.testing.assert_allclose(linear(X.T), other(X).T, rtol=1e-5, atol=1e-5)
    conv, other = (
        dsb.nnx.SparseConv(16, WIDTH, (3, 3), rngs=nnx.Rngs(0), feature_major=major, **sizes) for major in (True, False)
    )
    image = jax.random.normal(KEY, (2, 5, 5, 16))
    np.testing.assert_allclose(
        conv(image.transpose(3, 1, 2, 0)), other(image).transpose(3, 1, 2, 0), rtol=1e-5, atol=1e-5
    )  # fmt: skip
    assert dsb.nnx.to_dense(conv)(image.transpose(3, 1, 2, 0)).shape == (WIDTH, 5, 5, 2)


def test_parameters_from_elsewhere():
    """By the names of the model; those of a list as numbers or as texts. Or nothing changes."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    model = sparse(Net(nnx.Rngs(0)))
    params, topology = dsb.nnx.params(model), dsb.nnx.topology(model)
    as_text = {"layers": {str(i): layer for i, layer in params["layers"].items()}}
    for named in (params, as_text):
        other = dsb.nnx.load_params(Net(nnx.Rngs(2)), named, topology)
        assert_same_bits(nnx.state(other), nnx.state(model))
    np.testing.assert_array_equal(
        dsb.nnx.load_params(Net(nnx.Rngs(2)), dsb.to_dense(params, topology))(X), dsb.nnx.to_dense(model)(X)
    )
    other = Net(nnx.Rngs(2))
    before = nnx.state(other)
    wrong = {
        "layers/1/bias is missing in params": ({"layers": {0: params["layers"][0], 1: {"blocks": 0}}}, topology),
        "layers/0/blocks is .* in params and missing in the model": (params, None),
        "layers/0/bias is .3,. in params and .32,. in": (
            {"layers": {**params["layers"], 0: params["layers"][0] | {"bias": jnp.zeros(3)}}}, topology
        ),
        "no layer Dense_0": (params, {"Dense_0": topology["layers"][0]}),
    }  # fmt: skip
    for message, (values, where) in wrong.items():
        with pytest.raises(ValueError, match=message):
            dsb.nnx.load_params(other, values, where)
    assert_same_bits(nnx.state(other), before)


def other_plan():
    return dsb.nnx.plan(Attention(nnx.Rngs(0)), jnp.zeros((2, 5, WIDTH)), **SIZES)


def wide_plan():
    model = MLP(nnx.Rngs(0))
    model.first = nnx.Linear(WIDTH, 128, rngs=nnx.Rngs(0))
    return dsb.nnx.plan(model, **SIZES)


ERRORS = {
    "no model": (lambda: dsb.nnx.sparsify(nnx.Linear, other_plan(), rngs=nnx.Rngs(0)), "is no nnx.Module"),
    "no plan": (lambda: dsb.nnx.sparsify(MLP(nnx.Rngs(0)), {}, rngs=nnx.Rngs(0)), "is no SparsityPlan"),
    "another's plan": (
        lambda: dsb.nnx.sparsify(MLP(nnx.Rngs(0)), other_plan(), rngs=nnx.Rngs(0)), "has no layer attention/query",
    ),
    "other sizes": (
        lambda: dsb.nnx.sparsify(MLP(nnx.Rngs(0)), wide_plan(), rngs=nnx.Rngs(0)),
        r"first has a kernel of \(32, 64\), but its plan was made for \(32, 128\)",
    ),
    "a seed": (
        lambda: dsb.nnx.sparsify(MLP(nnx.Rngs(0)), dsb.nnx.plan(MLP(nnx.Rngs(0)), X, **SIZES), rngs=1),
        "rngs=1 is neither nnx.Rngs nor a PRNG key",
    ),
    "a method's class": (lambda: sparse(MLP(nnx.Rngs(0)), method=dsb.methods.DSB), "give a value"),
    "an implementation": (lambda: sparse(MLP(nnx.Rngs(0)), implementation="fast"), "implementation='fast' is unknown"),
    "neither": (lambda: dsb.nnx.from_dense(MLP(nnx.Rngs(0))), "a plan, which chooses a pattern, or a topology"),
    "two numbers": (
        lambda: dsb.nnx.SparseLinear(8, 8, density=0.5, num_blocks=2, rngs=nnx.Rngs(0)), "are both given",
    ),
    "no density": (lambda: dsb.nnx.SparseLinear(8, 8, density=2, rngs=nnx.Rngs(0)), r"density=2 is not in \(0, 1\]"),
    "sizes of the input": (
        lambda: dsb.nnx.SparseLinear(WIDTH, 8, density=0.5, block_shape=(4, 4), rngs=nnx.Rngs(0))(X[:, :5]),
        "SparseLinear 32x8 holds a matrix of 8 outputs x 32 inputs, but .* make it 8 x 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ERRORS)
def test_errors_say_what_was_wrong(call):
    function, message = ERRORS[call]
    with pytest.raises(ValueError, match=message):
        function()


def test_a_model_that_is_sparse_already_stays_as_it_is():
    model = MLP(nnx.Rngs(0))
    plan = dsb.nnx.plan(model, X, **SIZES)
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1))
    before = nnx.split(model)
    with pytest.raises(ValueError, match=r"first is sparse already; give the dense model \(dsb_jax.nnx.to_dense\)"):
        dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="first is sparse already"):
        dsb.nnx.from_dense(model, plan)
    assert nnx.graphdef(model) == before[0]
    assert_same_bits(nnx.state(model), before[1])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda **o: dsb.nnx.SparseConv(16, 16, (3,), **o), r"kernel_size=\(3,\) of SparseConv has no sparse form"),
        (lambda **o: dsb.nnx.SparseConv(16, 16, (3, 3), feature_group_count=2, **o), "feature_group_count=2 of"),
        (lambda **o: dsb.nnx.SparseEinsum("bhk,hkj->bhj", (4, 8, 8), None, **o), "einsum_str=bhk,hkj->bhj of"),
    ],
)
def test_what_has_no_sparse_form_is_refused_by_hand(layer, message):
    with pytest.raises(NotImplementedError, match=message):
        layer(density=0.5, block_shape=(4, 4), rngs=nnx.Rngs(0))


def test_no_sharding_of_the_output_by_the_product():
    layer = dsb.nnx.SparseLinear(WIDTH, 8, density=0.5, block_shape=(4, 4), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match=r"out_sharding=.* of SparseLinear 32x8 is not served"):
        layer(X, out_sharding=jax.sharding.PartitionSpec(None, None))


def test_optimizers_need_no_word():
    model = sparse(MLP(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    before = nnx.as_pure(nnx.state(model))
    gradients = nnx.grad(lambda model: model(X).sum())(model)
    optimizer.update(model, gradients)
    after = nnx.as_pure(nnx.state(model))
    assert_same_bits(after["first"]["topology"], before["first"]["topology"])
    assert np.any(after["first"]["blocks"] != before["first"]["blocks"])
