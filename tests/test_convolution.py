"""Dense convolutions on CPUs: their own passes equal jax's, under all transformations; elsewhere it is jax's own."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsb_jax.ops import cpu_convolution
from dsb_jax.ops.convolution import convolve
from dsb_jax.target import compiling_for
from pallas_kernels import ConvGeometry

CASES = {  # geometry, input size
    "library": (ConvGeometry(12, (3, 3), (1, 1), ((1, 1), (1, 1))), (7, 6)),
    "strides": (ConvGeometry(12, (3, 2), (2, 1), ((0, 2), (1, 0))), (13, 8)),
    "rows unread": (ConvGeometry(8, (3, 3), (2, 2), ((0, 0), (0, 0))), (14, 12)),
    "negative padding": (ConvGeometry(12, (2, 3), (1, 2), ((-1, 2), (1, -2))), (8, 17)),
    "patches": (ConvGeometry(8, (3, 3), (1, 1), ((1, 2), (1, 1))), (3, 4)),
    "patches, strides": (ConvGeometry(8, (3, 3), (2, 2), ((1, 0), (-1, 1))), (6, 7)),
    "1x1, strides": (ConvGeometry(4, (1, 1), (2, 3), ((0, 0), (0, 1))), (6, 7)),
    "a stem": (ConvGeometry(3, (3, 3), (1, 1), ((1, 1), (1, 1))), (18, 17)),
}


def by_lax(x, kernel, geometry, feature_major):
    order = "CHWN" if feature_major else "NHWC"
    numbers = (order, "HWIO", order)
    return lax.conv_general_dilated(x, kernel, geometry.strides, geometry.padding, dimension_numbers=numbers)


def operands(name, feature_major, batch=5):
    geometry, size = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *size, geometry.in_channels), np.float32)
    kernel = rng.standard_normal((*geometry.kernel_size, geometry.in_channels, 6), np.float32)
    return (x.transpose(3, 1, 2, 0) if feature_major else x), kernel, geometry


def assert_trees_close(result, wanted):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))


def weighted(y):
    return (jnp.tanh(y) * jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)).sum() / y.size


@pytest.mark.parametrize("name", CASES)
def test_passes_equal_those_of_jax(name, monkeypatch):
    """In both orders; the weight gradient in one piece, and in pieces of two images or rows with a rest."""

    def results(product, args):
        y, pullback = jax.vjp(product, *args)
        return y, pullback(jnp.cos(y))

    def pieces(x, kernel, geometry, feature_major):
        dy = jnp.cos(by_lax(x, kernel, geometry, feature_major))
        return cpu_convolution.weight_gradient(x, dy, geometry, feature_major, None).reshape(kernel.shape)

    for feature_major in (False, True):
        x, kernel, geometry = operands(name, feature_major)
        options = {"geometry": geometry, "feature_major": feature_major}
        monkeypatch.undo()
        found = jax.jit(lambda *args: results(functools.partial(convolve, **options), args))(x, kernel)  # noqa: B023
        wanted = jax.jit(lambda *args: results(functools.partial(by_lax, **options), args))(x, kernel)  # noqa: B023
        assert_trees_close(found, wanted)
        out_h, out_w = geometry.output_size(*x.shape[1:3])
        each = 5 * out_w if feature_major else out_h * out_w
        values = each * (geometry.in_channels * geometry.strides[0] * geometry.strides[1] + 6)
        monkeypatch.setattr(cpu_convolution, "_PIECE", 2 * values)
        in_pieces = jax.jit(functools.partial(pieces, **options))(x, kernel)
        assert_trees_close(in_pieces, wanted[1][1])


@pytest.mark.parametrize("feature_major", [False, True])
def test_second_derivatives_and_vmap(feature_major):
    x, kernel, geometry = operands("library", feature_major, batch=2)
    models = np.stack([kernel, -kernel])

    def results(product):
        def loss(x, kernel):
            return weighted(product(x, kernel, geometry=geometry, feature_major=feature_major))

        gradient = jax.grad(loss, (0, 1))
        of_models = jax.vmap(gradient, (None, 0))(x, models)
        of_examples = jax.vmap(gradient, (0, None))(jnp.stack([x, 2 * x]), kernel)
        return jax.jvp(gradient, (x, kernel), (jnp.sin(x), jnp.cos(kernel))), of_models, of_examples

    assert_trees_close(jax.jit(lambda: results(convolve))(), jax.jit(lambda: results(by_lax))())


def test_under_shard_map_gradients_of_the_kernel_are_summed_as_ever():
    """There the batch varies over devices and the kernel does not."""
    x, kernel, geometry = operands("library", False)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(product):
        def local(x, kernel):
            return jax.grad(lambda kernel: weighted(product(x, kernel, geometry=geometry, feature_major=False)))(kernel)

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P()))(x, kernel)

    assert_trees_close(gradient(convolve), gradient(by_lax))


def primitives(x, kernel, geometry):
    program = jax.make_jaxpr(functools.partial(convolve, geometry=geometry, feature_major=False))(x, kernel)
    return [str(equation.primitive) for equation in program.jaxpr.eqns]


def test_programs_for_gpus_and_other_dtypes_have_the_convolution_of_jax():
    x, kernel, geometry = operands("library", False)
    assert "shuffled_block_product" in primitives(x, kernel, geometry)
    assert primitives(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), geometry) == ["conv_general_dilated"]
    with compiling_for("gpu", "NVIDIA H200"):
        assert primitives(x, kernel, geometry) == ["conv_general_dilated"]


def test_a_batch_of_any_size_has_the_convolution_of_jax():
    x, kernel, geometry = operands("library", False)
    (batch,) = jax.export.symbolic_shape("batch")
    call = jax.jit(functools.partial(convolve, geometry=geometry, feature_major=False))
    exported = jax.export.export(call)(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), kernel)
    assert_trees_close(exported.call(x, kernel), by_lax(x, kernel, geometry, False))
