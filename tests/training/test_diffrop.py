"""DiffROP pushes classes apart as 002 says, with the choices of R1..R15; numbers are those of the closed forms."""

import contextlib
import dataclasses
import json
import math
import re

import pytest
import torch

import ltkernels
from training import config, data, loop, run_images, toy
from training.__main__ import main
from training.augment import diff_augment
from training.config import DiffROPConfig
from training.diffusion import Diffusion
from training.methods import DiffROP
from training.methods.ddpm import class_weights
from training.methods.diffrop import Separate, SeparateBalanced, pairs

D = Diffusion()
FORMS = {"exponential": {}, "reciprocal": {}, "hinge": {"margin": 2.0}, "negative_l2": {}}


def rows(count=12, dim=6, classes=3, times=(1, 40, 700), seed=0, dtype=torch.float64):
    """(mu, y, t)"""
    rng = torch.Generator().manual_seed(seed)
    mu = torch.randn(count, 1, 2, dim // 2, generator=rng, dtype=dtype)
    y, t = torch.randint(classes, (count,), generator=rng), torch.tensor(times)[torch.randint(len(times), (count,), generator=rng)]
    return mu.requires_grad_(), y, t


def denoised(schedule, x_t, output, t, prediction="epsilon", space="mu"):
    return DiffROP(space=space).rows(x_t, output, *schedule.coefficients(t, x_t), prediction, beta=schedule.betas[t])


def naive(method, mu, y, t):
    """The loss written as two loops: (sum, number of pairs)."""
    total, number = 0, 0
    for i in range(len(mu)):
        for j in range(len(mu)):
            if y[i] == y[j] or t[i] != t[j] or y[i] < 0 or y[j] < 0:
                continue
            d = (mu[i] - mu[j]).square()
            d = d.mean() if method.distance == "mean" else d.sum() / (2 * method.variance[t[i]] if method.distance == "kl" else 1)
            phi = {"exponential": (-d).exp(), "reciprocal": 1 / (1 + d), "negative_l2": -d}.get(method.form)
            phi = (method._margin(t)[i] if isinstance(method.margin, torch.Tensor) else method.margin) - d if phi is None else phi
            total, number = total + method.tau(t)[i] * (phi.clamp(min=0) if method.form == "hinge" else phi), number + 1
    return total, number


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("distance", ["mean", "sum", "kl"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_two_loops(form, distance, reduction):
    mu, y, t = rows()
    y[3], y[7] = -1, -1
    method = DiffROP(form, tau0=0.7, distance=distance, reduction=reduction, variance=60 * D.betas + 1, **FORMS[form])
    total, number = naive(method, mu, y, t)
    assert number == pairs(y, t) > 10
    expected = total / number if reduction == "mean" else total
    loss = method.loss(mu, y, t)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, mu)[0] for value in (loss, expected)), rtol=1e-6, atol=1e-9)
    assert torch.equal(method(mu, y, t), loss)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_moves_the_means_of_two_overlapping_classes_apart(form):
    """R7: whatever is printed, the term is to be minimised."""
    rng = torch.Generator().manual_seed(0)
    mu = (torch.randn(40, 8, generator=rng) * 0.5).requires_grad_()
    y, t = torch.arange(40) % 2, torch.full((40,), 10)
    gap = lambda: float((mu[y == 0].mean(0) - mu[y == 1].mean(0)).square().sum().detach())  # noqa: E731
    before = gap()
    optimiser = torch.optim.SGD([mu], lr=1.0)
    DiffROP(form, **FORMS[form]).loss(mu, y, t).backward()
    optimiser.step()
    assert gap() > before + 1e-3


def test_divergence_and_eq_11():
    """Check 19: KL(N(mu_i, s^2) || N(mu_j, s^2)) = d / 2 s^2, and Eq. 11 = alpha_t d."""
    rng = torch.Generator().manual_seed(0)
    x_t, eps = torch.randn(2, 2, 3, 4, 4, generator=rng, dtype=torch.float64)
    for time in (1, 10, 100, 500, 1000):
        t = torch.tensor([time, time])
        mu = denoised(D, x_t, eps, t)
        d = (mu[0] - mu[1]).square().sum()
        beta, alpha_bar = D.betas[time], D.alpha_bar[time]
        gaussians = [torch.distributions.Normal(m, beta.sqrt()) for m in mu]
        divergence = torch.distributions.kl_divergence(*gaussians).sum()
        torch.testing.assert_close(divergence, d / (2 * beta), rtol=1e-6, atol=0)
        kl = DiffROP("negative_l2", tau0=1, tau_schedule="const", distance="kl", variance=D.betas)
        torch.testing.assert_close(kl.loss(mu, torch.tensor([0, 1]), t), -divergence, rtol=1e-6, atol=0)
        eq_11 = ((x_t[0] - x_t[1]) + beta / (1 - alpha_bar).sqrt() * (eps[1] - eps[0])).square().sum()
        torch.testing.assert_close(eq_11, (1 - beta) * d, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_three_spaces_of_every_prediction(prediction):
    """mu is the posterior's mean, sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t: so rows of
    one x_t are as far apart in mu as in x0, times the square of the first factor."""
    t = torch.tensor([1, 2, 10, 100, 500, 1000])
    x0, eps = torch.randn(2, len(t), 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    column = lambda values: values.view(-1, 1, 1, 1)  # noqa: E731
    scale, std = (column(c) for c in D.coefficients(t, x0))
    x_t = scale * x0 + std * eps
    output = {"epsilon": eps, "v": scale * eps - std * x0, "x0": x0}[prediction]
    at, before, beta = D.alpha_bar[t], D.alpha_bar[t - 1], D.betas[t]
    factor = before.sqrt() * beta / (1 - at)
    mean = column(factor) * x0 + column((1 - beta).sqrt() * (1 - before) / (1 - at)) * x_t
    for space, expected in (("x0", x0), ("eps", eps), ("mu", mean)):
        torch.testing.assert_close(denoised(D, x_t, output, t, prediction, space), expected, rtol=1e-9, atol=1e-9)
    for i, time in enumerate(t.tolist()):
        torch.testing.assert_close(D.reverse(x_t[i], eps[i], time, time - 1)[1], mean[i], rtol=1e-9, atol=1e-9)
    other = output + torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apart = {s: (denoised(D, x_t, output, t, prediction, s) - denoised(D, x_t, other, t, prediction, s)).flatten(1) for s in ("mu", "x0")}
    torch.testing.assert_close(apart["mu"].square().sum(1), factor.square() * apart["x0"].square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
@pytest.mark.parametrize("space", ["x0", "eps"])
def test_rows_of_any_process(prediction, space):
    """Of a network that answers denoising_target, the image or the noise. EDM's scale is a number; at the end of a flow it is 0."""
    x0, noise = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, sigma = torch.tensor([[0.01, 0.25, 0.75, 1.0], [0.01, 0.5, 3.0, 80.0]], dtype=torch.float64)
    flow, edm, cosine = (1 - t, t), (1.0, sigma), ((1 - t**2).sqrt(), t)
    for scale, std in (cosine,) if prediction == "v" else (flow, edm):
        row = lambda value: torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1, 1)  # noqa: E731
        x_t = row(scale) * x0 + row(std) * noise
        output = ltkernels.denoising_target(x_t, x0, scale, std, prediction=prediction)
        found, expected = DiffROP(space=space).rows(x_t, output, scale, std, prediction), x0 if space == "x0" else noise
        known = 3 if prediction == "epsilon" and space == "x0" and scale is flow[0] else 4  # the last row of a flow is noise alone
        torch.testing.assert_close(found[:known], expected[:known])


def test_rows_say_what_is_missing():
    x_t = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="DiffROP.rows: space mu .* needs its beta.*; got beta=None"):
        DiffROP().rows(x_t, x_t, 1.0, 0.5)
    with pytest.raises(ValueError, match="DiffROP.rows: prediction must be one of epsilon, v, x0, flow; got 'velocity'"):
        DiffROP(space="x0").rows(x_t, x_t, 1.0, 0.5, "velocity")


def test_weight_of_the_noise_in_mu():
    """Check 25 (R5)."""
    t = torch.tensor([1, 10, 100, 500, 1000])
    mu = denoised(D, torch.zeros(5, 1, dtype=torch.float64), -torch.ones(5, 1, dtype=torch.float64), t)
    assert mu[:, 0].tolist() == pytest.approx([0.010001, 0.006417, 0.006464, 0.010512, 0.020203], abs=5e-7)


def test_sum_over_an_image_s_pixels_is_zero_in_float32(monkeypatch):
    """Check 23 (R3): independent noise at t = 500, D = 3072."""
    x_t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, t = torch.tensor([0, 1]), torch.tensor([500, 500])
    monkeypatch.setattr(ltkernels.pairwise_pcl, "_warned", False)
    for distance, zero in (("sum", True), ("mean", False)):
        with pytest.warns(RuntimeWarning, match="distance='mean' keeps them") if zero else contextlib.nullcontext():
            loss = DiffROP(distance=distance).loss(x_t, y, t)
        (gradient,) = torch.autograd.grad(loss, x_t)
        assert (loss == 0) == zero and (gradient == 0).all() == zero


@pytest.mark.parametrize("form", FORMS)
def test_one_class_or_no_shared_time_is_zero_with_a_gradient(form):
    """Check 24 (R8)."""
    mu, y, t = rows()
    for labels, times in ((torch.zeros_like(y), t), (y, torch.arange(len(t))), (torch.full_like(y, -1), t)):
        for reduction in ("mean", "sum"):
            loss = DiffROP(form, reduction=reduction, **FORMS[form]).loss(mu, labels, times)
            assert loss == 0 and (torch.autograd.grad(loss, mu)[0] == 0).all() and pairs(labels, times) == 0
    alone = mu.detach()[:1].requires_grad_()
    assert DiffROP(form, **FORMS[form]).loss(alone, y[:1], t[:1]) == 0


def test_rows_without_a_label_are_in_no_pair():
    """Their mean is the unconditional one."""
    mu, y, t = rows(20)
    dropped = torch.arange(20) % 4 == 0
    method = DiffROP()
    loss = method.loss(mu, y.where(~dropped, -1), t)
    torch.testing.assert_close(loss, method.loss(mu[~dropped], y[~dropped], t[~dropped]))
    assert (torch.autograd.grad(loss, mu)[0][dropped] == 0).all()
    assert loss != method.loss(mu, y, t)


def test_tau():
    """R6."""
    t = torch.tensor([0, 300, 1000])
    assert DiffROP(tau0=2.0, tau_schedule="const").tau(t).tolist() == [2.0, 2.0, 2.0]
    assert DiffROP(tau0=2.0, tau_schedule="linear").tau(t).tolist() == pytest.approx([2.0, 1.4, 0.0])
    exponential = DiffROP(tau0=2.0, tau_temp=0.3).tau(t)
    assert exponential.tolist() == pytest.approx([2.0, 2 / math.e, 2 * math.exp(-1 / 0.3)])
    assert DiffROP(tau0=2.0, steps=1.0).tau(t / 1000).tolist() == pytest.approx(exponential.tolist())


def test_a_margin_by_time():
    mu, y, t = rows()
    table = torch.linspace(0, 4, 1001, dtype=torch.float64)
    method = DiffROP("hinge", margin=table)
    total, number = naive(method, mu, y, t)
    torch.testing.assert_close(method.loss(mu, y, t), total / number)


def test_without_the_partner_s_gradient():
    """R9: each of two rows is first in one pair, so of equal weights half of the gradient is left."""
    mu, y, t = rows()
    both, first = (DiffROP(stopgrad=kind).loss(mu, y, t) for kind in ("none", "partner"))
    torch.testing.assert_close(both, first)
    torch.testing.assert_close(torch.autograd.grad(first, mu)[0], torch.autograd.grad(both, mu)[0] / 2)


def test_times_of_flow_matching():
    mu, y, t = rows()
    method = DiffROP(steps=1000)
    torch.testing.assert_close(dataclasses.replace(method, steps=1.0).loss(mu, y, t / 1000), method.loss(mu, y, t))


def test_betas_of_somebody_else():
    """A table of betas that begins with the first step, in float32, is that of Diffusion, which has 0 before it."""
    x, output, t = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind() + (torch.tensor([0, 1, 500, 998, 999]),)
    betas = torch.linspace(1e-4, 0.02, 1000)
    abar = torch.cumprod(1 - betas, 0)[t]
    found = DiffROP().rows(x, output, abar.sqrt(), (1 - abar).sqrt(), beta=betas[t])
    torch.testing.assert_close(found, denoised(D, x, output, t + 1), rtol=1e-4, atol=1e-5)


def test_arguments_that_belong_together():
    mu, y, t = rows()
    with pytest.raises(ValueError, match="DiffROP.loss: other, other_y and other_t belong together; got other only"):
        DiffROP().loss(mu, y, t, other=mu)
    with pytest.raises(TypeError, match="DiffROP.loss: distance kl and a margin by time look up t, so it has to be int64; got torch.float"):
        DiffROP(distance="kl", variance=D.betas).loss(mu, y, t.float())


@pytest.mark.parametrize("options, expected", [
    ({"form": "linear"}, "DiffROP: form must be one of exponential, reciprocal, hinge, negative_l2; got 'linear'"),
    ({"space": "v"}, "DiffROP: space must be one of mu, x0, eps; got 'v'"),
    ({"form": "hinge"}, "DiffROP: margin is required for form hinge and for no other; got None with form 'hinge'"),
    ({"margin": 1.0}, "DiffROP: margin is required for form hinge and for no other; got 1.0 with form 'exponential'"),
    ({"distance": "kl"}, "DiffROP: distance kl is between Gaussians around mu and needs their variance; got variance=None"),
    ({"distance": "kl", "variance": D.betas, "space": "x0"}, "needs their variance; got space 'x0'"),
])  # fmt: skip
def test_wrong_choices_are_refused(options, expected):
    with pytest.raises(ValueError) as error:
        DiffROP(**options)
    assert expected in str(error.value)


# ---- the toy of Fig. 2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin, sigma", [(2.0, 1.0), (0.7, 1.0), (8.0, 0.5), (0.5, 2.0)])
def test_a_margin_up_to_the_true_divergence_keeps_the_optimum(margin, sigma):
    """Check 20 (R11)."""
    grid = torch.linspace(-2, 5, 141, dtype=torch.float64)
    loss = toy.landscape("hinge", grid, grid, margin=margin, sigma=sigma)
    row, column = divmod(int(loss.argmin()), len(grid))
    assert float(loss.min()) == pytest.approx(0, abs=1e-12)
    assert (float(grid[row]), float(grid[column])) == pytest.approx((0, 2), abs=1e-6)
    assert (loss == loss.min()).sum() == 1
    assert loss[40, 40] > toy.landscape(None, grid, grid, sigma=sigma)[40, 40]  # the overlap (0, 0) is penalised
    assert toy.optimum("hinge", margin=margin, sigma=sigma) == pytest.approx((0, 2, 0), abs=1e-6)


def test_a_larger_margin_moves_the_optimum():
    assert toy.optimum("hinge", margin=3.0)[1] > 2.1


@pytest.mark.parametrize("tau, m1, m2", [(0.01, -0.026667, 2.506667), (0.02, -0.072727, 3.381818), (0.04, -0.533333, 12.133333)])
def test_the_plain_distance_moves_the_optimum(tau, m1, m2):
    """Check 21."""
    assert toy.optimum("negative_l2", tau=tau)[:2] == pytest.approx((m1, m2), abs=2e-6)


def test_the_plain_distance_has_no_optimum_from_0475_on():
    for tau, bounded in ((0.047, True), (0.0475, False), (0.05, False)):
        far = torch.tensor([10.0, 1e3, 1e5], dtype=torch.float64)  # along the direction in which the quadratic part is smallest
        loss = torch.stack([toy.landscape("negative_l2", -r.view(1) / 20, r.view(1) * 0.95, tau=tau)[0, 0] for r in far])
        assert (loss[2] > loss[1] > loss[0]) == bounded and (loss[2] < loss[1]) == (not bounded)


@pytest.mark.parametrize("form, slope", [("exponential", 0.073263), ("reciprocal", 0.16)])
def test_the_other_forms_push_at_the_truth(form, slope):
    """Check 22: at d = 4 their derivative is not 0, so the optimum is another one."""
    mu = torch.tensor([[0.0], [2.0]], dtype=torch.float64, requires_grad=True)
    DiffROP(form, tau0=1, tau_schedule="const").loss(mu, torch.tensor([0, 1]), torch.tensor([1, 1])).backward()
    assert mu.grad[:, 0].tolist() == pytest.approx([slope, -slope], abs=1e-6)
    m1, m2, _ = toy.optimum(form, sigma=math.sqrt(0.5))
    assert m1 < -0.01 and m2 > 2.1


@pytest.mark.parametrize("form", FORMS)
def test_the_toy_is_that_of_the_loss(form):
    m1, m2 = torch.tensor([-0.3, 0.4], dtype=torch.float64), torch.tensor([0.9, 2.5, 0.1], dtype=torch.float64)
    surface = toy.landscape(form, m1, m2, tau=0.7, sigma=1.3, **FORMS[form]) - toy.landscape(None, m1, m2, sigma=1.3)
    variance = torch.full((2,), 1.69, dtype=torch.float64)
    method = DiffROP(form, tau0=0.7, tau_schedule="const", distance="kl", variance=variance, **FORMS[form])
    for i in range(2):
        for j in range(3):
            pair = torch.stack([m1[i], m2[j]])[:, None]
            assert float(method.loss(pair, torch.tensor([0, 1]), torch.tensor([1, 1]))) == pytest.approx(float(surface[i, j]), abs=1e-12)


# ---- the stage -------------------------------------------------------------------------------------------------------


def stage_of(**changes):
    settings = DiffROPConfig(**{"batch_size": 32, "width": 32, "steps": 10, **changes})
    dataset = data.load("digits-lt", imbalance_ratio=20)
    return run_images.STAGES["diffrop"](dataset, run_images.build_modules(settings, (1, 8, 8), 10), settings)


def rng_of(step=0):
    return loop.generator(0, 0, "denoise", step)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_groups_share_a_time_whose_marginal_stays_uniform(size):
    stage = stage_of(pcl_group_size=size, timesteps=20, sample_steps=20)
    times = torch.stack([stage.draw(step, rng_of(step)).t for step in range(600)])
    leader = torch.arange(32) // size * size
    assert torch.equal(times, times[:, leader])
    assert times.min() == 1 and times.max() == 20
    for row in (0, 1, 31):  # of rows of one number, which are independent from step to step
        counts = times[:, row].bincount(minlength=21)[1:].double()
        assert ((counts - 30).square() / 30).sum() < 43.8  # chi^2, 19 degrees of freedom, one in a thousand
    assert (times[:, leader.unique()].diff(dim=1) != 0).float().mean() > 0.9  # groups do not share theirs


def test_what_else_is_drawn_is_that_of_ddpm():
    from training.config import DDPMConfig
    from training.methods.ddpm import Denoise

    settings = DDPMConfig(batch_size=32, width=32)
    dataset = data.load("digits-lt", imbalance_ratio=20)
    plain = Denoise(dataset, run_images.build_modules(settings, (1, 8, 8), 10), settings).draw(3, rng_of(3))
    for options in ({}, {"pcl_t": "batch"}, {"base": "cbdm"}, {"pcl_noise": "shared"}):
        batch = stage_of(**options).draw(3, rng_of(3))
        for name in ("rows", "label", "x0"):
            assert torch.equal(getattr(batch, name), getattr(plain, name)), name
        leader = torch.zeros(32, dtype=torch.long) if "pcl_t" in options else torch.arange(32) // 2 * 2
        assert torch.equal(batch.t, plain.t[leader])
        assert torch.equal(batch.whole_eps, plain.whole_eps[leader] if "pcl_noise" in options else plain.whole_eps)
        assert torch.equal(batch.x_t, D.add_noise(batch.x0, batch.whole_eps, batch.t))


@pytest.mark.parametrize("options, expected", [
    ({}, lambda t: 2 * torch.exp(-t / 6)),  # kappa T = .3 * 20
    ({"pcl_tau_temp": 0.5}, lambda t: 2 * torch.exp(-t / 10)),
    ({"pcl_tau_schedule": "linear"}, lambda t: 2 - t / 10),
    ({"pcl_tau_schedule": "const"}, lambda t: 2 + 0 * t),
])  # fmt: skip
def test_the_weight_of_a_stage_is_that_of_its_options(options, expected):
    stage, t = stage_of(pcl_tau0=2.0, timesteps=20, sample_steps=20, **options), torch.arange(21)
    torch.testing.assert_close(stage.pcl.tau(t), expected(t.double()))


def test_a_stage_stops_the_partner_s_gradient_where_asked():
    both, first = (stage_of(pcl_stopgrad=kind, pcl_tau_schedule="const") for kind in ("none", "partner"))
    first.net.load_state_dict(both.net.state_dict())
    gradients = []
    for stage in (both, first):
        _, figures = stage.loss(0, rng_of())
        grads = torch.autograd.grad(figures["loss_pcl"], [p for p in stage.net.parameters() if p.requires_grad], materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in grads]))
    torch.testing.assert_close(gradients[1], gradients[0] / 2, rtol=1e-3, atol=1e-7)


def spied(stage):
    """The calls of the stage's network: (x_t, t, label, output)."""
    calls, net = [], stage.net
    stage.net = lambda x, t, y, augment: calls.append((x, t, y, net(x, t, y, augment))) or calls[-1][3]
    return calls


@pytest.mark.parametrize("options", [
    {}, {"pcl_t": "batch"}, {"pcl_space": "x0", "pcl_form": "reciprocal"}, {"pcl_reduce": "sum", "prediction": "v"},
    {"pcl_form": "hinge", "pcl_margin": 50.0, "pcl_distance": "kl"}, {"base": "cbdm", "pcl_stopgrad": "partner"},
])  # fmt: skip
def test_the_term_of_a_step_is_that_of_the_network_s_output(options):
    stage = stage_of(cfg_drop=0.3, pcl_tau0=3.0, **options)
    calls, batch = spied(stage), stage.draw(0, rng_of())
    loss, figures = stage.loss(0, rng_of())
    assert len(calls) == (2 if "base" in options else 1)
    output = calls[0][3]
    mu = denoised(D, batch.x_t, output, batch.t, options.get("prediction", "epsilon"), options.get("pcl_space", "mu"))
    method = DiffROP(
        options.get("pcl_form", "exponential"), 3.0, distance=options.get("pcl_distance", "mean"), margin=options.get("pcl_margin"),
        reduction=options.get("pcl_reduce", "mean"), variance=D.betas,
    )  # fmt: skip
    total, number = naive(method, mu, batch.label, batch.t)
    assert figures["pairs"] == number > 0
    expected = total / number if method.reduction == "mean" else total
    torch.testing.assert_close(figures["loss_pcl"], expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, sum(value for name, value in figures.items() if name.startswith("loss")))
    assert {"loss_mse", "loss_pcl"} <= set(figures) and ("loss_cb" in figures) == ("base" in options)
    assert isinstance(stage, SeparateBalanced if "base" in options else Separate)


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_reforward_is_algorithm_1(noise):
    """A naive one: d_ij needs the partner noised to the time of i, with its own noise (Alg. 1) or that of i (Eq. 12)."""
    stage = stage_of(batch_size=8, cfg_drop=0.3, pcl_t="reforward", pcl_noise=noise, pcl_tau0=2.0)
    batch, net = stage.draw(0, rng_of()), stage.net
    total, number = 0, 0
    for i in range(8):
        for j in range(8):
            if batch.label[i] == batch.label[j] or min(batch.label[i], batch.label[j]) < 0:
                continue
            mu = []
            for row in (i, j):
                t, eps = batch.t[i : i + 1], batch.whole_eps[row if noise == "independent" else i][None]
                x_t = D.add_noise(batch.x0[row : row + 1], eps, t)
                mu.append(denoised(D, x_t, net(x_t, t, batch.label[row : row + 1], None), t))
            total = total + stage.pcl.tau(batch.t)[i] * torch.exp(-(mu[0] - mu[1]).square().mean())
            number += 1
    calls = spied(stage)
    _, figures = stage.loss(0, rng_of())
    assert len(calls) == 1 + 8 and figures["pairs"] == number > 10
    torch.testing.assert_close(figures["loss_pcl"].double(), total / number, rtol=1e-5, atol=0)
    params, values = list(net.parameters()), (figures["loss_pcl"], total / number)
    mine, theirs = (torch.autograd.grad(value, params, retain_graph=True) for value in values)
    torch.testing.assert_close(torch.cat([g.flatten() for g in mine]), torch.cat([g.flatten() for g in theirs]), rtol=1e-3, atol=1e-6)


def test_reforward_sees_the_augmentation_of_every_partner():
    stage = stage_of(batch_size=4, pcl_t="reforward", augment="ada", augment_p=0.9, cfg_drop=0.0)
    seen, net = [], stage.net
    stage.net = lambda x, t, y, augment: seen.append(augment) or net(x, t, y, augment)
    stage.loss(0, rng_of())
    batch = stage.draw(0, rng_of())
    assert len(seen) == 5 and all(torch.equal(augment, batch.whole_augment) for augment in seen) and batch.whole_augment.any()


def test_measuring_the_gradients_changes_nothing(tmp_path):
    """And the ratio is that of the two gradients."""
    logs, weights = [], []
    for every in (0, 2):
        stage = stage_of(steps=4, dropout=0.1, base="cbdm", pcl_ratio_every=every)
        loop.train(stage, tmp_path / str(every), seed=0, progress=False)
        logs.append(loop.read_log(tmp_path / str(every) / "log.jsonl"))
        weights.append(stage.modules["net"].state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert [("pcl_ratio" in row) for row in logs[1]] == [True, False, True, False]
    assert logs[0] == [{key: value for key, value in row.items() if key != "pcl_ratio"} for row in logs[1]]
    stage = stage_of(base="cbdm", pcl_ratio_every=1)
    _, figures = stage.loss(0, rng_of())
    params = list(stage.modules["net"].parameters())
    norm = lambda term: sum(  # noqa: E731
        g.square().sum() for g in torch.autograd.grad(term, params, retain_graph=True, allow_unused=True) if g is not None
    ).sqrt()
    torch.testing.assert_close(figures["pcl_ratio"], norm(figures["loss_pcl"]) / norm(figures["loss_mse"]))
    assert 1e-4 < figures["pcl_ratio"] < 1


WRONG = {
    "--no-conditional": "config: DiffROP compares classes, so it needs conditional; got --no-conditional",
    "--pcl-form hinge": "config: pcl_margin is required for pcl_form hinge and for no other; got None with hinge",
    "--pcl-margin 2": "config: pcl_margin is required for pcl_form hinge and for no other; got 2.0 with exponential",
    "--pcl-t reforward --batch-size 32": "pcl_t reforward makes batch_size^2 forwards, so it needs batch_size <= 16; got 32",
    "--pcl-distance kl --pcl-space x0": "pcl_distance kl is between Gaussians around mu, so it needs pcl_space mu; got x0",
    "--cb-tau 2": "config: cb_tau is about base cbdm; got cb_tau=2.0 without it",
    "--pcl-t batch --pcl-group-size 4": "config: pcl_group_size is about pcl_t group; got pcl_group_size=4 without it",
    "--pcl-tau-schedule const --pcl-tau-temp 1": "config: pcl_tau_temp is about pcl_tau_schedule exp; got pcl_tau_temp=1.0 without it",
    "--pcl-group-size 1": "config: pcl_group_size must be >= 2; got 1",
    "--pcl-tau0 -1": "config: pcl_tau0 must be >= 0; got -1.0",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_calls_name_expectation_and_fact(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:  # tyro's way; it draws boxes around its words
        main(["diffrop", "--no-progress", "--out", str(tmp_path / "run"), *options.split()])
    assert stop.value.code == 2 and WRONG[options] in re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_presets_hold_the_tables():
    presets = config.IMAGE_PRESETS["diffrop"]
    for name, base, dataset, samples in (
        ("table1-cifar100-ddpm", "ddpm", "cifar100-lt", 50_000), ("table2-cifar10-cbdm", "cbdm", "cifar10-lt", 10_000),
    ):  # fmt: skip
        row = presets[name]
        assert (row.base, row.dataset, row.samples, row.imbalance_ratio, row.pcl_form) == (base, dataset, samples, 100.0, "exponential")
        assert (row.lr, row.warmup, row.batch_size, row.steps, row.ema_decay, row.dropout) == (2e-4, 5000, 64, 300_000, 0.9999, 0.1)
    assert {presets[f"table5-cifar10-{word}"].pcl_form for word in ("negative-l2", "exponential", "reciprocal")} == set(FORMS) - {"hinge"}
    literal = presets["algorithm1"]
    assert (literal.pcl_t, literal.pcl_form, literal.pcl_distance, literal.pcl_reduce) == ("reforward", "reciprocal", "sum", "sum")
    stated = config.resolved(literal, literal)
    assert {name: stated[name]["provenance"] for name in ("pcl_t", "lr", "steps", "pcl_tau0", "batch_size")} == {
        "pcl_t": "paper", "lr": "paper", "steps": "code", "pcl_tau0": "ours", "batch_size": "ours",
    }  # fmt: skip
    assert literal.pcl_tau0 == 10 / (16 * 3072)  # L_DM and L_PCL are sums there
    ddpm = config.IMAGE_PRESETS["ddpm"]
    shared = ("dataset", "samples", "lr", "warmup", "batch_size", "steps", "ema_decay", "dropout", "omega", "sampler", "sample_steps")
    for base in ("ddpm", "cbdm"):  # a row and its base are trained and sampled alike
        for name in ("table1-cifar10", "table1-cifar100", "table2-cifar10", "table2-cifar100"):
            plain, separated = config.IMAGE_PRESETS[base][f"002-{name}"], presets[f"{name}-{base}"]
            assert {key: getattr(plain, key) for key in shared} == {key: getattr(separated, key) for key in shared}
    assert ddpm["002-table2-cifar10"].samples == 10_000
    assert ddpm["002-table1-cifar100-diffaug"].augment == "diffaug" and ddpm["002-table4-reweighting"].loss_weight == "inverse"
    assert [ddpm[f"002-table1-cifar100-{kind}"].batch_resample for kind in ("rs", "sqrt-rs")] == ["balanced", "sqrt"]
    assert config.resolved(ddpm["002-table4-reweighting"], ddpm["002-table4-reweighting"])["loss_weight"]["provenance"] == "paper"


# ---- the baselines ---------------------------------------------------------------------------------------------------


def test_the_plain_loss_is_the_sum_over_classes_weighted_by_their_shares():
    """Check 18, Proposition 3.1; and 1 / w_c makes it the plain mean over classes."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([40, 9, 3, 0])
    y = torch.arange(4).repeat_interleave(counts)
    output, target = torch.randn(2, 52, 1, 4, 4, generator=rng)
    stage = stage_of()
    own = (output - target).square().flatten(1).mean(1)
    means = torch.stack([own[y == label].mean() for label in range(3)])
    torch.testing.assert_close(stage.error(output, target, y), (counts[:3] / 52 * means).sum())
    weight = class_weights(counts)
    assert float(weight[y].mean()) == pytest.approx(1) and weight[3] == 0
    assert (weight[:3] * counts[:3]).tolist() == pytest.approx([52 / 3] * 3)
    stage.weight = weight
    torch.testing.assert_close(stage.error(output, target, y), means.mean())


def test_reweighting_takes_the_long_tailed_counts(tmp_path):
    from training.config import DDPMConfig
    from training.methods.ddpm import Denoise

    settings = DDPMConfig(batch_size=32, width=32, loss_weight="inverse")
    dataset = data.load("digits-lt", imbalance_ratio=20)
    stage = Denoise(dataset, run_images.build_modules(settings, (1, 8, 8), 10), settings)
    torch.testing.assert_close(stage.weight, 58.7 / torch.tensor(dataset.counts))
    calls, batch = spied(stage), stage.draw(0, rng_of())
    loss, _ = stage.loss(0, rng_of())
    target, _ = stage.target(batch)
    own = (calls[0][3] - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, (58.7 / torch.tensor(dataset.counts)[batch.y] * own).mean())


def test_diffaug_is_the_released_one():
    """Against its steps written out for single images, with the numbers drawn here."""
    x = torch.rand(200, 3, 13, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = diff_augment(x, torch.Generator().manual_seed(5))
    u = torch.rand(200, 7, generator=torch.Generator().manual_seed(5))
    places = []
    for i in range(200):
        z = x[i] + (u[i, 0] - 0.5)
        z = (z - z.mean(0, keepdim=True)) * (u[i, 1] * 2) + z.mean(0, keepdim=True)
        z = (z - z.mean()) * (u[i, 2] + 0.5) + z.mean()
        down, right = int(u[i, 3] * 5) - 2, int(u[i, 4] * 3) - 1  # an eighth of 13, rounded, is 2
        padded = torch.zeros(3, 17, 10)
        padded[:, 2:15, 1:9] = z
        z = padded[:, 2 - down : 15 - down, 1 - right : 9 - right].clone()
        row, column = int(u[i, 5] * 13), int(u[i, 6] * 9)  # 0 to 13 - 1 for the odd side 7, 0 to 8 for the even side 4
        z[:, max(row - 3, 0) : max(row + 4, 0), max(column - 2, 0) : max(column + 2, 0)] = 0
        torch.testing.assert_close(out[i], z, rtol=1e-5, atol=1e-5)
        places.append((down, right, row, column))
    assert len({place[:2] for place in places}) == 15 and {place[2] for place in places} == set(range(13))
    grey = torch.rand(8, 1, 8, 8)
    assert torch.equal(diff_augment(grey, torch.Generator().manual_seed(1)), diff_augment(grey, torch.Generator().manual_seed(1)))


def test_a_run_with_diffaug_draws_whole_batches(tmp_path):
    stage = stage_of(augment="diffaug")
    batch = stage.draw(0, rng_of())
    plain = stage_of().draw(0, rng_of())
    assert torch.equal(batch.rows, plain.rows) and torch.equal(batch.t, plain.t) and not torch.equal(batch.x0, plain.x0)
    assert batch.augment is None and batch.x0.shape == plain.x0.shape
    assert stage.loss(0, rng_of())[0].isfinite()
    assert json.dumps(config.resolved(stage.config, stage.config)["augment"]) == '{"value": "diffaug", "provenance": "paper"}'
