"""A program in the place of a Python with PyTorch, that speaks the protocol of `experiments.torch_peer`."""

import sys
from pathlib import Path

VERSION = "2.99.0+fake"
SECONDS = 0.25  # that each of its steps is said to take
GREETING = f"""print('{{"torch": "{VERSION}", "threads": 1, "parameters": 9}}', flush=True)"""
ANSWERS = f"""{GREETING}
for line in sys.stdin:
    assert line == "step\\n", line
    print('{{"seconds": {SECONDS}}}', flush=True)"""


def write(folder: Path, body: str = ANSWERS) -> str:
    """Its path; beside it, `call.json` will hold its process id, its arguments and its environment.

    Args:
      folder: where it lies.
      body: Python, in place of the whole of the protocol.
    """
    path = folder / "fake_python"
    note = "{'pid': os.getpid(), 'arguments': sys.argv[1:], 'environment': dict(os.environ)}"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        f"json.dump({note}, open({str(folder / 'call.json')!r}, 'w'))\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)
