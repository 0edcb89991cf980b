"""Batch norm of the models beside that of flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsb_jax.training.models.batch_norm import BatchNorm


def both(axis, dtype, *, average):
    options = {"use_running_average": average, "axis": axis, "dtype": dtype}
    return BatchNorm(**options), nn.BatchNorm(momentum=0.9, **options)


def variables_of(features):
    rng = np.random.default_rng(1)
    scale, bias, mean, var = (rng.uniform(0.5, 2, features).astype(np.float32) for _ in range(4))
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}


@pytest.mark.parametrize("average", [False, True], ids=["batch", "average"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, -1])
def test_values_averages_and_gradients_are_those_of_flax(axis, dtype, average):
    shape = (3, 5, 4, 7)
    x = jax.random.normal(jax.random.key(0), shape) * 3 + 2
    weight = jax.random.normal(jax.random.key(2), shape)  # of the sum that is differentiated
    variables = variables_of(shape[axis])

    @functools.partial(jax.jit, static_argnums=0)
    def results(norm, variables, x):
        def value(params, x):
            y, new = norm.apply({**variables, "params": params}, x.astype(dtype), mutable=["batch_stats"])
            return (y.astype(jnp.float32) * weight).sum(), (y, new)

        (_, others), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(variables["params"], x)
        return others, gradients

    ours, theirs = (results(norm, variables, x) for norm in both(axis, dtype, average=average))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert ours[0][0].dtype == dtype
    tolerance = 2e-5 if dtype == "float32" else 2**-6
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_it_begins_as_that_of_flax():
    norms = both(0, jnp.float32, average=False)
    ours, theirs = (norm.init(jax.random.key(0), jnp.full((3, 2, 2, 4), 7.0)) for norm in norms)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_by_hand():
    """1, 3 and 2, 2: means 2, 2, variances 1, 0; averages move a tenth of the way from 0 and 1."""
    norm = BatchNorm(use_running_average=False, axis=0, epsilon=0.25)
    x = jnp.array([[1.0, 3.0], [2.0, 2.0]])[:, None, None]
    variables = norm.init(jax.random.key(0), x)
    variables["params"] = {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.0, 5.0])}
    y, new = norm.apply(variables, x, mutable=["batch_stats"])
    half = 2 / np.sqrt(1.25)
    np.testing.assert_allclose(y[:, 0, 0], [[-half, half], [5, 5]], rtol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["mean"], [0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], [1.0, 0.9], rtol=1e-6)
    averaged = BatchNorm(use_running_average=True, axis=0, epsilon=0.0).apply(variables, x)
    np.testing.assert_allclose(averaged[:, 0, 0], [[2, 6], [7, 7]], rtol=1e-6)
