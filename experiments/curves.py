"""curves.png: loss, accuracy, turnover and exploration of one run, from its metrics."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(workdir: Path, title: str) -> Path:
    """Draws workdir/metrics.jsonl into workdir/curves.png."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train, adapt, evaluation = ([e for e in lines if e["kind"] == kind] for kind in ("train", "adapt", "eval"))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    figure.suptitle(title, fontsize=11)

    def plot(axis: Any, entries: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
        axis.plot([e["step"] for e in entries], [e[name] for e in entries], label=label, **style)

    loss, accuracy, turnover, exploration = axes.flat
    plot(loss, train, "loss", "training", color="tab:blue", linewidth=1)
    plot(loss, evaluation, "test_loss", "test", color="tab:orange", marker=".")
    loss.set(title="Loss", yscale="log")
    plot(accuracy, train, "accuracy", "training", color="tab:blue", linewidth=1)
    plot(accuracy, evaluation, "test_accuracy", "test", color="tab:orange", marker=".")
    accuracy.set(title="Accuracy")
    for axis in (loss, accuracy):
        axis.legend(frameon=False)
    for axis, name, title_ in (
        (turnover, "turnover", "Turnover (share of active weights replaced)"),
        (exploration, "exploration", "Exploration (share of positions ever active)"),
    ):
        if adapt:
            plot(axis, adapt, name, name, color="tab:green", marker=".")
        else:
            axis.text(0.5, 0.5, "the topology does not adapt", ha="center", va="center", transform=axis.transAxes)
        axis.set(title=title_)
        axis.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
