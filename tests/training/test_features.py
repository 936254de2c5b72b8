"""`features` with a stand-in for timm: what is written, that it is written once and whole, and what is refused."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from training import data
from training.__main__ import main

NAME = "vit_small_patch16_224.dino"


class Colours(torch.nn.Module):
    """Mean colour of an image; the batches it saw."""

    def __init__(self):
        super().__init__()
        self.batches, self.broken = [], False

    def forward(self, images):
        self.batches.append(len(images))
        rows = images.mean((2, 3))
        return rows / 0 if self.broken else rows


@pytest.fixture
def timm(monkeypatch):
    """A module with the three functions that are called, as timm spells them."""
    module = types.ModuleType("timm")
    module.model = Colours()

    def create_model(name, pretrained, num_classes):
        assert pretrained and num_classes == 0
        if name != NAME:
            raise RuntimeError(f"Unknown model ({name})")
        return module.model

    def create_transform(input_size, is_training):
        assert not is_training
        return lambda image: torch.from_numpy(np.asarray(image.resize(input_size[1:]))).permute(2, 0, 1) / 255

    module.create_model = create_model
    settings = lambda model: {"input_size": (3, 4, 4)}  # noqa: E731
    module.data = types.SimpleNamespace(resolve_model_data_config=settings, create_transform=create_transform)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.fixture
def folder(tmp_path):
    for label, (name, count) in enumerate([("ant", 3), ("bee", 2), ("cat", 2)]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (60 * label, 10 * i, 255)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def command(folder, out, *more):
    return ["features", "--model", NAME, "--data", str(folder), "--out", str(out), "--no-progress", *more]


def test_rows_of_a_folder_become_a_feature_file_that_every_method_reads(timm, folder, tmp_path, capsys):
    out = tmp_path / "made" / "rows.npz"
    assert main(command(folder, out, "--batch-size", "3")) == 0
    assert timm.model.batches == [3, 3, 1] and not timm.model.training
    assert f"7 rows in {out}" in capsys.readouterr().out
    rows = data.load(f"features:{out}", width=3)
    assert rows.counts == (3, 2, 2)
    expected = torch.tensor([[60 * c, 10 * i, 255] for c, n in enumerate((3, 2, 2)) for i in range(n)]) / 255
    torch.testing.assert_close(rows.features, expected)
    with np.load(out) as file:
        assert file["classes"].tolist() == ["ant", "bee", "cat"] and str(file["model"]) == NAME and file["features"].dtype == np.float32
    assert isinstance(data._mapped(out, "features"), np.memmap)
    assert [path.name for path in out.parent.iterdir()] == ["rows.npz"]  # nothing temporary stays


def test_a_file_is_written_once(timm, folder, tmp_path, capsys):
    out = tmp_path / "rows.npz"
    assert main(command(folder, out)) == 0
    before, calls = out.read_bytes(), len(timm.model.batches)
    assert main(command(folder, out)) == 2
    assert f"features: {out} is there already" in capsys.readouterr().err
    assert out.read_bytes() == before and len(timm.model.batches) == calls


def test_the_default_name_says_model_and_folder(timm, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["features", "--model", NAME, "--data", str(folder), "--no-progress"]) == 0
    assert (tmp_path / "features" / f"{NAME}-images.npz").exists()


def test_what_fails_half_way_leaves_no_file(timm, folder, tmp_path, capsys):
    out = tmp_path / "made" / "rows.npz"
    (folder / "cat" / "0.png").write_bytes(b"no picture")
    assert main(command(folder, out, "--batch-size", "3")) == 2
    assert "features: cannot read image" in capsys.readouterr().err and not list(out.parent.iterdir())
    Image.new("RGB", (8, 8)).save(folder / "cat" / "0.png")
    timm.model.broken = True
    assert main(command(folder, out)) == 2
    assert f"features: {NAME} answers NaN or inf" in capsys.readouterr().err and not list(out.parent.iterdir())


def test_wrong_calls(timm, folder, tmp_path, capsys):
    for more, message in {
        ("--model", "resnet0"): "features: timm has no pretrained model 'resnet0': Unknown model (resnet0)",
        ("--data", str(tmp_path / "nowhere")): "no such folder",
        ("--batch-size", "0"): "features: --batch-size must be >= 1; got 0",
        ("--out", str(tmp_path / "rows.npy")): "features: --out must end in .npz",
    }.items():
        assert main(command(folder, tmp_path / "rows.npz", *more)) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.npz").exists()


def test_without_timm_the_extra_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what an absent module looks like to `import`
    assert main(command(folder, tmp_path / "rows.npz")) == 2
    assert f"features: the model {NAME} needs timm, which is not installed: pip install 'ltkernels[dino]'" in capsys.readouterr().err
