"""What the papers' toys come to where it can be worked out: 001's p_sel of two images, of white noise, of appendix J's Gaussians, and 002's
losses of two means.

001's go through the operators of `ltkernels`, in float64 where the result is exact; an expectation over one-dimensional noise is a sum over
a fine grid, not over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import ltkernels

SPREAD = 0.2  # of appendix J: covariance .2 I around each centre (.2 I read as covariance, not as its square root)
IMBALANCE = 100.0  # of appendix J: head : tail


def two_images(distance: float, ratio: float = 1.0) -> float:
    """Probability that the target of a noisy image moves to the only other image, `distance` standard deviations of the noise away, whose
    prior q(y)^beta is `ratio` times its own. Example: `two_images(0.0)` is .5."""
    noise = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    weight = torch.exp(-noise.square() / 2)
    clean = torch.tensor([[0.0], [distance]], dtype=torch.float64)
    log_prior = torch.tensor([0.0, math.log(ratio)], dtype=torch.float64)
    p = ltkernels.p_sel(noise[:, None], clean, 1.0, 1.0, log_prior=log_prior)
    return float(weight @ p[:, 1] / weight.sum())


def two_images_bound(distance: float, ratio: float = 1.0) -> float:
    """Upper bound of `two_images`: 1/2 sqrt(ratio) exp(-d^2 / 8). Proposition 3.1 prints (q_H q_T)^beta without the root, which is no bound
    (D10)."""
    return math.sqrt(ratio) * math.exp(-(distance**2) / 8) / 2


def uniform_acceptance(batch_shares: Tensor, class_counts: Tensor, gate: str) -> Tensor:
    """(C,): how often the gate accepts an image drawn uniformly from a batch, which is p_sel's limit at t = T, by the noisy image's class.

    batch_shares (C,): classes in the batch; class_counts (C,): in the training set.
    """
    other, own = class_counts[None, :], class_counts[:, None]
    accepted = {"t2h": other >= own, "h2t": other <= own, "full": torch.ones_like(other * own)}[gate]
    return accepted.to(batch_shares) @ batch_shares


def white_points(count: int, dimension: int, std: float, rng: np.random.Generator) -> Tensor:
    """(count, min(count, dimension)) float32: `count` points of N(0, std^2 I), turned so that all coordinates after these are 0.

    p_sel does not change when points and noise are turned together, and coordinates in which no point differs from another cancel in it:
    neither is an approximation. Turned points are the Cholesky factor of a Wishart matrix, whose entries are independent: normal below
    the diagonal, chi on it (Bartlett).
    """
    width = min(count, dimension)
    points = np.tril(rng.standard_normal((count, width)), -1)
    points[np.arange(width), np.arange(width)] = np.sqrt(rng.chisquare(dimension - np.arange(width)))
    return torch.from_numpy(points * std).float()


# ---- appendix J ------------------------------------------------------------------------------------------------------

CENTRES = torch.tensor([[0.0, 4.0], [0.0, -4.0]], dtype=torch.float64)  # head, tail


def two_gaussians(x: Tensor, sigma: float, ratio: float = IMBALANCE) -> tuple[Tensor, Tensor]:
    """(score (Q, 2), probability (Q,) of the head) at x (Q, 2) of ratio N((0, 4), .2 I) + N((0, -4), .2 I) with noise sigma^2 I.

    Both parts have covariance v I, v = .2 + sigma^2, so the score is the one of two points with noise sqrt(v): (mean - x) / v.
    """
    variance = SPREAD + sigma**2
    log_prior = torch.tensor([math.log(ratio), 0.0], dtype=torch.float64)
    x = x.double()
    mean = ltkernels.posterior_mean(x, CENTRES, 1.0, math.sqrt(variance), log_prior=log_prior)
    p = ltkernels.p_sel(x, CENTRES, 1.0, math.sqrt(variance), log_prior=log_prior)
    return (mean - x) / variance, p[:, 0]


def equal_line(sigma: float, ratio: float = IMBALANCE) -> float:
    """The height y at which head and tail of `two_gaussians` are equally likely."""
    return -(SPREAD + sigma**2) * math.log(ratio) / 8


def gaussian_samples(head: int, tail: int, rng: torch.Generator) -> Tensor:
    """(head + tail, 2) float32: the data set of appendix J."""
    centres = CENTRES.repeat_interleave(torch.tensor([head, tail]), 0)
    return (centres + math.sqrt(SPREAD) * torch.randn(len(centres), 2, dtype=torch.float64, generator=rng)).float()


def sample_score(x: Tensor, samples: Tensor, sigma: float) -> Tensor:
    """Score (Q, 2) at x (Q, 2) of `samples` (N, 2) with noise sigma^2 I (Eq. 20): (posterior mean - x) / sigma^2."""
    return (ltkernels.posterior_mean(x, samples, 1.0, sigma) - x) / sigma**2


# ---- 002, section 5.1: two Gaussians whose means are learnt ----------------------------------------------------------

SHARES, MEANS, VARIANCE = (0.95, 0.05), (0.0, 2.0), 0.5  # pi, m*, sigma^2; with 1/2 the KL divergence is (m_1 - m_2)^2
FAR = 1e4  # from there on the losses differ by less than float64 can tell
PHI: dict[str, Callable[[Tensor, float], Tensor]] = {  # of `ltkernels.pcl_loss`, which knows sums over pairs only
    "exponential": lambda d, margin: (-d).exp(),
    "reciprocal": lambda d, margin: 1 / (1 + d),
    "hinge": lambda d, margin: (margin - d).clamp(min=0),
    "negative_l2": lambda d, margin: -d,
}


def overlap_loss(m1: Tensor, m2: Tensor, form: str | None = None, tau: float = 1.0, margin: float = 0.0) -> Tensor:
    """Loss at estimated means m1, m2 (same shape): sum_c pi_c KL(N(m*_c) || N(m_c)) + tau phi(KL(N(m_1) || N(m_2))), variance sigma^2 known
    (002: Eq. 6, 13, 15). form: of `pcl_loss`; None: without its term."""
    kl = lambda difference: difference.square() / (2 * VARIANCE)  # noqa: E731
    plain = sum(share * kl(m - true) for share, m, true in zip(SHARES, (m1, m2), MEANS, strict=True))
    return plain if form is None else plain + tau * PHI[form](kl(m1 - m2), margin)


def overlap_minimum(form: str | None = None, tau: float = 1.0, margin: float = 0.0, points: int = 81) -> tuple[float, float] | None:
    """(m1, m2) at which `overlap_loss` is least, to 1e-6; None where it is unbounded below, or so flat that they are beyond FAR.

    The least of a grid, whose box grows until it holds the least inside and then closes in on it: nothing is differentiated, and a local
    minimum is no trap as long as the first grid sees both.
    """
    centre, side = torch.tensor(MEANS, dtype=torch.float64), 4.0
    offsets = torch.cartesian_prod(*[torch.linspace(-1, 1, points, dtype=torch.float64)] * 2)
    while side > 1e-7:
        at = centre + side * offsets
        best = int(overlap_loss(*at.T, form, tau, margin).argmin())
        inside = bool((offsets[best].abs() < 1).all())
        centre, side = at[best], side / 2 if inside else 2 * side
        if centre.abs().max() > FAR:
            return None
    return tuple(round(mean, 7) + 0.0 for mean in centre.tolist())  # and no -0
