"""The measurements of `experiments.gpu_check` beside goals and predictions, as JSON and as tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from experiments import gpu_smoke
from experiments.gpu_check_parts import HALF, TRAINED
from experiments.gpu_predictions import GEMM, Prediction, predictions

BOTH = "forward_backward"
REHEARSED = "rehearsed"  # stands where a measurement would: a rehearsal's numbers measure nothing
Done = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Goal:
    """A speed-up over dense that is wanted. `value` is None if it was not measured."""

    name: str
    wanted: float
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value >= self.wanted


def entries(done: Done, part: str) -> list[dict[str, Any]]:
    """The results of a part, as the benchmarks write them."""
    body = done.get(part, {}).get("results")
    return body.get("results", []) if isinstance(body, dict) else []


def kernel_entry(
    done: Done, part: str, block_shape: str, layer: str | None = None, *names: str
) -> dict[str, Any] | None:
    """The result of the fastest of the named implementations that was measured at a layer and block shape."""
    found = [
        each for each in entries(done, part)
        if each.get("block_shape") == block_shape and each.get("implementation") in names and "speedup" in each
        and layer in (None, each.get("layer"))
    ]  # fmt: skip
    return max(found, key=lambda each: each["speedup"].get(BOTH, 0), default=None)


def step_speedup(done: Done, part: str) -> float | None:
    """Of a training step; None unless sparse kernels could be used."""
    if done.get(part, {}).get("implementation") == "dense":
        return None
    return next((each["speedup"] for each in entries(done, part) if "speedup" in each), None)


def goals(done: Done) -> list[Goal]:
    """The goals beside what was measured; of the kernels, the best sparse implementation counts."""

    def kernel(block_shape: str, name: str) -> float | None:
        found = [
            each["speedup"][name]
            for part in (f"gemm {block_shape}", f"tuned gemm {block_shape}") for each in entries(done, part)
            if each["implementation"] in ("pallas", "triton") and name in each.get("speedup", {})
        ]  # fmt: skip
        return max(found, default=None)

    wanted = {("64x4", "forward"): 3.0, ("64x4", BOTH): 2.0, ("32x8", "forward"): 1.6, ("32x8", BOTH): 1.2}
    listed = [Goal(f"GEMM 4096^3, 0.9, {shape}, {name}", least, kernel(shape, name))
              for (shape, name), least in wanted.items()]  # fmt: skip
    listed += [
        Goal(f"training step, {model}, 0.9, {shape}", 1.3, step_speedup(done, f"training {model} {shape}"))
        for model, shape in TRAINED if shape == "64x4"
    ]  # fmt: skip
    model, shape = HALF
    half = step_speedup(done, f"training {model} {shape} 0.5")
    return [*listed, Goal(f"auto never slow, {model}, 0.5, {shape}", 0.97, half)]


def compared(done: Done, device: str) -> list[tuple[Prediction, float | None, float | None]]:
    """Each prediction with the measured microseconds (None for a training step) and speed-up (None: not measured)."""
    found: list[tuple[Prediction, float | None, float | None]] = []
    for each in predictions(device):
        if each.pass_name is None:
            found.append((each, None, step_speedup(done, each.part)))
            continue
        layer = None if each.layer == GEMM else each.layer  # the part of a GEMM has no other layer
        entry = kernel_entry(done, each.part, each.block_shape, layer, "pallas")
        if entry is None or each.pass_name not in entry["speedup"]:
            found.append((each, None, None))
            continue
        passes = entry["passes"]
        seconds = sum(p["s"] for p in passes.values()) if each.pass_name == BOTH else passes[each.pass_name]["s"]
        found.append((each, seconds * 1e6, entry["speedup"][each.pass_name]))
    return found


def body(done: Done, device: str, rehearse: bool) -> dict[str, Any]:
    """Goals and predictions for the file of results."""
    if rehearse:
        return {"goals": REHEARSED, "predictions": REHEARSED}
    return {
        "goals": [{**dataclasses.asdict(goal), "met": goal.met} for goal in goals(done)],
        "predictions": [
            {"name": each.name, "predicted_us": each.us, "measured_us": us, "predicted_speedup": round(each.speedup, 2),
             "measured_speedup": speedup}
            for each, us, speedup in compared(done, device)
        ],
    }  # fmt: skip


def outcome_text(name: str, outcome: Mapping[str, Any]) -> str:
    """One line on how a part ended."""
    text = str(outcome["error"] or "done")
    results = outcome.get("results", outcome.get(REHEARSED))
    if name == "tests" and isinstance(results, list):
        counts = {
            word: sum(line.get("outcome") == word for line in results) for word in ("passed", "failed", "skipped")
        }
        text = f"{', '.join(f'{count} {word}' for word, count in counts.items())}; {text}"
    elif outcome.get("tail") and outcome["error"] is None:
        text = outcome["tail"][-1].strip()
    if outcome.get("implementation") == "dense":
        text = f"with dense products: {text}"
    return text[:150]


def summary(done: Done, device: str, rehearse: bool) -> list[Table]:
    """Parts with their seconds; goals and predictions beside what was measured."""
    note = " - REHEARSAL on a CPU, no measurement" if rehearse else ""
    ran = Table(title=f"gpu-check{note}")
    for column in ("part", "seconds", "outcome"):
        ran.add_column(column, justify="right" if column == "seconds" else "left")
    for name, outcome in done.items():
        ran.add_row(name, f"{outcome['seconds']:.0f}", outcome_text(name, outcome))
    reached = Table(title=f"goals: speed-up over dense{note}")
    for column in ("goal", "at least", "measured", ""):
        reached.add_column(column, justify="left" if column == "goal" else "right")
    words = {True: "met", False: "missed", None: "not measured"}
    for goal in goals(done):
        value = "" if goal.value is None else f"{goal.value:.2f}x"
        reached.add_row(goal.name, f"{goal.wanted:g}x", *((REHEARSED, "") if rehearse else (value, words[goal.met])))
    held = Table(title=f"predictions by a model (kernels: for an H200) beside measurements{note}")
    for column in ("what", "predicted us", "measured us", "predicted", "measured"):
        held.add_column(column, justify="left" if column == "what" else "right")
    for each, us, speedup in compared(done, device):
        if each.part == "conv" and each.pass_name != BOTH:
            continue  # the file has them; on a screen they are too many
        predicted = f"{each.us:.0f}" if each.us is not None else ""
        measured = ("" if us is None else f"{us:.0f}", "" if speedup is None else f"{speedup:.2f}x")
        if rehearse:
            measured = "", REHEARSED
        held.add_row(each.name, predicted, measured[0], f"{each.speedup:.2f}x", measured[1])
    return [held, reached, ran]


def surprises(done: Done, expected: Mapping[str, str], rehearse: bool) -> list[str]:
    """The parts that did not end as expected, with what they did; "skipped" is no surprise."""
    found = [
        f"{name}: {outcome['end']} instead of {expected[name]}: {outcome['error']}"
        for name, outcome in done.items() if outcome["end"] not in (expected[name], "skipped")
    ]  # fmt: skip
    if rehearse and "smoke" in done:
        wrong = {str(case) for case in gpu_smoke.failed(done["smoke"].get(REHEARSED) or [])}
        wanted = {str(gpu_smoke.WRONG), str(gpu_smoke.DYING)}
        if wrong != wanted:
            found.append(f"smoke: wrong are {sorted(wrong)} instead of {sorted(wanted)}")
    return found
