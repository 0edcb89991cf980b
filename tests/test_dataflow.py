"""What depends on what in a traced program, and at how many places an input is used."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from dsb_jax.dataflow import count_uses, dependencies


def reached(function, *args):
    return [set(inputs) for inputs in dependencies(jax.make_jaxpr(function)(*args))]


@jax.custom_vjp
def seen(y, zero):
    return y


seen.defvjp(lambda y, zero: (y, None), lambda _, dy: (dy, dy.sum()))


def test_a_program_worked_by_hand():
    def program(a, b, c):
        return a * 2, jnp.zeros_like(a), a + jax.jit(lambda x, y: (x, y))(b, c)[1], jnp.float32(1)

    assert reached(program, 1.0, 2.0, 3.0) == [{0}, set(), {0, 2}, set()]


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (lambda a, b: lax.cond(a > 0, lambda x: x, lambda x: 0 * x, b), [{0, 1}]),
        (lambda a, b: lax.cond(a > 0, lambda x: (2 * x, 1.0), lambda x: (x, 2.0), b), [{0, 1}, {0}]),
        (lambda a, b: jnp.where(a > 0, b, 0.0), [{0, 1}]),
        (lambda a, b: jax.checkpoint(lambda x: (jnp.sin(x), 1.0))(b), [{1}, set()]),
        (lambda a, b: lax.fori_loop(0, 3, lambda _, x: x + a, b), [{0, 1}]),
        (lambda a, b: lax.scan(lambda c, _: (c + a, c), b, None, length=2)[1][0], [{0, 1}]),
        (lambda a, b: seen(a, b), [{0}]),
    ],
    ids=["cond", "cond of two", "where", "remat", "fori_loop", "scan", "custom_vjp"],
)
def test_calls_conditionals_and_loops(program, wanted):
    assert reached(program, 1.0, 2.0) == wanted


FROZEN = {
    "set_to_zero": (optax.set_to_zero(), True),
    "masked set_to_zero": (optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), {"w": True})), True),
    "several batches a step": (
        optax.MultiSteps(optax.multi_transform({"z": optax.set_to_zero()}, {"w": "z"}), 2),
        True,
    ),
    "a rate of zero": (optax.sgd(0.0), False),
    "adam": (optax.adam(0.1), False),
    "clipping": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), False),
    "if finite": (optax.apply_if_finite(optax.sgd(0.1), 3), False),
}


@pytest.mark.parametrize("name", FROZEN)
def test_whether_an_update_depends_on_its_gradient(name):
    optimizer, is_frozen = FROZEN[name]
    params = {"w": jnp.ones(3)}

    def update(gradient, state):
        return optimizer.update({"w": gradient}, state, params)[0]["w"]

    (inputs,) = reached(update, params["w"], optimizer.init(params))
    assert (0 not in inputs) == is_frozen


@pytest.mark.parametrize(
    ("program", "places"),
    [
        (lambda z: 1.0, 0),
        (lambda z: z + 1.0, 0),
        (lambda z: seen(1.0, z), 1),
        (lambda z: seen(seen(1.0, z), z), 2),
        (lambda z: seen(1.0, jnp.sum(z[None])), 1),
        (lambda z: jax.jit(lambda y: seen(y, z))(1.0) + seen(1.0, z), 2),
        (lambda z: lax.scan(lambda c, _: (seen(c, z), None), 1.0, None, length=5)[0], 1),
        (lambda z: lax.while_loop(lambda c: c < 3, lambda c: seen(c + 1, z), 1.0), 1),
        (lambda z: jax.checkpoint(lambda y: seen(y, z))(1.0), 1),
        (lambda z: lax.cond(z > 0, lambda y: seen(seen(y, z), z), lambda y: seen(y, z), 1.0), 2),
        (lambda z: jax.vmap(lambda y: seen(y, z))(jnp.ones(4)).sum(), 1),
    ],
    ids=["unused", "no custom_vjp", "once", "twice", "sliced", "in jit", "scan", "while", "remat", "cond", "vmap"],
)
def test_places_of_a_use(program, places):
    assert count_uses(jax.make_jaxpr(program)(0.0), [0])[0] == places
