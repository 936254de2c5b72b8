"""`zoo`: which runs it makes, keeps and goes on with. The runs themselves are stood in for; their own tests make them."""

import pytest

import training.__main__
from training import config, data, run, run_cludi, run_diffrc, run_images
from training.__main__ import main
from training.config import PRESETS
from training.loop import Interrupted
from training.runfolder import finish, open_folder

FIGURES = {"dgd": {"acc": 0.75}, "cludi": {"acc": 0.5}, "diffrc": {"top1": 0.95}}


class Runs:
    """What every method's run function was called with; `stop`: a method that is interrupted once, after its folder was made."""

    def __init__(self):
        self.made, self.stop = [], None

    def __call__(self, method, settings, preset):
        self.made.append((method, settings, preset))
        report = {"method": method, "seconds": 2.0, "baselines": {}, "n": 200, **FIGURES.get(method, {"fid": 12.5, "guidance": 0.5})}
        dataset = data.load(settings.dataset, imbalance_ratio=settings.imbalance_ratio)
        folder = open_folder(method, settings, preset, dataset)
        if method == self.stop:
            self.stop = None
            raise Interrupted(2, "stage", 1)
        finish(folder, report)
        return {**report, "dataset": dataset.name, "counts": list(dataset.counts)}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    made = Runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_images, "images", made)
    for module, name in ((run, "dgd"), (run_cludi, "cludi"), (run_diffrc, "diffrc")):
        monkeypatch.setattr(module, name, lambda settings, preset, name=name: made(name, settings, preset))
    return made


def test_every_method_is_run_once_and_told(runs, tmp_path, capsys):
    assert main(["zoo", "--preset", "short", "--seed", "4", "--no-progress"]) == 0
    assert [method for method, *_ in runs.made] == list(PRESETS)
    for method, settings, preset in runs.made:
        assert preset == PRESETS[method]["short"] and not settings.resume and not settings.progress and settings.seed == 4
        assert settings.out == f"runs/zoo/{method}" and (tmp_path / settings.out / "card.md").exists()
        assert settings.dataset == ("digits-train-lt" if method == "diffrc" else "digits-lt")
    lines = capsys.readouterr().out.splitlines()[-len(PRESETS) :]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert lines[0] == "dgd      acc 0.75; n = 200; 2 s; runs/zoo/dgd/card.md" and "fid 12.5; n = 200; omega = 0.5" in lines[2]

    assert main(["zoo", "--preset", "short", "--seed", "4"]) == 0 and len(runs.made) == len(PRESETS), "what is finished was run again"
    assert capsys.readouterr().out.splitlines()[-len(PRESETS) :] == lines


def test_what_was_stopped_goes_on_and_nothing_before_it(runs, capsys):
    runs.stop = "t2h"
    assert main(["zoo", "--preset", "short"]) == 130
    stopped = [method for method, *_ in runs.made]
    assert stopped == list(PRESETS)[: len(stopped)] and stopped[-1] == "t2h" and "stopped in t2h" in capsys.readouterr().err
    assert main(["zoo", "--preset", "short"]) == 0
    again = runs.made[len(stopped) :]
    later = list(PRESETS)[len(stopped) :]
    assert [(method, settings.resume) for method, settings, _ in again] == [("t2h", True), *((method, False) for method in later)]


def test_a_run_of_other_settings_is_neither_told_nor_gone_on_with(runs, capsys):
    assert main(["zoo", "--preset", "short"]) == 0
    capsys.readouterr()
    assert main(["zoo"]) == 2 and len(runs.made) == len(PRESETS)
    words = capsys.readouterr()
    assert "error: zoo: runs/zoo/dgd is a run of other settings (encoder_epochs: 10 != 50" in words.err and "acc" not in words.out
    assert main(["zoo", "--out", "runs/other"]) == 0 and len(runs.made) == 2 * len(PRESETS)
    assert [preset for _, _, preset in runs.made[len(PRESETS) :]] == [presets["default"] for presets in PRESETS.values()]


def test_the_first_error_ends_it(runs, monkeypatch, capsys):
    def fails(method, settings, preset):
        raise ValueError(f"{method}: broken")

    monkeypatch.setattr(run_images, "images", fails)
    assert main(["zoo", "--preset", "short"]) == 2 and [method for method, *_ in runs.made] == ["dgd", "cludi"]
    assert "ddpm: broken" in capsys.readouterr().err


def test_presets_are_those_of_the_commands():
    assert set(config.PRESETS) <= set(training.__main__.COMMANDS)
    for method, presets in config.PRESETS.items():
        assert len({type(preset) for preset in presets.values()}) == 1 and {"default", "short"} <= set(presets), method
