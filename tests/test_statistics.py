"""The statistics that growing needs, against dense gradients; observing changes nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsb_jax.layout import unpack
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.ops import sparse_conv
from dsb_jax.ops.statistics import Gradient, OutputInputNorms, PanelGradientNorm, Zero, observe
from dsb_jax.spec import conv_spec, linear_spec
from pallas_kernels import ConvGeometry
from tests.classifiers import by_numpy
from tests.conftest import make_layout
from tests.topologies import DrawnByNumPy

KINDS = (OutputInputNorms(), PanelGradientNorm(), Gradient())
IDS = [type(kind).__name__ for kind in KINDS]

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


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def make_case(name):
    geometry, (batch, height, width), out, counts = GEOMETRIES[name]
    layout = make_layout(1, (out, geometry.in_features), (4, 4), counts)
    x = normal(0, batch, height, width, geometry.in_channels)
    dy = normal(1, batch, *geometry.output_size(height, width), out)
    return x, normal(2, layout.num_blocks, 4, 4), layout, dy, geometry


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


def dense_gradient(x, layout, dy, geometry):
    """dW[out, in] of the dense convolution, whose columns are ordered (kh, kw, c)."""
    return dy.reshape(-1, layout.shape[0]).T @ patches(x, geometry).T


def zero_of(kind, layout):
    out, in_ = layout.shape
    spec = linear_spec(in_, out).with_blocks(layout.block_shape, layout.num_blocks)
    return Zero(kind.zeros(spec), np.zeros((), np.float32), kind)


def observed(x, blocks, layout, dy, geometry, kinds=(None,), feature_major=(False,)):
    """{(kind, feature_major): (y, dx, d_blocks, statistic)}, compiled at once; None is a layer that is not observed."""
    to_major = (3, 1, 2, 0)

    def one(kind, major, x, blocks, dy):
        def layer(x, blocks, zero):
            x = x.transpose(to_major) if major else x
            y = sparse_conv(x, blocks, layout, geometry=geometry, implementation="dense", feature_major=major)
            if kind is not None:
                y = observe(y, x, zero, layout, geometry=geometry, feature_major=major)
            return y.transpose(to_major) if major else y

        y, pullback = jax.vjp(layer, x, blocks, {} if kind is None else zero_of(kind, layout))
        dx, d_blocks, seen = pullback(dy)
        return y, dx, d_blocks, None if kind is None else (kind.finish(seen.value), seen.calls)

    pairs = [(kind, major) for kind in kinds for major in feature_major]
    found = jax.device_get(jax.jit(lambda *args: [one(*pair, *args) for pair in pairs])(x, blocks, dy))
    assert all(seen is None or seen[1] == 1 for *_, seen in found)
    return {pair: (*rest, seen and seen[0]) for pair, (*rest, seen) in zip(pairs, found, strict=True)}


def statistic_of(case, kind):
    return observed(*case, [kind])[kind, False][3]


def close(result, wanted):
    np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_statistic_is_that_of_the_dense_gradient(name):
    x, _, layout, dy, geometry = case = make_case(name)
    norms, panel, whole = (seen for *_, seen in observed(*case, KINDS).values())
    gradient = dense_gradient(x, layout, dy, geometry)
    close(norms.dy_norm, np.sqrt(np.square(dy).sum(axis=(0, 1, 2))))
    close(norms.x_norm, np.linalg.norm(patches(x, geometry), axis=1))
    bound = np.outer(norms.dy_norm, norms.x_norm)
    assert (np.abs(gradient) <= bound * (1 + 1e-5)).all()
    padded = np.concatenate([gradient, np.zeros((layout.out_idx.size - layout.shape[0], layout.shape[1]))])
    close(panel, np.linalg.norm(padded[layout.out_idx], axis=1))
    close(FROM_GRADIENT(gradient, layout), panel)
    close(whole, gradient)


FROM_GRADIENT = jax.jit(PanelGradientNorm().from_gradient)


def test_observing_changes_neither_the_output_nor_other_gradients():
    case = make_case("stride 2")
    statistics = {}
    for major in (False, True):  # a program for each: in one, XLA could compute equal products once
        unseen = observed(*case, [None], [major])[None, major]
        for kind in KINDS:
            *seen, statistic = observed(*case, [kind], [major])[kind, major]
            for one, other in zip(seen, unseen[:3], strict=True):
                np.testing.assert_array_equal(one, other)
            wanted = statistics.setdefault(kind, statistic)
            jax.tree.map(close, statistic, wanted)  # the same statistic in either layout of activations


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_bfloat16_is_measured_in_float32(kind):
    geometry = ConvGeometry(4)
    layout = make_layout(0, (8, 4), (4, 4), (1, 1))
    x, dy, blocks = (np.ones(shape, jnp.bfloat16) for shape in ((64, 8, 8, 4), (64, 8, 8, 8), (2, 4, 4)))
    # 4096 positions: in bfloat16 a sum of ones stops growing at 256.
    statistic = statistic_of((x, blocks, layout, dy, geometry), kind)
    wanted = {OutputInputNorms(): 64, PanelGradientNorm(): 2 * 4096, Gradient(): 4096}[kind]
    for value in jax.tree.leaves(statistic):
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, wanted)


def test_the_bound_is_met_with_equality_by_one_position():
    """With one example and one output position dW is an outer product: the bound is exact."""
    layout = make_layout(0, (8, 12), (4, 4), (2, 1))
    x, dy, blocks = normal(0, 1, 1, 1, 12), normal(1, 1, 1, 1, 8), np.ones((3, 4, 4), np.float32)
    statistic = statistic_of((x, blocks, layout, dy, ConvGeometry(12)), OutputInputNorms())
    close(np.outer(statistic.dy_norm, statistic.x_norm), np.abs(dense_gradient(x, layout, dy, ConvGeometry(12))))


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("layer", [SparseDense, SparseConv])
def test_layers_observe_when_given_a_zero(layer, feature_major):
    """The gradient of a mean-square loss, measured through a Flax layer and from the dense kernel."""
    conv = layer is SparseConv
    args = {"features": 8, "num_blocks": 3, "block_shape": (4, 4), "implementation": "dense"}
    args |= {"feature_major": feature_major, "bias_init": by_numpy, "kernel_init": by_numpy, "method": DrawnByNumPy()}
    if conv:
        args |= {"kernel_size": (3, 3), "strides": 2}
    x = normal(0, *((3, 5, 5, 2) if conv else (7, 14)))
    major = (3, 1, 2, 0) if conv else (1, 0)
    model = layer(**args)
    inputs = x.transpose(major) if feature_major else x
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    node = variables["topology"]["blocks"]
    layout = node.layout

    def measured(zero):
        return jnp.square(model.apply({**variables, "statistics": {"blocks": zero}}, inputs)).mean()

    def dense(weight):
        if conv:
            twin = {"kernel": weight.T.reshape(3, 3, 2, 8), "bias": variables["params"]["bias"]}
            return jnp.square(nn.Conv(8, (3, 3), 2).apply({"params": twin}, x)).mean()
        return jnp.square(x @ weight.T + variables["params"]["bias"][None]).mean()

    @jax.jit
    def results(zeros, blocks):
        seen = [kind.finish(jax.grad(measured)(zero).value) for kind, zero in zip(KINDS, zeros, strict=True)]
        return seen, jax.grad(dense)(unpack(blocks, layout))

    zeros = [Zero(kind.zeros(node.spec), np.zeros((), np.float32), kind) for kind in KINDS]
    (norms, panel, whole), gradient = jax.device_get(results(zeros, variables["params"]["blocks"]))
    assert (np.abs(gradient) <= np.outer(norms.dy_norm, norms.x_norm) * (1 + 1e-5)).all()
    columns = patches(x, ConvGeometry(2, (3, 3), (2, 2), ((1, 1), (1, 1)))) if conv else x.T
    close(norms.x_norm, np.linalg.norm(columns, axis=1))
    close(panel, np.linalg.norm(gradient[layout.out_idx], axis=1))
    close(whole, gradient)


def test_zeros_have_the_sizes_of_one_layer():
    spec = conv_spec((2, 2), 3, 10).with_blocks((4, 3), 5)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.any()), kind.zeros(spec)) for kind in KINDS]
    assert shapes == [(((10,), False), ((12,), False)), ((3, 12), False), ((10, 12), False)]


def test_values_are_equal_and_have_a_hash():
    assert {OutputInputNorms(): 1, PanelGradientNorm(): 2, Gradient(): 3}[PanelGradientNorm()] == 2
