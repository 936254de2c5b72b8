"""knn and knn_kde in Triton's interpreter: numbers, hard cases, and which rung answered.

The interpreter computes `tl.dot` in float32, so the rounding of tf32 is not tested here; the bound that covers it is in force."""
import math

import numpy as np
import pytest
import torch

import ltkernels
from ltkernels.triton import knn_kde as backend
from ltkernels.triton import knn_kde_kernels as kernels

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of the inf and NaN that the hard cases are made of


def prepare(points):
    """(centre, centred, sqnorm) of a bank."""
    points = points.float()
    finite = points.isfinite().all(1)
    centre = points[finite].double().mean(0).float() if finite.any() else torch.zeros(points.shape[1])
    centred = torch.where(finite[:, None], points - centre, 0.0)
    sqnorm = centred.square().sum(1)
    return centre, centred, torch.where(finite, sqnorm, INF).nan_to_num(nan=INF, posinf=INF)


def canonical(queries, points, k, self_index=None):
    """The answer, with sqdist to the bit: partial sums and a tree in the order the kernels promise, sorted by (sqdist, index)."""
    queries, points = queries.float().numpy(), points.float().numpy()
    n_queries, d = queries.shape
    lanes = backend._problem(d, k).lanes
    with np.errstate(all="ignore"):
        diff = np.zeros((n_queries, len(points), -(-d // lanes) * lanes), np.float32)
        diff[..., :d] = points[None] - queries[:, None]
        total = np.zeros((n_queries, len(points), lanes), np.float32)
        for start in range(0, d, lanes):
            part = diff[..., start : start + lanes]
            total = part * part + total
        while total.shape[-1] > 1:
            total = total[..., 0::2] + total[..., 1::2]
    sqdist = total[..., 0]
    sqdist[np.isnan(sqdist)] = INF
    spoilt = ~np.isfinite(queries).all(1)
    sqdist[spoilt] = 0
    index = np.argsort(sqdist, axis=1, kind="stable")
    skip = [-1] * n_queries if self_index is None else self_index.tolist()
    index = np.stack([row[row != skipped][:k] for row, skipped in zip(index, skip, strict=True)])
    sqdist = np.take_along_axis(sqdist, index, 1)
    sqdist[spoilt] = NAN
    return torch.from_numpy(sqdist), torch.from_numpy(index)


@pytest.fixture
def search(monkeypatch):
    """backend.knn on a bank, checked against the canonical answer; returns (sqdist, index, number of queries of the exact rung)."""
    spaces = []
    make = backend._workspace
    monkeypatch.setattr(backend, "_workspace", lambda *args: spaces.append(make(*args)) or spaces[-1])

    def run(queries, points, k, self_index=None, bound=None):
        spaces.clear()
        sqdist, index = backend.knn(queries, points, *prepare(points), self_index, bound, k)
        expected_sqdist, expected_index = canonical(queries, points, k, self_index)
        assert torch.equal(index, expected_index)
        assert torch.equal(sqdist.nan_to_num(nan=-1.0), expected_sqdist.nan_to_num(nan=-1.0))
        return sqdist, index, sum(int(space.exact_count) for space in spaces)

    return run


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count, offset, spread, n, d):
    which = torch.arange(n) % count
    return (offset * gauss(count, d, seed=1))[which] + spread * gauss(n, d, seed=2)


def spoil(points, rows):
    points = points.clone()
    for row, value in rows.items():
        points[row, 0] = value
    return points


LATTICE = torch.randint(0, 3, (600, 3), generator=torch.Generator().manual_seed(3)).float()
# name: (queries, points, k, which rung must answer: "filter" all, "exact" all, a number of exact queries, None = either)
CASES = {
    "gauss d=1": (gauss(7, 1, seed=9), gauss(500, 1), 5, "filter"),
    "gauss d=2": (gauss(7, 2, seed=9), gauss(500, 2), 16, "filter"),
    "gauss d=32": (gauss(9, 32, seed=9), gauss(900, 32), 16, "filter"),
    "gauss d=33, not a multiple of 4": (gauss(4, 33, seed=9), gauss(700, 33), 16, "filter"),
    "gauss d=128": (gauss(4, 128, seed=9), gauss(900, 128), 32, "filter"),
    "gauss d=512": (gauss(3, 512, seed=9), gauss(600, 512), 8, "filter"),
    "gauss d=2048": (gauss(2, 2048, seed=9), gauss(300, 2048), 3, "filter"),
    "50 clusters, offset 4, spread .05": (clusters(50, 4, 0.05, 1200, 32)[:5], clusters(50, 4, 0.05, 1200, 32), 16, None),
    "5 clusters, mean 10, spread .01": (clusters(5, 10, 0.01, 1500, 32)[:3], clusters(5, 10, 0.01, 1500, 32), 16, "exact"),
    "duplicates": (gauss(3, 8), gauss(1, 8).repeat(1200, 1), 10, "exact"),
    "integer lattice": (LATTICE[:6], LATTICE, 20, None),
    "offset of 1e6": (gauss(5, 8, seed=9) + 1e6, gauss(600, 8) + 1e6, 10, None),
    "one row 1e6 away": (gauss(5, 8, seed=9), spoil(gauss(1100, 8), {77: 1e6}), 10, None),
    "k = 1": (gauss(6, 5, seed=9), gauss(300, 5), 1, "filter"),
    "k = N": (gauss(3, 5, seed=9), gauss(70, 5), 70, "filter"),
    "N = 1": (gauss(3, 5, seed=9), gauss(1, 5), 1, "filter"),
    "N < 16": (gauss(3, 5, seed=9), gauss(11, 5), 4, "filter"),
    "Q = 1": (gauss(1, 5, seed=9), gauss(300, 5), 4, "filter"),
    "more than one tile of queries": (gauss(33, 3, seed=9), gauss(60, 3), 2, "filter"),
    "k = 256": (gauss(2, 4, seed=9), gauss(900, 4), 256, None),
    "bank rows with NaN and inf": (gauss(4, 5, seed=9), spoil(gauss(300, 5), {0: NAN, 9: INF, 299: -INF}), 4, "filter"),
    "more NaN than numbers": (gauss(3, 5, seed=9), spoil(gauss(40, 5), dict.fromkeys(range(5, 40), NAN)), 9, "filter"),
    "a bank of NaN": (gauss(2, 3, seed=9), torch.full((1100, 3), NAN), 3, "exact"),
    "queries with NaN and inf": (spoil(gauss(5, 5, seed=9), {1: NAN, 3: INF}), gauss(300, 5), 4, 2),
    "values of 1e-25": (gauss(3, 5, seed=9) * 1e-25, gauss(300, 5) * 1e-25, 4, None),
    "values of 1e25": (gauss(3, 5, seed=9) * 1e25, gauss(300, 5) * 1e25, 4, "exact"),
    "rows of 1e25 in a common bank": (gauss(3, 5, seed=9), spoil(gauss(300, 5), {7: 1e25, 8: 3e38}), 4, None),
}


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize(("queries", "points", "k", "rung"), CASES.values(), ids=CASES)
def test_hard_case(search, queries, points, k, rung, marked, monkeypatch):
    monkeypatch.setattr(backend, "MARKED_SHARE", 0 if marked else INF)
    sqdist, index, exact = search(queries, points, k)
    if rung is not None:
        assert exact == {"filter": 0, "exact": len(queries)}.get(rung, rung)
    # the canonical distances themselves, against float64
    true = (queries.double()[:, None] - points.double()[index]).square().sum(2)
    common = true.isfinite() & (true > 1e-30) & (true < 1e38)
    assert ((sqdist.double() - true).abs()[common] <= 1e-6 * true[common]).all()


def test_float64_neighbours(search):
    """What the canonical answer is for: the nearest rows of float64 where no two distances are close."""
    queries, points = gauss(9, 32, seed=9), gauss(900, 32)
    sqdist, index, _ = search(queries, points, 16)
    true, order = (queries.double()[:, None] - points.double()).square().sum(2).sort(1)
    assert torch.equal(index, order[:, :16])
    torch.testing.assert_close(sqdist.double(), true[:, :16], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [7, 64])
def test_half_precision(search, dtype, d):
    search(gauss(5, d, seed=9).to(dtype), gauss(500, d).to(dtype), 16)


@pytest.mark.parametrize("points", [gauss(40, 3), LATTICE[:200], gauss(1, 3).repeat(1100, 1)], ids=["few", "lattice", "duplicates"])
def test_self_index(search, points):
    search(points[:4], points, 9, self_index=torch.arange(4))
    search(points[:4], points, 9, self_index=torch.tensor([-1, len(points) - 1, 0, 2]))


def test_self_index_leaves_k_rows(search):
    points = gauss(20, 3)
    search(points, points, 19, self_index=torch.arange(20))


def test_bound_prunes_and_changes_nothing(search):
    queries, points = gauss(4, 8, seed=9), gauss(800, 8)
    sqdist, _, _ = search(queries, points, 16)
    tight = sqdist[:, -1].clone()
    for bound in (tight, tight * 1.5, torch.where(torch.arange(4) % 2 == 0, tight, INF)):
        assert search(queries, points, 16, bound=bound)[2] == 0
    search(points[:4], points, 16, self_index=torch.arange(4), bound=search(points[:4], points, 17)[0][:, -1].clone())
    search(LATTICE[:3], LATTICE, 20, bound=search(LATTICE[:3], LATTICE, 20)[0][:, -1].clone())


def test_marks_leave_few_columns(monkeypatch):
    """Of the eight columns of a group, what has to be measured exactly is little more than what can be in the answer."""
    queries, points, k, spaces = gauss(5, 32, seed=9), gauss(4000, 32), 16, []
    make = backend._workspace
    monkeypatch.setattr(backend, "MARKED_SHARE", 0)

    def made(*args):
        spaces.append(make(*args))
        spaces[-1].columns.fill_(-1)
        return spaces[-1]

    monkeypatch.setattr(backend, "_workspace", made)
    bound = backend.knn(queries, points, *prepare(points), None, None, k)[0][:, -1] * (1 + 1e-5)
    backend.knn(queries, points, *prepare(points), None, bound, k)
    (space,) = spaces[1:]
    words = [space.queue_group[0, row, : space.listed[row]] for row in range(5)]
    marked = sum(int(((row[:, None] >> torch.arange(24, 32)) & 1).sum()) for row in words)
    assert 5 * k <= marked < 2 * 5 * k and sum(map(len, words)) > 5 * k / 2
    assert (space.columns >= 0).sum() == marked  # a program a query: what each has measured


def test_bound_reaches_the_queue(monkeypatch):
    """With the bound the queues stay short from the first tile on."""
    queries, points = gauss(8, 2, seed=9), gauss(1000, 2)
    spaces = []
    make = backend._workspace
    monkeypatch.setattr(backend, "_workspace", lambda *args: spaces.append(make(*args)) or spaces[-1])
    sqdist, _ = backend.knn(queries, points, *prepare(points), None, None, 4)
    backend.knn(queries, points, *prepare(points), None, sqdist[:, -1].clone(), 4)
    without, given = (space.queue_count[:, :8].sum() for space in spaces)
    assert given * 4 < without


@pytest.mark.parametrize("order", ["far first", "near first"])
def test_compaction(search, order, monkeypatch):
    """A bank sorted from far to near makes every tile pass and the queues compact again and again."""
    queries, points = 0.01 * gauss(3, 3, seed=9), gauss(1900, 3)
    points = points[points.square().sum(1).argsort(descending=order == "far first")]
    monkeypatch.setattr(backend, "_splits", lambda *_: 1)  # all tiles through one queue
    compacted = []
    fn = kernels._compact
    monkeypatch.setattr(kernels, "_compact", lambda *args: compacted.append(1) or fn(*args))
    _, _, exact = search(queries, points, 4)
    assert exact == 0
    assert len(compacted) >= (2 if order == "far first" else 1)


def test_every_config_gives_the_same_bits(search, monkeypatch):
    """Tiles of the real cards, TMA and pointer loads alike."""
    queries, points = gauss(3, 36, seed=9), gauss(300, 36)
    for config in {*backend._CONFIGS.values(), backend._UNALIGNED, backend._config(9, True, 1024)}:
        monkeypatch.setattr(backend, "_config", lambda *_, c=config: c)
        search(queries, points, 8)


def test_chunks_of_queries(search, monkeypatch):
    monkeypatch.setattr(backend, "_chunk", lambda d, problem: 2)
    search(gauss(5, 3, seed=9), gauss(100, 3), 3, bound=torch.full((5,), INF), self_index=torch.arange(5))


def density(queries, points, bandwidth, log_weight, sqdist, index):
    """log_density and score in float64 from the returned neighbours."""
    q, z, h = queries.double(), points.double()[index], bandwidth.double()[:, None]
    logit = -sqdist.double() / (2 * h * h) + (0 if log_weight is None else log_weight.double()[index])
    weight = logit.softmax(1)
    return logit.logsumexp(1) - math.log(index.shape[1]), (weight[:, :, None] * (z - q[:, None])).sum(1) / (h * h)


@pytest.mark.parametrize(
    ("dtype", "weighted", "d", "k"),
    [
        (torch.float32, False, 1, 1), (torch.float32, True, 70, 20), (torch.float16, True, 5, 20),
        (torch.bfloat16, False, 70, 3), (torch.bfloat16, True, 5, 1),
    ],  # fmt: skip
)
def test_density(dtype, weighted, d, k):
    queries, points = gauss(4, d, seed=9).to(dtype), gauss(150, d).to(dtype)
    bandwidth = torch.tensor([0.3, 1.0, 2.0, 50.0]) * d**0.5
    log_weight = gauss(150, seed=4).log_softmax(0) if weighted else None
    *actual, sqdist, index = backend.knn_kde(queries, points, *prepare(points), None, None, k, bandwidth, log_weight)
    assert all(a.dtype == torch.float32 for a in actual)
    for a, b in zip(actual, density(queries, points, bandwidth, log_weight, sqdist, index), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-6)


def test_density_of_lost_rows():
    """Bank rows at infinity have weight 0; a query with none but such is -inf and NaN; a query with NaN is NaN throughout."""
    queries = spoil(gauss(3, 4, seed=9), {1: NAN})
    points = spoil(gauss(6, 4), {0: NAN, 2: INF})
    h = torch.ones(3)
    log_density, score, sqdist, index = backend.knn_kde(queries, points, *prepare(points), None, None, 6, h, None)
    assert index[0, 4:].tolist() == [0, 2] and sqdist[0, 4:].tolist() == [INF, INF]
    finite = [1, 3, 4, 5]
    fewer = backend.knn_kde(queries, points[finite], *prepare(points[finite]), None, None, 4, h, None)
    keep = [0, 2]
    torch.testing.assert_close(log_density[keep] + math.log(6), fewer[0][keep] + math.log(4))
    torch.testing.assert_close(score[keep], fewer[1][keep])
    assert log_density[1].isnan() and score[1].isnan().all() and sqdist[1].isnan().all() and index[1].tolist() == list(range(6))

    lost = torch.full((3, 4), NAN)
    log_density, score, sqdist, index = backend.knn_kde(queries, lost, *prepare(lost), None, None, 2, h, None)
    assert log_density[0] == -INF and score[0].isnan().all() and (sqdist[0] == INF).all() and index[0].tolist() == [0, 1]


def test_narrow_bandwidth():
    """A bandwidth whose square underflows still finds the row that the query is."""
    points = gauss(50, 3)
    h = torch.full((4,), 1e-25)
    log_density, score, _, index = backend.knn_kde(points[:4].contiguous(), points, *prepare(points), None, None, 5, h, None)
    assert torch.equal(index[:, 0], torch.arange(4))
    torch.testing.assert_close(log_density, torch.full((4,), -math.log(5)))
    assert (score == 0).all()


def test_no_queries():
    points = gauss(10, 3)
    sqdist, index = backend.knn(points[:0], points, *prepare(points), None, None, 2)
    assert sqdist.shape == index.shape == (0, 2) and index.dtype == torch.int64
    outputs = backend.knn_kde(points[:0], points, *prepare(points), None, None, 2, torch.ones(0), None)
    assert [tuple(x.shape) for x in outputs] == [(0,), (0, 3), (0, 2), (0, 2)]


def test_a_bank_in_a_file(tmp_path):
    points = torch.randn(90, 5, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "points.npy", points.numpy())
    with ltkernels.backend("triton"):
        found = ltkernels.knn(points[:7], np.load(tmp_path / "points.npy", mmap_mode="r"), 4)
        wanted = ltkernels.knn(points[:7], points, 4)
    assert torch.equal(found.index, wanted.index) and torch.equal(found.sqdist, wanted.sqdist)


def test_limits_are_named():
    points, wide = gauss(300, 2), torch.zeros(1, 4097)
    with ltkernels.backend("triton"):
        assert torch.equal(ltkernels.knn(points[:2], points, 3).index, backend.knn(points[:2], points, *prepare(points), None, None, 3)[1])
        with pytest.raises(ValueError, match="knn: k must be at most 256 on backend 'triton'; got k=257"):
            ltkernels.knn(points, points, 257)
        with pytest.raises(ValueError, match="knn: rows may have at most 4096 columns on backend 'triton'; got d=4097"):
            ltkernels.knn(wide, wide, 1)
        with pytest.raises(TypeError, match="knn: backend 'triton' takes float16, bfloat16 and float32; got torch.float64"):
            ltkernels.knn(points.double(), points.double(), 1)



def test_error_terms_hold():
    """The bound of the filter against tiles rounded as a tf32 tensor core does: cut operands, float32 sums of exact products."""
    for d in (1, 16, 300, 4096):
        error = backend._error_terms(d, backend._problem(d, 1).lanes)
        queries, points = gauss(4, d, seed=9), torch.cat([gauss(60, d), 1e3 * gauss(4, d, seed=5)])
        centre, centred, sqnorm = prepare(points)
        centred_query = queries - centre
        cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (centred_query, centred)]
        found = sqnorm - 2 * (cut[0][:, None] * cut[1]).sum(2)
        exact_query = queries.double() - centre.double()
        true = (queries.double()[:, None] - points.double()).square().sum(2) - exact_query.square().sum(1)[:, None]
        q, c = centred_query.double().norm(dim=1)[:, None], centred.double().norm(dim=1)
        bound = error["alpha"] * q * c + error["beta"] * c * c + error["tau"]
        assert ((found.double() - true).abs() <= bound).all()
