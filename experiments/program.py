"""How every program here starts and fails: one or two lines for a mistake of the user, a traceback for ours."""

import os
import sys
from collections.abc import Callable

from absl import app, flags, logging
from rich.console import Console


def console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=130)


def start(main: Callable[[], None]) -> None:
    """Runs `main` after absl has parsed the flags; a ValueError or a missing file ends the program with exit code 2."""

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # the libraries below tell of every backend they do not find
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
            main()
        except (ValueError, FileNotFoundError, NotImplementedError) as error:
            if os.environ.get("DSB_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)
