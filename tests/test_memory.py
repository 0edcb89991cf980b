"""The memory contract: weights, gradients and moments are Nd, and adapting adds the scratch of one layer.

Nothing runs here: the steps of models of many equal layers are compiled and their buffers counted.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from dsb_jax.adapt import adapt_step, update_layers
from dsb_jax.layout import random_layout
from dsb_jax.linen import SparseDense
from dsb_jax.methods import dsb
from dsb_jax.ops.statistics import make_probe
from dsb_jax.train import train_step
from dsb_jax.train_state import create_train_state

WIDTH = 512
DENSE_LAYER = 4 * WIDTH * WIDTH
METHOD = dsb(update_end_step=100, grow="norm", granularity="block")  # which takes the most
COLUMNS = dsb(update_end_step=100, grow="norm", granularity="panel_column")
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
    return jax.eval_shape(functools.partial(create_train_state, model, OPTIMIZER), jax.random.key(0), IMAGES)


def weight_bytes(state):
    return sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))


def training(depth, sparsity):
    """Bytes of the weights, and the counted buffers of a training step."""
    model = Stack(depth, 1 - sparsity)
    state = abstract_state(model)
    lowered = train_step.lower(state, IMAGES, LABELS, model=model, optimizer=OPTIMIZER)
    return weight_bytes(state), lowered.compile().memory_analysis()


def adapting(depth, sparsity, method=METHOD):
    """The same of an adaptation."""
    model = Stack(depth, 1 - sparsity)
    state = abstract_state(model)
    lowered = adapt_step.lower(state, IMAGES, LABELS, model=model, optimizer=OPTIMIZER, method=method)
    return weight_bytes(state), lowered.compile().memory_analysis()


def total(memory):
    """Arguments are donated: outputs lie where they lay."""
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + (memory.output_size_in_bytes - memory.alias_size_in_bytes)
    )


def test_the_state_is_three_times_the_weights_that_exist():
    """Weights and two moments, and at 0.9 indices under 7 % of the weights."""
    for depth, sparsity in ((6, 0.9), (6, 0.95)):
        state = abstract_state(Stack(depth, 1 - sparsity))
        weights = weight_bytes(state)
        assert weights == pytest.approx((1 - sparsity) * depth * DENSE_LAYER, rel=0.01)
        indices = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.topology))
        # in_idx takes 2 bytes for R weights of 4; rows and starts are those of any matrix, whatever its density.
        assert indices < 0.032 * weights + depth * 4 * (WIDTH + WIDTH // 16 + 1)
        assert sparsity > 0.9 or indices < 0.07 * weights
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state)) == 2 * weights + 4


def test_training_grows_with_the_weights_that_exist():
    weights, train = training(6, 0.9)
    # Weights, two moments, gradients, updates, copies in pieces.
    assert total(train) < 12 * weights
    assert train.temp_size_in_bytes < 6 * DENSE_LAYER  # less than one dense gradient of the model
    half, train_half = training(6, 0.95)
    assert half == pytest.approx(weights / 2, rel=0.01)
    assert total(train_half) < 0.6 * total(train)
    few, train_few = training(3, 0.9)
    assert total(train) - total(train_few) < 12 * (weights - few)


def test_adapting_adds_the_scratch_of_one_layer():
    weights, adapt = adapting(6, 0.9)
    assert adapt.alias_size_in_bytes >= 3 * weights  # weights and moments are repacked where the old ones lay
    # One layer needs mask, candidates, growth, score and what re-blocking makes of it; six need no more of them.
    few, adapt_few = adapting(2, 0.9)
    assert adapt_few.temp_size_in_bytes < 9 * DENSE_LAYER
    assert adapt.temp_size_in_bytes - adapt_few.temp_size_in_bytes < min(6 * (weights - few), 4 * DENSE_LAYER)
    assert total(adapt) - total(adapt_few) < 12 * (weights - few)  # no more than training holds
    _, columns = adapting(6, 0.9, COLUMNS)
    assert total(columns) < total(adapt) - 2 * DENSE_LAYER  # no layer is written out in dense form


def test_layers_of_different_sizes_share_their_scratch():
    """No two sizes share a compiled loop, and still there is one layer in dense form at a time."""

    def scratch(widths):
        old = {
            (str(width),): jax.eval_shape(
                lambda key, width=width: random_layout(key, (width, width), block_shape=(16, 16), num_blocks=96),
                jax.random.key(0),
            )
            for width in widths
        }
        blocks = {path: jax.ShapeDtypeStruct((96, 16, 16), jnp.float32) for path in old}
        statistics = {
            path: jax.eval_shape(lambda one: make_probe(METHOD.statistic, one), layout) for path, layout in old.items()
        }
        args = (jax.random.key(0), jnp.int32(0), blocks, old, statistics)
        lowered = jax.jit(functools.partial(update_layers, METHOD)).lower(*args)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one, two = scratch([512]), scratch([512, 480])
    assert DENSE_LAYER < one < 8 * DENSE_LAYER
    assert two < one + DENSE_LAYER
