"""How the tests run csrc/pairwise_pcl/pairwise_pcl.cuh through host_entry_pairwise_pcl.cpp, and what they expect of it: float64."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from knn_kde import Removal, aligned, bfloat16_bits, from_bfloat16
from score_select import call

ENTRY = "host_entry_pairwise_pcl.cpp"
EXPONENTIAL, RECIPROCAL, HINGE, NEGATIVE_L2 = range(4)
CHUNK = 1 << 20  # pairs, as in a call from Python


class Batch(NamedTuple):
    mu: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    form: int
    margin: np.ndarray | None = None
    group: np.ndarray | None = None
    other: np.ndarray | None = None
    other_labels: np.ndarray | None = None
    other_group: np.ndarray | None = None
    grad: bool = True
    chunk: int = CHUNK

    def first(self, rows: int | None) -> Batch:
        of_rows = {name: getattr(self, name) for name in ("mu", "labels", "weight", "margin", "group")}
        return self._replace(**{name: None if value is None else value[:rows] for name, value in of_rows.items()})

    @property
    def partner(self):
        """Rows, labels and groups of the columns."""
        return (self.mu, self.labels, self.group) if self.other is None else (self.other, self.other_labels, self.other_group)


class Answer:
    def __init__(self, b: Batch):
        (rows, d), columns = b.mu.shape, len(b.partner[0])
        self.row, self.pairs = np.full(rows, 7, np.float32), np.full(rows, -7, np.int64)
        self.active = None if b.margin is None else np.full(rows, 7, np.float32)
        self.mu_grad = np.full((rows, d), 7, np.float32) if b.grad else None
        self.partner_grad = np.full((columns, d), 7, np.float32) if b.grad and b.other is not None else None
        self.sqdist = np.full((rows, columns), 7, np.float32)

    def bits(self) -> bytes:
        return b"".join(a.tobytes() for a in vars(self).values() if a is not None)


def solve(library, b: Batch, dtype: int = 0) -> Answer:
    """mu and other hold values that dtype (0 fp32, 1 fp16, 2 bf16) represents exactly. The loss of distance="mean", and the squared
    distances."""
    stored = {0: lambda v: v, 1: lambda v: v.astype(np.float16), 2: bfloat16_bits}[dtype]
    answer = Answer(b)
    other, other_labels, other_group = b.partner
    mu, other = stored(b.mu), stored(other)
    sizes = np.array([*b.mu.shape[:1], *other.shape, b.form, b.other is None, b.chunk, b.mu.shape[1]], np.int64)
    library.pairwise_pcl_scratch.restype = ctypes.c_int64
    scratch = aligned(library.pairwise_pcl_scratch(ctypes.c_void_p(sizes.ctypes.data)), np.float32)
    call(library, "pairwise_pcl_run", dtype, sizes, [
        mu, other, b.labels, other_labels, b.group, other_group, b.weight, b.margin,
        answer.row, answer.pairs, answer.active, answer.mu_grad, answer.partner_grad, scratch,
    ])  # fmt: skip
    if answer.sqdist.size:
        call(library, "pairwise_pcl_sqdist", dtype, sizes, [mu, other, answer.sqdist])
    return answer


def term(form: int, d, margin):
    """phi(d) and its derivative."""
    return {
        EXPONENTIAL: lambda: (np.exp(-d), -np.exp(-d)),
        RECIPROCAL: lambda: (1 / (1 + d), -1 / (1 + d) ** 2),
        HINGE: lambda: (np.maximum(margin - d, 0), -(d < margin).astype(float)),
        NEGATIVE_L2: lambda: (-d, -np.ones_like(d)),
    }[form]()


def judge(answer: Answer, b: Batch) -> None:
    other, other_labels, other_group = b.partner
    x, y, weight = b.mu.astype(np.float64), other.astype(np.float64), b.weight[:, None].astype(np.float64)
    margin = None if b.margin is None else b.margin[:, None].astype(np.float64)
    with np.errstate(all="ignore"):
        difference = x[:, None] - y
        sqdist = (difference**2).sum(-1)
        np.testing.assert_allclose(answer.sqdist, sqdist.astype(np.float32), rtol=5e-7)
        counts = b.labels[:, None] != other_labels
        if b.group is not None:
            counts &= b.group[:, None] == other_group
        broken = counts & ~(np.isfinite(x).all(1)[:, None] & np.isfinite(y).all(1))
        d = np.where(counts & ~broken, sqdist / x.shape[1], 0)
        d[d > np.finfo(np.float32).max] = np.inf
        value, slope = term(b.form, d, margin)
        pull = weight * slope
        if b.other is None:
            pull = pull + weight.T * term(b.form, d, None if margin is None else margin.T)[1]
        sensitive = np.abs(value) + np.where(d < np.inf, np.abs(slope) * d, 0)
        pulls = counts & (pull != 0)
        terms = 2 / x.shape[1] * np.where(pulls, pull, 0)[..., None] * np.where(pulls[..., None], difference, 0)
    usual = ~broken.any(1)
    assert (answer.pairs == counts.sum(1)).all()
    assert np.isnan(answer.row[~usual]).all()
    error = np.abs(answer.row[usual] - np.where(counts, value, 0).sum(1)[usual])
    assert (error <= 1e-6 * np.where(counts, sensitive, 0).sum(1)[usual]).all(), "row"
    if answer.active is not None:
        assert np.isnan(answer.active[~usual]).all()
        assert (answer.active[usual] == (counts & (d < margin)).sum(1)[usual]).all(), "active"
    for found, expected, nan in ((answer.mu_grad, terms.sum(1), ~usual), (answer.partner_grad, -terms.sum(0), broken.any(0))):
        if found is None:
            continue
        assert np.isnan(found[nan]).all(), "gradient of a broken pair"
        error, size = (np.linalg.norm(v[~nan], axis=1) for v in (found - expected, expected))
        assert (error <= 2e-6 * size).all(), f"gradient: {error} of {size}"
    if b.other is None and np.isfinite(x).all():
        assert answer.sqdist.tobytes() == answer.sqdist.T.tobytes() and not answer.sqdist.diagonal().any()


def batch(rng, rows, d, form, *, columns=None, classes=4, groups=0, spread=1.0, **more) -> Batch:
    """Against each other, or against `columns` rows of their own."""

    def side(count, of):
        return (spread * rng.standard_normal((count, d))).astype(np.float32), rng.integers(of, size=count)

    mu, labels = side(rows, classes)
    weight = rng.uniform(0.5, 2, rows).astype(np.float32)
    if form == HINGE:
        more["margin"] = (2 * spread**2 * rng.uniform(0.5, 1.5, rows)).astype(np.float32)
    if groups:
        more["group"] = rng.integers(groups, size=rows)
    if columns is not None:
        more["other"], more["other_labels"] = side(columns, classes)
        if groups:
            more["other_group"] = rng.integers(groups, size=columns)
    return Batch(mu, labels, weight, form, **more)


def clusters(rng, rows, d, form):
    """1e-3 apart, at norm 10, with different labels."""
    b = batch(rng, rows, d, form)
    centres = rng.standard_normal((3, d))
    centres *= 10 / np.linalg.norm(centres, axis=1, keepdims=True)
    return b._replace(mu=(centres[np.arange(rows) % 3] + 1e-3 / d**0.5 * b.mu).astype(np.float32))


def broken(rng, rows, d, form, **more):
    """The first row is in no pair, whatever it holds."""
    b = batch(rng, rows, d, form, groups=2, **more)
    b.mu[0], b.mu[rows // 2, d - 1], b.group[0] = np.nan, np.inf, 9
    if b.other is not None:
        b.other[1], b.other[-1, 0], b.other_group[1] = np.inf, np.nan, 8
    return b


def far(rng, rows, d, form):
    """Finite rows whose squared distances are not, and some others."""
    b = batch(rng, rows, d, form)
    b.mu[::3] *= np.float32(1e25)
    b.mu[::6] *= np.float32(1e13)
    return b


def equal(rng, rows, d, form):
    """Differences that are the same in every coordinate: sums of them round the same way over and over."""
    b = batch(rng, rows, d, form, columns=rows, classes=50)
    return b._replace(mu=np.repeat(b.mu[:, :1], d, 1), other=np.repeat(b.other[:, :1], d, 1))


CASES = {  # name -> what is solved
    "exponential": lambda r: batch(r, 70, 70, EXPONENTIAL),
    "reciprocal, groups": lambda r: batch(r, 45, 130, RECIPROCAL, groups=3),
    "hinge": lambda r: batch(r, 37, 9, HINGE),
    "negative_l2": lambda r: batch(r, 33, 65, NEGATIVE_L2),
    "exponential, other": lambda r: batch(r, 20, 100, EXPONENTIAL, columns=70, groups=2),
    "hinge, other": lambda r: batch(r, 35, 3, HINGE, columns=33),
    "clusters": lambda r: clusters(r, 40, 200, EXPONENTIAL),
    "clusters, hinge": lambda r: clusters(r, 20, 50, HINGE),
    "far": lambda r: far(r, 20, 6, EXPONENTIAL),
    "far, reciprocal": lambda r: far(r, 20, 6, RECIPROCAL),
    "far, hinge": lambda r: far(r, 20, 6, HINGE),
    "12288 equal terms": lambda r: equal(r, 2, 12288, RECIPROCAL),
    "close, 3072": lambda r: batch(r, 3, 3072, EXPONENTIAL, classes=50, spread=0.01),
    "one class": lambda r: batch(r, 40, 5, EXPONENTIAL, classes=1),
    "one of each": lambda r: batch(r, 1, 1, EXPONENTIAL, columns=1, classes=90),
    "one row": lambda r: batch(r, 1, 7, HINGE),
    "two rows": lambda r: batch(r, 2, 3, NEGATIVE_L2, classes=90),
    "no rows": lambda r: batch(r, 0, 3, HINGE, columns=5),
    "no columns": lambda r: batch(r, 5, 3, HINGE, columns=0),
    "chunks": lambda r: batch(r, 75, 5, HINGE, chunk=2048),
    "chunks, other": lambda r: batch(r, 70, 20, RECIPROCAL, columns=140, chunk=2048),
    "loss alone": lambda r: batch(r, 40, 20, EXPONENTIAL, grad=False),
    "broken": lambda r: broken(r, 40, 7, RECIPROCAL),
    "broken, other": lambda r: broken(r, 13, 70, HINGE, columns=40),
    "two slabs": lambda r: batch(r, 3, 70, EXPONENTIAL, columns=19, classes=90),
    "tiny": lambda r: broken(r, 5, 4, HINGE, columns=9),
}  # fmt: skip
SANITIZED = {"tiny": None, "two slabs": None, "broken": 5}  # case -> its first rows
ADDRESSES = {"chunks, other": None}
TINY = {"tiny": None, "one of each": None}


def run_case(library, name: str, rows: int | None = None, multiprocessors: int = 1) -> bytes:
    """Solves a case (its first rows of mu), judges the answer and returns its bits. How many multiprocessors there are changes nothing."""
    b = CASES[name](np.random.default_rng(len(name))).first(rows)
    answer = solve(library, b)
    judge(answer, b)
    return answer.bits()


HALVES = {"fp16": 1, "bf16": 2}
TINY_HALF = dict(rows=3, columns=5, d=4)


def run_half(library, dtype: str, rows: int = 19, columns: int = 43, d: int = 70) -> None:
    b = batch(np.random.default_rng(HALVES[dtype]), rows, d, EXPONENTIAL, columns=columns)
    if dtype == "fp16":
        narrowed = lambda v: v.astype(np.float16).astype(np.float32)  # noqa: E731
    else:
        narrowed = lambda v: from_bfloat16(bfloat16_bits(v))  # noqa: E731
    b = b._replace(mu=narrowed(b.mu), other=narrowed(b.other))
    judge(solve(library, b, HALVES[dtype]), b)


REMOVALS = {
    "barrier before a slab is written": Removal(
        "pairwise_pcl.cuh", "__syncthreads();  // the slab before has been read", "", "tsan", "two slabs", "data race"
    ),
    "barrier before the sums take the slab's place": Removal(
        "pairwise_pcl.cuh", "__syncthreads();  // the sums take the place of the last slab", "", "tsan", "tiny", "data race"
    ),
    "barrier before rows to be pulled from are written": Removal(
        "pairwise_pcl.cuh", "__syncthreads();  // the rows before have been read", "", "tsan", "two slabs", "data race"
    ),
    "last row of a tile": Removal(
        "pairwise_pcl.cuh", "threadIdx.x / kSlab + i * kFetchRows < rows && l < d", "l < d", "asan", "tiny", "AddressSanitizer"
    ),
    "a coefficient of 0": Removal("pairwise_pcl.cuh", "if (coefficient != 0.0f) {", "{", "plain", "tiny", "gradient: "),
    "compensation": Removal(
        "pairwise_pcl.cuh", "(sum - total[r][c]) - term : 0.0f", "0.0f : 0.0f", "plain", "12288 equal terms", "Not equal"
    ),
    "compensation of inf": Removal("pairwise_pcl.cuh", "finite(sum) ? (", "true ? (", "plain", "far", "Not equal"),
    "the last warps' rows": Removal("pairwise_pcl.cuh", "if (r >= chunk.rows) return;", "", "ptx", "tiny", "out of bounds"),
}  # fmt: skip
