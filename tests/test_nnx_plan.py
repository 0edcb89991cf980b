"""`dsb.nnx.plan`: every kind of layer of NNX, and why what stays dense does."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dsb_jax as dsb
from tests.nnx_models import MLP, WIDTH, Attention

SIZES = {"sparsity": 0.75, "block_shape": (8, 4), "min_blocks": 1}
X = jnp.zeros((4, WIDTH))


def linear(rngs, features=WIDTH, **options):
    return nnx.Linear(WIDTH, features, rngs=rngs, **options)


def own_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


class Doubled(nnx.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Everything(nnx.Module):
    """One layer of every kind."""

    def __init__(self, rngs):
        self.linear = linear(rngs)
        self.listed = nnx.List([linear(rngs), linear(rngs)])
        self.named = nnx.Dict(a=linear(rngs))
        self.sequential = nnx.Sequential(linear(rngs, 64), nnx.relu, nnx.Linear(64, WIDTH, rngs=rngs))
        self.conv = nnx.Conv(WIDTH, WIDTH, (3, 3), strides=2, rngs=rngs)
        self.into_heads = nnx.LinearGeneral(WIDTH, (4, 8), rngs=rngs)
        self.out_of_heads = nnx.LinearGeneral((4, 8), WIDTH, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("...d,dhk->...hk", (WIDTH, 4, 8), (4, 8), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.shared = linear(rngs)
        self.shared_too = self.shared
        self.base = nnx.LoRA(WIDTH, 2, WIDTH, base_module=linear(rngs), rngs=rngs)
        # What stays dense.
        self.read = linear(rngs)
        self.never = linear(rngs)
        self.tied, self.tied_too = linear(rngs), linear(rngs)
        self.tied_too.kernel = self.tied.kernel
        self.cell = nnx.SimpleCell(WIDTH, WIDTH, rngs=rngs)
        self.normed = nnx.WeightNorm(linear(rngs), rngs=rngs)
        self.spectral = nnx.SpectralNorm(linear(rngs), rngs=rngs)
        self.embed = nnx.Embed(20, WIDTH, rngs=rngs)
        self.lora = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)
        self.own = nnx.Param(jnp.ones((WIDTH, WIDTH)))
        self.transposed = nnx.ConvTranspose(WIDTH, 8, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(WIDTH, WIDTH, (3, 3), feature_group_count=4, rngs=rngs)
        self.conv_1d = nnx.Conv(WIDTH, WIDTH, 3, rngs=rngs)
        self.own_product = linear(rngs, dot_general=own_product)
        self.wider = linear(rngs, preferred_element_type=jnp.float32)
        self.batched = nnx.LinearGeneral(WIDTH, 8, batch_axis={0: 4}, rngs=rngs)
        self.by_head = nnx.Einsum("bhk,hkj->bhj", (4, 8, 8), None, rngs=rngs)
        self.doubled = Doubled(WIDTH, WIDTH, rngs=rngs)
        self.already = dsb.nnx.SparseLinear(WIDTH, WIDTH, density=0.5, block_shape=(8, 4), rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x, *, only_some=False):
        image = x[:, None, None, :]
        x = self.sequential(self.named["a"](self.listed[1](self.listed[0](self.linear(x)))))
        self.conv(image), self.transposed(image), self.grouped(image), self.conv_1d(x[:, None])
        heads = self.into_heads(x)
        x = self.out_of_heads(heads) + self.einsum(x).reshape(x.shape) + self.attention(x[None])[0]
        x = self.base(self.shared_too(self.shared(x)))
        x = x @ self.read.kernel[...] + self.tied_too(self.tied(x))
        x = self.cell(jnp.zeros_like(x), x)[1] + self.normed(x) + self.spectral(x, update_stats=True)
        x = x + self.embed(jnp.zeros(4, int)) + self.lora(x) @ self.own[...]
        self.own_product(x), self.wider(x), self.batched(x), self.by_head(heads), self.doubled(x)
        return self.head(self.norm(self.already(x)))


FOREIGN = "which is none of Linear, LinearGeneral, Einsum, Conv"
DENSE = {
    "tied": "shares its kernel with another module",
    "cell/dense_h": "inside of SimpleCell, a recurrent cell",
    "cell/dense_i": "inside of SimpleCell, a recurrent cell",
    "normed/layer_instance": "WeightNorm rewrites its kernel",
    "spectral/layer_instance": "SpectralNorm rewrites its kernel",
    "transposed": f"a parameter of ConvTranspose, {FOREIGN}",
    "grouped": "feature_group_count=4 has no sparse form",
    "conv_1d": "kernel_size=(3,) has no sparse form",
    "own_product": "dot_general=own_product has no sparse form",
    "wider": "preferred_element_type=float32 has no sparse form",
    "batched": "batch_axis={0: 4} has no sparse form",
    "by_head": "einsum_str=bhk,hkj->bhj has no sparse form",
    "head": "smaller than a 8x4 block",
    "read": "the model's own code reads its kernel",
    "never": "never called by this call of the model",
    "already/blocks": "sparse already",
    "doubled": f"a parameter of Doubled, {FOREIGN}",
    "embed": "Embed looks its rows up",
    "own": f"a parameter of Everything, {FOREIGN}",
    "lora": f"a parameter of LoRALinear, {FOREIGN}",
}
SPARSE = {
    "linear", "listed/0", "listed/1", "named/a", "sequential/layers/0", "sequential/layers/2", "conv", "into_heads",
    "out_of_heads", "einsum", "attention/query", "attention/key", "attention/value", "attention/out", "shared",
    "base/base_module",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Everything(nnx.Rngs(0))


@pytest.fixture(scope="module")
def everything(model):
    return dsb.nnx.plan(model, X, **SIZES)


def test_every_kind_of_layer(everything):
    assert {"/".join(path) for path in everything.sparse} == SPARSE
    reasons = {"/".join(path): why for path, why in everything.items() if isinstance(why, str)}
    assert {name: why for name, why in reasons.items() if "lora_" not in name} == DENSE
    sizes = {"/".join(path): spec for path, spec in everything.sizes.items()}
    assert (sizes["out_of_heads"].kernel_shape, sizes["out_of_heads"].shape) == ((4, 8, WIDTH), (WIDTH, WIDTH))
    assert (sizes["conv"].kernel_size, sizes["conv"].shape) == ((3, 3), (WIDTH, 9 * WIDTH))


def test_layers_are_in_the_order_of_the_call(everything):
    names = ["/".join(path) for path in everything]
    assert names.index("linear") < names.index("listed/0") < names.index("named/a") < names.index("sequential/layers/0")
    assert names.index("attention/query") < names.index("shared")


def test_the_plan_counts_the_arrays(model, everything):
    held = sum(leaf.size for leaf in jax.tree.leaves(dsb.nnx.params(model)))
    assert everything.num_dense_params == held
    sparse = dsb.nnx.sparsify(nnx.clone(model), everything, rngs=nnx.Rngs(1))
    saved = held - sum(leaf.size for leaf in jax.tree.leaves(dsb.nnx.params(sparse)))
    assert saved == everything.num_dense_params - everything.num_params
    everything.check(dsb.nnx.params(sparse))
    with pytest.raises(ValueError, match="linear is planned with 256 weights, not none"):
        everything.check(dsb.nnx.params(model))


def test_planning_leaves_the_model_as_it_is(model, everything):
    assert type(model.linear) is nnx.Linear
    assert not hasattr(model.linear, "dsb_keys")
    assert float(model.norm.mean[...].sum()) == 0


def test_abstract_models_plan_alike():
    abstract = nnx.eval_shape(lambda: Attention(nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 5, WIDTH), jnp.float32)
    assert dsb.nnx.plan(abstract, x, **SIZES) == dsb.nnx.plan(Attention(nnx.Rngs(0)), x, **SIZES)


def test_without_arguments_the_model_is_not_called():
    plan = dsb.nnx.plan(MLP(nnx.Rngs(0)), **SIZES)
    assert set(plan.sparse) == {("first",), ("second",)}
    assert plan["third",] == "smaller than a 8x4 block"


def test_another_method_and_arguments_by_name():
    class Two(MLP):
        def encode(self, x, *, deep):
            return self.second(self.first(x)) if deep else self.first(x)

    model = Two(nnx.Rngs(0))
    shallow = dsb.nnx.plan(model, X, kwargs={"deep": False}, call_method="encode", **SIZES)
    assert set(shallow.sparse) == {("first",)}
    assert set(dsb.nnx.plan(model, X, kwargs={"deep": True}, call_method=model.encode, **SIZES).sparse) == {
        ("first",), ("second",)
    }  # fmt: skip


def test_a_mesh_with_explicit_axes():
    class Placed(MLP):
        def __call__(self, x):
            return self.second(self.first(x), out_sharding=jax.sharding.PartitionSpec("data", None))

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None)))
        plan = dsb.nnx.plan(Placed(nnx.Rngs(0)), x, **SIZES)
    assert set(plan.sparse) == {("first",)}
    assert plan["second",] == "called with out_sharding"


def test_rules_make_exceptions():
    rules = [dsb.Rule("first", dense=True), dsb.Rule("sec.*", sparsity=0.5)]
    plan = dsb.nnx.plan(MLP(nnx.Rngs(0)), X, rules=rules, **SIZES)
    assert plan["first",] == "kept dense by 'first'"
    assert plan.sparse["second",].density == 0.5


def test_what_is_no_model_of_nnx():
    from tests.nnx_models import LinenMLP

    with pytest.raises(ValueError, match=r"is no nnx\.Module; give a model of flax\.nnx"):
        dsb.nnx.plan(LinenMLP(), X)
    with pytest.raises(ValueError, match="no layer can be sparse"):
        dsb.nnx.plan(dsb.nnx.sparsify(MLP(nnx.Rngs(0)), dsb.nnx.plan(MLP(nnx.Rngs(0)), X, **SIZES), rngs=nnx.Rngs(1)))
