"""p_sel, score_select and posterior_mean beside what one would otherwise write, and the matrix product as a floor.

    pytest benchmarks --benchmark-only -k select             # all groups
    pytest benchmarks --benchmark-only -k "batch and ddpm"   # one group
    pytest benchmarks --benchmark-only -k select -m gpu      # cuda and triton beside plain torch on the card

Every implementation answers the same question on the same data, and its error against float64 is asserted before it is timed. Groups
compare inside one run: quote ratios of medians. `peak_mb` is the memory one call needs beyond its inputs.

Predicted by counting instructions, for two cores of an EPYC with AVX-512:
  batch, B = K = 128, D = 3072, float32. A direct difference is two multiply-adds where the product has one: the kernel at 2.1 of torch.mm.
  With a scale of 1 the first is a subtraction, which has pipes of its own: near 1. Checks in Python 0.2 ms: within the bound of 2.5.
  set, B = 256, K = 50000, D = 3072. psel_mix, a packed matrix product, below 2 of torch.mm. Memory of posterior_mean: 16 MB of p, 1 MB a
  thread, 3 MB of answers: 25 MB against the bound of 100 MB.
Measured, two idle cores (AVX-512), one run, medians:
  batch. torch.mm 0.57 ms; score_select 1.91 of it (ddpm), 1.67 (edm, std .01), 1.33 (edm, std 80). The broadcast form 118, 130, 169 times
  score_select. Less than predicted: the product does not reach the peak either.
  set. score_select 1.11 and p_sel .98 of torch.mm, posterior_mean 1.41 of the two products, for it reads the set four times.
  Memory beyond the inputs: posterior_mean 36 MB, score_select 4 MB.
"""

import contextlib
import functools

import pytest
import torch
from bench_knn_kde import a_card, peak_mb, time_on_the_card

import ltkernels

LEVELS = {"ddpm": (0.8, 0.6), "edm": (1.0, 0.01), "edm sigma=80": (1.0, 80.0)}
ROWS = 64  # whose error is judged


class Problem:
    def __init__(self, b, k, d, scale, std, device="cpu"):
        g = torch.Generator().manual_seed(0)
        self.clean, self.scale, self.std = (torch.rand(k, d, generator=g) * 2 - 1).to(device), scale, std
        self.x = scale * self.clean[:b] + std * torch.randn(b, d, generator=g).to(device)
        self.product, self.mixed = torch.ones(b, k, device=device), torch.ones(b, d, device=device)  # touched: no page faults when timed
        distance = torch.cdist(self.x[:ROWS].double(), (scale * self.clean).double(), compute_mode="donot_use_mm_for_euclid_dist")
        self.logits = -distance.square() / (2 * std**2)


def ours(p: Problem):
    return ltkernels.score_select(p.x, p.clean, p.scale, p.std, seed=0).log_normalizer


def probabilities(p: Problem):
    return ltkernels.p_sel(p.x, p.clean, p.scale, p.std)


def denoised(p: Problem):
    return ltkernels.posterior_mean(p.x, p.clean, p.scale, p.std)


def softmax(x, clean, scale: float, std: float):
    logits = -((x[:, None] - scale * clean) ** 2).sum(-1) / (2 * std**2)
    return torch.softmax(logits, 1), torch.logsumexp(logits, 1)


def broadcast(p: Problem, form=softmax):
    weight, log_normalizer = form(p.x, p.clean, p.scale, p.std)
    torch.multinomial(weight, 1)
    return log_normalizer


compiled = functools.cache(functools.partial(torch.compile, dynamic=False))


def broadcast_compiled(p: Problem):
    """Without B x K x D in memory."""
    return broadcast(p, compiled(softmax))


def product(p: Problem):
    """No probabilities at all: what the expanded square starts from."""
    return torch.mm(p.x, p.clean.T, out=p.product)


def two_products(p: Problem):
    """The floor of the posterior mean."""
    torch.mm(p.x, p.clean.T, out=p.product)
    return torch.mm(p.product, p.clean, out=p.mixed)


def error(name, p: Problem, answer) -> float:
    if name == "score_select" or "broadcast" in name:
        return (answer[:ROWS].double() - p.logits.logsumexp(1)).abs().max().item()
    weight = torch.softmax(p.logits, 1)
    expected = weight if name == "p_sel" else weight.float() @ p.clean
    return (answer[:ROWS] - expected).abs().max().item()


def run(name, call, p, benchmark, rounds):
    if "product" not in name:
        benchmark.extra_info["max_error"] = worst = error(name, p, call(p))
        assert worst < 1e-3, f"{name} is off by {worst}"
        benchmark.extra_info["peak_mb"] = peak_mb(lambda: call(p))
    benchmark.pedantic(call, (p,), rounds=rounds, warmup_rounds=1)


BATCH = {"score_select": ours, "p_sel": probabilities, "broadcast": broadcast, "broadcast, compiled": broadcast_compiled}
BATCH |= {"product only": product}
SET = {"posterior_mean": denoised, "p_sel": probabilities, "score_select": ours, "two products": two_products, "product only": product}

CALLS = BATCH | SET
ON_THE_CARD = [(op, name) for op in ("score_select", "p_sel", "posterior_mean") for name in ("cuda", "triton")]
ON_THE_CARD += [("broadcast",), ("two products",), ("product only",)]


@pytest.fixture(scope="module", params=LEVELS)
def batch(request):
    p = Problem(128, 128, 3072, *LEVELS[request.param])
    p.name = request.param
    return p


@pytest.mark.parametrize("name", BATCH)
def test_select_in_a_batch(name, batch, benchmark):
    benchmark.group = f"batch B=K=128 D=3072 float32 {batch.name} cpu, {torch.get_num_threads()} threads"
    run(name, BATCH[name], batch, benchmark, rounds=3 if name == "broadcast" else 50)


@pytest.fixture(scope="module")
def whole_set():
    return Problem(256, 50_000, 3072, 1.0, 5.0)


@pytest.mark.parametrize("name", SET)
def test_select_in_a_set(name, whole_set, benchmark):
    benchmark.group = f"set B=256 K=50000 D=3072 float32 edm sigma=5 cpu, {torch.get_num_threads()} threads"
    run(name, SET[name], whole_set, benchmark, rounds=3)


@pytest.fixture(scope="module", params=["batch", "set"])
def on_the_card(request):
    p = Problem(*(128, 128, 3072, *LEVELS["ddpm"]) if request.param == "batch" else (256, 50_000, 3072, 1.0, 5.0), device="cuda")
    p.name = f"{request.param} B={len(p.x)} K={len(p.clean)} D=3072 float32"
    return p


@pytest.mark.gpu
@a_card
@pytest.mark.parametrize("name", ON_THE_CARD, ids=" ".join)
def test_select_on_the_card(name, on_the_card, benchmark):
    p, (op, *backend) = on_the_card, name
    if op == "broadcast" and len(p.clean) > 128:
        pytest.skip("B x K x D: 157 GB")
    benchmark.group = f"{p.name} {torch.cuda.get_device_name()}"
    with ltkernels.backend(*backend) if backend else contextlib.nullcontext():
        if "product" not in op:
            benchmark.extra_info["max_error"] = worst = error(op, p, CALLS[op](p))
            assert worst < 1e-3, f"{name} is off by {worst}"
        time_on_the_card(benchmark, lambda: CALLS[op](p), calls=20 if len(p.clean) == 128 else 1)
