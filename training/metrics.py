"""Figures of a clustering, of generated latents beside real ones, and of generated images."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ltkernels

from .data import class_counts, split_groups

# ---- clusterings -----------------------------------------------------------------------------------------------------


def match_clusters(pred: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> np.ndarray:
    """(D,) label of every cluster under the one-to-one matching that agrees with `labels` most often (Hungarian).

    D = 1 + the largest label or cluster, so the numbers of clusters and classes may differ; surplus clusters are
    matched to labels nobody has.
    """
    from scipy.optimize import linear_sum_assignment

    pred, labels = _checked("match_clusters", pred, labels)
    size = int(max(pred.max(), labels.max())) + 1
    together = np.zeros((size, size), dtype=np.int64)  # [cluster, label]
    np.add.at(together, (pred, labels), 1)
    return linear_sum_assignment(together, maximize=True)[1]


def clustering_accuracy(pred: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Share of rows whose matched cluster is their class (ACC). [1,1,0,0] against [0,0,1,1] is 1."""
    matched = match_clusters(pred, labels)
    pred, labels = _checked("clustering_accuracy", pred, labels)
    return float((matched[pred] == labels).mean())


def nmi(pred: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Mutual information over the arithmetic mean of both entropies."""
    from sklearn.metrics import normalized_mutual_info_score

    pred, labels = _checked("nmi", pred, labels)
    return float(normalized_mutual_info_score(labels, pred, average_method="arithmetic"))


def ari(pred: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Rand index adjusted for chance: 0 for independent partitions, 1 for equal ones, negative below chance."""
    from sklearn.metrics import adjusted_rand_score

    pred, labels = _checked("ari", pred, labels)
    return float(adjusted_rand_score(labels, pred))


def cluster_scores(
    pred: Tensor | np.ndarray, labels: Tensor | np.ndarray, counts: Sequence[int]
) -> dict[str, float | None]:
    """acc, nmi, ari, and acc_head, acc_med, acc_tail after the one global matching.

    A matching per group would reward a clustering that splits the head and never finds the tail. `counts` are the
    training counts that define the groups (terciles); a group without a row answers None, which JSON can hold.
    """
    matched = match_clusters(pred, labels)
    pred, labels = _checked("cluster_scores", pred, labels)
    class_counts(labels, len(counts))  # refuses labels beyond counts
    right = matched[pred] == labels
    scores = {"acc": float(right.mean()), "nmi": nmi(pred, labels), "ari": ari(pred, labels)}
    for group, classes in zip(("head", "med", "tail"), split_groups(counts), strict=True):
        rows = np.isin(labels, classes)
        scores[f"acc_{group}"] = float(right[rows].mean()) if rows.any() else None
    return scores


def _checked(op: str, pred: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    arrays = [x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (pred, labels)]
    for what, x in zip(("pred", "labels"), arrays, strict=True):
        if x.ndim != 1 or x.size == 0 or x.dtype.kind not in "iu":
            raise ValueError(f"{op}: {what} must be integers of shape (N,), N >= 1; got {x.dtype} of shape {x.shape}")
        if x.min() < 0:
            raise ValueError(f"{op}: {what} must be >= 0; got {x.min()}")
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"{op}: pred and labels must be equally long; got {arrays[0].size} and {arrays[1].size}")
    return arrays[0], arrays[1]


# ---- generated latents -----------------------------------------------------------------------------------------------


def leave_one_out_log_density(points: Tensor, k: int = 64, *, bandwidth: float | Tensor) -> Tensor:
    """(N,) log-density of every row under the others.

    A row that counted itself would never be below log 1/k, which hides outliers.
    """
    return ltkernels.knn_kde_grad(points, points, k, bandwidth=bandwidth, self_index=True).log_density


def nearest_distance(queries: Tensor, bank: Tensor, *, self_index: Tensor | bool | None = None) -> Tensor:
    """(Q,) distance to the nearest row of the bank; self_index=True skips row i for query i."""
    return ltkernels.knn(queries, bank, 1, self_index=self_index).sqdist[:, 0].sqrt()


def nearest_statistics(generated: Tensor, real: Tensor) -> dict[str, float]:
    """How near generated latents stay to real ones, beside the real set's own spacing.

    nearest_median and nearest_p95: distance of generated rows to the nearest real one. real_median and real_p95: the
    same for real rows and the other real rows. beyond_real_p95: share of generated rows not within real_p95; .05 for
    samples that are spaced like the data.
    """
    distance = nearest_distance(generated, real).double()
    own = nearest_distance(real, real, self_index=True).double()
    limit = own.quantile(0.95)
    return {
        "nearest_median": distance.median().item(),
        "nearest_p95": distance.quantile(0.95).item(),
        "real_median": own.median().item(),
        "real_p95": limit.item(),
        "beyond_real_p95": (~(distance <= limit)).double().mean().item(),  # a NaN row is not within anything
    }


def nearest_class_shares(generated: Tensor, real: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C,) float64 share of generated rows whose nearest real row belongs to each class; sums to 1."""
    nearest = ltkernels.knn(generated, real, 1).index[:, 0].cpu()
    counts = class_counts(labels.cpu()[nearest], num_classes)
    return torch.tensor(counts, dtype=torch.float64) / len(nearest)


def total_variation(shares: Tensor, truth: Tensor) -> float:
    """Half the L1 distance of two share vectors: the mass that would have to move to make them equal."""
    return 0.5 * (torch.as_tensor(shares).double() - torch.as_tensor(truth).double()).abs().sum().item()


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over seeds; 0 for a single value."""
    values = [float(v) for v in values]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def population_sd(values: Sequence[float]) -> float:
    """Standard deviation over all there is (n, not n - 1), as inception scores are given and DiffRC's Std over groups."""
    return statistics.pstdev(float(v) for v in values)


# ---- generated images ------------------------------------------------------------------------------------------------
# Rows are features (N, F) of images, or class probabilities; which network they are from is for the caller to say.


class Moments(NamedTuple):
    mean: Tensor  # (F,) float64
    cov: Tensor  # (F, F) float64, unbiased
    n: int | None  # None: not known

    @property
    def full_rank(self) -> bool:
        """Whether n rows can fill F dimensions at all."""
        return self.n is None or self.n > len(self.mean)


def moments(features: Tensor) -> Moments:
    x = _finite("moments", features, 2).double()
    return Moments(x.mean(0), x.T.cov().reshape(x.shape[1], x.shape[1]), len(x))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): FID, where the rows are Inception's pool3 features.

    The root has the trace of (S_a^(1/2) S_b S_a^(1/2))^(1/2), whose eigenvalues are real. Sets of at most F rows have singular
    covariances: a distance all the same, but one that depends on n more than on the images, hence a warning.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"frechet_distance: expected features of one width; got {len(a.mean)} and {len(b.mean)}")
    if not (a.full_rank and b.full_rank):
        fact = f"got {a.n} and {b.n} rows of {len(a.mean)}"
        warnings.warn(f"frechet_distance: expected more rows than features, or the covariance is singular; {fact}", stacklevel=2)
    values, vectors = torch.linalg.eigh(a.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.cov @ root
    mixed = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * mixed
    return max(distance.item(), 0.0)  # rounding: equal sets may come out below


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and population sd, over `splits` consecutive parts of the rows (N, C), of exp(mean KL(p(y|x) | p(y))).

    Rows that are sorted by class have to be shuffled first: a part with one class scores 1, whatever the images are.
    """
    p = _finite("inception_score", probabilities, splits).double()
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("inception_score: rows must be probabilities that sum to 1; got others")
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        kl = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))  # 0 log 0 = 0; a mean of 0 is one of zeros
        scores.append(kl.sum(1).mean().exp().item())
    return statistics.fmean(scores), population_sd(scores)


def prd_curve(generated: np.ndarray, reference: np.ndarray, angles: int = 1001) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall), each (angles,), of two histograms over the same bins (Sajjadi et al., 2018)."""
    slope = np.tan(np.linspace(1e-10, np.pi / 2 - 1e-10, angles))
    precision = np.minimum(slope[:, None] * reference, generated).sum(1)
    return precision.clip(0, 1), (precision / slope).clip(0, 1)


def max_f(precision: np.ndarray, recall: np.ndarray, beta: float) -> float:
    """The largest F_beta on the curve: beta = 8 rewards recall, 1/8 precision."""
    below = beta**2 * precision + recall
    return float(np.divide((1 + beta**2) * precision * recall, below, out=np.zeros_like(below), where=below > 0).max())


def prd(
    generated: Tensor, reference: Tensor, *, num_clusters: int, angles: int = 1001, runs: int = 10, seed: int = 0, progress: bool = False
) -> tuple[float, float]:
    """(F_8, F_1/8) of two equally large sets: k-means clusters of their union are the bins, the curves of `runs` clusterings are averaged.

    The released code calls the pair PRECISION/RECALL, though F_8 comes first.
    """
    from sklearn.cluster import MiniBatchKMeans

    sets = [_finite("prd", x, 1).float().cpu().numpy() for x in (generated, reference)]
    if sets[0].shape != sets[1].shape:
        raise ValueError(f"prd: expected two sets of one shape, for a larger set fills more bins; got {sets[0].shape} and {sets[1].shape}")
    union, curves = np.concatenate(sets), []
    if not 1 <= num_clusters <= len(union):
        raise ValueError(f"prd: num_clusters must be in [1, {len(union)}], the rows of both sets; got {num_clusters}")
    for run in tqdm(range(runs), desc="PRD", leave=False, disable=not progress):
        bins = MiniBatchKMeans(num_clusters, n_init=10, random_state=seed + run).fit(union).labels_
        shares = [np.bincount(part, minlength=num_clusters) / len(part) for part in np.split(bins, 2)]
        curves.append(prd_curve(*shares, angles))
    precision, recall = np.mean(curves, axis=0)
    return max_f(precision, recall, 8), max_f(precision, recall, 1 / 8)


def improved_precision_recall(generated: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Share of generated rows within the ball of any reference row, and the other way round (Kynkaanniemi et al., 2019).

    A row's ball reaches to its k-th neighbour in its own set, itself left out; a row on the boundary is inside (<=). Extra memory is
    bounded: radii from ltkernels.knn, memberships in blocks.
    """
    sets = [_finite("improved_precision_recall", x, k + 1) for x in (generated, reference)]
    generated, reference = sets
    return tuple(_in_any_ball(x, y, k).double().mean().item() for x, y in ((generated, reference), (reference, generated)))


def _in_any_ball(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """(P,) bool. Expanded squares decide where their rounding cannot, direct differences, as in the radius, the rest: a row may lie on the
    very boundary, and in sets with copies or on a grid it does."""
    last = ltkernels.knn(centres, centres, k, self_index=True).index[:, -1]
    points, centres = points.double(), centres.double()
    radius = (centres - centres[last]).square().sum(1)  # (N,) squared
    middle = centres.mean(0)  # far from the origin the expansion would leave everything in doubt
    centred = centres - middle
    norm, rounding = centred.square().sum(1), (16 + centres.shape[1]) * torch.finfo(torch.float64).eps
    inside = []
    for part in points.split(max(1, 2**20 // len(centres))):  # blocks of 8 MiB
        own = (part - middle).square().sum(1, keepdim=True)
        beyond = torch.addmm(own + (norm - radius), part - middle, centred.T, alpha=-2)  # (p, N)
        doubt = rounding * (own + norm)
        certain = (beyond < -doubt).any(1)
        row, column = ((beyond.abs_() <= doubt) & ~certain[:, None]).nonzero(as_tuple=True)
        for rows, columns in zip(row.split(4096), column.split(4096), strict=True):
            within = (part[rows] - centres[columns]).square().sum(1) <= radius[columns]
            certain[rows[within]] = True
        inside.append(certain)
    return torch.cat(inside)


def memorisation(generated: Tensor, train: Tensor, rows: Tensor | None = None) -> float:
    """Median distance of generated rows to the nearest training row, over the median distance of training rows to the nearest other one.

    1: as far from the training set as its own images are from one another; towards 0: copies. rows: the training rows whose distance is
    the measure, default all; all of them may be the nearest.
    """
    generated, train = _finite("memorisation", generated, 1), _finite("memorisation", train, 2)
    rows = torch.arange(len(train), device=train.device) if rows is None else rows
    own = nearest_distance(train[rows], train, self_index=rows).median()
    if not own > 0:
        raise ValueError(f"memorisation: expected training rows that differ; the median distance of {len(rows)} to the nearest other is 0")
    return (nearest_distance(generated, train).median() / own).item()


def _finite(op: str, x: Tensor, at_least: int) -> Tensor:
    if x.dim() != 2 or len(x) < at_least or not x.is_floating_point():
        raise ValueError(f"{op}: expected floats of shape (N, F), N >= {at_least}; got {x.dtype} of shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{op}: rows must be finite; got {int((~x.isfinite().all(1)).sum())} with NaN or inf")
    return x
