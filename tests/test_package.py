"""The names of the package: what `import *` brings, and that modules are modules."""

import importlib
import pkgutil
import subprocess
import sys
import types

import flax.linen
import jax

import dsb_jax


def test_a_star_import_leaves_other_names_alone():
    """The usual names of flax, of other libraries and of Python stay what they were (finding 18)."""
    names = {"nn": flax.linen, "linen": flax.linen, "nnx": "flax", "jax": jax, "methods": 1, "set": set, "ops": 2}
    space = dict(names)
    exec("from dsb_jax import *", space)
    assert {name: space[name] for name in names} == names
    assert space["adaptation"] is dsb_jax.adaptation
    assert not any(isinstance(space[name], types.ModuleType) for name in dsb_jax.__all__)
    space = dict(names)
    for package in ("linen", "nnx", "methods", "ops"):
        exec(f"from dsb_jax.{package} import *", space)
    assert {name: space[name] for name in names} == names


def test_modules_are_modules():
    import dsb_jax.reblocking as m

    assert isinstance(m, types.ModuleType)
    assert m.reblock is dsb_jax.reblock
    exported = {name for name in vars(dsb_jax) if not isinstance(getattr(dsb_jax, name), types.ModuleType)}
    assert set(dsb_jax.__all__) <= exported
    for package in (dsb_jax, dsb_jax.linen, dsb_jax.nnx, dsb_jax.methods, dsb_jax.ops):
        for module in pkgutil.iter_modules(package.__path__):
            # No function or class hides a module of its package.
            found = getattr(package, module.name, None)
            assert found is None or isinstance(found, types.ModuleType), (package.__name__, module.name)
            assert module.name not in exported


def test_every_name_is_there():
    for name in dsb_jax.__all__:
        assert getattr(dsb_jax, name).__doc__, name
    assert sorted(dsb_jax.__all__) == list(dsb_jax.__all__)
    assert importlib.import_module("dsb_jax").linen.SparseDense is not None
    for face in (dsb_jax.linen, dsb_jax.nnx):
        assert sorted(face.__all__) == list(face.__all__)
        assert all(getattr(face, name).__doc__ for name in face.__all__)
    assert {"plan", "sparsify", "find_layers"} <= set(dsb_jax.linen.__all__) & set(
        dsb_jax.nnx.__all__
    )  # the same words


def test_the_core_loads_neither_linen_nor_what_a_training_needs():
    heavy = [
        "flax.nnx",
        "tensorflow_datasets",
        "matplotlib",
        "sklearn",
        "PIL",
        "orbax",
        "dsb_jax.linen",
        "dsb_jax.nnx",
        "dsb_jax.training",
    ]
    program = f"import sys, dsb_jax; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
