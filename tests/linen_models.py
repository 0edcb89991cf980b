"""Linen models that know nothing of sparsity, and what has to hold of any of them once it is sparse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import dsb_jax as dsb
from tests.topologies import DrawnByNumPy

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)

plan_of = functools.partial(dsb.linen.plan, sparsity=0.5, block_shape=(8, 4))


class Block(nn.Module):
    """A layer for nn.scan: (carry, _) -> (carry, None)."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(16, use_bias=self.use_bias)(x)), None


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(16)(x))


class WithSetup(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(16), nn.Dense(16)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.tanh(self.encoder(x))

    def decode(self, x):
        return self._last(x)

    def _last(self, x):
        return self.decoder(x)


class Wrapper(nn.Module):
    """A model around another one, with a layer of its own."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(self.inner(x))


QUICK = DrawnByNumPy()  # compiles sooner than what draws its layouts


def sparse(model, *args, plan=None, method=QUICK, implementation="dense", **options):
    """The sparse model; options are those of `plan_of`."""
    plan = plan_of(model, *args, **options) if plan is None else plan
    return dsb.linen.sparsify(model, plan, method=method, implementation=implementation)


PLAN = plan_of(WithSetup(), X)
MODEL = sparse(WithSetup(), plan=PLAN)


def squares(model, variables, *args):
    return sum(jnp.square(y).mean() for y in jax.tree.leaves(model.apply(variables, *args)))


def assert_close(one, other, tolerance=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance)


def assert_like_dense(sparse_model, model, *args):
    """The sparse model is the dense one with zeros: names, shapes, outputs, gradients. Returns its variables."""

    # Not compiled as a whole: the operations of one model are those of the next, and are compiled already.
    variables = sparse_model.init(KEY, *args)
    params, topology = variables["params"], variables["topology"]
    others = {name: tree for name, tree in variables.items() if name not in ("params", "topology")}
    dense = dsb.to_dense(params, topology)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, jax.eval_shape(model.init, KEY, *args)["params"])

    result = jax.value_and_grad(lambda params: squares(sparse_model, {**variables, "params": params}, *args))(params)
    wanted, gradient = jax.value_and_grad(lambda params: squares(model, {**others, "params": params}, *args))(dense)
    assert wanted > 1e-3
    assert_close(result, (wanted, dsb.from_dense(gradient, topology=topology)[0]))
    dsb.validate_topology(topology)
    return variables
