"""The figures of 003: which runs an ablation is made of, and what is read from them."""

import json

import pytest
from PIL import Image

from training import checkpoint, config, figures_diffrc, run_diffrc
from training.__main__ import main
from training.config import DIFFRC_PRESETS
from training.runfolder import open_folder

TINY = (
    "--no-progress --source-steps 4 --target-steps 4 --encoder-steps 4 --width 16 --batch-size 16 --encoder-dim 8 --sample-steps 2 "
    "--classifier-steps 3"
)


class Runs:
    """`run_diffrc.diffrc` without the training: writes the folder of a finished run, whose figures say which run it was."""

    def __init__(self):
        self.made = []

    def __call__(self, settings, preset):
        dataset = run_diffrc.load(settings)
        out = open_folder("diffrc", settings, preset, dataset)
        self.made.append((out.name, settings))
        own = lambda number: {**dict.fromkeys(run_diffrc.SCORES, number), "per_class": [number] * 10}  # noqa: E731
        report = {**own(len(self.made) / 100), "test": "a test, n = 7", "counts": list(dataset.counts), "seconds": 1.0}
        report |= {"baselines": {"softmax": own(0.5), "balanced": own(0.6)}}
        by = "classifier" if settings.s == 0 else "guidance"
        report |= {"generated": {"kept": [4, 4], "alike": [4, len(self.made) % 4], "label_by": by}}
        checkpoint.write_json(out / "metrics.json", report)
        return report


@pytest.fixture
def runs(monkeypatch):
    made = Runs()
    monkeypatch.setattr(run_diffrc, "diffrc", made)
    return made


def test_table_of_runs(tmp_path, capsys, runs):
    command = "figures diffrc --parts table --target-steps 70 --seeds 3 4 --no-progress --out".split() + [str(tmp_path)]
    assert main(command) == 0
    text = capsys.readouterr().out
    by_name = dict(runs.made)
    assert len(runs.made) == 12 and all(one.target_steps == 70 for one in by_name.values())
    told = {name: (one.lam, one.s, one.guidance_sign, one.grad_norm) for name, one in by_name.items()}
    assert told["both-3"] == (0.5, 0.6, "descend", "rms") and told["plain-4"] == (0.0, 0.0, "descend", "rms")
    assert told["pdl-3"][:2] == (0.5, 0.0) and told["mpcl-4"][:2] == (0.0, 0.6)
    assert told["sign-3"][2:] == ("paper", "rms") and told["unit-3"][2:] == ("descend", "l2")
    assert by_name["pdl-4"].seed == 4 and by_name["pdl-4"].source == str(tmp_path / "both-4") and by_name["both-4"].source is None
    summary = json.loads((tmp_path / "table.json").read_text())
    assert summary["table"]["both"]["top1"] == [0.01, 0.07] and summary["table"]["softmax"]["top1"] == [0.5, 0.5]
    assert summary["table"]["both"]["alike"] == [5 / 8, 7 / 8] and summary["table"]["pdl"]["alike"] == [None, None]  # what labelled, judges
    assert summary["kept"]["unit"] == [8, 8] and "seeds 3, 4; a test, n = 7 images" in text
    assert "| + PDL + MPCL | 0.040 ± 0.042 |" in text and "| baseline: softmax, no images | 0.500 ± 0.000 |" in text
    for name in ("table", "per_class"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"

    assert main(command) == 0 and len(runs.made) == 12  # nothing is run again
    assert main([*command, "--tau", "0.1"]) == 2
    assert "was made with other settings (tau: 0.07 != 0.1); give another --out" in capsys.readouterr().err
    (tmp_path / "mpcl-4" / "metrics.json").unlink()
    assert main(command) == 0 and runs.made[-1][0] == "mpcl-4" and runs.made[-1][1].resume  # cut short: goes on


def test_sweeps_share_the_table_s_runs(tmp_path, capsys, runs):
    command = ["figures", "diffrc", "--seeds", "0", "1", "2", "--out", str(tmp_path), "--no-progress", "--parts"]
    assert main([*command, "table"]) == 0 and len(runs.made) == 18
    assert main([*command, "lam", "s"]) == 0
    new = dict(runs.made[18:])
    assert len(new) == 2 * 2 * 4  # two seeds, and the table's value is there
    assert new["lam0.9-1"].lam == 0.9 and new["s0.2-0"].s == 0.2 and new["s0.2-0"].lam == 0.5
    lam = json.loads((tmp_path / "lam.json").read_text())["panels"]["top1"]["lam"]
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert list(lam) == ["0.1", "0.3", "0.5", "0.7", "0.9"] and lam["0.5"] == table["both"]["top1"][:2]
    assert "top1_few, digits-train-lt | 0.2 | 0.4 | 0.6 | 0.8 | 1 |" in capsys.readouterr().out
    assert (tmp_path / "figures.md").read_text().count("a test, n = 7") == 3
    for name in ("lam", "s"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"


def test_images_of_real_runs(tmp_path):
    assert main(["figures", "diffrc", "--parts", "images", "--seeds", "1", "--out", str(tmp_path), *TINY.split()]) == 0
    assert json.loads((tmp_path / "images.json").read_text())["shown"]["both"] == {str(label): 6 for label in range(9, 2, -1)}
    with Image.open(tmp_path / "images-both.png") as image:
        assert image.format == "PNG"
    artefacts = [json.loads((tmp_path / f"{name}-1" / "artefacts.json").read_text()) for name in ("both", "pdl")]
    assert artefacts[0]["target"] == artefacts[1]["target"]
    both, pdl = (tmp_path / f"{name}-1" / "weights" / "target-000004.safetensors" for name in ("both", "pdl"))
    assert both.read_bytes() == pdl.read_bytes()


def test_arms_need_what_they_leave_out(tmp_path, capsys, runs):
    assert main(["figures", "diffrc", "--out", str(tmp_path / "x"), "--lam", "0"]) == 2
    assert "the arms leave out what lam and s > 0 put in; got lam=0, s=0.6" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_rows_are_named_and_differ():
    assert set(figures_diffrc.NAMES) == {*figures_diffrc.ARMS, *run_diffrc.BASELINES}
    settings = DIFFRC_PRESETS["default"]
    made = [tuple(sorted({**config.identity(settings), **own}.items(), key=lambda item: item[0])) for own in figures_diffrc.ARMS.values()]
    assert len(set(map(str, made))) == len(made)
