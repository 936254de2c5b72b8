"""Metrics of generated images against closed forms, SciPy and brute force."""

import math
import warnings

import numpy as np
import pytest
import torch

from training import metrics
from training.metrics import Moments

TOL = {"rel": 1e-9, "abs": 1e-9}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a, b):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metrics.frechet_distance(a, b)


# ---- FID -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 64])
def test_frechet_distance_of_gaussians(d):
    """N(0, I) and N(0, 4I): d. A shift by mu: |mu|^2."""
    eye, zero, shift = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64), normal(d)
    a = Moments(zero, eye, 10**6)
    assert metrics.frechet_distance(a, Moments(zero, 4 * eye, 10**6)) == pytest.approx(d, **TOL)
    assert metrics.frechet_distance(a, Moments(shift, eye, 10**6)) == pytest.approx(shift.square().sum().item(), **TOL)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rows", [400, 40, 5, 2])
def test_frechet_distance_against_scipy(rows):
    """Of 24 features, with more and with fewer rows than that: then scipy's root of a singular product is only good to 1e-4 or so."""
    from scipy.linalg import sqrtm

    x, y = normal(rows, 24) @ normal(24, 24, seed=1), 1 + normal(2 * rows, 24, seed=2) @ normal(24, 24, seed=3)
    a, b = metrics.moments(x), metrics.moments(y)
    assert np.allclose(a.cov, np.cov(x.numpy(), rowvar=False)) and a.cov.dtype == torch.float64
    root = sqrtm(a.cov.numpy() @ b.cov.numpy())
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root).real
    assert distance(a, b) == pytest.approx(expected, rel=1e-9 if rows > 24 else 1e-4)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-6)
    assert distance(a, a) == pytest.approx(0, abs=1e-5 * a.cov.trace().item())


def test_singular_covariances_without_a_root():
    """Two points each, on perpendicular lines: the product of covariances is 0; on one line: a one-dimensional distance."""
    x = torch.tensor([[-1.0, 0], [1, 0]])  # variance 2, unbiased
    on = lambda y: distance(metrics.moments(x), metrics.moments(torch.tensor(y)))  # noqa: E731
    assert on([[0.0, -1], [0, 1]]) == pytest.approx(4, **TOL)
    assert on([[-3.0, 0], [3, 0]]) == pytest.approx((math.sqrt(18) - math.sqrt(2)) ** 2, **TOL)


def test_too_few_rows_are_told():
    enough, few = metrics.moments(normal(5, 4)), metrics.moments(normal(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.frechet_distance(enough, enough)
    with pytest.warns(UserWarning, match="expected more rows than features.*got 5 and 4 rows of 4"):
        metrics.frechet_distance(enough, few)


# ---- inception score -------------------------------------------------------------------------------------------------


def test_inception_score():
    assert metrics.inception_score(torch.full((50, 7), 1 / 7)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert metrics.inception_score(torch.eye(10).repeat(10, 1)) == (pytest.approx(10), pytest.approx(0, abs=1e-9))  # with p = 0
    assert metrics.inception_score(torch.eye(10).repeat_interleave(10, 0)) == (pytest.approx(1), pytest.approx(0))  # sorted: the warning
    p = normal(203, 5).softmax(1)
    parts = [p[i * 203 // 10 : (i + 1) * 203 // 10].numpy() for i in range(10)]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    assert metrics.inception_score(p) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        metrics.inception_score(normal(20, 4))
    with pytest.raises(ValueError, match=r"N >= 10; got torch.float64 of shape \(9, 4\)"):
        metrics.inception_score(torch.full((9, 4), 0.25, dtype=torch.float64))


def test_population_sd():
    assert metrics.population_sd([66.5, 39.0, 8.6]) == pytest.approx(23.6, abs=0.05)
    assert metrics.population_sd([64.3, 52.1, 32.5]) == pytest.approx(13.1, abs=0.05)


# ---- PRD -------------------------------------------------------------------------------------------------------------


def f_pair(generated, reference):
    curve = metrics.prd_curve(np.array(generated, float), np.array(reference, float), 1001)
    return metrics.max_f(*curve, 8), metrics.max_f(*curve, 1 / 8)


def test_prd_of_histograms():
    assert f_pair([0.5, 0.5], [0.5, 0.5]) == pytest.approx((1, 1))
    assert f_pair([1, 0], [0, 1]) == (0, 0)
    assert f_pair([1, 0], [0.5, 0.5]) == pytest.approx((0.503863, 0.984829), abs=5e-7)
    assert f_pair([0.5, 0.5], [1, 0]) == pytest.approx((0.984829, 0.503863), abs=5e-7)


def test_prd_of_sets():
    """Two blobs: the same sets; sets far apart; one of two modes lost, which is a matter of recall."""
    near, far = normal(60, 3).float(), 50 + normal(60, 3, seed=1).float()
    both = torch.cat([near[:30], far[:30]])
    options = {"num_clusters": 2, "runs": 2}
    assert metrics.prd(both, both, **options) == pytest.approx((1, 1))
    assert metrics.prd(near, far, **options) == (0, 0)
    assert metrics.prd(near, both, **options) == pytest.approx((0.503863, 0.984829), abs=5e-7)
    blobs = normal(90, 3, seed=2), normal(90, 3, seed=3) + 0.5
    assert metrics.prd(*blobs, num_clusters=20, runs=2, seed=5) == metrics.prd(*blobs, num_clusters=20, runs=2, seed=5)
    with pytest.raises(ValueError, match="two sets of one shape"):
        metrics.prd(near, both[:59], **options)
    with pytest.raises(ValueError, match=r"num_clusters must be in \[1, 120\].*got 121"):
        metrics.prd(near, far, num_clusters=121)


# ---- improved precision and recall -----------------------------------------------------------------------------------


def brute_force(generated, reference, k):
    """kynkaat's definition with all distances at once, in float64."""
    between = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)  # noqa: E731

    def share(points, centres):
        own = between(centres, centres)
        np.fill_diagonal(own, np.inf)
        return (between(points, centres) <= np.sort(own, 1)[:, k - 1]).any(1).mean()

    generated, reference = generated.double().numpy(), reference.double().numpy()
    return share(generated, reference), share(reference, generated)


def sets(kind):
    a, b = normal(130, 3), 0.7 * normal(170, 3, seed=1) + 0.4
    if kind == "grid":  # ties and rows on the boundary of balls are the rule
        return (2 * a).round(), (2 * b).round()
    if kind == "copies":
        return torch.cat([a[:40]] * 3), torch.cat([b[:50], a[:3], a[:3], a[:3], a[:3], a[:3], a[:3]])
    if kind == "far":  # from the origin: expanded squares alone would decide wrongly
        return a * 1e-3 + 1e4, b * 1e-3 + 1e4
    return a, b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["plain", "grid", "copies", "far"])
@pytest.mark.parametrize("k", [1, 5])
def test_precision_and_recall_are_those_of_the_definition(kind, dtype, k):
    generated, reference = (x.to(dtype) for x in sets(kind))
    expected = brute_force(generated, reference, k)
    assert metrics.improved_precision_recall(generated, reference, k) == expected
    assert 0 < expected[0] < 1


def test_precision_and_recall_in_blocks(monkeypatch):
    """Blocks of any size answer the same, and theirs has no more than 2^20 pairs, however many rows there are."""
    generated, reference = normal(300, 8), normal(300, 8, seed=1) + 0.8
    sizes = []
    split = torch.Tensor.split

    def noted(self, size):  # of rows: pairs in doubt, which are split as well, are one-dimensional
        return split(self, sizes.append(size) or 7) if self.dim() == 2 else split(self, size)

    monkeypatch.setattr(torch.Tensor, "split", noted)
    assert metrics.improved_precision_recall(generated, reference) == brute_force(generated, reference, 5)
    assert len(sizes) == 2 and max(sizes) * 300 <= 2**20


def test_precision_and_recall_of_same_and_far_sets():
    x = normal(50, 6).float()
    assert metrics.improved_precision_recall(x, x) == (1, 1)
    assert metrics.improved_precision_recall(x, x + 100) == (0, 0)
    with pytest.raises(ValueError, match=r"N >= 6; got torch.float32 of shape \(5, 6\)"):
        metrics.improved_precision_recall(x[:5], x)
    with pytest.raises(ValueError, match="rows must be finite; got 1 with NaN or inf"):
        metrics.improved_precision_recall(torch.cat([x, x[:1] / 0]), x)


# ---- memorisation ----------------------------------------------------------------------------------------------------


def test_memorisation_ratio():
    """Training rows spaced by 2; the last three, the tail, by 6."""
    train = torch.tensor([0.0, 2, 4, 6, 8, 10, 20, 26, 32])[:, None]
    tail = torch.tensor([6, 7, 8])
    assert metrics.memorisation(train[tail], train, tail) == 0  # copies
    assert metrics.memorisation(train[tail] + 3, train, tail) == pytest.approx(0.5)
    assert metrics.memorisation(train[:3], train, tail) == 0  # of other classes: copies, too
    assert metrics.memorisation(torch.tensor([[1.0], [3.0]]), train) == pytest.approx(0.5)
    x = normal(2000, 2)
    assert metrics.memorisation(x[1000:], x[:1000]) == pytest.approx(1, abs=0.1)  # as far as other real rows
    with pytest.raises(ValueError, match="expected training rows that differ; the median distance of 4 to the nearest other is 0"):
        metrics.memorisation(train, torch.ones(4, 1))
