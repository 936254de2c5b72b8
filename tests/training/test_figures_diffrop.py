"""The figures of 002: what the landscapes' minima are, which runs the tables are made of and share, guidance swept over runs."""

import json

import pytest
import torch
from PIL import Image

from training import checkpoint, config, evaluate, figures_diffrop, figures_runs, plots, run_images
from training.__main__ import main
from training.runfolder import open_folder

COMMAND = ["figures", "diffrop", "--no-progress", "--out"]


def read(folder, part):
    with Image.open(folder / f"{part}.png") as image:
        assert image.format == "PNG"
    return json.loads((folder / f"{part}.json").read_text())


# ---- landscapes ------------------------------------------------------------------------------------------------------


def test_landscape(tmp_path, capsys):
    """Negative L2 moves the minimum as the closed form says, to infinity in the end; a hinge below the divergence does not (R11)."""
    assert main([*COMMAND, str(tmp_path), "--parts", "landscape"]) == 0
    text, lines = capsys.readouterr().out, read(tmp_path, "landscape")["lines"]
    for tau, m1, m2 in ((".01", -0.026667, 2.506667), (".02", -0.072727, 3.381818), (".04", -0.533333, 12.133333)):
        own = lines[f"negative L2, τ = {tau}"]
        assert own["argmin"] == pytest.approx([m1, m2], abs=2e-6)
        assert own["distance"] == pytest.approx((m1**2 + (m2 - 2) ** 2) ** 0.5, abs=1e-5)
    assert lines["negative L2, τ = .0475"]["argmin"] is None and "| negative L2, τ = .0475: no minimum | - | - | - |" in text
    for name in ("plain", "hinge, τ = .2, margin 4"):
        assert lines[name]["argmin"] == pytest.approx([0, 2], abs=1e-6) and f"| {name} | 0.000 | 2.000 | 0.000 |" in text
    moved = [lines[f"{name}, τ = .2"]["distance"] for name in ("exponential", "reciprocal")]
    assert 0.05 < moved[0] < moved[1] < 0.3 and lines["hinge, τ = .2, margin 8"]["distance"] > 0.5
    assert (tmp_path / "figures.md").read_text().strip() == text.strip()


# ---- tables ----------------------------------------------------------------------------------------------------------


class Runs:
    """`run_images.images` without the training: writes the folder of a finished run, whose figures say which run it was."""

    def __init__(self):
        self.made = {}

    def __call__(self, method, settings, preset):
        dataset = run_images.load(method, settings)
        out = open_folder(method, settings, preset, dataset)
        number = len(self.made) + 1.0
        self.made[out.name] = (method, settings)
        report = {"features": "a classifier", "n": 200, "reference": "digits", "guidance": settings.omega, "seconds": 1.0}
        report |= {"class_fid": [number]} | {figure: number for figure in evaluate.SCORES}
        checkpoint.write_json(out / "metrics.json", report)
        return report


@pytest.fixture
def runs(monkeypatch):
    made = Runs()
    monkeypatch.setattr(run_images, "images", made)
    return made


def test_tables_share_runs_that_processes_may_make_seed_by_seed(tmp_path, capsys, runs):
    command = [*COMMAND, str(tmp_path), "--steps", "70", "--parts", "table", "forms", "tau", "--seeds"]
    assert main([*command, "3"]) == 0 and len(runs.made) == 13
    alone = read(tmp_path, "table")
    assert alone["seeds"] == [3] and alone["table"]["cbdm-diffrop"]["fid"] == [8]
    assert main([*command, "4"]) == 0 and len(runs.made) == 26
    capsys.readouterr()
    assert main([*command, "3", "4"]) == 0 and len(runs.made) == 26  # only collects
    text = capsys.readouterr().out
    table, forms, tau = (read(tmp_path, part) for part in ("table", "forms", "tau"))
    assert list(table["table"]) == list(figures_diffrop.TABLE) and table["table"]["diffrop"]["fid"] == [6, 19]
    assert forms["table"]["diffrop"] == tau["table"]["diffrop"] == table["table"]["diffrop"]
    assert forms["table"]["ddpm"] == tau["table"]["ddpm"] == table["table"]["ddpm"]
    assert [forms["table"][name]["fid"][0] for name in ("negative-l2", "hinge", "reciprocal")] == [9, 10, 11]
    assert [tau["table"][name]["fid"][0] for name in ("const", "linear")] == [12, 13]
    assert all(settings.steps == 70 for _, settings in runs.made.values())
    assert (
        text.count("seeds 3, 4; 200 samples, guidance 0.5, features: a classifier") == 3 and "| CBDM + DiffROP | 14.500 ± 9.192 |" in text
    )
    assert main([*command, "3", "--omega", "1.5"]) == 2
    assert "figures diffrop: " + str(tmp_path / "ddpm-3") in (words := capsys.readouterr().err) and "omega: 0.5 != 1.5" in words


def test_rows_are_what_their_names_say(tmp_path, runs):
    """Whatever variant the command line asks for elsewhere; what no row is about holds for all."""
    asked = ["--base", "cbdm", "--cb-tau", ".5", "--pcl-form", "hinge", "--pcl-margin", "3", "--pcl-tau-temp", ".2", "--pcl-tau0", "7"]
    asked += ["--batch-resample", "sqrt", "--loss-weight", "inverse", "--augment", "diffaug", "--pcl-group-size", "4", "--seeds", "0"]
    assert main([*COMMAND, str(tmp_path), "--parts", "table", "forms", "tau", *asked]) == 0
    rows = {name.removesuffix("-0"): made for name, made in runs.made.items()}
    plain = {name: (one.batch_resample, one.loss_weight, one.augment) for name, (_, one) in rows.items()}
    changed = {"rs": ("balanced", "none", "none"), "sqrt-rs": ("sqrt", "none", "none")}
    changed |= {"reweight": ("none", "inverse", "none"), "diffaug": ("none", "none", "diffaug")}
    assert plain == {name: changed.get(name, ("none", "none", "none")) for name in figures_diffrop.METHODS}
    assert {name for name, (method, _) in rows.items() if method == "ddpm"} == {"ddpm", *changed}
    assert rows["cbdm"][0] == "cbdm" and rows["cbdm"][1].cb_tau == 0.5
    terms = {
        name: (one.base, one.cb_tau, one.pcl_form, one.pcl_margin, one.pcl_tau_schedule, one.pcl_tau_temp)
        for name, (method, one) in rows.items() if method == "diffrop"
    }  # fmt: skip
    assert terms == {
        "diffrop": ("ddpm", 1.0, "exponential", None, "exp", 0.2),
        "cbdm-diffrop": ("cbdm", 0.5, "exponential", None, "exp", 0.2),
        "negative-l2": ("ddpm", 1.0, "negative_l2", None, "exp", 0.2),
        "reciprocal": ("ddpm", 1.0, "reciprocal", None, "exp", 0.2),
        "hinge": ("ddpm", 1.0, "hinge", figures_diffrop.MARGIN, "exp", 0.2),
        "const": ("ddpm", 1.0, "exponential", None, "const", 0.3),
        "linear": ("ddpm", 1.0, "exponential", None, "linear", 0.3),
    }
    assert all((one.pcl_tau0, one.pcl_group_size) == (7, 4) for method, one in rows.values() if method == "diffrop")


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(monkeypatch):
    """Four coordinates of a projection in place of the classifier, which would have to be trained."""
    matrix = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    project = lambda x: ((y := x.float().flatten(1) / 255 @ matrix)[:, :4], y)  # noqa: E731
    monkeypatch.setattr(evaluate, "net_of", lambda reference, settings: evaluate.FeatureNet("projection", project))


def swept_panels(folder):
    return json.loads((folder / "omega.json").read_text())["panels"]


def test_guidance(tmp_path, capsys, monkeypatch, features):
    """At the run's own w the sweep has the run's own figures, so its noise is the run's; nothing is sampled twice."""
    tiny = ["--steps", "8", "--batch-size", "16", "--width", "8", "--samples", "60", "--sample-steps", "3", "--timesteps", "50"]
    tiny += ["--omega", ".8", "--cache", str(tmp_path / "cache"), "--omegas", ".8", "3"]
    monkeypatch.setattr(evaluate.metrics, "prd", lambda *args, **options: (0.5, 0.5))  # it and pictures are most of the time
    monkeypatch.setattr(evaluate, "draw", lambda *args: None)
    monkeypatch.setattr(plots, "tiles", lambda *args: None)
    monkeypatch.setattr(plots, "loss_curves", lambda *args: None)
    command = [*COMMAND, str(tmp_path / "out"), "--parts", "omega", *tiny, "--seeds"]
    assert main([*command, "0", "1"]) == 0
    text, panels = capsys.readouterr().out, read(tmp_path / "out", "omega")["panels"]
    assert list(panels) == list(figures_diffrop.SWEPT) and list(panels["fid"]) == ["DDPM", "+ DiffROP", "CBDM", "CBDM + DiffROP"]
    for name in figures_diffrop.GUIDED:
        own = [json.loads((tmp_path / "out" / f"{name}-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
        for figure in figures_diffrop.SWEPT:
            assert panels[figure][figures_diffrop.NAMES[name]]["0.8"] == [one[figure] for one in own]
        assert own[0]["f8"] == 0.5 and panels["fid"][figures_diffrop.NAMES[name]]["3"] != [one["fid"] for one in own]
    swept = json.loads((tmp_path / "out" / "ddpm-1" / "omega-3" / "metrics.json").read_text())
    assert swept["guidance"] == 3 and swept["f8"] is None and swept["remarks"]["f8"] == "not asked for"
    assert "seeds 0, 1; 60 samples, features: projection" in text and "| fid, digits-lt, ω = | 0.8 | 3 |" in text

    monkeypatch.setattr(run_images, "sample_run", lambda *args, **options: pytest.fail("sampled again"))
    monkeypatch.setattr(plots, "curves", lambda *args, **options: None)
    assert main([*command, "1"]) == 0 and swept_panels(tmp_path / "out")["fid"]["CBDM"]["3"] == panels["fid"]["CBDM"]["3"][1:]
    capsys.readouterr()

    of = [str(tmp_path / "out" / name) for name in ("cbdm-1", "diffrop-0")]
    chosen = [*COMMAND, str(tmp_path / "other"), "--parts", "omega", "--omegas", "3", ".8", "--runs", *of]
    assert main(chosen) == 0
    text, other = capsys.readouterr().out, swept_panels(tmp_path / "other")["fid"]
    assert other == {of[0]: {"3": panels["fid"]["CBDM"]["3"][1:], "0.8": panels["fid"]["CBDM"]["0.8"][1:]}, of[1]: other[of[1]]}
    assert other[of[1]]["3"] == panels["fid"]["+ DiffROP"]["3"][:1]
    assert text.startswith("60 samples, features: projection") and f"| {of[0]} | {other[of[0]]['3'][0]:.3f} |" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (["--parts", "nonsense"], "invalid choice: 'nonsense'"),
        (["--runs", "runs/some"], "figures diffrop: --runs needs --parts omega, which alone reads them; got --parts landscape table"),
        (["--parts", "omega", "--runs", "none/such"], "figures diffrop: expected a finished run; there is no none/such/metrics.json"),
        (["--parts", "omega", "--runs", "some", "some"], "--runs must name different folders; got some, some"),
    ],
)
def test_wrong_calls(tmp_path, capsys, words, message):
    try:
        code = main([*COMMAND, str(tmp_path), *words])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", config.IMAGE_PRESETS["diffrop"].values(), ids=config.IMAGE_PRESETS["diffrop"])
def test_every_row_can_be_made_of_every_preset(preset):
    for method, own in figures_diffrop.METHODS.values():
        assert figures_runs.configured(method, preset, **own).dataset == preset.dataset
