"""pcl_loss with its gradient and pairwise_sqdist beside what one would otherwise write, and the matrix product as a floor.

    pytest benchmarks --benchmark-only -k pcl                # all groups
    pytest benchmarks --benchmark-only -k "pcl and 256x3072"
    pytest benchmarks --benchmark-only -k pcl -m gpu         # cuda and triton beside plain torch on the card

Every implementation answers the same question on the same data, and its error against float64 is asserted before it is timed. Groups
compare inside one run: quote ratios of medians. `peak_mb` is the memory one call needs beyond its inputs.

Predicted by counting instructions, B = 256, D = 3072, float32, AVX-512 with pipes of its own for subtractions: half of the pairs need a
distance, .5 of torch.mm, and each pair pulls in the gradient, 1; packing, terms and Python .3: within the bound of 2.5. Where a
subtraction takes a multiply-add's place, twice .5 and twice 1. Memory: the gradient, 3 MB, and 1 MB of pulls and panels.
"""

import contextlib
import functools

import pytest
import torch
from bench_knn_kde import a_card, peak_mb, time_on_the_card

import ltkernels

SIZES = {"128x64": (128, 64), "256x3072": (256, 3072), "1024x3072": (1024, 3072)}
CLASSES = {"half the pairs": 2, "all pairs": None}


class Problem:
    def __init__(self, b, d, classes, device="cpu"):
        g = torch.Generator().manual_seed(0)
        self.mu = torch.randn(b, d, generator=g).to(device).requires_grad_()
        self.labels = (torch.arange(b) if classes is None else torch.randint(classes, (b,), generator=g)).to(device)
        self.product = torch.ones(b, b, device=device)  # touched: no page faults in the product's time

    @functools.cached_property
    def exact(self):
        """Gradient and squared distances in float64, by the expanded square: far apart as these rows are, it has the digits."""
        x = self.mu.detach().double()
        sqdist = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
        counts = self.labels[:, None] != self.labels
        pull = torch.where(counts, -4 / x.shape[1] * (-sqdist / x.shape[1]).exp(), 0) / counts.sum()
        return pull.sum(1, keepdim=True) * x - pull @ x, sqdist


def ours(p: Problem):
    p.mu.grad = None
    ltkernels.pcl_loss(p.mu, p.labels).backward()
    return p.mu.grad


def loss(mu, labels):
    d = ((mu[:, None] - mu) ** 2).mean(-1)
    counts = labels[:, None] != labels
    return torch.where(counts, (-d).exp(), 0).sum() / counts.sum()


def broadcast(p: Problem, form=loss):
    p.mu.grad = None
    form(p.mu, p.labels).backward()
    return p.mu.grad


compiled = functools.cache(functools.partial(torch.compile, dynamic=False))


def broadcast_compiled(p: Problem):
    """Forward B x B x D is never in memory; backward it is, once instead of twice."""
    return broadcast(p, compiled(loss))


def sqdist(p: Problem):
    return ltkernels.pairwise_sqdist(p.mu.detach())


def cdist(p: Problem):
    return torch.cdist(p.mu.detach(), p.mu.detach()) ** 2


def product(p: Problem):
    """No loss at all: what the expanded square starts from."""
    return torch.mm(p.mu.detach(), p.mu.detach().T, out=p.product)


GRADIENTS = {"pcl_loss": ours, "broadcast": broadcast, "broadcast, compiled": broadcast_compiled}
IMPLEMENTATIONS = GRADIENTS | {"pairwise_sqdist": sqdist, "cdist squared": cdist, "product only": product}

ON_THE_CARD = [(op, name) for op in ("pcl_loss", "pairwise_sqdist") for name in ("cuda", "triton")]
ON_THE_CARD += [("broadcast",), ("cdist squared",), ("product only",)]


@pytest.fixture(scope="module", params=[(size, classes) for size in SIZES for classes in CLASSES], ids=" ".join)
def problem(request):
    size, classes = request.param
    p = Problem(*SIZES[size], CLASSES[classes])
    p.name = f"{size} float32, {classes}"
    return p


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_pcl(name, problem, benchmark):
    call = IMPLEMENTATIONS[name]
    if "broadcast" in name and len(problem.mu) > 256:
        pytest.skip("B x B x D once or twice over: 13 or 25 GB")
    benchmark.group = f"pcl {problem.name} cpu, {torch.get_num_threads()} threads"
    if "product" not in name:
        gradient, distances = problem.exact
        exact = gradient if name in GRADIENTS else distances
        worst = ((call(problem) - exact).norm() / exact.norm()).item()
        benchmark.extra_info["error"] = worst
        assert worst < 1e-5, f"{name} is off by {worst}"
        problem.mu.grad = None
        benchmark.extra_info["peak_mb"] = peak_mb(lambda: call(problem))
    benchmark.pedantic(call, (problem,), rounds=3 if "broadcast" in name and len(problem.mu) == 256 else 50, warmup_rounds=1)


@pytest.fixture(scope="module", params=["256x3072", "1024x3072"])
def on_the_card(request):
    p = Problem(*SIZES[request.param], None, "cuda")
    p.name = f"{request.param} float32, all pairs"
    return p


@pytest.mark.gpu
@a_card
@pytest.mark.parametrize("name", ON_THE_CARD, ids=" ".join)
def test_pcl_on_the_card(name, on_the_card, benchmark):
    p, (op, *backend) = on_the_card, name
    benchmark.group = f"pcl {p.name} {torch.cuda.get_device_name()}"
    with ltkernels.backend(*backend) if backend else contextlib.nullcontext():
        if "product" not in op:
            exact = p.exact[0 if op in GRADIENTS else 1]
            benchmark.extra_info["error"] = worst = ((IMPLEMENTATIONS[op](p) - exact).norm() / exact.norm()).item()
            assert worst < 1e-5, f"{name} is off by {worst}"
        p.mu.grad = None
        time_on_the_card(benchmark, lambda: IMPLEMENTATIONS[op](p), calls=1 if op == "broadcast" else 20)
