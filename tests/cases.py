"""The hard cases of the nearest-neighbour ops and the float64 judge of their answers, shared by the tests of every backend."""

import math

import torch
from torch import Tensor

from ltkernels import reference


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def gaussian(d: int, n: int, q: int):
    g = _generator(f"gaussian{d}")
    return torch.randn(q, d, generator=g), torch.randn(n, d, generator=g)


def clusters(count: int, offset: float, spread: float, d: int, n: int, q: int):
    """Tight clusters far from their common mean: |x|^2 + |y|^2 - 2xy loses every digit of the small distances here."""
    g = _generator(f"clusters{count}")
    centres = offset * torch.randn(count, d, generator=g)
    points = centres[torch.randint(count, (n,), generator=g)] + spread * torch.randn(n, d, generator=g)
    queries = centres[torch.randint(count, (q,), generator=g)] + spread * torch.randn(q, d, generator=g)
    return queries, points


def duplicates(n: int, q: int):
    """Ten distinct rows, each many more than k times: the k-th place is decided by the index alone."""
    g = _generator("duplicates")
    distinct = torch.randn(10, 16, generator=g)
    return distinct[torch.randint(10, (q,), generator=g)], distinct[torch.randint(10, (n,), generator=g)]


def lattice(n: int, q: int):
    """Small integers: exact distances and ties everywhere."""
    g = _generator("lattice")
    return torch.randint(-2, 3, (q, 3), generator=g).float(), torch.randint(-2, 3, (n, 3), generator=g).float()


def offset(n: int, q: int):
    queries, points = gaussian(32, n, q)
    return queries + 1e6, points + 1e6


def one_far_row(n: int, q: int):
    queries, points = gaussian(24, n, q)
    points[n // 2] = 1e6
    return queries, points


def scaled(scale: float, n: int, q: int):
    queries, points = gaussian(9, n, q)
    return queries * scale, points * scale


def broken_rows(n: int, q: int):
    queries, points = gaussian(7, n, q)
    points[::5] = math.nan
    points[1::7, 3] = math.inf
    queries[::4, 2] = math.nan
    queries[1::6] = -math.inf
    return queries, points


def hard_cases(n: int, q: int, widest: int = 2048) -> dict[str, tuple[Tensor, Tensor, int]]:
    """name -> (queries, points, k), at a size that suits the backend under test."""
    k = min(64, n // 2)
    return {
        **{f"gaussian d={d}": (*gaussian(d, n, q), k) for d in (1, 2, 32, 128, 512, 2048) if d <= widest},
        "50 clusters": (*clusters(50, 4, 0.05, 32, n, q), min(k, n // 50)),
        "5 clusters": (*clusters(5, 10, 0.01, 64, n, q), min(k, n // 10)),
        "duplicates": (*duplicates(n, q), min(k, n // 20)),
        "lattice": (*lattice(n, q), k),
        "offset 1e6": (*offset(n, q), k),
        "one far row": (*one_far_row(n, q), k),
        "tiny values": (*scaled(1e-12, n, q), k),
        "huge values": (*scaled(1e12, n, q), k),
        "k = 1": (*gaussian(5, n, q), 1),
        "k = N": (*gaussian(5, min(n, 200), q), min(n, 200)),
        "N < 16": (*gaussian(6, 11, q), 4),
        "one point": (*gaussian(6, 1, q), 1),
        "one query": (*gaussian(40, n, 1), k),
        "no query": (torch.empty(0, 4), gaussian(4, n, q)[1], 3),
        "broken rows": (*broken_rows(n, q), k),
    }


def distances(queries: Tensor, points: Tensor, self_index: Tensor | None = None) -> Tensor:
    """(Q, N) float64 squared distances by the rules of the op: inf for broken points, NaN for the row left out and broken queries."""
    queries, points = queries.double(), points.double()
    exact, difference = points.new_empty(len(queries), len(points)), torch.empty_like(points)
    for row, query in zip(exact, queries, strict=True):
        torch.sum(torch.sub(points, query, out=difference).square_(), 1, out=row)
    exact = exact.masked_fill(~torch.isfinite(points).all(1), math.inf)
    exact = exact.masked_fill(~torch.isfinite(queries).all(1, keepdim=True), math.nan)
    if self_index is not None:
        exact = exact.masked_fill(self_index[:, None] == torch.arange(len(points)), math.nan)
    return exact


def bandwidth(queries: Tensor, points: Tensor, k: int) -> float:
    """Median k-th distance, so that the kernels matter in every case."""
    radius = distances(queries, points).nan_to_num(nan=math.inf).kthvalue(k, 1).values.sqrt() if len(queries) else torch.empty(0)
    radius = radius[torch.isfinite(radius) & (radius > 0)]
    return radius.median().item() if len(radius) else 1.0


def assert_neighbours(queries, points, sqdist, index, self_index=None):
    """Every promise of the neighbours: a k-nearest set to 1e-6, exact distances, order by (sqdist, index), also at the boundary."""
    q, k = index.shape
    if q == 0:
        return
    exact = distances(queries, points, self_index)
    broken = ~torch.isfinite(queries.double()).all(1)
    assert ((index >= 0) & (index < len(points))).all()
    assert (index.sort(1).values.diff(dim=1) > 0).all(), "a neighbour appears twice"
    if self_index is not None:
        assert (index != self_index[:, None]).all(), "the row left out is among the neighbours"
    assert sqdist[broken].isnan().all()
    expected = torch.arange(len(points)).expand(q, -1)
    if self_index is not None:
        expected = torch.stack([row[row != s][:k] for row, s in zip(expected, self_index, strict=True)])
    torch.testing.assert_close(index[broken], expected[broken, :k], msg="a broken query answers the lowest rows")

    sqdist, index, exact = sqdist[~broken], index[~broken], exact[~broken]
    single = sqdist.dtype == torch.float32
    kept = exact.gather(1, index)
    rounded = kept.to(sqdist.dtype)  # float32 answers: inf where the float64 distance overflows
    tiny = 1e-36 if single else 1e-300  # where squares leave the normal range
    torch.testing.assert_close(sqdist, rounded, rtol=1e-6 if single else 1e-13, atol=tiny)
    step, tie = sqdist[:, 1:] - sqdist[:, :-1], sqdist[:, 1:] == sqdist[:, :-1]
    assert ((step > 0) | tie).all(), "not ascending"
    assert (index[:, 1:] > index[:, :-1])[tie].all(), "equal distances are not ordered by index"

    last = kept[:, -1:]
    dropped = exact.scatter(1, index, math.nan)
    nearer = dropped < last * (1 - 1e-6) - tiny
    assert not nearer.any(), f"{int(nearer.sum())} nearer points were left out"
    # a point left out at the very distance of the last one kept must have a higher index than it: judged where float64 and the answer
    # are both exact, which duplicates and lattices are
    exact_last = (sqdist[:, -1:].double() == last) & torch.isfinite(last)
    tied = (dropped == last) & exact_last
    column = torch.arange(len(points)).expand_as(dropped)
    assert (column > index[:, -1:])[tied].all(), "a tie at the boundary went to the higher index"


def assert_density(queries, points, h, answer, log_weight=None):
    """log_density against float64 from scratch, score against float64 over the same neighbours. Half inputs: pass them as given."""
    log_density, score, sqdist, index = (x.double() if x.is_floating_point() else x for x in answer)
    if len(queries) == 0:
        return
    broken = ~torch.isfinite(queries.double()).all(1)
    assert log_density[broken].isnan().all() and score[broken].isnan().all()
    queries, log_density, score, sqdist, index = (x[~broken] for x in (queries.double(), log_density, score, sqdist, index))
    points, h = points.double(), torch.as_tensor(h, dtype=torch.float64).expand(len(queries))
    weight = None if log_weight is None else log_weight.double()
    exact = distances(queries, points).gather(1, index)
    logits = reference.kernel_logits(exact, index, h, weight)
    expected = logits.logsumexp(1) - math.log(index.shape[1])
    error = (log_density - expected).abs() / expected.abs().clamp(min=1)
    finite = torch.isfinite(expected)
    assert (error[finite] <= 1e-5).all(), f"log_density is off by {error[finite].max():.2e}"
    assert (log_density[~finite] == -math.inf).all() and score[~finite].isnan().all()
    queries, index, score, h = queries[finite], index[finite], score[finite], h[finite]
    part = torch.softmax(logits[finite], 1) / h[:, None].square()
    true_score = reference.diff_sum(queries, points, index, part)
    # at a centre of symmetry the terms cancel and the norm of the score is no measure: 1e-6 of the terms is what float32 can hold
    terms = (part * exact[finite].nan_to_num(posinf=0).sqrt()).sum(1)
    allowed = 1e-4 * true_score.norm(dim=1) + 1e-6 * terms
    error = (score - true_score).norm(dim=1)
    assert (error <= allowed).all(), f"score is off by {(error / allowed).max():.2e} of what is allowed"
