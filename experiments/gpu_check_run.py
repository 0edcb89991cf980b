"""Runs the parts of `experiments.gpu_check`: each with a time limit, its log and its lines kept as they come.

Whatever ends a part, what it had written is read again. Paths of this machine become words, for results are read
elsewhere. All files lie in one folder and are at most `MOST_FILE_BYTES` long: the middle of a longer log is left out.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MOST_FILE_BYTES = 16 << 20
PART_LOG_BYTES = 700 << 10  # twenty of them stay below a file's limit
EXTRA_BYTES = 8 << 20  # of the PTX, and of the sanitizer's log
RESULTS_BYTES = 1 << 20  # of one part; the file of all results holds each once
POLL_S = 0.25
KEPT_LINES = 12


@dataclasses.dataclass(frozen=True)
class Part:
    """What is run by a Python interpreter of its own.

    Attributes:
      name: of the part, a key of the results.
      arguments: of the interpreter. `{file}` stands for a file for results in JSON, `{lines}` for one of JSON lines;
        either becomes the part's results. `Folder` and gpu_check fill in further names.
      budget_s: its share of the time. What the parts before it did not use is added, unless it is `strict`.
      environment: variables for this part.
      rows: R of the layers whose kernels "auto" would use; if the smoke part found them wrong, the part runs dense.
      needs: name of a file of the folder without which the part cannot run.
      strict: it gets its budget and no more, and takes nothing from the parts behind it.
      expected: how it ends: "done", "failed" or "stopped". Only rehearsals expect anything but "done".
    """

    name: str
    arguments: tuple[str, ...]
    budget_s: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: int | None = None
    needs: str | None = None
    strict: bool = False
    expected: str = "done"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where everything lies: results in the folder of `json`, the rest in `temporary`, which is removed at the end.

    Attributes:
      json: the file of all results; the other names are made from its own.
      temporary: compiled programs, files of parts, a home without a user's tables.
      note: stands in the log behind the name of each part.
    """

    json: Path
    temporary: Path
    note: str = ""

    def file(self, kind: str) -> Path:
        """The file of a kind: "log", "tuned", "ptx" or "sanitizer"."""
        ending = {"log": ".log", "tuned": ".tuned.json", "ptx": ".failed.ptx", "sanitizer": ".sanitizer.log"}[kind]
        return self.json.with_name(self.json.stem + ending)

    def remove_old(self) -> None:
        """Removes what an earlier check of the same name left."""
        for path in (self.json, *map(self.file, ("log", "tuned", "ptx", "sanitizer"))):
            path.unlink(missing_ok=True)

    def environment(self, rehearse: bool) -> dict[str, str]:
        """The variables that all parts share."""
        home = self.temporary / "home"  # so that no table of the user's counts, and nothing is written to the real one
        home.mkdir(exist_ok=True)
        variables = dict(os.environ)
        variables.pop("DSB_JAX_TUNED", None)
        # Measured code is optimized as users get it; a rehearsal is to compile fast.
        xla_flags = [flag for flag in variables.pop("XLA_FLAGS", "").split() if "optimization_level" not in flag]
        xla_flags += ["--xla_backend_optimization_level=0"] if rehearse else []
        variables |= {"XLA_FLAGS": " ".join(xla_flags)} if xla_flags else {}
        # What a part compiles, the next one need not.
        variables.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.temporary / "compiled"))
        variables.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        return variables | {
            "HOME": str(home), "TMPDIR": str(self.temporary), "PYTHONUSERBASE": site.getuserbase(),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.temporary / "hypothesis"), "PYTHONUNBUFFERED": "1",
            **({"JAX_PLATFORMS": "cpu"} if rehearse else {}),
        }  # fmt: skip

    def without_paths(self, text: str) -> str:
        """Paths of this machine as words: of the project relative, others by what they are."""
        words = {str(self.json.absolute().parent): "RESULTS", str(self.temporary): "TEMP", str(ROOT): ""}
        for path in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix):
            if len(Path(path).parts) > 2:  # "/usr" says nothing of a machine
                words[path] = "PYTHON"
        words.setdefault(str(Path.home()), "HOME")
        words |= {os.path.realpath(path): word for path, word in words.items()}
        for path in sorted(words, key=len, reverse=True):
            if path != os.sep:
                word = words[path]
                text = re.sub(rf"{re.escape(path)}(?![\w-])({re.escape(os.sep)})?", _replacement(word), text)
        return text


def _replacement(word: str) -> Callable[[re.Match[str]], str]:
    if not word:
        return lambda found: "" if found[1] else "."
    return lambda found: word + (found[1] or "")


def shortened(text: str, most_bytes: int) -> str:
    """The text; one longer than `most_bytes` without its middle."""
    data = text.encode(errors="replace")
    if len(data) <= most_bytes:
        return text
    half = most_bytes // 2
    left_out = len(data) - 2 * half
    first, last = (piece.decode(errors="ignore") for piece in (data[:half], data[-half:]))
    return f"{first}\n... {left_out} bytes left out ...\n{last}"


def read_results(text: str, *, lines: bool) -> Any:
    """What a part wrote: JSON, None if half written; or JSON lines, of which a half-written last one is left out."""
    if len(text) > RESULTS_BYTES:
        text = text[:RESULTS_BYTES] if lines else '"left out: larger than a file of results may be"'
    if not lines:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return None
    return parse_lines(text)


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The values of JSON lines; one that is half written is left out."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def run_part(
    part: Part,
    limit_s: float,
    folder: Folder,
    environment: Mapping[str, str],
    *,
    interrupted: Callable[[], bool] = lambda: False,
    written: Callable[[dict[str, Any], int | None], None] = lambda outcome, pid: None,
) -> dict[str, Any]:
    """Runs a part to its end, or stops it after `limit_s`.

    Args:
      part: its arguments without names to be filled in but `{file}` and `{lines}`.
      limit_s: seconds.
      folder: its log gets what the part prints.
      environment: all variables of the part.
      interrupted: says when this program is asked to end; the part is stopped then.
      written: is called with what is known so far, at first and whenever the part has written; with the id of its
        process.

    Returns:
      seconds; command; end ("done", "failed", "stopped"); error, None if done; tail, the last lines printed; and
      results where the part wrote any.
    """
    paths = {"{file}": folder.temporary / f"{part.name}.json", "{lines}": folder.temporary / f"{part.name}.jsonl"}
    arguments = [_filled(argument, paths) for argument in part.arguments]
    variables = {**environment, **{name: _filled(value, paths) for name, value in part.environment.items()}}
    command = folder.without_paths("python " + " ".join(part.arguments))
    log = folder.file("log")
    with log.open("a") as stream:
        stream.write(f"\n==== {part.name}{folder.note}: {command}\n")
    start_of_log, begin, seen = log.stat().st_size, time.monotonic(), -1
    end, error = "done", None

    def outcome() -> dict[str, Any]:
        known = {"seconds": round(time.monotonic() - begin, 1), "command": command, "end": end, "error": error}
        for name, path in paths.items():
            if path.exists():
                text = folder.without_paths(path.read_text(errors="replace"))
                known["results"] = read_results(text, lines=name == "{lines}")
        return known

    def last_written() -> int:
        return sum(path.stat().st_mtime_ns for path in paths.values() if path.exists())

    with log.open("ab") as printing:
        # A group of its own, so that stopping it stops what it started.
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=variables, process_group=0, stdin=subprocess.DEVNULL,
            stdout=printing, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while True:
            if (now := last_written()) != seen:
                seen = now
                written({**outcome(), "end": "running"}, process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=POLL_S)
                if code:
                    end = "failed"
                    error = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
                break
            if interrupted():
                end, error = "stopped", "stopped, for the check itself was asked to end"
                break
            if time.monotonic() - begin > limit_s:
                end, error = "stopped", f"stopped after {limit_s:.0f} s"
                break
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    printed = _tidy_log(log, start_of_log, folder)
    # Rows of tables stay in the log: the results have their numbers.
    tail = [line for line in printed.splitlines() if re.search(r"\w", line) and not re.search("[│┃]", line)]
    tail = tail[-KEPT_LINES:]
    if error is not None and tail:
        error += f": {tail[-1].strip()[:200]}"
    return {**outcome(), "tail": tail if error is not None else tail[-1:]}


def _filled(text: str, paths: Mapping[str, Path]) -> str:
    for name, path in paths.items():
        text = text.replace(name, str(path))
    return text


def _tidy_log(log: Path, start: int, folder: Folder) -> str:
    """What a part printed, shortened and without paths; the log is written again so."""
    with log.open("r+b") as stream:
        stream.seek(start)
        printed = folder.without_paths(stream.read().decode(errors="replace"))
        kept = shortened(printed, PART_LOG_BYTES)
        stream.seek(start)
        stream.write(kept.encode(errors="replace"))
        stream.truncate()
    return kept


def tidy_file(path: Path, folder: Folder) -> None:
    """Shortens a file of results that a part wrote itself, and takes the paths out."""
    if path.exists():
        text = folder.without_paths(path.read_text(errors="replace"))
        path.write_text(shortened(text, EXTRA_BYTES))
