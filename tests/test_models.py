"""Models by name: sizes known from the literature, names refused, a sparse twin for every plan. Shapes only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsb_jax.linen import SparseConv, SparseDense, find_layers
from dsb_jax.paths import nodes
from dsb_jax.plan import make_plan
from dsb_jax.rules import Rule
from dsb_jax.training.models import create
from dsb_jax.training.models.layers import max_pool
from tests.conftest import always

# name: image, all parameters (batch norm included) for 10 classes, convolutions and linear layers
SIZES = {
    "convnet": ((8, 8, 1), 241_898, 5),  # 9 * (32 + 32 * 64 + 64 * 128 + 128 * 128) + 2 * 352 + 1290
    "resnet18": ((32, 32, 3), 11_173_962, 21),  # as in the usual PyTorch model for CIFAR
    "vgg16": ((32, 32, 3), 14_724_042, 14),  # 14,728,266 less the biases of the convolutions
    "wrn-22-2": ((32, 32, 3), 1_079_642, 23),
    "wrn-28-10": ((32, 32, 3), 36_479_194, 29),  # 36.5M in the paper
}


@functools.cache
def shapes_of(name, **options):
    model, image = create(name, num_classes=10, **options), SIZES[name][0]
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *image)))


def layers_of(name, image=None, **options):
    found = find_layers(create(name, num_classes=10, **options), jnp.zeros((1, *(image or SIZES[name][0]))))
    return {path: layer.spec for path, layer in found.layers.items()}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", SIZES)
def test_known_sizes(name):
    variables = shapes_of(name)
    _, parameters, layers = SIZES[name]
    assert count(variables["params"]) == parameters
    found = layers_of(name)
    assert len(found) == layers
    assert {("stem",), ("head",)} < set(found)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["convnet", "resnet18", "vgg16", "wrn-16-1"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_of_the_right_shape(name, dtype):
    model = create(name, num_classes=7, dtype=dtype, width_multiplier=0.5)
    images = jax.ShapeDtypeStruct((3, 32, 32, 3), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, updates = jax.eval_shape(train, variables, images)
    assert logits.shape == (3, 7)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


def test_a_smaller_dense_model_is_narrower_everywhere_inside():
    full, half = (layers_of("convnet", width_multiplier=w) for w in (1.0, 0.5))
    assert [layer.out for layer in full.values()] == [32, 64, 128, 128, 10]
    assert [layer.out for layer in half.values()] == [16, 32, 64, 64, 10]


@pytest.mark.parametrize("depth", [10, 16, 22])
def test_depth_counts_the_layers_of_a_wide_residual_network(depth):
    layers = layers_of(f"wrn-{depth}-2", (8, 8, 3))
    # depth = 6n + 4: 6n convolutions in the blocks; beside them the stem, the classifier and three projections.
    assert len(layers) == depth + 1
    assert sum(layer.kernel_size == (1, 1) for layer in layers.values()) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", r"model='resnet' is unknown; choose one of convnet, narrow_convnet, resnet18"),
        ("WRN-22-2", r"model='WRN-22-2' is unknown"),
        ("wrn-22", r"model='wrn-22' is unknown"),
        ("", r"model='' is unknown"),
        ("wrn-23-2", r"model='wrn-23-2' does not exist: depth is 6n \+ 4 \(10, 16, 22, ...\), width >= 1"),
        ("wrn-4-2", r"model='wrn-4-2' does not exist"),
        ("wrn-22-0", r"model='wrn-22-0' does not exist"),
    ],
)
def test_names_refused(name, message):
    with pytest.raises(ValueError, match=message):
        create(name, num_classes=10)


def test_dropout_is_for_wide_residual_networks():
    for name in ("convnet", "resnet18", "vgg16"):
        with pytest.raises(ValueError, match=rf"dropout_rate=0.3 is for wrn models only; {name} has no dropout"):
            create(name, num_classes=10, dropout_rate=0.3)
    model = create("wrn-10-1", num_classes=10, dropout_rate=0.5)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    @jax.jit
    def logits(key):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]

    one, same, other = (logits(jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize("name", ["convnet", "resnet18", "vgg16", "wrn-22-2"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_plan_over_each_model_makes_its_sparse_twin(name, distribution):
    dense = shapes_of(name)["params"]
    rules = [Rule("stem|head", dense=True)]
    plan = make_plan(layers_of(name), sparsity=0.9, distribution=distribution, block_shape=(32, 8), rules=rules)
    sparse = {"plan": plan, "implementation": "xla"}
    variables = shapes_of(
        name, conv=functools.partial(SparseConv, **sparse), dense=functools.partial(SparseDense, **sparse)
    )
    eligible = sum(spec.size for spec in plan.eligible.values())
    assert plan.sparsity() == pytest.approx(0.9, abs=256 / eligible)
    for path, planned in plan.items():
        params = functools.reduce(lambda tree, part: tree[part], path, variables["params"])
        if path in plan.sparse:
            assert params["blocks"].shape == (planned.num_blocks, 32, 8)
        else:
            assert params["kernel"].shape == plan.sizes[path].kernel_shape
    assert (plan["stem",], plan["head",]) == ("kept dense by 'stem|head'",) * 2
    assert {path[:-1]: node.spec for path, node in nodes(variables["topology"]).items()} == plan.sparse
    # Nothing but the sparse kernels has changed its size.
    removed = sum(spec.size - spec.num_active for spec in plan.sparse.values())
    assert count(variables["params"]) == count(dense) - removed


@pytest.mark.parametrize("feature_major", [False, True])
def test_inputs_too_small_for_vgg_are_refused_with_the_least_size(feature_major):
    model = create("vgg16", num_classes=10, conv=SparseConv, feature_major=feature_major)

    def logits(height, width):
        return jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, height, width, 3)))[0]

    assert logits(32, 32).shape == logits(33, 63).shape == (2, 10)
    for height, width in ((8, 8), (31, 32), (32, 31)):
        with pytest.raises(
            ValueError, match=rf"vgg16.* 32x32 pixels at least, not {height}x{width}; .*--model=convnet"
        ):
            logits(height, width)


@pytest.mark.parametrize("name", ["convnet", "resnet18", "wrn-10-1"])
def test_the_other_models_take_images_of_any_size(name):
    model = create(name, num_classes=10, width_multiplier=1 / 8)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, 1, 1, 3)))
    assert logits.shape == (2, 10)


def test_layer_classes_are_arguments():
    """Any class with the signatures of nn.Conv and nn.Dense will do."""
    built = []

    def conv(*args, **kwargs):
        built.append(kwargs["name"])
        return nn.Conv(*args, **kwargs)

    def dense(*args, **kwargs):
        built.append(kwargs["name"])
        return nn.Dense(*args, **kwargs)

    model = create("convnet", num_classes=10, conv=conv, dense=dense)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert built == ["stem", "conv_1", "conv_2", "conv_3", "head"]


@pytest.mark.parametrize("name", always("convnet", "wrn-10-1", of=["convnet", "wrn-10-1", "resnet18", "vgg16"]))
def test_feature_major_models_compute_the_same(name):
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    models_ = [
        create(name, num_classes=4, conv=SparseConv, width_multiplier=1 / 8, feature_major=feature_major)
        for feature_major in (False, True)
    ]
    shapes = [jax.eval_shape(model.init, jax.random.key(1), images) for model in models_]
    assert shapes[0] == shapes[1]

    @jax.jit  # one program of both, because compiling is what this test costs
    def gradients(params):
        def loss(params, model):
            logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits)), logits

        return [jax.grad(loss, has_aux=True)(params, model) for model in models_]

    variables = random_variables(shapes[0])
    (plain, wanted), (turned, got) = gradients(variables["params"])
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    for a, b in zip(jax.tree.leaves(turned), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * float(np.abs(b).max()) + 1e-4)


def random_variables(shapes):
    """Variables as an initialization would draw them, about; drawing them by NumPy compiles nothing."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(size=leaf.shape, scale=(2 / np.prod(leaf.shape[:-1])) ** 0.5).astype(leaf.dtype)
        return (np.ones if path[-1].key in ("scale", "var") else np.zeros)(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 3, 3)])
def test_max_pool_is_that_of_flax(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def with_gradient(pool, x):
        y, backward = jax.vjp(pool, x)
        return y, *backward(jnp.cos(y))

    results = []
    for pool in (max_pool, lambda x: nn.max_pool(x, (2, 2), strides=(2, 2))):
        results.append(jax.jit(lambda x, pool=pool: with_gradient(pool, x))(x))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)
