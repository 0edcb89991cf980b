"""The README's Python runs as it stands, in a process that has imported nothing else."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def blocks(title):
    """The Python blocks of one section."""
    section = re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(title))
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def run(lines):
    """A program of its own, from the root of the repository."""
    program = "\n".join(lines)
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=README.parent)
    assert process.returncode == 0, process.stderr
    return process.stdout


def check_numbers(text):
    """The lines that are not the user's own."""
    assert re.findall(r"# (\d)$", text, flags=re.MULTILINE) == [str(i + 1) for i in range(6)]


def test_an_nnx_model():
    first, *others = blocks("An NNX model")
    check_numbers(first)
    checks = [
        "assert float(loss) < 2.3, loss",  # ten classes at random: log(10)
        "assert 0 < float(sum(layer.accepted for layer in report.values()))",
        "plan.check(dsb.nnx.params(model))",
    ]
    after = ["assert type(Net(nnx.Rngs(0)).first) is nnx.Conv", "assert pruned is dense"]
    run([first, *checks, *others, *after])


def test_your_own_model():
    first, *others = blocks("Your own model")
    check_numbers(first)
    checks = [
        "losses = [float(loss_fn({'params': params, 'topology': topology}, x, y))]",
        "assert losses[0] < 2.3, losses",  # ten classes at random: log(10)
        "assert 0 < float(sum(layer.accepted for layer in report.values()))",
        "plan.check(params)",
        "print(plan)",
    ]
    rules = "assert dsb.linen.plan(Net(), x, rules=rules)['Dense_0',] == \"kept dense by 'Dense_0'\""
    shown = run([first, *checks, others[0], rules, *others[1:], "print(metrics)"])
    table = re.search(r"^```\n(layer +kernel.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert table[1] in shown  # what the README shows is what it prints
