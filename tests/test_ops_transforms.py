"""The sparse product under jax's transformations, and what it never holds: a dense weight."""

import functools
import math
import re
from collections import Counter

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.ops import primitive, sparse_conv, sparse_matmul
from dsb_jax.ops.partitioning import Operation, Product, on_devices
from dsb_jax.ops.xla import XLA
from pallas_kernels import REFERENCE, ConvGeometry, Kernels
from tests.conftest import make_layout

IMPLEMENTATIONS = ("native", "xla", "dense", "reference")
GEOMETRY = ConvGeometry(4, (3, 3), (2, 1), ((1, 1), (0, 1)))


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def case():
    return normal(6, 5, 5, 4), normal(8, 4, 4), make_layout(0, (12, 36), (4, 4), (3, 0, 5))


def not_symmetric(y):
    """A scalar of activations."""
    return (jnp.tanh(y) * np.arange(y.size, dtype=np.float32).reshape(y.shape)).sum()


def assert_trees_close(result, wanted):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_and_remat_change_nothing(implementation):
    layout, geometry = make_layout(0, (4, 4), (2, 2), (2, 1)), ConvGeometry(2, (2, 1))
    x, blocks = normal(2, 3, 1, 2), normal(3, 2, 2)

    def loss(x, blocks):
        return not_symmetric(sparse_conv(x, blocks, layout, geometry=geometry, implementation=implementation))

    wanted = jax.value_and_grad(loss, (0, 1))(x, blocks)
    compiled = jax.jit(lambda *args: [jax.value_and_grad(f, (0, 1))(*args) for f in (loss, jax.checkpoint(loss))])
    for result in compiled(x, blocks):
        assert_trees_close(result, wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_examples_and_over_models(implementation, case):
    x, blocks, layout = case

    def loss(x, blocks):
        return not_symmetric(sparse_conv(x, blocks, layout, geometry=GEOMETRY, implementation=implementation))

    one = jax.grad(loss, (0, 1))
    models, gradient = np.stack([blocks, -2 * blocks]), jax.jit(one)
    both = jax.jit(lambda x, models: (jax.vmap(one, (0, None))(x[:, None], models[0]),
                                      jax.vmap(one, (None, 0))(x[:1], models)))  # fmt: skip
    by_example, by_model = jax.device_get(both(x, models))
    for i in (0, 5):
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], by_example), gradient(x[i : i + 1], blocks))
    for i in (0, 1):
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], by_model), gradient(x[:1], models[i]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_over_layers(implementation):
    """Equal layers, each with a layout of its own, stacked and scanned: as in a loop, values and gradients."""
    layouts = [make_layout(i, (8, 8), (4, 2), counts) for i, counts in enumerate([(2, 2), (0, 4), (3, 1)])]
    blocks, x = normal(3, 4, 4, 2), normal(5, 8)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layouts)

    def layer(x, blocks, layout):
        return jnp.tanh(sparse_matmul(x, blocks, layout, implementation=implementation))

    def scanned(blocks):
        y, _ = jax.lax.scan(lambda x, args: (layer(x, *args), None), x, (blocks, stacked))
        return (y * jnp.arange(8.0)[None]).sum()

    def looped(blocks):
        y = x
        for one, layout in zip(blocks, layouts, strict=True):
            y = layer(y, one, layout)
        return (y * jnp.arange(8.0)[None]).sum()

    both = jax.jit(lambda blocks: [jax.value_and_grad(f)(blocks) for f in (scanned, looped)])
    assert_trees_close(*both(blocks))


def compositions(loss, x, weights):
    """Of vmap, grad, remat and scan; x[3, N, H, W, C], weights (blocks[3, num_blocks, R, C], bias[3, out])."""
    gradient = jax.grad(loss, (0, 1))
    first = jax.tree.map(lambda leaf: leaf[0], weights)

    def of_gradient(x, weights):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient(x, weights))) / 1000

    return {
        "grad of vmap": jax.grad(lambda w: jax.vmap(loss, (0, None))(x, w).sum())(first),
        "vmap of grad, both mapped": jax.vmap(gradient)(x, weights),
        "vmap of grad, bias mapped": jax.vmap(lambda bias: gradient(x[0], (first[0], bias)))(weights[1]),
        "grad of vmap, all mapped": jax.grad(lambda w: jax.vmap(loss)(x, w).sum())(weights),
        "grad of vmap, weights mapped": jax.grad(lambda w: jax.vmap(loss, (None, 0))(x[0], w).sum())(weights),
        "grad of vmap, bias mapped": jax.grad(
            lambda w, bias: jax.vmap(lambda b: loss(x[0], (w, b)))(bias).sum(), (0, 1)
        )(first[0], weights[1]),
        "jvp of vmap": jax.jvp(
            lambda x, w: jax.vmap(jax.vmap(loss, (None, 0)), (0, None))(x, w), (x, weights), (x, weights)
        ),
        "vmap of vmap": jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(x, weights),
        "vmap of remat": jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1)))(x, weights),
        "grad in scan": jax.lax.scan(lambda w, x: (w, gradient(x, w)), first, x)[1],
        "grad of scan": jax.grad(lambda w: jax.lax.scan(lambda s, x: (s + loss(x, w), None), 0.0, x)[0])(first),
        "vmap of grad of grad": jax.vmap(jax.grad(of_gradient, (0, 1)))(x, weights),
    }


def test_transformations_compose():
    layout = make_layout(0, (4, 4), (2, 2), (2, 1))
    x, blocks, bias = normal(3, 2, 2, 1, 2), normal(3, 3, 2, 2), normal(3, 4)
    geometry = ConvGeometry(2, (2, 1), (1, 1), ((1, 0), (0, 0)))

    def results(implementation):
        def loss(x, weights):
            blocks, bias = weights
            y = sparse_conv(x, blocks, layout, geometry=geometry, bias=bias, implementation=implementation)
            return not_symmetric(y)

        return jax.jit(functools.partial(compositions, loss))(x, (blocks, bias))

    result, wanted = results("xla"), results("dense")
    assert_trees_close(result, wanted)


def test_vmap_over_activations_alone_is_one_call_on_a_larger_batch(case):
    x, blocks, layout = case
    seen = []

    def forward(x, blocks, index, **static):
        seen.append(x.shape)
        return REFERENCE.forward(x, blocks, index, **static)

    product = Product(REFERENCE._replace(forward=forward), GEOMETRY, 12, (5, 5))

    def call(x):
        return primitive.forward(product, x, blocks, layout.index)

    x = np.stack([x.transpose(3, 1, 2, 0)] * 3)
    y = jax.jit(jax.vmap(call))(x)
    assert seen[-1] == (4, 5, 5, 18)
    assert_trees_close(y, np.stack([jax.jit(call)(x[0])] * 3))
    assert jax.eval_shape(jax.vmap(call), x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("name", [*Kernels._fields, "forward with bias"])
def test_one_device_runs_the_bare_kernel(name, case):
    """Nothing is left of the rules for vmap and for many devices."""
    x, blocks, layout = case
    x, dy = x.transpose(3, 1, 2, 0), np.ones((12, 3, 4, 6), np.float32)
    operands, static = {
        "forward": ((x, blocks), {"out": 12}),
        "forward with bias": ((x, blocks), {"out": 12, "bias": np.ones(12, np.float32)}),
        "input_gradient": ((dy, blocks), {"input_size": (5, 5)}),
        "weight_gradient": ((x, dy), {"dtype": blocks.dtype}),
    }[name]
    kernel, bias = name.split()[0], [static["bias"]] if "bias" in static else []

    def bare(first, second):
        return getattr(XLA, kernel)(first, second, layout.index, geometry=GEOMETRY, **static)

    def wrapped(first, second):
        product = Product(XLA, GEOMETRY, 12, (5, 5))
        arrays, structure = jax.tree.flatten(layout.index)
        operation = Operation(product, kernel, structure, (2, 2, 1), static.get("dtype"), has_bias=bool(bias))
        return on_devices(operation, first, second, *arrays, *bias)

    def operations(call):
        return Counter(re.findall(r"stablehlo\.\w+", jax.jit(call).lower(*operands).as_text()))

    assert sum(operations(bare).values()) > 50
    assert operations(wrapped) == operations(bare)


def inner_jaxprs(value):
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, jax.extend.core.Jaxpr):
        return [value]
    return [jaxpr for item in value for jaxpr in inner_jaxprs(item)] if isinstance(value, tuple | list) else []


def largest_array(jaxpr):
    """The most elements that any array of a jaxpr has, those of nested ones included."""
    sizes = [math.prod(v.aval.shape) for v in (*jaxpr.invars, *jaxpr.constvars)]
    for eqn in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in eqn.outvars]
        sizes += [largest_array(inner) for value in eqn.params.values() for inner in inner_jaxprs(value)]
    return max(sizes)


def training_gradient(implementation, out):
    """The jitted gradient of two sparse layers, and its arguments; activations are tiny beside the weights."""
    conv = make_layout(0, (64, 288), (16, 8), (4, 4, 3, 3))
    linear = make_layout(1, (out, 256), (16, 8), (3, 3, 3, 2, 3))
    geometry = ConvGeometry(32, (3, 3), (1, 1), ((1, 1), (1, 1)))

    def loss(params, x, layouts):
        y = sparse_conv(x, params[0], layouts[0], geometry=geometry, implementation=implementation)
        y = sparse_matmul(jnp.tanh(y).reshape(1, -1), params[1], layouts[1], implementation=implementation)
        return jnp.square(y).sum()

    blocks, x = np.ones((14, 16, 8), np.float32), np.ones((1, 2, 2, 32), np.float32)
    return jax.jit(jax.grad(loss, (0, 1))), ((blocks, blocks), x, (conv, linear))


@pytest.mark.parametrize("out", [80, 72])  # 72 is ragged
def test_no_array_as_large_as_a_dense_weight(out):
    gradient, args = training_gradient("xla", out)
    dense = min(64 * 288, out * 256)
    assert largest_array(jax.make_jaxpr(gradient)(*args).jaxpr) < dense
    compiled = gradient.lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]*)\]", compiled)
    assert len(shapes) > 100
    assert max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes) < dense
    # The same look at the dense fallback does find its weights.
    gradient, args = training_gradient("dense", out)
    assert largest_array(jax.make_jaxpr(gradient)(*args).jaxpr) >= dense
