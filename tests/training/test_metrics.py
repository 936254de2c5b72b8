"""Figures against hand-computed values."""

import math

import numpy as np
import pytest
import torch

from training import metrics


def test_accuracy_matches_clusters_to_classes():
    assert metrics.clustering_accuracy([1, 1, 0, 0], [0, 0, 1, 1]) == 1
    assert metrics.clustering_accuracy([0, 1, 0, 1], [0, 0, 1, 1]) == 0.5
    assert metrics.ari([0, 1, 0, 1], [0, 0, 1, 1]) == pytest.approx(-0.5)
    assert metrics.nmi([0, 1, 0, 1], [0, 0, 1, 1]) == pytest.approx(0)
    assert metrics.nmi([1, 1, 0, 0], [0, 0, 1, 1]) == metrics.ari([1, 1, 0, 0], [0, 0, 1, 1]) == pytest.approx(1)


def test_numbers_of_clusters_and_classes_may_differ():
    assert metrics.clustering_accuracy([0, 1, 2, 3], [0, 0, 1, 1]) == 0.5  # two clusters too many
    assert metrics.clustering_accuracy([0, 0, 0, 0], [0, 0, 0, 3]) == 0.75  # all in one cluster
    assert metrics.clustering_accuracy([7, 7, 2], [0, 0, 1]) == 1  # gaps in the cluster ids


def test_matching_is_the_best_of_all_permutations():
    import itertools

    rng = np.random.RandomState(0)
    pred, labels = rng.randint(0, 5, 80), rng.randint(0, 5, 80)
    best = max((np.array(p)[pred] == labels).mean() for p in itertools.permutations(range(5)))
    assert metrics.clustering_accuracy(torch.from_numpy(pred), torch.from_numpy(labels)) == best


def test_nmi_is_over_the_arithmetic_mean():
    pred, labels = [0, 0, 0, 0], [0, 0, 1, 1]
    assert metrics.nmi(pred, labels) == pytest.approx(0)
    pred, labels = [0, 1, 2, 3], [0, 0, 1, 1]  # I = ln 2, H = ln 4 and ln 2
    assert metrics.nmi(pred, labels) == pytest.approx(2 / 3)


def test_groups_use_one_global_matching():
    # 12 head, 2 med, 2 tail; the clustering splits the head and drops the tail into class 1's cluster
    labels = np.array([0] * 12 + [1] * 2 + [2] * 2)
    pred = np.array([0] * 7 + [2] * 5 + [1] * 2 + [1] * 2)
    scores = metrics.cluster_scores(pred, labels, (12, 3, 2))
    assert scores["acc"] == 9 / 16
    assert (scores["acc_head"], scores["acc_med"], scores["acc_tail"]) == (7 / 12, 1, 0)
    assert set(scores) == {"acc", "nmi", "ari", "acc_head", "acc_med", "acc_tail"}
    weights = np.array([12, 2, 2]) / 16
    assert scores["acc"] == pytest.approx(weights @ [scores["acc_head"], scores["acc_med"], scores["acc_tail"]])


def test_group_without_rows_is_none():
    assert metrics.cluster_scores([0, 1], [0, 0], (9, 3, 1))["acc_tail"] is None
    assert metrics.cluster_scores([0, 1], [0, 1], (9, 3))["acc_med"] is None


@pytest.mark.parametrize(
    ("pred", "labels", "message"),
    [
        ([0, 1], [0], "equally long; got 2 and 1"),
        ([], [], "pred must be integers of shape"),
        ([0.5], [0], "got float64"),
        ([-1, 0], [0, 0], "pred must be >= 0; got -1"),
        ([[0]], [[0]], r"of shape \(1, 1\)"),
    ],
)
def test_clusterings_refuse(pred, labels, message):
    for score in (metrics.clustering_accuracy, metrics.nmi, metrics.ari):
        with pytest.raises(ValueError, match=message):
            score(np.array(pred), np.array(labels))


def test_scores_refuse_labels_beyond_the_counts():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\); got 2"):
        metrics.cluster_scores([0, 1, 2], [0, 1, 2], (5, 3))


def test_leave_one_out_density_closed_form():
    z = torch.tensor([[0.0], [1.0], [3.0]])
    log_density = metrics.leave_one_out_log_density(z, 2, bandwidth=1.0)
    expected = [math.log((math.exp(-a * a / 2) + math.exp(-b * b / 2)) / 2) for a, b in [(1, 3), (1, 2), (3, 2)]]
    assert torch.allclose(log_density, torch.tensor(expected), atol=1e-5)
    with pytest.raises(ValueError, match="k"):
        metrics.leave_one_out_log_density(z, 3, bandwidth=1.0)


def test_leave_one_out_density_sees_outliers():
    z = torch.cat([torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), torch.full((1, 4), 20.0)])
    log_density = metrics.leave_one_out_log_density(z, 64, bandwidth=1.0)
    assert log_density.argmin() == 100 and log_density[100] < -math.log(64) - 1  # the bound of a row that counts itself


def test_nearest_statistics_closed_form():
    real = torch.arange(10.0)[:, None] * torch.tensor([[3.0, 4.0]])  # spaced by 5
    generated = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, -2.0], [-6.0, -8.0]])  # 0, 1, 2 and 10 from the nearest
    figures = metrics.nearest_statistics(generated, real)
    assert figures["real_median"] == figures["real_p95"] == 5
    assert figures["nearest_median"] == 1  # torch's median is the lower one of an even count
    assert figures["nearest_p95"] == pytest.approx(2 + 0.85 * 8)
    assert figures["beyond_real_p95"] == 0.25
    assert metrics.nearest_statistics(real, real)["nearest_p95"] == 0


def test_nearest_statistics_do_not_hide_nan():
    figures = metrics.nearest_statistics(torch.tensor([[math.nan], [0.0]]), torch.tensor([[0.0], [1.0], [2.0]]))
    assert figures["beyond_real_p95"] == 0.5 and math.isnan(figures["nearest_p95"])


def test_nearest_class_shares():
    real, labels = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 2])
    shares = metrics.nearest_class_shares(torch.tensor([[0.4], [4.0], [9.0], [6.0]]), real, labels, 3)
    assert shares.tolist() == [0.25, 0, 0.75]
    assert metrics.total_variation(shares, torch.tensor([0.5, 0.25, 0.25])) == 0.5
    assert metrics.total_variation(shares, shares) == 0


def test_mean_sd():
    assert metrics.mean_sd([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 3)))
    assert metrics.mean_sd([0.7]) == (0.7, 0)
