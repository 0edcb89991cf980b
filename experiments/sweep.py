"""A grid of runs, each on its own and resumable; at the end a table of mean and standard deviation over the seeds.

    python -m experiments.sweep --preset=digits --root=DIR
    python -m experiments.sweep --root=DIR --methods=dsb,ssb --sparsities=0.8,0.9 --seeds=0,1,2 --set=epochs=8

    ROOT/NAME/               the workdir of a run (dsb_jax/training/loop.py), named by its settings
    ROOT/NAME.failure.txt    how its last attempt failed: command, exit code, end of the output
    ROOT/table.json          one row for each cell
    ROOT/.compilation_cache  what jax compiled, shared by the runs

Every run is a process of its own, `python -m experiments.train --resume`. What has finished is skipped, what was
interrupted goes on from its last checkpoint to the same bits: stopped anywhere, by whatever, and started again with the
same command, a sweep ends with the same table. Sweeps may share a root: a run that another one holds is left for last.
"""

import collections
import contextlib
import fcntl
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsb_jax.drafts import write_text
from experiments import grid, program
from experiments.flags import parse_seeds
from experiments.grid import Run, workdir
from experiments.outcomes import finished, make_rows, outcome_table
from experiments.paired import check_against, paired_table
from experiments.presets import PRESETS

FLAGS = flags.FLAGS

TAIL_LINES = 40  # of a failed run's output that are kept

# Flag of lists -> field of the config. With a preset they select from it, without one they are the grid.
AXES = {
    "datasets": "dataset",
    "models": "model",
    "methods": "method",
    "sparsities": "sparsity",
    "block_shapes": "block_shape",
    "grow": "grow",
    "granularities": "granularity",
    "block_aware_drop": "block_aware_drop",
}

Command = Callable[[Sequence[Run]], list[str]]  # runs of one cell -> the command that makes them


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("root", None, "Folder of the sweep.", required=True)
    flags.DEFINE_string("preset", None, f"A named grid: {', '.join(PRESETS)}.")
    for name, field in AXES.items():
        flags.DEFINE_list(name, None, f"Values of {field}: the grid, or what to select from the preset.")
    flags.DEFINE_list("seeds", None, "Seeds: of the grid (by default 0), or what to select from the preset.")
    flags.DEFINE_multi_string("set", [], "NAME=VALUE of the config for all runs, such as epochs=8; may be repeated.")
    flags.DEFINE_string("data_dir", None, "Where tfds finds data sets.")
    flags.DEFINE_bool(
        "together", None, "All seeds of a cell in one process, which compiles once; by default the preset says."
    )
    flags.DEFINE_string("against", None, "A cell of which the paired differences are printed; by default the first.")
    flags.DEFINE_bool("dry_run", False, "Print the commands of what is left instead of running them.")


def runs_from_flags() -> list[Run]:
    """The grid that the flags ask for.

    Raises:
      ValueError: if a flag cannot be, or nothing is left.
    """
    override: dict[str, Any] = {}
    for text in FLAGS.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"set={text!r} is not NAME=VALUE; write such as --set=epochs=8.")
        override[name] = value
    for field in set(override) & {field for axis, field in AXES.items() if FLAGS[axis].value}:
        raise ValueError(f"{field} is given by --set and by a list; give one of them.")
    seeds = None if FLAGS.seeds is None else parse_seeds(FLAGS.seeds)
    axes: dict[str, Any] = {field: FLAGS[axis].value for axis, field in AXES.items() if FLAGS[axis].value}
    if FLAGS.preset is None:
        runs = grid.expand([axes], seeds=seeds or [0], common={}, override=override)
        grid.check_effects(runs, axes | {field: [value] for field, value in override.items()})
    else:
        allowed = axes if seeds is None else {**axes, "seed": seeds}
        runs = grid.select(grid.preset_runs(FLAGS.preset, override=override), allowed)
    grid.check_runs(runs)
    return runs


def train_command(root: Path, data_dir: str | None) -> Command:
    """How runs are made."""
    where = [] if data_dir is None else [f"--data_dir={data_dir}"]

    def command(runs: Sequence[Run]) -> list[str]:
        folder, seeds = workdir(root, runs[0]), []
        if len(runs) > 1:
            folder = root / f"{runs[0].cell}-seed{{seed}}"
            seeds = [f"--seeds={','.join(str(run.seed) for run in runs)}"]
        return [
            sys.executable, "-m", "experiments.train", *runs[0].arguments(), *seeds, *where, f"--workdir={folder}",
            "--resume",
        ]  # fmt: skip

    return command


def cached_compilation(root: Path) -> dict[str, str]:
    """The environment of the runs: seeds share what was compiled, which takes longer than a short run does.

    Variables of jax that are set already stand.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(root.absolute() / ".compilation_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        **os.environ,
    }


@contextlib.contextmanager
def _lock(root: Path, run: Run, *, wait: bool) -> Iterator[IO[str] | None]:
    """Holds a run, or yields None if another process does. The lock passes to the run's own process with the file.

    So it outlives a sweep that was killed without a chance to end its run: the next sweep leaves that run alone until
    it ends by itself.
    """
    path = root / ".locks" / run.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file


class Estimate:
    """The time that is left: for each run the median of those that took data set, model and method, else of all."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)

    def add(self, run: Run, seconds: float) -> None:
        """Notes what a run took."""
        for key in (self._key(run), ()):
            self._seconds[key].append(seconds)

    def left(self, runs: Sequence[Run]) -> float | None:
        """Seconds for `runs`; None before anything is known."""
        if not self._seconds:
            return None
        return sum(statistics.median(self._seconds.get(self._key(run)) or self._seconds[()]) for run in runs)

    @staticmethod
    def _key(run: Run) -> tuple[str, ...]:
        config = run.config
        return config.dataset, config.model, config.method


def format_seconds(seconds: float | None) -> str:
    """4000.0 -> '1 h 07 min'; '?' for None."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Sweep:
    """Makes the runs that are left, one after another; `together` those of a cell in one process."""

    def __init__(
        self, root: Path, runs: Sequence[Run], command: Command, console: Console, *, together: bool = False
    ) -> None:
        self.root, self.runs, self.command, self.console = root, runs, command, console
        self.together = together
        self.estimate = Estimate()
        self.left: list[Run] = []
        for run in runs:
            summary = finished(root, run)
            if summary is None:
                self.left.append(run)
            elif not summary.get("resumed_at_step"):  # the time of a resumed run is that of its last part
                self.estimate.add(run, summary["train_time_s"])
        self.failed: list[Run] = []
        self.bar = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn(),
            TextColumn("about {task.fields[left]} left"), console=console, disable=not console.is_interactive,
        )  # fmt: skip

    def make(self) -> list[Run]:
        """Makes what is left; returns the runs that failed."""
        done = len(self.runs) - len(self.left)
        self.task = self.bar.add_task("", total=len(self.runs), completed=done, left="?")
        with self.bar:
            for wait in (False, True):
                for runs in self.groups():
                    with contextlib.ExitStack() as stack:
                        # In the order of the seeds, as every other sweep does that waits for some of them.
                        locks = {run: stack.enter_context(_lock(self.root, run, wait=wait)) for run in runs}
                        self._make_group({run: lock for run, lock in locks.items() if lock is not None})
                if self.left and not wait:
                    self.console.print(f"waiting for {len(self.left)} runs that other processes hold")
        return self.failed

    def groups(self) -> list[list[Run]]:
        """What is left, by process."""
        groups: dict[Any, list[Run]] = collections.defaultdict(list)
        for run in sorted(self.left, key=lambda run: run.seed) if self.together else self.left:
            groups[run.settings if self.together else run].append(run)
        return list(groups.values())

    def _make_group(self, locks: dict[Run, IO[str]]) -> None:
        """Runs of one cell. One that fails ends its process: those behind it get another."""
        todo = list(locks)
        while todo := self._without_finished(todo):
            code, output = self._train(todo, locks)
            if todo := [run for run in todo if run in self.left]:
                self._fail(todo.pop(0), code, output)

    def _without_finished(self, runs: list[Run], begin: float | None = None) -> list[Run]:
        """The runs that have no summary yet. The others are done; they began at `begin`, or elsewhere."""
        found = {run: summary for run in runs if (summary := finished(self.root, run)) is not None}
        for run, summary in found.items():
            (self.root / f"{run.name}.failure.txt").unlink(missing_ok=True)
            seconds = summary["train_time_s"] if begin is None else (time.perf_counter() - begin) / len(found)
            self.estimate.add(run, seconds)
            self._tell(run, f"{summary['test_accuracy']:.2%} in {format_seconds(seconds)}")
        return [run for run in runs if run not in found]

    def _fail(self, run: Run, code: int, output: str) -> None:
        self.failed.append(run)
        cause = f"exit code {code}" if code else "it wrote no summary of this config"
        note = self.root / f"{run.name}.failure.txt"
        write_text(note, f"{shlex.join(self.command([run]))}\n{cause}\n\n{output}")
        self._tell(run, f"[red]failed[/red] ({cause}): {note}")

    def _tell(self, run: Run, outcome: str) -> None:
        self.left.remove(run)
        self.bar.advance(self.task)
        left = format_seconds(self.estimate.left(self.left))
        self.console.print(f"{run.name}: {outcome}; {len(self.left)} left, about {left}", soft_wrap=True)

    def _train(self, runs: list[Run], locks: dict[Run, IO[str]]) -> tuple[int, str]:
        """Exit code and end of the output of the runs' process, which is ended if this one is."""
        begin, pending = time.perf_counter(), runs
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            # A group of its own: Ctrl-C reaches it through us, once, and not in the middle of its own clean-up.
            child = subprocess.Popen(
                self.command(runs), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                pass_fds=tuple(locks[run].fileno() for run in runs), process_group=0,
                env=cached_compilation(self.root),
            )  # fmt: skip
            try:
                while child.poll() is None:
                    left = self.estimate.left(self.left)
                    if left is not None:
                        left = max(0.0, left - (time.perf_counter() - begin))
                    self.bar.update(self.task, description=(pending or runs)[0].name, left=format_seconds(left))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(timeout=1)
                    if len(now := self._without_finished(pending, begin)) < len(pending):
                        begin, pending = time.perf_counter(), now
                self._without_finished(pending, begin)
            finally:
                if child.poll() is None:
                    child.terminate()
                    try:
                        child.wait(timeout=20)
                    except subprocess.TimeoutExpired:
                        child.kill()
                        child.wait()
            output.seek(0)
            return child.returncode, "\n".join(output.read().splitlines()[-TAIL_LINES:]) + "\n"


def _stop(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)  # through the clean-up, which ends the run's process


def main() -> None:
    """Flags -> library calls."""
    console = program.console()
    runs, root = runs_from_flags(), Path(FLAGS.root)
    command = train_command(root, FLAGS.data_dir)
    preset = PRESETS.get(FLAGS.preset, {})
    together = bool(preset.get("together")) if FLAGS.together is None else FLAGS.together
    sweep = Sweep(root, runs, command, console, together=together)
    cells = sorted({run.cell for run in runs})
    check_against(FLAGS.against, cells)
    left = format_seconds(sweep.estimate.left(sweep.left))
    done = len(runs) - len(sweep.left)
    console.print(f"{len(runs)} runs of {len(cells)} cells: {done} done, {len(sweep.left)} left, about {left}")
    if FLAGS.dry_run:
        for group in sweep.groups():
            console.print(shlex.join(command(group)), soft_wrap=True, highlight=False, markup=False)
        return
    root.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        failed = sweep.make()
    except KeyboardInterrupt:
        console.print("\ninterrupted; the same command goes on")
        raise SystemExit(130) from None
    rows = make_rows(root, runs)
    write_text(root / "table.json", json.dumps({"rows": rows}, indent=1) + "\n")
    console.print(outcome_table(rows))
    if any(row["n"] > 1 for row in rows):
        console.print(paired_table(rows, FLAGS.against))
    console.print(f"written: {root}/table.json")
    if failed:
        console.print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:")
        for run in failed:
            console.print(f"  {root / run.name}.failure.txt", soft_wrap=True)
        raise SystemExit(1)


if __name__ == "__main__":
    define_flags()
    program.start(main)
