"""The table of recipes in training/README.md: presets that exist, every row that has one, and GPU-hours by the formula printed there."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training import config, data
from training.config import PRESETS
from training.networks import AssignmentNet, NoisyEncoder, build_denoiser, build_encoder

README = (Path(__file__).parents[2] / "training/README.md").read_text()
SECTION = re.search(r"^## Recipes\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
RATE = 50e12  # FLOP/s
NO_ROW = {  # presets beside the tables: a first look, other readings, curves; and a row that Table 5 of 001 does not have
    *((method, name) for method in PRESETS for name in ("default", "short", "300k", "code", "cludi-code", "diffrc-paper", "algorithm1")),
    ("cbdm", "table5-cifar10"), ("diffrop", "figure4-cifar10-const"), ("diffrop", "figure4-cifar100-const"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    where: str
    calls: tuple[tuple[str, str], ...]  # (command, preset)
    hours: str
    published: str
    ours: str


def rows() -> list[Row]:
    """Cells: row, commands, data, hours, published, ours; a command without --preset has the default."""
    out = []
    for line in re.findall(r"^\|( 00\d .*)\|$", SECTION, re.MULTILINE):
        where, commands, _, hours, published, ours = (cell.strip() for cell in line.split("|"))
        words = [text.split() for text in re.findall(r"`([^`]+)`", commands)]
        calls = tuple((call[0], call[call.index("--preset") + 1] if "--preset" in call else "default") for call in words)
        out.append(Row(where, calls, hours, published, ours))
    return out


ROWS = rows()


# ---- FLOPs of a run, by the formulas of the section


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@cache
def flops_of_image(size: int, classes: int, encoder: bool = False) -> int:
    """F of the presets' U-Net, or E of DiffRC's encoder."""
    with torch.device("meta"):
        net = build_denoiser("unet", 3, size, classes, width=128)
        x, t = torch.empty(1, 3, size, size), torch.ones(1, dtype=torch.int64)
        if encoder:
            net = NoisyEncoder(net, 128)
            return counted(lambda: net(x, t))
        return counted(lambda: net(x, t, torch.zeros(1, dtype=torch.int64) if classes else None))


def size_and_classes(settings) -> tuple[int, int]:
    classes = {"cifar10": 10, "cifar100": 100, "tiny-imagenet": 200, "imagenet": 1000}[settings.dataset.removesuffix("-lt")]
    return (32 if settings.dataset.startswith("cifar") else settings.image_size), classes


def images(settings) -> float:
    size, classes = size_and_classes(settings)
    f = flops_of_image(size, classes if settings.conditional else 0)
    forwards = 2 if isinstance(settings, config.CBDMConfig) and getattr(settings, "base", "cbdm") == "cbdm" else 1
    trained, drawn = settings.batch_size * settings.steps, settings.samples * settings.sample_steps
    return f * (3 * forwards * trained + (2 if settings.conditional and settings.omega else 1) * drawn)


def diffrc(settings) -> float:
    size, classes = size_and_classes(settings)
    f, e, missing = flops_of_image(size, 0), flops_of_image(size, 0, True), 0
    if settings.dataset != "imagenet-lt":  # whose counts are in its list
        counts = data.long_tail_counts(50_000 // classes, classes, settings.imbalance_ratio)
        missing = sum(counts[0] - counts[label] for group in data.split_groups(counts)[1:] for label in group)
    trained = 3 * f * settings.source_steps + 4 * f * settings.target_steps + 3 * e * settings.encoder_steps
    return settings.batch_size * trained + missing * settings.sample_steps * (f + 2 * e)


def cludi(settings, rows: int = 10_000) -> float:
    net = AssignmentNet(384, 32, 10, settings.timesteps, settings.width, settings.depth)
    z, x, t = torch.zeros(1, 32), torch.zeros(1, 384), torch.full((1,), 5)
    f = counted(lambda: net(z, net.condition(x), t, z))
    return rows * f * (settings.epochs * settings.replicas * (settings.teacher_steps + 3) + settings.eval_samples * settings.eval_steps)


def dgd(settings, rows: int = sum(data.long_tail_counts(5000, 10, 10.0))) -> float:
    x = torch.zeros(1, 3, 32, 32)
    net = build_encoder("auto", x, settings.latent_dim)
    return 2 * rows * (settings.encoder_epochs + 2 * settings.joint_epochs) * 3 * counted(lambda: net(x))


FLOPS = {**dict.fromkeys(config.IMAGE_PRESETS, images), "diffrc": diffrc, "cludi": cludi, "dgd": dgd}


def model_hours(calls) -> str:
    hours = sum(FLOPS[command](PRESETS[command][preset]) for command, preset in calls) / RATE / 3600
    return f"{hours:.2g}" if hours < 9.95 else str(round(hours))


# ---- the table


@pytest.mark.parametrize("row", ROWS, ids=[row.where for row in ROWS])
def test_a_row_names_presets_that_exist_and_the_hours_of_the_formula(row):
    for command, preset in row.calls:
        assert preset in PRESETS[command], f"{command} has no preset {preset}"
    assert row.hours == f"model: {model_hours(row.calls)}"
    assert row.ours == "", "nothing was run: a figure needs a run folder"
    assert re.fullmatch(r"(FID|ACC|NMI|top-1|accuracy) .*\d", row.published)


def test_every_preset_of_a_table_has_a_row():
    named = {call for row in ROWS for call in row.calls}
    missing = {(method, name) for method, presets in PRESETS.items() for name in presets} - NO_ROW - named
    assert not missing
    assert not NO_ROW & (named - {("dgd", "default")})


def test_the_rate_is_the_one_that_is_printed():
    assert f"R = {RATE / 1e12:g} TFLOP/s" in SECTION
