"""What the papers' toys come to: 001's p_sel where it can be worked out (two images, white noise, the two Gaussians of appendix J), and the
losses of 002's Fig. 2.

Everything goes through the operators of `ltkernels`, in float64 where the result is exact; an expectation over one-dimensional noise is a
sum over a fine grid, not over samples.
"""

from __future__ import annotations

import math

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


# ---- Fig. 2 of 002 ---------------------------------------------------------------------------------------------------

SHARES, MEANS = (0.95, 0.05), (0.0, 2.0)  # of 5.1 in 002: head and tail


def landscape(
    form: str | None, m1: Tensor, m2: Tensor, *, tau: float = 1.0, margin: float | None = None, sigma: float = 1.0
) -> Tensor:
    """(len(m1), len(m2)) float64: the loss of estimating the means of .95 N(0, sigma^2) + .05 N(2, sigma^2) as m1 and m2, of each pair.

    [.95 m1^2 + .05 (m2 - 2)^2] / 2 sigma^2 + tau phi(D), D = (m1 - m2)^2 / 2 sigma^2 the divergence of the two estimated parts, phi one of
    the forms of `ltkernels.pcl_loss`; None: the first part alone. The form "hinge" with margin <= 2 / sigma^2, the true divergence, keeps
    the optimum (0, 2) at loss 0; "negative_l2" moves it, and away to infinity for tau >= .0475; the others move it as well.
    Example: `landscape("hinge", torch.linspace(-1, 3, 81), torch.linspace(-1, 3, 81), margin=2.0)`.
    """
    m1, m2 = m1.double(), m2.double()
    fit = (SHARES[0] * (m1[:, None] - MEANS[0]).square() + SHARES[1] * (m2 - MEANS[1]).square()) / (2 * sigma**2)
    if form is None:
        return fit
    divergence = ltkernels.pairwise_sqdist(m1[:, None], m2[:, None]) / (2 * sigma**2)
    phi = {
        "exponential": lambda d: (-d).exp(), "reciprocal": lambda d: 1 / (1 + d),
        "hinge": lambda d: (margin - d).clamp(min=0), "negative_l2": lambda d: -d,
    }  # fmt: skip
    return fit + tau * phi[form](divergence)


def optimum(form: str | None, **options) -> tuple[float, float, float]:
    """(m1, m2, loss) of the smallest value of `landscape` with these options, by grids that get finer around it, the first from -4 to 16.
    Where there is none, the answer is where these end."""
    centre, reach = (6.0, 6.0), 10.0
    for _ in range(12):
        m1, m2 = (torch.linspace(c - reach, c + reach, 201, dtype=torch.float64) for c in centre)
        loss = landscape(form, m1, m2, **options)
        row, column = divmod(int(loss.argmin()), len(m2))
        centre, reach = (float(m1[row]), float(m2[column])), reach / 4
    return *centre, float(loss[row, column])
