"""Which implementation is chosen, and that it says why."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dsb_jax.layout import random_layout
from dsb_jax.nn import SparseConv, SparseDense
from dsb_jax.ops import IMPLEMENTATIONS, Choice, choose, record_choices
from dsb_jax.ops.dispatch import predicted_time_ratio, record
from pallas_kernels import ConvGeometry, matmul_geometry


def layout_of(density, shape=(256, 2304), block_shape=(32, 8)):
    num_blocks = round(density * shape[0] * shape[1] / (block_shape[0] * block_shape[1]))
    return jax.eval_shape(
        lambda key: random_layout(key, shape, block_shape=block_shape, num_blocks=num_blocks), jax.random.key(0)
    )


SIZES = {"geometry": ConvGeometry(256, (3, 3), (1, 1), ((1, 1), (1, 1))), "input_size": (8, 8), "batch": 64}


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "auto"])
@pytest.mark.parametrize("backend", ["cpu", "gpu", None])
def test_explicit_names_pass_through(implementation, backend):
    for density in (0.01, 0.99):
        assert choose(implementation, layout_of(density), backend=backend, **SIZES) == Choice(
            implementation, "asked for"
        )


def test_auto_follows_the_predicted_break_even():
    ratios = [predicted_time_ratio(layout_of(d), *SIZES.values()) for d in (0.05, 0.1, 0.3, 0.6, 0.95)]
    assert ratios == sorted(ratios)
    assert choose("auto", layout_of(0.05), backend="cpu", **SIZES) == Choice(
        "xla", f"predicted {ratios[0]:.2f} of the dense time"
    )
    assert choose("auto", layout_of(0.95), backend="cpu", **SIZES) == Choice(
        "dense", f"predicted {ratios[-1]:.2f} of the dense time"
    )
    # Arithmetic intensity depends on R alone: taller blocks are faster at equal density.
    assert predicted_time_ratio(layout_of(0.1, block_shape=(64, 4)), *SIZES.values()) < ratios[1]


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_auto_says_why_it_is_dense_elsewhere(backend):
    assert choose("auto", layout_of(0.05), backend=backend, **SIZES) == Choice(
        "dense", f"no sparse kernel for {backend}"
    )


def test_auto_asks_for_the_backend_in_use(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sizes = {"geometry": matmul_geometry(2304), "input_size": (1, 1), "batch": 4}
    assert choose("auto", layout_of(0.05), **sizes).reason == "no sparse kernel for gpu"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="implementation='triton' is unknown; choose one of auto, xla, dense, "):
        choose("triton", layout_of(0.1), **SIZES)


class Model(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        x = SparseConv(16, (3, 3), name="stem")(x)
        x = SparseConv(32, (3, 3), density=0.2, implementation=self.implementation, name="conv")(x)
        return SparseDense(16, density=0.5, implementation="reference", name="head")(x)


@pytest.mark.parametrize("implementation", ["xla", "auto"])
def test_choices_are_recorded_by_path_while_tracing(implementation):
    def trace():
        jax.eval_shape(Model(implementation).init, jax.random.key(0), jnp.zeros((2, 4, 4, 3)))

    record(("outside",), Choice("xla", "nobody listens"))
    with record_choices() as choices:
        trace()
        with record_choices() as inner:
            pass
    trace()
    assert inner == {}
    assert set(choices) == {("stem",), ("conv",), ("head",)}
    assert choices["stem",] == Choice("dense", "a dense layer")
    assert choices["head",] == Choice("reference", "asked for")
    if implementation == "xla":
        assert choices["conv",] == Choice("xla", "asked for")
    else:
        assert choices["conv",].implementation in ("xla", "dense")
        assert choices["conv",].reason.startswith(("predicted ", "no sparse kernel for "))
