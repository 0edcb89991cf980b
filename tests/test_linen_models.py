"""Sparse layers inside models that are not ours: auto-named layers and a plan, nn.scan, nn.remat, nn.vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.paths import nodes
from dsb_jax.plan import SparsityPlan
from dsb_jax.rules import Rule

KEY = jax.random.key(0)


class Block(nn.Module):
    plan: SparsityPlan | None = None

    @nn.compact
    def __call__(self, x):
        return nn.relu(x + SparseConv(16, (3, 3), plan=self.plan, implementation="dense")(x))


class UserModel(nn.Module):
    """Written as one writes Flax: no names, a loop, a submodule, a layer made in setup by hand."""

    plan: SparsityPlan | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3))(x)
        for _ in range(2):
            x = Block(self.plan)(x)
        x = x.mean(axis=(1, 2))
        x = nn.relu(SparseDense(32, plan=self.plan)(x))
        return SparseDense(4, plan=self.plan, name="head")(x)


def test_a_plan_made_from_the_same_model_without_one():
    x = jax.random.normal(KEY, (2, 4, 4, 3))
    params = jax.eval_shape(UserModel().init, KEY, x)["params"]
    rules = [Rule("Conv_0|head", dense=True)]
    plan = dsb.linen.plan(UserModel(), x, sparsity=0.5, block_shape=(8, 4), rules=rules)
    assert set(plan.sparse) == {("Block_0", "SparseConv_0"), ("Block_1", "SparseConv_0"), ("SparseDense_0",)}
    model = UserModel(plan)
    logits, variables = jax.jit(model.init_with_output)(KEY, x)
    found = nodes(variables["topology"])
    assert {path[:-1]: node.spec for path, node in found.items()} == plan.sparse

    # The dense model with the unpacked kernels says the same, and takes them by its own names.
    dense = jax.jit(dsb.to_dense)(variables["params"], variables["topology"])
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(logits, jax.jit(UserModel().apply)({"params": dense}, x), rtol=1e-5, atol=1e-5)


class Layer(nn.Module):
    """A layer for nn.scan: (carry, _) -> (carry, None)."""

    density: float | None = 0.5

    @nn.compact
    def __call__(self, x, _):
        dense = SparseDense(16, density=self.density, block_shape=(4, 4), implementation="dense", name="dense")
        return nn.tanh(dense(x)), None


def test_scan_stacks_blocks_and_layouts():
    x = jax.random.normal(KEY, (5, 16))
    scanned = nn.scan(Layer, variable_axes={"params": 0, "topology": 0}, split_rngs={"params": True}, length=3)()
    variables = jax.jit(scanned.init)(KEY, x, None)
    node = variables["topology"]["dense"]["blocks"]
    assert variables["params"]["dense"]["blocks"].shape == (3, 8, 4, 4)
    assert node.layout.in_idx.shape == (3, 8, 4)
    assert (node.num_layers, node.spec.num_blocks, node.kernel_shape) == (3, 8, (3, 16, 16))

    def loss(params):
        return jnp.square(scanned.apply({**variables, "params": params}, x, None)[0]).sum()

    def looped(params):
        y = x
        for i in range(3):
            at = {"params": params, "topology": variables["topology"]}
            y, _ = Layer().apply(jax.tree.map(lambda leaf, i=i: leaf[i], at), y, None)
        return jnp.square(y).sum()

    dsb.validate_topology(variables["topology"])
    assert (node.layout.in_idx[0] != node.layout.in_idx[1]).any()  # every layer has drawn its own
    result, wanted = (jax.jit(jax.value_and_grad(f))(variables["params"]) for f in (loss, looped))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_remat_changes_nothing():
    x = jax.random.normal(KEY, (5, 16))
    plain, remat = Layer(name="layer"), nn.remat(Layer)(name="layer")
    variables, same = (jax.jit(model.init)(KEY, x, None) for model in (plain, remat))
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)

    def gradient(model):
        return jax.jit(jax.grad(lambda params: model.apply({**variables, "params": params}, x, None)[0].sum()))

    for a, b in zip(*(jax.tree.leaves(gradient(m)(variables["params"])) for m in (plain, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("split", [True, False])
def test_vmap_makes_an_ensemble(split):
    x = jax.random.normal(KEY, (5, 16))
    axis = 0 if split else None
    ensemble = nn.vmap(
        Layer, variable_axes={"params": axis, "topology": axis}, split_rngs={"params": split}, in_axes=(None, None),
        axis_size=2,
    )()  # fmt: skip
    (y, _), variables = jax.jit(ensemble.init_with_output)(KEY, x, None)
    assert y.shape == (2, 5, 16)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables) if split else variables
        np.testing.assert_allclose(y[i], Layer().apply(one, x, None)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_wrappers_that_rewrite_kernels_are_refused(wrapper):
    """They would find no kernel, and do nothing or fail somewhere else (report 15)."""

    options = {"update_stats": False} if wrapper is nn.SpectralNorm else {}

    class Wrapped(nn.Module):
        density: float | None

        @nn.compact
        def __call__(self, x):
            layer = SparseDense(8, density=self.density, block_shape=(4, 4))
            return wrapper(layer)(x, **options)

    with pytest.raises(NotImplementedError, match=f"{wrapper.__name__} cannot normalize SparseDense_0"):
        Wrapped(0.5).init(KEY, jnp.ones((2, 8)))
    assert "kernel" in Wrapped(None).init(KEY, jnp.ones((2, 8)))["params"]["SparseDense_0"]
