"""What a plan of somebody's model refuses, with the cure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dsb_jax as dsb


class ReadsItsKernel(nn.Module):
    def setup(self):
        self.tied, self.free = nn.Dense(16, use_bias=False), nn.Dense(16)

    def __call__(self, x):
        return self.free(self.tied(x)) @ self.tied.variables["params"]["kernel"].T


def test_a_kernel_that_the_model_reads_is_kept_dense_by_a_rule():
    x, options = jnp.ones((2, 16)), {"sparsity": 0.5, "block_shape": (4, 4)}
    with pytest.raises(ValueError, match=r"ReadsItsKernel reads the kernel of a layer .*Rule\('path/of/the/layer'"):
        dsb.linen.plan(ReadsItsKernel(), x, **options)
    plan = dsb.linen.plan(ReadsItsKernel(), x, rules=[dsb.Rule("tied", dense=True)], **options)
    assert plan["tied",] == "kept dense by 'tied'"
    model = dsb.linen.sparsify(ReadsItsKernel(), plan, implementation="dense")
    variables = model.init(jax.random.key(0), x)
    dense = ReadsItsKernel().apply({"params": dsb.to_dense(variables["params"], variables["topology"])}, x)
    np.testing.assert_allclose(model.apply(variables, x), dense, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_shape": 16}, "block_shape=16 is no pair of sizes above 0"),
        ({"block_shape": "16x16"}, "block_shape='16x16' is no pair"),
        ({"block_shape": (0, 4)}, r"block_shape=\(0, 4\) is no pair"),
        ({"sparsity": "a"}, "sparsity='a' is not a fraction"),
        ({"sparsity": 90}, "sparsity=90 is not a fraction"),
        ({"min_blocks": -1}, "min_blocks=-1 is no number of blocks"),
    ],
)
def test_wrong_values_of_a_plan(options, message):
    with pytest.raises(ValueError, match=message):
        dsb.linen.plan(nn.Dense(8), jnp.ones((1, 8)), **options)
