"""DiffRC says what 003 says, with the repairs of C1..C10; its runs go on, share and refuse artefacts. Numbers are those of closed forms."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from training import checkpoint, config, data, loop, run_diffrc
from training.__main__ import main
from training.config import DIFFRC_PRESETS, DiffRCConfig
from training.diffusion import Diffusion, sample
from training.methods import DiffRC
from training.methods.ddpm import Denoise
from training.methods.diffrc import Adapt, Prototypical
from training.networks import NoisyEncoder, build_denoiser
from training.recognition import Recognise

MAX_KL = 1.523188  # of softmax(1, -1) from softmax(-1, 1): 2 tanh 1
TINY = (
    "--no-progress --source-steps 6 --target-steps 6 --encoder-steps 6 --checkpoint-every 4 --width 16 --dropout 0.1 --batch-size 16 "
    "--encoder-dim 8 --warmup 2 --sample-steps 3 --sample-batch 300 --classifier-steps 4"
)


def rows(count=24, classes=4, dim=6, seed=0, dtype=torch.float64):
    """(target, source, y): images of two models for the same noise."""
    rng = torch.Generator().manual_seed(seed)
    target, source = torch.randn(2, count, 1, 2, dim // 2, generator=rng, dtype=dtype).unbind()
    return target, source, torch.randint(classes, (count,), generator=rng)


# ---- the pair loss ---------------------------------------------------------------------------------------------------


def test_factor_of_eq_8_is_one_for_every_class_but_the_smallest():
    """C1."""
    counts = torch.tensor([1, 2, 3, 5])
    expected = torch.tensor([0.909091, 0.990099, 0.999001, 0.999990], dtype=torch.float64)
    torch.testing.assert_close(DiffRC(counts).factors(), expected, rtol=0, atol=5e-7)
    wider = DiffRC(torch.tensor([1, 5, 20]), pair_gamma=0.9).factors()
    torch.testing.assert_close(wider, torch.tensor([0.526316, 0.628737, 0.891602], dtype=torch.float64), rtol=0, atol=5e-7)
    effective = DiffRC(torch.tensor([1, 5, 20]), pair_gamma=0.9, pair_weight="effective").factors()
    torch.testing.assert_close(effective, torch.tensor([0.1, 0.40951, 0.878423], dtype=torch.float64), rtol=0, atol=5e-7)
    assert DiffRC(counts, pair_weight="none").factors().tolist() == [1, 1, 1, 1]


def test_equal_models_have_no_divergence_and_opposite_ones_the_largest():
    target, _, y = rows()
    same = DiffRC([50] * 4, pair_weight="none")
    assert same.pair_loss(target, 3 * target, y).abs() < 1e-15  # cosines know no length
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    other = one[[0, 2, 1]]
    together = dataclasses.replace(same, pair_reduce="sum").pair_loss(one, other, torch.zeros(3, dtype=torch.int64))
    p = torch.tensor([1.0, -1.0], dtype=torch.float64).log_softmax(0)
    to_uniform, from_uniform = (p.exp() * (p + math.log(2))).sum(), (0.5 * (-math.log(2) - p)).sum()  # rows 1 and 2
    assert float(together - to_uniform - from_uniform) == pytest.approx(MAX_KL, abs=1e-6)


def by_hand(method, target, source, group, y):
    """Eq. 7 to 9, a row at a time."""
    factors, terms = method.factors(), []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i and group[j] == group[i]]
        if len(others) < 2:
            continue
        tar, sou = (torch.stack([F.cosine_similarity(x[i].flatten(), x[j].flatten(), 0) for j in others]) for x in (target, source))
        p, q = (tar * factors[y[i]]).softmax(0), sou.softmax(0)
        p, q = (p, q) if method.pair_kl == "tar_sou" else (q, p)
        terms.append((p * (p / q).log()).sum())
    return getattr(torch.stack(terms), method.pair_reduce)()


@pytest.mark.parametrize("options", [{}, {"pair_kl": "sou_tar"}, {"pair_reduce": "sum"}, {"pair_gamma": 0.9}, {"pair_weight": "none"}])
def test_pair_loss_and_its_gradient_are_those_of_the_equations(options):
    method = DiffRC([1, 2, 7, 30], **options)
    target, source, y = rows()
    group = y * 2 + torch.arange(len(y)) % 2  # two groups a class, which are not compared
    for chosen in (y, group):
        a, b = (target.clone().requires_grad_() for _ in range(2))
        given = method.pair_loss(a, source.requires_grad_(), y, None if chosen is y else group)
        expected = by_hand(method, b, source, chosen, y)
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(torch.autograd.grad(given, a)[0], torch.autograd.grad(expected, b)[0], rtol=1e-9, atol=1e-14)
        with pytest.raises(RuntimeError, match="not have been used"):  # the source is frozen
            torch.autograd.grad(method.pair_loss(a, source, y), source)
    assert method.pair_loss(a, source, y) != method.pair_loss(a, source, y, group)


def test_two_members_of_a_class_or_one_count_nothing():
    """C3: and are no NaN."""
    target, source, _ = rows(5)
    y = torch.tensor([0, 0, 1, 3, 3])
    loss = DiffRC([9, 1, 0, 2]).pair_loss(target.requires_grad_(), source, y)
    loss.backward()
    assert loss == 0 and target.grad.abs().max() == 0
    mixed = torch.tensor([0, 0, 1, 0, 3])  # rows 0, 1 and 3 alone
    own = torch.tensor([0, 1, 3])
    method = DiffRC([9, 1, 0, 2])
    assert method.pair_loss(target, source, mixed) == method.pair_loss(target[own], source[own], mixed[own]) > 0


def test_half_precision_does_not_overflow_where_x0hat_is_large():
    """C10: at t = T x0hat is 157 times the noise; its square is beyond float16."""
    target, source, y = rows(dtype=torch.float32)
    loss = DiffRC([9] * 4).pair_loss((500 * target).half(), (500 * source).half(), y)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    plain = DiffRC([9] * 4).pair_loss(target, source, y)
    torch.testing.assert_close(loss, plain, rtol=2e-3, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert DiffRC([9] * 4).pair_loss(target, source, y) == plain


# ---- prototypes ------------------------------------------------------------------------------------------------------


def test_prototype_loss_is_the_logit_adjusted_cross_entropy():
    rng = torch.Generator().manual_seed(0)
    f, c = (F.normalize(torch.randn(n, 5, generator=rng), dim=1) for n in (7, 4))
    y, counts = torch.randint(4, (7,), generator=rng), torch.tensor([50, 20, 8, 2])
    logits = f @ c.T / 0.07
    torch.testing.assert_close(DiffRC(counts, pc_prior="uniform").prototype_loss(f, c, y), F.cross_entropy(logits, y))
    by_eq_12 = [-torch.log(counts[k] * row[k].exp() / (counts * row.exp()).sum()) for row, k in zip(logits.double(), y, strict=True)]
    torch.testing.assert_close(DiffRC(counts).prototype_loss(f, c, y, "none").double(), torch.stack(by_eq_12), rtol=1e-5, atol=1e-6)
    equal = DiffRC(counts).prototype_loss(f, torch.zeros(4, 5), y, "none")
    torch.testing.assert_close(equal, -(counts / counts.sum()).log()[y])


def test_a_class_without_images_takes_no_part():
    f, c = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1), torch.zeros(3, 5)
    y = torch.tensor([0, 0, 2, 2, 0, 2])
    for prior in ("train", "uniform"):
        method = DiffRC([5, 0, 3], pc_prior=prior)
        c = method.update(torch.zeros(3, 5), f, y)
        assert c[1].abs().max() == 0
        x = f.clone().requires_grad_()
        loss = method.prototype_loss(x, c, y)
        loss.backward()
        without = DiffRC([5, 3], pc_prior=prior).prototype_loss(f, c[[0, 2]], y // 2)
        assert torch.isfinite(x.grad).all()
        torch.testing.assert_close(loss.detach(), without)


def test_prototypes_follow_eq_11_row_by_row():
    rng = torch.Generator().manual_seed(1)
    f, y = F.normalize(torch.randn(40, 6, generator=rng, dtype=torch.float64), dim=1), torch.randint(4, (40,), generator=rng)
    y[y == 3] = 0  # class 3 has none in this batch
    old = F.normalize(torch.randn(5, 6, generator=rng, dtype=torch.float64), dim=1)
    old[4] = 0  # and class 4 has had none at all
    method, slow = DiffRC([9] * 5, momentum=0.9), old.clone()
    for row, label in zip(f, y, strict=True):
        slow[label] = 0.9 * slow[label] + 0.1 * row
    fast = method.update(old, f, y)
    torch.testing.assert_close(fast, F.normalize(slow, dim=1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fast[3:], old[3:])
    first = method.update(torch.zeros(5, 6, dtype=torch.float64), f[:1], y[:1])
    torch.testing.assert_close(first[y[0]], f[0])  # not a thousandth of it


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided():
    """(encoder, prototypes, y): a network of random weights tells classes apart well enough to have gradients."""
    torch.manual_seed(0)
    encoder = NoisyEncoder(build_denoiser("mlp", 1, 4, 0, width=32, dropout=0.0), 8).requires_grad_(False)
    return encoder, F.normalize(torch.randn(3, 8), dim=1), torch.arange(3).repeat(20)


def test_gradient_has_the_length_that_was_asked_for_and_zero_stays_zero(guided):
    """C7."""
    encoder, prototypes, y = guided
    x, t = torch.randn(60, 1, 4, 4), torch.full((60,), 300)
    plain, rms, unit = (
        DiffRC([9, 3, 2], grad_norm=kind).gradient(x, t, encoder, prototypes, y).flatten(1) for kind in ("none", "rms", "l2")
    )
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(60))
    torch.testing.assert_close(rms, 4 * unit)  # sqrt(16)
    torch.testing.assert_close(F.cosine_similarity(plain, unit), torch.ones(60))
    eps = 1e-2
    loss = lambda x: DiffRC([9, 3, 2]).prototype_loss(encoder(x, t), prototypes, y, "none")  # noqa: E731
    slope = (loss(x + eps * unit.view_as(x)) - loss(x - eps * unit.view_as(x))) / (2 * eps)
    torch.testing.assert_close(slope, plain.norm(dim=1), rtol=0.05, atol=1e-2)
    for kind in ("none", "rms", "l2"):
        flat = DiffRC([9, 3, 2], grad_norm=kind).gradient(x, t, lambda x, t: 0 * x.flatten(1)[:, :8], prototypes, y)
        assert flat.abs().max() == 0


@pytest.mark.parametrize("sign, sooner", [("descend", -1), ("paper", 1)])
def test_one_step_moves_the_loss_as_the_sign_says(guided, sign, sooner):
    """C5: the printed + leads away from the class."""
    encoder, prototypes, y = guided
    method = DiffRC([9, 3, 2], s=0.2, guidance_sign=sign)
    x, t = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(2)), torch.full((60,), 300)
    loss = lambda x: method.prototype_loss(encoder(x, t), prototypes, y, "none")  # noqa: E731
    moved = loss(x + method.shift(x, t, 0.05, encoder, prototypes, y)) - loss(x)
    assert (sooner * moved > 0).all()
    shift = method.shift(x, t, 0.05, encoder, prototypes, y).flatten(1)
    torch.testing.assert_close(shift.norm(dim=1), torch.full((60,), 0.2 * 0.05 * 4))  # s Sigma sqrt(D)


def trajectory(method, guided, steps=40):
    """Final L_PC of samples whose model knows nothing: pure noise predicted as such, so that the guidance alone decides."""
    encoder, prototypes, y = guided
    diffusion, rng = Diffusion(), torch.Generator().manual_seed(3)

    def shift(z, mean, var, x0hat, fraction):
        return method.shift(z, torch.full((len(z),), round(fraction * 1000)), var, encoder, prototypes, y)

    std = lambda t: (1 - diffusion.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)  # noqa: E731
    x = torch.randn(60, 1, 4, 4, generator=rng)
    with torch.no_grad():  # eps for data N(0, I): x_t sqrt(1 - abar)
        x = sample(diffusion, lambda z, t: z * std(t), x, steps, rng, shift=None if method is None else shift)
        return float(DiffRC([9, 3, 2]).prototype_loss(encoder(x, torch.ones(60, dtype=torch.int64)), prototypes, y))


def test_guidance_decides_where_a_trajectory_ends(guided):
    plain = trajectory(None, guided)
    assert trajectory(DiffRC([9, 3, 2], s=1.0), guided) < plain - 0.5
    assert trajectory(DiffRC([9, 3, 2], s=1.0, guidance_sign="paper"), guided) > plain + 0.5


def test_a_unit_gradient_is_a_hundredth_of_a_step_of_noise_on_images():
    """C7: of 3072 pixels, in the first of 1000 steps, the shift that "dominates" is .012 beside noise of norm 7.84."""
    matrix = torch.randn(3072, 8, generator=torch.Generator().manual_seed(0))
    x, y, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]), torch.full((2,), 1000)
    encoder = lambda x, t: F.normalize(x.flatten(1) @ matrix, dim=1)  # noqa: E731
    noise = math.sqrt(0.02 * 3072)
    assert noise == pytest.approx(7.84, abs=5e-3)
    for kind, expected in (("l2", 0.012), ("rms", 0.6 * 0.02 * math.sqrt(3072))):
        shift = DiffRC([5, 5], grad_norm=kind).shift(x, t, 0.02, encoder, torch.eye(2, 8), y)
        torch.testing.assert_close(shift.flatten(1).norm(dim=1), torch.full((2,), expected))


def test_the_noise_of_a_guided_step_has_the_variance_sigma(guided):
    """C6: Eq. 13 prints Sigma z, which would be the variance Sigma^2."""
    encoder, prototypes, y = guided
    method, diffusion = DiffRC([9, 3, 2]), Diffusion()
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(4)).expand(20_000, 1, 4, 4)
    y = torch.zeros(len(x), dtype=torch.int64)
    seen = []

    def shift(z, mean, var, x0hat, fraction):
        if not seen:
            one = method.shift(z[:1], torch.full((1,), 1000), var, encoder, prototypes, y[:1])
            seen.append((mean[0] + one[0], var))
            return one.expand_as(z)
        seen.append(z)
        raise StopIteration

    with pytest.raises(StopIteration):
        sample(diffusion, lambda z, t: torch.zeros_like(z), x, 50, torch.Generator().manual_seed(5), shift=shift)
    (mean, var), after = seen
    assert 0.3 < var < 0.35
    torch.testing.assert_close(after.var(0).mean(), torch.tensor(var), rtol=0.01, atol=0)
    assert (after.mean(0) - mean).abs().max() < 5 * math.sqrt(var / len(x))


@pytest.mark.parametrize("network, size", [("mlp", 8), ("unet", 16)])
def test_encoder_sees_image_and_time_and_has_half_a_denoiser(network, size):
    torch.manual_seed(0)
    denoiser = build_denoiser(network, 3, size, 0, width=16)
    before = sum(p.numel() for p in denoiser.parameters())
    encoder = NoisyEncoder(denoiser, 5)
    x, t = torch.randn(4, 3, size, size), torch.tensor([1, 1, 900, 900])
    f = encoder(x, t)
    torch.testing.assert_close(f.norm(dim=1), torch.ones(4))
    assert f.shape == (4, 5) and not torch.allclose(f, encoder(x, t.flip(0))) and not torch.allclose(f[:2], f[2:])
    assert sum(p.numel() for p in encoder.parameters()) < before


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="DiffRC: pair_kl must be one of tar_sou, sou_tar; got 'both'"):
        DiffRC([1], pair_kl="both")


# ---- stages ----------------------------------------------------------------------------------------------------------


def pipeline(tmp_path, **changes):
    tiny = {"width": 16, "batch_size": 32, "encoder_dim": 8, "imbalance_ratio": 50.0, "progress": False}
    settings = DiffRCConfig(**{"out": str(tmp_path / "run"), **tiny, **changes})
    return run_diffrc.Pipeline(settings, run_diffrc.load(settings))


def adapt(own, steps=5):
    modules = own.models()
    rest = own.dataset.subset(~torch.isin(own.dataset.labels, torch.tensor(own.head)))
    return Adapt(rest, modules, run_diffrc.denoising_settings(own.settings, steps), own.method, own.denoiser(), own.settings)


def test_batches_are_groups_of_distinct_images_of_one_class_at_one_time(tmp_path):
    stage = adapt(pipeline(tmp_path))
    sizes = set()
    for step in range(20):
        batch = stage.draw(step, loop.generator(0, 0, "target", step))
        for group in range(4):
            mine = stage.group == group
            assert len(batch.y[mine].unique()) == len(batch.t[mine].unique()) == 1 and len(batch.rows[mine].unique()) == mine.sum()
            assert mine.sum() == min(8, stage.counts[batch.y[mine][0]])
            sizes.add(int(mine.sum()))
        assert batch.label is None and not torch.isin(batch.y, torch.tensor([0, 1, 2])).any()
    assert sizes == {2, 3, 5, 8}  # of digits-train at 50 : 1, the smallest classes have 2 and 3
    stage = adapt(pipeline(tmp_path, pair_t="sample"))
    batch = stage.draw(0, loop.generator(0, 0, "target", 0))
    assert len(batch.t.unique()) > 20


def first_step(tmp_path, move=0.0, **changes):
    """(loss, its parts, rows that count) of the first step of stage 2, with a source that is `move` away from the target."""
    stage = adapt(pipeline(tmp_path, **changes))
    stage.modules["net"].load_state_dict(stage.source.state_dict())
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in stage.source.parameters():
            p.add_(torch.randn(p.shape, generator=rng), alpha=move)
    total, figures = stage.loss(0, loop.generator(0, 0, "target", 0))
    if figures:  # Eq. 6 to 9 from the networks' answers
        batch, abar = stage.draw(0, loop.generator(0, 0, "target", 0)), stage.diffusion.alpha_bar
        abar = abar[batch.t].view(-1, 1, 1, 1)
        noise = (net(batch.x_t, batch.t).double() for net in (stage.net, stage.source))
        x0hat = [(batch.x_t.double() - (1 - abar).sqrt() * eps) / abar.sqrt() for eps in noise]
        pair = by_hand(stage.method, *x0hat, stage.group, batch.y) / (64 if stage.own.pair_reduce == "sum" else 1)
        assert float(figures["loss_pair"].detach()) == pytest.approx(stage.own.lam * float(pair.detach()), rel=1e-3, abs=1e-7)
    sizes = stage.group.bincount()
    return float(total.detach()), {name: float(value.detach()) for name, value in figures.items()}, int(sizes[sizes > 2].sum())


def test_a_target_equal_to_the_source_has_no_pair_loss(tmp_path):
    assert abs(first_step(tmp_path, pair_weight="none")[1]["loss_pair"]) < 1e-6


def test_lambda_weighs_the_pair_loss_and_0_is_plain_denoising(tmp_path):
    plain, parts, _ = first_step(tmp_path, 0.2, lam=0.0)
    assert parts == {}
    total, parts, counted = first_step(tmp_path, 0.2, lam=0.7)
    assert parts["loss_mse"] == plain and total == pytest.approx(plain + parts["loss_pair"]) and parts["loss_pair"] > 1e-4
    assert first_step(tmp_path, 0.2, lam=0.35)[1]["loss_pair"] == pytest.approx(parts["loss_pair"] / 2, rel=1e-5)
    summed = first_step(tmp_path, 0.2, lam=0.7, pair_reduce="sum")[1]["loss_pair"]  # of Eq. 9, beside a mean over 64 pixels
    assert summed == pytest.approx(parts["loss_pair"] * counted / 64, rel=1e-5)


def test_every_setting_is_one_that_some_artefact_depends_on():
    named = {*run_diffrc.DATA, *run_diffrc.SPLIT, *(name for own in run_diffrc.SETTINGS.values() for name in own)}
    assert named == set(config.identity(DiffRCConfig()))


def test_head_and_wanted_images(tmp_path):
    own = pipeline(tmp_path)
    assert own.head == [0, 1, 2] and own.wanted.tolist() == [0, 0, 0, *(own.dataset.counts[0] - n for n in own.dataset.counts[3:])]
    assert pipeline(tmp_path, head_classes=5).head == [0, 1, 2, 3, 4]
    twice = pipeline(tmp_path, fill="ratio", fill_ratio=2.0)
    assert twice.wanted.tolist() == [0, 0, 0, *(2 * n for n in own.dataset.counts[3:])]
    assert pipeline(tmp_path, fill="fixed", fill_count=7).wanted.tolist() == [0] * 3 + [7] * 7
    with pytest.raises(ValueError, match="between 1 and 9 of 10 classes with images; got 10$"):
        pipeline(tmp_path, head_classes=10)
    with pytest.raises(ValueError, match="got 0, the many classes by --split-rule count; give --head-classes"):
        pipeline(tmp_path, split_rule="count", indices=few_of_each(tmp_path))


def few_of_each(tmp_path, counts=(9,) * 10):
    labels = data.load("digits-train").labels.numpy()
    np.save(tmp_path / "rows.npy", np.concatenate([np.flatnonzero(labels == label)[:n] for label, n in enumerate(counts)]))
    return str(tmp_path / "rows.npy")


def test_preset_of_the_paper_is_the_paper():
    paper = DIFFRC_PRESETS["diffrc-paper"]
    stated = {
        "lam": 0.5, "pair_gamma": 0.1, "pair_weight": "paper", "pair_kl": "tar_sou", "proto_momentum": 0.999, "tau": 0.07, "s": 0.2,
        "guidance_sign": "paper", "grad_norm": "l2", "sample_steps": 250, "pc_prior": "train", "dataset": "cifar10-lt",
    }  # fmt: skip
    assert {name: getattr(paper, name) for name in stated} == stated
    fields = {item.name: item.metadata for item in dataclasses.fields(DiffRCConfig)}
    assert {fields[name]["paper"] for name in ("s", "tau", "lam")} == {0.2, 0.07, 0.5}
    assert (paper.source_steps, paper.lr, paper.ema_decay) == (200_000, 2e-4, 0.9999)  # of which it says nothing: not the digits' minutes
    assert DIFFRC_PRESETS["table1-cifar100-50"].imbalance_ratio == 50 and DIFFRC_PRESETS["table2-imagenet"].split_rule == "count"


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--stages 6", "--stages must be numbers of 1 to 5, as in 4 or 4,5 or 1-3; got '6'"),
        ("--stages 3-1", "--stages must be numbers of 1 to 5, as in 4 or 4,5 or 1-3; got '3-1'"),
        ("--stages 4", "--stages 4 needs stage 2 (target); "),
        ("--group-size 2", "group_size must be >= 3, or lam 0: L_pair compares an image with two others; got 2"),
        ("--s 0 --label-by guidance", "label_by guidance needs s > 0"),
        ("--source nowhere", "--source needs a run of diffrc whose stage 1 is finished; got nowhere"),
        ("--dataset digits-lt", "test_set: expected a data set with a test set of its own"),
        ("--sample-steps 1001", "sample_steps must be <= timesteps=1000"),
    ],
)
def test_wrong_calls_leave_nothing_behind(tmp_path, capsys, options, expected):
    try:
        code = run(tmp_path / "run", *options.split())
    except SystemExit as stop:  # tyro's way, with boxes around its words
        code = stop.code
    assert code == 2 and not (tmp_path / "run").exists()
    assert expected in re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().err)


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(out, *options):
    return main(["diffrc", *TINY.split(), "--out", str(out), *options])


def report_of(folder):
    return {**json.loads((folder / "metrics.json").read_text()), "seconds": 0}


def same_bits(one, other):
    """Weights, samples, log and report of two runs."""
    weights = sorted(path.name for path in (one / "weights").glob("*.safetensors"))
    assert weights == sorted(path.name for path in (other / "weights").glob("*.safetensors")) and len(weights) == 6
    for name in (*(f"weights/{name}" for name in weights), "samples.npy", "sample_labels.npy"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert report_of(one) == report_of(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("diffrc") / "whole"
    assert run(folder) == 0
    return folder


@pytest.fixture
def undrawn(whole, monkeypatch):
    """Pictures are most of what so short a run costs; that of `whole` has them."""
    monkeypatch.setattr(run_diffrc.Pipeline, "draw", lambda self, report: None)
    return whole


def test_what_every_stage_is_given(whole, tmp_path, monkeypatch):
    """The target starts from the source's weights and sees no head class; the encoder sees noise; images are led to the labels that they
    are written with; the classifier gets real and generated images, each with its own label."""
    seen, train, classify, part = {}, run_diffrc.train, run_diffrc.train_classifier, run_diffrc.Pipeline.part

    def noted(stage, *given, **options):
        if stage.name == "target":
            weights = [module.state_dict() for module in (stage.modules["net"], stage.modules["ema"].net, stage.source)]
            seen["target"] = [{name: value.clone() for name, value in one.items()} for one in weights], stage.y.clone()
        if stage.name == "encoder":
            stage.modules["encoder"].register_forward_pre_hook(lambda module, given: seen.setdefault("encoder", []).append(given))
        train(stage, *given, **options)

    def told(images, labels, *given, **options):
        seen[options["stage"]] = images, labels
        return classify(images, labels, *given, **options)

    def led(self, number, missing):
        shift, goals = self.method.shift, []
        object.__setattr__(self.method, "shift", lambda *given: goals.append(given[-1]) or shift(*given))
        out = part(self, number, missing)
        object.__delattr__(self.method, "shift")
        seen.setdefault("led", []).append((goals, out["labels"]))
        return out

    monkeypatch.setattr(run_diffrc, "train", noted)
    monkeypatch.setattr(run_diffrc, "train_classifier", told)
    monkeypatch.setattr(run_diffrc.Pipeline, "part", led)
    monkeypatch.setattr(run_diffrc.Pipeline, "draw", lambda self, report: None)
    out = tmp_path / "run"
    assert run(out) == 0
    same_bits(whole, out)

    (path,) = out.glob("weights/source-*.safetensors")
    source = {name.removeprefix("ema.net."): value for name, value in load_file(path).items() if name.startswith("ema.net.")}
    weights, labels = seen["target"]
    for one in weights:
        assert all(torch.equal(one[name], value) for name, value in source.items()) and len(source) > 4
    head = json.loads((out / "metrics.json").read_text())["head"]
    assert not torch.isin(labels, torch.tensor(head)).any() and len(labels) > 0
    assert len(seen["encoder"]) > 3 and all((x.abs() > 1.5).any() for x, t in seen["encoder"])  # images are in [-1, 1]
    for goals, labels in seen["led"]:
        assert len(goals) > 2 and all(torch.equal(goal, labels) for goal in goals)
    assert len(seen["led"][0][1].unique()) > 1
    images, labels = seen["classifier"]
    real, real_labels = seen["softmax"]
    made, made_labels = (torch.from_numpy(np.load(out / f"{name}.npy")) for name in ("samples", "sample_labels"))
    assert torch.equal(images, torch.cat([real, made.float() / 127.5 - 1])) and torch.equal(labels, torch.cat([real_labels, made_labels]))


def test_a_class_that_the_filter_refuses_does_not_take_the_others_images(tmp_path, monkeypatch):
    own = pipeline(tmp_path, filter_conf=0.5, sample_batch=50, fill="fixed", fill_count=20)
    turn = torch.arange(50) % 7
    own.sampler = {"ema": None, "balanced": lambda images: 50.0 * F.one_hot(turn + 3, 10) * (turn > 0)[:, None]}
    monkeypatch.setattr(run_diffrc, "sample", lambda diffusion, net, x, *given, **options: x)
    out = own.part(0, own.wanted)
    assert torch.equal(out["labels"], turn + 3)  # in turn, and not the twenty of class 3 first
    assert torch.equal(out["keep"], out["labels"] != 3)


def test_a_run_leaves_its_files(whole):
    report = report_of(whole)
    assert report["method"] == "diffrc" and report["dataset"] == "digits-train-lt" and report["head"] == [0, 1, 2]
    assert set(report["baselines"]) == {"softmax", "balanced"}
    for one in (report, *report["baselines"].values()):
        groups = [one[name] for name in ("top1_many", "top1_med", "top1_few")]
        assert one["std"] == pytest.approx(np.std(groups)) and len(one["per_class"]) == 10 and 0 <= one["top1"] <= 1
    made = report["generated"]
    assert made["wanted"] == made["kept"] == [0] * 3 + [report["counts"][0] - n for n in report["counts"][3:]]
    assert made["drawn"] == sum(made["kept"])
    samples, labels = (np.load(whole / f"{name}.npy") for name in ("samples", "sample_labels"))
    assert samples.shape == (sum(made["kept"]), 1, 8, 8) and samples.dtype == np.uint8 and np.bincount(labels).tolist() == made["kept"]
    steps = report["sampling"]
    assert steps["t"] == [1000, 667, 333] and steps["noise"][-1] == steps["shift"][-1] == 0
    ratio = np.array(steps["shift"][:2]) / steps["noise"][:2]
    np.testing.assert_allclose(ratio, [0.6 * Diffusion().reverse_variance(*pair) ** 0.5 for pair in ((1000, 667), (667, 333))], rtol=1e-4)
    assert "top1" in (whole / "card.md").read_text()
    pictures = ("generated", "guidance", "per_class", "losses_source", "losses_target", "losses_encoder")
    for name in (*(f"{name}.png" for name in pictures), "config.json", "indices.json", "log.jsonl"):
        assert (whole / name).stat().st_size > 0, name
    artefacts = json.loads((whole / "artefacts.json").read_text())
    assert set(artefacts) == {*run_diffrc.STAGES, *run_diffrc.BASELINES} and all(one["done"] for one in artefacts.values())


KILLED = {  # stage: what is patched, and when it ends
    "source": (Denoise, "draw", lambda self, step, rng: self.name == "source" and step == 5),
    "target": (Adapt, "draw", lambda self, step, rng: step == 5),
    "encoder": (Prototypical, "loss", lambda self, step, rng: step == 5),
    "samples": (run_diffrc.Pipeline, "part", lambda self, number, missing: number == 1),
    "classifier": (Recognise, "loss", lambda self, step, rng: self.name == "classifier" and step == 2),
}


@pytest.mark.parametrize("stage", KILLED)
def test_a_run_that_ended_in_any_stage_goes_on_to_the_same_bits(undrawn, tmp_path, stage, monkeypatch):
    kind, name, when = KILLED[stage]
    original = getattr(kind, name)

    def dies(self, *given):
        if when(self, *given):
            raise SystemError("killed")
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, dies)
        with pytest.raises(SystemError, match="killed"):
            run(tmp_path / "cut")
    there = json.loads((tmp_path / "cut" / "artefacts.json").read_text())
    order = run_diffrc.STAGES[: run_diffrc.STAGES.index(stage)]
    assert not there[stage]["done"] and all(there[one]["done"] for one in order) and not (tmp_path / "cut" / "metrics.json").exists()
    if stage in ("source", "target", "encoder"):
        assert checkpoint.latest(tmp_path / "cut", stage) == 4
    assert main(["diffrc", "--no-progress", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    same_bits(undrawn, tmp_path / "cut")


SIGKILL = """
import os, signal
from training.__main__ import main
from training.run_diffrc import Pipeline
part = Pipeline.part
def dies(self, number, missing):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return part(self, number, missing)
Pipeline.part = dies
main({command})
"""


def test_sigkill_between_two_parts_of_the_samples(undrawn, tmp_path):
    cut = tmp_path / "cut"
    script = SIGKILL.format(command=["diffrc", *TINY.split(), "--out", str(cut)])
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (cut / "samples").glob("*.safetensors")] == ["0000.safetensors"]
    assert main(["diffrc", "--no-progress", "--out", str(cut), "--resume"]) == 0
    same_bits(undrawn, cut)


def test_stages_one_by_one_are_the_whole(undrawn, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, "--stages", "1") == 0
    assert "stages 1 are made" in capsys.readouterr().out and not (out / "metrics.json").exists()
    assert set(json.loads((out / "artefacts.json").read_text())) == {"source"}
    assert run(out, "--stages", "2-4", "--resume") == 0 and not (out / "metrics.json").exists()
    assert run(out, "--resume") == 0
    same_bits(undrawn, out)


def test_a_stale_artefact_is_refused_by_name_and_made_again_on_demand(undrawn, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, "--stages", "1-4") == 0
    before = (out / "samples.npy").read_bytes()
    assert run(out, "--resume", "--stages", "4", "--lam", "0.1") == 2
    text = capsys.readouterr().err
    assert f"stage 2 (target) in {out} is of other settings (lam: 0.5 != 0.1); give --stages 2 to make it again, or another --out" in text
    assert config.read(out / "config.json", DiffRCConfig).lam == 0.5 and (out / "samples.npy").read_bytes() == before
    assert run(out, "--resume", "--s", "0.9") == 2
    assert "stage 4 (samples)" in (text := capsys.readouterr().err) and "(s: 0.6 != 0.9); give --stages 4" in text

    assert run(out, "--resume", "--stages", "4", "--s", "0.9") == 0
    assert (out / "samples.npy").read_bytes() != before and config.read(out / "config.json", DiffRCConfig).s == 0.9
    other = tmp_path / "other"
    assert run(other, "--s", "0.9") == 0
    assert run(out, "--resume", "--s", "0.9") == 0
    same_bits(out, other)
    assert run(out, "--resume", "--stages", "2", "--s", "0.9", "--lam", "0.1") == 0
    assert not (out / "metrics.json").exists() and not (out / "card.md").exists()
    capsys.readouterr()
    assert main(["diffrc", "--no-progress", "--out", str(out), "--resume"]) == 2
    assert "stage 4 (samples)" in (text := capsys.readouterr().err) and "target: " in text


@pytest.mark.parametrize("name, change", [
    ("weights/target-*.safetensors", "cut"), ("weights/encoder-*", "delete"),
    ("samples/0000.safetensors", "cut"), ("sample_labels.npy", "cut"), ("samples/0001.safetensors", "delete"),
])  # fmt: skip
def test_a_lost_or_damaged_artefact_is_made_again(undrawn, tmp_path, capsys, name, change):
    out = tmp_path / "run"
    shutil.copytree(undrawn, out)
    for path in out.glob(name):
        path.unlink() if change == "delete" else path.write_bytes(path.read_bytes()[:100])
    (out / "metrics.json").unlink()
    assert main(["diffrc", "--no-progress", "--out", str(out), "--resume"]) == 0
    assert "lost or damaged" in (text := capsys.readouterr().out) and text.count("it is made again") == 1
    same_bits(undrawn, out)


def test_a_kill_while_old_weights_are_discarded_leaves_none_of_them(undrawn, tmp_path, monkeypatch):
    out, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(undrawn, out)
    options = ["--resume", "--stages", "2", "--lam", "0.9"]
    with monkeypatch.context() as patch:
        patch.setattr(run_diffrc.checkpoint, "discard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(out, *options) == 130
    assert run(out, *options) == 0
    assert run(again, "--stages", "1-2", "--lam", "0.9") == 0
    (path,) = again.glob("weights/target-*.safetensors")
    assert (out / "weights" / path.name).read_bytes() == path.read_bytes() != (undrawn / "weights" / path.name).read_bytes()


@pytest.mark.parametrize("text", ["{", "[]", '{"source": {}}'])
def test_a_damaged_list_of_artefacts_is_refused_by_name(undrawn, tmp_path, capsys, text):
    out = tmp_path / "run"
    shutil.copytree(undrawn, out)
    (out / "artefacts.json").write_text(text)
    assert main(["diffrc", "--no-progress", "--out", str(out), "--resume"]) == 2
    assert f"diffrc: {out / 'artefacts.json'} is damaged" in capsys.readouterr().err


def test_runs_share_what_they_would_make_alike(undrawn, tmp_path, monkeypatch, capsys):
    """The arms of the ablation: one source model, and the encoder where it is asked for."""
    trained = []
    original = run_diffrc.train

    def noted(stage, *given, **options):
        trained.append(stage.name)
        original(stage, *given, **options)

    monkeypatch.setattr(run_diffrc, "train", noted)
    assert run(tmp_path / "pdl", "--source", str(undrawn), "--s", "0") == 0
    assert trained == []  # source and target are taken, the encoder is not needed
    report = report_of(tmp_path / "pdl")
    assert report["generated"]["label_by"] == "classifier" and report["sampling"] is None and "encoder" not in report
    assert report["baselines"] == report_of(undrawn)["baselines"]
    assert run(tmp_path / "mpcl", "--source", str(undrawn), "--lam", "0") == 0
    assert trained == ["target"]
    assert (tmp_path / "mpcl" / "weights" / "encoder-000006.safetensors").read_bytes() == (
        undrawn / "weights" / "encoder-000006.safetensors"
    ).read_bytes()
    alone = tmp_path / "alone"
    assert run(alone, "--lam", "0") == 0
    same_bits(alone, tmp_path / "mpcl")
    assert run(tmp_path / "other", "--source", str(undrawn), "--lr", "0.01") == 2
    assert f"stage 1 (source) of --source {undrawn} is of other settings (lr: 0.001 != 0.01)" in capsys.readouterr().err
    assert run(tmp_path / "other", "--source", str(undrawn), "--head-classes", "2") == 2
    assert "is of other settings (head: [0, 1, 2] != [0, 1])" in capsys.readouterr().err
    negative = lambda dataset: dataclasses.replace(dataset, images=-dataset.images)  # noqa: E731
    monkeypatch.setattr(run_diffrc, "load", lambda settings, own=run_diffrc.load: negative(own(settings)))
    assert run(tmp_path / "other", "--source", str(undrawn)) == 2  # other images under the same name
    assert "is of other settings (images: " in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_labels_by_the_classifier_and_the_filter(undrawn, tmp_path):
    """C9. What is not sure enough is drawn again, but not for ever."""
    assert run(tmp_path / "sure", "--source", str(undrawn), "--filter-conf", "0.99", "--fill-tries", "2") == 0
    made = report_of(tmp_path / "sure")["generated"]
    assert sum(made["kept"]) < sum(made["wanted"]) and 2 * sum(made["wanted"]) <= made["drawn"] < 2 * sum(made["wanted"]) + 300
    assert run(tmp_path / "told", "--source", str(undrawn), "--label-by", "classifier") == 0
    report = report_of(tmp_path / "told")
    made = report["generated"]
    assert made["kept"] == made["alike"] and all(kept <= wanted for kept, wanted in zip(made["kept"], made["wanted"], strict=True))
    assert report["sampling"] is not None  # guided all the same


def test_classes_of_one_image_and_of_none(tmp_path, capsys):
    rows = few_of_each(tmp_path, (30, 20, 10, 6, 5, 4, 0, 2, 1, 1))
    assert run(tmp_path / "run", "--dataset", "digits-train", "--indices", rows) == 0
    text = capsys.readouterr().out
    assert "pair loss: classes 7, 8, 9 have fewer than 3 images and count 0" in text
    assert "samples: classes 6 have no image, so none is generated" in text
    report = report_of(tmp_path / "run")
    assert report["generated"]["kept"] == [0, 0, 0, 24, 25, 26, 0, 28, 29, 29]
    for row in loop.read_log(tmp_path / "run" / "log.jsonl"):
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))


def test_balanced_images_need_none(tmp_path):
    assert run(tmp_path / "run", "--imbalance-ratio", "1") == 0
    report = report_of(tmp_path / "run")
    assert report["generated"]["kept"] == [0] * 10 and report["sampling"] is None
    assert np.load(tmp_path / "run" / "samples.npy").shape == (0, 1, 8, 8)


def test_colour_images_of_a_folder_go_through_the_unet(tmp_path):
    rng = np.random.default_rng(0)
    for part, counts in (("train", (9, 6, 4)), ("test", (2, 2, 2))):
        for label, count in enumerate(counts):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.full((16, 16, 3), 40, np.uint8)
                colour[..., label] = rng.integers(100, 255, (16, 16))
                Image.fromarray(colour).save(folder / f"{i}.png")
    options = "--image-size 16 --width 8 --sample-steps 2 --flip yes --grad-norm none --pair-t sample".split()
    assert run(tmp_path / "run", "--dataset", f"folder:{tmp_path / 'train'}", *options) == 0
    report = report_of(tmp_path / "run")
    assert report["generated"]["kept"] == [0, 3, 5] and report["test"].endswith("n = 6")
    weights = load_file(tmp_path / "run" / "weights" / "encoder-000006.safetensors")
    assert weights["prototypes.rows"].norm(dim=1).tolist() == pytest.approx([1, 1, 1])
