"""The sparse product under jax's settings, with empty batches, and in forward mode."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsb_jax.layout import unpack
from dsb_jax.ops import sparse_conv, sparse_matmul
from pallas_kernels import ConvGeometry
from tests.conftest import make_layout

IMPLEMENTATIONS = ("native", "xla", "dense", "reference")
GEOMETRY = ConvGeometry(4, (3, 3), (2, 1), ((1, 1), (0, 1)))
LAYOUT = make_layout(0, (10, 36), (4, 3), (5, 0, 2))  # ragged rows, an empty group


def operands(dtype="float32", batch=5):
    rng = np.random.default_rng(0)
    shapes = (batch, 5, 5, 4), (7, 4, 3), (10,)
    return tuple(rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)


def convolution(implementation, feature_major=False):
    def call(x, blocks, bias, layout=LAYOUT):
        x = jnp.moveaxis(x, (0, 3), (3, 0)) if feature_major else x
        y = sparse_conv(
            x,
            blocks,
            layout,
            geometry=GEOMETRY,
            bias=bias,
            implementation=implementation,
            feature_major=feature_major,
        )
        return jnp.moveaxis(y, (0, 3), (3, 0)) if feature_major else y

    return call


def multiplication(implementation):
    def call(x, blocks, bias, layout=LAYOUT):
        rows = jnp.tile(x[:, 0, 0], (1, 9))
        return sparse_matmul(rows, blocks, layout, bias=bias, implementation=implementation)

    return call


def weighted(y):
    """A scalar that is not symmetric in anything."""
    return (jnp.tanh(y) * jnp.linspace(-1, 2, y.size, dtype=y.dtype).reshape(y.shape)).sum()


def value_and_gradients(function, args):
    def loss(x, blocks, bias, layout):
        y = function(x, blocks, bias, layout)
        assert y.dtype == x.dtype
        return weighted(y)

    return jax.value_and_grad(loss, (0, 1, 2))(*args, LAYOUT)


def assert_close(results, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(np.abs(np.asarray(b)).max(initial=0)))


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("native", "float32"), ("xla", "float32"), ("xla", "float64"), ("dense", "float32"), ("reference", "float64")],
)
def test_under_x64_indices_stay_int32_and_sums_are_as_wide_as_activations(implementation, dtype):
    def results(*args):
        found = value_and_gradients(convolution(implementation, feature_major=True), args)
        return found, multiplication(implementation)(*args)

    with jax.enable_x64(True):
        found, y = jax.jit(results)(*operands(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves((found, y))} == {jnp.dtype(dtype)}
        assert_close(found, dense_results(dtype), 1e-5 if dtype == "float32" else 1e-12)


@functools.cache
def dense_results(dtype):
    """By XLA's own convolution of the unpacked kernel, in float64."""
    args = (a.astype(np.float64) for a in operands(dtype))

    def loss(x, blocks, bias):
        kernel = unpack(blocks, LAYOUT).T.reshape(3, 3, 4, 10)
        y = jax.lax.conv_general_dilated(
            x, kernel, GEOMETRY.strides, GEOMETRY.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return weighted(y + bias[None, None, None])

    return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args))


def negative_operands(batch=5):
    x, blocks, bias = operands(batch=batch)
    return x - 1.5, blocks, bias  # most of them


@functools.cache
def results_of_the_dense_product():
    return jax.jit(lambda *args: value_and_gradients(convolution("dense"), args))(*negative_operands())


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
def test_strict_promotion_leaks_and_nans(implementation):
    """All in one compilation; each of them raises if it has something to say."""
    args = negative_operands()
    wanted = results_of_the_dense_product()
    with jax.numpy_dtype_promotion("strict"), jax.check_tracer_leaks(), jax.debug_nans(True):
        found = jax.jit(lambda *args: value_and_gradients(convolution(implementation), args))(*args)
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("implementation", ["native", "xla", "dense"])
def test_without_jit(implementation):
    args = negative_operands(batch=1)
    layout = make_layout(0, (3, 4), (2, 2), (1, 1))

    def results(x, blocks, bias):
        def call(x, blocks, bias):
            return sparse_matmul(x, blocks, layout, bias=bias, implementation=implementation)

        y, pullback = jax.vjp(call, x[0, 0], blocks[:2, :2, :2], bias[:3])
        return y, pullback(y)

    with jax.disable_jit():
        found = results(*args)
    assert_close(found, jax.jit(results)(*args), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strict_promotion_of_half_precision(implementation):
    with jax.numpy_dtype_promotion("strict"):
        lowered = jax.jit(lambda *args: value_and_gradients(convolution(implementation), args)).lower(
            *operands("bfloat16")
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(lowered.out_info)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "auto"])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(implementation):
    _, blocks, bias = operands()

    def multiply(x, blocks, bias):
        return sparse_matmul(x, blocks, LAYOUT, bias=bias, implementation=implementation)

    shapes = {(0, 5, 5, 4): (0, 3, 4, 10), (0, 36): (0, 10), (3, 0, 36): (3, 0, 10), (2, 0, 0, 36): (2, 0, 0, 10)}

    @jax.jit
    def results(inputs, blocks, bias):
        every = []
        for x in inputs:
            call = convolution(implementation) if x.shape[-1] == 4 else multiply
            y, pullback = jax.vjp(call, x, blocks, bias)
            every.append((y, *pullback(y)))
        return every

    every = results([np.zeros(shape, np.float32) for shape in shapes], blocks, bias)
    for (shape, out), (y, dx, d_blocks, d_bias) in zip(shapes.items(), every, strict=True):
        assert (y.shape, dx.shape) == (out, shape)
        assert not np.asarray(d_blocks).any()
        assert not np.asarray(d_bias).any()

    x = np.zeros((36, 0), np.float32)
    assert sparse_matmul(x, blocks, LAYOUT, implementation=implementation, feature_major=True).shape == (10, 0)
    mapped = jax.jit(lambda inputs: [jax.vmap(multiply, (0, None, None))(x, blocks, bias) for x in inputs])
    found = mapped([np.zeros(shape, np.float32) for shape in ((0, 2, 36), (2, 0, 36))])
    assert [y.shape for y in found] == [(0, 2, 10), (2, 0, 10)]


# With few positions the dense product puts the output in order, with many the kernel.
@pytest.mark.parametrize(
    ("make", "batch", "implementation"),
    [(convolution, 1, "dense"), (convolution, 40, "dense"), (multiplication, 40, "dense"), (convolution, 3, "xla")],
)
def test_forward_mode_and_reverse_of_it(make, batch, implementation):
    args, function = operands(batch=batch), make(implementation)

    def loss(*args):
        return jnp.sin(function(*args, LAYOUT)).sum()

    direction = tuple(np.random.default_rng(1).standard_normal(a.shape, np.float32) for a in args)

    @jax.jit
    def results(args, direction):
        y, y_dot = jax.jvp(lambda *args: function(*args), args, direction)
        _, linear = jax.linearize(lambda *args: function(*args), *args)
        along = jax.jvp(jax.grad(loss, (0, 1, 2)), args, direction)[1]
        back = jax.grad(lambda *args: jax.jvp(loss, args, direction)[1], (0, 1, 2))(*args)
        by_bias = jax.jacfwd(lambda bias: function(args[0], args[1], bias))(args[2])
        x, blocks, bias = args
        halves = function(direction[0], blocks, 0 * bias), function(x, *direction[1:])
        return y, y_dot, linear(*direction), along, back, by_bias, halves

    y, y_dot, linear, along, back, by_bias, halves = results(args, direction)
    # Linear in x, and in blocks and bias together.
    assert_close(y_dot, halves[0] + halves[1], 1e-5)
    assert_close(linear, y_dot, 1e-6)
    assert_close(along, back, 1e-4)  # the Hessian times the direction, in both orders of modes
    assert_close(by_bias, np.broadcast_to(np.eye(10), (*y.shape, 10)), 1e-6)


@pytest.mark.parametrize("implementation", ["dense", "xla", "native"])
def test_hessian_by_hand(implementation):
    """f(w) = (w x)^2 / 2 of one weight w = 3 at x = 2: the second derivative is x^2 = 4."""
    layout = make_layout(0, (1, 1), (1, 1), (1,))

    def loss(blocks):
        y = sparse_matmul(np.full((1, 1), 2, np.float32), blocks, layout, implementation=implementation)
        return jnp.square(y).sum() / 2

    assert jax.jit(jax.hessian(loss))(np.full((1, 1, 1), 3, np.float32)).item() == 4


def test_reverse_mode_of_the_dense_product_scatters_rows_and_adds_nothing():
    """Blocks go into the kernel; what comes back are gathers. The other scatter inverts the permutation: no index."""
    args = operands()
    compiled = jax.jit(lambda *args: value_and_gradients(convolution("dense"), args)).lower(*args).as_text()
    scatters = re.findall(r'"stablehlo\.scatter".*?\}\) :.*?-> tensor<(\S+?)>', compiled, re.DOTALL)
    assert set(scatters) == {"12xi32", "36x12xf32"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_stays_in_its_example(implementation):
    x, blocks, bias = operands()
    spoiled = x.copy()
    spoiled[2, 1, 1, 0], spoiled[2, 3, 4] = np.nan, np.inf

    @jax.jit
    def results(x, blocks, bias):
        y, pullback = jax.vjp(lambda x: convolution(implementation)(x, blocks, bias), x)
        return y, *pullback(y)

    for found, wanted in zip(results(spoiled, blocks, bias), results(x, blocks, bias), strict=True):
        assert not np.isfinite(found[2]).all()
        np.testing.assert_allclose(np.delete(found, 2, 0), np.delete(wanted, 2, 0), rtol=1e-5, atol=1e-5)
