"""Variables of sparse models: dense ones made sparse, wrong ones refused, boxes, dtypes, many models at once."""

import math
import re

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import dsb_jax as dsb
from tests.linen_models import KEY, MODEL, PLAN, WithSetup, X, assert_close, plan_of, sparse


def test_a_trained_dense_model_becomes_sparse():
    dense = WithSetup().init(KEY, X)["params"]
    params, topology = dsb.from_dense(dense, PLAN)
    y = MODEL.apply({"params": params, "topology": topology}, X)
    kept = dsb.to_dense(params, topology)
    assert_close(y, WithSetup().apply({"params": kept}, X))
    assert all(((a == b) | (a == 0)).all() for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(dense), strict=True))


def test_what_does_not_belong_to_the_model_is_refused():
    variables, dense = MODEL.init(KEY, X), WithSetup().init(KEY, X)
    errors = {
        "encoder has sparse weights but no topology; pass all collections": lambda: MODEL.apply(
            {"params": variables["params"]}, X
        ),
        "encoder is sparse in this model, but its parameters hold a dense kernel; make them sparse by": lambda: (
            MODEL.apply(dense, X)
        ),
        "encoder is sparse in this model, but its parameters hold": lambda: MODEL.apply(dense, X, mutable=True),
        "encoder has a kernel of (12, 16), but its plan was made for (16, 16)": lambda: MODEL.init(KEY, X[:, :12]),
        "encoder holds a matrix of 16 outputs x 16 inputs, but its features and its input make it 16 x 12": lambda: (
            MODEL.apply(variables, X[:, :12])
        ),
        "WithSetup makes the collection `topology` here, where it may not change": lambda: MODEL.init(
            KEY, X, mutable=["params"]
        ),
        "plan='plan' is no SparsityPlan": lambda: sparse(WithSetup(), plan="plan"),
        "method='dsb' is no method": lambda: sparse(WithSetup(), plan=PLAN, method="dsb"),
        "implementation='fast' is unknown": lambda: sparse(WithSetup(), plan=PLAN, implementation="fast"),
    }  # fmt: skip
    for message, wrong in errors.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            wrong()
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        WithSetup().apply(variables, X)


def test_many_models_at_once_and_frozen_dictionaries():
    keys = jax.random.split(KEY, 3)
    variables = jax.jit(jax.vmap(MODEL.init, in_axes=(0, None)))(keys, X)
    y = jax.vmap(MODEL.apply, in_axes=(0, None))(flax.core.freeze(variables), X)
    one = jax.tree.map(lambda leaf: leaf[1], variables)
    assert_close(one, MODEL.init(keys[1], X))
    assert_close(y[1], MODEL.apply(flax.core.freeze(one), X))


@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("float16", "float32"), ("bfloat16", "bfloat16"), (None, "float16")]
)
def test_dtypes(dtype, param_dtype):
    model = nn.Dense(16, dtype=dtype, param_dtype=param_dtype)
    plan = plan_of(model, X)
    made = sparse(model, plan=plan)
    variables = made.init(KEY, X)
    dense = dsb.to_dense(variables["params"], variables["topology"])
    y, wanted = made.apply(variables, X), model.apply({"params": dense}, X)
    assert y.dtype == wanted.dtype == jnp.dtype(dtype or "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
    assert_close(y, wanted, 0.05)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    assert f"bytes: {stored:,} and " in str(plan)


def test_64_bits():
    with jax.enable_x64(True):
        model, x = nn.Dense(16, param_dtype="float64"), X.astype(np.float64)
        made = sparse(model, x, implementation="auto")
        variables = made.init(KEY, x)
        dense = dsb.to_dense(variables["params"], variables["topology"])
        y = made.apply(variables, x)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, model.apply({"params": dense}, x), rtol=1e-12)


class Boxed(nn.Module):
    """Its kernels lie in boxes, in which `nn.scan` names the axis that it adds; None for no scan."""

    axis: int | None = None
    box: object = staticmethod(nn.with_partitioning)

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            init = module.box(nn.initializers.lecun_normal(), ("in", "out"))
            bias = module.box(nn.initializers.ones, ("out",))
            return nn.tanh(nn.Dense(16, kernel_init=init, bias_init=bias, name="dense")(x)), None

        if self.axis is None:
            return body(self, x, None)[0]
        return nn.scan(
            body, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self, x, None)[0]  # fmt: skip


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning], ids=["mesh", "logical"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_boxes_are_kept(axis, box):
    """Names of lifted axes stay; those of inputs and outputs belong to no axis of blocks."""
    model = Boxed(axis, box)
    plan = plan_of(model, X)
    variables = jax.eval_shape(sparse(model, plan=plan).init, KEY, X)
    names, spec = [None] * 3, nn.get_partition_spec(variables)
    if axis is not None:
        names.insert(axis, "layers")
    blocks = variables["params"]["dense"]["blocks"]
    assert type(blocks) is {"with_partitioning": nn.Partitioned}.get(box.__name__, nn.LogicallyPartitioned)
    assert (blocks.names, spec["params"]["dense"]["blocks"]) == (tuple(names), jax.sharding.PartitionSpec(*names))
    assert "out" in spec["params"]["dense"]["bias"]
    assert len(blocks.value.shape) == len(names)
    plan.check(variables["params"])


def test_boxed_models_compute():
    model = Boxed(1)
    made = sparse(model, X)
    boxed = jax.jit(made.init)(KEY, X)
    plain = nn.unbox(boxed)
    dense = dsb.to_dense(plain["params"], plain["topology"])
    for variables in (boxed, plain):
        assert_close(made.apply(variables, X), model.apply({"params": dense}, X))
    blocks = jax.grad(lambda params: made.apply({**boxed, "params": params}, X).sum())(boxed["params"])["dense"][
        "blocks"
    ]
    assert (blocks.names, math.prod(blocks.value.shape)) == ((None, "layers", None, None), 3 * 128)
