"""A packed layer and a dense layer with the same mask train alike, step by step, across an adaptation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.linen import SparseConv, SparseDense
from dsb_jax.losses import cross_entropy
from dsb_jax.methods import DSB
from dsb_jax.optimizer_states import SECOND_MOMENTS, followers
from dsb_jax.train import forward
from tests.topologies import DrawnByNumPy


class Net(nn.Module):
    """A layer in blocks, or the same layer dense: a convolution with batch norm, or a linear layer of ragged rows."""

    kind: str
    sparse: bool

    @nn.compact
    def __call__(self, x, train=False):
        def options(num_blocks):
            how = {"block_shape": (8, 2), "implementation": "xla", "method": DrawnByNumPy()}
            return {"num_blocks": num_blocks, **how} if self.sparse else {}

        if self.kind == "conv":
            x = SparseConv(16, (3, 3), strides=2, use_bias=False, name="conv", **options(14))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)).mean(axis=(1, 2))
        else:
            x = x.reshape(*x.shape[:1], -1)[:, :16]
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
            x = nn.tanh(SparseDense(21, name="linear", **options(9))(x))
        return nn.Dense(4, name="head")(x)


STEPS, ADAPT_AT = 10, 5
CASES = {
    "conv, sgd, block": (
        optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.2, momentum=0.9)),
        DSB(update_end_step=20, drop_fraction=0.5, granularity="block", block_aware_drop=False),
    ),
    "linear, adamw, panel_column": (
        optax.adamw(3e-3, eps=1e-4, weight_decay=0.1),
        DSB(update_end_step=20, drop_fraction=0.5, grow="norm", granularity="panel_column"),
    ),
}


@jax.jit
def masks_of(topology):
    """layer -> mask in the form of the dense kernel."""
    return {name: mask["kernel"] for name, mask in dsb.masks(topology).items()}


unpacked = jax.jit(dsb.to_dense)  # of any tree shaped as the params of the sparse model


def masked(tree, masks):
    return {n: {k: v * masks[n] if k == "kernel" and n in masks else v for k, v in leaves.items()}
            for n, leaves in tree.items()}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def masked_step(params, batch_stats, opt_state, masks, images, labels, *, model, optimizer):
    """Dense weights times a mask, masked gradients; everything of the size of the dense model."""

    def objective(params):
        variables = {"params": masked(params, masks), "batch_stats": batch_stats}
        logits, collections = forward(model, variables, images, jax.random.key(0))
        return cross_entropy(logits, labels), collections["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    updates, opt_state = optimizer.update(masked(gradients, masks), opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss


def map_moments(function, opt_state):
    """Applies a function of params to every part of the optimizer state that is shaped like them."""

    def is_params(node):
        return isinstance(node, dict) and "head" in node

    return jax.tree.map(lambda node: function(node) if is_params(node) else node, opt_state, is_leaf=is_params)


@pytest.mark.parametrize("name", CASES)
def test_packed_and_masked_training_are_the_same(name):
    optimizer, method = CASES[name]
    sparse, dense = (Net(name.split(",")[0], sparse) for sparse in (True, False))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((STEPS, 16, 7, 7, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, (STEPS, 16)), jnp.int32)
    packed = jax.jit(lambda key: dsb.create_train_state(sparse, optimizer, key, images[0]))(jax.random.key(1))
    params, batch_stats = jax.tree.map(
        jnp.array, (unpacked(packed.params, packed.topology), packed.collections["batch_stats"])
    )
    opt_state, masks = optimizer.init(params), masks_of(packed.topology)
    # The masked model's moments begin at zero where weights are new.
    moments = {follower.field for follower in followers(optimizer, packed.params, packed.topology).values()}
    fill = dict.fromkeys(moments & set(SECOND_MOMENTS), "zero")
    for step in range(STEPS):
        if step == ADAPT_AT:
            packed, report = dsb.adapt_step(
                packed, images[step], labels[step], model=sparse, method=method, optimizer=optimizer, fill=fill
            )
            assert all(layer.accepted > 0 for layer in report.values())
            # The masked model forgets weights and moments that have left.
            masks = jax.tree.map(jnp.logical_and, masks, masks_of(packed.topology))
            params = masked(params, masks)
            opt_state = map_moments(functools.partial(masked, masks=masks), opt_state)
            masks = masks_of(packed.topology)
        packed, metrics = dsb.train_step(packed, images[step], labels[step], model=sparse, optimizer=optimizer)
        params, batch_stats, opt_state, loss = masked_step(
            params, batch_stats, opt_state, masks, images[step], labels[step], model=dense, optimizer=optimizer
        )
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
        moments = map_moments(functools.partial(unpacked, topology=packed.topology), packed.opt_state)
        ours = (unpacked(packed.params, packed.topology), packed.collections["batch_stats"], moments)
        assert jax.tree.structure(ours) == jax.tree.structure((params, batch_stats, opt_state))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves((params, batch_stats, opt_state)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))
