"""Weighted soft k-means with confidences, and the clusterings a run is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SoftClusters:
    """P(c | z) = softmax_c(log_prior_c - |z - centre_c|^2 / temperature)."""

    centres: Tensor  # (K, d)
    log_prior: Tensor  # (K,), zero for k-means
    temperature: Tensor  # (), in units of squared distance

    def posterior(self, z: Tensor) -> Tensor:  # (Q, K)
        return torch.softmax(self.log_prior - _sqdist(z, self.centres) / self.temperature, 1)

    def labels(self, z: Tensor, tau: float = 0.0) -> Tensor:
        """(Q,) the most probable cluster where P_max > tau, else -1."""
        confidence, label = self.posterior(z).max(1)
        return torch.where(confidence > tau, label, -1)


def _sqdist(z: Tensor, centres: Tensor) -> Tensor:
    """(Q, K) by direct differences: K is small, and clusters far from the origin keep their digits."""
    return (z[:, None] - centres).square().sum(-1)


def soft_kmeans(
    z: Tensor,
    clusters: int,
    rng: torch.Generator,
    *,
    weight: Tensor | None = None,
    kind: str = "kmeans",
    temperature: float = 1.0,
    restarts: int = 4,
    iterations: int = 50,
) -> SoftClusters:
    """Lloyd's iterations from k-means++ seeds on points z (N, d) with weights (N,); the best of `restarts` wins.

    temperature: 1 is the posterior of a spherical Gaussian mixture, P = softmax(-|z - centre|^2 / 2 s^2) with s^2 the mean squared
    distance to the own centre per dimension; T divides the exponent by T, whatever the scale and width of the latents.
    kind: "kmeans", or "gmm" for log_prior = log of each cluster's share of the weight (a spherical mixture with one variance).
    """
    if not 1 <= clusters <= len(z):
        raise ValueError(f"clusters: must be in [1, N]; got {clusters} with N={len(z)} points")
    weight = torch.ones(len(z), device=z.device, dtype=z.dtype) if weight is None else weight
    runs = [_lloyd(z, weight, _seed_centres(z, weight, clusters, rng), iterations) for _ in range(restarts)]
    centres, label, inertia = min(runs, key=lambda run: float(run[2]))
    share = torch.zeros(clusters, device=z.device, dtype=z.dtype).index_add_(0, label, weight)
    share = share.clamp(min=1e-6 * float(weight.sum())) / weight.sum()
    log_prior = share.log() if kind == "gmm" else torch.zeros_like(share)
    scale = (2 * temperature * inertia / (weight.sum() * z.shape[1])).clamp(min=torch.finfo(z.dtype).tiny)
    return SoftClusters(centres, log_prior, scale)


def _seed_centres(z: Tensor, weight: Tensor, clusters: int, rng: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007)."""
    chosen = [int(torch.multinomial(weight, 1, generator=rng))]
    nearest = torch.full_like(weight, torch.inf)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (z - z[chosen[-1]]).square().sum(1))
        mass = weight * nearest
        mass = mass if float(mass.sum()) > 0 else weight  # fewer distinct points than clusters
        chosen.append(int(torch.multinomial(mass, 1, generator=rng)))
    return z[chosen]


def _lloyd(z: Tensor, weight: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    label = None
    for _ in range(iterations):
        previous, label = label, _sqdist(z, centres).argmin(1)
        if previous is not None and torch.equal(previous, label):
            break
        member = torch.nn.functional.one_hot(label, len(centres)).to(z) * weight[:, None]  # (N, K)
        total = member.sum(0)[:, None]
        mean = member.T @ z / total.clamp(min=1e-12)
        centres = torch.where(total > 0, mean, centres)  # an empty cluster stays where it was
    sqdist, label = _sqdist(z, centres).min(1)
    return centres, label, (weight * sqdist).sum()


def kmeans_labels(z: Tensor, clusters: int, seed: int, new: Tensor | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """scikit-learn's k-means: labels of z, and of unseen rows `new`."""
    from sklearn.cluster import KMeans

    model = KMeans(clusters, n_init=10, random_state=seed).fit(z.cpu().numpy())
    return model.labels_, None if new is None else model.predict(new.cpu().numpy())


def gmm_labels(z: Tensor, clusters: int, seed: int, new: Tensor | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """scikit-learn's Gaussian mixture, one variance a dimension in every component: the rarest classes have fewer rows than a full
    covariance has columns."""
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(clusters, covariance_type="diag", reg_covar=1e-3, n_init=3, random_state=seed)
    labels = model.fit_predict(z.cpu().numpy())
    return labels, None if new is None else model.predict(new.cpu().numpy())


def spectral_labels(z: Tensor, clusters: int, seed: int, new: Tensor | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """scikit-learn's spectral clustering on a 10-nearest-neighbour graph. It has no rule for unseen rows: they take the label of the
    nearest clustered row."""
    import warnings

    from sklearn.cluster import SpectralClustering

    from ltkernels import knn

    model = SpectralClustering(clusters, affinity="nearest_neighbors", n_neighbors=min(10, len(z)), random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        labels = model.fit_predict(z.cpu().numpy())
    return labels, None if new is None else labels[knn(new, z, 1).index[:, 0].cpu().numpy()]
