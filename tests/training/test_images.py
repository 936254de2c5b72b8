"""Runs of ddpm, cbdm, t2h and diffrop: what they draw, what they leave, and that a killed one ends like one that was not."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from training import checkpoint, config, data, evaluate, loop, run_images
from training.__main__ import main
from training.config import IMAGE_CONFIGS as KINDS
from training.config import IMAGE_PRESETS, T2HConfig
from training.methods import diffrop
from training.methods.cbdm import CBDM, Balance
from training.methods.ccua import Align
from training.methods.ddpm import Denoise, mirrored
from training.methods.t2h import Calibrate

METHODS = ("ddpm", "cbdm", "t2h", "diffrop", "ccua")
STAGES = {"ddpm": Denoise, "cbdm": Balance, "t2h": Calibrate, "diffrop": diffrop.stage, "ccua": Align}
TINY = (
    "--no-progress --no-evaluate --steps 10 --checkpoint-every 5 --batch-size 32 --width 32 --dropout 0.1 --samples 20 --sample-steps 4 "
    "--warmup 2"
)


def run(method, out, *options):
    return main([method, *TINY.split(), "--out", str(out), *options])


def stage_of(method, images=None, **changes):
    """A stage on digits-lt, or on the given images with their index as label."""
    settings = KINDS[method](**{"batch_size": 32, "width": 32, "steps": 10, **changes})
    dataset = data.load("digits-lt", imbalance_ratio=20)
    if images is not None:
        labels = torch.arange(len(images))
        dataset = data.Dataset("few", images, None, labels, labels, len(images), (1,) * len(images))
    modules = run_images.build_modules(settings, tuple(dataset.images.shape[1:]), dataset.num_classes)
    return STAGES[method](dataset, modules, settings)


def draw(stage, step=0, seed=0):
    return stage.draw(step, loop.generator(seed, 0, "denoise", step))


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of each method that nothing disturbs."""
    folder = tmp_path_factory.mktemp("images")
    for method in METHODS:
        assert run(method, folder / method) == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_files(whole, method):
    report = json.loads((whole / method / "metrics.json").read_text())
    assert report["method"] == method and report["counts"][0] == 174 and sum(report["counts"]) == 587
    samples, labels = (np.load(whole / method / f"{name}.npy") for name in ("samples", "sample_labels"))
    assert samples.shape == (20, 1, 8, 8) and samples.dtype == np.uint8 and np.unique(samples).size > 20
    assert labels.dtype == np.int64 and labels.tolist() == [i // 2 for i in range(20)]
    more = ["transfer.png"] if method == "t2h" else []
    for name in ("config.json", "indices.json", "log.jsonl", "samples.png", "losses.png", "card.md", *more):
        assert (whole / method / name).stat().st_size > 0, name
    stored = json.loads((whole / method / "config.json").read_text())
    assert stored["data"] == {"shape": [1, 8, 8], "counts": report["counts"]}
    weights = load_file(whole / method / "weights" / "denoise-000010.safetensors")
    assert {key.split(".")[0] for key in weights} == {"net", "ema"}


DIES = """
import os, signal
from training.__main__ import main
from training.methods.ddpm import Denoise
draw = Denoise.draw
def dies(self, step, rng):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, step, rng)
Denoise.draw = dies
main({command})
"""


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_are_five_a_kill_and_five_more(whole, tmp_path, method):
    """Dropout is on: its masks are drawn by torch's own generator."""
    cut = tmp_path / "cut"
    script = DIES.format(command=[method, *TINY.split(), "--out", str(cut)])
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(cut, "denoise") == 5 and not (cut / "metrics.json").exists()

    assert main([method, "--no-progress", "--out", str(cut), "--resume"]) == 0  # the settings come from the run
    for name in ("weights/denoise-000010.safetensors", "samples.npy", "sample_labels.npy", "log.jsonl"):
        assert (cut / name).read_bytes() == (whole / method / name).read_bytes(), name
    reports = [{**json.loads((folder / "metrics.json").read_text()), "seconds": 0} for folder in (whole / method, cut)]
    assert reports[0] == reports[1]


def test_ctrl_c_leaves_a_checkpoint(whole, tmp_path, monkeypatch, capsys):
    original = Denoise.draw

    def interrupted(self, step, rng):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Denoise, "draw", interrupted)
        assert run("t2h", tmp_path / "cut") == 130
    assert "after step 3" in capsys.readouterr().err
    assert main(["t2h", "--no-progress", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    name = "weights/denoise-000010.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (whole / "t2h" / name).read_bytes()


def test_a_checkpoint_cut_off_half_way_never_loads_and_never_shadows_the_good_one(tmp_path, monkeypatch):
    """Whatever part of it was written: half the weights, all weights and half of the rest; then the file itself, damaged later."""
    stage = stage_of("t2h", steps=5)
    loop.train(stage, tmp_path, seed=0, checkpoint_every=5, progress=False)
    good = (tmp_path / "weights" / "denoise-000005.safetensors").read_bytes()

    save_file, save = checkpoint.save_file, torch.save

    def cut(path):
        Path(path).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])
        raise OSError("no space left on device")

    breaks = {
        "save_file": lambda tensors, path: (save_file(tensors, path), cut(path)),
        "torch": type("torch", (), {"save": staticmethod(lambda value, path: (save(value, path), cut(path)))}),
    }
    for name, broken in breaks.items():
        longer = stage_of("t2h", steps=10)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(checkpoint, name, broken) if name == "save_file" else patch.setattr(checkpoint.torch, "save", broken.save)
            loop.train(longer, tmp_path, seed=0, checkpoint_every=10, progress=False)
        assert checkpoint.latest(tmp_path, "denoise") == 5
        assert not list((tmp_path / "weights").glob(".*"))
        again = stage_of("t2h", steps=5)
        loop.train(again, tmp_path, seed=0, progress=False)
        assert all(torch.equal(value, again.modules["ema"].state_dict()[key]) for key, value in stage.modules["ema"].state_dict().items())
    assert (tmp_path / "weights" / "denoise-000005.safetensors").read_bytes() == good

    (tmp_path / "weights" / "denoise-000005.safetensors").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="checkpoint: cannot read .*denoise-000005.safetensors"):
        run_images.load_weights(tmp_path, {"ema": again.modules["ema"]})


def test_sample_takes_the_averaged_weights_of_the_newest_checkpoint(whole, tmp_path, capsys):
    same = tmp_path / "same"
    assert main(["sample", str(whole / "t2h"), "--out", str(same)]) == 0
    assert (same / "samples.npy").read_bytes() == (whole / "t2h" / "samples.npy").read_bytes()
    other = tmp_path / "other"
    changed = "--n 12 --omega 1.5 --sampler ddpm --steps 6 --labels uniform --raw-weights".split()
    assert main(["sample", str(whole / "t2h"), "--out", str(other), *changed]) == 0
    assert np.load(other / "samples.npy").shape == (12, 1, 8, 8) and (other / "samples.png").exists()
    half = tmp_path / "half"  # a run without metrics
    for name in ("config.json", "weights/denoise-000010.pt", "weights/denoise-000010.safetensors"):
        (half / name).parent.mkdir(parents=True, exist_ok=True)
        (half / name).write_bytes((whole / "ddpm" / name).read_bytes())
    assert main(["sample", str(half), "--n", "8"]) == 0 and (half / "samples" / "sample_labels.npy").exists()
    assert main(["sample", str(tmp_path / "none")]) == 2
    assert "expected a run folder; there is no" in capsys.readouterr().err


def test_finetuning_starts_from_the_averaged_weights(whole, tmp_path):
    assert run("t2h", tmp_path / "tuned", "--finetune", str(whole / "ddpm"), "--steps", "1", "--warmup", "100000000") == 0
    plain = load_file(whole / "ddpm" / "weights" / "denoise-000010.safetensors")
    tuned = load_file(tmp_path / "tuned" / "weights" / "denoise-000001.safetensors")
    for key, value in plain.items():
        if key.startswith("ema.net."):
            torch.testing.assert_close(tuned[key], value)  # one step at a learning rate of 1e-11
            torch.testing.assert_close(tuned[key.removeprefix("ema.")], value)
    assert any(not torch.equal(plain[key], plain[f"ema.net.{key.removeprefix('net.')}"]) for key in plain if key.startswith("net."))


def test_a_run_that_was_fine_tuned_resumes_without_the_run_that_it_started_from(whole, tmp_path, monkeypatch):
    """Its weights are in the checkpoint. Before the first one they are not."""
    shutil.copytree(whole / "ddpm", tmp_path / "plain")
    options = ("--finetune", str(tmp_path / "plain"))
    assert run("cbdm", tmp_path / "tuned", *options) == 0

    original, kill_at = Denoise.draw, [7]

    def killed(self, step, rng):
        if step == kill_at[0]:
            raise FloatingPointError("killed")
        return original(self, step, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Denoise, "draw", killed)
        assert run("cbdm", tmp_path / "cut", *options) == 2 and checkpoint.latest(tmp_path / "cut", "denoise") == 5
        kill_at[0] = 3
        assert run("cbdm", tmp_path / "early", *options) == 2 and checkpoint.latest(tmp_path / "early", "denoise") is None
    shutil.rmtree(tmp_path / "plain")
    assert main(["cbdm", "--no-progress", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    name = "weights/denoise-000010.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "tuned" / name).read_bytes()
    assert main(["cbdm", "--no-progress", "--out", str(tmp_path / "early"), "--resume"]) == 2


def test_other_labels_are_uniform_when_fine_tuning():
    for finetune, given, expected in ((None, "auto", "train"), ("RUN", "auto", "uniform"), ("RUN", "sqrt", "sqrt"), (None, "sqrt", "sqrt")):
        stage = stage_of("cbdm", finetune=finetune, cb_sampling=given)
        assert torch.equal(stage.method.weight, CBDM(stage.counts, sampling=expected).weight)
        assert torch.equal(stage_of("diffrop", base="cbdm", finetune=finetune, cb_sampling=given).method.weight, stage.method.weight)


def test_pictures_every_few_steps_start_from_one_noise(tmp_path, monkeypatch):
    starts = []
    original = run_images.sample_images

    def noted(diffusion, net, x, *rest, **options):
        starts.append(x)
        return original(diffusion, net, x, *rest, **options)

    monkeypatch.setattr(run_images, "sample_images", noted)
    assert run("ddpm", tmp_path, "--grid-every", "4") == 0
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["000004.png", "000008.png"]
    assert torch.equal(starts[0], starts[1]) and len(starts) == 3


WRONG = {
    "ddpm --omega nan": "config: omega must be finite; got nan",
    "ddpm --cfg-drop 1.5": "config: cfg_drop must be <= 1; got 1.5",
    "ddpm --sample-steps 2000": "config: sample_steps must be <= timesteps=1000; got 2000",
    "ddpm --sampler ddpm --ddim-quirk": "config: ddim_quirk is about the sampler ddim; got ddpm",
    "cbdm --no-conditional": "config: CBDM compares labels, so it needs conditional; got --no-conditional",
    "t2h --reference bank --augment ada": "config: reference bank holds images as they are, so it needs augment none; got ada",
    "t2h --finetune nowhere": "weights: expected the run of ddpm, cbdm, t2h, diffrop, ccua, analytic with a checkpoint; there is none",
    "t2h --preset table8-cond": "t2h: this preset goes on from the weights of a plain run (001, Table 8); give --finetune and its folder",
    "t2h --preset table8-uncond": "t2h: this preset goes on from the weights of a plain run (001, Table 8); give --finetune and its folder",
    "ddpm --dataset digits --imbalance-ratio 5": "dataset digits: --imbalance-ratio is of the long tails that are made here: of names",
    "cbdm --dataset digits --imb-factor .5": "without --indices; got 2",
    "ddpm --indices some.json --imbalance_ratio=5": "dataset digits-lt: --imbalance-ratio is of the long tails that are made here",
    "ddpm --dataset digits --class-order reversed": "class_order is of the long tails that are made here",
    "t2h --no-conditional --uncond-transfer-mode none": "uncond_transfer_mode is about dropped labels",
    "t2h --transfer-beta 1 --uncond-transfer-mode h2t": "transfer_beta replaces every gate",
    "ddpm --class-order 1,2": "class_order: expected reversed, seed:N or each of 0 to 9 once, with commas; got '1,2'",
    "ddpm --imb-factor 2": "--imb-factor: imbalance: imb_factor must be in (0, 1]; got 2.0",
    "ddpm --imb-factor .1 --imbalance-ratio 10": "imbalance: give --imbalance-ratio or --imb-factor, not both",
    "ddpm --preset table9": "ddpm: --preset must be one of default, short, 300k, code, table1-a",
    "ddpm --dataset imagenet-lt": "dataset imagenet-lt: expected the public list data/ImageNet_LT_train.txt",
    "t2h --dataset tiny-imagenet-lt": "expected data/tiny-imagenet-200/train/<wnid>/images/<image>",
    "ddpm --batch-size 0": "config: batch_size must be >= 1; got 0",
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_name_expectation_and_fact(tmp_path, capsys, call):
    method, *options = call.split()
    try:
        code = run(method, tmp_path / "run", *options)
    except SystemExit as stop:  # tyro's way; it draws boxes around its words
        code = stop.code
    assert code == 2 and WRONG[call] in re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_features_are_no_images(tmp_path, capsys):
    np.savez(tmp_path / "f.npz", features=np.zeros((4, 3), np.float32), labels=np.arange(4))
    assert run("ddpm", tmp_path / "run", "--dataset", f"features:{tmp_path / 'f.npz'}") == 2
    assert "ddpm: expected a data set of images" in capsys.readouterr().err


def test_the_reference_is_looked_for_without_decoding_a_folder(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "images" / str(number % 2) / f"{number}.png")
    settings = KINDS["ddpm"](dataset=f"folder-lt:{tmp_path / 'images'}", image_size=4)
    assert len(evaluate.find_reference(settings)) == 4
    monkeypatch.setattr(data, "_read_image", lambda *arguments: pytest.fail("decoded"))
    evaluate.check_reference(settings)
    with pytest.raises(FileNotFoundError, match="no such file of Inception's weights: nowhere"):
        evaluate.check_reference(dataclasses.replace(settings, inception="nowhere"))
    (tmp_path / "images" / "1" / "4.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot read image .*4.png"):
        evaluate.check_reference(settings)
    with pytest.raises(FileNotFoundError, match="cifar10: no intact copy"):
        evaluate.check_reference(KINDS["ddpm"](dataset="cifar10-lt", root=str(tmp_path)))


# ---- settings --------------------------------------------------------------------------------------------------------


def test_presets_hold_the_rows_of_the_tables():
    row = lambda method, name: IMAGE_PRESETS[method][name]  # noqa: E731
    letters = {name[-1] for method in METHODS for name in IMAGE_PRESETS[method] if re.fullmatch("table1-.", name)}
    assert letters == set("abcdefghij")
    for name, conditional, mode in (("c", False, "full"), ("d", False, "t2h"), ("e", False, "h2t"), ("h", True, "h2t"), ("j", True, "t2h")):
        settings = row("t2h", f"table1-{name}")
        assert (settings.conditional, settings.transfer_mode, settings.batch_resample) == (conditional, mode, "balanced")
        assert (settings.imbalance_ratio, settings.samples, settings.omega, settings.batch_size) == (100.0, 50_000, 1.5, 128)
    assert row("ddpm", "table1-f").batch_resample == "none" and row("cbdm", "table2-cifar10-1000").imbalance_ratio == 1000
    assert (row("t2h", "300k").steps, row("t2h", "300k").batch_size) == (300_000, 64)
    assert (row("t2h", "code").batch_resample, row("t2h", "code").sample_labels) == ("none", "uniform")  # D3
    stated = config.resolved(row("t2h", "table1-e"), row("t2h", "table1-e"))
    assert stated["transfer_mode"] == {"value": "h2t", "provenance": "paper"} and stated["steps"]["provenance"] == "code"
    assert config.resolved(row("ddpm", "table1-b"), row("ddpm", "table1-b"))["batch_resample"]["provenance"] == "paper"


def test_both_spellings_of_imbalance():
    from training.__main__ import imbalance_ratio

    assert imbalance_ratio(["--a", "--imb-factor", "0.01", "--b"]) == ["--a", "--imbalance-ratio", "100.0", "--b"]
    assert imbalance_ratio(["--imb-factor=0.05"]) == ["--imbalance-ratio", "20.0"]


# ---- what a step draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_methods_to_be_compared_draw_the_same(method):
    batch, plain = draw(stage_of(method, batch_resample="none")), draw(stage_of("ddpm"))
    for name in ("rows", "x0", "whole_eps", "label", *(("t", "x_t") if method != "diffrop" else ())):  # which shares times in pairs
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_labels_are_dropped_for_rows_or_for_batches_and_stay_otherwise(mode):
    stage = stage_of("t2h", cfg_drop=0.3, cfg_drop_mode=mode)
    batches = [draw(stage, step) for step in range(200)]
    share = torch.stack([(batch.label < 0).float().mean() for batch in batches])
    assert share.mean() == pytest.approx(0.3, abs=0.1)
    assert ((share == 0) | (share == 1)).all() if mode == "batch" else (share < 1).all() and share.std() < 0.15
    for batch in batches:  # the label that the network is told is the row's own, whatever moves
        assert torch.equal(batch.y, stage.y[batch.rows])
        assert torch.equal(batch.label, batch.y.where(batch.label >= 0, -1))
    assert draw(stage_of("t2h", conditional=False)).label is None


def test_gates_see_the_long_tailed_counts_under_batch_resample():
    stage = stage_of("t2h", batch_resample="balanced", batch_size=500)
    assert stage.method.class_counts.tolist() == list(data.long_tail_counts(174, 10, 20))
    batch = draw(stage)
    assert batch.y.bincount(minlength=10).min() > 25  # drawn balanced
    transfers = []
    original = type(stage.method).transfer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stage.method), "transfer", lambda self, *a, **k: transfers.append(original(self, *a, **k)) or transfers[-1])
        stage.target(batch)
    moved = transfers[0].moved
    assert moved.any() and (batch.y[transfers[0].index] <= batch.y).all()  # class 0 is the head
    assert torch.equal(moved, transfers[0].index != torch.arange(500))


@pytest.mark.parametrize("resample, power", [("none", 1.0), ("balanced", 0.0), ("sqrt", 0.5)])
def test_batches_have_one_size_and_their_law(resample, power):
    labels = torch.tensor([2] * 10 + [0] * 40 + [1] * 20)
    drawn = [
        data.batch_of_rows(labels, resample, 32, step, 0, loop.generator(0, 0, "denoise", step)) for step in range(350)
    ]  # fmt: skip
    assert all(len(rows) == 32 for rows in drawn)
    rows = torch.cat(drawn)
    shares = torch.tensor([40.0, 20.0, 10.0]).double() ** power
    expected = len(rows) * shares / shares.sum()
    found = labels[rows].bincount(minlength=3)
    if resample == "none":  # 160 permutations of 70 rows
        assert (rows.bincount(minlength=70) == 160).all() and torch.equal(rows[:70].sort().values, torch.arange(70))
    else:
        assert ((found - expected).square() / expected).sum() < 13.8  # chi^2, 2 degrees of freedom, one in a thousand
        within = rows.bincount(minlength=70)
        assert within.min() > 0
        for label in range(3):
            own = within[labels == label].double()
            assert ((own - own.mean()).square() / own.mean()).sum() < 80  # up to 39 degrees of freedom, one in ten thousand


def test_digits_are_not_mirrored_and_others_are():
    assert not draw(stage_of("ddpm")).flipped.any() and draw(stage_of("ddpm", flip="yes")).flipped.any()
    few = torch.randn(3, 1, 8, 8)
    stage = stage_of("ddpm", few, batch_size=64)
    batch = draw(stage)
    assert 10 < batch.flipped.sum() < 54
    for x0, row, flipped in zip(batch.x0, batch.rows, batch.flipped, strict=True):
        assert torch.equal(x0, few[row].flip(-1) if flipped else few[row])


def test_the_whole_data_set_as_reference_is_mirrored_with_the_row():
    """Where two data sets differ by mirroring alone, so do targets."""
    few = torch.randn(6, 1, 8, 8) / 4
    stage = stage_of("t2h", few, reference="bank", batch_size=64, transfer_mode="full", batch_resample="none")
    batch = draw(stage)
    target, figures = stage.target(batch)
    scale, std = (c.view(-1, 1, 1, 1) for c in (batch.scale, batch.std))
    clean = (batch.x_t - std * target) / scale
    rows = mirrored(clean, batch.flipped).flatten(1)
    nearest = torch.cdist(rows, few.flatten(1)).min(1)
    small = batch.t < 800  # clean has lost its digits at the end
    assert (nearest.values[small] < 1e-2).all() and 0 < figures["moved"] < 1
    assert (nearest.indices != batch.rows)[small].any()


def test_transfers_are_counted_by_time(whole):
    counted = json.loads((whole / "t2h" / "metrics.json").read_text())["transfer"]
    assert len(counted["share"]) >= 10 and sum(counted["rows"]) == 320 and counted["edges"][0] == 0 and counted["edges"][-1] == 1000
    stage = stage_of("t2h", transfer_mode="full", batch_size=256)
    for step in range(8):
        stage.target(draw(stage, step))
    share = stage.report()["transfer"]["share"]
    assert share[0] < 0.05 and share[-1] > 0.9  # a second copy of the same image is no other target


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, prediction", [*((method, "epsilon") for method in METHODS), ("ddpm", "v"), ("ddpm", "x0")])
def test_each_method_fits_two_images(tmp_path, method, prediction):
    """Two far-apart images are learnt by heart: samples with their labels are the images themselves."""
    few = torch.stack([torch.ones(1, 4, 4), -torch.ones(1, 4, 4)]) * 0.8
    options = {"batch_size": 64, "steps": 300, "width": 64, "lr": 3e-3, "warmup": 20, "ema_decay": 0.95, "flip": "no", "cfg_drop": 0.1}
    settings = KINDS[method](**options, prediction=prediction, sample_steps=20, omega=0.0, samples=8, progress=False)
    stage = stage_of(method, few, **options, prediction=prediction)
    loop.train(stage, tmp_path, seed=0, progress=False, checkpoint_every=300)
    rows = loop.read_log(tmp_path / "log.jsonl")
    key = "loss_mse" if method in ("cbdm", "diffrop") else "loss"
    first, last = (np.mean([row[key] for row in part]) for part in (rows[:10], rows[-50:]))
    assert last < 0.5 * first
    if method == "t2h":  # its samples for one label may show the other image: that is the method
        return
    samples, labels = run_images.draw_samples(stage.modules["ema"], settings, few.shape[1:], 2)
    error = (samples[:, None] / 127.5 - 1 - few).abs().flatten(2).mean(2)  # of every sample to both images
    assert torch.equal(error.argmin(1), labels) and error.amin(1).mean() < 0.4


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"channels_last": True, "network": "unet", "width": 8}, {"dropout": 0.5}])
def test_options_of_speed_and_regularisation_give_a_finite_loss(options):
    stage = stage_of("t2h", **options)
    before = torch.random.get_rng_state()
    losses = [stage.loss(step, loop.generator(0, 0, "denoise", step))[0] for step in (0, 0)]
    assert losses[0].isfinite() and torch.equal(*losses) and losses[0].dtype == torch.float32
    assert torch.equal(torch.random.get_rng_state(), before)


def test_compile_is_called_where_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda net: seen.append(net) or net)
    stage = stage_of("ddpm", compile=True)
    assert seen == [stage.modules["net"]]


def test_the_network_is_a_function_of_the_seed():
    nets = [run_images.build_modules(T2HConfig(seed=seed, width=16), (1, 8, 8), 10)["net"].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert any(not torch.equal(nets[0][key], nets[2][key]) for key in nets[0])


def test_samples_do_not_depend_on_how_many_are_made_at_a_time_of_one_batch():
    settings = T2HConfig(width=16, samples=30, sample_steps=3, sample_batch=20, progress=False)
    net = run_images.build_modules(settings, (1, 8, 8), 10)["ema"]
    many, _ = run_images.draw_samples(net, settings, (1, 8, 8), 10, torch.arange(30) % 10)
    few, _ = run_images.draw_samples(net, settings, (1, 8, 8), 10, torch.arange(7) % 10)
    assert torch.equal(many[:7], few)
    assert run_images.draw_samples(net, dataclasses.replace(settings, conditional=False), (1, 8, 8), 10)[1].eq(-1).all()


def test_labels_of_samples():
    assert run_images.sample_labels(7, 3, "equal", 0).bincount().tolist() == [3, 2, 2]
    drawn = run_images.sample_labels(3000, 3, "uniform", 0).bincount()
    assert (drawn - 1000).abs().max() < 120


# ---- what reaches the network ----------------------------------------------------------------------------------------


def spied(stage):
    """The calls of the stage's network: (label, output)."""
    calls, net = [], stage.net
    stage.net = lambda x, t, y, augment: calls.append((y, net(x, t, y, augment))) or calls[-1][1]
    return calls


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_told_the_row_s_own_label(method):
    """Also where T2H gives a row another image's target."""
    stage = stage_of(method, cfg_drop=0.3)
    calls, batch = spied(stage), draw(stage)
    stage.loss(0, loop.generator(0, 0, "denoise", 0))
    label = calls[0][0]
    assert torch.equal(label, batch.label) and (label == -1).any()
    assert torch.equal(label[label >= 0], stage.y[batch.rows][label >= 0])


def test_the_term_of_cbdm_is_that_of_the_network_s_two_outputs():
    stage = stage_of("cbdm", cfg_drop=0.3, cb_tau=2.5, cb_sampling="uniform")
    calls, batch = spied(stage), draw(stage)
    loss, figures = stage.loss(0, loop.generator(0, 0, "denoise", 0))
    (label, output), (other, pulled) = calls
    kept = label >= 0
    assert torch.equal(other < 0, ~kept) and (other[kept] != label[kept]).any()
    expected = CBDM(stage.counts, tau=2.5, sampling="uniform").loss(output, pulled, batch.t, kept)
    torch.testing.assert_close(figures["loss_cb"], expected)
    torch.testing.assert_close(loss, figures["loss_mse"] + expected)
    assert expected > 0


def test_warm_up_and_clipping():
    stage = stage_of("ddpm", warmup=4, clip=0.5)
    assert [stage.decay(step) for step in (0, 1, 4, 9)] == pytest.approx([0.2, 0.4, 1, 1])
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([3.0, 0.0, 4.0])
    stage.clip_gradients([param])
    torch.testing.assert_close(param.grad, torch.tensor([0.3, 0.0, 0.4]), rtol=1e-5, atol=0)


def test_samples_of_another_kind_leave_the_run_what_it_says_it_is(whole, tmp_path, capsys):
    run_folder = whole / "t2h"
    assert main(["sample", str(run_folder), "--out", str(run_folder)]) == 2
    assert "--out must be another folder than the run's" in capsys.readouterr().err
    assert main(["sample", str(run_folder), "--out", str(tmp_path), "--n", "6", "--seed", "5", "--sampler", "ddpm"]) == 0
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["settings"]["seed"]["value"] == 0 and about["drawn"] == {"weights": "ema", "seed": 5}  # seed 0 chose the training set
    assert about["settings"]["ddim_quirk"]["value"] is False
    before = np.load(run_folder / "samples.npy")
    assert not np.array_equal(np.load(tmp_path / "samples.npy"), before[:6])
