"""`figures gda`: classifiers of a long tail with generated images, and what is reused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ltkernels
from training import checkpoint, data, figures_gda, recognition, run_images
from training.__main__ import main
from training.recognition import Recipe
from training.runfolder import open_folder

LT = 390  # images of digits-train-lt, 20 : 1
COUNTS = (116, 83, 59, 42, 30, 21, 15, 11, 8, 5)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A recipe of a few steps, and a list of every classifier that was trained: (folder, images, labels)."""
    monkeypatch.setitem(recognition.RECIPES, "digits", Recipe(net="small", steps=2, batch_size=16, flip=False))
    trained, train = [], recognition.train

    def note(stage, folder, **settings):
        if checkpoint.latest(folder, stage.name) is None:
            trained.append((folder.name, stage.images, stage.labels))
        train(stage, folder, **settings)

    monkeypatch.setattr(recognition, "train", note)
    return trained


class Runs:
    """`run_images.images` without the training: 12 samples a class, real images of their class that the long tail need not have."""

    def __init__(self):
        self.made = []

    def __call__(self, method, settings, preset):
        dataset = run_images.load(method, settings)
        out = open_folder(method, settings, preset, dataset)
        self.made.append((out.name, method, settings))
        full = data.load("digits-train")
        rows = torch.cat([(full.labels == label).nonzero().flatten()[: settings.samples // 10] for label in range(10)])
        samples = ((full.images[rows] + 1) * 127.5).round().to(torch.uint8)
        run_images.write_samples(out, samples, full.labels[rows])
        checkpoint.write_json(out / "metrics.json", {"method": method, "seconds": 1.0})
        return {}


@pytest.fixture
def runs(monkeypatch):
    made = Runs()
    monkeypatch.setattr(run_images, "images", made)
    return made


def test_from_the_data_to_the_table(tmp_path, capsys):
    """Four models of a few steps each, their samples, six classifiers: everything that the command does."""
    command = ["figures", "gda", "--steps", "3", "--samples", "20", "--sample-steps", "2", "--width", "16", "--seeds", "7"]
    with ltkernels.backend("reference"):
        assert main([*command, "--out", str(tmp_path), "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "figures.md").read_text().strip() == text.strip() and "| + CBDM-DiffROP (410) |" in text
    summary = json.loads((tmp_path / "metrics.json").read_text())
    order = ["LT", "DDPM", "DiffROP", "CBDM", "CBDM-DiffROP", "full"]
    assert list(summary["table"]) == list(summary["images"]) == list(summary["per_class"]) == order
    assert [summary["images"][name] for name in order] == [[LT], *[[LT + 20]] * 4, [1201]] and summary["counts"] == list(COUNTS)
    for name in order:
        assert set(summary["table"][name]) == set(figures_gda.SCORES) and len(summary["per_class"][name][0]) == 10
    told = {name: json.loads((tmp_path / "runs" / f"{name}-7" / "config.json").read_text()) for name in order[1:-1]}
    assert [told[name]["method"] for name in told] == ["ddpm", "diffrop", "cbdm", "diffrop"]
    assert [told[name]["settings"]["base"]["value"] for name in ("DiffROP", "CBDM-DiffROP")] == ["ddpm", "cbdm"]
    for name in ("gda", "classes"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"


def test_what_the_classifiers_see(tmp_path, quick, runs):
    command = ["figures", "gda", "--rows", "DDPM", "CBDM", "--samples", "1110", "--out", str(tmp_path), "--no-progress", "--seeds", "3"]
    assert main(command) == 0
    assert [name for name, *_ in quick] == ["full-3", "LT-3", "DDPM-3", "CBDM-3"]
    seen = {name.removesuffix("-3"): (images, labels) for name, images, labels in quick}
    tail = data.load("digits-train-lt", imbalance_ratio=20, seed=3)
    assert torch.equal(seen["LT"][0], tail.images) and torch.equal(seen["full"][0], data.load("digits-train").images)
    samples, labels = (torch.from_numpy(np.load(tmp_path / "runs" / "DDPM-3" / f"{name}.npy")) for name in ("samples", "sample_labels"))
    assert torch.equal(seen["DDPM"][0][:LT], tail.images)
    torch.testing.assert_close(seen["DDPM"][0][LT:], samples.float() / 127.5 - 1)
    assert torch.equal(seen["DDPM"][1], torch.cat([tail.labels, labels]))
    test = data.test_set("digits-train-lt").images.flatten(1)
    for images, _ in seen.values():
        assert torch.cdist(images.flatten(1), test).min() > 0  # nobody trains on a test image

    filled = [*command, "--fill", "--out", str(tmp_path / "filled"), "--runs", str(tmp_path / "runs")]
    assert main(filled) == 0 and len(runs.made) == 2  # the runs are those that are there
    for name, images, classes in quick[4:]:
        if name in ("DDPM-3", "CBDM-3"):
            assert classes.bincount().tolist() == [116] * 10 and len(images) == 1160
    assert json.loads((tmp_path / "filled" / "metrics.json").read_text())["fill"]


def test_nothing_is_made_twice(tmp_path, capsys, quick, runs):
    command = ["figures", "gda", "--rows", "DDPM", "CBDM", "--samples", "50", "--out", str(tmp_path), "--no-progress", "--seeds"]
    assert main([*command, "0"]) == 0 and len(runs.made) == 2 and len(quick) == 4
    first = capsys.readouterr().out
    assert main([*command, "0"]) == 0 and len(runs.made) == 2 and len(quick) == 4 and capsys.readouterr().out == first
    assert main([*command, "0", "1"]) == 0 and [name for name, *_ in runs.made[2:]] == ["DDPM-1", "CBDM-1"] and len(quick) == 8
    assert "seeds 0, 1" in capsys.readouterr().out
    assert all(settings.seed == int(name[-1]) and not settings.evaluate for name, _, settings in runs.made)
    (tmp_path / "runs" / "CBDM-1" / "metrics.json").unlink()
    assert main([*command, "0", "1"]) == 0 and runs.made[-1][0] == "CBDM-1" and runs.made[-1][2].resume  # cut short: goes on
    capsys.readouterr()

    assert main([*command, "0", "--omega", "1.5"]) == 2
    assert "DDPM-0 was made with other settings (omega: 0.5 != 1.5); give another --out" in capsys.readouterr().err
    assert main([*command, "0", "--loss", "balanced"]) == 2
    assert "full-0/classifier.json is of a classifier with another value of recipe; give another folder" in capsys.readouterr().err
    samples = np.load(tmp_path / "runs" / "DDPM-0" / "samples.npy")
    np.save(tmp_path / "runs" / "DDPM-0" / "samples.npy", samples[::-1].copy())
    assert main([*command, "0"]) == 2
    assert "DDPM-0/classifier.json is of a classifier with another value of images" in capsys.readouterr().err


def test_agreement_is_the_full_set_s_opinion():
    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()

    images = torch.tensor([0.0, 1, 2, 2, 2])[:, None, None, None]
    labels = torch.tensor([0, 0, 2, 2, 1])
    assert figures_gda.agreement(First(), images, labels, (50, 9, 3), "tercile") == [3 / 5, 1.0]
    assert figures_gda.agreement(First(), images[:2], labels[:2], (50, 9, 3), "tercile") == [1 / 2, None]


def test_filling():
    labels = torch.tensor([2, 1, 0, 2, 1, 2])
    assert figures_gda.filling(labels, (5, 4, 3), "RUN").tolist() == [1, 0, 3]
    with pytest.raises(ValueError, match="figures gda: class 2 needs 4 samples; RUN has 3, so give more --samples"):
        figures_gda.filling(labels, (5, 4, 1), "RUN")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--dataset", "digits-lt"], "got 'digits-lt'; digits-train is digits without the images of its test set"),
        (["--dataset", "digits-train"], "figures gda: expected a long tail, digits-train-lt for one; got digits-train"),
        (["--rows", "T2H"], "invalid choice: 'T2H'"),
    ],
)  # fmt: skip
def test_wrong_calls(tmp_path, capsys, runs, words, message):
    try:
        code = main(["figures", "gda", *words, "--out", str(tmp_path)])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir()) and not runs.made


def test_presets():
    """Table 3's has the data and the samples of Table 1."""
    table = figures_gda.PRESETS["table3"]
    assert (table.dataset, table.samples) == ("cifar100-lt", 50_000)
    assert recognition.recipe_of(table.dataset) is recognition.RECIPES["cifar"]
    assert figures_gda.PRESETS["default"].dataset == "digits-train-lt" and figures_gda.PRESETS["default"].imbalance_ratio == 20
    assert recognition.recipe_of("imagenet-lt").net == "resnext50" and recognition.recipe_of("folder-lt:x/train").net == "resnet32"
    assert dataclasses.asdict(recognition.recipe_of("digits-train-lt"))["flip"] is False
