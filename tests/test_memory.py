"""The memory contract: weights, gradients and moments are Nd, and adapting adds the scratch of one layer.

Nothing runs here: the steps of models of many equal layers are compiled and their buffers counted.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.linen import SparseDense
from dsb_jax.measuring import Measured
from dsb_jax.methods import DSB

WIDTH = 512
DENSE_LAYER = 4 * WIDTH * WIDTH
METHOD = DSB(update_end_step=100, grow="norm", granularity="block")  # which takes the most
COLUMNS = DSB(update_end_step=100, grow="norm", granularity="panel_column")
OPTIMIZER = optax.adamw(1e-3)
IMAGES = jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)
LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)


class Stack(nn.Module):
    """`depth` equal linear layers."""

    depth: int
    density: float

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(self.depth):
            x = nn.relu(SparseDense(WIDTH, density=self.density, use_bias=False, implementation="xla")(x))
        return x


def abstract_state(model):
    return jax.eval_shape(functools.partial(dsb.create_train_state, model, OPTIMIZER), jax.random.key(0), IMAGES)


def weight_bytes(state):
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))


def counted(step, state, **options):
    """The buffers of a compiled step that is given its state."""
    compiled = jax.jit(functools.partial(step, optimizer=OPTIMIZER, **options), donate_argnums=0)
    return compiled.lower(state, IMAGES, LABELS).compile().memory_analysis()


def training(depth, sparsity):
    """Bytes of the weights, and the counted buffers of a training step."""
    model = Stack(depth, 1 - sparsity)
    state = abstract_state(model)
    return weight_bytes(state), counted(dsb.train_step, state, model=model)


def adapting(depth, sparsity, method=METHOD):
    """The same of an adaptation."""
    model = Stack(depth, 1 - sparsity)
    state = abstract_state(model)
    return weight_bytes(state), counted(dsb.adapt_step, state, model=model, method=method)


def total(memory):
    """Arguments are donated: outputs lie where they lay."""
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + (memory.output_size_in_bytes - memory.alias_size_in_bytes)
    )


def test_the_state_is_three_times_the_weights_that_exist():
    """Weights and two moments, and at 0.9 indices under 7 % of the weights."""
    for depth, sparsity in ((4, 0.9), (4, 0.95)):
        state = abstract_state(Stack(depth, 1 - sparsity))
        weights = weight_bytes(state)
        assert weights == pytest.approx((1 - sparsity) * depth * DENSE_LAYER, rel=0.01)
        bare = dsb.without_index(state.topology)
        indices = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(bare))
        # in_idx takes 2 bytes for R weights of 4; rows and starts are those of any matrix, whatever its density.
        assert indices < 0.032 * weights + depth * 4 * (WIDTH + WIDTH // 16 + 1)
        # With what products derive from them, on each kind of device, at 0.9.
        for backend in ("cpu", "gpu") if sparsity == 0.9 else ():
            indexed = jax.eval_shape(functools.partial(dsb.with_index, backend=backend), bare)
            assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(indexed)) < 0.15 * weights
        assert sparsity > 0.9 or indices < 0.07 * weights
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state)) == 2 * weights + 4


def test_training_grows_with_the_weights_that_exist():
    weights, train = training(4, 0.9)
    # Weights, two moments, gradients, updates, copies in pieces.
    assert total(train) < 12 * weights
    assert train.temp_size_in_bytes < 4 * DENSE_LAYER  # less than one dense gradient of the model
    half, train_half = training(4, 0.95)
    assert half == pytest.approx(weights / 2, rel=0.01)
    assert total(train_half) < 0.6 * total(train)
    few, train_few = training(2, 0.9)
    assert total(train) - total(train_few) < 12 * (weights - few)


def test_adapting_adds_the_scratch_of_one_layer():
    weights, adapt = adapting(4, 0.9)
    assert adapt.alias_size_in_bytes >= 3 * weights  # weights and moments are repacked where the old ones lay
    # One layer needs mask, candidates, growth, score and what re-blocking makes of it; four need no more of them.
    few, adapt_few = adapting(2, 0.9)
    assert adapt_few.temp_size_in_bytes < 9 * DENSE_LAYER
    assert adapt.temp_size_in_bytes - adapt_few.temp_size_in_bytes < min(6 * (weights - few), 4 * DENSE_LAYER)
    assert total(adapt) - total(adapt_few) < 12 * (weights - few)  # no more than training holds
    _, columns = adapting(4, 0.9, COLUMNS)
    assert total(columns) < total(adapt) - 2 * DENSE_LAYER  # no layer is written out in dense form


@pytest.mark.campaign
def test_layers_of_different_sizes_share_their_scratch():
    """No two sizes share a compiled loop, and still there is one layer in dense form at a time."""

    def scratch(widths):
        params, topology = {}, {}
        for width in widths:
            layer = SparseDense(width, num_blocks=96, use_bias=False)
            variables = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct((1, width), jnp.float32))
            params[str(width)], topology[str(width)] = variables["params"], variables["topology"]
        statistics = jax.eval_shape(
            lambda: {
                name: {"blocks": Measured(METHOD.statistic.zeros(node["blocks"].spec), jnp.ones(()), 0)}
                for name, node in topology.items()
            }
        )

        def update(params, topology, key, statistics):
            return dsb.update(METHOD, optax.identity(), params, topology, optax.EmptyState(), 0, key, statistics)[:2]

        lowered = jax.jit(update).lower(params, topology, jax.random.key(0), statistics)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one, two = scratch([512]), scratch([512, 480])
    assert DENSE_LAYER < one < 8 * DENSE_LAYER
    assert two < one + DENSE_LAYER
