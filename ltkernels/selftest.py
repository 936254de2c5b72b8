"""Every op of every backend on this machine against float64; and which of its GPU backends is the faster one.

    python -m ltkernels.selftest [--device cpu|cuda] [--backend NAME] [--json FILE] [--tune]

The table has a row per backend, device, op and dtype: the worst error of each output over all cases / the limit it is held to. What
cannot run here is listed with the reason. --tune tests cuda and triton; if both are right, it times them on a grid and writes the
winners to `backends.routes_file()`, where they replace the rows of this card and leave those of other cards.

Exit status: 0 all ok, or nothing to choose between; 1 a wrong answer, an exception (MISS), or a cell of the grid that could not be
timed; 2 bad arguments, or a routes file that cannot be read or written.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import (
    Bank,
    __version__,
    backend,
    backends,
    build_info,
    knn,
    knn_kde_grad,
    p_sel,
    pairwise_sqdist,
    pcl_loss,
    posterior_mean,
    reference,
    score_select,
)

INF, NAN = math.inf, math.nan
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # minutes instead of seconds: every case has fewer and shorter rows
THREADS = torch.get_num_threads()  # used in one run of three: on tensors this small they mostly wait for each other
Answer, Errors = dict[str, Tensor], dict[str, tuple[Tensor, float]]  # output -> tensor on the CPU; output -> errors and their limit


class Op(NamedTuple):
    cases: Callable[[torch.dtype], dict[str, Any]]
    run: Callable[[Any, str], list[Answer]]  # case, device -> answers that must agree in every bit
    judge: Callable[[Any, Answer], Errors]
    workload: Callable[[torch.dtype, int, int], Callable]  # dtype, d, k -> what --tune times
    takes_k: bool = True  # False: --tune measures once for all k


class Search:
    """One call of knn or knn_kde_grad and what float64 says about it."""

    def __init__(self, queries: Tensor, points: Tensor, k: int, self_index: bool | Tensor | None = None, log_weight: Tensor | None = None):
        self.queries, self.points, self.k, self.self_index, self.log_weight = queries, points, k, self_index, log_weight
        self.skipped = torch.arange(len(points)) if self_index is True else self_index
        self.broken = ~torch.isfinite(queries).all(1, keepdim=True)
        sqdist, self.order = reference.knn(queries.double(), points.double(), len(points), self.skipped)
        sqdist = sqdist.nan_to_num(nan=INF, posinf=INF).masked_fill(self.broken, NAN)
        self.exact = torch.empty_like(sqdist).scatter_(1, self.order, sqdist)  # (Q, N), inf for the row to skip
        near = sqdist[(sqdist[:, k - 1] > 0) & (sqdist[:, k - 1] < INF), k - 1]
        self.bandwidth = near.median().sqrt().float().item() if len(near) else 1.0  # so that the kernels matter in every case


@cache
def _searches(dtype: torch.dtype) -> dict[str, Search]:
    """Something for each rung of each kernel: queues that hold; too many near-ties for tf32, but not for 3xTF32; for both."""
    g = torch.Generator().manual_seed(0)
    q, n, crowd = (3, 100, 300) if INTERPRETED else (9, 500, 2100)

    def normal(rows, d, shift=0.0, scale=1.0):
        return (scale * torch.randn(rows, d, generator=g) + shift).to(dtype)

    def clusters(offset, spread):  # one after the other: the queues of cuda belong to parts of the bank
        centres = offset * torch.randn(3, 32, generator=g)
        return [(centres.repeat_interleave(m // 3, 0) + spread * torch.randn(m, 32, generator=g)).to(dtype) for m in (q, crowd)]

    own, copies = normal(n // 5, 8), normal(1, 16).repeat(1100, 1)
    broken, log_weight = (normal(q, 7), normal(n, 7)), torch.randn(n, generator=g)
    broken[0][::4, 2], broken[0][1::6], broken[1][::5], broken[1][1::7, 3], log_weight[::9] = NAN, -INF, NAN, INF, -INF
    shapes = ((1, 16), (2, 64), (32, 256), (33, 1), (128, 64), (512, 16))
    return {
        **{f"gaussian d={d} k={k}": Search(normal(q, d), normal(max(n, k + 50), d), k) for d, k in shapes},
        "clusters": Search(*clusters(4, 0.05), 16),
        "tight clusters": Search(*clusters(10, 0.002), 16),
        "duplicates": Search(copies[:q], torch.cat([copies, normal(n, 16)]), 16),
        "lattice": Search(*(torch.randint(-2, 3, (rows, 3), generator=g).to(dtype) for rows in (q, n)), 16),
        "far from the origin": Search(normal(q, 32, 1e3), normal(n, 32, 1e3), 16),
        "squares near overflow": Search(normal(q, 32, scale=1e18), normal(n, 32, scale=1e18), 16),
        "NaN and inf": Search(*broken, 16),
        "k = N": Search(normal(q, 5), normal(n // 4, 5), n // 4),
        "one point": Search(normal(1, 6), normal(1, 6), 1),
        "no query": Search(normal(0, 4), normal(n, 4), 3),
        "leave one out": Search(own, own, 16, True),
        "self_index, log_weight": Search(normal(q, 10), normal(n, 10), 16, torch.randint(-1, n, (q,), generator=g), log_weight),
    }


def _run_search(op: Callable, case: Search, device: str) -> list[Answer]:
    """The answer; again on one thread, and where a bank searched itself from the bounds that this left in it; and by halves."""
    points = case.points.to(device)
    queries = points if case.queries is case.points else case.queries.to(device)
    bank = Bank(points, log_weight=None if case.log_weight is None else case.log_weight.to(device))
    rows = None if case.skipped is None else case.skipped.to(device)
    call = partial(op, bank=bank, k=case.k, **({"bandwidth": case.bandwidth} if op is knn_kde_grad else {}))
    answers = []
    for threads in (THREADS, 1):
        torch.set_num_threads(threads)
        answers.append(call(queries, self_index=True if case.self_index is True else rows)._asdict())
    skipped = [None, None] if rows is None else rows.tensor_split(2)
    halves = [call(half, self_index=skip)._asdict() for half, skip in zip(queries.tensor_split(2), skipped, strict=True)]
    answers.append({name: torch.cat([half[name] for half in halves]) for name in answers[0]})
    return [{name: output.cpu() for name, output in answer.items()} for answer in answers]


def _workload(op: Callable, dtype: torch.dtype, d: int, k: int) -> Callable:
    queries, points = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (4096, 65536))
    return partial(op, queries, Bank(points), k, **({"bandwidth": math.sqrt(d)} if op is knn_kde_grad else {}))


def _deviation(actual: Tensor, expected: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """|actual - expected| / scale; 0 where both are the same infinity or both NaN, inf where only one is."""
    actual, expected = actual.double(), expected.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return ((actual - expected).abs() / scale).nan_to_num(nan=INF).masked_fill(same, 0)


def _judge_neighbours(case: Search, answer: Answer) -> Errors:
    """sqdist; how much nearer a point left out is; rows that are not k different rows by (sqdist, index), also at the boundary."""
    sqdist, index, n = answer["sqdist"].double(), answer["index"], len(case.points)
    inside = index.clamp(0, n - 1)
    kept, dropped = case.exact.gather(1, inside), case.exact.scatter(1, inside, NAN)
    last = kept[:, -1:]
    nearer = ((last - dropped) / last).nan_to_num(nan=0, neginf=0, posinf=1).clamp(min=0)
    nearer = nearer.masked_fill(last.isinf() & torch.isfinite(dropped), INF)
    ascending = (sqdist.diff(dim=1) > 0) | ((sqdist.diff(dim=1) == 0) | (sqdist[:, 1:] == INF)) & (index.diff(dim=1) > 0)
    # a tie at the boundary is judged where float64 and the answer are both exact, as they are for duplicates and lattices
    tied = (dropped == last) & (sqdist[:, -1:] == last) & torch.isfinite(last)
    wrong = [
        index != inside,
        inside.sort(1).values.diff(dim=1) == 0,
        ~(ascending | case.broken),
        case.broken & (index != case.order[:, : case.k]),  # the lowest rows
        tied & (torch.arange(n) < inside[:, -1:]),
        *([] if case.skipped is None else [index == case.skipped[:, None]]),
    ]
    return {
        "sqdist": (_deviation(sqdist, kept, kept.clamp(min=1e-30)), 1e-13 if case.points.dtype == torch.float64 else 1e-6),
        "set": (nearer, 1e-6),
        "order": (torch.cat(wrong, 1).any(1).sum(), 0),
    }


def _judge_density(case: Search, answer: Answer) -> Errors:
    """For the neighbours that were answered: log_density, score, and by how much the dropped points exceed their bound."""
    n, index = len(case.points), answer["index"].clamp(0, len(case.points) - 1)
    h = torch.full((len(index),), case.bandwidth, dtype=torch.float64)
    weight = None if case.log_weight is None else case.log_weight.double() - case.log_weight.double().logsumexp(0) + math.log(n)
    kept = case.exact.gather(1, index)
    logits = reference.kernel_logits(kept, index, h, weight)
    log_density = logits.logsumexp(1) - math.log(case.k)
    part = torch.softmax(logits, 1) / h[:, None].square()
    score = reference.diff_sum(case.queries.double(), case.points.double(), index, part)
    # at a centre of symmetry the terms cancel and the norm of the score is no measure: 1e-6 of the terms is what float32 can hold
    allowed = (score.norm(dim=1) + 1e-2 * (part * kept.nan_to_num(posinf=0).sqrt()).sum(1)).nan_to_num(nan=1).clamp(min=1e-300)
    whole = reference.kernel_logits(case.exact, torch.arange(n).expand_as(case.exact), h, weight).logsumexp(1)
    over = (whole - log_density - math.log(case.k) - torch.log1p(answer["truncation"].double().exp())).masked_fill(log_density == -INF, 0)
    over = torch.where(case.broken[:, 0], _deviation(answer["truncation"], whole), over.nan_to_num(nan=INF).clamp(min=0))
    return {
        **_judge_neighbours(case, answer),
        "log_density": (_deviation(answer["log_density"], log_density, log_density.abs().clamp(min=1)), 1e-5),
        "score": (_deviation(answer["score"], score).norm(dim=1) / allowed, 1e-4),
        "truncation": (over, 1e-12),  # float64 rounds the two sums
    }


class Selection:
    """One call of p_sel, score_select and posterior_mean, and what float64 says about them."""

    def __init__(self, x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None = None, row_offset: int = 0):
        self.x, self.clean, self.log_prior, self.row_offset = x, clean, log_prior, row_offset
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.scale, self.std = scale.to(dtype), std.to(dtype)  # not the numbers before they are rounded: at std = .002 that is seen
        wide = (value if value is None else value.double() for value in (x, clean, self.scale, self.std, log_prior))
        self.logits = reference.psel_logits(*wide)
        self.p, self.log_normalizer = torch.softmax(self.logits, 1), self.logits.logsumexp(1)
        self.noise = reference.gumbel(reference.philox(torch.tensor([SEED]), row_offset + torch.arange(len(x)), torch.arange(len(clean))))


SEED = 2**40 + 1
_LEVELS = {  # scale and std
    "ddpm t=1": (0.99995, 0.01), "ddpm t=100": (0.9469, 0.3216), "ddpm t=500": (0.2789, 0.9603), "ddpm t=1000": (0.00635, 0.99998),
    "edm sigma=.002": (1, 0.002), "edm sigma=.01": (1, 0.01), "edm sigma=1": (1, 1), "edm sigma=80": (1, 80),
    "flow t=.3": (0.7, 0.3), "flow t=1": (0, 1),
}  # fmt: skip


@cache
def _selections(dtype: torch.dtype) -> dict[str, Selection]:
    """Every noise level; rows and columns that fill no tile; priors, duplicates and what is not finite."""
    g = torch.Generator().manual_seed(0)
    b, k, d = (3, 20, 40) if INTERPRETED else (9, 70, 3072)

    def made(b, k, d, levels=((0.8, 0.6), (1, 0.5), (0.1, 0.99)), clean=None, log_prior=None, row_offset=0):
        clean = torch.rand(k, d, generator=g) * 2 - 1 if clean is None else clean
        scale, std = torch.tensor([levels[i % len(levels)] for i in range(b)], dtype=torch.float64).reshape(b, 2).T
        own = torch.randint(len(clean), (b,), generator=g)
        x = scale[:, None] * clean[own] + std[:, None] * torch.randn(b, d, generator=g)
        return Selection(x.to(dtype), clean.to(dtype), scale, std, log_prior, row_offset)

    left_out, broken = torch.randn(k, generator=g), made(b, k, 7)
    left_out[::3] = -INF
    broken.x[1], broken.x[2, 3], broken.clean[::5], broken.clean[1::7, 2] = NAN, -INF, NAN, INF
    return {
        **{name: made(b, k, d, [level]) for name, level in _LEVELS.items()},
        "ragged": made(7, 5 * k + 3, 33),
        "d=1": made(b, k, 1),
        "K=1": made(b, 1, 6),
        "no row": made(0, k, 4),
        "log_prior": made(b, k, 10, log_prior=left_out),
        "duplicates": made(b, k, 10, clean=torch.randn(1, 10, generator=g).repeat(k, 1)),
        "rows beyond 2^32": made(b, k, 5, row_offset=2**33 + 3),
        "NaN and inf": Selection(broken.x, broken.clean, broken.scale, broken.std),
    }


def _run_selection(name: str, case: Selection, device: str) -> list[Answer]:
    """The answer; again on one thread; and by halves."""
    x, clean, scale, std = (value.to(device) for value in (case.x, case.clean, case.scale, case.std))
    log_prior = None if case.log_prior is None else case.log_prior.to(device)

    def call(rows: slice) -> Answer:
        arguments = x[rows], clean, scale[rows], std[rows]
        if name != "score_select":
            return {name: (p_sel if name == "p_sel" else posterior_mean)(*arguments, log_prior=log_prior)}
        nobody = torch.full((len(arguments[0]),), -1, device=device)
        offset = case.row_offset + rows.start
        answer = score_select(*arguments, log_prior=log_prior, self_index=nobody, seed=SEED, row_offset=offset)
        return {"index": answer.index, "log_normalizer": answer.log_normalizer}

    answers, rows = [], len(x)
    for threads in (THREADS, 1):
        torch.set_num_threads(threads)
        answers.append(call(slice(0, rows)))
    halves = [call(slice(0, rows // 2)), call(slice(rows // 2, rows))]
    answers.append({output: torch.cat([half[output] for half in halves]) for output in answers[0]})
    return [{output: value.cpu() for output, value in answer.items()} for answer in answers]


def _judge_p(case: Selection, answer: Answer) -> Errors:
    limit = 1e-9 if case.x.dtype == torch.float64 else 2e-3  # a logit of 1536 rounded to float32 is off by 6e-5
    return {"p": (_deviation(answer["p_sel"], case.p, case.p + 1e-3), limit)}


def _judge_selection(case: Selection, answer: Answer) -> Errors:
    """log_normalizer, and draws that are not the largest perturbed logit where the two largest differ by more than 1e-3."""
    index, single = answer["index"], case.x.dtype != torch.float64
    perturbed = (case.logits + case.noise).nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    best = perturbed.amax(1, keepdim=True)
    drawn = perturbed.gather(1, index.clamp(0, len(case.clean) - 1)[:, None])
    none = best[:, 0] == -INF
    wrong = torch.where(none, index != -1, (index < 0) | (index >= len(case.clean)) | ~(drawn >= best - 1e-3)[:, 0])
    scale = (case.log_normalizer.abs() * 3e-4).clamp(min=1).nan_to_num(nan=1, posinf=1)
    return {
        "log_normalizer": (_deviation(answer["log_normalizer"], case.log_normalizer, scale), 1e-3 if single else 1e-9),
        "index": (wrong.sum(), 0),
    }


def _judge_mean(case: Selection, answer: Answer) -> Errors:
    clean = case.clean.double()
    clean = clean.masked_fill(~torch.isfinite(clean).all(1, keepdim=True), 0)  # their probability is 0
    mean = (case.p @ clean).masked_fill(case.p.isnan().any(1, keepdim=True), NAN)
    limit = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-9}[case.x.dtype]
    return {"mean": (_deviation(answer["posterior_mean"], mean, clean.abs().max().clamp(min=1e-3)), limit)}


def _selection_workload(name: str, dtype: torch.dtype, d: int, k: int) -> Callable:
    x, clean = (torch.randn(rows, d, device="cuda").to(dtype) for rows in (512, 16384))
    op = {"p_sel": p_sel, "score_select": partial(score_select, seed=SEED), "posterior_mean": posterior_mean}[name]
    return partial(op, x, clean, 1.0, 0.5)


def _selection(name: str, judge: Callable) -> Op:
    return Op(_selections, partial(_run_selection, name), judge, partial(_selection_workload, name), takes_k=False)


class Pairs:
    """One call of pairwise_sqdist, and one of pcl_loss in every form."""

    def __init__(self, mu: Tensor, labels: Tensor, other: Tensor | None = None, other_labels: Tensor | None = None, groups: int = 0):
        self.mu, self.labels, self.other, self.other_labels = mu, labels, other, other_labels
        self.group, self.other_group = (torch.arange(len(x)) % groups if groups and x is not None else None for x in (mu, other))
        g, dtype = torch.Generator().manual_seed(len(mu)), torch.float64 if mu.dtype == torch.float64 else torch.float32
        self.weight, self.margin = ((low + torch.rand(len(mu), generator=g)).to(dtype) for low in (0.1, 1.5))

    def exact(self) -> Tensor:
        return reference.pair_sqdist(self.mu.double(), (self.mu if self.other is None else self.other).double())

    def exact_rows(self, form: int) -> tuple[Tensor, ...]:
        """What `reference.pcl_rows` says of the float64 of everything."""
        far = None if self.other is None else self.other.double()
        margin = self.margin.double() if reference.PCL_FORMS[form] == "hinge" else None
        near = self.mu.double(), self.labels, self.group, self.weight.double(), margin
        return reference.pcl_rows(*near, far, self.other_labels, self.other_group, form, 1 / self.mu.shape[1], True, far is not None)


@cache
def _pairs(dtype: torch.dtype) -> dict[str, Pairs]:
    """Rows that fill no tile, alone and beside others; tight clusters far from the origin; pairs that do not count; what is not finite."""
    g = torch.Generator().manual_seed(0)
    b, d = (5, 40) if INTERPRETED else (37, 3072)

    def normal(rows, d, shift=0.0):
        return (torch.randn(rows, d, generator=g) + shift).to(dtype)

    def classes(rows, n=4):
        return torch.randint(n, (rows,), generator=g)

    def clusters(spread):  # of norm 10
        centres = 10 * torch.nn.functional.normalize(torch.randn(3, 64, generator=g), dim=1)
        return (centres[torch.arange(b) % 3] + spread * torch.randn(b, 64, generator=g)).to(dtype)

    broken = normal(b, 7)
    broken[1, 2], broken[2] = NAN, -INF
    return {
        "images": Pairs(normal(b, d), classes(b)),
        "ragged": Pairs(normal(3 * b + 2, 33), classes(3 * b + 2)),
        "d=1": Pairs(normal(b, 1), classes(b)),
        "groups": Pairs(normal(b, 65), classes(b), groups=3),
        "other": Pairs(normal(b, 48), classes(b), normal(2 * b + 1, 48), classes(2 * b + 1)),
        "other, groups": Pairs(normal(2 * b, 17), classes(2 * b), normal(b, 17), classes(b), groups=2),
        "clusters": Pairs(clusters(0.5), classes(b)),
        "tight clusters": Pairs(clusters(1e-4), classes(b)),
        "far from the origin": Pairs(normal(b, 20, 300.0), classes(b)),
        "copies": Pairs(normal(1, 9).repeat(b, 1), classes(b)),
        "one class": Pairs(normal(b, 6), classes(b, 1)),
        "two rows": Pairs(normal(2, 6), torch.arange(2)),
        "one row": Pairs(normal(1, 6), torch.arange(1)),
        "no row": Pairs(normal(0, 6), classes(0)),
        "no other": Pairs(normal(3, 6), classes(3), normal(0, 6), classes(0)),
        "NaN and inf": Pairs(broken, classes(b), groups=2),
    }


def _on_all_threads_and_one(call: Callable[[], Answer]) -> list[Answer]:
    answers = []
    for threads in (THREADS, 1):
        torch.set_num_threads(threads)
        answers.append({output: value.cpu() for output, value in call().items()})
    return answers


def _run_distances(case: Pairs, device: str) -> list[Answer]:
    """The answer; again on one thread; and of rows among each other, its transpose."""
    mu, other = case.mu.to(device), None if case.other is None else case.other.to(device)
    answers = _on_all_threads_and_one(lambda: {"sqdist": pairwise_sqdist(mu, other)})
    return answers if case.other is not None else [*answers, {"sqdist": answers[0]["sqdist"].T}]


def _judge_distances(case: Pairs, answer: Answer) -> Errors:
    exact = case.exact()
    limit = 1e-13 if case.mu.dtype == torch.float64 else 1e-6
    return {"sqdist": (_deviation(answer["sqdist"], exact, exact.clamp(min=1e-30)), limit)}


def _run_loss(case: Pairs, device: str) -> list[Answer]:
    """The answer of every form, stacked; and again on one thread."""

    def call() -> Answer:
        answers = [_losses(case, device, form) for form in reference.PCL_FORMS]
        return {output: torch.stack([answer[output] for answer in answers if output in answer]) for output in answers[2]}

    return _on_all_threads_and_one(call)


def _losses(case: Pairs, device: str, form: str) -> Answer:
    """Sum and mean, and the gradients of the sum."""
    learn = {"mu": case.mu, "weight": case.weight, "other": case.other, "margin": case.margin if form == "hinge" else None}
    learn = {name: value.to(device).clone().requires_grad_() for name, value in learn.items() if value is not None}
    rest = {"other_labels": case.other_labels, "group": case.group, "other_group": case.other_group}
    rest = {name: value if value is None else value.to(device) for name, value in rest.items()}
    arguments = learn["mu"], case.labels.to(device)
    rest |= {"form": form, "sample_weight": learn["weight"], "margin": learn.get("margin"), "other": learn.get("other")}
    total = pcl_loss(*arguments, reduction="sum", **rest)
    grads = torch.autograd.grad(total, list(learn.values()))
    with torch.no_grad():
        mean = pcl_loss(*arguments, **rest)
    return {"loss": torch.stack([total.detach(), mean]), **{f"{name} grad": grad for name, grad in zip(learn, grads, strict=True)}}


def _judge_loss(case: Pairs, answer: Answer) -> Errors:
    """Losses, and rows of sum_j phi, which are the gradient of the weights, by what an error of 1e-6 max(1, d) in d explains; gradients of
    mu and other by the norm of their row and, where it is much smaller than those of its terms, by 2e-2 of theirs; those of the margins,
    which are counts."""
    dtype, d = case.mu.dtype, (case.exact() / case.mu.shape[1]).nan_to_num(posinf=INF)
    rows = [case.exact_rows(form) for form in range(len(reference.PCL_FORMS))]
    row, pairs, active, mu_grad, other_grad = zip(*rows, strict=True)
    counts = case.labels[:, None] != (case.labels if case.other is None else case.other_labels)
    if case.group is not None:
        counts = counts & (case.group[:, None] == (case.group if case.other is None else case.other_group))
    weight, unit = case.weight.double(), 1e-13 if dtype == torch.float64 else 1e-6
    explained, mu_terms, other_terms = [], [], []
    for form in range(len(reference.PCL_FORMS)):
        value, slope = reference._pcl_term(form, d, case.margin[:, None].double())
        error = d.clamp(min=1) * torch.maximum(value.abs(), d * slope.abs())
        explained.append(torch.where(counts & torch.isfinite(error), error, 0).sum(1) + 1e-300)
        terms = 2 * (d / case.mu.shape[1]).sqrt() * torch.where(counts & torch.isfinite(error), weight[:, None] * slope.abs(), 0)
        terms = terms.nan_to_num(nan=0, posinf=0)
        mu_terms.append((terms + terms.T if case.other is None else terms).sum(1))
        other_terms.append(terms.sum(0))
    row, explained, pairs = torch.stack(row), torch.stack(explained), pairs[0].sum().clamp(min=1)
    divisor = torch.stack([torch.ones(()), pairs]).double()
    total, allowed = (weight * row).sum(1)[:, None] / divisor, (weight * explained).sum(1)[:, None].clamp(min=1e-300) / divisor
    limit = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]

    def by_row(output: str, exact: tuple[Tensor, ...], terms: list[Tensor]) -> tuple[Tensor, float]:
        exact = torch.stack(exact)
        smallest = math.sqrt(exact.shape[-1]) * torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # what rounds to 0
        norm = exact.nan_to_num(nan=0, posinf=0, neginf=0).norm(dim=-1)
        scale = norm + 2e-2 * torch.stack(terms) + smallest / limit
        return _deviation(answer[output], exact).norm(dim=-1) / scale, limit

    return {
        "loss": (_deviation(answer["loss"], total, allowed), unit),
        "weight grad": (_deviation(answer["weight grad"], row, explained), unit),
        "mu grad": by_row("mu grad", mu_grad, mu_terms),
        **({} if case.other is None else {"other grad": by_row("other grad", other_grad, other_terms)}),
        "margin grad": (_deviation(answer["margin grad"][0], weight * active[2], weight * active[2].clamp(min=1)), unit),
    }


def _pairs_workload(loss: bool, dtype: torch.dtype, d: int, k: int) -> Callable:
    mu, labels = torch.randn(2048, d, device="cuda").to(dtype).requires_grad_(loss), torch.arange(2048, device="cuda") % 10
    return (lambda: torch.autograd.grad(pcl_loss(mu, labels), mu)) if loss else partial(pairwise_sqdist, mu)


OPS = {  # the one place to add an op: what to run it on, how to run and judge it, and what --tune times
    "knn": Op(_searches, partial(_run_search, knn), _judge_neighbours, partial(_workload, knn)),
    "knn_kde_grad": Op(_searches, partial(_run_search, knn_kde_grad), _judge_density, partial(_workload, knn_kde_grad)),
    "p_sel": _selection("p_sel", _judge_p),
    "score_select": _selection("score_select", _judge_selection),
    "posterior_mean": _selection("posterior_mean", _judge_mean),
    "pairwise_sqdist": Op(_pairs, _run_distances, _judge_distances, partial(_pairs_workload, False), takes_k=False),
    "pcl_loss": Op(_pairs, _run_loss, _judge_loss, partial(_pairs_workload, True), takes_k=False),
}


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown: nvidia-smi does not run"


def facts() -> dict[str, str]:
    """What one must know of the machine and the build to read the table."""
    info = build_info()
    lines = {
        **({"triton": "interpreted: every case has fewer and shorter rows"} if INTERPRETED else {}),
        "ltkernels": f"{__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "C++ kernels": info["compiler"] if info["cpp"] else f"none: {info['cpp_reason']}",
        "CUDA kernels": f"{', '.join(info['cuda_archs'])}, nvcc {info['nvcc']}" if info["cuda"] else f"none: {info['cuda_reason']}",
    }
    if torch.cuda.is_available():
        lines["gpu"] = "{}, capability {}.{}, driver {}".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), driver())
    return lines


def places(device: str | None, name: str | None) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The (backend, device) pairs that can run here, and why the others cannot."""
    pairs = [("cpu", "cpu"), ("triton", "cpu"), ("reference", "cpu"), ("cuda", "cuda"), ("triton", "cuda")]
    pairs = [pair for pair in pairs if name in (None, pair[0]) and device in (None, pair[1])]
    blind = {} if torch.cuda.is_available() else {"cuda": "torch sees no GPU"}
    reasons = {pair: [backends.unavailable(*pair), blind.get(pair[1])] for pair in pairs}
    missing = {" on ".join(pair): "; ".join(filter(None, why)) for pair, why in reasons.items() if any(why)}
    return [pair for pair in pairs if not any(reasons[pair])], missing


def test(name: str, device: str, op: str, dtype: torch.dtype) -> dict[str, Any]:
    """A row of the table. Whatever the op does wrong, raising included, becomes its verdict and hides no other row."""
    worst, cases, case_name = {}, {}, "preparing the cases"
    try:
        cases = OPS[op].cases(dtype)
        for case_name, case in cases.items():
            with backend(name):
                answer, *others = OPS[op].run(case, device)
            differ = torch.stack([_deviation(other[x], answer[x]).count_nonzero() for other in others for x in answer]).sum()
            for output, (errors, limit) in {**OPS[op].judge(case, answer), "bits": (differ, 0)}.items():
                error = errors.amax().item() if errors.numel() else 0
                if output not in worst or error > worst[output]["error"]:
                    worst[output] = {"error": error, "limit": limit, "case": case_name}
        missed = [f"{output} in {w['case']}" for output, w in worst.items() if not w["error"] <= w["limit"]]
        verdict = f"MISS: {'; '.join(missed)}" if missed else "ok"
    except Exception as error:
        verdict = f"MISS: {case_name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    dtype_name = str(dtype).removeprefix("torch.")
    outputs = "  ".join(f"{output} {w['error']:.2g}/{w['limit']:.2g}" for output, w in worst.items())
    print(f"{name:9} {device:4} {op:14} {dtype_name:8} {len(cases):2} cases  {outputs}  {verdict}", flush=True)
    return {"backend": name, "device": device, "op": op, "dtype": dtype_name, "cases": len(cases), "worst": worst, "verdict": verdict}


TUNED_D = {32: range(1, 65), 128: range(65, 257), 512: range(257, backends.MAX_D + 1)}  # measured at d: for these
TUNED_K = {16: range(1, 33), 64: range(33, 129), 256: range(129, backends.MAX_K + 1)}
WARMUP, ROUNDS = 2, 7


def grid() -> list[tuple[str, torch.dtype, int, int, range]]:
    """op, dtype, d, k that --tune measures, and the k that the measurement speaks for."""
    every = {1: range(1, backends.MAX_K + 1)}
    spans = {op: TUNED_K if entry.takes_k else every for op, entry in OPS.items()}
    return [(op, dtype, d, k, spans[op][k]) for op in OPS for dtype, d, k in itertools.product(backends._FLOATS, TUNED_D, spans[op])]


def measure(op: str, dtype: torch.dtype, d: int, k: int, rivals: list[str]) -> dict[str, list[float]]:
    """Seconds of every rival, from call to answer. They take turns, so that clocks and temperature favour none."""
    call, times = OPS[op].workload(dtype, d, k), {name: [] for name in rivals}
    for turn, name in itertools.product(range(WARMUP + ROUNDS), rivals):
        with backend(name):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
        times[name] += [time.perf_counter() - start] if turn >= WARMUP else []
    return times


def tune(card: str, rivals: list[str]) -> list[backends.Route]:
    """A row for the faster rival at every op, dtype, d and k of the grid, but none where one of them raises."""
    routes = []
    for op, dtype, d, k, span in grid():
        try:
            median = {name: statistics.median(times) for name, times in measure(op, dtype, d, k, rivals).items()}
            fast, slow = sorted(median, key=median.get)
            reason = f"measured on {card}: {fast} {median[fast] / median[slow]:.2f} of {slow}'s time, median of {ROUNDS}"
            routes.append(backends.Route(range(1000), op, (dtype,), TUNED_D[d], span, fast, reason, card))
        except Exception as error:  # such as too little memory: the other cells can do without this one
            reason = f"{type(error).__name__}: {error}"
        print(f"{op} {dtype} d={d} k={k}: {reason}", flush=True)
    return routes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ltkernels.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="test on this one only")
    parser.add_argument("--backend", choices=backends.BACKENDS, help="test this one only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write header and table there, too")
    parser.add_argument("--tune", action="store_true", help="time cuda against triton and write the routes of this card")
    args = parser.parse_args(arguments)
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: no such folder: {args.json.absolute().parent}")
    running, missing = places(args.device, args.backend)
    if args.tune:
        running = [pair for pair in running if pair[1] == "cuda"]
        if len(running) < 2:
            print(f"--tune: nothing to choose between: of cuda and triton, {running[0][0] if running else 'none'} can run here")
            return 0
        path, card = backends.routes_file(), torch.cuda.get_device_name()
        try:  # found before anything is measured: a file that cannot be read, and one that cannot be written
            kept = backends.read_routes(path) if os.path.isfile(path) else []
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except (OSError, ValueError) as error:
            parser.error(f"--tune: {error}")
        others = [route for route in kept if route.device != card]
    reasons = [f"{place}: {why}" for place, why in missing.items()]
    if not running:
        parser.error(f"nothing can run: {'; '.join(reasons) or 'no such pair'}")
    header = facts()
    print(*(f"{name:13} {fact}" for name, fact in header.items()), *(f"not tested: {reason}" for reason in reasons), sep="\n")
    dtypes = {name: (*backends._FLOATS, *([torch.float64] if name in ("cpu", "reference") else [])) for name in backends.BACKENDS}
    rows = [test(name, device, op, dtype) for name, device in running for op in OPS for dtype in dtypes[name]]
    torch.set_num_threads(THREADS)
    missed = sum(row["verdict"] != "ok" for row in rows)
    print(f"{len(rows) - missed} of {len(rows)} rows are ok")
    if args.json:
        report = json.dumps({"facts": header, "not tested": missing, "rows": rows})
        args.json.write_text(json.dumps(json.loads(report, parse_constant=str), indent=1) + "\n")  # JSON has no infinity
    if args.tune and not missed:
        routes = tune(card, [name for name, _ in running])
        missed = len(grid()) - len(routes)
        backends.write_routes(path, [*routes, *others])
        print(f"{len(routes)} rows for {card} in {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
