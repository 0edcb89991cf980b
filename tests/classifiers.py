"""Classifiers as other people write them: any arguments, fields, streams, inputs and collections."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.layout import pack, unpack
from dsb_jax.linen import SparseDense
from dsb_jax.methods import Static
from dsb_jax.methods.identity import identity
from dsb_jax.ops.statistics import PanelGradientNorm
from dsb_jax.static_values import as_static
from tests.topologies import DrawnByNumPy

SGD = optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 3


def by_numpy(key, shape, dtype=jnp.float32):
    """Weights that are constants of the program, which compiles sooner than one that draws them."""
    return jnp.asarray(np.random.default_rng(0).normal(0, 0.3, shape), dtype)


FC = functools.partial(
    SparseDense,
    16,
    num_blocks=3,
    block_shape=(8, 4),
    implementation="dense",
    method=DrawnByNumPy(),
    kernel_init=by_numpy,
)


class Base(nn.Module):
    """A sparse layer and a head; `middle` is what each model does in between."""

    def net(self, x, middle=lambda x: x):
        return nn.Dense(3, kernel_init=by_numpy, name="head")(middle(nn.relu(FC(name="fc")(x))))


class Plain(Base):
    """No argument but the input; fields without a hash."""

    widths: list = dataclasses.field(default_factory=lambda: [2, 2])
    table: dict = dataclasses.field(default_factory=lambda: {"a": [1]})

    @nn.compact
    def __call__(self, x):
        return self.net(x)


class Named(Base):
    @nn.compact
    def __call__(self, x, train=False):
        return self.net(x)


class Requires(Base):
    """`train` has no default; another stream than dropout."""

    @nn.compact
    def __call__(self, x, train):
        def drop_path(x):
            return x * jax.random.bernoulli(self.make_rng("drop_path"), 0.5, (x.shape[0], 1)) if train else x

        return self.net(x, drop_path)


class Deterministic(Base):
    @nn.compact
    def __call__(self, x, *, deterministic):
        return self.net(x, nn.Dropout(0.5, deterministic=deterministic))


class ByName(Base):
    """A dictionary is two arguments, or one."""

    @nn.compact
    def __call__(self, image, shift, is_training=True):
        return self.net(image + shift)


class OneDict(Base):
    @nn.compact
    def __call__(self, batch, train=True):
        return self.net(batch["image"] + batch["shift"])


class Tokens(Base):
    @nn.compact
    def __call__(self, x, training=False):
        return self.net(x)


class Counts(Base):
    """A collection of its own, with integers, and batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            count.value += 1
        return self.net(x, nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm"))


PAIR = {"image": X, "shift": np.ones((8, 1), np.float32)}
MODELS = {
    "fields without a hash": (Plain(), X),
    "train required, another stream": (Requires(), X),
    "deterministic": (Deterministic(), X),
    "a dictionary by name": (ByName(), PAIR),
    "a dictionary as one argument": (OneDict(), PAIR),
    "a tuple": (ByName(), tuple(PAIR.values())),
    "other collections": (Counts(), X),
}


class Shifted(Static):
    """Blocks move on by one column, if the layer is observed: measures as DSB does and compiles much sooner."""

    @property
    def statistic(self):
        return PanelGradientNorm()

    def update(self, key, step, state, statistic):
        layout = state.layout
        in_idx = (layout.in_idx.astype(jnp.int32) + 1) % layout.shape[1]
        layout = dataclasses.replace(layout, in_idx=in_idx.astype(layout.in_idx.dtype))
        state, report = identity(state._replace(blocks=pack(unpack(state.blocks, state.layout), layout), layout=layout))
        return state, report._replace(accepted=(statistic > 0).sum(dtype=jnp.int32))


CREATED = {}


def create(model, inputs=X, key=None):
    """The train state, in NumPy: steps donate no buffers of it, so that it is made once."""
    key = jax.random.key(0) if key is None else key
    shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(inputs))
    name = as_static(model), jax.tree.structure(inputs), shapes, str(jax.random.key_impl(key))
    if name not in CREATED:
        made = jax.jit(lambda key: dsb.create_train_state(model, SGD, key, inputs))(key)
        CREATED[name] = jax.device_get(made)
    return CREATED[name]
