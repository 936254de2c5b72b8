"""How the tests run csrc/knn_kde/knn_kde.cuh through host_entry_knn_kde.cpp, and what they expect of it: float64."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

ENTRY = "host_entry_knn_kde.cpp"


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def prepare(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As bank_prepare: centre, centred, squared norms."""
    finite = np.isfinite(points).all(1)
    centre = (
        points[finite].mean(0, dtype=np.float64).astype(np.float32)
        if finite.any()
        else np.zeros(points.shape[1], np.float32)
    )
    centred = np.where(finite[:, None], points - centre, np.float32(0)).astype(np.float32)
    with np.errstate(over="ignore"):
        sqnorm = np.where(finite, (centred.astype(np.float64) ** 2).sum(1), np.inf).astype(np.float32)
    return centre, centred, sqnorm


class Answer:
    def __init__(self, queries: int, d: int, k: int):
        self.log_density, self.score = np.full(queries, 7, np.float32), np.full((queries, d), 7, np.float32)
        self.sqdist, self.index = np.full((queries, k), 7, np.float32), np.full((queries, k), -7, np.int64)
        self.paths = np.zeros(2, np.int64)  # rows on the second rung, rows on the last

    def bits(self) -> bytes:
        return b"".join(a.tobytes() for a in (self.log_density, self.score, self.sqdist, self.index))


def aligned(count: int, dtype=np.uint8) -> np.ndarray:
    """Uninitialised (0xff) and as aligned as what torch's allocators give."""
    raw = np.full(count * np.dtype(dtype).itemsize + 256, 0xFF, np.uint8)
    return raw[-raw.ctypes.data % 256 :][: count * np.dtype(dtype).itemsize].view(dtype)


def solve(
    library, queries, points, k, *, bandwidth=1.0, self_index=None, bound=None, log_weight=None, dtype=0, multiprocessors=1, chunk=0
) -> Answer:
    """queries and points hold values that dtype (0 fp32, 1 fp16, 2 bf16) represents exactly."""
    stored = {0: lambda x: x, 1: lambda x: x.astype(np.float16), 2: bfloat16_bits}[dtype]
    answer = Answer(*queries.shape, k)
    sizes = np.array([len(queries), len(points), queries.shape[1], k, multiprocessors, chunk], np.int64)
    library.knn_kde_scratch.restype = ctypes.c_int64
    scratch = aligned(library.knn_kde_scratch(ctypes.c_void_p(sizes.ctypes.data)))
    arrays = [stored(queries), stored(points), *prepare(points), self_index, bound,
              np.broadcast_to(np.float32(bandwidth), len(queries)), log_weight,
              answer.log_density, answer.score, answer.sqdist, answer.index, scratch]  # fmt: skip
    arrays = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    library.regions = [(a.ctypes.data, a.nbytes) for a in arrays if a is not None]
    pointers = (ctypes.c_void_p * len(arrays))(*(None if a is None else a.ctypes.data for a in arrays))
    status = library.knn_kde_run(dtype, pointers, ctypes.c_void_p(sizes.ctypes.data), ctypes.c_void_p(answer.paths.ctypes.data))
    if status:
        raise RuntimeError(library.simt_error().decode())
    return answer


def judge(answer: Answer, queries, points, k, *, bandwidth=1.0, self_index=None, bound=None, log_weight=None) -> None:
    """The neighbours are a k-nearest set in float64 and come by (sqdist, index); density and score follow from them."""
    bandwidth = np.broadcast_to(np.float64(bandwidth), len(queries))
    z = points.astype(np.float64)
    for i, q in enumerate(queries.astype(np.float64)):
        available = np.ones(len(z), bool)
        if self_index is not None and self_index[i] >= 0:
            available[self_index[i]] = False
        index, sqdist = answer.index[i], answer.sqdist[i].astype(np.float64)
        assert len(set(index)) == k and available[index].all()
        if not np.isfinite(q).all():
            assert np.isnan(sqdist).all() and np.isnan(answer.log_density[i]) and np.isnan(answer.score[i]).all()
            assert (index == np.flatnonzero(available)[:k]).all()
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            exact = ((z - q) ** 2).sum(1)
        exact[~(exact <= 3.4028e38)] = np.inf
        close = dict(rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(sqdist, exact[index], **close)
        assert all(
            a < b or (a == b and j < m) for a, b, j, m in zip(sqdist, sqdist[1:], index, index[1:], strict=False)
        )
        left_out = available.copy()
        left_out[index] = False
        twins = left_out & (points == points[index[-1]]).all(1)
        assert not (np.flatnonzero(twins) < index[-1]).any()  # a tie at the boundary goes to the lower index
        if np.isinf(sqdist[-1]):
            assert (
                np.isinf(exact[left_out]).all() and not (np.flatnonzero(left_out) < index[np.isinf(sqdist)].max()).any()
            )
        else:
            assert (exact[left_out] >= sqdist[-1] * (1 - 1e-6) - 1e-37).all()
        with np.errstate(over="ignore", divide="ignore"):
            logits = (0 if log_weight is None else log_weight[index].astype(np.float64)) - sqdist / (
                2 * bandwidth[i] ** 2
            )
        top = logits.max()
        if np.isinf(top):
            assert np.isneginf(answer.log_density[i]) and np.isnan(answer.score[i]).all()
            continue
        weight = np.exp(logits - top)
        expected = top + np.log(weight.sum()) - np.log(k)
        np.testing.assert_allclose(answer.log_density[i], expected, rtol=2e-6, atol=2e-6)
        used = weight > 0
        pull = weight[used, None] / weight.sum() * (z[index[used]] - q) / bandwidth[i] ** 2
        np.testing.assert_allclose(answer.score[i], pull.sum(0), rtol=1e-4, atol=2e-6 * np.abs(pull).sum() + 1e-37)


def gaussian(rng, q, n, d, scale=1.0, shift=0.0):
    return [(shift + scale * rng.standard_normal((rows, d))).astype(np.float32) for rows in (q, n)]


def clusters(rng, q, n, d, count, offset, spread):
    centres = offset * rng.standard_normal((count, d))
    return [
        (centres[rng.integers(count, size=rows)] + spread * rng.standard_normal((rows, d))).astype(np.float32)
        for rows in (q, n)
    ]


def duplicates(rng, q, n):
    distinct = rng.standard_normal((4, 16)).astype(np.float32)
    return [distinct[rng.integers(4, size=rows)] for rows in (q, n)]


def far_row(rng, q, n):
    queries, points = gaussian(rng, q, n, 24)
    points[n // 2] = 1e6
    return queries, points


def broken(rng, q, n):
    queries, points = gaussian(rng, q, n, 7)
    points[::5], points[1::7, 3], queries[::4, 2], queries[1::6] = np.nan, np.inf, np.nan, -np.inf
    return queries, points


def mixed_huge(rng, q, n):
    queries, points = gaussian(rng, q, n, 3)
    points[::3] *= np.float32(1e19)  # |c|^2 near and beyond the end of fp32
    queries[::2] = points[:: n // q][: len(queries[::2])]
    return queries, points


def lattice(rng, q, n):
    return [rng.integers(-2, 3, size=(rows, 3)).astype(np.float32) for rows in (q, n)]


CASES = {  # name -> (queries, points), k, bandwidth
    "d=1": (lambda r: gaussian(r, 11, 700, 1), 64, 0.1),
    "d=2": (lambda r: gaussian(r, 130, 300, 2), 7, 0.3),
    "d=32": (lambda r: gaussian(r, 37, 1100, 32), 64, 2.0),
    "d=33": (lambda r: gaussian(r, 20, 200, 33), 13, 2.0),
    "d=128": (lambda r: gaussian(r, 9, 300, 128), 64, 6.0),
    "d=512": (lambda r: gaussian(r, 3, 140, 512), 20, 12.0),
    "d=2048": (lambda r: gaussian(r, 2, 130, 2048), 64, 20.0),
    "d=4095": (lambda r: gaussian(r, 2, 20, 4095), 5, 30.0),
    "k=1": (lambda r: gaussian(r, 5, 500, 5), 1, 0.5),
    "k=256": (lambda r: gaussian(r, 3, 1500, 4), 256, 0.5),
    "k=N": (lambda r: gaussian(r, 4, 150, 6), 150, 1.0),
    "N=3": (lambda r: gaussian(r, 5, 3, 6), 2, 1.0),
    "N=1": (lambda r: gaussian(r, 1, 1, 1), 1, 1.0),
    "50 clusters": (lambda r: clusters(r, 20, 900, 32, 50, 4, 0.05), 10, 0.1),
    "5 clusters": (lambda r: clusters(r, 9, 2500, 64, 5, 10, 0.01), 64, 0.05),
    "duplicates": (lambda r: duplicates(r, 6, 4200), 64, 1.0),
    "all equal": (
        lambda r: [x[:1].repeat(n, 0) for x, n in zip(gaussian(r, 1, 1, 16), (2, 850), strict=True)],
        100,
        1.0,
    ),
    "lattice": (lambda r: lattice(r, 20, 1000), 64, 1.0),
    "offset 1e6": (lambda r: gaussian(r, 6, 1200, 32, shift=1e6), 30, 2.0),
    "far row": (lambda r: far_row(r, 20, 400), 30, 2.0),
    "far query": (lambda r: [gaussian(r, 4, 1, 8, shift=1e5)[0], gaussian(r, 1, 1300, 8)[1]], 30, 1e3),
    "1e-25": (lambda r: gaussian(r, 4, 1200, 9, 1e-25), 30, 1e-25),
    "1e-12": (lambda r: gaussian(r, 4, 400, 9, 1e-12), 30, 1e-12),
    "1e12": (lambda r: gaussian(r, 4, 400, 9, 1e12), 30, 1e12),
    "1e25": (lambda r: gaussian(r, 4, 300, 9, 1e25), 30, 1e25),
    "1e19 and 1": (lambda r: mixed_huge(r, 20, 300), 60, 1e18),
    "NaN and inf": (lambda r: broken(r, 25, 300), 20, 2.0),
    "NaN, too few left": (lambda r: broken(r, 9, 20), 18, 2.0),
    "tiny": (lambda r: gaussian(r, 3, 150, 36), 3, 5.0),
    # the second chunk finds the lists that the first one left, and all queues are full before the bank ends
    "tiny, equal": (lambda r: [x[:1].repeat(n, 0) for x, n in zip(gaussian(r, 1, 1, 3), (3, 700), strict=True)], 2, 1.0),
    "one row in the second chunk": (lambda r: gaussian(r, 129, 40, 2), 3, 1.0),
}
# Where some rows rightly leave the filter for a later rung. Elsewhere none may: the exact rung would hide keys that are all wrong.
BEYOND_THE_FILTER = {"duplicates", "far row", "1e-25", "1e25", "1e19 and 1", "NaN, too few left", "tiny, equal"}
OPTIONS = {"tiny, equal": dict(chunk=2), "one row in the second chunk": dict(chunk=128, self_index=np.full(129, -1))}
# Small enough for a sanitizer: case -> rows of queries. Between them all three rungs, all ragged edges, all conversions.
SANITIZED = {"d=33": 9, "NaN, too few left": 9, "lattice": 9, "N=3": 5, "5 clusters": 2, "all equal": 2, "tiny, equal": 3}
ADDRESSES = {"one row in the second chunk": 129}  # for ASan + UBSan alone: too many threads for ThreadSanitizer
TINY = {"N=3": 5, "tiny": 3, "tiny, equal": 3}  # and for the PTX interpreter


def run_case(library, name: str, rows: int | None = None, **schedule) -> bytes:
    """Solves a case (its first rows of queries), judges the answer and returns its bits."""
    make, k, bandwidth = CASES[name]
    queries, points = make(np.random.default_rng(len(name)))
    queries = queries[:rows]
    answer = solve(library, queries, points, k, bandwidth=bandwidth, **OPTIONS.get(name, {}), **schedule)
    judge(answer, queries, points, k, bandwidth=bandwidth)
    assert name in BEYOND_THE_FILTER or not answer.paths.any(), f"rows on a later rung: {answer.paths}"
    return answer.bits()


HALVES = {"fp16": 1, "bf16": 2}
TINY_HALF = dict(q=2, n=20, d=5, k=3)


def run_half(library, dtype: str, q: int = 19, n: int = 333, d: int = 20, k: int = 21) -> None:
    queries, points = gaussian(np.random.default_rng(HALVES[dtype]), q, n, d, shift=2)
    if dtype == "fp16":
        queries, points = (x.astype(np.float16).astype(np.float32) for x in (queries, points))
    else:
        queries, points = (from_bfloat16(bfloat16_bits(x)) for x in (queries, points))
    judge(solve(library, queries, points, k, dtype=HALVES[dtype]), queries, points, k)


class Removal(NamedTuple):
    """A text of the kernels whose loss the case must show."""

    file: str
    text: str
    instead: str
    flavour: str
    case: str
    noticed_as: str  # words of the report


REMOVALS = {
    "barrier before the list is read": Removal(
        "knn_kde.cuh",
        "sm.list[atomicAdd(&sm.listed, 1)] = static_cast<uint32_t>(j);\n  __syncthreads();",
        "sm.list[atomicAdd(&sm.listed, 1)] = static_cast<uint32_t>(j);",
        "plain", "d=33", "meets",
    ),
    "barrier after the k-th is known": Removal(
        "knn_kde.cuh",
        "sm.keys[k - 1] : ~uint64_t{0};\n  }\n  __syncthreads();",
        "sm.keys[k - 1] : ~uint64_t{0};\n  }",
        "tsan", "d=33", "data race",
    ),
    "wait for the tiles": Removal("filter.cuh", "ptx::cp_async_wait<1>();", "", "plain", "d=33", "rows on a later rung"),
    "last bank row of a tile": Removal(
        "filter.cuh", "column + r0 + r < last ? column + r0 + r : -1", "column + r0 + r", "asan", "d=33", "AddressSanitizer"
    ),
    "last bank row of a tile, 16 bytes at a time": Removal(
        "filter.cuh", "theirs = r0 + r < rows && l < p.d", "theirs = l < p.d", "asan", "5 clusters", "AddressSanitizer"
    ),
    "last row of a chunk": Removal(
        "filter.cuh", "slot >= count ? -1 : ", "", "asan", "one row in the second chunk", "AddressSanitizer"
    ),
    "wait for copies that nobody reads": Removal("filter.cuh", "ptx::cp_async_wait<0>();", "", "plain", "tiny, equal", "under way"),
    "last row of a launch": Removal("knn_kde.cuh", "if (row < p.count) {", "{", "asan", "NaN, too few left", "AddressSanitizer"),
    "last row of a list": Removal("knn_kde.cuh", "if (row < count && (", "if ((", "ptx", "tiny, equal", "out of bounds"),
}  # fmt: skip
