"""CLUDI: closed forms of schedule, weights, sampler and losses, clusters of separated Gaussians, and a short run."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_config import refused

from training import checkpoint, config, data, figures_cludi, heads, loop, metrics, run_cludi
from training.__main__ import main
from training.config import CLUDI_PRESETS, CLUDIConfig
from training.diffusion import SqrtDiffusion
from training.loop import generator, train
from training.methods import cludi
from training.methods.cludi import CLUDI, class_loss, class_targets, log_predictions, snr_weight
from training.networks import AssignmentNet
from training.runfolder import load_rows
from training.views import perturb_features

UNIFORM = torch.full((10,), 0.1, dtype=torch.float64).log()


# ---- schedule and weights --------------------------------------------------------------------------------------------


def test_sqrt_schedule_as_printed_and_through_betas():
    paper, betas = SqrtDiffusion(1000, "paper").alpha_bar, SqrtDiffusion(1000, "betas").alpha_bar
    assert paper[[1, 500, 999]].tolist() == pytest.approx([0.966834, 0.292823, 0.000450101], rel=2e-6)
    assert 1 - math.sqrt(1 + 1e-4) == pytest.approx(-4.99988e-5, rel=1e-5)  # what Eq. 12 prints for t = T ...
    assert float(paper[1000]) == 1e-6  # ... and what takes its place
    assert betas[[1, 500, 999, 1000]].tolist() == pytest.approx([0.976600, 0.295780, 0.000454648, 4.54648e-7], rel=2e-6)
    raw = 1 - (1 - math.sqrt(1 + 1e-4)) / (1 - math.sqrt(0.999 + 1e-4))
    assert raw == pytest.approx(1.111, abs=1e-3) and float(1 - betas[1000] / betas[999]) == pytest.approx(0.999)
    for alpha_bar in (paper, betas):
        assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all()


def test_min_snr_weights():
    schedule, t = SqrtDiffusion(), torch.tensor([1, 500, 999])
    snr = schedule.snr(t)
    assert snr.tolist() == pytest.approx([41.7346, 0.420011, 4.54855e-4], rel=1e-5)
    weight = {kind: snr_weight(snr, kind, 5.0).tolist() for kind in ("min_x0", "min_v", "paper_max", "none")}
    assert weight["min_v"] == pytest.approx([0.117001, 0.295780, 0.000454648], rel=5e-6)
    assert weight["paper_max"] == pytest.approx([0.976600, 3.521100, 4.997730], rel=1e-5)  # Eq. 26 as printed weighs noise most
    assert weight["min_x0"] == pytest.approx([5, 0.420011, 4.54855e-4], rel=1e-5) and weight["none"] == [1, 1, 1]
    assert (snr_weight(snr, "min_x0", 5.0) / snr)[:2].tolist() == pytest.approx([0.119805, 1], rel=1e-5)  # of predicted noise
    index = torch.arange(1000)
    assert int(index[schedule.snr(index + 1) >= 5].max()) == 29 and int(index[schedule.snr(index + 1) >= 1].max()) == 253


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_ddim_with_eta_1_is_the_exact_posterior():
    schedule = SqrtDiffusion(1000, "paper")
    variance = schedule.reverse_variance(520, 480)
    at, as_ = schedule.alpha_bar[[520, 480]].tolist()
    assert math.sqrt(variance) == pytest.approx(0.297482, rel=2e-6)
    assert math.sqrt(1 - as_ - variance) == pytest.approx(0.777430, rel=2e-6)
    assert math.sqrt(1 - as_ - variance) / math.sqrt(1 - at) == pytest.approx(math.sqrt(at / as_) * (1 - as_) / (1 - at), rel=1e-12)
    z_t, x0 = torch.randn(2, 5, 3, dtype=torch.float64)
    mean, found = schedule.reverse_x0(z_t, x0, 520, 480)
    exact = math.sqrt(as_) * (1 - at / as_) / (1 - at) * x0 + math.sqrt(at / as_) * (1 - as_) / (1 - at) * z_t  # q(z_s | z_t, z_0)
    torch.testing.assert_close(mean, exact)
    assert found == variance
    # by way of predicted noise, as far as float64 carries: the same step
    torch.testing.assert_close(schedule.reverse(z_t, (z_t - math.sqrt(at) * x0) / math.sqrt(1 - at), 520, 480)[1], mean)


class Oracle(torch.nn.Module):
    """Predicts the same z_0 always, and remembers what it was given."""

    def __init__(self, z0):
        super().__init__()
        self.z0, self.dim, self.seen = z0, z0.shape[-1], []

    def condition(self, x):
        return x

    def forward(self, z_t, h, t, guess):
        self.seen.append((z_t, int(t[0]), guess))
        return self.z0.expand_as(z_t)


@pytest.mark.parametrize("mode", ["paper", "betas"])
def test_an_oracle_is_returned_exactly_and_on_its_way_the_noise_has_the_right_variance(mode):
    settings = CLUDIConfig(noise_scale_f2=9.0, sqrt_mode=mode, self_conditioning=1.0)
    z0, x, rng = torch.randn(1, 4000, 8), torch.zeros(4000, 3), torch.Generator().manual_seed(0)
    method, oracle = CLUDI(settings, torch.full((4,), 0.25)), Oracle(z0)
    assert torch.equal(method.denoise(oracle, x, 2, 25, rng), z0.expand(2, -1, -1))
    assert [t for _, t, _ in oracle.seen] == method.diffusion.times(25)[:-1]
    for i, (z, t, guess) in enumerate(oracle.seen):
        at = float(method.diffusion.alpha_bar[t])
        assert float((z - math.sqrt(at) * z0).var()) == pytest.approx(9.0 * (1 - at), rel=0.03)  # 64000 draws: sd .006
        assert torch.equal(guess, z0.expand_as(guess) if i else torch.zeros_like(guess))  # the step before; none before the first


def test_the_student_sees_eq_15_and_a_guess_of_its_own():
    settings = CLUDIConfig(noise_scale_f2=9.0, self_conditioning=1.0, dropout=0.0)
    z0, t = torch.randn(2, 4000, 8), torch.tensor([300, 300])
    method, oracle = CLUDI(settings, torch.full((4,), 0.25)), Oracle(torch.randn(1, 4000, 8))
    oracle.condition = lambda x, *_: x
    method.study(oracle, torch.randn(4000, 3), z0, t, torch.Generator().manual_seed(0))
    (first, _, nothing), (z, _, guess) = oracle.seen
    at = float(method.diffusion.alpha_bar[300])
    assert torch.equal(first, z) and torch.equal(guess, oracle.z0.expand_as(guess)) and not nothing.any()
    assert float((z - math.sqrt(at) * z0).var()) == pytest.approx(9.0 * (1 - at), rel=0.03)
    method = CLUDI(dataclasses.replace(settings, self_conditioning=0.0), torch.full((4,), 0.25))
    oracle.seen.clear()
    method.study(oracle, torch.randn(4000, 3), z0, t, torch.Generator().manual_seed(0))
    assert len(oracle.seen) == 1 and not oracle.seen[0][2].any()


@pytest.mark.parametrize("preset", ["default", "cludi-paper", "cludi-code"])
def test_the_loss_is_eq_27(preset):
    """From the teacher's and the student's answers, term by term."""
    config_ = dataclasses.replace(CLUDI_PRESETS[preset], teacher_steps=3, replicas=3)
    net, x = small_net(d=16), torch.randn(12, 6)
    method = CLUDI(config_, torch.full((10,), 0.1))
    total, parts = method.loss(net, x, torch.Generator().manual_seed(1))

    rng = torch.Generator().manual_seed(1)
    z0, teacher = method.teach(net, x, rng)
    t = torch.randint(1, 1001, (3,), generator=rng)
    predicted = method.study(net, x, z0, t, rng)
    student = net.head(predicted)
    snr = method.diffusion.snr(t).float()
    weight = {"min_x0": snr.clamp(max=5), "paper_max": snr.clamp(min=5) / (snr + 1)}[config_.snr_weight]
    weight = weight / 49 if preset == "cludi-code" else weight
    target = predicted if preset == "cludi-paper" else 4 * F.normalize((student / config_.tau).softmax(-1) @ net.embedding, dim=-1)
    square = (z0 - target).square()
    dif = (weight[:, None] * (square.sum(-1) if preset == "cludi-paper" else square.mean(-1))).mean()
    pairs = [(b, b) for b in range(3)] if preset == "cludi-paper" else [(a, b) for a in range(3) for b in range(3)]
    rows = (1,) if preset == "cludi-code" else (0, 1)
    prior = method.log_prior
    q, p = (class_targets(v, config_.tau_col, prior, rows) for v in (teacher, student))
    log_q, log_p = (log_predictions(v, config_.tau, prior, rows) for v in (teacher, student))
    terms = [-0.5 * weight[b] * (q[a] * log_p[b] + p[b] * log_q[a]).sum(-1).mean() for a, b in pairs]
    cls = torch.stack(terms).mean()
    torch.testing.assert_close(parts["loss_dif"], dif, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["loss_cls"], cls, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, dif + config_.lam * cls, rtol=1e-4, atol=1e-6)


def test_the_released_grid_and_its_times():
    assert [t - 1 for t in SqrtDiffusion().times(25)] == [*range(999, 38, -40), -1]


def small_net(k=10, d=64, n=6, **more):
    return AssignmentNet(n, d, k, 1000, width=32, **more)


def test_embeddings_have_norm_sqrt_d_and_one_hot_makes_the_round_trip():
    net = small_net()
    z = net.embed(torch.rand(3, 20, 10).softmax(-1))
    torch.testing.assert_close(z.norm(dim=-1), torch.full((3, 20), 8.0))
    torch.testing.assert_close(net.embed(torch.eye(10)), 8 * F.normalize(net.embedding, dim=1))
    torch.testing.assert_close(net.embedding.norm(dim=1), torch.ones(10))  # unit rows as they are made


def test_the_teachers_logits_are_eq_14_or_those_of_the_denoised_embedding():
    net, x = small_net(), torch.randn(12, 6)
    ends = {}
    for kind in ("paper", "direct"):
        method = CLUDI(CLUDIConfig(teacher_logits=kind, teacher_steps=3), torch.full((10,), 0.1))
        ends[kind] = method.teach(net, x, torch.Generator().manual_seed(0))
        denoised = method.denoise(net, x, method.config.replicas, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ends["direct"][1], net.head(denoised))
    torch.testing.assert_close(ends["paper"][1], net.head(ends["paper"][0]))
    torch.testing.assert_close(ends["direct"][0], net.embed((net.head(denoised) / 0.1).softmax(-1)))


@pytest.mark.parametrize("grad, body, heads", [("none", False, False), ("head", False, True), ("full", True, True)])
def test_where_the_teachers_gradient_goes(grad, body, heads):
    net, x = small_net(trainable=True), torch.randn(12, 6)
    method = CLUDI(CLUDIConfig(teacher_grad=grad, teacher_steps=2, teacher_logits="paper"), torch.full((10,), 0.1))
    z0, logits = method.teach(net, x, torch.Generator().manual_seed(0))
    assert z0.requires_grad == (grad == "full") and logits.requires_grad == (grad != "none")
    if logits.requires_grad:
        logits.square().sum().backward()
    reached = lambda parameter: parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)  # noqa: E731
    assert (reached(net.trunk[0].weight), reached(net.head.weight), reached(net.embedding)) == (body, heads, heads)


# ---- l_cls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, expected", [(10, 2.302585), (50, 3.912023)])
@pytest.mark.parametrize("pairs", ["matched", "all"])
@pytest.mark.parametrize("norm", ["joint", "per_replica"])
def test_constant_logits_and_collapse_both_cost_log_k_and_a_perfect_assignment_nothing(k, expected, pairs, norm):
    prior = torch.full((k,), 1 / k, dtype=torch.float64).log()
    loss = lambda logits: float(class_loss(logits, logits, prior, pairs=pairs, norm=norm))  # noqa: E731
    constant = torch.zeros(3, 2 * k, k, dtype=torch.float64)
    assert loss(constant) == pytest.approx(expected, abs=1e-6)
    collapsed = constant.clone()
    collapsed[..., 0] = 30.0
    assert loss(collapsed) == pytest.approx(expected, abs=1e-6)
    perfect = 30.0 * F.one_hot(torch.arange(2 * k) % k, k).double().expand(3, -1, -1)
    assert loss(perfect) == pytest.approx(0, abs=1e-6)


def reference_loss(teacher, student, norm, pairs, weight, tau=0.1, tau_col=0.05):
    """Eq. 20 to 24 with plain softmax and log, over explicit B x B pairs."""
    b, n, k = teacher.shape
    rows, count = ((0, 1), b * n) if norm == "joint" else ((1,), n)

    def target(logits):
        e = torch.exp(logits / tau_col)
        column = e / e.sum(rows, keepdim=True)
        return column / column.sum(-1, keepdim=True)

    def prediction(logits):
        p = torch.softmax(logits / tau, -1)
        return count / k * p / p.sum(rows, keepdim=True)

    total, used = 0.0, 0
    for i in range(b):
        for j in range(b):
            if pairs == "all" or i == j:
                cross = target(teacher)[i] * prediction(student)[j].log() + target(student)[j] * prediction(teacher)[i].log()
                total, used = total - weight[j] * 0.5 * cross.sum(-1).mean(), used + 1
    return total / used


@pytest.mark.parametrize("pairs", ["matched", "all"])
@pytest.mark.parametrize("norm", ["joint", "per_replica"])
def test_the_log_domain_form_is_the_formula(pairs, norm):
    teacher, student = torch.randn(2, 4, 30, 10, dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64)
    found = class_loss(teacher, student, UNIFORM, weight=weight, pairs=pairs, norm=norm)
    assert float(found) == pytest.approx(float(reference_loss(teacher, student, norm, pairs, weight)), rel=1e-9)
    single = class_loss(teacher.float(), student.float(), UNIFORM.float(), weight=weight.float(), pairs=pairs, norm=norm)
    assert float(single) == pytest.approx(float(found), rel=1e-5)


def test_large_logits_stay_finite_where_the_formula_does_not():
    logits = torch.randn(2, 40, 10, generator=torch.Generator().manual_seed(0)) * 100
    assert not torch.isfinite(reference_loss(logits, logits, "joint", "matched", torch.ones(2)))
    logits.requires_grad_()
    loss = class_loss(logits, logits, UNIFORM.float())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_all_pairs_take_no_more_memory_than_matched_ones():
    """B x B x N x K floats would be 32 times the logits; the largest tensor made is as large as the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    logits = torch.randn(32, 50, 10, requires_grad=True)
    with Largest() as largest:
        class_loss(logits, logits.detach().flip(0), UNIFORM.float(), weight=torch.ones(32), pairs="all").backward()
    assert largest.size == logits.numel()


def test_a_class_prior_is_what_targets_and_predictions_average_to():
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    label = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = 30.0 * F.one_hot(label, 3).double()[None]
    assert float(class_loss(logits, logits, prior.log())) == pytest.approx(0, abs=1e-6)  # shares as the prior says: nothing to gain
    assert float(class_loss(logits, logits, torch.full((3,), 1 / 3).double().log())) > 0.05  # the uniform prior fights the truth (L14)
    anything = torch.randn(1, 10, 3, dtype=torch.float64)
    weighted = log_predictions(anything, 0.1, prior.log(), (0, 1)).exp()
    torch.testing.assert_close(weighted.mean((0, 1)), prior)
    assert float(class_targets(torch.zeros(1, 10, 3).double(), 0.05, prior.log(), (0, 1))[0, 0, 0]) == pytest.approx(0.6)


# ---- the student -----------------------------------------------------------------------------------------------------


def test_views_of_features():
    x, rng = torch.randn(4, 3000, 20), torch.Generator().manual_seed(1)  # another seed than x has
    paper = perturb_features(x, rng, "gaussian", (0.1, 0.3), (0.2, 0.2))
    assert float((paper - x).square().mean()) == pytest.approx(0.2 + 0.2, abs=0.01)  # mean variance .2, and a fifth of unit coordinates
    assert (paper == 0).sum() == 0  # dropped first, noise after
    code = perturb_features(F.normalize(x, dim=-1), rng, "direction", (0.2, 1.0), (0.05, 0.1))
    assert float((code == 0).float().mean()) == pytest.approx(0.075, abs=0.005)
    moved = perturb_features(F.normalize(x, dim=-1), rng, "direction", (0.5, 0.5), (0.0, 0.0)) - F.normalize(x, dim=-1)
    torch.testing.assert_close(moved.norm(dim=-1), torch.full((4, 3000), 0.5))


def test_the_loss_is_a_function_of_its_generator_and_global_randomness_plays_no_part():
    net, x = small_net(), torch.randn(12, 6)
    method = CLUDI(CLUDIConfig(teacher_steps=3), torch.full((10,), 0.1))
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(ends))
        ends.append(float(method.loss(net, x, torch.Generator().manual_seed(seed))[0]))
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("change", [{"dif_target": "raw"}, {"dif_target": "reembed"}])
def test_sum_is_d_times_mean_in_l_dif(change):
    net, x = small_net(), torch.randn(12, 6)
    dif = [
        float(CLUDI(CLUDIConfig(teacher_steps=3, dif_reduce=reduce, **change), torch.full((10,), 0.1))
              .loss(net, x, torch.Generator().manual_seed(0))[1]["loss_dif"])
        for reduce in ("sum", "mean")
    ]  # fmt: skip
    assert dif[0] == pytest.approx(64 * dif[1], rel=1e-5)


def test_probabilities_or_logits_are_averaged():
    logits = torch.tensor([[[0.3, 0.0]], [[-0.1, 0.0]]])  # (M, 1, K)
    mean = CLUDI(CLUDIConfig(avg="probs"), torch.ones(2) / 2).probabilities(logits)
    assert float(mean[0, 0]) == pytest.approx((1 / (1 + math.exp(-3)) + 1 / (1 + math.e)) / 2)
    assert float(CLUDI(CLUDIConfig(avg="logits"), torch.ones(2) / 2).probabilities(logits)[0, 0]) == pytest.approx(1 / (1 + math.exp(-1)))


# ---- presets ---------------------------------------------------------------------------------------------------------

DISAGREEMENTS = {  # field: (paper, code)
    "sqrt_mode": ("paper", "betas"),  # L1
    "noise_std": (None, 49.0),  # L3
    "snr_weight": ("paper_max", "min_x0"),  # L4
    "snr_over_std": (False, True),  # L4: the released weight is min(SNR, 5) / 49
    "teacher_logits": ("paper", "direct"),  # L5
    "dif_target": ("raw", "reembed"),  # L6
    "dif_reduce": ("sum", "mean"),  # L6
    "embed_trainable": (True, False),  # L7
    "teacher_grad": ("head", "full"),  # L8
    "cls_pairs": ("matched", "all"),  # L9
    "cls_norm": ("joint", "per_replica"),  # L9
    "clip_z0": (False, True),  # L10
    "avg": ("probs", "logits"),  # L11
}
SETTINGS = {  # not disagreements of method: numbers that both state, differently
    "replicas": (4, 8), "embedding_dim": (None, 64), "eval_steps": (100, 50),
    "feature_norm": ("none", "l2"), "augment": ("gaussian", "direction"),
    "aug_noise_min": (0.1, 0.2), "aug_noise_max": (0.3, 1.0), "aug_drop_min": (0.2, 0.05), "aug_drop_max": (0.2, 0.1),
}  # fmt: skip


def test_paper_and_code_differ_exactly_where_it_is_listed():
    paper, code = CLUDI_PRESETS["cludi-paper"], CLUDI_PRESETS["cludi-code"]
    names = [item.name for item in dataclasses.fields(CLUDIConfig)]
    found = {name: (getattr(paper, name), getattr(code, name)) for name in names if getattr(paper, name) != getattr(code, name)}
    assert found == {**DISAGREEMENTS, **SETTINGS}
    assert (paper.std, code.std, paper.lam, code.lam, paper.snr_gamma) == (5.0, 49.0, 50.0, 50.0, 5.0)
    assert CLUDIConfig().class_prior == paper.class_prior == code.class_prior == "uniform"  # L14


def test_a_presets_values_carry_their_own_provenance():
    for source in ("paper", "code"):
        preset = CLUDI_PRESETS[f"cludi-{source}"]
        settings = config.resolved(dataclasses.replace(preset, tau=0.3), preset)
        assert settings["tau"]["provenance"] == "user"
        for name in DISAGREEMENTS:
            assert settings[name] == {"value": getattr(preset, name), "provenance": source}, name


# ---- clusters of separated Gaussians ---------------------------------------------------------------------------------


def gaussians(seed, n=320, k=4, d=8):
    rng = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % k
    return 4 * torch.eye(k, d)[label] + torch.randn(n, d, generator=rng), label


def quick(**more):
    settings = {
        "steps": 60, "restarts": 4, "batch_size": 160, "replicas": 2, "width": 64,
        "teacher_steps": 6, "eval_steps": 6, "eval_samples": 4,
    }  # fmt: skip
    return CLUDIConfig(**{**settings, "progress": False, **more})


def learn(x, clusters, settings, folder):
    """(network, clusters) as a run makes them."""
    step = {"seed": settings.seed, "checkpoint_every": 1000, "progress": False}
    method, net, _ = run_cludi.learn(x, clusters, settings, torch.full((clusters,), 1 / clusters), folder, step)
    logits, _ = method.assign(net, x, generator(settings.seed, "evaluate"))
    return net, method.probabilities(logits).argmax(1)


@pytest.mark.parametrize("seed", range(5))
def test_four_separated_gaussians(tmp_path, seed):
    x, label = gaussians(seed)
    _, found = learn(x, 4, quick(seed=seed), tmp_path)
    assert metrics.clustering_accuracy(found, label) > 0.95
    assert int(found.bincount(minlength=4).min()) >= len(x) / 4 / 2  # no collapse: the smallest cluster has half of its share


@pytest.mark.parametrize("change", [{"sqrt_mode": "paper"}, {"noise_std": 49.0}, {"snr_weight": "paper_max"}, {"snr_weight": "min_v"},
                                    {"teacher_logits": "paper"}, {"dif_target": "raw", "dif_reduce": "sum"}, {"embed_trainable": True},
                                    {"teacher_grad": "full"}, {"teacher_grad": "none"}, {"cls_pairs": "matched"},
                                    {"cls_norm": "per_replica"}, {"clip_z0": True}, {"avg": "logits"}, {"augment": "direction"},
                                    {"self_conditioning": 0.0}, {"snr_over_std": True}])  # fmt: skip
def test_every_switch_trains_without_nan(tmp_path, change):
    x, _ = gaussians(0, n=80)
    settings = quick(steps=4, restarts=1, batch_size=40, teacher_steps=3, eval_samples=1, **change)
    net, _ = learn(x, 4, settings, tmp_path)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    fixed = torch.equal(net.embedding, run_cludi.build_modules(x, 4, settings)["net"].embedding)
    assert fixed != bool(change.get("embed_trainable"))


def test_the_score_that_chooses_among_starts_takes_no_label_and_prefers_the_better_clusters():
    class Fixed(torch.nn.Module):  # answers the logits it was given
        def __init__(self, logits):
            super().__init__()
            self.logits, self.dim, self.head = logits, logits.shape[1], torch.nn.Identity()

        def condition(self, x):
            return x

        def forward(self, z_t, h, t, guess):
            return self.logits.expand_as(z_t)

    method, label = CLUDI(quick(), torch.full((4,), 0.25)), torch.arange(80) % 4
    rng = torch.Generator().manual_seed(0)
    score = lambda label, size: method.score(Fixed(size * F.one_hot(label, 4).float()), torch.zeros(80, 2), rng)  # noqa: E731
    merged = torch.where(label == 1, torch.where(torch.arange(80) < 40, 2, 3), torch.where(label == 0, 0, label))
    assert score(label, 3.0) < score(merged, 3.0) < score(torch.zeros_like(label), 3.0) == pytest.approx(math.log(4), abs=1e-3)
    assert score(label, 3.0) < score(label, 0.1)  # certain clusters before vague ones


@pytest.mark.parametrize("kind", heads.HEADS)
def test_the_rivals_find_separated_gaussians(tmp_path, kind):
    x, label = gaussians(0)
    head = kind(x, 4, quick(baseline_steps=300))
    train(head, tmp_path, seed=0, progress=False)
    assert metrics.clustering_accuracy(head.labels(x), label) > 0.9, kind.name


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A feature file of 90 rows in three classes."""
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    path = tmp_path_factory.mktemp("features") / "features.npz"
    np.savez(path, features=(rng.normal(size=(90, 6)) + 4 * np.eye(3, 6)[labels]).astype(np.float32), labels=labels)
    return path


TINY = (
    "--no-progress --steps 12 --restarts 2 --batch-size 32 --replicas 2 --width 16 --teacher-steps 3 "
    "--eval-steps 3 --eval-samples 2"
).split()


def test_a_run_leaves_everything_it_promises(file, tmp_path, capsys):
    command = ["cludi", *TINY, "--data", f"features:{file}", "--holdout", "0.2", "--baseline-steps", "8", "--out"]
    assert main([*command, str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = {"acc", "nmi", "ari", "acc_head", "acc_med", "acc_tail"}
    rivals = {"kmeans", "gmm", "spectral", "self-classifier", "scan", "cc", "temi", "dgd"}
    assert scores <= set(report) and set(report["baselines"]) == rivals and report["n"] == 72
    assert all(scores == set(row) for row in report["baselines"].values())
    assert {*rivals, "cludi"} == set(report["holdout"]) - {"n"} and report["holdout"]["n"] == 18
    assert report["samples"]["count"] == [1, 2] and len(report["samples"]["augmented"][0]) == 10
    pages = {"embedding.png", "confusion.png", "averaging.png", "losses.png", "card.md"}
    assert pages | {"config.json", "log.jsonl", "metrics.json", "indices.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    table = capsys.readouterr().out
    assert "CLUDI" in table and all(name in table for name in rivals)
    stored = config.read(tmp_path / "run" / "config.json", CLUDIConfig)
    assert stored.dataset == f"features:{file}" and stored.holdout == 0.2


@pytest.mark.parametrize("stage, step", [(cludi.Distil, 7), (heads.TEMI, 5)])
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_bits(file, tmp_path, monkeypatch, capsys, stage, step):
    command = ["cludi", *TINY, "--dataset", f"features:{file}", "--baseline-steps", "8", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    original = stage.loss

    def interrupted(self, at, rng):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, at, rng)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "loss", interrupted)
        assert main([*command, str(tmp_path / "cut")]) == 130
    assert f"--out {tmp_path / 'cut'} --resume" in capsys.readouterr().err and not (tmp_path / "cut" / "metrics.json").exists()
    assert main(["cludi", "--no-progress", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    for path in sorted((tmp_path / "whole" / "weights").glob("*.safetensors")):
        assert (tmp_path / "cut" / "weights" / path.name).read_bytes() == path.read_bytes(), path.name
    reports = [{**json.loads((tmp_path / name / "metrics.json").read_text()), "seconds": 0} for name in ("whole", "cut")]
    assert reports[0] == reports[1]
    assert loop.read_log(tmp_path / "whole" / "log.jsonl") == loop.read_log(tmp_path / "cut" / "log.jsonl")


def test_features_of_images_and_their_norms(tmp_path):
    step = {"seed": 0, "checkpoint_every": 1000, "progress": False}
    rows = data.load("digits").subset(torch.arange(200))
    settings = CLUDIConfig(dataset="digits", features="pixels", feature_norm="standard")
    extractor = run_cludi.Features(rows, settings)
    x = extractor.fit(tmp_path, step)
    assert x.shape == (200, 64) and extractor.description == "pixels, standard norm, d = 64"
    moving = rows.images.flatten(1).std(0) > 0
    torch.testing.assert_close(x.mean(0), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0), moving.float(), atol=1e-4, rtol=0)  # pixels that never change are 0, not NaN
    assert torch.equal(extractor(rows.images[:9]), x[:9])  # unseen rows take the training rows' statistics
    for norm, raw in (("l2", rows.images.flatten(1)), ("standard-l2", x)):
        extractor = run_cludi.Features(rows, dataclasses.replace(settings, feature_norm=norm))
        torch.testing.assert_close(extractor.fit(tmp_path, step), 8 * F.normalize(raw, dim=1))
    extractor = run_cludi.Features(rows, dataclasses.replace(settings, features="encoder", encoder_epochs=1, latent_dim=5))
    assert extractor.fit(tmp_path, step).shape == (200, 5) and checkpoint.latest(tmp_path, "pretrain") == 2


def test_figures_run_what_is_missing_and_share_the_encoder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures_cludi, "SWEEPS", {"noise_scale_f2": (4.0,), "embedding_dim": (8,)})
    (tmp_path / "rows.json").write_text(json.dumps(list(range(100))))
    options = f"--encoder-epochs 1 --steps 2 --restarts 1 --baseline-steps 2 --seeds 5 --indices {tmp_path / 'rows.json'}"
    command = ["figures", "cludi", *TINY, *options.split(), "--out", str(tmp_path)]
    assert main(command) == 0
    summary = json.loads((tmp_path / "figures.json").read_text())
    assert set(summary["tables"]["digits"]) == {*figures_cludi.NAMES.values(), "CLUDI"}
    assert {"CLUDI, uniform prior", "CLUDI, empirical prior"} <= set(summary["tables"]["digits-lt"])
    assert set(summary["sweeps"]["noise_scale_f2"]) == {"4", "100"} and set(summary["sweeps"]["embedding_dim"]) == {"8", "32"}
    assert {"comparison-digits.png", "comparison-digits-lt.png", "averaging.png", "sweeps.png"} <= {p.name for p in tmp_path.iterdir()}
    encoders = {p.read_bytes() for p in tmp_path.glob("*/weights/pretrain-*.safetensors") if not p.parts[-3].startswith("digits-lt")}
    assert len(encoders) == 1 and len(list(tmp_path.glob("*/metrics.json"))) == 5
    text = capsys.readouterr().out
    assert "| CLUDI, empirical prior | " in text and text == (tmp_path / "figures.md").read_text() + "\n"

    monkeypatch.setattr(figures_cludi, "cludi", None)  # nothing is run again
    assert main(command) == 0
    assert main([*command, "--tau", "0.2"]) == 2
    assert "was made with other settings (tau: 0.1 != 0.2)" in capsys.readouterr().err


def test_a_command_without_checkpoints_can_be_stopped(monkeypatch, capsys):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.features.main", stopped)
    assert main(["features"]) == 130 and "features: stopped" in capsys.readouterr().err


def test_one_class_is_nothing_to_cluster(tmp_path, capsys):
    np.savez(tmp_path / "one.npz", features=np.random.default_rng(0).standard_normal((20, 4)), labels=np.zeros(20, np.int64))
    command = ["cludi", "--dataset", f"features:{tmp_path / 'one.npz'}", "--out", str(tmp_path / "run"), "--no-progress"]
    assert main(command) == 2 and "cludi: clusters must be in [2, N]; got 1 with N=20" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_class_priors(file):
    rows = load_rows(CLUDIConfig(dataset="digits-lt")).train
    prior = lambda text, clusters=10: run_cludi.class_prior(CLUDIConfig(class_prior=text), rows, clusters)  # noqa: E731
    torch.testing.assert_close(prior("empirical"), torch.tensor(rows.counts) / 707)
    torch.testing.assert_close(prior("uniform"), torch.full((10,), 0.1))
    torch.testing.assert_close(prior("2,1,1", 3), torch.tensor([0.5, 0.25, 0.25]))


WRONG = {
    "--tau 0": "config: tau must be > 0; got 0.0",
    "--lam -1": "config: lam must be >= 0; got -1.0",
    "--noise-scale-f2 0": "config: noise_scale_f2 must be > 0; got 0.0",
    "--noise-std nan": "config: noise_std must be finite; got nan",
    "--replicas 0": "config: replicas must be >= 1; got 0",
    "--teacher-steps 1001": "config: teacher_steps must be <= timesteps=1000; got 1001",
    "--eval-steps 60 --timesteps 50": "config: eval_steps must be <= timesteps=50; got 60",
    "--aug-noise-min 0.5": "config: aug_noise_min must be <= aug_noise_max=0.3; got 0.5",
    "--aug-drop-max 1": "config: aug_drop_max must be < 1; got 1.0",
    "--self-conditioning 1.5": "config: self_conditioning must be <= 1; got 1.5",
    "--class-prior some": "config: class_prior must be uniform, empirical or numbers > 0 separated by commas; got 'some'",
    "--class-prior 1,0": "separated by commas; got '0'",
    "--class-prior 1e-60,1 --clusters 2": "cludi: class_prior must be within a factor of 1e30; got 1e-60 beside 1.0",
    "--class-prior 1,2,3": "cludi: class_prior needs one entry a cluster, 10; got 3 numbers",
    "--class-prior empirical --clusters 7": "cludi: class_prior needs one entry a cluster, 7; got 10 classes",
    "--clusters 800": "cludi: clusters must be in [2, N]; got 800 with N=707",
    "--preset tiny": "cludi: --preset must be one of default, short, cludi-paper, cludi-code; got 'tiny'",
    "--data mnist": "dataset: expected one of digits",
    "--data features:/absent.npz": "no such file: /absent.npz",
    "--resume": "cludi: --resume needs a run in",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_calls_name_expectation_and_fact(tmp_path, capsys, options):
    assert WRONG[options] in refused(["cludi", "--no-progress", "--out", str(tmp_path / "run"), *options.split()], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("choice", ["--snr-weight max", "--cls-pairs some", "--teacher-grad all", "--features raw"])
def test_unknown_choices_are_refused(tmp_path, capsys, choice):
    assert choice.split()[0] in refused(["cludi", "--out", str(tmp_path / "run"), *choice.split()], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({"labels": np.arange(4)}, "", "needs the keys features and labels; features is missing, got labels"),
        ({"features": np.zeros((4, 3))}, "", "needs the keys features and labels; labels is missing, got features"),
        ({"features": np.array([[0, 1.0], [np.nan, 0]]), "labels": np.arange(2)}, "", "NaN or inf in 1 rows, first [1]"),
        ({"features": np.zeros((4, 3)), "labels": np.arange(4)}, "--feature-width 384", "features must have width 384; got 3"),
    ],
)
def test_a_bad_feature_file_is_refused_by_name(tmp_path, capsys, arrays, options, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    command = ["cludi", "--data", f"features:{tmp_path / 'bad.npz'}", "--out", str(tmp_path / "run"), *options.split()]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path / "bad.npz") in error and not (tmp_path / "run").exists()
