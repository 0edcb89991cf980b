"""A Linen model of one's own learns digits three times: dense, dense with a mask over its weights, and sparse.

    python examples/own_linen_model.py [--sparsity=0.9 --steps=400 --seed=0]

The numbered lines make it sparse. A mask saves nothing: its zeros are stored, multiplied and have moments.
Seeds 0, 1, 2: dense 99.2, 98.1, 99.2 %, masked 99.2, 99.2, 98.1 %, sparse 98.6, 98.9, 98.1 %. One image is 0.28 points.
"""

import timeit

import jax
import numpy as np
import optax
from absl import app, flags, logging
from flax import linen as nn

import dsb_jax as dsb  # 1
from dsb_jax.training import data

SPARSITY = flags.DEFINE_float("sparsity", 0.9, "Fraction of zeros over the layers that can be sparse.")
STEPS = flags.DEFINE_integer("steps", 400, "Training steps.")
SEED = flags.DEFINE_integer("seed", 0, "Of weights, pattern and batches.")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.relu(nn.Conv(128, (3, 3))(nn.max_pool(x, (2, 2), (2, 2))))
        return nn.Dense(10)(x.max(axis=(1, 2)))


def train(model, variables, optimizer, batches):
    def loss_fn(variables, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, x), y).mean()

    @jax.jit
    def train_step(params, topology, opt_state, x, y):
        gradients = jax.grad(lambda p: loss_fn({"params": p, "topology": topology}, x, y))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, topology = variables["params"], variables.get("topology", {})
    method = dsb.methods.DSB.for_adam(update_interval=50, update_end_step=3 * STEPS.value // 4)  # 4
    adapt, opt_state = dsb.adaptation(loss_fn, method, optimizer), optimizer.init(params)  # 5
    for step, batch in enumerate(batches):
        if topology and method.due(step):  # 6
            params, topology, opt_state, _ = adapt(params, topology, opt_state, step, jax.random.key(step), *batch)  # 7
        params, opt_state = train_step(params, topology, opt_state, *batch)
    one = timeit.Timer(lambda: jax.block_until_ready(train_step(params, topology, opt_state, *batch)))
    return {"params": params, "topology": topology}, 1000 * min(one.repeat(30, number=1))


def main(_):
    logging.set_verbosity(logging.WARNING)
    digits, key = data.load("digits"), jax.random.key(SEED.value)
    order = np.random.default_rng(SEED.value).integers(len(digits.train_labels), size=(STEPS.value, 64))
    batches = list(zip(digits.train_inputs[order] / 255, digits.train_labels[order], strict=True))
    x, model = np.float32(digits.test_inputs) / 255, Net()
    plan = dsb.linen.plan(model, x, sparsity=SPARSITY.value)  # 2
    sparse = dsb.linen.sparsify(model, plan)  # 3
    variables = sparse.init(key, x)
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS.value))
    mask = dsb.to_dense(optax.tree.ones_like(variables["params"]), variables["topology"])
    masked = optax.chain(optimizer, optax.stateless(lambda updates, _: optax.tree.mul(updates, mask)))
    print(plan, "\n        test accuracy   weights  ms a step", sep="\n", flush=True)
    for name, net, start, tx in (
        ("dense", model, model.init(key, x), optimizer),
        ("masked", model, {"params": dsb.to_dense(variables["params"], variables["topology"])}, masked),
        ("sparse", sparse, variables, optimizer),
    ):
        variables, milliseconds = train(net, start, tx, batches)
        accuracy = (net.apply(variables, x).argmax(axis=-1) == digits.test_labels).mean()
        print(f"{name:<8}{accuracy:13.2%}{optax.tree.size(variables['params']):10,}{milliseconds:11.1f}", flush=True)


if __name__ == "__main__":
    app.run(main)
