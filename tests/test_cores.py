"""How many cores a measurement uses."""

import json
import os
import subprocess
import sys

import pytest

from dsb_jax.ops.cpu_model import available_cores
from experiments import cores
from tests.test_programs import ROOT

pins = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot keep a process on some cores")

SCRIPT = """
import json, os, jax
from dsb_jax.ops.cpu_model import available_cores
from experiments import cores
jax.config.update("jax_compilation_cache_dir", "compiled")
before = os.listdir("/proc/self/task")
used = cores.use(1)
jax.numpy.ones((8, 8)).block_until_ready()
threads = [int(task) for task in os.listdir("/proc/self/task") if task not in before]
print(json.dumps([used, available_cores(), jax.config.jax_compilation_cache_dir,
                  [len(os.sched_getaffinity(thread)) for thread in threads]]))
"""


@pins
def test_one_core_holds_for_the_threads_of_xla_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    used, available, folder, of_threads = json.loads(result.stdout)
    assert (used, available) == (1, 1)
    assert folder == "compiled-1-cores"  # what XLA compiles depends on the cores, the key of its cache does not
    assert set(of_threads) == {1}


ALL = """
import os
from dsb_jax.ops.cpu_model import available_cores
from experiments import cores
used = cores.use(None)
tasks = [f"/proc/self/task/{task}" for task in os.listdir("/proc/self/task")]
pool = [int(task.split("/")[-1]) for task in tasks if "Eigen" in open(f"{task}/comm").read()]
print(used, available_cores(), len(pool), len({core for thread in pool for core in os.sched_getaffinity(thread)}))
"""


@pins
def test_all_cores_by_default_a_thread_on_each():
    """In a process of its own: threads stay where they are put."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", ALL], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    used, available, threads, on_cores = map(int, result.stdout.split())
    assert used == available == available_cores()
    assert threads >= on_cores == available


@pins
@pytest.mark.parametrize("many", [0, 10**6])
def test_cores_that_are_not_there_are_refused(many):
    before = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match=f"cores={many}, but .* give 1 to {len(before)}"):
        cores.use(many)
    assert os.sched_getaffinity(0) == before


def test_a_system_that_cannot_is_told_apart(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(NotImplementedError, match="cores=1"):
        cores.use(1)


def test_a_thread_that_has_ended_since_it_was_listed_has_no_name(tmp_path):
    (tmp_path / "comm").write_text("tf_XLAEigen\n")
    assert cores._name_of(tmp_path) == "tf_XLAEigen\n"
    assert cores._name_of(tmp_path / "gone") == ""
