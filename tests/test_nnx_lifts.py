"""Sparse layers of NNX under `nnx.scan`, `nnx.vmap` and `nnx.remat`, and their adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dsb_jax as dsb
from tests.conftest import always
from tests.nnx_models import WIDTH
from tests.test_nnx_sparsify import SIZES, sparse

X = jax.random.normal(jax.random.key(0), (4, WIDTH))
METHOD = dsb.methods.DSB(update_interval=2, update_end_step=100)
LAYERS = 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.linear(x))


def stack(rngs, axis=0):
    return nnx.vmap(Block, in_axes=0, out_axes=axis)(rngs.split(LAYERS))


class Scanned(nnx.Module):
    axes = 0

    def __init__(self, rngs):
        self.blocks = stack(rngs)

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class ByStateAxes(Scanned):
    axes = nnx.StateAxes({(nnx.Param, dsb.nnx.Topology): 0, ...: None})


class Forgotten(Scanned):
    """Written before the model was sparse: nobody lifts the topology."""

    axes = nnx.StateAxes({nnx.Param: 0, ...: None})


class Second(Scanned):
    """Stacked along axis 1."""

    axes = nnx.StateAxes({...: 1})

    def __init__(self, rngs):
        self.blocks = stack(rngs, axis=nnx.StateAxes({...: 1}))


class Rematerialized(Scanned):
    def __call__(self, x):
        run = nnx.remat(lambda block, x: block(x))
        return nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class Mapped(Scanned):
    """An ensemble: each member by itself."""

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x).mean(axis=0)


class Loop(nnx.Module):
    """The same layers without any lift."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def loss_fn(model, x):
    return (model(x) ** 2).mean()


def adapt(model):
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    report = dsb.nnx.adapt(model, optimizer, loss_fn, METHOD, X, step=2, key=jax.random.key(1))
    dsb.validate_topology(dsb.nnx.topology(model))
    return report


@pytest.mark.parametrize(
    "cls", always(Scanned, ByStateAxes, Mapped, of=[Scanned, ByStateAxes, Second, Rematerialized, Mapped])
)
def test_a_lifted_model_is_planned_trained_adapted_and_made_dense(cls):
    model = cls(nnx.Rngs(0))
    kernel = model.blocks.linear.kernel[...]
    plan = dsb.nnx.plan(model, X, **SIZES)
    spec = plan.sparse["blocks", "linear"]
    assert spec.stack_axes == ((1,) if cls is Second else (0,))
    assert plan.num_dense_params == LAYERS * WIDTH * (WIDTH + 1)
    model = sparse(model, X, implementation="dense")
    dense = dsb.nnx.to_dense(model)
    assert dense.blocks.linear.kernel.shape == kernel.shape
    np.testing.assert_allclose(dense(X), model(X), rtol=1e-5, atol=1e-5)
    gradients = nnx.grad(loss_fn)(model, X)
    assert gradients["blocks"]["linear"]["blocks"].shape == model.blocks.linear.blocks.shape
    report = adapt(model)["blocks", "linear"]
    assert report.accepted.shape == (LAYERS,)
    assert (report.accepted > 0).all()
    assert (report.status == 0).all()
    assert (report.calls == 1).all()


def test_each_layer_of_a_stack_adapts_by_its_own_statistics():
    """As in a loop over the same layers: the norms of each are those of its own gradient."""
    scanned = sparse(Scanned(nnx.Rngs(0)), X, implementation="dense")
    loop = sparse(Loop(nnx.Rngs(0)), X, implementation="dense")
    params, topology = dsb.nnx.params(scanned)["blocks"]["linear"], scanned.blocks.linear.topology.get_value()
    for i, block in enumerate(loop.blocks):
        block.linear.blocks.set_value(params["blocks"][i])
        block.linear.bias.set_value(params["bias"][i])
        layout = jax.tree.map(lambda leaf, i=i: leaf[i], topology.layout)
        old = block.linear.topology.get_value()
        block.linear.topology.set_value(dsb.with_index(type(old)(layout, None, old.spec)))
    np.testing.assert_allclose(loop(X), scanned(X), rtol=1e-5, atol=1e-6)
    statistics = [dsb.nnx.measure(model, loss_fn, METHOD, X) for model in (scanned, loop)]
    stacked = statistics[0]["blocks"]["linear"]["blocks"].value
    for i in range(LAYERS):
        one = statistics[1]["blocks"][i]["linear"]["blocks"].value
        np.testing.assert_allclose(stacked[i], one, rtol=1e-4, atol=1e-6)


def test_a_topology_that_nobody_lifts_is_named():
    model = sparse(Forgotten(nnx.Rngs(0)), X)
    with pytest.raises(
        ValueError, match=r"a stack of 3 layers whose topology is not lifted in this call; lift dsb_jax"
    ):
        model(jnp.zeros((2, WIDTH)))
