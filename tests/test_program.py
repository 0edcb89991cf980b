"""What every program does with its output: a reader that leaves ends nothing, and only a real terminal is a screen."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import program, terminal

ROOT = Path(__file__).parent.parent
FORCING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
CONTROL = re.compile(r"\x1b\[[0-9?;]*[A-Za-ln-z]")  # all but colors, which end in m


def is_nowhere(stream):
    return os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


@pytest.mark.parametrize("buffering", ["line", "block", "none"])
def test_a_reader_that_leaves_ends_nothing(buffering):
    read, write = os.pipe()
    binary = open(write, "wb", buffering=0 if buffering == "none" else -1)  # noqa: SIM115 - nothing is left to flush
    stream = io.TextIOWrapper(binary, "ascii", line_buffering=buffering == "line", write_through=buffering == "none")
    out = program.outliving(stream)
    assert (out.encoding, out.line_buffering, out.write_through) == (
        "ascii", stream.line_buffering, stream.write_through,
    )  # fmt: skip
    print("read", file=out, flush=True)
    assert os.read(read, 100) == b"read\n"
    assert not is_nowhere(out)
    os.close(read)
    for _ in range(3):
        print("x" * 100_000, file=out)
    out.flush()
    assert is_nowhere(out)


def test_a_lost_terminal_ends_nothing():
    ours, theirs = os.openpty()
    out = program.outliving(open(theirs, "w"))  # noqa: SIM115 - nothing is left to flush
    os.close(ours)
    print("lost", file=out, flush=True)
    assert is_nowhere(out)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    out = program.outliving(open("/dev/full", "w"))  # noqa: SIM115 - closing it is tested
    with pytest.raises(OSError, match="No space left"):
        print("lost", file=out, flush=True)
    assert not is_nowhere(out)
    with pytest.raises(OSError, match="No space left"):
        out.close()


def test_other_streams_are_left_alone_and_none_becomes_one():
    text = io.StringIO()
    assert program.outliving(text) is text
    with program.outliving(None) as nowhere:
        assert is_nowhere(nowhere)


PROGRAM = """
import os, sys
from pathlib import Path
from experiments import program
def main():
    console = program.console()
    for i in range(20_000):
        console.print("a line", i) if i < 100 else print("a line", i)
        print("a warning", file=sys.stderr)
    Path(os.environ["RESULT"]).write_text("done")
    if "MISTAKE" in os.environ: raise ValueError("a mistake")
program.start(main)
"""


@pytest.mark.parametrize(
    ("redirection", "mistake", "exit_code", "errors"),
    [
        ("| head -1", False, 0, 1),  # one line of note
        ("2>&1 | head -1", False, 0, 0),
        ("2>&1 | head -1", True, 2, 0),
        (">&- 2>&-", True, 2, 0),
    ],
)
def test_the_exit_code_of_a_program_without_a_reader_is_its_own(tmp_path, redirection, mistake, exit_code, errors):
    result = tmp_path / "result"
    environment = {**os.environ, "RESULT": str(result), "PROGRAM": PROGRAM} | ({"MISTAKE": "1"} if mistake else {})
    command = f'"{sys.executable}" -c "$PROGRAM" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.read_text() == "done"
    assert done.returncode == exit_code, done.stderr
    told = [line for line in done.stderr.splitlines() if line != "a warning"]
    assert len(told) == errors, done.stderr[-1000:]
    assert all("the program goes on" in line for line in told)


@pytest.fixture
def environment(monkeypatch):
    for name in FORCING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return monkeypatch


def set_(environment, settings):
    for setting in settings.split():
        environment.setenv(*setting.split("="))


def tell_three_epochs():
    """What a training of 3 epochs prints while it runs."""
    progress = terminal.TerminalProgress(program.console())
    progress.begin(SimpleNamespace(epochs=3, total_steps=6), None, None, 0)
    for epoch in range(3):
        progress.advance(2 * epoch + 2, {"loss": 1.5, "accuracy": 0.5, "turnover": 0.1})
        progress.epoch(epoch + 1, {"test_accuracy": 0.25})
    progress.stop()


@pytest.fixture
def without_table(monkeypatch):
    monkeypatch.setattr(terminal, "layer_table", lambda *_: "the table of layers " * 5)
    monkeypatch.setattr(terminal, "measure_sparsity", lambda *_: {"sparsity": 0.9})


@pytest.mark.parametrize(
    "settings",
    [
        "", "FORCE_COLOR=1", "TTY_COMPATIBLE=1", "TTY_COMPATIBLE=1 TTY_INTERACTIVE=1", "FORCE_COLOR=1 TERM=dumb",
        "FORCE_COLOR=1 NO_COLOR=1", "COLUMNS=30", "FORCE_COLOR=1 COLUMNS=30",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_table")
def test_a_file_gets_every_epoch_on_a_line_of_its_own(environment, capsys, settings):
    set_(environment, settings)
    tell_three_epochs()
    written = capsys.readouterr().out
    assert not CONTROL.search(written)
    assert "\r" not in written
    assert [line for line in written.splitlines() if line.startswith("epoch")] == [
        f"epoch {epoch}/3  loss 1.500  test accuracy 25.00%  sparsity 90.0%  turnover 10.0%" for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ("", 130), ("FORCE_COLOR=1", 130), ("TTY_COMPATIBLE=1", 130), ("FORCE_COLOR=1 TERM=dumb", 130),
        ("COLUMNS=40", 40), ("FORCE_COLOR=1 COLUMNS=200", 200), ("COLUMNS=0", 130), ("COLUMNS=wide", 130),
    ],
)  # fmt: skip
def test_a_file_is_as_wide_as_the_tables_or_as_it_is_told_to_be(environment, settings, width):
    set_(environment, settings)
    assert program.console().width == width


@pytest.mark.parametrize(
    ("settings", "colored"), [("", False), ("FORCE_COLOR=1", True), ("FORCE_COLOR=1 NO_COLOR=1", False)]
)
def test_colors_in_a_file_are_the_choice_of_the_user(environment, capsys, settings, colored):
    set_(environment, settings)
    program.console().print("[red]red[/red]")
    assert ("\x1b[31m" in capsys.readouterr().out) == colored


@pytest.mark.parametrize(
    ("settings", "bar"), [("", True), ("TERM=dumb", False), ("TTY_COMPATIBLE=0", False), ("NO_COLOR=1", True)]
)
@pytest.mark.usefixtures("without_table")
def test_a_terminal_gets_a_bar_unless_it_is_dumb(environment, settings, bar):
    set_(environment, settings)
    ours, theirs = os.openpty()
    with open(theirs, "w") as screen, environment.context() as patch:
        patch.setattr(sys, "stdout", screen)
        tell_three_epochs()
        screen.flush()
        written = os.read(ours, 1_000_000).decode()
    os.close(ours)
    assert bool(CONTROL.search(written)) == bar
    assert ("epoch 1/3  loss" in written) != bar
