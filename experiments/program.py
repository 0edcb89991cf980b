"""How every program here starts, prints and fails: one or two lines for a mistake of the user, a traceback for ours."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import jax
from absl import app, flags, logging
from rich.console import Console

from dsb_jax.ops.tuning import user_folder

_WIDTH = 130  # columns of a table in a file


def console() -> Console:
    """The terminal; where the output goes elsewhere, a page wide enough for the tables, without bars that move.

    Whether it is a terminal is asked of the stream: `FORCE_COLOR` and its like may color what goes to a file, but not
    make it a screen. Programs draw bars only where `is_interactive`.
    """
    if sys.stdout.isatty():
        return Console()
    columns = os.environ.get("COLUMNS", "")
    # With a width alone, rich takes 80 columns under TERM=dumb.
    return Console(
        width=int(columns) if columns.isdecimal() and int(columns) else _WIDTH, height=25, force_interactive=False
    )


class _Output(io.FileIO):
    """A standard stream that drops what is written once nobody reads it any more (`| head`, a lost terminal).

    A training of hours must not end because its printing does: the results are in its files.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream = stream  # which would close the file, were it collected
        # A terminal that has gone answers EIO; from a file that is an error of the disk.
        self._unread = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._unread:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for whoever else writes there, too
        os.close(nowhere)
        if self.fileno() == 1:
            print("note: nobody reads the output any more; the program goes on.", file=sys.stderr)
        return super().write(data)


def outliving(stream: TextIO | None) -> TextIO:
    """The stream, such that it can be closed from the other side without an error; None is closed from the start."""
    if stream is None:
        return open(os.devnull, "w")
    buffer = getattr(stream, "buffer", None)
    if not isinstance(stream, io.TextIOWrapper) or type(getattr(buffer, "raw", buffer)) is not io.FileIO:
        return stream  # a notebook's, a test's, or a console of Windows
    stream.flush()
    output = _Output(stream)
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def keep_compiled() -> None:
    """What XLA compiled for this program is kept for the next, beside what else is known of this user's devices.

    Variables of jax that are set already stand; without a home, nothing is kept.
    """
    folder = user_folder()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def start(main: Callable[[], None]) -> None:
    """Runs `main` after absl has parsed the flags; a mistake of the user ends the program with exit code 2.

    Mistakes are a ValueError, a missing file, a package that is not installed, and what cannot be served. Output that
    nobody reads any more is no mistake.
    """
    sys.stdout, sys.stderr = outliving(sys.stdout), outliving(sys.stderr)

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # the libraries below tell of every backend they do not find
        keep_compiled()
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
            main()
        except (ValueError, FileNotFoundError, ImportError, NotImplementedError) as error:
            if os.environ.get("DSB_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
