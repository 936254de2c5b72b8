"""Figures of a clustering, and of generated latents beside real ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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
