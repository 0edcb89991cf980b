"""A model of Flax's NNX, written without a word of sparsity, becomes sparse by the numbered lines and learns digits.
Half way Orbax saves the training; restored into what `nnx.eval_shape` gives, it goes on to the same bits.

    python examples/own_nnx_model.py [--sparsity=0.9 --steps=400 --seed=0]   # seeds 0-4: 98.1, 98.9, 98.3, 99.2, 98.1 %
"""

import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx

import dsb_jax as dsb  # 1
from dsb_jax.training import data

SPARSITY = flags.DEFINE_float("sparsity", 0.9, "Fraction of zeros over the layers that can be sparse.")
STEPS = flags.DEFINE_integer("steps", 400, "Training steps.")
SEED = flags.DEFINE_integer("seed", 0, "Of weights, pattern and batches.")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.third = nnx.Conv(64, 128, (3, 3), rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.second(nnx.relu(self.first(x)))), (2, 2), (2, 2))
        return self.out(nnx.relu(self.third(x)).max(axis=(1, 2)))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    optimizer.update(model, nnx.grad(loss_fn)(model, x, y))


def create(sparsity):
    model = Net(nnx.Rngs(SEED.value))
    plan = dsb.nnx.plan(model, jax.ShapeDtypeStruct((1, 8, 8, 1), "float32"), sparsity=sparsity)  # 2
    dsb.nnx.sparsify(model, plan, rngs=nnx.Rngs(SEED.value + 1))  # 3
    return model, nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS.value)), wrt=nnx.Param)


def train(model, optimizer, batches):
    method = dsb.methods.DSB.for_adam(update_interval=50, update_end_step=3 * STEPS.value // 4)  # 4
    for step, batch in batches:
        if method.due(step) and dsb.nnx.topology(model):  # 5
            dsb.nnx.adapt(model, optimizer, loss_fn, method, *batch, step=step, key=jax.random.key(step))  # 6
        train_step(model, optimizer, *batch)


def main(_):
    logging.set_verbosity(logging.WARNING)
    digits, half = data.load("digits"), STEPS.value // 2
    order = np.random.default_rng(SEED.value).integers(len(digits.train_labels), size=(STEPS.value, 128))
    batches = list(enumerate(zip(digits.train_inputs[order] / 255, digits.train_labels[order], strict=True)))
    dense, sparse, restored = create(0), create(SPARSITY.value), nnx.eval_shape(lambda: create(SPARSITY.value))
    train(*sparse, batches[:half])
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/half", nnx.state(sparse))
        nnx.update(restored, checkpointer.restore(f"{folder}/half", nnx.state(restored)))
    for name, (model, optimizer) in {"dense": dense, "sparse": sparse, "restored": restored}.items():
        train(model, optimizer, batches if name == "dense" else batches[half:])
        right = (model(digits.test_inputs / 255).argmax(axis=-1) == digits.test_labels).mean()
        weights = optax.tree.size(nnx.state(model, nnx.Param))
        print(f"{name:<10}{right:.2%} of the test images, {weights:7,} weights")
    print("equal bits:", all(map(np.array_equal, *(jax.tree.leaves(nnx.state(t)) for t in (sparse, restored)))))


if __name__ == "__main__":
    app.run(main)
