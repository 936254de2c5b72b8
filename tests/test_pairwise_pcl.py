import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import ltkernels
from ltkernels import pairwise_pcl, pairwise_sqdist, pcl_loss, reference

OPS = torch.ops.ltkernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMS = ("exponential", "reciprocal", "hinge", "negative_l2")
CPP = ltkernels.build_info()["cpp"]
pytestmark = pytest.mark.filterwarnings("ignore:pcl_loss. with distance='sum'")


def exact(
    mu, labels, *, form="exponential", sample_weight=1.0, margin=None, distance="mean", group=None, other=None, other_labels=None,
    other_group=None, reduction="mean",
):  # fmt: skip
    """The loss in float64 from the formula, differentiable; how far it may be off where d is off by 1e-6 max(1, d); and how far every row's
    gradient in mu (and in other) may be beyond a part of its norm: by 2e-7 of its terms, since they may cancel, and with exp(-d) by the
    1e-6 d that d may be off."""
    x, y = mu.double().flatten(1), (mu if other is None else other).double().flatten(1)
    d = (x[:, None] - y).square().sum(-1) / (x.shape[1] if distance == "mean" else 1)
    counts = labels[:, None] != (labels if other is None else other_labels)
    if group is not None:
        counts &= group[:, None] == (group if other is None else other_group)
    weight = torch.as_tensor(sample_weight).double().expand(len(x))[:, None]
    if form == "exponential":
        phi = (-d).exp()
        slope = phi
    elif form == "reciprocal":
        phi = 1 / (1 + d)
        slope = phi.square()
    elif form == "hinge":
        phi = (torch.as_tensor(margin).double().expand(len(x))[:, None] - d).clamp(min=0)
        slope = (phi > 0).double()
    else:
        phi, slope = -d, torch.ones_like(d)
    divisor = max(1, int(counts.sum())) if reduction == "mean" else 1
    allowed = (weight.abs() * d.clamp(min=1) * torch.maximum(phi.abs(), slope * d) * counts).sum().detach() * 1e-6
    scale = 1 / x.shape[1] if distance == "mean" else 1
    relative = 2e-7 + (1e-13 if mu.dtype == torch.float64 else 1e-6) * d if form == "exponential" else 2e-7
    terms = (weight * slope * counts * 2 * (scale * d).sqrt() * relative).detach() / divisor
    slack = ((terms + terms.T).sum(1),) if other is None else (terms.sum(1), terms.sum(0))
    return (weight * torch.where(counts, phi, 0)).sum() / divisor, allowed / divisor, slack


def random_batch(b: int, d: int, dtype=torch.float32, classes: int = 4):
    g = torch.Generator().manual_seed(1000 * d + b)
    return torch.randn(b, d, generator=g).to(dtype), torch.randint(classes, (b,), generator=g)


def clusters(b: int, d: int, spread: float, norm: float):
    """Tight clusters far from the origin whose members have different labels, and every row's cluster: |x|^2 + |y|^2 - 2xy has no digit
    left of the small distances."""
    g = torch.Generator().manual_seed(b)
    centres = torch.randn(5, d, generator=g, dtype=torch.float64)
    own = torch.arange(b) % 5
    steps = torch.randn(b, d, generator=g, dtype=torch.float64)
    rows = norm * centres[own] / centres[own].norm(dim=1, keepdim=True) + spread * steps / steps.norm(dim=1, keepdim=True)
    return rows.float(), torch.arange(b) // 5 % 3, own


def assert_loss(mu, labels, device, other=None, gradient=1e-5, **options):
    """Loss, and gradients in mu and other, row by row, beside float64."""
    rows = [x.detach().clone().requires_grad_() for x in ((mu,) if other is None else (mu, other))]
    given = [x.detach().to(device).requires_grad_() for x in rows]
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    loss = pcl_loss(given[0], labels.to(device), other=None if other is None else given[1], **moved)
    expected, allowed, slack = exact(rows[0], labels, other=None if other is None else rows[1], **options)
    assert loss.shape == () and loss.dtype == (torch.float64 if mu.dtype == torch.float64 else torch.float32)
    error = (loss.double().cpu() - expected).abs()
    assert error <= allowed + 1e-45, f"loss {loss.item()} is off by {error.item():.1e}; allowed {allowed.item():.1e}"
    wide = [x.detach().double().requires_grad_() for x in rows]
    value, *_ = exact(wide[0], labels, other=None if other is None else wide[1], **options)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(mu.dtype, 0)
    for mine, true, more in zip(torch.autograd.grad(loss, given), torch.autograd.grad(value, wide), slack, strict=True):
        assert mine.dtype == mu.dtype and mine.shape == true.shape
        off = (mine.double().cpu() - true).flatten(1).norm(dim=1)
        norm = true.flatten(1).norm(dim=1)
        small = 1e-7 * math.sqrt(true[0].numel()) if mu.dtype == torch.float16 else 1e-36  # half the smallest number of float16
        assert (off <= (gradient + rounding) * norm + more + small).all(), f"a gradient is off by {(off / norm).max().item():.1e}"


def options(form: str, b: int, seed: int = 0) -> dict:
    """Weights, and margins where they belong, of every row."""
    g = torch.Generator().manual_seed(seed)
    weight, margin = torch.rand(b, generator=g) + 0.1, 3 * torch.rand(b, generator=g)
    return {"form": form, "sample_weight": weight, **({"margin": margin} if form == "hinge" else {})}


def skip_double_on_the_card(dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on cpu and reference")


# ---- the loss and its gradients, against float64


@pytest.mark.parametrize("b, d", [(40, 12), (9, 3072), (130, 47), (67, 1)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_and_dtype(dtype, form, b, d, backend, device):
    skip_double_on_the_card(dtype, device)
    mu, labels = random_batch(b, d, dtype)
    other, other_labels = random_batch(b + 5, d, dtype)
    group, other_group = torch.arange(b) % 3, torch.arange(b + 5) % 3
    for distance in ("mean", "sum"):
        common = {**options(form, b), "distance": distance, "reduction": "sum"}
        if form == "hinge" and distance == "sum":
            common["margin"] = common["margin"] * d
        assert_loss(mu, labels, device, **common)
        assert_loss(mu, labels, device, group=group, **common)
        assert_loss(mu, labels, device, other=other, other_labels=other_labels, **common)
        assert_loss(mu, labels, device, other=other, other_labels=other_labels, group=group, other_group=other_group, **common)


@pytest.mark.parametrize("form", FORMS)
def test_hard_batches(form, backend, device):
    """Crowds, two rows, one row, none; copies, among them under different labels; one class; all classes different."""
    mu, labels = random_batch(300, 20)
    copies = mu[:4].repeat(10, 1)
    for rows, own in [
        (mu, labels), (mu[:2], torch.tensor([0, 1])), (mu[:1], labels[:1]), (mu[:0], labels[:0]), (mu[:2], torch.tensor([3, 3])),
        (copies, torch.arange(40) // 4), (mu[:50], torch.full((50,), -7)), (mu[:50], torch.arange(50) - 2**62),
        (1e-3 * mu[:33], labels[:33]), (1e3 * mu[:33], labels[:33]),
    ]:  # fmt: skip
        assert_loss(rows, own, device, **options(form, len(rows)))


@pytest.mark.parametrize("d", [1, 3, 64, 3072])
@pytest.mark.parametrize("form", FORMS)
def test_tight_clusters_far_from_the_origin(form, d, backend, device):
    b = 40 if d < 3072 else 20
    mu, labels, cluster = clusters(b, d, 1e-3, 10.0)
    for distance in ("mean", "sum"):
        common = {**options(form, b), "distance": distance}
        if form == "hinge":
            common["margin"] = common["margin"] * (4e-6 if distance == "sum" else 4e-6 / d)  # decides within the clusters
        assert_loss(mu, labels, device, group=cluster, **common)
        if form != "hinge":
            assert_loss(mu, labels, device, **common)
        assert_loss(mu, labels, device, other=mu.flip(0), other_labels=labels.flip(0), group=cluster, other_group=cluster.flip(0), **common)


def test_distances_of_close_pairs(backend, device):
    """Pairs 1e-3 apart at norm 10: the loss of form "negative_l2" is their distance."""
    mu, labels, cluster = clusters(40, 64, 1e-3, 10.0)
    near = -pcl_loss(mu.to(device), labels.to(device), form="negative_l2", distance="sum", group=cluster.to(device)).double().cpu()
    true, *_ = exact(mu, labels, form="negative_l2", distance="sum", group=cluster)
    assert 1e-6 < near < 1e-5 and (near + true).abs() <= 1e-5 * near


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend_name", ["reference", *(["cpu"] if CPP else [])])
def test_gradcheck(form, backend_name):
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    mu, other, weight = draw(5, 2, 2), draw(4, 2, 2), draw(5)
    margin = [(torch.rand(5, generator=g, dtype=torch.float64) * 3).requires_grad_()] if form == "hinge" else []
    labels, other_labels = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([2, 0, 1, 1])
    group, other_group = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0, 1, 0, 1])

    def call(mu, weight, *margin, **rest):
        return pcl_loss(mu, labels, form=form, sample_weight=weight, margin=margin[0] if margin else None, **rest)

    with ltkernels.backend(backend_name):
        assert torch.autograd.gradcheck(call, (mu, weight, *margin))
        assert torch.autograd.gradcheck(lambda *a: call(*a, distance="sum", reduction="sum", group=group), (mu, weight, *margin))
        among = lambda other, *a: call(*a, other=other, other_labels=other_labels)  # noqa: E731
        assert torch.autograd.gradcheck(among, (other, mu, weight, *margin))
        cut = lambda other, *a: call(*a, other=other, other_labels=other_labels, group=group, other_group=other_group)  # noqa: E731
        assert torch.autograd.gradcheck(cut, (other, mu, weight, *margin))
        both = lambda mu, *a: call(mu, *a, other=mu, other_labels=labels)  # noqa: E731
        assert torch.autograd.gradcheck(both, (mu, weight, *margin))  # one tensor in both places
        numbers = (weight[0].detach().requires_grad_(), *(m[:1].sum().detach().requires_grad_() for m in margin))
        assert torch.autograd.gradcheck(lambda *a: call(mu.detach(), *a), numbers)


# ---- what the paper says


def test_the_divergence_of_gaussians(backend, device):
    """KL(N(mu_i, s^2) || N(mu_j, s^2)) = d / 2 s^2, and Eq. 11 of 002 is alpha_t d."""
    g = torch.Generator().manual_seed(0)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    x, noise = (torch.randn(6, 48, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(6)
    for t in (0, 99, 499, 999):
        clean = x - betas[t] / (1 - abar[t]).sqrt() * noise
        mu, alpha = (clean / (1 - betas[t]).sqrt()).float(), 1 - betas[t]
        sd = torch.full((48,), betas[t].sqrt().item(), dtype=torch.float64)
        laws = [Independent(Normal(row.double(), sd), 1) for row in mu]
        divergence = torch.stack([kl_divergence(a, b) for a in laws for b in laws]).reshape(6, 6)
        found = pairwise_sqdist(mu.to(device)).double().cpu() / (2 * sd[0] ** 2)
        torch.testing.assert_close(found, divergence, rtol=1e-6, atol=0)
        loss = -pcl_loss(mu.to(device), labels.to(device), form="negative_l2", distance="sum").double().cpu()
        torch.testing.assert_close(loss / (2 * sd[0] ** 2), divergence.sum() / 30, rtol=1e-6, atol=0)
        eq11 = (clean[:, None] - clean).square().sum(-1).sum() / 30
        torch.testing.assert_close(alpha * loss, eq11, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "form, value, pull", [("exponential", math.exp(-4), 4 * math.exp(-4)), ("reciprocal", 1 / 5, 4 / 25), ("negative_l2", -4, 4)]
)
def test_the_pull_of_every_form_at_the_truth(form, value, pull, backend, device):
    """Two means 2 apart, d = 4: the gradient is 0 there for the hinge alone, so the others shift the optimum; descent moves them apart."""
    mu = torch.tensor([[0.0], [2.0]], device=device, requires_grad=True)
    loss = pcl_loss(mu, torch.tensor([0, 1], device=device), form=form)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert mu.grad.flatten().tolist() == pytest.approx([pull, -pull], rel=1e-6)
    hinge = pcl_loss(mu, torch.tensor([0, 1], device=device), form="hinge", margin=4.0)
    (still,) = torch.autograd.grad(hinge, mu)
    assert hinge.item() == 0 and not still.any()


def test_sums_over_images_underflow(backend, device, monkeypatch):
    """At t = 500 of DDPM, D = 3072, independent noise: exp(-d) with a sum is nothing at all in float32, with the mean it is something."""
    monkeypatch.setattr(pairwise_pcl, "_warned", False)
    g, abar = torch.Generator().manual_seed(0), 0.0785872
    clean, noise = torch.rand(8, 3, 32, 32, generator=g) * 2 - 1, torch.randn(8, 3, 32, 32, generator=g)
    mu = (abar**0.5 * clean + (1 - abar) ** 0.5 * noise).to(device).requires_grad_()
    labels = torch.arange(8, device=device) % 4
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pcl_loss(mu, labels), pcl_loss(mu, labels, form="reciprocal", distance="sum"), pcl_loss(mu[..., 0, 0], labels, distance="sum")
        pcl_loss(torch.zeros(8, 87, device=device), labels, distance="sum")
        assert not seen
        loss = pcl_loss(torch.zeros(8, 88, device=device), labels, distance="sum")
        assert len(seen) == 1
        monkeypatch.setattr(pairwise_pcl, "_warned", False), seen.clear()
        loss = pcl_loss(mu, labels, distance="sum")
        assert [(w.category, w.filename) for w in seen] == [(RuntimeWarning, __file__)]
        assert "pcl_loss: with distance='sum' over 3072 elements, exp(-d) and its gradient are 0" in str(seen[0].message)
        pcl_loss(mu, labels, distance="sum")
        assert len(seen) == 1
    (gradient,) = torch.autograd.grad(loss, mu)
    assert loss.item() == 0 and not gradient.any()
    loss = pcl_loss(mu, labels)
    (gradient,) = torch.autograd.grad(loss, mu)
    assert loss.item() > 0.01 and (gradient.flatten(1).norm(dim=1) > 1e-5).all()


@pytest.mark.parametrize("sqdist", [1, 20, 60, 80, 86.5, 87.25, 110])
def test_the_exponential_as_far_as_float32_goes(backend, device, sqdist):
    mu = torch.tensor([[0.0], [sqdist**0.5]], device=device)
    d = mu[1].double().square().item()
    found = pcl_loss(mu, torch.arange(2, device=device), distance="sum").item()
    assert found == pytest.approx(math.exp(-d), rel=1e-6 * max(1, d)) if d < 87.33 else found == 0


@pytest.mark.parametrize("distance", [0.125, 1.5, 4.25, 7.75, 9.0, 9.25])
def test_the_exponential_of_an_exact_square(backend, device, distance):
    """Where float32 has d without an error, exp(-d) has one of a few units in the last place, however large d is."""
    mu = torch.tensor([[0.0], [distance]], device=device)
    found = pcl_loss(mu, torch.arange(2, device=device), distance="sum").item()
    assert found == pytest.approx(math.exp(-(distance**2)), rel=5e-7)


def test_pairs_of_one_class_count_for_nothing(backend, device):
    mu, labels = (x.to(device) for x in random_batch(30, 6))
    mu.requires_grad_()
    for form in FORMS:
        common = {**options(form, 30), "form": form}
        common = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in common.items()}
        own = {name: value.clone().requires_grad_() for name, value in common.items() if name != "form"}
        loss = pcl_loss(mu, torch.full_like(labels, 3), **{**common, **own})
        loss.backward()
        assert loss.item() == 0 and mu.grad.shape == mu.shape and not mu.grad.any()
        assert all(value.grad.shape == (30,) and not value.grad.any() for value in own.values())
        apart = torch.full((30,), 1e3, device=device)  # rows of the other classes, so far away that only same-class pairs could be felt
        far = torch.where((labels == 0)[:, None], mu.detach(), mu.detach() + apart[:, None] * (1 + labels[:, None]))
        if form != "negative_l2":
            assert pcl_loss(far, labels, **common).item() < 1e-5
        mu.grad = None
    alone = torch.randn(1, 6, device=device, requires_grad=True)
    pcl_loss(alone, torch.zeros(1, dtype=torch.int64, device=device)).backward()
    assert not alone.grad.any()


def test_groups_are_batches_of_their_own(backend, device):
    mu, labels = (x.to(device) for x in random_batch(60, 7))
    group = torch.arange(60, device=device) % 4 * 2**40 - 5
    parts = [pcl_loss(mu[group == g], labels[group == g], reduction="sum") for g in group.unique()]
    torch.testing.assert_close(pcl_loss(mu, labels, group=group, reduction="sum"), sum(parts), rtol=1e-6, atol=0)
    everyone = torch.zeros_like(group)
    assert torch.equal(pcl_loss(mu, labels, group=everyone), pcl_loss(mu, labels))
    assert pcl_loss(mu, labels, group=torch.arange(60, device=device)).item() == 0


def test_dispersive_loss(backend, device):
    """Of Wang & He (2025): every row a class of its own. Theirs averages over the pairs (i, i), too."""
    z = torch.randn(40, 16, device=device)
    d = torch.cdist(z.double(), z.double()).square() / 16 / 0.5
    off = ~torch.eye(40, dtype=torch.bool, device=device)
    rows = torch.arange(40, device=device)
    found = pcl_loss(z / 0.5**0.5, rows).log()
    torch.testing.assert_close(found.double(), (-d).exp()[off].mean().log(), rtol=1e-6, atol=1e-6)
    theirs = ((pcl_loss(z / 0.5**0.5, rows, reduction="sum") + 40) / 40**2).log()
    torch.testing.assert_close(theirs.double(), (-d).exp().mean().log(), rtol=1e-6, atol=1e-6)


# ---- other rows


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_cut_over_ranks(form, backend, device):
    """Every rank holds its rows and all rows: the parts add up to the whole, their gradients, too."""
    mu, labels = (x.to(device) for x in random_batch(50, 33))
    group = torch.arange(50, device=device) % 2
    common = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options(form, 50).items()}
    whole, cut = mu.clone().requires_grad_(), mu.clone().requires_grad_()
    loss = pcl_loss(whole, labels, group=group, reduction="sum", **common)
    loss.backward()
    parts = []
    for rows in (slice(0, 17), slice(17, 18), slice(18, 50)):
        own = {name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in common.items()}
        rest = {"other": cut, "other_labels": labels, "group": group[rows], "other_group": group}
        parts.append(pcl_loss(cut[rows], labels[rows], reduction="sum", **own, **rest))
    total = sum(parts)
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)
    off = (cut.grad - whole.grad).norm(dim=1)
    assert (off <= 1e-5 * whole.grad.norm(dim=1)).all() and whole.grad.norm(dim=1).min() > 0


def test_no_gradient_through_detached_rows(backend, device):
    mu, labels = (x.to(device) for x in random_batch(20, 5))
    mu.requires_grad_()
    rest = {"other_labels": labels, "form": "reciprocal"}
    (both,) = torch.autograd.grad(pcl_loss(mu, labels, form="reciprocal"), mu)
    (one,) = torch.autograd.grad(pcl_loss(mu, labels, other=mu.detach(), **rest), mu)
    (partner,) = torch.autograd.grad(pcl_loss(mu.detach(), labels, other=mu, **rest), mu)
    torch.testing.assert_close(2 * one, both)  # equal weights: the two sides pull alike
    torch.testing.assert_close(one, partner)
    loss = pcl_loss(mu.detach(), labels, other=mu.detach(), **rest)
    assert not loss.requires_grad
    with torch.no_grad():
        assert torch.equal(pcl_loss(mu, labels, other=mu, **rest), loss)


# ---- arguments


def test_reductions_and_numbers(backend, device):
    mu, labels = (x.to(device) for x in random_batch(20, 5))
    pairs = (labels[:, None] != labels).sum()
    total = pcl_loss(mu, labels, reduction="sum")
    torch.testing.assert_close(pcl_loss(mu, labels), total / pairs)
    torch.testing.assert_close(pcl_loss(mu, labels, reduction="sum", sample_weight=-2), -2 * total)
    for op in (lambda w, m: pcl_loss(mu, labels, form="hinge", sample_weight=w, margin=m),):
        expected = op(torch.full((20,), 0.5, device=device), torch.full((20,), 2.0, device=device))
        for weight, margin in ((0.5, 2), (np.float32(0.5), np.float64(2)), (torch.tensor(0.5), torch.tensor(2.0).double())):
            assert torch.equal(op(weight, margin), expected)
    assert not pcl_loss(mu, labels, sample_weight=0.0).any()


@pytest.mark.parametrize("rows, others", [(5, 9), (9, 5), (0, 4), (4, 0), (0, 0), (1, 1), (70, 300)])
def test_shapes(rows, others, backend, device):
    mu, other = torch.randn(rows, 2, 3, 4, device=device), torch.randn(others, 2, 3, 4, device=device)
    labels, other_labels = torch.arange(rows, device=device) % 3, torch.arange(others, device=device) % 2
    mu.requires_grad_(), other.requires_grad_()
    d = pairwise_sqdist(mu, other)
    assert d.shape == (rows, others) and d.dtype == torch.float32 and torch.equal(d, pairwise_sqdist(mu.flatten(1), other.flatten(1)))
    loss = pcl_loss(mu, labels, other=other, other_labels=other_labels)
    grads = torch.autograd.grad(loss + d.sum(), (mu, other))
    assert [grad.shape for grad in grads] == [mu.shape, other.shape]
    assert torch.equal(loss, pcl_loss(mu.flatten(1), labels, other=other.flatten(2), other_labels=other_labels))
    if rows * others == 0:
        assert loss.item() == 0 and not any(grad.any() for grad in grads)
    assert pcl_loss(mu, labels).shape == () and pairwise_sqdist(mu).shape == (rows, rows)


def test_strides(backend, device):
    mu, labels = (x.to(device) for x in random_batch(20, 12))
    wide = torch.zeros(20, 24, device=device)
    wide[:, ::2] = mu
    group, weight = torch.arange(20, device=device) % 2, torch.rand(20, device=device)
    twice = lambda x: x.repeat_interleave(2)[::2]  # noqa: E731

    def answers(mu, labels, group, weight):
        mu = mu.detach().requires_grad_() if mu.is_contiguous() else mu.detach().as_strided(mu.shape, mu.stride()).requires_grad_()
        loss = pcl_loss(mu, labels, group=group, sample_weight=weight, other=mu, other_labels=labels, other_group=group)
        alone = pcl_loss(mu, labels, group=group, sample_weight=weight)
        return loss, alone, *torch.autograd.grad(loss + alone, mu), pairwise_sqdist(mu), pairwise_sqdist(mu, mu[:7])

    expected = answers(mu, labels, group, weight)
    for strided in (mu.t().contiguous().t(), wide[:, ::2], torch.cat([mu, mu])[:20]):
        for a, b in zip(answers(strided, twice(labels), twice(group), twice(weight)), expected, strict=True):
            assert torch.equal(a, b)


def test_numpy_in_numpy_out(backend, device):
    if device != "cpu":
        pytest.skip("NumPy arrays live in host memory")
    mu, labels = random_batch(20, 6)
    weight, margin = torch.rand(20), torch.rand(20)
    answer = pcl_loss(mu.numpy(), labels.numpy(), form="hinge", sample_weight=weight.numpy(), margin=margin.numpy()[::-1])
    assert isinstance(answer, np.ndarray) and answer.shape == ()
    assert answer == pcl_loss(mu, labels, form="hinge", sample_weight=weight, margin=margin.flip(0)).item()
    answer = pairwise_sqdist(mu.numpy(), mu[:3].numpy())
    assert isinstance(answer, np.ndarray) and np.array_equal(answer, pairwise_sqdist(mu, mu[:3]).numpy())


# ---- what is not finite


@pytest.mark.parametrize("form", FORMS)
def test_broken_rows_matter_where_they_are_in_a_pair(form, backend, device):
    mu, labels = random_batch(24, 9)
    group = torch.arange(24) // 12
    mu[5, 3], mu[13], labels[12:] = math.nan, -math.inf, 1  # 13 is in no pair: all of its group is of one class
    common = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options(form, 24).items()}
    weight = common["sample_weight"].requires_grad_()
    mu, labels, group = (x.to(device) for x in (mu, labels, group))
    mu.requires_grad_()
    loss = pcl_loss(mu, labels, group=group, **common)
    mu_grad, weight_grad = torch.autograd.grad(loss, (mu, weight))
    touched = ((labels != labels[5]) & (group == 0)).cpu()
    touched[5] = True
    assert loss.isnan() and 2 < touched.sum() < 12
    assert mu_grad.cpu()[touched].isnan().all() and torch.isfinite(mu_grad.cpu()[~touched]).all() and not mu_grad[12:].any()
    assert torch.equal(weight_grad.isnan().cpu(), touched)
    if form == "hinge":
        margin = common["margin"].requires_grad_()
        (grad,) = torch.autograd.grad(pcl_loss(mu, labels, group=group, **{**common, "margin": margin}), margin)
        assert torch.equal(grad.isnan().cpu(), touched)
    other = {"other": mu, "other_labels": labels, "group": group, "other_group": group}
    one, two = mu.detach().requires_grad_(), mu.detach().requires_grad_()
    loss = pcl_loss(one, labels, **{**other, "other": two}, **common)
    for grad in torch.autograd.grad(loss, (one, two)):
        assert torch.equal(grad.isnan().all(1).cpu(), touched) and torch.isfinite(grad.cpu()[~touched]).all()
    healthy = labels == labels[5]  # nobody else is broken, and 5 is in no pair here
    assert torch.isfinite(pcl_loss(mu[healthy & (group == 0)], labels[healthy & (group == 0)], form="reciprocal"))
    last = pcl_loss(mu[12:], labels[12:], form="reciprocal")
    last.backward()
    assert last.item() == 0 and not mu.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_distances_beyond_float32(form, backend, device):
    mu = torch.tensor([[1e30, 0], [-1e30, 0], [0, 0], [0.5, 0]], device=device, requires_grad=True)
    labels = torch.arange(4, device=device)
    margin = {"margin": 1.0} if form == "hinge" else {}
    loss = pcl_loss(mu, labels, form=form, distance="sum", **margin)
    (gradient,) = torch.autograd.grad(loss, mu)
    if form == "negative_l2":
        assert loss.item() == -math.inf
        return
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and not gradient[:2].any() and gradient[2:, 0].all()
    near, *_ = exact(mu.detach().cpu(), labels.cpu(), form=form, distance="sum", **margin)
    assert loss.item() == pytest.approx(near.item(), rel=1e-6)


def test_other_broken_rows_that_no_row_meets(backend, device):
    mu, labels = (x.to(device) for x in random_batch(10, 3))
    other, theirs = torch.cat([mu, torch.full((3, 3), math.nan, device=device)]), torch.cat([labels, labels[:3]])
    group, their_group = torch.zeros_like(labels), torch.zeros_like(theirs)
    their_group[10:] = 1
    other.requires_grad_()
    loss = pcl_loss(mu, labels, other=other, other_labels=theirs, group=group, other_group=their_group)
    torch.testing.assert_close(loss, pcl_loss(mu, labels), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, other)
    assert torch.isfinite(gradient).all() and not gradient[10:].any()


# ---- same bits


@pytest.mark.parametrize("b, d", [(37, 5), (130, 300), (12, 5000)])
def test_same_bits_for_any_thread_count_and_run(b, d, backend, device):
    mu, labels = (x.to(device) for x in random_batch(b, d))
    group = torch.arange(b, device=device) % 2

    def answers():
        found = [pairwise_sqdist(mu), pairwise_sqdist(mu, mu[: b // 2])]
        for form in FORMS:
            own = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options(form, b).items()}
            one, two = mu.clone().requires_grad_(), mu.clone().requires_grad_()
            weight = own["sample_weight"].requires_grad_()
            loss = pcl_loss(one, labels, group=group, **own) + pcl_loss(one, labels, other=two, other_labels=labels, **own)
            found += [loss, *torch.autograd.grad(loss, (one, two, weight))]
        rows = mu.clone().requires_grad_()
        return [*found, *torch.autograd.grad(pairwise_sqdist(rows, rows[:3]).square().sum(), rows)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = answers()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(mine, first) for mine, first in zip(answers(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- derivatives and composition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept(dtype, backend, device):
    """The gradient made with the loss is given away once, then made again: the same bits; and also for one input after the other."""
    mu, labels = (x.to(device) for x in random_batch(30, 11, dtype))
    other, weight = mu.flip(0).clone().requires_grad_(), torch.rand(30, device=device, requires_grad=True)
    mu.requires_grad_()
    loss = pcl_loss(mu, labels, sample_weight=weight, other=other, other_labels=labels)
    first = torch.autograd.grad(3 * loss, (mu, other, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (mu, other, weight), retain_graph=True)
    single = [torch.autograd.grad(3 * loss, x, retain_graph=True)[0] for x in (weight, other, mu, weight)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(single, [first[2], first[1], first[0], first[2]], strict=True))
    (with_graph,) = torch.autograd.grad(3 * loss, mu, create_graph=True)
    assert torch.equal(with_graph, first[0])
    fresh = pcl_loss(mu, labels, sample_weight=weight, other=other, other_labels=labels)
    kept = torch.autograd.grad(3 * fresh, (mu, other), create_graph=True)
    values = [x.clone() for x in kept]
    torch.autograd.grad(3 * fresh, (mu, other), retain_graph=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, values, first, strict=False))


def test_gradients_accumulate(backend, device):
    mu, labels = (x.to(device) for x in random_batch(30, 11))
    mu.requires_grad_()
    for _ in range(2):
        pcl_loss(mu, labels).backward()
    (once,) = torch.autograd.grad(pcl_loss(mu, labels), mu)
    torch.testing.assert_close(mu.grad, 2 * once)


def test_second_derivatives_raise(backend, device):
    mu, labels = (x.to(device) for x in random_batch(8, 3))
    mu, other = mu.requires_grad_(), mu.detach().clone().requires_grad_()
    weight, margin = (torch.ones(8, device=device, requires_grad=True) for _ in range(2))
    loss = pcl_loss(mu, labels, form="hinge", sample_weight=weight, margin=margin, other=other, other_labels=labels)
    for gradient in torch.autograd.grad(loss.square(), (mu, weight, margin, other), create_graph=True):
        with pytest.raises(NotImplementedError, match="pcl_loss: no second derivatives"):
            torch.autograd.grad(gradient.sum(), mu, retain_graph=True)
    (gradient,) = torch.autograd.grad(pairwise_sqdist(mu, other).sum(), mu, create_graph=True)
    with pytest.raises(NotImplementedError, match="pairwise_sqdist: no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("place", range(4))
def test_forward_mode_raises_instead_of_answering_zeros(place):
    inputs = [torch.randn(4, 3), torch.randn(4, 3), torch.rand(4), torch.rand(4)]
    labels = torch.arange(4)

    def call(value):
        mu, other, weight, margin = (value if i == place else x for i, x in enumerate(inputs))
        return pcl_loss(mu, labels, form="hinge", other=other, other_labels=labels, sample_weight=weight, margin=margin)

    def distances(value):
        x, y = (value if i == place else x for i, x in enumerate(inputs[:2]))
        return pairwise_sqdist(x, y)

    with ltkernels.backend("reference"), torch.autograd.forward_ad.dual_level():
        for op, name in ((call, "pcl_loss"), *([(distances, "pairwise_sqdist")] if place < 2 else [])):
            with pytest.raises(NotImplementedError, match=f"{name}: no forward-mode derivatives"):
                op(torch.autograd.forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place])))
            op(inputs[place])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_limits_of_torch_func(backend, device):
    """torch.func.grad is refused by torch itself; vmap runs the op in a loop, and what autograd makes of it is right."""
    mu, labels = torch.randn(3, 8, 4, device=device), torch.arange(8, device=device) % 3
    for op in (lambda m: pcl_loss(m, labels), lambda m: pairwise_sqdist(m).sum()):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(op)(mu[0])
        one, all_of_them = mu.clone().requires_grad_(), mu.clone().requires_grad_()
        mapped = torch.func.vmap(op)(all_of_them)
        looped = torch.stack([op(m) for m in one])
        assert torch.equal(mapped, looped)
        (a,), (b,) = torch.autograd.grad(mapped.sum(), all_of_them), torch.autograd.grad(looped.sum(), one)
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("rows, requires_grad", [(6, True), (0, False)])
def test_opcheck(rows, requires_grad, backend, device):
    mu, other = (torch.randn(size, 5, device=device, requires_grad=requires_grad) for size in (rows, 4))
    labels, other_labels = torch.arange(rows, device=device) % 3, torch.arange(4, device=device) % 2
    weight, margin = (torch.rand(rows, device=device, requires_grad=requires_grad) for _ in range(2))
    torch.library.opcheck(OPS.pair_sqdist.default, (mu, other))
    torch.library.opcheck(OPS.pair_sqdist.default, (mu, mu))
    torch.library.opcheck(OPS.pcl.default, (mu, labels, labels, weight, None, None, None, None, 0, 0.2, requires_grad, False, True))
    among = (mu, labels, labels, weight, margin, other, other_labels, other_labels, 2, 0.2, requires_grad, requires_grad)
    torch.library.opcheck(OPS.pcl.default, (*among, True))
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in among]
    torch.library.opcheck(OPS.pcl_rows.default, plain)
    torch.library.opcheck(OPS.pcl_rows.default, (*plain[:4], None, None, None, None, 1, 1.0, True, False))
    torch.library.opcheck(OPS.pcl_scaled.default, (plain[0], torch.tensor(2.0, device=device), plain[0]))
    grad = torch.ones(rows, 4, device=device)
    torch.library.opcheck(OPS.pair_sqdist_backward.default, (grad, plain[0], plain[5], [True, requires_grad]))


@pytest.mark.parametrize("form", ["exponential", "hinge"])
def test_compiles_into_one_graph(form, backend, device):
    mu, labels = (x.to(device) for x in random_batch(20, 6))
    group = torch.arange(20, device=device) % 2
    margin = [torch.full((20,), 2.0, device=device)] if form == "hinge" else []

    def loss(mu, other, weight, *margin):
        own = {"form": form, "sample_weight": weight, **({"margin": margin[0]} if margin else {})}
        among = pcl_loss(2 * mu, labels, group=group, **own)
        across = pcl_loss(mu, labels, other=other, other_labels=labels, distance="sum", reduction="sum", **own)
        return among + across + pairwise_sqdist(mu, other).mean() + pairwise_sqdist(mu).mean()

    values = (mu, mu.flip(0), torch.rand(20, device=device), *margin)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = [value.clone().requires_grad_() for value in values]
    eager, graph = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
    for a, b in zip(eager, graph, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), loss(*inputs))


def test_autocast(backend, device):
    """Rows of two dtypes, such as means made under autocast and those of a queue, meet in the wider one; nothing is narrowed."""
    mu, labels = (x.to(device) for x in random_batch(20, 6))
    half, other = mu.bfloat16().requires_grad_(), mu.flip(0).clone().requires_grad_()
    rest = {"other_labels": labels.flip(0)}
    expected = pcl_loss(half.float(), labels, other=other, **rest), pairwise_sqdist(half.float(), other)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(pcl_loss(mu, labels), torch.autocast(device, enabled=False)(pcl_loss)(mu, labels))
        found = pcl_loss(half, labels, other=other, **rest), pairwise_sqdist(half, other)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    grads = torch.autograd.grad(found[0], (half, other))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


# ---- distances alone


@pytest.mark.parametrize("b, other, d", [(40, 33, 12), (5, 9, 3072), (130, 70, 47), (67, 3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances(dtype, b, other, d, backend, device):
    skip_double_on_the_card(dtype, device)
    x, y = random_batch(b, d, dtype)[0], random_batch(other, d, dtype)[0]
    true = (x.double()[:, None] - y.double()).square().sum(-1)
    found = pairwise_sqdist(x.to(device), y.to(device)).cpu()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), true, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("d", [1, 31, 64, 3072])
def test_distances_of_rows_to_each_other(d, backend, device):
    """Exactly symmetric, exactly 0 on the diagonal, also far from the origin, where close rows keep their digits."""
    mu, _, _ = clusters(75, d, 1e-3, 10.0)
    x = torch.cat([mu, mu[:3], 1e4 + 10 * torch.randn(30, d)]).to(device)
    found = pairwise_sqdist(x)
    assert torch.equal(found, found.T) and not found.diagonal().any() and torch.equal(found, pairwise_sqdist(x, x))
    true = (x.cpu().double()[:, None] - x.cpu().double()).square().sum(-1)
    torch.testing.assert_close(found.cpu().double(), true, rtol=1e-6, atol=0)
    assert (found[torch.arange(3), 75 + torch.arange(3)] == 0).all()


def test_distances_pass_what_is_not_finite_through(backend, device):
    x, y = torch.randn(6, 5), torch.randn(8, 5)
    x[1, 0], x[4], y[3, 2] = math.nan, math.inf, -math.inf
    found = pairwise_sqdist(x.to(device), y.to(device)).cpu()
    assert found[1].isnan().all() and (found[4] == math.inf).all() and (found[[0, 2, 3, 5], 3] == math.inf).all()
    good = torch.isfinite(found)
    assert good.sum() == 4 * 7
    both = pairwise_sqdist(x.to(device)).cpu()
    assert both[4, 4].isnan() and both[0, 4] == math.inf and both[1].isnan().all()
    assert (pairwise_sqdist(torch.tensor([[1e30]], device=device), torch.tensor([[-1e30]], device=device)) == math.inf).all()


@pytest.mark.parametrize("backend_name", ["reference", *(["cpu"] if CPP else [])])
def test_gradcheck_of_distances(backend_name):
    x, y = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    with ltkernels.backend(backend_name):
        assert torch.autograd.gradcheck(pairwise_sqdist, (x, y))
        assert torch.autograd.gradcheck(pairwise_sqdist, (x,))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_gradients_of_distances(dtype, backend, device):
    x, y = (random_batch(b, 40, dtype)[0].to(device).requires_grad_() for b in (30, 20))
    pull = torch.randn(30, 20, device=device)
    ours = torch.autograd.grad((pairwise_sqdist(x, y) * pull).sum(), (x, y))
    wide = [value.detach().double().requires_grad_() for value in (x, y)]
    theirs = torch.autograd.grad(((wide[0][:, None] - wide[1]).square().sum(-1) * pull).sum(), wide)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-5)
    for mine, true in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype and ((mine.double() - true).norm(dim=1) <= rounding * true.norm(dim=1)).all()


# ---- memory, and the instruction sets


MEMORY = """
import torch, ltkernels
from pathlib import Path

def mb(field):
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

def run(mu, labels, **rest):
    ltkernels.pcl_loss(mu, labels, **rest).backward()

labels = torch.arange(256) % 10
run(torch.randn(256, 10, requires_grad=True), labels)
mu, other = (torch.randn(256, 40960, requires_grad=True) for _ in range(2))
for inputs, rest in (((mu,), {}), ((mu, other), {"other": other, "other_labels": labels})):
    Path("/proc/self/clear_refs").write_text("5")
    before = mb("VmRSS")
    run(mu, labels, **rest)
    print((mb("VmHWM") - before) / (len(inputs) * 40))
    for value in inputs:
        value.grad = None
many, classes = torch.randn(6000, 4, requires_grad=True), torch.arange(6000) % 10
Path("/proc/self/clear_refs").write_text("5")
before = mb("VmRSS")
run(many, classes)
print(mb("VmHWM") - before)
"""


@pytest.mark.skipif(not CPP, reason="the promise is the cpu backend's; there is no compiled part")
def test_memory_is_the_gradients():
    """A loss and its backward pass, mu alone and with other, of 40 MB each: the gradients, and less than half of that besides. And of 6000
    short rows, whose pairs would be 36 MB even as bytes: not those."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    *peaks, pairs = map(float, run.stdout.split())
    for peak in peaks:
        assert 0.9 < peak < 1.5, f"{peak:.2f} times the inputs beyond them"
    assert pairs < 8, f"{pairs:.1f} MB for 6000 rows"


ISA_NEEDS = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
X86_FLAGS = set(re.search(r"^flags\s*:(.*)$|\Z", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group().split())


@pytest.mark.skipif(not CPP, reason="the instruction sets are the cpu backend's; there is no compiled part")
@pytest.mark.parametrize("isa", [isa for isa, needs in ISA_NEEDS.items() if needs <= X86_FLAGS])
def test_every_instruction_set_of_this_processor(isa):
    """In a process of its own, on each path that the library can choose at run time."""
    cases = "cpu and (130-47 or 130-70 or hard_batches or clusters or each_other or broken or 130-300) and not 3072"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", cases]
    run = subprocess.run(command, env={**os.environ, "LTKERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


def test_forms_are_those_of_the_definition():
    assert FORMS == reference.PCL_FORMS
