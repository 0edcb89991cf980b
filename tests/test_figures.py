"""The figures' points by hand: means, deviations, what belongs together, what is missing and what makes it."""

import dataclasses
import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from dsb_jax.training.config import LEAST_ADAPTATIONS
from experiments import epoch_times, figure_data, figure_drawings, figures, grid, sweep, sweep_commands
from experiments.epoch_times import EpochTime
from experiments.figure_data import BLOCK_AWARE, BLOCKS, METHODS, PANEL_COLUMNS, WITHOUT_RULE, Statistic

ROOT = Path(__file__).parent.parent
DIGITS = grid.preset_runs("digits")
STEPS = 1056  # of a run of digits


def write(root, run, accuracy, adaptations=(), **config):
    """A finished run; `adaptations` are (step, turnover, exploration)."""
    folder = grid.workdir(root, run)
    folder.mkdir(parents=True)
    summary = {"config": run.config.to_json() | {"total_steps": STEPS} | config, "test_accuracy": accuracy}
    (folder / "summary.json").write_text(json.dumps(summary))
    if adaptations:
        lines = [{"kind": "train", "step": 1, "loss": 2.0}]
        lines += [{"kind": "adapt", "step": s, "turnover": t, "exploration": e} for s, t, e in adaptations]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ad')
    return folder


def digits_run(seed=0, **values):
    return grid.make_run({"method": "dsb", "sparsity": 0.9, "granularity": "block", **values}, seed)


def panel_of(root, variants=METHODS, **fixed):
    found, notes = figure_data.read_runs([root])
    assert notes == []
    return figure_data.make_panel(found, "digits", "convnet", variants, fixed)


def test_mean_and_deviation_by_hand(tmp_path):
    for seed, accuracy in enumerate((0.9, 0.92, 0.97)):
        write(tmp_path, digits_run(seed), accuracy)
    write(tmp_path, digits_run(block_aware_drop=False), 0.8)
    write(tmp_path, digits_run(method="dense"), 0.99)
    panel = panel_of(tmp_path)
    std = ((0.03**2 + 0.01**2 + 0.04**2) / 2) ** 0.5
    assert panel.accuracy(BLOCKS) == {0.9: Statistic(pytest.approx(0.93), pytest.approx(std), 3)}
    assert panel.accuracy("dense") == {None: Statistic(0.99, None, 1)}  # it has no sparsity
    assert panel.accuracy("ssb") == {}
    panel = panel_of(tmp_path, BLOCK_AWARE)
    assert panel.accuracy(BLOCKS)[0.9].mean == pytest.approx(0.93)
    assert panel.accuracy(WITHOUT_RULE) == {0.9: Statistic(0.8, None, 1)}
    assert panel.num_runs == 4


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    write(tmp_path, digits_run(), 0.9)
    for settings_ in ({"block_shape": "32x8"}, {"grow": "norm"}, {"epochs": 3}, {"granularity": "panel_column"}):
        write(tmp_path, digits_run(**settings_), 0.1)
    # What has no effect on a method does not part it from the others.
    write(tmp_path, digits_run(method="rigl"), 0.7, grow="norm")
    panel = panel_of(tmp_path)
    assert panel.accuracy(BLOCKS) == {0.9: Statistic(0.9, None, 1)}
    assert panel.accuracy("rigl") == {0.9: Statistic(0.7, None, 1)}
    assert panel.accuracy(PANEL_COLUMNS) == {0.9: Statistic(0.1, None, 1)}  # a curve of its own
    found, _ = figure_data.read_runs([tmp_path])
    place = ("digits", "convnet")
    assert figure_data.other_settings(found, [panel]) == {
        (*place, "block_shape=32x8"): 1, (*place, "grow=norm"): 1, (*place, "epochs=3"): 1
    }  # fmt: skip
    tall = panel_of(tmp_path, block_shape=(32, 8))
    assert tall.accuracy(BLOCKS) == {0.9: Statistic(0.1, None, 1)}
    assert tall.accuracy("rigl") == {}


def test_a_panel_takes_the_terms_of_most_runs(tmp_path):
    write(tmp_path, digits_run(), 0.9)
    for seed in (0, 1):
        write(tmp_path, digits_run(seed, epochs=3), 0.6)
    panel = panel_of(tmp_path)
    assert panel.terms["epochs"] == 3
    assert panel.accuracy(BLOCKS)[0.9].n == 2
    # What is missing is missing on these terms, whatever the preset has.
    assert {run.config.epochs for runs in panel.missing.values() for run in runs} == {3}
    assert figure_data.make_panel({}, "digits", "convnet", METHODS).terms["epochs"] == 24
    assert figure_data.make_panel({}, "mnist", "convnet", METHODS) is None


def test_the_interval_of_a_short_run_of_photographs_is_its_default(tmp_path):
    run = grid.make_run({"dataset": "cifar10", "epochs": 2}, 0)
    assert run.config.update_interval == 100
    steps = 2 * 390
    config = run.config.to_json() | {"total_steps": steps, "update_interval": steps // 2 // LEAST_ADAPTATIONS}
    assert figure_data.run_of(config) == run
    other = figure_data.run_of(config | {"update_interval": 7})
    assert other == grid.make_run({"dataset": "cifar10", "epochs": 2, "update_interval": 7}, 0)


def test_summaries_that_cannot_be_used_are_told(tmp_path):
    folder = write(tmp_path / "a", digits_run(), 0.9)
    again = write(tmp_path / "b", digits_run(), 0.5)
    odd = write(tmp_path / "b", digits_run(1), 0.5, a_field_of_the_future=1)
    found, notes = figure_data.read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert [outcome.folder for outcome in found.values()] == [folder]
    assert len(notes) == 2
    assert str(again) in notes[0]
    assert "the same run" in notes[0]
    assert str(odd) in notes[1]
    assert "a_field_of_the_future" in notes[1]
    with pytest.raises(FileNotFoundError, match="nothing"):
        figure_data.read_runs([tmp_path / "nothing"])


def test_what_is_missing_and_the_commands_that_make_it(tmp_path):
    lacking = {digits_run(3, block_aware_drop=False)} | {
        digits_run(seed, method="ssb", sparsity=0.95) for seed in range(5)
    }
    for run in DIGITS:
        if run not in lacking:
            write(tmp_path, run, 0.9)
    panel = panel_of(tmp_path)
    assert list(panel.missing) == ["ssb"]
    (line,) = sweep_commands.commands(panel.missing["ssb"], "DIR")
    assert line == (
        "python -m experiments.sweep --root=DIR --preset=digits --methods=ssb --sparsities=0.95 "
        "--block_shapes=auto --seeds=0,1,2,3,4"
    )
    panel = panel_of(tmp_path, BLOCK_AWARE)
    assert panel.missing == {WITHOUT_RULE: [digits_run(3, block_aware_drop=False)]}
    (line,) = sweep_commands.commands(panel.missing[WITHOUT_RULE], "DIR")
    assert line == (
        # The rule has no effect on panel columns, so that a list of block_aware_drop alone would select those, too.
        "python -m experiments.sweep --root=DIR --preset=digits --methods=dsb --sparsities=0.9 "
        "--granularities=block --block_aware_drop=false --seeds=3"
    )
    # A grid that no preset has.
    runs = [digits_run(seed, method=method, momentum=0.5) for seed in (7, 8) for method in ("set", "rigl")]
    assert sweep_commands.commands(runs, "a folder") == [
        "python -m experiments.sweep '--root=a folder' --methods=rigl,set --sparsities=0.9 --seeds=7,8 "
        "--set=momentum=0.5"
    ]
    assert sweep_commands.commands([], "DIR") == []


def test_a_figure_of_the_paper_without_any_run_is_one_command():
    panels = figures.make_panels({}, {}, BLOCK_AWARE, at_least=2)
    assert [(panel.model, panel.num_runs) for panel in panels["cifar10"]] == [
        ("wrn-22-2", 0), ("resnet18", 0), ("vgg16", 0)
    ]  # fmt: skip
    planned = figures.plan_figure("figure14", panels["cifar10"], lambda: None, "DIR")
    assert (planned.have, planned.missing) == (0, 3 * 3 * 2 * 3)  # models, sparsities, variants, seeds
    assert planned.draw is None
    (line,) = planned.commands
    assert line == (
        "python -m experiments.sweep --root=DIR --preset=cifar_full --datasets=cifar10 "
        "--models=resnet18,vgg16,wrn-22-2 --methods=dsb --sparsities=0.8,0.9,0.95 --granularities=block "
        "--block_aware_drop=false,true --seeds=0,1,2"
    )


@pytest.fixture(scope="module")
def parse():
    """Command line -> the runs that the sweep makes of it, by its own flags."""
    values, patch = flags.FlagValues(), pytest.MonkeyPatch()
    with patch.context() as patch:
        for name in ("DEFINE_string", "DEFINE_list", "DEFINE_multi_string", "DEFINE_bool"):
            patch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
        sweep.define_flags()
        patch.setattr(sweep, "FLAGS", values)

        def runs(line):
            values.unparse_flags()
            values(shlex.split(line)[2:])
            return sweep.runs_from_flags()

        yield runs


# Of the preset, and of grids that no preset has.
SOME = st.sampled_from([*DIGITS, *grid.preset_runs("digits", override={"epochs": 3, "learning_rate": 0.1 + 0.2})])


@settings(max_examples=6)
@given(wanted=st.sets(SOME, min_size=1, max_size=8))
def test_commands_make_exactly_the_runs_each_once(parse, wanted):
    made = [run for line in sweep_commands.commands(wanted, "DIR") for run in parse(line)]
    assert sorted(made) == sorted(wanted)


def test_adaptations_are_means_over_the_seeds_by_hand(tmp_path):
    write(tmp_path, digits_run(0), 0.9, [(44, 0.2, 0.1), (88, 0.1, 0.3), (132, 0.5, 0.4)])
    write(tmp_path, digits_run(1), 0.9, [(44, 0.4, 0.2), (88, 0.2, 0.4)])
    write(tmp_path, digits_run(2), 0.9)  # without metrics
    outcomes = panel_of(tmp_path).runs[BLOCKS][0.9]
    curve = figure_data.adaptations(outcomes.values())
    assert curve.epochs == [1.0, 2.0]  # 1056 steps are 24 epochs; the third step is not known of all
    assert curve.turnover == [pytest.approx(0.3), pytest.approx(0.15)]
    assert curve.exploration == [pytest.approx(0.15), pytest.approx(0.35)]
    assert figure_data.adaptations([outcomes[2]]) is None


def profile(folder, name="profile.json", *, sparsities=(0.8, 0.9), models=("vgg16",), **settings_):
    """A file of `experiments.layer_profile` with a dense step of 0.2 s."""
    body = {
        "environment": {"device": "cpu", "cores": 2, "machine": "x86_64"}, "batch_size": 100, "image_size": 32,
        "dtype": "float32", "implementation": "auto", **settings_,
    }  # fmt: skip
    body["results"] = [
        {
            "model": model, "sparsity": sparsity, "block_shape": "16x16", "distribution": "uniform",
            "dense_step_s": 0.2, "estimated_step_s": 0.9 - sparsity, "measured_step_s": 1 - sparsity,
        }
        for model in models for sparsity in sparsities
    ]  # fmt: skip
    file = folder / name
    file.write_text(json.dumps(body))
    return file


def test_the_time_of_an_epoch_by_hand(tmp_path):
    (panel,) = epoch_times.read_profile(profile(tmp_path, sparsities=(0.95, 0.8)))
    assert panel.dense_s == pytest.approx(100)  # 50,000 // 100 = 500 steps of 0.2 s
    assert panel.times == (
        EpochTime(0.8, pytest.approx(50), pytest.approx(100)),
        EpochTime(0.95, None, pytest.approx(25)),  # an estimate below zero is none
    )
    assert panel.missing == [0.9]
    assert (panel.torch_s, panel.fastest_dense_s) == (None, panel.dense_s)
    assert panel.terms.device == "2 cores, x86_64"
    (panel,) = epoch_times.read_profile(profile(tmp_path, batch_size=128))
    assert panel.dense_s == pytest.approx(390 * 0.2)  # the last, incomplete batch is left out
    file = profile(tmp_path, cores=1)
    body = json.loads(file.read_text())
    for torch_step_s, fastest in ((0.1, 50), (0.3, 100)):
        body["results"][0]["torch_step_s"] = torch_step_s
        file.write_text(json.dumps(body))
        (panel,) = epoch_times.read_profile(file)
        assert (panel.torch_s, panel.fastest_dense_s) == (pytest.approx(500 * torch_step_s), pytest.approx(fastest))
        assert panel.terms.device == "1 core, x86_64"  # those that were used


def test_profiles_go_to_the_figure_of_their_classes(tmp_path):
    files = [profile(tmp_path, "10.json"), profile(tmp_path, "100.json", num_classes=100, sparsities=(0.8, 0.9, 0.95))]
    files += [
        profile(tmp_path, "more.json", sparsities=(0.7, 0.8, 0.9)),
        profile(tmp_path, "bf.json", dtype="bfloat16"),
    ]
    panels = [panel for file in files for panel in epoch_times.read_profile(file)]
    rows, notes = epoch_times.rows_of(panels, 10)
    # Two files of the same terms: the one with more points counts; other terms are a row of their own.
    assert [[panel.file.name for panel in row] for row in rows] == [["more.json"], ["bf.json"]]
    assert notes == [f"{files[0]}: vgg16 left out, {files[2]} has it on the same terms"]
    assert epoch_times.missing_points(rows[0]) == {
        "wrn-22-2": [0.8, 0.9, 0.95], "resnet18": [0.8, 0.9, 0.95], "vgg16": [0.95]
    }  # fmt: skip
    assert epoch_times.commands(rows[1], 10, Path("OUT")) == [
        "python -m experiments.layer_profile --models=wrn-22-2,resnet18,vgg16 --sparsities=0.8,0.9,0.95 "
        "--batch_size=100 --dtype=bfloat16 --json=OUT/profile_wrn-22-2_resnet18_vgg16_100_bfloat16.json"
    ]
    rows, _ = epoch_times.rows_of(panels, 100)
    assert [[panel.file.name for panel in row] for row in rows] == [["100.json"]]
    assert epoch_times.commands(rows[0], 100, Path("OUT")) == [
        "python -m experiments.layer_profile --models=wrn-22-2,resnet18 --sparsities=0.8,0.9,0.95 "
        "--batch_size=100 --num_classes=100 --json=OUT/profile_wrn-22-2_resnet18_100_100.json"
    ]
    assert epoch_times.commands([], 10, Path("OUT"))[0].endswith("--json=OUT/profile_wrn-22-2_resnet18_vgg16.json")


def test_files_that_are_no_profiles_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        epoch_times.read_profile(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="image_size=32"):
        epoch_times.read_profile(profile(tmp_path, image_size=8))
    with pytest.raises(ValueError, match="batch_size=0"):
        epoch_times.read_profile(profile(tmp_path, batch_size=0))
    file = tmp_path / "odd.json"
    for text, words in (("{", "no JSON"), ("[]", "not all fields"), ('{"image_size": 32}', "not all fields")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            epoch_times.read_profile(file)
    body = json.loads(profile(tmp_path).read_text())
    body["results"][0]["measured_step_s"] = "fast"
    file.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="measured_step_s='fast' is not a number"):
        epoch_times.read_profile(file)


def test_every_curve_has_a_style_of_its_own():
    labels = [variant.label for variant in (*METHODS, *BLOCK_AWARE)]
    styles = {label: json.dumps(figure_drawings.STYLES[label]) for label in labels}
    assert len(set(styles.values())) == len(styles)


@pytest.fixture
def call(monkeypatch):
    """Arguments -> the program's main with them."""
    values = flags.FlagValues()
    for name in ("DEFINE_string", "DEFINE_list", "DEFINE_multi_string"):
        monkeypatch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=values))
    figures.define_flags()
    monkeypatch.setattr(figures, "FLAGS", values)

    def main(*arguments):
        values.unparse_flags()
        values(["figures", *arguments])
        figures.main()

    return main


def test_the_program_draws_what_there_is_and_tells_what_is_missing(tmp_path, call, capsys):
    runs, out = tmp_path / "runs", tmp_path / "new" / "figures"
    for run in DIGITS:
        if run.seed < 2 and run.config.sparsity > 0.8 and "dense" not in run.config.method:
            write(runs, run, 0.9 + run.seed / 100, [(40, 0.2, 0.1), (80, 0.1, 0.2)])
    call(f"--root={runs}", f"--profile={profile(tmp_path, sparsities=(0.8, 0.9, 0.95))}", f"--out={out}")
    drawn = {"figure12_time_cifar10", "block_aware_digits", "accuracy_digits", "adaptation_digits_convnet"}
    assert {file.name for file in out.iterdir()} == {f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    for name in drawn:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    told = capsys.readouterr().out
    assert "figure13_time_cifar100: 0 points, not drawn\n  missing: 9 points\n" in told
    assert "figure15_block_aware_cifar100: 0 runs, not drawn\n  missing: 54 runs\n" in told
    # 3 sparsities x 5 seeds x 2 variants, of which 2 x 2 x 2 are there.
    assert "block_aware_digits: 8 runs" in told
    assert "\n  missing: 22 runs\n" in told
    assert f"    python -m experiments.sweep --root={runs} --preset=digits --methods=small_dense" in told
    assert "runs of digits, convnet are in no figure; draw them with --set=block_shape=32x8\n" in told


def test_legend_and_title_cover_nothing(tmp_path):
    for run in DIGITS:
        if run.seed < 2:
            write(tmp_path, run, 0.9 + run.seed / 100, [(40, 0.2, 0.1)])
    panel = panel_of(tmp_path)
    times = epoch_times.read_profile(profile(tmp_path, models=("vgg16", "wrn-22-2")))
    beside = [dataclasses.replace(panel, torch_s=panel.dense_s / 2) for panel in times]
    for figure in (
        figure_drawings.draw_accuracy([panel], [v.label for v in METHODS], "title", varied=("granularity",)),
        figure_drawings.draw_accuracy([panel] * 3, [v.label for v in METHODS], "title"),
        figure_drawings.draw_adaptations(panel, "title"),
        figure_drawings.draw_times([times], "title"),
        figure_drawings.draw_times([beside], "title"),
        figure_drawings.draw_times([beside[:1]], "title"),
        figure_drawings.draw_times([times, epoch_times.read_profile(profile(tmp_path, dtype="bfloat16"))], "title"),
    ):
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        boxes += [figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()]
        for i, box in enumerate(boxes):
            assert figure.bbox.padded(1).fully_containsx(box.x0), box
            assert figure.bbox.padded(1).fully_containsx(box.x1), box
            for other in boxes[:i]:
                assert not box.padded(-1).overlaps(other.padded(-1)), (box, other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "neither --root nor --profile"),
        (["--root=nothing"], "root=nothing is no folder"),
        (["--profile=nothing.json"], "nothing.json does not exist"),
        (["--root=.", "--set=grow"], "set='grow' is not NAME=VALUE"),
        (["--root=.", "--set=sparsity=0.9"], "the figures show every sparsity"),
        (["--root=.", "--set=epochs=many"], "epochs='many' is not a number"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, words, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        call("--out=out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_error_ends_the_program_in_a_line(tmp_path):
    (tmp_path / "out").write_text("something else")
    result = subprocess.run(
        [sys.executable, "-m", "experiments.figures", f"--root={tmp_path}", f"--out={tmp_path / 'out'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == f"error: out={tmp_path / 'out'} is a file; give a folder.\n"
    assert (tmp_path / "out").read_text() == "something else"
