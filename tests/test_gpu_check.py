"""The check for machines with a GPU, on one without: a rehearsal, parts that fail, hang or are killed, what is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import pytest

from dsb_jax.layout import validate
from experiments import gpu_check, gpu_check_parts, gpu_check_report, gpu_predictions, gpu_smoke
from experiments.gpu_check import Check
from experiments.gpu_check_parts import HANGS, measured_parts, rehearsed_parts, select
from experiments.gpu_check_report import compared, goals
from experiments.gpu_check_run import MOST_FILE_BYTES, ROOT, Folder, Part, read_results, run_part, shortened
from experiments.gpu_smoke import Case, failed, parse_case, read_lines, supervise
from experiments.gpu_smoke_case import numpy_layout
from tests.test_programs import call

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what happens without a GPU")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kept").mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        yield Folder(tmp_path / "kept" / "gpu.json", Path(temporary))


@pytest.fixture
def check(folder):
    check = Check(folder, rehearse=False)
    check.environment = {"device": "NVIDIA H200", "jax": "0"}
    return check


def written_by(check):
    return json.loads(check.folder.json.read_text())


@on_a_cpu
def test_without_a_gpu_one_line_says_so(tmp_path):
    result = call("gpu_check", f"--json={tmp_path / 'gpu.json'}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "no GPU" in line
    assert "cuda" in line
    assert "--rehearse" in line
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_finds_the_wrong_kernel_and_stops_what_hangs(tmp_path):
    """With three of its parts; `--rehearse` alone goes through all of them."""
    file = tmp_path / "results" / "gpu.json"
    result = call("gpu_check", "--rehearse", "--parts=smoke,stopped,tests", f"--json={file}")
    assert result.returncode == 0, result.stdout + result.stderr
    body = json.loads(file.read_text())
    assert "No number in it is a measurement" in body["rehearsal"]
    assert (body["goals"], body["predictions"]) == ("rehearsed", "rehearsed")
    assert {name: part["end"] for name, part in body["parts"].items()} == {
        "smoke": "failed", "stopped": "stopped", "tests": "done",
    }  # fmt: skip
    assert not any("results" in part for part in body["parts"].values())  # nothing that reads like a measurement
    assert body["parts"]["stopped"]["rehearsed"] == [{"line": 1}]
    smoke = body["parts"]["smoke"]["rehearsed"]
    assert set(failed(smoke)) == {gpu_smoke.WRONG, gpu_smoke.DYING}
    assert {line["us"] for line in smoke if "us" in line} == {None}
    tests = body["parts"]["tests"]["rehearsed"]
    assert tests
    assert all("pallas" in line["test"] for line in tests)
    assert {line["outcome"] for line in tests} == {"skipped"}
    assert "REHEARSAL" in result.stdout
    assert re.search(r"\d\.\d\dx │ +rehearsed", result.stdout)
    written = list(file.parent.iterdir())
    assert {path.name for path in written} == {"gpu.json", "gpu.log"}
    for path in written:
        assert path.stat().st_size <= MOST_FILE_BYTES
        for place in (ROOT, tmp_path, sys.prefix, tempfile.gettempdir() + "/gpu_check_"):
            assert f"{place}" not in path.read_text(), path.name
    assert "at it" in (file.parent / "gpu.log").read_text()


def test_what_a_part_had_written_when_it_was_killed_is_kept(check):
    """By the id of its process, which the file of results names while it runs."""

    def kill():
        for _ in range(400):
            running = written_by(check).get("running") if check.folder.json.exists() else None
            if running and check.done[running["part"]].get("results"):
                os.kill(running["pid"], signal.SIGKILL)
                return
            time.sleep(0.05)

    killing = threading.Thread(target=kill)
    killing.start()
    parts = [Part("hangs", ("-c", HANGS), 50), Part("after", ("-c", "open('{file}', 'w').write('[7]')"), 50)]
    check.run_all(parts, 100, say=lambda text: None)
    killing.join()
    hung, after = written_by(check)["parts"].values()
    assert hung["error"] == "ended by signal 9: at it"
    assert hung["results"] == [{"line": 1}]
    assert (after["error"], after["results"]) == (None, [7])
    assert "running" not in written_by(check)
    assert "at it" in check.folder.file("log").read_text()


def test_a_signal_ends_the_running_part_and_the_check(check):
    threading.Timer(1.0, setattr, (check, "interrupted", True)).start()
    check.run_all([Part("hangs", ("-c", HANGS), 50), Part("after", ("-c", "1"), 50)], 100, say=lambda text: None)
    assert check.done["hangs"]["results"] == [{"line": 1}]
    assert "asked to end" in check.done["hangs"]["error"]
    assert check.done["after"]["error"] == "not begun"


def test_a_part_that_fails_or_hangs_is_reported(folder):
    fine = run_part(Part("fine", ("-c", "print(1); open('{file}', 'w').write('[2]')"), 9), 30, folder, os.environ)
    assert (fine["error"], fine["results"], fine["tail"], fine["end"]) == (None, [2], ["1"], "done")
    broken = run_part(Part("broken", ("-c", "import sys; sys.exit('it broke')"), 9), 30, folder, os.environ)
    assert (broken["error"], broken["end"]) == ("exit code 1: it broke", "failed")
    assert "results" not in broken
    with_child = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); {HANGS}"
    )
    hung = run_part(Part("hung", ("-c", with_child), 9), 2, folder, os.environ)
    assert (hung["error"], hung["end"]) == ("stopped after 2 s: at it", "stopped")
    assert hung["seconds"] < 20
    assert re.findall(r"==== (\w+)", folder.file("log").read_text()) == ["fine", "broken", "hung"]


def test_parts_that_follow_a_failure_go_on(check):
    tuned = {"DSB_JAX_TUNED": "{tuned}"}
    see = "import os; print(os.environ.get('DSB_JAX_TUNED'))"
    parts = [
        Part("sees none", ("-c", see), 20),
        Part("needs", ("-c", see), 20, tuned, needs="tuned"),
        Part("tune", ("-c", "open({tuned!r}, 'w').write('x')".replace("{tuned!r}", "'{tuned}'")), 20),
        Part("broken", ("-c", "raise SystemExit('it broke')"), 20),
        Part("sees", ("-c", see + "; open('{file}', 'w').write('[1]')"), 20, tuned, needs="tuned"),
    ]
    check.run_all(parts, 100, say=lambda text: None)
    outcomes = written_by(check)["parts"]
    assert outcomes["sees none"]["tail"] == ["None"]
    assert "gpu.tuned.json" in outcomes["needs"]["error"]
    assert outcomes["broken"]["error"] == "exit code 1: it broke"
    assert outcomes["sees"]["tail"] == ["RESULTS/gpu.tuned.json"]
    assert outcomes["sees"]["results"] == [1]
    expected = {part.name: part.expected for part in parts}
    assert [line.split(":")[0] for line in gpu_check_report.surprises(outcomes, expected, False)] == ["needs", "broken"]


def test_a_wrong_kernel_means_dense_products_at_its_rows(check):
    """Of those kernels alone; a case that was being checked when the smoke was stopped counts as wrong."""
    lines = [
        {"begun": "bfloat16 64x4 8x8x8 forward"}, {"case": "bfloat16 64x4 8x8x8 forward", "ok": True},
        {"case": "float32 32x8 8x8x8 forward", "ok": False}, {"begun": "bfloat16 16x16 8x8x8 forward"},
    ]  # fmt: skip
    check.done["smoke"] = {"seconds": 1.0, "end": "failed", "error": "x", "results": lines}
    told = ("-c", "print('{implementation}')")
    parts = [Part(f"R = {rows}", told, 20, rows=rows) for rows in (64, 16, 32)]
    diagnosis = Part("diagnosis", ("-c", "print('{failed}')"), 20, strict=True)
    check.run_all([diagnosis, *parts], 60, say=lambda text: None)
    assert check.done["diagnosis"]["tail"] == ["float32 32x8 8x8x8 forward,bfloat16 16x16 8x8x8 forward"]
    assert [check.done[part.name]["tail"] for part in parts] == [["auto"], ["dense"], ["auto"]]
    assert check.done["R = 16"]["reason"] == "the smoke part found a kernel wrong at R = 16"
    right = Check(check.folder, rehearse=False)
    right.run_all([diagnosis], 60, say=lambda text: None)
    assert right.done["diagnosis"]["end"] == "skipped"


WORKER = """
import json, os, sys, time
file, one_by_one, *cases = sys.argv[1:]
def write(line):
    with open(file, "a") as out:
        out.write(json.dumps(line) + chr(10))
for case in cases:
    write({"begun": case})
    if "dies" in case:
        os.kill(os.getpid(), 9)
    if "hangs" in case:
        time.sleep(99)
    write({"case": case, "ok": "wrong" not in case})
"""


def test_cases_that_end_or_hang_their_process_are_known_by_name(tmp_path):
    cases = [Case("bfloat16", 16, 16, layer, "forward") for layer in ("a", "dies", "b", "wrong", "hangs", "c")]
    file = tmp_path / "lines"

    def start(left, one_by_one):
        return [sys.executable, "-c", WORKER, str(file), str(one_by_one), *map(str, left)]

    supervise(cases, file, start, patience_s=2)
    lines = read_lines(file)
    assert [line["ok"] for line in lines if "ok" in line] == [True, False, True, False, False, True]
    assert [case.layer for case in failed(lines)] == ["dies", "wrong", "hangs"]
    assert [line["message"] for line in lines if "message" in line] == [
        "its process ended: signal 9", "its process ended: no line in 2 s",
    ]  # fmt: skip
    broken = tmp_path / "broken"
    supervise(cases, broken, lambda left, one_by_one: [sys.executable, "-c", "raise SystemExit(3)"])
    assert read_lines(broken) == [{"note": "nothing was checked: exit code 3"}]


def test_smoke_cases():
    cases = gpu_smoke.measured_cases()
    assert len(set(cases)) == len(cases) == 30
    assert {(case.rows, case.pass_name) for case in cases if case.dtype == "bfloat16"} == {
        (rows, pass_name) for rows in (16, 32, 64, 128) for pass_name in gpu_smoke.PASSES
    }
    assert [parse_case(str(case)) for case in cases] == cases
    with pytest.raises(ValueError, match="'64x4 forward'"):
        parse_case("64x4 forward")
    validate(numpy_layout((64, 40), (16, 4), 13))


def test_tests_that_were_all_skipped_are_no_success(check):
    line = '{"test": "t", "outcome": "%s"}'
    for outcome, end in (("skipped", "failed"), ("passed", "done")):
        part = Part("tests", ("-c", f"open('{{lines}}', 'w').write('{line % outcome}')"), 20)
        check.run_all([part], 20, say=lambda text: None)
        assert check.done["tests"]["end"] == end


def test_the_plugin_writes_a_line_a_test(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('no reason')\n"
        "def test_last(): os._exit(1)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "experiments.gpu_check_pytest"]
    variables = {**os.environ, "GPU_CHECK_LINES": str(tmp_path / "lines"), "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "-c", os.devnull, str(tmp_path)], cwd=tmp_path, env=variables, capture_output=True)
    lines = read_lines(tmp_path / "lines")
    assert [line["outcome"] for line in lines] == ["passed", "failed", "skipped"]
    assert "assert 1 == 2" in lines[1]["message"]
    assert "no reason" in lines[2]["message"]


def test_goals_beside_what_was_measured():
    assert {goal.met for goal in goals({})} == {None}
    tall = [
        {"block_shape": "64x4", "implementation": "pallas", "speedup": {"forward": 3.4, "forward_backward": 1.9}},
        {"block_shape": "64x4", "implementation": "triton", "speedup": {"forward": 2.4, "forward_backward": 2.1}},
        {"block_shape": "64x4", "implementation": "dense_fallback", "speedup": {"forward": 9.0}},
    ]
    wide = [{"block_shape": "32x8", "implementation": "pallas", "note": "not served"}]
    step = {"results": {"results": [{"speedup": 1.2}]}}
    done = {
        "gemm 64x4": {"results": {"results": tall}}, "gemm 32x8": {"results": {"results": wide}},
        "training vgg16 64x4": step, "training resnet18 64x4": {**step, "implementation": "dense"},
        "tests": {"error": "x"},
    }  # fmt: skip
    found = {goal.name: (goal.value, goal.met) for goal in goals(done)}
    assert found["GEMM 4096^3, 0.9, 64x4, forward"] == (3.4, True)
    assert found["GEMM 4096^3, 0.9, 64x4, forward_backward"] == (2.1, True)
    assert found["GEMM 4096^3, 0.9, 32x8, forward"] == (None, None)
    assert found["training step, vgg16, 0.9, 64x4"] == (1.2, False)
    assert found["training step, resnet18, 0.9, 64x4"] == (None, None)  # dense products are no measurement of ours


def test_predictions_beside_what_was_measured():
    entry = {
        "layer": "4096x4096x4096", "block_shape": "64x4", "implementation": "pallas",
        "speedup": {"forward": 2.0, "input_gradient": 1.0, "weight_gradient": 1.5, "forward_backward": 1.4},
        "passes": {"forward": {"s": 8e-5}, "input_gradient": {"s": 1.6e-4}, "weight_gradient": {"s": 1e-4}},
    }  # fmt: skip
    done = {"gemm 64x4": {"results": {"results": [entry]}}}
    found = {each.name: (us, speedup) for each, us, speedup in compared(done, "NVIDIA H100 80GB HBM3")}
    assert found["GEMM 4096^3, 64x4, forward"] == (pytest.approx(80), 2.0)
    assert found["GEMM 4096^3, 64x4, forward_backward"] == (pytest.approx(340), 1.4)
    assert found["GEMM 4096^3, 16x16, forward"] == (None, None)
    by_name = {each.name: each for each in gpu_predictions.predictions("NVIDIA H100 80GB HBM3")}
    assert by_name["training step, resnet18, 64x4"].speedup == 1.41
    assert by_name["GEMM 4096^3, 64x4, forward"].speedup == pytest.approx(2.49, abs=0.01)
    names = {part.name for part in measured_parts()}
    assert {each.part for each in by_name.values()} <= names
    page = (ROOT / "docs" / "gpu.md").read_text()
    for times in gpu_predictions.GEMM_US.values():
        for us in times:
            assert re.search(rf"\b{us}\b", page), f"docs/gpu.md lacks {us} us"
    for by_shape in gpu_predictions.STEP_SPEEDUPS.values():
        assert " / ".join(f"{by_shape[shape]:.2f}" for shape in ("16x16", "32x8", "64x4")) in page


def test_results_of_parts():
    assert read_results('{"a": 1}', lines=False) == {"a": 1}
    assert read_results('{"a": ', lines=False) is None
    assert read_results('{"a": 1}\n{"a": 2}\n{"a"', lines=True) == [{"a": 1}, {"a": 2}]
    assert read_results("", lines=True) == []


def test_long_logs_lose_their_middle_and_paths_become_words(folder):
    assert shortened("short", 100) == "short"
    text = shortened("a" * 500 + "b" * 500, 100)
    assert text.startswith("a" * 50 + "\n... 900 bytes left out ...")
    assert text.endswith("b" * 50)
    prints = f"print('x' * 3_000_000); print({str(ROOT / 'dsb_jax')!r}, {sys.prefix + '/lib'!r})"
    outcome = run_part(Part("long", ("-c", prints), 9), 30, folder, os.environ)
    assert outcome["tail"] == ["dsb_jax PYTHON/lib"]
    assert folder.file("log").stat().st_size < 1 << 20
    assert folder.without_paths(f"{ROOT}: {ROOT}2 {folder.json}") == f".: {ROOT}2 RESULTS/gpu.json"


def test_the_parts_fit_into_nine_minutes():
    measured, rehearsed = measured_parts(), rehearsed_parts()
    assert sum(part.budget_s for part in measured if not part.strict) <= 520
    assert gpu_check.LIMIT_S <= 520
    names = [part.name for part in measured]
    assert len(set(names)) == len(names)
    assert [part.name for part in rehearsed if part.name != "stopped"] == names
    assert {part.expected for part in measured} == {"done"}
    assert names[0] == "smoke"
    assert names[-1] == "peers"  # importing torch takes seconds
    assert all("--peers" not in part.arguments for part in measured[:-1])
    assert gpu_check_parts.tests_with_gpu_marks() == ["tests/test_gpu_kernels.py"]


def test_parts_are_chosen_by_their_names():
    parts = measured_parts()
    assert select(parts, None) == parts
    assert [part.name for part in select(parts, ["gemm", "smoke"])] == ["smoke", "gemm 64x4", "gemm 32x8", "gemm 16x16"]
    assert [part.name for part in select(parts, ["training vgg16"])] == ["training vgg16 64x4"]
    with pytest.raises(ValueError, match="'gem'") as error:
        select(parts, ["gem"])
    assert "tune" in str(error.value)
