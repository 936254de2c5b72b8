"""How the tests run csrc/score_select/score_select.cuh through host_entry_score_select.cpp, and what they expect of it: float64."""

from __future__ import annotations

import ctypes

import numpy as np
from knn_kde import Removal, aligned, bfloat16_bits, from_bfloat16

ENTRY = "host_entry_score_select.cpp"


def philox(seed: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(rows, columns) words, in 64-bit integers of Python's: key = seed, counter = (column / 4, row low, row high, 0)."""
    word = np.uint64(0xFFFFFFFF)
    rows, group = rows.astype(np.uint64)[:, None], (columns // 4).astype(np.uint64)[None]
    counter = [np.broadcast_to(c, (len(rows), len(columns))) for c in (group, rows & word, rows >> np.uint64(32), np.uint64(0) * rows)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (b >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]), b & word,
            (a >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]), a & word,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.choose(np.broadcast_to(columns % 4, counter[0].shape), counter)


class Answer:
    def __init__(self, rows: int, columns: int, d: int):
        self.p, self.mixed = np.full((rows, columns), 7, np.float32), np.full((rows, d), 7, np.float32)
        self.log_normalizer, self.drawn_normalizer = np.full(rows, 7, np.float32), np.full(rows, 7, np.float32)
        self.index = np.full(rows, -7, np.int64)

    def bits(self) -> bytes:
        return b"".join(a.tobytes() for a in (self.p, self.mixed, self.log_normalizer, self.drawn_normalizer, self.index))


SEED, OFFSET = 0x9E3779B97F4A7C15, 2**33 + 5


def call(library, function: str, dtype: int, sizes, arrays) -> None:
    arrays = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    library.regions = [(a.ctypes.data, a.nbytes) for a in arrays if a is not None]
    pointers = (ctypes.c_void_p * len(arrays))(*(None if a is None else a.ctypes.data for a in arrays))
    if getattr(library, function)(dtype, pointers, ctypes.c_void_p(np.array(sizes, np.int64).ctypes.data)):
        raise RuntimeError(library.simt_error().decode())


def solve(library, x, clean, scale, std, log_prior=None, *, dtype=0, offset=OFFSET) -> Answer:
    """x and clean hold values that dtype (0 fp32, 1 fp16, 2 bf16) represents exactly. The probabilities, a draw, and the mean."""
    stored = {0: lambda v: v, 1: lambda v: v.astype(np.float16), 2: bfloat16_bits}[dtype]
    (rows, d), columns = x.shape, len(clean)
    answer = Answer(rows, columns, d)
    scale, std = (np.broadcast_to(np.float32(v), rows) for v in (scale, std))
    sizes = np.array([rows, columns, d, offset], np.int64)
    library.score_select_scratch.restype = ctypes.c_int64
    scratch = aligned(library.score_select_scratch(ctypes.c_void_p(sizes.ctypes.data)))
    given = [stored(x), stored(clean), scale, std, log_prior]
    call(library, "score_select_run", dtype, sizes, [*given, answer.p, answer.log_normalizer, None, None, None])
    seed = np.array([SEED], np.uint64)
    call(library, "score_select_run", dtype, sizes, [*given, None, answer.drawn_normalizer, answer.index, seed, scratch])
    call(library, "score_select_mix", dtype, sizes, [answer.p, stored(clean), answer.mixed])
    return answer


def judge(answer: Answer, x, clean, scale, std, log_prior=None, offset=OFFSET) -> None:
    scale, std = (np.broadcast_to(np.float64(np.float32(v)), len(x))[:, None] for v in (scale, std))
    wide_x, wide_clean = x.astype(np.float64), clean.astype(np.float64)
    broken, far = ~np.isfinite(x).all(1), ~np.isfinite(clean).all(1)
    with np.errstate(all="ignore"):
        sqdist = np.stack([((row - s * wide_clean) ** 2).sum(1) for row, s in zip(wide_x, scale, strict=True)])
        logits = -sqdist / (2 * std**2) + (0 if log_prior is None else log_prior.astype(np.float64))
        logits[:, far] = -np.inf
        top = logits.max(1, initial=-np.inf, keepdims=True)
        none = np.isneginf(top[:, 0]) & ~broken
        weight = np.exp(logits - top)
        total = weight.sum(1)
        normalizer, p = top[:, 0] + np.log(total), weight / total[:, None]
    # float's rounding of a squared distance is what a logit inherits: 2e-7 of its size, and 1e-6 of what is left of it
    close = dict(rtol=2e-7, atol=2e-6)
    for found in (answer.log_normalizer, answer.drawn_normalizer):
        assert np.isnan(found[broken]).all() and np.isneginf(found[none]).all()
        usual = ~broken & ~none
        np.testing.assert_allclose(found[usual], normalizer[usual], **close)
        assert (np.abs(found[usual] - normalizer[usual]) < 1e-3).all()
    spread = np.where(np.isfinite(logits), np.abs(logits), 0).max(1, where=p > 1e-12, initial=0)
    for i in range(len(x)):
        if broken[i] or none[i]:
            assert np.isnan(answer.p[i]).all() and answer.index[i] == -1 and np.isnan(answer.mixed[i]).all()
            continue
        np.testing.assert_allclose(answer.p[i], p[i], rtol=2e-6 + 1e-6 * spread[i], atol=1e-12)
        assert (answer.p[i][far] == 0).all()
        used = answer.p[i] != 0
        parts = answer.p[i][used, None].astype(np.float64) * wide_clean[used]
        np.testing.assert_allclose(answer.mixed[i], parts.sum(0), rtol=0, atol=2e-6 * np.abs(parts).sum(0).max() + 1e-37)
    words = philox(SEED, offset + np.arange(len(x)), np.arange(len(clean)))
    perturbed = logits - np.log(-np.log(((words >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24))
    for i in np.flatnonzero(~broken & ~none):
        order = np.argsort(-perturbed[i], kind="stable")
        if len(order) == 1 or perturbed[i, order[0]] - perturbed[i, order[1]] > 1e-3:
            assert answer.index[i] == order[0]
        else:
            assert perturbed[i, answer.index[i]] >= perturbed[i, order[0]] - 1e-3


def batch(rng, rows, columns, d, scale, std):
    """Noisy copies of the clean rows."""
    clean = (0.5 * rng.standard_normal((columns, d))).astype(np.float32)
    noise = rng.standard_normal((rows, d)).astype(np.float32)
    scale, std = np.broadcast_to(np.float32(scale), rows), np.broadcast_to(np.float32(std), rows)
    x = scale[:, None] * clean[np.arange(rows) % columns] + std[:, None] * noise
    return x.astype(np.float32), clean, scale, std


def ddpm(rng, rows, columns, d):
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.linspace(0, 999, rows).astype(int)]
    return batch(rng, rows, columns, d, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def broken(rng, rows, columns, d):
    x, clean, scale, std = batch(rng, rows, columns, d, 0.8, 2.0)
    x[::4, 2], x[1::6], clean[::5], clean[1::7, 3] = np.nan, np.inf, np.nan, -np.inf
    return x, clean, scale, std


def unlikely(rng, rows, columns, d):
    """A prior that leaves out some columns, and in the second half of the columns all of them."""
    log_prior = rng.standard_normal(columns).astype(np.float32)
    log_prior[::3] = log_prior[columns // 2 :] = -np.inf
    return *batch(rng, rows, columns, d, 1.0, 3.0), log_prior


def nobody(rng, rows, columns, d):
    return *batch(rng, rows, columns, d, 1.0, 3.0), np.full(columns, -np.inf, np.float32)


CASES = {  # name -> the arguments of solve
    "ddpm": lambda r: ddpm(r, 40, 70, 200),
    "one of each": lambda r: batch(r, 1, 1, 1, 1.0, 0.5),
    "one column": lambda r: batch(r, 35, 1, 9, 0.5, 0.5),
    "a line": lambda r: batch(r, 33, 129, 1, 1.0, 0.5),
    "first step of edm": lambda r: batch(r, 5, 33, 100, 1.0, 0.002),
    "sigma .01, 3072": lambda r: batch(r, 2, 3, 3072, 1.0, 0.01),
    "12288": lambda r: batch(r, 1, 2, 12288, 1.0, 0.002),
    "sigma 80": lambda r: batch(r, 9, 40, 65, 1.0, 80.0),
    "scale 0": lambda r: batch(r, 9, 70, 64, 0.0, 1.0),
    "all equal": lambda r: [v.repeat(n, 0) for v, n in zip(batch(r, 1, 1, 7, 1.0, 2.0), (9, 50, 9, 9), strict=True)],
    "broken": lambda r: broken(r, 13, 40, 7),
    "prior": lambda r: unlikely(r, 9, 150, 5),
    "nobody": lambda r: nobody(r, 3, 20, 5),
    "several tiles a block": lambda r: batch(r, 2, 8500, 3, 1.0, 1.5),
    "two slabs": lambda r: batch(r, 3, 5, 70, 1.0, 0.5),
    "tiny": lambda r: broken(r, 5, 9, 4),
}  # fmt: skip
SANITIZED = {"tiny": None, "two slabs": None, "prior": 3}  # case -> its first rows
ADDRESSES = {"several tiles a block": 2}
TINY = {"tiny": None, "one of each": None}


def run_case(library, name: str, rows: int | None = None, multiprocessors: int = 1) -> bytes:
    """Solves a case (its first rows of x), judges the answer and returns its bits. How many multiprocessors there are changes nothing."""
    x, clean, scale, std, *prior = CASES[name](np.random.default_rng(len(name)))
    arguments = x[:rows], clean, scale[:rows], std[:rows], *prior
    answer = solve(library, *arguments)
    judge(answer, *arguments)
    return answer.bits()


HALVES = {"fp16": 1, "bf16": 2}
TINY_HALF = dict(rows=3, columns=5, d=4)


def run_half(library, dtype: str, rows: int = 19, columns: int = 43, d: int = 70) -> None:
    x, clean, scale, std = batch(np.random.default_rng(HALVES[dtype]), rows, columns, d, 0.75, 0.5)
    if dtype == "fp16":
        x, clean = (v.astype(np.float16).astype(np.float32) for v in (x, clean))
    else:
        x, clean = (from_bfloat16(bfloat16_bits(v)) for v in (x, clean))
    judge(solve(library, x, clean, scale, std, dtype=HALVES[dtype]), x, clean, scale, std)


REMOVALS = {
    "barrier before a slab is written": Removal(
        "score_select.cuh", "__syncthreads();  // the slab before, or the sums of the tile before, have been read", "",
        "tsan", "two slabs", "data race",
    ),
    "barrier before the sums take the slab's place": Removal(
        "score_select.cuh", "__syncthreads();  // the sums take the place of the last slab", "", "tsan", "tiny", "data race"
    ),
    "barrier before a slab of weights is written": Removal(
        "score_select.cuh", "__syncthreads();  // the slab before has been read", "", "tsan", "prior", "data race"
    ),
    "last row of the noisy ones": Removal(
        "score_select.cuh", "part[i] = r < rows && l < d", "part[i] = l < d", "asan", "tiny", "AddressSanitizer"
    ),
    "last row of the mixture": Removal("score_select.cuh", "if (r < m.rows && l < m.d) ", "", "asan", "tiny", "AddressSanitizer"),
    "a weight of 0": Removal("score_select.cuh", "if (weight != 0.0f) {", "{", "plain", "tiny", "Not equal"),
    "rows of x with NaN": Removal(
        "score_select.cuh", "if (broken && !finite(part[i])) atomicOr(&broken[r], 1);", "", "plain", "tiny", "isnan(found[broken])"
    ),
    "last row of the partials": Removal(
        "score_select.cuh", "if (row >= p.rows) return;", "", "ptx", "tiny", "out of bounds"
    ),
}  # fmt: skip
