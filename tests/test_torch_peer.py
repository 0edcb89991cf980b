"""The models in PyTorch are ours, layer for layer: without PyTorch by their description, with it by their training.

The latter with `PEER_PYTHON=/path/to/python pytest tests/test_torch_peer.py`, of a Python that has PyTorch.
"""

import ast
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsb_jax.train import train_step
from dsb_jax.training import models
from dsb_jax.training.build import build
from dsb_jax.training.config import DTYPES, Config
from dsb_jax.training.loop import create
from experiments import torch_process
from experiments.torch_models import MAX_POOL, MEAN, RELU, Conv, Linear, Norm, Sum, describe, layers_of, shapes
from tests.test_programs import ROOT

SIZES = {"convnet": 8, "narrow_convnet": 8, "resnet18": 16, "vgg16": 32, "wrn-10-1": 16, "wrn-22-2": 16}
NUM_CLASSES = 7

needs_torch = pytest.mark.skipif("PEER_PYTHON" not in os.environ, reason="PEER_PYTHON names no Python with PyTorch")


def config(model, **values):
    size = SIZES[model]
    return Config(
        dataset="random", model=model, method="dense", input_shape=(size, size, 3), num_classes=NUM_CLASSES,
        batch_size=4, **values,
    )  # fmt: skip


def in_torch_order(array):
    """Kernels [..., inputs, outputs] -> [outputs, inputs, ...]."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array


def by_path(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("model", SIZES)
def test_parameters_are_ours(model):
    ours = build(config(model))
    abstract = jax.eval_shape(ours.model.init, jax.random.key(0), config(model).abstract_inputs())["params"]
    want = {path: in_torch_order(np.broadcast_to(0, leaf.shape)).shape for path, leaf in by_path(abstract).items()}
    assert shapes(describe(model, NUM_CLASSES)) == want


@pytest.mark.parametrize("model", SIZES)
def test_convolutions_are_called_like_ours(model):
    """Strides, padding and bias, and the input that each layer meets."""
    ours, size = build(config(model)).model, SIZES[model]
    seen = {}

    def watch(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Conv):
            seen["/".join(module.path)] = module.strides, module.padding, module.use_bias, args[0].shape[1:]
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(ours.init, jax.random.key(0), config(model).abstract_inputs())
    found = {}
    heights = walk_heights(describe(model, NUM_CLASSES), size)
    for layer in layers_of(describe(model, NUM_CLASSES)):
        if isinstance(layer, Conv):
            around, height = (layer.size // 2, layer.size // 2), heights[layer.name]
            shape = (height, height, layer.inputs)
            found[layer.name] = (layer.stride, layer.stride), (around, around), False, shape
    assert found == seen


def walk_heights(chain, height):
    """Name of each convolution -> the height of its input; "out" -> that of the output."""
    found = {}
    for layer in chain:
        if isinstance(layer, Sum):
            main, skip = walk_heights(layer.main, height), walk_heights(layer.skip, height)
            assert main["out"] == skip["out"]
            found |= main | skip
            height = main["out"]
        elif isinstance(layer, Conv):
            found[layer.name] = height
            height = -(-height // layer.stride)
        elif layer == MAX_POOL:
            height //= 2
    return found | {"out": height}


def interpret(chain, params, x):
    """The description as it is meant, in jax: training mode."""
    for layer in chain:
        if isinstance(layer, Conv):
            kernel, around = params[f"{layer.name}/kernel"], (layer.size // 2, layer.size // 2)
            order = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
            x = jax.lax.conv_general_dilated(
                x, kernel, (layer.stride, layer.stride), (around, around), dimension_numbers=order
            )
        elif isinstance(layer, Norm):
            mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
            scale, bias = (params[f"{layer.name}/{name}"].reshape(1, 1, 1, -1) for name in ("scale", "bias"))
            x = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
        elif isinstance(layer, Linear):
            x = x @ params[f"{layer.name}/kernel"] + params[f"{layer.name}/bias"].reshape(1, -1)
        elif isinstance(layer, Sum):
            x = interpret(layer.main, params, x) + interpret(layer.skip, params, x)
        else:
            x = {
                RELU: jax.nn.relu,
                MAX_POOL: lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)),
                MEAN: lambda x: x.mean((1, 2)),
            }[layer](x)
    return x


@pytest.mark.parametrize("model", ["convnet", "resnet18", "vgg16", "wrn-10-1"])
def test_logits_are_ours(model):
    values = config(model)
    ours = build(values).model
    shape = values.abstract_inputs().shape
    abstract = jax.eval_shape(ours.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    rng = np.random.default_rng(0)

    def draw(leaf):  # scales and biases away from 1 and 0, so that they count
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (leaf.ndim == 1), jnp.float32)

    params = jax.tree.map(draw, abstract["params"])
    statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract["batch_stats"])
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def apply(params, x):
        variables = {"params": params, "batch_stats": statistics}
        return ours.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    want = jax.jit(apply)(params, x)
    got = jax.jit(lambda params, x: interpret(describe(model, NUM_CLASSES), params, x))(by_path(params), x)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_all_image_models_are_described():
    named = {name for name in models.MODELS if "-" not in name}
    assert named <= set(SIZES)
    with pytest.raises(ValueError, match=r"model='transformer-2-128' is not written for PyTorch; choose one of conv"):
        describe("transformer-2-128", NUM_CLASSES)


# What runs in the Python that has PyTorch, and what each may import beside the standard library.
ALONE = {"__init__": {"experiments"}, "pages": set(), "torch_models": set(), "torch_peer": {"torch", "experiments"}}


@pytest.mark.parametrize(("name", "more"), ALONE.items())
def test_a_python_without_jax_can_run_it(name, more):
    """One of 3.10, with nothing but what is named here."""
    tree = ast.parse((ROOT / "experiments" / f"{name}.py").read_text(), feature_version=(3, 10))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names) | more
    assert {name for name in imported if name.startswith("experiments")} <= {f"experiments.{name}" for name in ALONE}


SCRIPT = """
import json, sys
import numpy as np, torch
from experiments import torch_peer
from experiments.torch_models import describe, shapes
file, model, num_classes, settings = sys.argv[1:]
arrays, chain = np.load(file), describe(model, int(num_classes))
module = torch_peer.build(chain)
for name, parameter in zip(shapes(chain), module.parameters(), strict=True):
    assert parameter.shape == arrays[name].shape, name
    parameter.data.copy_(torch.from_numpy(arrays[name]))
images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
step = torch_peer.stepper(module, images, labels, **json.loads(settings))
print(json.dumps([float(step()) for _ in range(3)]))
"""


@needs_torch
@pytest.mark.parametrize("model", ["convnet", "resnet18", "vgg16", "wrn-10-1"])
def test_training_in_pytorch_is_ours(model, tmp_path):
    """The losses of three steps: forward, backward, weight decay and momentum, each of which changes them by 1e-3."""
    values = config(model, weight_decay=100.0, learning_rate=3e-4, learning_rate_schedule="constant")
    components, state = create(values)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(values.batch_size, *values.input_shape)).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, values.batch_size)
    arrays = {path: in_torch_order(np.asarray(leaf)) for path, leaf in by_path(state.params).items()}
    np.savez(tmp_path / "given.npz", images=np.moveaxis(images, -1, 1), labels=labels, **arrays)
    settings = {name: getattr(values, name) for name in ("dtype", "learning_rate", "momentum", "weight_decay")}
    result = subprocess.run(
        [os.environ["PEER_PYTHON"], "-c", SCRIPT, tmp_path / "given.npz", model, str(NUM_CLASSES),
         json.dumps(settings)], cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = []
    for _ in range(3):
        state, metrics = train_step(
            state, images, labels, model=components.model, optimizer=components.optimizer, loss=components.loss
        )
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(json.loads(result.stdout), losses, rtol=3e-4)


@needs_torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_times_its_steps(dtype):
    with torch_process.running(os.environ["PEER_PYTHON"], config("convnet", dtype=dtype), cores=1) as torch:
        assert torch.version.startswith("2.")
        assert torch.step() > 0
        assert torch.step() > 0
