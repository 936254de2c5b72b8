"""Released checkpoints as run folders: the same function, the same moments, the flags, and what is refused."""

import copy
import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from training import checkpoint, classifier, config, metrics, networks, released, run_images
from training.__main__ import main

CLASSES, SIZE = 5, 4  # at 4 pixels a side the U-Net has the first two of its four levels
FLAGS = """# as absl writes them
--noalsologtostderr
--batch_size=8
--cb
--cfg
--ch=128
--ch_mult=1
--ch_mult=2
--conditional
--data_type=cifar100lt
--dropout=0.1
--ema_decay=0.9999
--imb_factor=0.05
--img_size=4
--lr=0.0002
--num_class=5
--num_images=10
--tau=2
--total_steps=300002
--verbosity=0
--warmup=5000
"""


# ---- their network, from its description -----------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels)
        for name in ("proj_q", "proj_k", "proj_v", "proj"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        h = self.group_norm(x)
        q, k, v = (getattr(self, f"proj_{name}")(h).flatten(2) for name in "qkv")  # (B, C, pixels)
        weight = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj(torch.einsum("bij,bcj->bci", weight, v).reshape(x.shape))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, condition, attention):
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(condition, outputs))
        self.block2 = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attn = Attend(outputs) if attention else nn.Identity()

    def forward(self, x, c):
        return self.attn(self.shortcut(x) + self.block2(self.block1(x) + self.temb_proj(c)[:, :, None, None]))


class Resize(nn.Module):
    def __init__(self, channels, up):
        super().__init__()
        self.up, self.main = up, nn.Conv2d(channels, channels, 3, 1 if up else 2, 1)

    def forward(self, x, c):
        return self.main(F.interpolate(x, scale_factor=2) if self.up else x)


class Theirs(nn.Module):
    """The U-Net of CBDM and OC_LT; its times count from 0."""

    def __init__(self, classes=CLASSES, augm=False, width=128, mult=(1, 2), times=1000):
        super().__init__()
        angle = torch.arange(times)[:, None] * torch.exp(-torch.arange(0, width, 2) / width * math.log(10000))
        table = nn.Embedding.from_pretrained(torch.stack([angle.sin(), angle.cos()], 2).flatten(1))  # which takes no gradient
        self.time_embedding = nn.Module()
        self.time_embedding.timembedding = nn.Sequential(table, nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.label_embedding = nn.Embedding(classes, 4 * width) if classes else None
        self.augm_embedding = nn.Linear(9, 4 * width, bias=False) if augm else None
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.downblocks, self.middleblocks, self.upblocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        now, left = width, [width]
        for level, factor in enumerate(mult):
            for _ in range(2):
                self.downblocks.append(Residual(now, factor * width, 4 * width, level == 1))
                now = factor * width
                left.append(now)
            if level + 1 < len(mult):
                self.downblocks.append(Resize(now, up=False))
                left.append(now)
        for attention in (True, False):
            self.middleblocks.append(Residual(now, now, 4 * width, attention))
        for level, factor in reversed(list(enumerate(mult))):
            for _ in range(3):
                self.upblocks.append(Residual(now + left.pop(), factor * width, 4 * width, level == 1))
                now = factor * width
            if level:
                self.upblocks.append(Resize(now, up=True))
        self.tail = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))

    def forward(self, x, t, y=None, augm=None):
        c = self.time_embedding.timembedding(t)
        c = c if y is None else c + self.label_embedding(y)
        c = c if augm is None else c + self.augm_embedding(augm)
        h = self.head(x)
        kept = [h]
        for layer in self.downblocks:
            h = layer(h, c)
            kept.append(h)
        for layer in self.middleblocks:
            h = layer(h, c)
        for layer in self.upblocks:
            h = layer(torch.cat([h, kept.pop()], 1) if isinstance(layer, Residual) else h, c)
        return self.tail(h)


def inputs(count=4):
    t = torch.tensor([1, 10, 500, 1000])[:count]
    return torch.randn(count, 3, SIZE, SIZE), t, torch.tensor([0, 1, 4, 2])[:count]


def stepped(net, optim, x, t, y):
    """One step towards fixed noise; t is theirs."""
    optim.zero_grad()
    (net(x, t, y) - 1).square().mean().backward()
    optim.step()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """(their network, its average, Adam, the checkpoint with flagfile.txt beside it, --dataset)."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    net, (x, t, y) = Theirs().eval(), inputs()
    optim = torch.optim.Adam(net.parameters(), lr=2e-4)
    for _ in range(2):
        stepped(net, optim, x, t - 1, y)
    average = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in average.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    sched = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1.0)
    parts = {
        "net_model": net.state_dict(), "ema_model": average.state_dict(), "sched": sched.state_dict(), "optim": optim.state_dict(),
        "step": 300000, "fixed_x_T": torch.randn(2, 3, SIZE, SIZE),
    }  # fmt: skip
    torch.save(parts, folder / "ckpt_300000.pt")
    (folder / "flagfile.txt").write_text(FLAGS)
    for label in range(CLASSES):
        (folder / "images" / str(label)).mkdir(parents=True)
        for number in range(20):
            pixels = np.random.RandomState(20 * label + number).randint(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / str(label) / f"{number}.png")
    return net, average, parts, folder / "ckpt_300000.pt", f"folder-lt:{folder / 'images'}"


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import", str(file[3]), "--from", "cbdm", "--dataset", file[4], "--out", str(folder)]) == 0
    return folder


def modules_of(run):
    about = json.loads((run / "config.json").read_text())
    settings = config.read(run / "config.json", config.IMAGE_CONFIGS[about["method"]])
    modules = run_images.build_modules(settings, tuple(about["data"]["shape"]), len(about["data"]["counts"]))
    assert run_images.load_weights(run, modules) == 300001
    return settings, modules


# ---- the same function -----------------------------------------------------------------------------------------------


def test_it_is_their_function(file, run):
    _, modules = modules_of(run)
    x, t, y = inputs()
    for net, there in ((modules["net"].eval(), file[0]), (modules["ema"], file[1])):
        with torch.no_grad():
            expected = there(x, t - 1, y)
            assert expected.std() > 0.1
            torch.testing.assert_close(net(x, t, y), expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(net(x, t, None), there(x, t - 1), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(modules["net"](x, t, y), modules["ema"](x, t, y), atol=1e-3)


def test_every_tensor_of_the_released_size_has_its_place():
    with torch.device("meta"):
        there, here = Theirs(100, augm=True, mult=(1, 2, 2, 2)), networks.UNet(3, 100, augment_dim=9)
    names = [name for name, _ in there.named_parameters() if name != released.TABLE]
    assert [released.theirs(name) for name, _ in here.named_parameters()] == names  # in their order, too
    assert [value.shape for value in here.parameters()] == [there.get_parameter(name).shape for name in names]


def test_adams_moments_go_on(file, run):
    net, optim = copy.deepcopy(file[0]), None
    settings, modules = modules_of(run)
    optim = torch.optim.Adam(net.parameters(), lr=settings.lr)
    optim.load_state_dict(file[2]["optim"])
    ours = torch.optim.Adam([{"params": list(modules["net"].parameters()), "lr": settings.lr}])
    assert checkpoint.restore(run, "denoise", modules, ours, {}) == 300001
    x, t, y = inputs()
    before = net.tail[2].weight.detach().clone()
    stepped(net, optim, x, t - 1, y)
    stepped(modules["net"].eval(), ours, x, t, y)
    assert (net.tail[2].weight - before).abs().max() > 1e-5
    torch.testing.assert_close(modules["net"].outside[2].weight, net.tail[2].weight, rtol=0, atol=2e-6)
    torch.testing.assert_close(modules["net"].condition.label.weight, net.label_embedding.weight, rtol=0, atol=2e-6)


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_flags_become_settings(file, run):
    settings, _ = modules_of(run)
    wanted = {
        "imbalance_ratio": 20.0, "image_size": 4, "cb_tau": 2.0, "cb_sampling": "train", "other_labels": "train", "conditional": True,
        "network": "unet", "width": 128, "dropout": 0.1, "flip": "yes", "augment": "none", "steps": 300002, "batch_size": 8, "lr": 2e-4,
        "warmup": 5000, "ema_decay": 0.9999, "clip": 1.0, "cfg_drop": 0.1, "cfg_drop_mode": "batch", "samples": 10, "sampler": "ddpm",
        "sample_steps": 1000, "omega": 1.6, "variance": "fixedlarge", "clip_x0": False, "sample_labels": "uniform", "timesteps": 1000,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in wanted} == wanted
    about = json.loads((run / "config.json").read_text())
    assert about["method"] == "cbdm" and about["imported"] == {"from": "cbdm", "file": "ckpt_300000.pt"}
    assert about["data"] == {"shape": [3, 4, 4], "counts": [20, 9, 4, 2, 1]}
    assert about["settings"]["steps"] == {"value": 300002, "provenance": "user"} and about["settings"]["lr"]["provenance"] == "code"


FLAGS_OF = {
    "cbdm": [
        ("--conditional\n--cfg", "ddpm", {"omega": 0.8, "cfg_drop": 0.1, "sampler": "ddpm"}),
        ("--conditional", "ddpm", {"omega": 0.0, "cfg_drop": 0.0}),
        ("--conditional\n--cb=true\n--finetune", "cbdm", {"cb_sampling": "uniform", "cb_tau": 1.0, "cfg_drop": 0.1, "omega": 1.6}),
        ("--noconditional\n--cb", "ddpm", {"conditional": False}),
        ("--conditional\n--cfg\n--augm\n--data_type=cifar10", "ddpm", {"augment": "ada", "flip": "no", "dataset": "cifar10"}),
    ],
    "oc_lt": [
        ("--conditional\n--cfg\n--transfer_x0\n--transfer_mode=t2h\n--data_type=cifar10lt\n--num_class=10.0", "t2h", {
            "transfer_mode": "t2h", "batch_resample": "none", "dataset": "cifar10-lt", "imbalance_ratio": 100.0, "sampler": "ddim",
            "sample_steps": 100, "ddim_quirk": True, "omega": 1.5, "transfer_beta": None, "steps": 500001,
        }),
        ("--conditional\n--transfer_x0\n--transfer_tr_tau\n--tr_tau=.5", "t2h", {"transfer_mode": "full", "transfer_beta": 0.5}),
        ("--conditional\n--cfg", "ddpm", {"sampler": "ddim", "cfg_drop": 0.1}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("source", "text", "method", "wanted"), [(source, *row) for source, rows in FLAGS_OF.items() for row in rows])
def test_other_flags(tmp_path, source, text, method, wanted):
    (tmp_path / "flagfile.txt").write_text(f"--data_type=cifar100lt\n{text}\n")
    flags = released.FLAGS[source] | released.read_flags(tmp_path / "flagfile.txt", released.FLAGS[source])
    found, settings, preset = released.settings_of(source, flags, {"T": 1000, "ch": 128}, None)
    assert found == method and type(preset) is type(settings) is config.IMAGE_CONFIGS[method]
    assert {name: getattr(settings, name) for name in wanted} == wanted


def test_sample_evaluate_and_finetune(run, tmp_path, monkeypatch):
    original = metrics.prd
    monkeypatch.setattr(metrics, "prd", lambda *sets, **options: original(*sets, **{**options, "runs": 1}))
    monkeypatch.setattr(classifier, "STEPS", 20)
    monkeypatch.setattr(classifier, "EPOCHS", 0)
    quick, cache = ("--sampler", "ddim", "--steps", "2"), ("--cache", str(tmp_path / "cache"), "--no-progress")
    assert main(["sample", str(run), "--out", str(tmp_path / "samples"), *quick]) == 0
    assert np.load(tmp_path / "samples" / "samples.npy").shape == (10, 3, 4, 4)
    assert main(["evaluate", str(tmp_path / "samples"), *cache]) == 0
    assert json.loads((tmp_path / "samples" / "metrics.json").read_text())["fid"] > 0
    dataset = config.read(run / "config.json", config.CBDMConfig).dataset
    options = "--network unet --width 128 --image-size 4 --steps 1 --batch-size 4 --warmup 100000000 --samples 2 --sample-steps 2".split()
    tuned, quiet = tmp_path / "tuned", ("--no-evaluate", "--no-progress")
    assert main(["t2h", *options, *quiet, "--dataset", dataset, "--finetune", str(run), "--out", str(tuned)]) == 0
    mine, its = load_file(next((tuned / "weights").glob("*.safetensors"))), load_file(next((run / "weights").glob("*.safetensors")))
    torch.testing.assert_close(mine["net.inside.weight"], its["ema.net.inside.weight"])  # one step at a learning rate of 1e-11


def test_the_training_goes_on(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(run_images, "draw_samples", lambda *args: (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.tensor([0, 1])))
    assert main(["cbdm", "--resume", "--out", str(tmp_path / "run"), "--no-evaluate", "--no-progress"]) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "weights").iterdir()) == ["denoise-300002.pt", "denoise-300002.safetensors"]
    before, after = (load_file(next((folder / "weights").glob("*.safetensors")))["net.inside.weight"] for folder in (run, tmp_path / "run"))
    assert 0 < (after - before).abs().max() < 1e-3  # a step of Adam at 2e-4


def test_weights_that_know_no_labels(tmp_path, file):
    """Without a flagfile the weights say what the network is."""
    there = Theirs(0, augm=True).eval()
    optim = torch.optim.Adam(there.parameters(), lr=2e-4)
    x, t, _ = inputs()
    there(x, t - 1, None, torch.ones(4, 9)).square().mean().backward()
    optim.step()
    parts = {"net_model": there.state_dict(), "ema_model": there.state_dict(), "optim": optim.state_dict(), "step": 300000}
    torch.save(parts, tmp_path / "ckpt.pt")
    flags = "--img_size=4\n--augm\n--imb_factor=.05"
    (tmp_path / "flags.txt").write_text(flags)
    released.import_checkpoint(tmp_path / "ckpt.pt", "oc_lt", flagfile=tmp_path / "flags.txt", dataset=file[4], out=str(tmp_path / "run"))
    settings, modules = modules_of(tmp_path / "run")
    assert not settings.conditional and settings.augment == "ada" and settings.omega == 0
    augm = torch.randn(4, 9)
    with torch.no_grad():
        torch.testing.assert_close(modules["ema"](x, t, None, augm), there(x, t - 1, None, augm), rtol=1e-6, atol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("echo this was run",)


def refused(arguments, capfd, out):
    assert main(["import", *map(str, arguments), "--out", str(out)]) == 2
    said = capfd.readouterr()
    assert not out.exists() and "this was run" not in said.out
    return said.err


def test_files_that_are_no_checkpoints(file, tmp_path, capfd):
    path, out = tmp_path / "ckpt.pt", tmp_path / "run"
    call = [path, "--from", "cbdm", "--dataset", file[4]]
    assert "import: no such file" in refused(call, capfd, out)
    for evil, asked in ((Evil(print), "a pickle that asks for print"), (Evil(os.system), "a pickle that asks for posix.system")):
        torch.save({"net_model": evil}, path)
        assert f"expected tensors and plain values; got {asked}, which is not run" in refused(call, capfd, out)
    path.write_bytes(pickle.dumps({"net_model": Evil(print)}, protocol=2))
    assert "got a pickle that asks for print, which is not run" in refused(call, capfd, out)
    whole = file[3].read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        assert f"import: cannot read {path}" in refused(call, capfd, out)
    torch.save([1, 2], path)
    assert "expected net_model, ema_model, optim, step; net_model is missing, got list" in refused(call, capfd, out)
    torch.save({"state_dict": {}, "ema_model": {}}, path)
    assert "net_model is missing, got state_dict, ema_model" in refused(call, capfd, out)
    torch.save({"net_model": {"a": 1}, "ema_model": {}, "optim": {}, "step": 1}, path)
    assert "net_model must be a dict of tensors" in refused(call, capfd, out)


def wrong_parts(parts):
    """What is done to the parts: what is said of it. Only one of the two networks is wrong."""
    table = {released.TABLE: torch.zeros(1000, 128)}
    lacking = {name: value for name, value in parts["net_model"].items() if not name.startswith("upblocks.0.attn")}
    few = {**parts["optim"], "state": {number: entry for number, entry in parts["optim"]["state"].items() if number != 9}}
    shape = copy.deepcopy(parts["optim"])
    shape["state"][5]["exp_avg"] = torch.zeros(3)
    return [
        (
            {"net_model": lacking},
            "net_model: tensors that are missing (10): upblocks.0.attn.group_norm.weight, upblocks.0.attn.group_norm.bias,",
        ),
        ({"ema_model": {**parts["ema_model"], "extra": torch.zeros(1)}}, "ema_model: tensors that are none of this U-Net's (1): extra\n"),
        (
            {"net_model": {**parts["net_model"], "tail.2.bias": torch.zeros(4)}},
            "net_model: tensors of another shape (1): tail.2.bias (4,) for (3,)",
        ),
        ({"ema_model": {f"module.{name}": value for name, value in parts["ema_model"].items()}}, "expected head.weight; got module."),
        ({"ema_model": {**parts["ema_model"], **table}}, "does not hold the time features"),
        ({"ema_model": {**parts["ema_model"], "head.weight": torch.zeros(64, 3, 3, 3)}}, "ch must be a multiple of 128"),
        ({"optim": few}, "optim: expected Adam's state of every parameter"),
        ({"optim": shape}, "optim: moments of label_embedding.weight must have its shape (5, 512)"),
        ({"step": "last"}, "step must be an int >= 0; got 'last'"),
    ]


@pytest.mark.parametrize("number", range(9))
def test_wrong_parts_are_named(file, tmp_path, capfd, monkeypatch, number):
    change, expected = wrong_parts(file[2])[number]
    monkeypatch.setattr(torch, "load", lambda *args, **options: {**file[2], **change})  # what was read; files are another test's
    assert expected in refused([file[3], "--from", "cbdm", "--dataset", file[4]], capfd, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "dataset", "expected"),
    [
        ("--num_class=10", "folder-lt", "does not fit {flags}: num_class is 10.0 there; the weights have 5"),
        ("--noconditional", "folder-lt", "conditional is False there; the weights have True"),
        ("--augm", "folder-lt", "augm is True there; the weights have False"),
        ("--T=500", "folder-lt", "T is 500 there; the weights have 1000"),
        ("--img_size=8", "digits", "knows 5 classes; digits has 10: give another --dataset"),
        ("--img_size=32", "digits", "was trained with img_size 32; images of digits have 8"),
        ("--data_type=imgnetLT", None, "data_type must be one of cifar10, cifar100, cifar10lt, cifar100lt; got imgnetLT"),
        ("--lr=fast", "folder-lt", "line 1: lr must be a number; got 'fast'"),
        ("--batch_size=1.5", "folder-lt", "line 1: batch_size must be an integer; got '1.5'"),
        ("--cb=maybe", "folder-lt", "line 1: cb must be true or false; got 'maybe'"),
        ("\nlr=1", "folder-lt", "line 2 must be a flag, --name=value; got 'lr=1'"),
        ("--flagfile=config/cifar100.txt", "folder-lt", "line 1 must be a flag, --name=value"),
        (None, None, "expected the training set in"),
    ],
)
def test_flags_and_data_that_do_not_fit(file, tmp_path, capfd, monkeypatch, flags, dataset, expected):
    monkeypatch.setattr(released, "read", lambda path: file[2])
    path, call = tmp_path / "flags.txt", [tmp_path / "ckpt.pt", "--from", "cbdm"]
    if flags is not None:
        path.write_text(flags)
        call += ["--flagfile", path]
    call += [] if dataset is None else ["--dataset", file[4] if dataset == "folder-lt" else dataset]
    assert expected.format(flags=path) in refused(call, capfd, tmp_path / "run")


def test_a_run_is_not_overwritten_unasked(file, run, capfd):
    call = ["import", str(file[3]), "--from", "cbdm", "--dataset", file[4], "--out", str(run)]
    assert main(call) == 2 and "already holds something" in capfd.readouterr().err
