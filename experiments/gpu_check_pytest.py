"""A plugin of pytest: one flushed JSON line a test, so that a run that is stopped leaves the tests that it did.

    GPU_CHECK_LINES=FILE python -m pytest -p experiments.gpu_check_pytest ...

With pytest-xdist, lines are written by the process that collects the reports, as they come.
"""

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "GPU_CHECK_LINES"
MESSAGE_LENGTH = 600


def line_of(report: Any) -> dict[str, Any] | None:
    """What is kept of a report: of a call, and of a set-up or an end that did not pass."""
    if report.when != "call" and report.passed:
        return None
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line["message"] = str(crash.message if crash is not None else report.longrepr)[-MESSAGE_LENGTH:]
    elif report.skipped and isinstance(report.longrepr, tuple):
        line["message"] = str(report.longrepr[-1])[:MESSAGE_LENGTH]
    return line


def pytest_runtest_logreport(report: Any) -> None:
    """Called by pytest for set-up, call and end of each test."""
    if (line := line_of(report)) is not None and VARIABLE in os.environ:
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.write(json.dumps(line) + "\n")
