"""What is installed: the files of the wheel, its dependencies, its licence, and what `import dsb_jax` loads."""

import ctypes
import email.message
import email.parser
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS_NEED = {"absl-py", "flax", "jax", "jaxtyping", "numpy", "optax", "orbax-checkpoint"}
EXTRAS = {"train", "data", "cuda", "triton", "export", "foreign", "peers", "dev"}
# What only the extras bring, by the name of the module; scipy, which jax brings, takes half a second to import.
OF_EXTRAS = {
    "PIL", "array_record", "importlib_resources", "matplotlib", "safetensors", "sklearn",
    "tensorflow_datasets", "triton",
}  # fmt: skip
COMPILER = shutil.which("g++") or shutil.which("clang++")
NATIVE = sys.platform == "linux" and platform.machine() == "x86_64"
NOT_LOADED = OF_EXTRAS | {"dsb_jax.training", "experiments", "scipy", "tensorflow"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def built_wheel(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """The wheel of the files that git would ship, built in a copy, because setuptools leaves a build/ beside them.

    And what the build said.
    """
    source, out = folder / "source", folder / "wheel"
    paths = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "CITATION.cff"]
    kinds = (".py", ".typed", ".json", ".cc", ".h", ".map")
    for folder in ("dsb_jax", "pallas_kernels", "experiments", "tests"):
        files = (ROOT / folder).rglob("*")
        paths += [str(file.relative_to(ROOT)) for file in files if file.suffix in kinds]
    for path in paths:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    # A table as `experiments.tune` writes one, whether or not the checkout has some.
    (source / "dsb_jax/ops/tables").mkdir(exist_ok=True)
    (source / "dsb_jax/ops/tables/some_device.json").write_text("{}")
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=source, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file), result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """As on this machine, but for the optimizer, which takes long."""
    folder = tmp_path_factory.mktemp("whole")
    if not COMPILER:
        return built_wheel(folder)[0]
    fast = folder / "fast"
    fast.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    fast.chmod(0o755)
    return built_wheel(folder, CXX=str(fast))[0]


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"dsb_jax", "pallas_kernels"}
    modules = {str(path.relative_to(ROOT)) for p in ("dsb_jax", "pallas_kernels") for path in (ROOT / p).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"dsb_jax/py.typed", "pallas_kernels/py.typed", "dsb_jax/ops/tables/some_device.json"} <= set(names)


@pytest.mark.skipif(not (NATIVE and COMPILER), reason="needs a C++ compiler on x86-64 Linux")
def test_the_wheel_holds_the_native_library_for_every_python(wheel, tmp_path):
    assert wheel.filename.endswith("-cp312-abi3-linux_x86_64.whl")
    native = {name for name in wheel.namelist() if name.startswith("dsb_jax/ops/native/") and not name.endswith(".py")}
    assert native == {"dsb_jax/ops/native/library.abi3.so"}
    library = ctypes.CDLL(wheel.extract("dsb_jax/ops/native/library.abi3.so", tmp_path))
    assert library.dsb_jax_native_vector() in (0, 8, 16)
    assert library.dsb_jax_native_forward


@pytest.mark.skipif(not NATIVE, reason="nothing is compiled on this machine")
@pytest.mark.parametrize(
    ("environment", "reason"), [({"PATH": "/nowhere"}, "no C++ compiler"), ({"CXX": "false"}, "false failed")]
)
def test_the_wheel_builds_without_a_compiler_that_works(tmp_path, monkeypatch, environment, reason):
    monkeypatch.delenv("CXX", raising=False)
    wheel, said = built_wheel(tmp_path, **environment)
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in wheel.namelist())
    (warning,) = (line for line in said.splitlines() if "native CPU kernels" in line)
    assert reason in warning
    assert "install a C++17 compiler" in warning


def test_the_wheel_carries_its_licence(wheel, metadata):
    (licence,) = (name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the dsb_jax authors"


def test_the_base_install_is_what_the_layers_need(metadata):
    requirements = [
        re.match(r"[\w.-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line
    ]
    assert sorted(requirements) == sorted(LAYERS_NEED)
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS


def test_every_requirement_has_a_lower_bound(metadata):
    unbounded = [line for line in metadata.get_all("Requires-Dist") if ">=" not in line]
    # Other people's models are of one version, and nobody needs them but our tests.
    ours = [line for line in unbounded if not line.startswith("dsb-jax[")]
    assert [line for line in ours if not line.endswith('extra == "foreign"')] == []


def test_dev_brings_all_that_the_tests_use(project):
    assert "dsb-jax[train,data,export]" in project["optional-dependencies"]["dev"]


def test_the_citation_is_of_this_version(project):
    citation = (ROOT / "CITATION.cff").read_text()
    top = dict(re.findall(r'^([a-z-]+): *"?(.*?)"?$', citation, re.MULTILINE))
    assert {"cff-version", "message", "title", "authors"} <= top.keys()  # what the format requires
    assert (top["cff-version"], top["version"], top["license"]) == ("1.2.0", project["version"], project["license"])
    paper = citation.split("preferred-citation:")[1]
    assert re.findall(r"family-names: (\w+)", paper) == ["Jiang", "Hu", "Song"]
    assert re.search(r"^  year: 2022$", paper, re.MULTILINE)


def test_importing_and_using_the_layers_loads_nothing_of_the_extras():
    program = """
import json, sys
import jax, numpy as np
import dsb_jax

x = np.ones((2, 16), np.float32)
layer = dsb_jax.linen.SparseDense(16, density=0.5, block_shape=(4, 4))
variables = jax.eval_shape(layer.init, jax.random.key(0), x)
jax.eval_shape(jax.grad(lambda v: layer.apply(v, x).sum(), allow_int=True), variables)
layers = list(sys.modules)
import dsb_jax.checkpoint
print(json.dumps([layers, list(sys.modules)]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    after_layers, after_checkpoint = json.loads(result.stdout)
    assert "dsb_jax.linen.layers" in after_layers
    assert NOT_LOADED.intersection(after_layers) == set()
    assert OF_EXTRAS.intersection(after_checkpoint) == set()
