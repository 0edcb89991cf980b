"""The process of PyTorch as its client sees it: the protocol with a fake, refusals, what the results make of it."""

import importlib.util
import json
import os

import jax
import pytest
from rich.console import Console

from dsb_jax.training.config import Config
from experiments import timing, torch_process
from experiments.training_times import DENSE, TORCH, beside_torch
from tests import fake_peer

CONFIG = Config(
    model="wrn-10-1", input_shape=(8, 8, 3), batch_size=4, num_classes=5, learning_rate=0.5, momentum=0.8,
    weight_decay=1e-3,
)  # fmt: skip


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_protocol(tmp_path):
    with torch_process.running(fake_peer.write(tmp_path), CONFIG, cores=3) as torch:
        assert torch.version == fake_peer.VERSION
        assert [torch.step(), torch.step()] == [fake_peer.SECONDS] * 2
        call = json.loads((tmp_path / "call.json").read_text())
        assert is_running(call["pid"])
    assert not is_running(call["pid"])
    assert call["arguments"][:2] == ["-m", "experiments.torch_peer"]
    assert set(call["arguments"][2:]) == {
        "--model=wrn-10-1", "--dtype=float32", "--batch_size=4", "--image_size=8", "--num_classes=5", "--threads=3",
        "--learning_rate=0.5", "--momentum=0.8", "--weight_decay=0.001",
    }  # fmt: skip
    assert call["environment"]["OMP_WAIT_POLICY"] == "PASSIVE"


def test_it_ends_with_the_block_whatever_happens(tmp_path):
    deaf = f"{fake_peer.GREETING}\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    with pytest.raises(KeyError), torch_process.running(fake_peer.write(tmp_path, deaf), CONFIG, cores=1):
        raise KeyError
    assert not is_running(json.loads((tmp_path / "call.json").read_text())["pid"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ImportError(\"No module named 'torch'\")", ["exit code 1", "ImportError: No module named 'torch'"]),
        (f"{fake_peer.GREETING}\nsys.exit(3)", ["exit code 3"]),
        (f"{fake_peer.GREETING}\nsys.stdin.readline()\nraise MemoryError('too many images')", ["too many images"]),
        ("print('hello', flush=True)\ntime.sleep(600)", ["'hello'", '"torch"']),
        ("print('[1]', flush=True)\ntime.sleep(600)", ["'[1]'", '"torch"']),
        (f"{fake_peer.GREETING}\nprint('{{}}', flush=True)\ntime.sleep(600)", ["'{}'", '"seconds"']),
        (f"{fake_peer.GREETING}\nprint('{{', end='', flush=True)\ntime.sleep(600)", ["not answered for 1 s"]),
    ],
    ids=["no PyTorch", "ends at once", "ends in a step", "no JSON", "no object", "another object", "silent"],
)
def test_a_failure_is_two_lines_with_the_cause_and_the_cure(body, words, tmp_path):
    python = fake_peer.write(tmp_path, body)
    with (
        pytest.raises(ValueError, match="peer_python=") as caught,
        torch_process.running(python, CONFIG, cores=1, answer_s=1.0 if "not answered" in words[0] else 60) as torch,
    ):
        torch.step()
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for word in (python, "pip install torch", "--peer_python=none", *words):
        assert word in message
    assert not is_running(json.loads((tmp_path / "call.json").read_text())["pid"])


def test_what_cannot_be_started_is_refused(tmp_path):
    file = tmp_path / "python"
    console = Console(record=True)
    with pytest.raises(ValueError, match=r"there is no such program; give the path"):
        torch_process.find_python(str(file), console)
    file.write_text("no program")
    file.chmod(0o755)
    python = torch_process.find_python(str(file), console)
    with (
        pytest.raises(ValueError, match=r"cannot be started: .*; give the path"),
        torch_process.running(python, CONFIG, cores=1),
    ):
        pass


def test_without_pytorch_a_line_says_how_to_get_it(monkeypatch, capsys):
    console = Console(width=200)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torch_process.find_python("", console) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "--peer_python=PATH" in line
    assert "pip install 'dsb-jax[peers]'" in line
    assert torch_process.find_python("none", console) is None
    with torch_process.running(None, CONFIG, cores=1) as torch:
        assert torch is None


def test_a_model_that_pytorch_has_not_is_told_whatever_the_flag_says(capsys, tmp_path):
    python = fake_peer.write(tmp_path)
    for flag in ("", python):
        assert torch_process.find_python(flag, Console(width=200), "no transformer") is None
        assert capsys.readouterr().out == "without PyTorch's step: no transformer.\n"
    assert torch_process.find_python("none", Console(width=200), "no transformer") is None
    assert capsys.readouterr().out == ""


def test_times_in_tables_have_three_digits():
    assert list(map(timing.milliseconds, (4.2e-4, 0.0573, 1.14, None))) == ["0.42 ms", "57.3 ms", "1140 ms", "-"]


def test_the_python_of_the_flag(monkeypatch, tmp_path):
    console, python = Console(), fake_peer.write(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert torch_process.find_python("", console) == torch_process.sys.executable
    link = tmp_path / "link"
    link.symlink_to(python)
    monkeypatch.chdir(tmp_path)
    assert torch_process.find_python("./link", console) == str(link)  # as a virtual environment's is one


def test_a_gpu_has_no_rival_on_a_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert torch_process.find_python("", Console(width=200)) is None
    assert "beside gpu" in capsys.readouterr().out
    with pytest.raises(ValueError, match="beside gpu; leave it out"):
        torch_process.find_python(fake_peer.write(tmp_path), Console())


def test_a_candidate_that_times_itself_takes_turns_with_the_others():
    calls = []
    seconds = iter([9.0, 1.0, 2.0, 3.0])
    times = timing.in_turns(
        {"here": lambda: calls.append("here")}, 3, self_timed={"there": lambda: calls.append("there") or next(seconds)}
    )
    assert times["there"] == [1.0, 2.0, 3.0]  # the first is not counted
    assert len(times["here"]) == 3
    assert calls == ["here", "there", *["here", "here", "there"] * 3]


def test_the_speedup_over_the_fastest_by_hand():
    # The faster of both: 2, 2 and 3; over the sparse step 2, 4 and 1.5. The medians alone would say 3 / 1 = 3.
    times = {DENSE: [4.0, 2.0, 6.0], TORCH: [2.0, 4.0, 3.0], "sparse": [1.0, 0.5, 2.0]}
    assert beside_torch(times, "sparse") == {"torch_step_s": 3.0, "speedup_over_fastest": 2.0}
    del times[TORCH]
    assert beside_torch(times, "sparse") == {"torch_step_s": None, "speedup_over_fastest": None}
