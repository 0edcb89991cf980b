"""`SparseConv` and `SparseDense` are drop-in: the dense layer without a density, its sparse equal with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.layout import BlockLayout, validate
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.methods import DSB, SET, RigL, Static, TopKAST
from dsb_jax.plan import make_plan
from dsb_jax.spec import conv_spec, linear_spec
from dsb_jax.topology import LayerTopology
from tests.classifiers import by_numpy
from tests.topologies import UNPACK, DrawnByNumPy, in_place

CONVS = {
    "defaults": {"kernel_size": (3, 3)},
    "1x1, stride 2": {"kernel_size": (1, 1), "strides": 2},
    "valid, pair of strides": {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID"},
    "same, stride 2": {"kernel_size": (4, 3), "strides": (2, 2), "padding": "SAME"},
    "circular": {"kernel_size": (3, 4), "padding": "CIRCULAR", "strides": (1, 2)},
    "reflecting": {"kernel_size": (3, 3), "padding": "REFLECT"},
    "one int": {"kernel_size": (3, 3), "padding": 2},
    "ints": {"kernel_size": (3, 3), "padding": (0, 2), "use_bias": False},
    "pairs": {"kernel_size": [3, 3], "padding": [(0, 2), (1, 0)], "strides": [2, 3]},
}
# `test_ops` compares implementations.
BLOCKS = {"density": 0.5, "block_shape": (4, 4), "implementation": "dense", "method": DrawnByNumPy()}
BLOCKS |= {"kernel_init": by_numpy}
KEY = jax.random.key(3)


def normal(*shape):
    return np.random.default_rng(3).standard_normal(shape, np.float32)


def dense_twin(variables):
    """The variables of the dense layer that has the unpacked kernel, in its own shape."""
    params, node = dict(jax.device_get(variables["params"])), variables["topology"]["blocks"]
    blocks = params.pop("blocks")
    blocks = blocks if node.aux is None else np.asarray(node.aux.forward(blocks))
    return {"params": {**params, "kernel": node.spec.from_matrix(np.nan_to_num(in_place(blocks, node.layout)))}}


@pytest.mark.parametrize("name", CONVS)
def test_conv_without_density_is_nn_conv(name):
    x = normal(2, 7, 6, 4)
    layers = [layer(8, **CONVS[name]) for layer in (SparseConv, nn.Conv)]
    (y, variables), (wanted, dense_variables) = jax.jit(lambda x: [one.init_with_output(KEY, x) for one in layers])(x)
    assert jax.tree.structure(variables) == jax.tree.structure(dense_variables)
    # Within rounding: small images are multiplied as patches, and each function is fused in its own way.
    for a, b in zip(jax.tree.leaves((y, variables)), jax.tree.leaves((wanted, dense_variables)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("extra", [{}, {"density": 1}, {"density": 1.0, "dtype": jnp.bfloat16}])
def test_dense_without_density_is_nn_dense(extra):
    x = normal(2, 3, 12)
    layers = SparseDense(8, **extra), nn.Dense(8, dtype=extra.get("dtype"))
    (y, variables), (wanted, dense_variables) = jax.jit(lambda x: [one.init_with_output(KEY, x) for one in layers])(x)
    assert jax.tree.structure(variables) == jax.tree.structure(dense_variables)
    for a, b in zip(jax.tree.leaves((y, variables)), jax.tree.leaves((wanted, dense_variables)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", CONVS)
def test_conv_equals_the_dense_one_with_the_unpacked_kernel(name):
    x = normal(2, 7, 6, 4)
    sparse = SparseConv(8, **CONVS[name], **BLOCKS, bias_init=by_numpy)
    y, variables = jax.jit(sparse.init_with_output)(KEY, x)
    wanted = jax.jit(nn.Conv(8, **CONVS[name]).apply)(dense_twin(variables), x)
    assert y.shape == wanted.shape
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 1)])
def test_unbatched_and_more_batch_dimensions(lead):
    x = normal(*lead, 5, 6, 4)
    sparse = SparseConv(8, (3, 3), **BLOCKS), SparseDense(8, **BLOCKS)
    dense = nn.Conv(8, (3, 3)), nn.Dense(8)
    results = jax.jit(lambda x: [layer.init_with_output(KEY, x) for layer in sparse])(x)
    twins = [dense_twin(variables) for _, variables in results]
    both = jax.jit(lambda x, twins: [layer.apply(twin, x) for layer, twin in zip(dense, twins, strict=True)])
    wanted = both(x, twins)
    for (y, _), one in zip(results, wanted, strict=True):
        assert y.shape == one.shape == (*lead, 5, 6, 8)
        np.testing.assert_allclose(y, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [BLOCKS, {}], ids=["sparse", "dense"])
def test_feature_major_is_the_same_layer(options):
    x = normal(2, 5, 6, 4)
    conv = functools.partial(SparseConv, 8, (3, 3), strides=2, bias_init=by_numpy, **options)
    dense = functools.partial(SparseDense, 8, bias_init=by_numpy, **options)

    @jax.jit
    def results(x):
        y, variables = conv().init_with_output(KEY, x)
        major = conv(feature_major=True).apply(variables, x.transpose(3, 1, 2, 0))
        z, variables = dense().init_with_output(KEY, x[:, 0, 0])
        return (major.transpose(3, 1, 2, 0), y), (dense(feature_major=True).apply(variables, x[:, 0, 0].T).T, z)

    for major, y in results(x):
        np.testing.assert_allclose(major, y, rtol=1e-5, atol=1e-6)


def test_collections_hold_floats_here_and_integers_there():
    sparse = SparseConv(10, (3, 3), num_blocks=7, block_shape=(4, 4))
    init = jax.jit(sparse.init)
    variables = init(KEY, np.zeros((1, 4, 4, 4), np.float32))
    assert set(variables) == {"params", "topology"}
    assert {k: v.shape for k, v in variables["params"].items()} == {"blocks": (7, 4, 4), "bias": (10,)}
    assert set(variables["topology"]) == {"blocks"}
    node = variables["topology"]["blocks"]
    assert isinstance(node, LayerTopology)
    assert (node.spec, node.aux) == (conv_spec((3, 3), 4, 10).with_blocks((4, 4), 7), None)
    layout = node.layout
    assert isinstance(layout, BlockLayout)
    validate(layout)
    assert (layout.shape, layout.block_shape) == ((10, 36), (4, 4))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables["params"]))
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(variables["topology"]))
    phantom = np.asarray(UNPACK(np.ones((7, 4, 4), np.float32), layout)).sum() - layout.num_active
    assert phantom == 0
    assert np.count_nonzero(variables["params"]["blocks"]) == layout.num_active  # phantom weights begin as zero
    same = init(KEY, np.zeros((1, 4, 4, 4), np.float32))
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("density", "init", "method"), [
    (0.05, nn.initializers.he_normal(), DrawnByNumPy()), (0.2, nn.initializers.lecun_uniform(), Static()),
    (0.5, nn.initializers.he_normal(), DrawnByNumPy()),
])  # fmt: skip
def test_outputs_have_the_variance_of_the_dense_layer(density, init, method):
    x = normal(512, 256)
    sizes = {"features": 256, "kernel_init": init, "use_bias": False}
    sparse = SparseDense(**sizes, density=density, block_shape=(16, 4), implementation="dense", method=method)
    # The same key: the weights of both are drawn once.
    layers = nn.Dense(**sizes), sparse
    wanted, y = jax.device_get(jax.jit(lambda x: [layer.init_with_output(KEY, x)[0] for layer in layers])(x))
    # The variance is an estimate from 3264 weights or more: its root is known within 1.2 % (one sigma).
    assert np.sqrt(np.square(y.std(axis=0)).mean()) == pytest.approx(float(wanted.std()), rel=0.05)


def test_each_group_has_the_variance_of_its_own_fan_in():
    """One group reads 8 columns, the other 120; the outputs of both vary as those of the dense layer."""
    x = normal(256, 128)
    sparse = SparseDense(
        128, num_blocks=16, block_shape=(64, 8), method=DrawnByNumPy(counts=(1, 15)), implementation="dense",
        kernel_init=nn.initializers.lecun_normal(),
    )  # fmt: skip
    y, variables = jax.jit(sparse.init_with_output)(KEY, x)
    out_idx = variables["topology"]["blocks"].layout.out_idx
    groups = np.sqrt(np.square(np.asarray(y).std(axis=0)[out_idx]).mean(axis=1))
    np.testing.assert_allclose(groups, 1, rtol=0.1)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype", "result"),
    [
        (None, jnp.float32, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize(("layer", "args"), [(SparseDense, (8,)), (SparseConv, (8, (1, 1)))])
def test_dtypes_as_in_flax(layer, args, dtype, param_dtype, x_dtype, result):
    x = jnp.ones((2, 1, 1, 8), x_dtype)
    init = functools.partial(jax.eval_shape, rngs=KEY, x=x)

    def shapes(layer, **extra):
        model = layer(*args, dtype=dtype, param_dtype=param_dtype, **extra)
        return init(lambda rngs, x: model.init_with_output(rngs, x))

    y, variables = shapes(layer, **BLOCKS)
    dense_y, dense_variables = shapes(layer)
    assert y.dtype == dense_y.dtype == result
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((variables["params"], dense_variables["params"]))}
    assert dtypes == {jnp.dtype(param_dtype)}


CONV_ERRORS = {
    "dilation": ({"kernel_dilation": 2}, r"kernel_dilation=2 of conv has no sparse form \(2-D, dilation 1"),
    "input dilation": ({"input_dilation": (2, 1), "padding": 1}, r"input_dilation=\(2, 1\)"),
    "groups": ({"feature_group_count": 2}, r"feature_group_count=2 .* keep this layer dense"),
    "1-D": ({"kernel_size": (3,)}, r"kernel_size=\(3,\)"),
    "1-D as an int": ({"kernel_size": 3}, r"kernel_size=3"),
    "3-D": ({"kernel_size": (1, 3, 3)}, r"kernel_size=\(1, 3, 3\)"),
    "mask": ({"mask": jnp.ones((3, 3, 8, 8))}, r"mask="),
}


class Wrap(nn.Module):
    """Gives the layer a name, as a model would."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


def build(layer, *args, x=None, **options):
    model = Wrap(functools.partial(layer, *args, name="conv", **options))
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, 4, 4, 8)) if x is None else x)


@pytest.mark.parametrize("name", CONV_ERRORS)
def test_what_has_no_sparse_form_is_refused_and_served_densely(name):
    options, message = CONV_ERRORS[name]
    options = {"features": 8, "kernel_size": (3, 3), **options}
    x = jnp.zeros({"1-D": (1, 4, 8), "1-D as an int": (1, 4, 8), "3-D": (1, 4, 4, 4, 8)}.get(name, (1, 4, 4, 8)))
    with pytest.raises(NotImplementedError, match=message):
        build(SparseConv, **options, density=0.5, block_shape=(4, 4), x=x)
    assert "kernel" in build(SparseConv, **options, x=x)["params"]["conv"]


@pytest.mark.parametrize(("layer", "args"), [(SparseDense, (8,)), (SparseConv, (8, (3, 3)))])
def test_errors_name_the_layer_and_the_cure(layer, args):
    dense = linear_spec(8, 8) if layer is SparseDense else conv_spec((3, 3), 8, 8)
    plan, other = (
        make_plan({(name,): dense}, sparsity=0.5, block_shape=(4, 4), min_blocks=1) for name in ("conv", "body")
    )
    for options, message in (
        ({"density": 0.5, "plan": plan}, "density and plan are both given for conv; give one of them"),
        ({"density": 0.5, "num_blocks": 1}, "density and num_blocks are both given for conv"),
        ({"num_blocks": 1, "plan": plan}, "num_blocks and plan are both given for conv"),
        ({"density": 0.0}, r"density=0.0 is not in \(0, 1\]; density is 1 - sparsity"),
        ({"density": 1.5}, r"density=1.5 is not in \(0, 1\]"),
        ({"density": 0.5, "implementation": "fast"}, "implementation='fast' is unknown"),
        ({"density": 0.5, "block_shape": (16, 4)}, "block_shape=16x4 is larger than the 8x"),
        ({"num_blocks": 999, "block_shape": (4, 4)}, r"num_blocks=999 does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            build(layer, *args, **options)
    with pytest.raises(ValueError, match=r"conv has a kernel of \(.*8, 12\), but its plan was made for \(.*8, 8\)"):
        build(layer, 12, *args[1:], plan=plan)
    with pytest.raises(KeyError, match=r"no layer 'conv' in the plan, which has body, \.\.\.; make the plan from this"):
        build(layer, *args, plan=other)


def test_a_foreign_product_cannot_replace_the_sparse_one():
    def own_product(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs)

    with pytest.raises(NotImplementedError, match="dot_general=own_product of conv has no sparse form"):
        build(SparseDense, 8, density=0.5, block_shape=(4, 4), dot_general=own_product)
    with pytest.raises(NotImplementedError, match="conv_general_dilated="):
        build(SparseConv, 8, (3, 3), density=0.5, block_shape=(4, 4), conv_general_dilated=jax.lax.conv)


@pytest.mark.parametrize("method", [Static(), DSB(), RigL(), SET(), TopKAST(backward_factor=1.5)], ids=lambda m: m.name)
def test_a_layer_holds_what_its_method_stores(method):
    """As many weights computed with, in the method's own storage, without a word of the model about it."""
    x = normal(3, 12)
    sizes = {"num_blocks": 5, "block_shape": (4, 3), "use_bias": False, "kernel_init": by_numpy}
    layer = SparseDense(8, method=method, implementation="dense", **sizes)
    y, variables = jax.jit(layer.init_with_output)(KEY, x)
    node = variables["topology"]["blocks"]
    assert node.spec == method.stored(linear_spec(12, 8).with_blocks((4, 3), 5))
    assert (node.spec.storage, node.spec.num_active) == (method.storage, 60)
    assert variables["params"]["blocks"].shape == node.blocks_shape
    kernel = dense_twin(variables)["params"]["kernel"]
    assert np.count_nonzero(kernel) == 60
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-5)


def spec_of(layer, x, **options):
    return jax.eval_shape(layer(**options).init, KEY, jnp.zeros(x))["topology"]["blocks"].spec


@pytest.mark.parametrize(("layer", "x"), [
    (functools.partial(SparseConv, 64, (1, 1)), (1, 4, 4, 32)),  # as it was found: 48 outputs without weights
    (functools.partial(SparseConv, 60, (1, 1)), (1, 4, 4, 32)),
    (functools.partial(SparseConv, 64, (3, 3)), (1, 4, 4, 16)),
    (functools.partial(SparseDense, 64), (1, 32)),
    (functools.partial(SparseDense, 250), (1, 16)),
])  # fmt: skip
@pytest.mark.parametrize("density", [0.1, 0.3, 0.6])
def test_every_row_group_has_a_block(layer, x, density):
    """With `density=` as with a plan (finding 16); 0 takes the density as it is."""
    spec = spec_of(layer, x, density=density)
    wanted = density * spec.size / 256
    assert spec.num_blocks >= spec.num_groups
    ragged = spec.num_blocks / 8 if spec.out % 16 else 0  # whose last blocks hold fewer weights
    assert abs(spec.num_blocks - max(wanted, spec.num_groups)) <= 1 + ragged
    fewer = spec_of(layer, x, density=density, min_group_blocks=0)
    assert abs(fewer.num_blocks - wanted) <= 1 + ragged


@pytest.mark.parametrize(("features", "options", "dead"), [(64, {}, 0), (60, {}, 0), (64, {"min_group_blocks": 0}, 48)])
def test_no_output_begins_without_weights(features, options, dead):
    conv = SparseConv(features, (1, 1), density=0.1, kernel_init=by_numpy, **options)
    variables = jax.device_get(jax.jit(conv.init)(KEY, np.zeros((1, 4, 4, 32), np.float32)))
    (layer,) = dsb.report(variables["params"], variables["topology"]).layers
    assert layer.dead_outputs == dead


def test_more_blocks_for_each_row_group():
    spec = functools.partial(spec_of, functools.partial(SparseDense, 64, density=0.1, block_shape=(16, 8)), (1, 32))
    assert [spec(min_group_blocks=n).num_blocks for n in (0, 1, 2, 4, 9)] == [2, 4, 8, 16, 16]
    with pytest.raises(ValueError, match="min_group_blocks=-1 is negative"):
        spec(min_group_blocks=-1)
    with pytest.raises(ValueError, match="leaves 41 weights, but one 32x32 block in each of 1 layers takes 1024"):
        spec(density=0.02, block_shape=(32, 32), min_group_blocks=0)


@pytest.mark.parametrize("layer", [SparseDense(8, **BLOCKS), SparseConv(8, (1, 1), **BLOCKS)])
def test_weights_without_their_topology(layer):
    """`model.apply({"params": params}, x)` would else make a dense layer of it."""
    x = jnp.zeros((1, 1, 1, 8))
    variables = jax.eval_shape(layer.init, KEY, x)
    with pytest.raises(ValueError, match="has sparse weights but no topology; pass all collections"):
        jax.eval_shape(layer.apply, {"params": variables["params"]}, x)


def test_a_layer_reads_its_sizes_from_its_topology():
    """The arguments decide at initialization alone: later the number of blocks may be another one."""
    few, many = (
        SparseDense(8, num_blocks=n, block_shape=(4, 4), implementation="dense", method=DrawnByNumPy()) for n in (2, 4)
    )

    @jax.jit
    def both(x):
        y, variables = many.init_with_output(KEY, x)
        return few.apply(variables, x), y

    np.testing.assert_array_equal(*both(normal(2, 8)))


@pytest.mark.parametrize(("density", "num_blocks"), [(0.001, 4), (0.1, 4), (0.5, 4), (0.7, 6)])
def test_a_density_below_one_block_for_each_row_group_is_raised_to_that(density, num_blocks):
    layer = SparseDense(64, density=density, block_shape=(16, 16), method=DrawnByNumPy())
    variables = jax.eval_shape(layer.init, jax.random.key(0), np.ones((1, 32), np.float32))
    assert variables["params"]["blocks"].shape == (num_blocks, 16, 16)
