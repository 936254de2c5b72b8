import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import assert_density, assert_neighbours, bandwidth, clusters, gaussian, hard_cases
from sklearn.neighbors import KernelDensity

import ltkernels
from ltkernels import Bank, knn, knn_bandwidth, knn_kde_grad, reference

CASES = hard_cases(n=2000, q=83)
SMALL = hard_cases(n=600, q=19)  # the reference is not made for speed
OPS = torch.ops.ltkernels


@pytest.mark.parametrize("name", CASES)
def test_hard_case(name, backend, device):
    queries, points, k = (SMALL if backend == "reference" else CASES)[name]
    h = bandwidth(queries, points, k)
    kde = knn_kde_grad(queries.to(device), points.to(device), k, bandwidth=h)
    log_density, score, index, sqdist, _ = (x.cpu() for x in kde)
    assert_neighbours(queries, points, sqdist, index)
    assert_density(queries, points, h, (log_density, score, sqdist, index))
    alone = knn(queries.to(device), points.to(device), k)
    assert torch.equal(alone.index.cpu(), index) and torch.equal(alone.sqdist.cpu().nan_to_num(nan=-1), sqdist.nan_to_num(nan=-1))


@pytest.mark.parametrize("name", ["gaussian d=32", "50 clusters", "duplicates", "lattice", "broken rows", "offset 1e6"])
def test_leave_one_out(name, backend, device):
    _, points, k = (SMALL if backend == "reference" else CASES)[name]
    points = points[:1500]
    n = len(points)
    h = bandwidth(points, points, k)
    kde = knn_kde_grad(points.to(device), points.to(device), k, bandwidth=h, self_index=True)
    log_density, score, index, sqdist, _ = (x.cpu() for x in kde)
    assert_neighbours(points, points, sqdist, index, torch.arange(n))
    assert_density(points, points, h, (log_density, score, sqdist, index))
    rows = torch.arange(0, n, 7)
    given = knn_kde_grad(points[rows].to(device), points.to(device), k, bandwidth=h, self_index=rows.to(device))
    for whole, part in zip(kde, given, strict=True):
        assert torch.equal(whole.cpu()[rows].nan_to_num(nan=-1), part.cpu().nan_to_num(nan=-1)), "chunks of the queries change the answer"


def test_self_index_minus_one_leaves_nothing_out(backend, device):
    queries, points = (x.to(device) for x in gaussian(8, 256, 20))
    none = torch.full((20,), -1, device=device)
    assert torch.equal(knn(queries, points, 256, self_index=none).index, knn(queries, points, 256).index)


def _itself(name):
    """Banks that are large enough for the cpu backend to look for cells of near rows in them, and hard for its filters."""
    n, g = 4200, torch.Generator().manual_seed(len(name))
    if name == "near ties":  # squared distances are multiples of 4 but for 1e-3, less than the filter in integers can tell
        return torch.randint(0, 2, (n, 64), generator=g) * 2 - 1 + 1e-4 * torch.randn(n, 64, generator=g)
    if name == "clusters":
        return clusters(60, 1, 0.1, 24, n, 1)[1]
    if name == "tight clusters far away":
        return clusters(7, 1e3, 1e-2, 24, n, 1)[1]
    if name == "clusters of duplicates":  # more of each than a queue holds
        return torch.randn(12, 16, generator=g)[torch.randint(12, (n,), generator=g)]
    if name == "cells side by side":
        return torch.randn(n, 2, generator=g)
    points = torch.randn(n, 16, generator=g)
    if name == "far to near":
        return points[points.norm(dim=1).argsort(descending=True)].contiguous()
    if name == "up to overflow":
        return points * torch.logspace(15, 18, n)[:, None]
    if name == "down to denormals":
        return points * torch.logspace(-15, -40, n)[:, None]
    points[: n // 2] += 100  # broken rows among two clusters
    points[::5, 3], points[1::7] = math.nan, -math.inf
    return points


SHAPES = ["near ties", "clusters", "tight clusters far away", "clusters of duplicates", "cells side by side", "far to near"]


@pytest.mark.parametrize("name", [*SHAPES, "up to overflow", "down to denormals", "broken rows in clusters"])
def test_bank_in_itself(name):
    if not ltkernels.build_info()["cpp"]:
        pytest.skip("the cells are the cpu backend's; there is no compiled part")
    points, k, threads = _itself(name), 40, torch.get_num_threads()
    judged = torch.arange(0, len(points), 23)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sqdist, index = knn(points, points, k, self_index=True)
            assert_neighbours(points[judged], points, sqdist[judged], index[judged], judged)
            part = knn(points[judged], points, k, self_index=judged)  # not the whole bank: no cells, and no tile serves two sides
            assert torch.equal(index[judged], part.index)
            assert torch.equal(sqdist[judged].nan_to_num(nan=-1), part.sqdist.nan_to_num(nan=-1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, backend, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on cpu and reference")
    queries, points = (x.to(dtype) for x in gaussian(48, 1000, 33))
    h = bandwidth(queries, points, 20)
    kde = knn_kde_grad(queries.to(device), points.to(device), 20, bandwidth=h)
    log_density, score, index, sqdist, _ = (x.cpu() for x in kde)
    assert log_density.dtype == score.dtype == sqdist.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_neighbours(queries, points, sqdist, index)
    assert_density(queries, points, h, (log_density, score, sqdist, index))


def test_strides(backend, device):
    queries, points = (x.to(device) for x in gaussian(12, 400, 30))
    expected = knn_kde_grad(queries, points, 9, bandwidth=1.5)
    wide = torch.zeros(30, 24, device=device)
    wide[:, ::2] = queries
    for strided in (queries.t().contiguous().t(), wide[:, ::2], torch.cat([queries, queries])[:30]):
        for a, b in zip(expected, knn_kde_grad(strided, points.t().contiguous().t(), 9, bandwidth=1.5), strict=True):
            assert torch.equal(a, b)
    row = queries[:1].expand(30, 12)
    assert torch.equal(knn(row, points, 9).index, knn(queries[:1], points, 9).index.expand(30, 9))


def test_same_bits_for_any_thread_count_and_split(backend, device):
    queries, points, k = (SMALL if backend == "reference" else CASES)["gaussian d=128"]
    queries, points = queries.to(device), points.to(device)
    bank = Bank(points)
    expected = knn_kde_grad(queries, bank, k, bandwidth=9.0)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pieces = [knn_kde_grad(part, bank, k, bandwidth=9.0) for part in queries.split(30)]
            for field, whole in enumerate(expected):
                assert torch.equal(torch.cat([piece[field] for piece in pieces]), whole)
    finally:
        torch.set_num_threads(threads)


def test_per_row_bandwidth_and_weights(backend, device):
    queries, points = gaussian(10, 500, 40)
    h = torch.linspace(0.5, 4, 40)
    log_weight = torch.linspace(-3, 2, 500)
    log_weight[::9] = -math.inf
    kde = knn_kde_grad(queries.to(device), Bank(points.to(device), log_weight=log_weight.to(device)), 30, bandwidth=h.to(device))
    log_density, score, index, sqdist, _ = (x.cpu() for x in kde)
    normalised = log_weight - log_weight.logsumexp(0) + math.log(500)
    assert_density(queries, points, h, (log_density, score, sqdist, index), normalised)
    flat = knn_kde_grad(queries.to(device), Bank(points.to(device), log_weight=torch.full((500,), 7.0, device=device)), 30, bandwidth=2.0)
    plain = knn_kde_grad(queries.to(device), points.to(device), 30, bandwidth=2.0)
    torch.testing.assert_close(flat.log_density, plain.log_density, rtol=1e-5, atol=1e-5)


def test_whole_bank_is_the_ordinary_kernel_density_estimate(backend, device):
    queries, points = gaussian(6, 250, 50)  # 256 neighbours is the limit on a GPU
    for weight in (None, np.linspace(0.1, 2, 250)):
        log_weight = None if weight is None else torch.from_numpy(weight).log().float().to(device)
        bank = Bank(points.to(device), log_weight=log_weight)
        ours = knn_kde_grad(queries.to(device), bank, 250, bandwidth=0.8, kernel_norm="density")
        theirs = KernelDensity(bandwidth=0.8).fit(points.numpy(), sample_weight=weight).score_samples(queries.numpy())
        np.testing.assert_allclose(ours.log_density.cpu().numpy(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_truncation_bounds_what_was_dropped(name, backend, device, record_property):
    queries, points, k = SMALL[name]
    finite = torch.isfinite(queries).all(1)
    queries = queries[finite].to(device)
    h = bandwidth(queries.cpu(), points, k)
    kde = knn_kde_grad(queries, points.to(device), k, bandwidth=h)
    rows = torch.full((len(queries),), h, dtype=torch.float64)
    everything = reference.knn_kde(queries.cpu().double(), points.double(), len(points), rows)
    kept = kde.log_density.cpu().double() + math.log(k)
    gain = everything[0] + math.log(len(points)) - kept
    bound = torch.log1p(kde.truncation.cpu().double().exp())
    known = torch.isfinite(kept)
    # the bound itself is exact; float32 answers carry 1e-5 of log p
    slack = (bound - gain)[known]
    assert (slack >= -2e-5 * kept[known].abs().clamp(min=1)).all()
    if known.any():
        record_property("median slack", slack.median().item())


@pytest.mark.parametrize("heaviest", [0.0, 60.0])
def test_truncation_bounds_with_weights_and_without_oneself(heaviest, backend, device):
    """A weight of e^60 among ones: what is left of the sum after subtracting it would be nothing but rounding."""
    _, points = gaussian(3, 100, 1)
    log_weight = torch.linspace(-1, 1, 100)
    log_weight[0] = heaviest
    kde = knn_kde_grad(
        points.to(device), Bank(points.to(device), log_weight=log_weight.to(device)), 5, bandwidth=1.0, self_index=True
    )
    normalised = (log_weight - log_weight.logsumexp(0) + math.log(100)).double()
    args = points.double(), points.double(), 99, torch.ones(100, dtype=torch.float64), torch.arange(100), normalised
    gain = reference.knn_kde(*args)[0] + math.log(99) - (kde.log_density.cpu().double() + math.log(5))
    assert (torch.log1p(kde.truncation.cpu().double().exp()) - gain >= -1e-5 * gain.abs().clamp(min=1)).all()


def test_truncation_where_neighbours_are_at_infinity(backend, device):
    points = torch.randn(10, 3)
    points[5:] = math.nan
    kde = knn_kde_grad(torch.zeros(2, 3, device=device), points.to(device), 7, bandwidth=1.0)
    assert kde.log_density.isfinite().all() and (kde.truncation == -math.inf).all()


def test_truncation_is_minus_infinity_when_nothing_is_dropped(backend, device):
    queries, points = (x.to(device) for x in gaussian(3, 20, 5))
    assert (knn_kde_grad(queries, points, 20, bandwidth=1.0).truncation == -math.inf).all()
    assert (knn_kde_grad(points, points, 19, bandwidth=1.0, self_index=True).truncation == -math.inf).all()


def test_derived_fields(backend, device):
    queries, points = (x.to(device) for x in gaussian(4, 200, 10))
    kde = knn_kde_grad(queries, points, 20, bandwidth=0.7)
    torch.testing.assert_close(kde.density, kde.log_density.exp())
    torch.testing.assert_close(kde.density_grad, kde.log_density.exp()[:, None] * kde.score)
    for rho in (0, 0.1, 3.0):
        potential, gradient = kde.potential(rho)
        torch.testing.assert_close(potential, -(kde.density + rho).log(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, -kde.density_grad / (kde.density + rho)[:, None], rtol=1e-4, atol=1e-5)


def test_one_centre_has_the_closed_form(backend, device):
    """Distance 1 from a lone centre with h = 1: the potential falls back to it with slope 1, damped by rho = .1 to .858463."""
    kde = knn_kde_grad(torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device), 1, bandwidth=1.0)
    assert kde.potential(0)[1].item() == pytest.approx(1, abs=1e-6)
    assert kde.potential(0.1)[1].item() == pytest.approx(0.858463, abs=1e-6)
    z = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(-torch.log((-z.square() / 2).exp() + 0.1).sum(), z)
    assert kde.potential(0.1)[1].item() == pytest.approx(slope.item(), abs=1e-6)


def test_far_away_the_potential_is_flat_unless_rho_is_zero(backend, device):
    points = gaussian(3, 50, 1)[1].to(device)
    far = torch.full((1, 3), 40.0, device=device)
    kde = knn_kde_grad(far, points, 10, bandwidth=1.0)
    assert kde.potential(0.01)[1].abs().max() < 1e-20
    weight = torch.softmax(-kde.sqdist / 2, 1)
    mean = (weight[..., None] * points[kde.index]).sum(1)
    torch.testing.assert_close(kde.potential(0)[1], far - mean, rtol=1e-5, atol=1e-4)


def test_at_the_weighted_mean_the_score_vanishes(backend, device):
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], device=device)
    assert knn_kde_grad(torch.zeros(1, 2, device=device), points, 2, bandwidth=0.5).score.abs().max() == 0


def _double_inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=g).double().requires_grad_(), torch.randn(40, 5, generator=g).double().requires_grad_()


def test_gradcheck():
    queries, points = _double_inputs()
    log_weight = torch.linspace(-1, 1, 40, dtype=torch.float64, requires_grad=True)

    def density(queries, points, log_weight):
        kde = knn_kde_grad(queries, Bank(points, log_weight=log_weight), 7, bandwidth=0.9, kernel_norm="density")
        return kde.log_density, kde.sqdist

    assert torch.autograd.gradcheck(density, (queries, points, log_weight))
    assert torch.autograd.gradcheck(lambda q, x: knn(q, x, 7).sqdist, (queries, points))

    def score(queries, points, log_weight):
        return knn_kde_grad(queries, Bank(points, log_weight=log_weight), 7, bandwidth=0.9).score

    assert torch.autograd.gradcheck(score, (queries, points, log_weight))


def test_gradcheck_of_points_that_are_queries_too():
    _, points = _double_inputs()
    assert torch.autograd.gradcheck(lambda x: knn_kde_grad(x, x, 7, bandwidth=0.9, self_index=True).log_density, (points,))
    assert torch.autograd.gradcheck(lambda x: knn_kde_grad(x, x, 7, bandwidth=0.9, self_index=True).score, (points,))


def test_gradgradcheck_in_the_queries():
    queries, points = _double_inputs()
    for field in ("log_density", "score", "sqdist"):
        assert torch.autograd.gradgradcheck(
            lambda q, field=field: getattr(knn_kde_grad(q, points.detach(), 7, bandwidth=0.9), field), (queries,)
        )


def test_score_is_the_gradient_of_log_density(backend, device):
    queries, points = (x.to(device) for x in gaussian(6, 300, 20))
    queries.requires_grad_()
    kde = knn_kde_grad(queries, points, 30, bandwidth=1.3)
    (gradient,) = torch.autograd.grad(kde.log_density.sum(), queries)
    assert torch.equal(gradient, kde.score)


def test_gradients_come_in_the_dtype_of_the_input(backend, device):
    queries, points = (x.to(device, torch.float16).requires_grad_() for x in gaussian(6, 300, 20))
    knn_kde_grad(queries, points, 30, bandwidth=1.3).log_density.sum().backward()
    assert queries.grad.dtype == points.grad.dtype == torch.float16 and queries.grad.isfinite().all()


def test_what_is_not_differentiable_raises():
    queries, points = _double_inputs()
    with pytest.raises(NotImplementedError, match="no derivative in bandwidth"):
        knn_kde_grad(queries, points, 7, bandwidth=torch.tensor(0.9, requires_grad=True))
    log_density = knn_kde_grad(queries, points, 7, bandwidth=0.9).log_density.sum()
    (gradient,) = torch.autograd.grad(log_density, points, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable no further"):
        gradient.sum().backward()


def test_forward_mode_raises_instead_of_answering_zeros():
    queries, points = (x.detach() for x in _double_inputs())
    for call in (lambda q: knn_kde_grad(q, points, 7, bandwidth=0.9).log_density, lambda q: knn(q, points, 7).sqdist):
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.jvp(call, (queries,), (queries,))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.jacfwd(call)(queries)
        with torch.autograd.forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
                call(torch.autograd.forward_ad.make_dual(queries, queries))
            assert torch.isfinite(call(queries)).all()


def test_torch_func_is_refused_by_torch_itself():
    queries, points = _double_inputs()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: knn_kde_grad(q, points.detach(), 7, bandwidth=0.9).log_density.sum())(queries.detach())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["gaussian d=32", "k = N", "no query", "one point"])
def test_opcheck(name, requires_grad, backend, device):
    queries, points, k = CASES[name]
    bank = Bank(points[:200].to(device))
    queries, k = queries[:9].to(device).requires_grad_(requires_grad), min(k, 20)
    prepared = (queries, bank.points, bank.centre, bank.centred, bank.sqnorm, None, None, k)
    torch.library.opcheck(OPS.bank_prepare.default, (bank.points,))
    torch.library.opcheck(OPS.knn.default, prepared)
    torch.library.opcheck(OPS.knn_kde_bounded.default, (*prepared, torch.ones(len(queries), device=device), None))
    index = knn(queries.detach(), bank, k).index
    torch.library.opcheck(OPS.diff_sum.default, (queries, bank.points, index, torch.ones(index.shape, device=device)))
    torch.library.opcheck(OPS.diff_dot.default, (queries, bank.points, index, torch.ones_like(queries).detach()))
    torch.library.opcheck(OPS.diff_scatter.default, (queries.detach(), bank.points, index, torch.ones(index.shape, device=device)))


def test_compiles_into_one_graph(backend, device):
    queries, points = (x.to(device) for x in gaussian(6, 300, 20))
    bank = Bank(points)

    def loss(queries, points):
        kde = knn_kde_grad(queries, points, 30, bandwidth=1.3)
        return kde.log_density.sum() + kde.potential(0.1)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    knn(bank.points, bank, 40, self_index=True)  # a bank that holds warm bounds
    for target in (points, bank):
        q = queries.clone().requires_grad_()
        (eager,) = torch.autograd.grad(loss(q, target), q)
        (graph,) = torch.autograd.grad(compiled(q, target), q)
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)
    warm = torch.compile(lambda q, b: knn(q, b, 9, self_index=True).sqdist, fullgraph=True, backend="aot_eager")
    assert torch.equal(warm(points.clone(), bank), knn(points, points, 9, self_index=True).sqdist)
    leave_one_out = torch.compile(
        lambda x: knn_kde_grad(x, x, 30, bandwidth=1.3, self_index=True).score, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(leave_one_out(points), knn_kde_grad(points, points, 30, bandwidth=1.3, self_index=True).score)


def test_autocast_does_not_copy_the_bank(backend, device):
    queries, points = (x.to(device) for x in gaussian(6, 300, 20))
    expected = knn_kde_grad(queries.bfloat16().float(), points, 30, bandwidth=1.3)
    bank = Bank(points)
    with torch.autocast(device, dtype=torch.bfloat16):
        kde = knn_kde_grad(queries.bfloat16(), bank, 30, bandwidth=1.3)
    assert bank.points.data_ptr() == points.data_ptr()
    for a, b in zip(expected, kde, strict=True):
        assert torch.equal(a, b)


def test_numpy_in_numpy_out(backend, device):
    if device != "cpu":
        pytest.skip("NumPy arrays live in host memory")
    queries, points = gaussian(6, 300, 20)
    expected = knn_kde_grad(queries, points, 30, bandwidth=1.3)
    kde = knn_kde_grad(queries.numpy(), points.numpy(), 30, bandwidth=np.float32(1.3))
    for a, b in zip(expected, kde, strict=True):
        assert isinstance(b, np.ndarray) and np.array_equal(a.numpy(), b)
    assert isinstance(kde.potential(0.1)[0], np.ndarray) and isinstance(kde.density, np.ndarray)
    assert isinstance(knn_bandwidth(points.numpy(), 5), np.ndarray)
    frozen = points.numpy().copy()
    frozen.flags.writeable = False
    assert np.array_equal(knn(queries.numpy(), frozen, 30).index, expected.index.numpy())
    assert np.array_equal(knn(queries.numpy()[::-1], points.numpy(), 30).index, expected.index.numpy()[::-1])


def test_dlpack_in():
    class Foreign:
        """What another library's array shows of itself."""

        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__()

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    queries, points = gaussian(6, 300, 20)
    assert torch.equal(knn(queries, Foreign(points), 30).index, knn(queries, points, 30).index)


def test_bandwidth_rules(backend, device):
    _, points = gaussian(5, 401, 1)
    points = points * torch.tensor([1.0, 2, 3, 4, 5])
    distance = torch.cdist(points.double(), points.double()).sort(1).values[:, 10]  # column 0 is the point itself
    assert knn_bandwidth(points.to(device), 10).item() == pytest.approx(distance.median().item(), rel=1e-5)
    scott = points.double().var(0).mean().sqrt() * 401 ** (-1 / 9)
    assert knn_bandwidth(points.to(device), rule="scott").item() == pytest.approx(scott.item(), rel=1e-5)
    points[3] = math.nan
    assert torch.isfinite(knn_bandwidth(points.to(device), 10))
    assert torch.isfinite(knn_bandwidth(points.to(device), rule="scott"))


def test_backend_proves_itself(monkeypatch):
    """The context manager changes what runs, LTKERNELS_BACKEND does too, and a backend that is not there is refused."""
    queries, points = gaussian(4, 50, 5)
    ran = []
    original = reference.knn
    monkeypatch.setattr(reference, "knn", lambda *a: ran.append(1) or original(*a))
    with ltkernels.backend("reference"):
        knn(queries, points, 3)
    assert ran == [1]
    monkeypatch.setenv("LTKERNELS_BACKEND", "reference")
    knn(queries, points, 3)
    assert ran == [1, 1]
    monkeypatch.delenv("LTKERNELS_BACKEND")
    if ltkernels.build_info()["cpp"]:
        knn(queries, points, 3)
        assert ran == [1, 1]
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available here: it runs on CUDA tensors; got cpu"):
        with ltkernels.backend("cuda"):
            knn(queries, points, 3)


MEMORY = """
import torch, ltkernels
from pathlib import Path

def mb(field):
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

points = torch.randn(16384, 16)
ltkernels.knn_kde_grad(points[:500], points[:500], 8, bandwidth=1.0, self_index=True)
for queries, self_index in ((points, True), (torch.randn(16384, 16), None)):
    Path("/proc/self/clear_refs").write_text("5")
    before = mb("VmRSS")
    ltkernels.knn_kde_grad(queries, points, 8, bandwidth=1.0, self_index=self_index)
    print(mb("VmHWM") - before)
"""


@pytest.mark.skipif(not ltkernels.build_info()["cpp"], reason="the promise is the cpu backend's; there is no compiled part")
def test_memory_is_never_queries_times_points():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    for peak in map(float, run.stdout.split()):
        assert peak < 128, f"{peak:.0f} MB beyond the inputs; a Q x N matrix of float32 would be 1024 MB"


AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
ISA_NEEDS = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": AVX512, "avx512vnni": {*AVX512, "avx512_vnni"}}
X86_FLAGS = set(re.search(r"^flags\s*:(.*)$|\Z", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group().split())


@pytest.mark.skipif(not ltkernels.build_info()["cpp"], reason="the instruction sets are the cpu backend's; there is no compiled part")
@pytest.mark.parametrize("isa", [isa for isa, needs in ISA_NEEDS.items() if needs <= X86_FLAGS])
def test_every_instruction_set_of_this_processor(isa):
    """The hard cases once more in a process of its own, on each path that the library can choose at run time."""
    cases = "(test_hard_case and cpu and not 512 and not 2048) or test_bank_in_itself"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", cases]
    run = subprocess.run(command, env={**os.environ, "LTKERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
