"""card.md: a page for the run of every method, whose commands are right and whose figures say what they are of."""

import argparse
import dataclasses
import re
import shlex

import pytest

import training.__main__
from training import card, config, data, papers
from training.config import IMAGE_PRESETS, PRESETS
from training.runfolder import finish, open_folder

CLUSTERS = {"acc": 0.81234, "nmi": 0.7, "ari": 0.6, "acc_head": 0.9, "acc_med": 0.8, "acc_tail": 0.5, "n": 100, "baselines": {"kmeans": {}}}
IMAGES = {
    "fid": 12.3456, "fid_head": 20.0, "fid_med": 30.0, "fid_tail": None, "is": 6.5, "precision": 0.9, "recall": 0.8, "memorisation": 0.7,
    "n": 200, "reference": "digits, n = 1797", "guidance": 0.5, "features": "classifier-digits-0", "baselines": {},
    "remarks": {"fid_tail": "too few"},
}  # fmt: skip
REPORTS = {
    "dgd": {**CLUSTERS, "latents": "auto encoder, d = 32"}, "cludi": {**CLUSTERS, "features": "encoder, d = 32"},
    "diffrc": {
        "top1": 0.912, "top1_many": 0.95, "top1_med": 0.9, "top1_few": 0.8, "test": "digits-test, n = 596", "baselines": {"softmax": {}},
    },
    **dict.fromkeys(IMAGE_PRESETS, IMAGES),
}  # fmt: skip


def page_of(method, folder, report=None, **changes):
    preset = PRESETS[method]["short"]
    settings = dataclasses.replace(preset, out=str(folder), **changes)
    dataset = data.load(settings.dataset, imbalance_ratio=settings.imbalance_ratio)
    report = REPORTS[method] if report is None else report
    finish(open_folder(method, settings, preset, dataset), {"method": method, "seconds": 1.5, **report})
    return (folder / "card.md").read_text()


@pytest.mark.parametrize("method", PRESETS)
def test_a_page_says_what_there_is_to_know(method, tmp_path):
    page = page_of(method, tmp_path / "a run", seed=3, batch_size=32)
    report, lines = REPORTS[method], page.splitlines()
    assert len(lines) <= 30 and lines[0] == f"# {method.upper()} on {PRESETS[method]['short'].dataset}, seed 3"
    settings = next(line for line in lines if line.startswith("**Not the default:**"))
    assert "batch_size 32 (user)" in settings and "seed 3 (user)" in settings and "lr" not in re.findall(r"\w+", settings)
    own = {"dgd": "joint_epochs 6", "cludi": "steps 60", "diffrc": "source_steps 300", "analytic": "samples 200"}.get(method, "steps 800")
    assert f"{own} (ours)" in settings, "of the preset"
    heads, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[7], lines[9]))
    figures = {name: value for name, value in report.items() if name in card.FIGURES and value is not None}
    assert dict(zip(heads, values, strict=True)) == {name: f"{value:.3g}" for name, value in figures.items()}
    for name in ("n", "reference", "features", "test", "latents", *report["baselines"]):
        assert str(report.get(name, "")) in page
    if "guidance" in report:
        assert "omega = 0.5" in page and "remarks in metrics.json on fid_tail" in page
    assert papers.bibtex(method) in page and "**Limits:**" in page


class Parsed(Exception):
    pass


@pytest.mark.parametrize("method", PRESETS)
def test_its_commands_are_commands(method, tmp_path, monkeypatch, capsys):
    page = page_of(method, tmp_path / "a run")
    real, run_of = argparse.ArgumentParser.parse_args, []

    def parse_args(parser, *args, **rest):
        run_of.append(str(getattr(real(parser, *args, **rest), "run", tmp_path / "a run")))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(training.__main__, "stoppable", lambda job, again: run_of.append(again) or 0)
    commands = re.search(r"```sh\n(.*?)```", page, re.DOTALL)[1].splitlines()
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)
        assert words[:3] == ["python", "-m", "training"]
        try:
            assert training.__main__.main(words[3:]) == 0, capsys.readouterr().err
        except Parsed:
            pass
    assert len(run_of) == len(commands) and all("a run" in one for one in run_of)


def test_without_figures_it_says_so(tmp_path):
    assert "Not evaluated." in page_of("t2h", tmp_path / "run", {"baselines": {}})


def test_a_run_of_defaults_differs_in_nothing(tmp_path):
    folder = tmp_path / "run"
    settings = config.DGDConfig(out=str(folder))
    finish(open_folder("dgd", settings, settings, data.load("digits-lt")), {"method": "dgd", **REPORTS["dgd"]})
    assert "**Not the default:** nothing." in (folder / "card.md").read_text()
