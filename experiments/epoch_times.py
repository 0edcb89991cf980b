"""Time of a training epoch by sparsity, from files of `experiments.layer_profile`: Figures 12 and 13 of the paper.

    epoch_s = (50,000 // batch_size) * step_s

CIFAR-10 and CIFAR-100 have 50,000 training images each, and a last incomplete batch is left out. So it is the time of
the training steps alone: loading and augmenting images, evaluation and adaptations are not in it. The two data sets
differ in the classifier only; a profile belongs to the one whose number of classes its models have.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.presets import SPARSITIES

TRAIN_IMAGES = 50_000
IMAGE_SIZE = 32  # of both CIFAR sets
MODELS = ("wrn-22-2", "resnet18", "vgg16")  # of the paper
_NUMBERS = ("sparsity", "dense_step_s", "estimated_step_s", "measured_step_s")
_TEXTS = ("model", "block_shape", "distribution")


@dataclasses.dataclass(frozen=True)
class ProfileTerms:
    """What the times of one row of a figure have in common."""

    block_shape: str = "16x16"
    distribution: str = "uniform"
    batch_size: int = 128
    dtype: str = "float32"
    implementation: str = "auto"
    device: str = ""

    def chosen(self) -> dict[str, Any]:
        """The flags of `experiments.layer_profile` that are not its defaults."""
        own, default = dataclasses.asdict(self), dataclasses.asdict(ProfileTerms())
        return {name: value for name, value in own.items() if name != "device" and value != default[name]}


@dataclasses.dataclass(frozen=True)
class EpochTime:
    """Seconds of an epoch at one sparsity: by the paper's estimate (None if it is not positive), and measured."""

    sparsity: float
    estimated_s: float | None
    measured_s: float


@dataclasses.dataclass(frozen=True)
class TimePanel:
    """One model on one set of terms; all times are from one file, in which dense and sparse steps took turns.

    `torch_s`, of the same dense model in PyTorch, is None if it was not measured.
    """

    model: str
    num_classes: int
    terms: ProfileTerms
    file: Path
    dense_s: float
    torch_s: float | None
    times: tuple[EpochTime, ...]

    @property
    def fastest_dense_s(self) -> float:
        """What the sparse step is compared with."""
        return self.dense_s if self.torch_s is None else min(self.dense_s, self.torch_s)

    @property
    def missing(self) -> list[float]:
        """Sparsities of the paper's figure that were not profiled."""
        have = {time.sparsity for time in self.times}
        return [sparsity for sparsity in SPARSITIES if sparsity not in have]


def read_profile(file: Path) -> list[TimePanel]:
    """The panels of a file, in its order.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no result of `experiments.layer_profile`, or one of images of another size than CIFAR's.
    """
    cure = "give a file that experiments.layer_profile --json has written."
    try:
        body = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"profile={file} does not exist; {cure}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"profile={file} is no JSON; {cure}") from None
    try:
        size, batch_size, rows = body["image_size"], int(body["batch_size"]), body["results"]
        for row in rows:
            if wrong := [k for k in _NUMBERS if not isinstance(row[k], int | float)]:
                raise ValueError(f"profile={file}: {wrong[0]}={row[wrong[0]]!r} is not a number; {cure}")
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            model, block_shape, distribution = (row[name] for name in _TEXTS)
            groups.setdefault((model, block_shape, distribution), []).append(row)
        settings = {name: body[name] for name in ("dtype", "implementation")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"profile={file} has not all fields of a profile (at {error}); {cure}") from None
    if size != IMAGE_SIZE:
        raise ValueError(f"profile={file} is of images of {size}x{size}, CIFAR's are {IMAGE_SIZE}x{IMAGE_SIZE}; "
                         f"profile with --image_size={IMAGE_SIZE}.")  # fmt: skip
    if not 1 <= batch_size <= TRAIN_IMAGES:
        raise ValueError(f"profile={file}: batch_size={batch_size} is not in 1..{TRAIN_IMAGES}; {cure}")
    steps = TRAIN_IMAGES // batch_size
    panels = []
    for (model, block_shape, distribution), group in groups.items():
        terms = ProfileTerms(block_shape, distribution, batch_size, **settings, device=_device(body))
        times = [
            EpochTime(
                row["sparsity"],
                steps * row["estimated_step_s"] if row["estimated_step_s"] > 0 else None,
                steps * row["measured_step_s"],
            )
            for row in sorted(group, key=lambda row: row["sparsity"])
        ]
        dense_s, torch = steps * group[0]["dense_step_s"], group[0].get("torch_step_s")
        torch_s = steps * torch if isinstance(torch, int | float) else None
        panels.append(TimePanel(model, int(body.get("num_classes", 10)), terms, file, dense_s, torch_s, tuple(times)))
    return panels


def _device(body: dict[str, Any]) -> str:
    """The device's name; for a CPU, which jax does not name, its kind and the cores that were used."""
    environment = body.get("environment", {})
    name = str(environment.get("device", "unknown device"))
    if name != "cpu":
        return name
    cores = body.get("cores") or environment.get("cores", "?")
    return f"{cores} {'core' if cores == 1 else 'cores'}, {environment.get('machine', '?')}"


def rows_of(panels: Iterable[TimePanel], num_classes: int) -> tuple[list[list[TimePanel]], list[str]]:
    """Rows of equal terms, panels by model (the paper's first), and notes on what is left out.

    Where two files have the same panel, the one with more sparsities counts, of equals the first.
    """
    best: dict[tuple[ProfileTerms, str], TimePanel] = {}
    notes = []
    for panel in panels:
        if panel.num_classes != num_classes:
            continue
        key = (panel.terms, panel.model)
        if key in best:
            keep, drop = best[key], panel
            if len(panel.times) > len(keep.times):
                keep, drop = drop, keep
            notes.append(f"{drop.file}: {drop.model} left out, {keep.file} has it on the same terms")
            panel = keep
        best[key] = panel

    def order(model: str) -> tuple[int, str]:
        return (MODELS.index(model) if model in MODELS else len(MODELS)), model

    rows: dict[ProfileTerms, list[TimePanel]] = {}
    for (terms, _), panel in sorted(best.items(), key=lambda item: order(item[0][1])):
        rows.setdefault(terms, []).append(panel)
    return list(rows.values()), notes


def missing_points(row: Sequence[TimePanel]) -> dict[str, list[float]]:
    """Model of the paper -> sparsities of the paper's figure that a row of it does not have."""
    have = {panel.model: panel.missing for panel in row}
    return {model: gaps for model in MODELS if (gaps := have.get(model, list(SPARSITIES)))}


def commands(row: Sequence[TimePanel], num_classes: int, out: Path) -> list[str]:
    """What profiles the models whose points a row does not have, on its terms (by default the program's).

    A model is profiled at all of its sparsities again: a panel's times come from one file.
    """
    terms = row[0].terms if row else ProfileTerms()
    measured = {panel.model: {time.sparsity for time in panel.times} for panel in row}
    by_sparsities: dict[tuple[float, ...], list[str]] = {}
    for model in missing_points(row):
        wanted = tuple(sorted({*SPARSITIES, *measured.get(model, ())}))
        by_sparsities.setdefault(wanted, []).append(model)
    made = []
    for sparsities, models in by_sparsities.items():
        chosen = terms.chosen() | ({} if num_classes == 10 else {"num_classes": num_classes})
        name = "_".join(["profile", *models, *(str(value) for value in chosen.values())])
        flags = [f"--{name}={value}" for name, value in chosen.items()]
        made.append(
            shlex.join(
                ["python", "-m", "experiments.layer_profile", f"--models={','.join(models)}",
                 f"--sparsities={','.join(f'{s:g}' for s in sparsities)}", *flags, f"--json={out / name}.json"]
            )
        )  # fmt: skip
    return made
