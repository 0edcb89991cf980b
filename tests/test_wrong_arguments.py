"""What is no method, loss, key, step, plan or state is named, with the cure, before anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import dsb_jax as dsb
from dsb_jax.linen import SparseDense
from dsb_jax.measuring import Measured
from dsb_jax.methods import DSB, SET
from dsb_jax.ops import sparse_matmul
from dsb_jax.paths import layer_path, nodes
from dsb_jax.spec import linear_spec
from tests.topologies import DrawnByNumPy

METHOD = DSB()
ADAMW = optax.adamw(1e-2)
X = np.ones((6, 12), np.float32)
KEY = jax.random.key(1)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        method = DrawnByNumPy()
        return SparseDense(16, num_blocks=3, block_shape=(8, 4), implementation="dense", method=method, name="one")(x)


def outputs(variables, x):
    return Model().apply(variables, x)


def mean_loss(variables, x):
    return outputs(variables, x).mean()


@functools.cache
def trees():
    variables = jax.device_get(jax.jit(Model().init)(jax.random.key(0), X))
    return variables["params"], variables["topology"]


def plan():
    _, topology = trees()
    layers = {layer_path(path): linear_spec(12, node.spec.out) for path, node in nodes(topology).items()}
    return dsb.make_plan(layers, sparsity=0.5, block_shape=(8, 4), min_blocks=1)


def adapt(loss_fn=mean_loss, optimizer=ADAMW, *, topology=None, x=X, step=3, key=KEY, opt_state=None, **options):
    params, right = trees()
    state = ADAMW.init(params) if opt_state is None else opt_state
    run = dsb.adaptation(loss_fn, METHOD, optimizer, **options)
    return run(params, right if topology is None else topology, state, step, key, x)


def update(statistics, method=METHOD, key=KEY):
    params, topology = trees()
    return dsb.update(method, ADAMW, params, topology, ADAMW.init(params), 3, key, statistics)


def norms(*shape):
    return {"one": {"blocks": Measured(np.ones(shape, np.float32), np.float32(1), 1)}}


WRONG = {
    "method": (lambda: dsb.adaptation(mean_loss, "dsb", ADAMW), "method='dsb' is no method; give a value, such as"),
    "class": (lambda: dsb.adaptation(mean_loss, DSB, ADAMW), "is no method; give a value, such as dsb_jax.methods.DSB"),
    "optimizer": (lambda: dsb.adaptation(mean_loss, METHOD, None), "optimizer=None is no optax optimizer"),
    "fill": (lambda: adapt(fill="group_mean"), "fill='group_mean' is no dictionary"),
    "where": (lambda: adapt(where=lambda path: None), r"where\(\('one',\)\) is None; return True for layers"),
    "step": (lambda: adapt(step=2.5), r"step=2\.5 is no whole number; give that of the training step"),
    "no step": (lambda: adapt(step=None), "step=None is no whole number"),
    "two steps": (lambda: adapt(step=np.arange(2)), r"step=int64\[2\] is no whole number"),
    "flag": (lambda: adapt(step=True), "step=.* is no whole number"),
    "step and key swapped": (lambda: adapt(step=KEY, key=3), r"step=key<fry>\[\] is no whole number"),
    "no key": (lambda: adapt(key=None), "key=None is not one PRNG key; give jax.random.key"),
    "seed": (lambda: adapt(key=7), r"key=7 is not one PRNG key"),
    "keys": (lambda: adapt(key=jax.random.split(KEY, 2)), r"key=key<fry>\[2\] is not one PRNG key"),
    "seed of a new density": (
        lambda: dsb.restage(*trees(), ADAMW.init(trees()[0]), plan(), METHOD, ADAMW, 7),
        "key=7 is not one PRNG key",
    ),
    "seed of a conversion": (
        lambda: dsb.from_dense(dsb.to_dense(*trees()), plan(), key=7),
        "key=7 is not one PRNG key",
    ),
    "seed of a state": (lambda: dsb.create_train_state(Model(), ADAMW, 7, X), "key=7 is not one PRNG key"),
    "no function": (lambda: dsb.adaptation(0.5, METHOD, ADAMW), "loss_fn=0.5 cannot be called"),
    "no aux": (lambda: adapt(has_aux=True), "loss_fn returned a loss alone, with has_aux=True; leave has_aux away"),
    "aux": (lambda: adapt(lambda v, x: (mean_loss(v, x), 0)), r"returned \(loss, aux\), .*; pass has_aux=True"),
    "no mean": (lambda: adapt(outputs), r"the loss is float32\[6, 16\], not one float; return the mean"),
    "no mean, aux": (lambda: adapt(lambda v, x: (outputs(v, x), 0), has_aux=True), r"the loss is float32\[6, 16\]"),
    "no loss": (lambda: adapt(lambda v, x: None), "the loss is None, not one float"),
    "whole loss": (lambda: adapt(lambda v, x: mean_loss(v, x).astype(jnp.int32)), r"the loss is int32\[\], not one"),
    "no statistics": (lambda: update({}), r"statistics have nothing for one, where method 'dsb' takes \(2, 12\)"),
    "bare arrays": (lambda: update({"one": {"blocks": np.ones((2, 12))}}), "statistics have nothing for one"),
    "None": (lambda: update(None), "statistics have nothing for one"),
    "another method's": (lambda: update(norms(16, 12)), r"have \(16, 12\) for one, where method 'dsb' takes \(2, 12\)"),
    "parameters": (lambda: adapt(topology=trees()[0]), "this is no topology: it has 2 leaves, such as 'one/bias'"),
    "input": (lambda: adapt(x=X[:, :5]), "one holds a matrix of 16 outputs x 12 inputs, but .* make it 16 x 5"),
    "whole inputs": (
        lambda: sparse_matmul(X.astype(int), trees()[0]["one"]["blocks"], trees()[1]["one"]["blocks"].layout),
        r"x is int64, to which weights would be cut; pass x\.astype\(jnp\.float32\)",
    ),
    "plan": (lambda: dsb.restage(*trees(), (), None, METHOD, ADAMW, None), "plan=None is no SparsityPlan; make one"),
    "other plan": (lambda: dsb.from_dense({}, "x"), "plan='x' is no SparsityPlan"),
    "no layers": (lambda: dsb.make_plan({"fc": {}}, sparsity=0.5), r"give dsb_jax\.linen\.find_layers\(model, x\)"),
    "other storage": (lambda: update({}, SET()), "SET adapts layers with storage 'single', but one has 'blocks'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert len(str(error.value).splitlines()) <= 2


def test_a_state_of_other_parameters_is_refused():
    """Its moments would otherwise become those of these weights; before and after a change of the number of blocks."""
    params, _ = trees()
    other = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), params)
    message = r"opt_state has \(6, 8, 4\) for mu of one/blocks, whose shape is \(3, 8, 4\); pass the state that this"
    with pytest.raises(ValueError, match=message):
        adapt(opt_state=ADAMW.init(other))
    with pytest.raises(ValueError, match=message):
        dsb.update(METHOD, ADAMW, *trees(), ADAMW.init(other), 3, KEY, {})
    with pytest.raises(ValueError, match=r"opt_state has nothing for trace of .*/blocks"):
        adapt(optimizer=optax.sgd(0.1, momentum=0.9), opt_state=optax.sgd(0.1).init(params))


def test_keys_of_both_kinds_are_taken():
    """Of typed keys and of raw ones the same data draw the same."""
    typed = dsb.create_train_state(Model(), ADAMW, jax.random.key(3), X)
    raw = dsb.create_train_state(Model(), ADAMW, jax.random.PRNGKey(3), X)
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(typed), jax.device_get(raw)))
