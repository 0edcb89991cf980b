"""The statistics that growing needs, against dense gradients; observing changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from dsb_jax.layout import random_layout, unpack
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.ops import sparse_conv
from dsb_jax.ops.statistics import make_probe, observe
from pallas_kernels import ConvGeometry
from tests.conftest import make_layout

KINDS = ("norm", "block_gradient", "gradient")

# name: geometry, (batch, height, width), out, blocks of each group of 4 rows
GEOMETRIES = {
    "1x1": (ConvGeometry(6), (3, 4, 4), 8, (1, 1)),
    "same": (ConvGeometry(3, (3, 3), (1, 1), ((1, 1), (1, 1))), (2, 5, 4), 8, (6, 0)),
    "stride 2": (ConvGeometry(3, (3, 3), (2, 2), ((1, 1), (1, 1))), (2, 6, 5), 8, (2, 3)),
    "asymmetric": (ConvGeometry(4, (3, 2), (2, 3), ((0, 2), (1, 0))), (2, 6, 7), 8, (3, 1)),
    "stride > kernel": (ConvGeometry(4, (2, 1), (3, 2)), (3, 8, 5), 8, (2, 0)),
    "negative padding": (ConvGeometry(3, (3, 3), (1, 1), ((-1, 0), (1, -1))), (2, 6, 6), 8, (2, 1)),
    "ragged out": (ConvGeometry(3, (3, 3), (1, 1), ((1, 1), (1, 1))), (2, 4, 4), 10, (3, 1, 2)),
}


def make_case(name):
    geometry, (batch, height, width), out, counts = GEOMETRIES[name]
    layout = make_layout(1, (out, geometry.in_features), (4, 4), counts)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, width, geometry.in_channels))
    blocks = jax.random.normal(keys[1], (layout.num_blocks, 4, 4))
    dy = jax.random.normal(keys[2], (batch, *geometry.output_size(height, width), out))
    return x, blocks, layout, dy, geometry


@pytest.fixture(scope="module", params=GEOMETRIES)
def case(request):
    return make_case(request.param)


def dense_gradient(x, layout, dy, geometry):
    """dW[out, in] of the dense convolution."""

    def conv(weight):
        kernel = weight.T.reshape(*geometry.kernel_size, geometry.in_channels, -1)
        return lax.conv_general_dilated(
            x, kernel, geometry.strides, geometry.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return np.asarray(jax.vjp(conv, jnp.zeros(layout.shape))[1](dy)[0])


def patches(x, geometry):
    """[in, positions], column by column in numpy."""
    (top, bottom), (left, right) = geometry.padding
    grown = np.pad(x, ((0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)), (0, 0)))
    height, width = grown.shape[1:3]
    grown = grown[:, max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
    out_h, out_w = geometry.output_size(x.shape[1], x.shape[2])
    columns = []
    for kh in range(geometry.kernel_size[0]):
        for kw in range(geometry.kernel_size[1]):
            rows = kh + geometry.strides[0] * np.arange(out_h)
            cols = kw + geometry.strides[1] * np.arange(out_w)
            columns += [grown[:, rows[:, None], cols[None], c].ravel() for c in range(geometry.in_channels)]
    return np.stack(columns)


def run(x, blocks, layout, dy, geometry, kind=None, feature_major=False):
    """y and the gradients of (x, blocks, probe); without a kind, of (x, blocks) of the layer that is not observed."""
    to_major = (3, 1, 2, 0)

    def layer(x, blocks, probe):
        x = x.transpose(to_major) if feature_major else x
        y = sparse_conv(x, blocks, layout, geometry=geometry, implementation="dense", feature_major=feature_major)
        if kind is not None:
            y = observe(y, x, probe, layout, geometry=geometry, feature_major=feature_major)
        return y.transpose(to_major) if feature_major else y

    @jax.jit
    def together(*args):
        y, pullback = jax.vjp(layer, *args)
        return y, *pullback(dy)

    return together(x, blocks, {} if kind is None else make_probe(kind, layout))


def close(result, wanted):
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_statistic_is_that_of_the_dense_gradient(case, kind):
    x, _, layout, dy, geometry = case
    statistic = run(*case, kind)[3]
    gradient = dense_gradient(x, layout, dy, geometry)
    if kind == "norm":
        close(statistic["dy_norm"], np.sqrt(np.square(dy).sum(axis=(0, 1, 2))))
        close(statistic["x_norm"], np.linalg.norm(patches(np.asarray(x), geometry), axis=1))
        bound = np.outer(statistic["dy_norm"], statistic["x_norm"])
        assert (np.abs(gradient) <= bound * (1 + 1e-5)).all()
    elif kind == "block_gradient":
        padded = np.concatenate([gradient, np.zeros((layout.out_idx.size - layout.shape[0], layout.shape[1]))])
        close(statistic["panel_norm"], np.linalg.norm(padded[layout.out_idx], axis=1))
    else:
        close(statistic["gradient"], gradient)


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_observing_changes_neither_the_output_nor_other_gradients(kind, feature_major):
    case = make_case("stride 2")
    seen = run(*case, kind, feature_major)
    for one, other in zip(seen[:3], run(*case, None, feature_major)[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    for name, value in run(*case, kind)[3].items():
        close(seen[3][name], value)  # the same statistic in either layout of activations


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_measured_in_float32(kind):
    geometry = ConvGeometry(4)
    layout = make_layout(0, (8, 4), (4, 4), (1, 1))
    x, dy = jnp.full((64, 8, 8, 4), 1.0, jnp.bfloat16), jnp.full((64, 8, 8, 8), 1.0, jnp.bfloat16)
    # 4096 positions: in bfloat16 a sum of ones stops growing at 256.
    statistic = run(x, jnp.ones((2, 4, 4), jnp.bfloat16), layout, dy, geometry, kind)[3]
    wanted = {"dy_norm": 64, "x_norm": 64, "panel_norm": 2 * 4096, "gradient": 4096}
    for name, value in statistic.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, wanted[name])


def test_the_bound_is_met_with_equality_by_one_position():
    """With one example and one output position dW is an outer product: the bound is exact."""
    layout = make_layout(0, (8, 12), (4, 4), (2, 1))
    x, dy = jax.random.normal(jax.random.key(0), (1, 1, 1, 12)), jax.random.normal(jax.random.key(1), (1, 1, 1, 8))
    statistic = run(x, jnp.ones((3, 4, 4)), layout, dy, ConvGeometry(12), "norm")[3]
    close(np.outer(statistic["dy_norm"], statistic["x_norm"]), np.abs(dense_gradient(x, layout, dy, ConvGeometry(12))))


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [SparseDense, SparseConv])
def test_layers_observe_when_given_a_probe(layer, kind, feature_major):
    """The gradient of a mean-square loss, measured through a Flax layer and from the dense kernel."""
    conv = layer is SparseConv
    args = {"features": 8, "num_blocks": 3, "block_shape": (4, 4), "implementation": "dense"}
    args |= {"feature_major": feature_major, "bias_init": jax.random.normal}
    if conv:
        args |= {"kernel_size": (3, 3), "strides": 2}
    shape = (3, 5, 5, 2) if conv else (7, 14)
    x = jax.random.normal(jax.random.key(0), shape)
    major = (3, 1, 2, 0) if conv else (1, 0)
    model = layer(**args)
    inputs = x.transpose(major) if feature_major else x
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    layout = variables["topology"]["layout"]

    @jax.jit
    @jax.grad
    def measure(probe):
        return jnp.square(model.apply({**variables, "probes": {"statistic": probe}}, inputs)).mean()

    @jax.jit
    @jax.grad
    def dense(weight):
        if conv:
            twin = {"kernel": weight.T.reshape(3, 3, 2, 8), "bias": variables["params"]["bias"]}
            return jnp.square(nn.Conv(8, (3, 3), 2).apply({"params": twin}, x)).mean()
        return jnp.square(x @ weight.T + variables["params"]["bias"][None]).mean()

    gradient = np.asarray(dense(unpack(variables["params"]["blocks"], layout)))
    statistic = measure(make_probe(kind, layout))
    if kind == "norm":
        assert (np.abs(gradient) <= np.outer(statistic["dy_norm"], statistic["x_norm"]) * (1 + 1e-5)).all()
        columns = patches(np.asarray(x), ConvGeometry(2, (3, 3), (2, 2), ((1, 1), (1, 1)))) if conv else np.asarray(x).T
        close(statistic["x_norm"], np.linalg.norm(columns, axis=1))
    elif kind == "block_gradient":
        close(statistic["panel_norm"], np.linalg.norm(gradient[layout.out_idx], axis=1))
    else:
        close(statistic["gradient"], gradient)


def test_probes_are_zeros_of_the_sizes_of_the_layer():
    layout = random_layout(jax.random.key(0), (10, 12), block_shape=(4, 3), num_blocks=5)
    shapes = {kind: {k: v.shape for k, v in make_probe(kind, layout).items()} for kind in KINDS}
    assert shapes == {
        "norm": {"dy_norm": (10,), "x_norm": (12,)},
        "block_gradient": {"panel_norm": (3, 12)},
        "gradient": {"gradient": (10, 12)},
    }
    assert not any(v.any() for kind in KINDS for v in make_probe(kind, layout).values())
    with pytest.raises(ValueError, match="no probe measures 'hessian'; choose norm, block_gradient or gradient"):
        make_probe("hessian", layout)
