"""psel, psel_sample and psel_mix in Triton's interpreter: numbers against float64, the noise to the bit, hard cases, and that nothing but
a row itself decides its answer. Tensor cores are played by cut operands."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

import ltkernels
from ltkernels.triton import score_select as backend
from ltkernels.triton import score_select_kernels as kernels

INF, NAN = math.inf, math.nan
SEED, OFFSET = 0x0123456789ABCDEF, 2**32 - 3  # rows on both sides of a carry between the words of the counter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of the inf and NaN that the hard cases are made of


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    """The interpreter multiplies in float32, whatever precision is asked for. Here operands lose what tf32 has no room for."""

    def cut(x):
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if x.dtype == np.float32 else x

    def create_dot(self, a, b, d, precision, *_):
        a, b = a.data, b.data
        high = cut(a), cut(b)
        product = np.matmul(*high, dtype=np.float32)
        if precision == ir.INPUT_PRECISION.TF32x3:
            product = np.matmul(high[0], cut(b - high[1])) + np.matmul(cut(a - high[0]), high[1]) + product
        else:
            assert precision == ir.INPUT_PRECISION.TF32
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


# ---- what is right


def philox(seed, row, group):
    """Philox4x32-10 in Python's integers, (rows, groups, 4)."""
    low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    row, group = np.broadcast_arrays(np.asarray(row, np.uint64)[:, None], np.asarray(group, np.uint64)[None, :])
    counter = [group & mask, row & mask, row >> low, row * np.uint64(0)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> low) ^ counter[1] ^ np.uint64(key[0]), second & mask,
            (first >> low) ^ counter[3] ^ np.uint64(key[1]), first & mask,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, -1).astype(np.uint32)


def gumbel(words):
    """float64"""
    return -np.log(-np.log(((words >> 8) + 0.5) * 2.0**-24))


def noise(seed, first_row, n_rows, n_columns):
    words = philox(seed, first_row + np.arange(n_rows), np.arange(-(-n_columns // 4)))
    return torch.from_numpy(gumbel(words.reshape(n_rows, -1)[:, :n_columns]))


def logits(x, clean, scale, std, log_prior):
    """(B, K) float64; NaN for a row of x with NaN or inf."""
    x, clean, scale, std = x.double(), clean.double(), scale.double()[:, None], std.double()[:, None]
    distance = (x[:, None] - scale[:, :, None] * clean).square().sum(2)
    value = -distance / (2 * std * std) + (0 if log_prior is None else log_prior.double())
    value[:, ~clean.isfinite().all(1)] = -INF
    value[~x.isfinite().all(1)] = NAN
    return value


# ---- cases


def gauss(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def spoil(rows_of, rows):
    rows_of = rows_of.clone()
    for row, value in rows.items():
        rows_of[row, -1] = value
    return rows_of


def noisy(n_rows, n_columns, d, std, scale=1.0, prior=False):
    """x made of rows of clean, as in training: (x, clean, scale, std, log_prior)."""
    clean, std = gauss(n_columns, d), torch.as_tensor(std, dtype=torch.float32).expand(n_rows).contiguous()
    scale = torch.as_tensor(scale, dtype=torch.float32).expand(n_rows).contiguous()
    x = scale[:, None] * clean[torch.arange(n_rows) * 7 % n_columns] + std[:, None] * gauss(n_rows, d, seed=1)
    return x, clean, scale, std, gauss(n_columns, seed=2).log_softmax(0) if prior else None


def changed(case, **changes):
    return tuple(changes.get(name, value) for name, value in zip(("x", "clean", "scale", "std", "log_prior"), case, strict=True))


T = (torch.arange(1, 41) / 41) ** 2
PLAIN = noisy(20, 70, 9, 1.0)
SOME = gauss(70, seed=2)
CASES = {
    "d = 1": noisy(5, 9, 1, 0.5),
    "one column": noisy(5, 1, 4, 0.5),
    "one row": noisy(1, 130, 4, 0.5),
    "ragged tiles, with a prior": noisy(37, 259, 17, 1.5, 0.8, prior=True),
    "diffusion, all times": noisy(40, 40, 12, T.sqrt(), (1 - T).sqrt(), prior=True),
    "EDM, std from .002 to 80": noisy(20, 60, 6, torch.logspace(math.log10(0.002), math.log10(80), 20), prior=True),
    "duplicates": changed(PLAIN, clean=gauss(3, 9).repeat(24, 1)[:70]),
    "scale 0": noisy(6, 70, 9, 1.0, 0.0, prior=True),
    "std .01 of 3072 coordinates": noisy(24, 20, 3072, 0.01),
    "far from the origin": changed(PLAIN, x=PLAIN[0] + 1e4, clean=PLAIN[1] + 1e4),
    "clean with NaN and inf": changed(PLAIN, clean=spoil(PLAIN[1], {0: NAN, 9: INF, 69: -INF})),
    "clean with NaN and inf, scale 0": changed(PLAIN, clean=spoil(PLAIN[1], {0: NAN, 9: INF}), scale=torch.zeros(20)),
    "x with NaN and inf": changed(PLAIN, x=spoil(PLAIN[0], {0: NAN, 9: INF, 19: -INF})),
    "both": changed(PLAIN, x=spoil(PLAIN[0], {3: NAN, 9: INF}), clean=spoil(PLAIN[1], {3: NAN, 9: INF})),
    "a prior of 0 here and there": changed(PLAIN, log_prior=SOME.masked_fill(SOME > 0, -INF)),
    "a prior of 0 everywhere": changed(PLAIN, log_prior=torch.full((70,), -INF)),
    "nothing left": changed(PLAIN, clean=torch.full((70, 9), NAN)),
    "values of 1e18": changed(PLAIN, x=PLAIN[0] * 1e18, clean=PLAIN[1] * 1e18, std=PLAIN[3] * 1e18),
    "values of 1e-18": changed(PLAIN, x=PLAIN[0] * 1e-18, clean=PLAIN[1] * 1e-18, std=PLAIN[3] * 1e-18),
    "float16": changed(PLAIN, x=PLAIN[0].half(), clean=PLAIN[1].half()),
    "bfloat16": changed(PLAIN, x=PLAIN[0].bfloat16(), clean=PLAIN[1].bfloat16()),
}


def same(a, b):
    """To the bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7e37), b.nan_to_num(nan=7e37))


def rounding(case, true):
    """What float32 leaves of a logit that is a sum of squares. A sum that is not compensated is off by 7 units of 2^-24, not 2."""
    largest = true.where(true.isfinite(), 0).amax(1).abs()
    return 1e-5 + 2.5 * 2.0**-24 * largest


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    n_rows, n_columns = len(case[0]), len(case[1])
    true = logits(*case)
    expected = true.logsumexp(1)
    p, log_normalizer = backend.psel(*case)
    assert p.dtype == log_normalizer.dtype == torch.float32 and p.shape == (n_rows, n_columns)
    finite = expected.isfinite()
    error = (log_normalizer - expected).abs()[finite]
    assert (error <= rounding(case, true)[finite]).all() and (error <= 1e-3).logical_or(expected[finite].abs() > 1e4).all()
    assert same(log_normalizer[~finite], expected[~finite].float())  # -inf and NaN
    assert ((p - true.softmax(1)).abs()[finite] <= 2 * rounding(case, true)[finite, None]).all()
    assert p[~finite].isnan().all()
    torch.testing.assert_close(p[finite].sum(1), torch.ones(int(finite.sum())), rtol=0, atol=1e-6)

    index, again = backend.psel_sample(*case, torch.tensor([SEED]), OFFSET)
    assert same(again, log_normalizer) and index.dtype == torch.int64
    assert (index[~finite] == -1).all()
    perturbed = (true + noise(SEED, OFFSET, n_rows, n_columns))[finite]
    best = perturbed.topk(min(2, n_columns), 1)
    clear = best.values[:, 0] - best.values[:, -1] > 1e-3 if n_columns > 1 else torch.ones(len(best.values), dtype=torch.bool)
    assert torch.equal(index[finite][clear], best.indices[clear, 0])
    assert clear.float().mean() > 0.9 or not finite.any()
    chosen = perturbed.gather(1, index[finite][:, None])[:, 0]
    assert (best.values[:, 0] - chosen <= 1e-3).all()


def test_squares_beyond_float32():
    """Infinitely far, all of them."""
    x, clean, scale, std, _ = PLAIN
    p, log_normalizer = backend.psel(x * 1e25, clean * 1e25, scale, std, None)
    index, _ = backend.psel_sample(x * 1e25, clean * 1e25, scale, std, None, torch.tensor([SEED]), 0)
    assert p.isnan().all() and (log_normalizer == -INF).all() and (index == -1).all()


@pytest.mark.parametrize("gate", ["full", "t2h"])
def test_of_the_package(gate):
    """The public functions reach these kernels, a batch cut in two included."""
    x, clean, scale, std, log_prior = CASES["diffusion, all times"]
    noisy = dict(scale=scale, std=std, log_prior=log_prior)
    gated = dict(gate=gate, labels=torch.arange(40) % 3, class_counts=torch.tensor([50, 20, 5])) if gate != "full" else {}
    answers = {}
    for name in ("triton", "reference"):
        with ltkernels.backend(name):
            chosen = ltkernels.score_select(x, clean, scale, std, log_prior=log_prior, seed=SEED, row_offset=7, **gated)
            answers[name] = ltkernels.p_sel(x, clean, **noisy), ltkernels.posterior_mean(x, clean, **noisy), *chosen
    for a, b in zip(*answers.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# ---- the noise


@triton.jit
def words_kernel(seed, row, group, out):
    r, g = tl.arange(0, 8), tl.arange(0, 16)
    at = (r[:, None] * 16 + g[None, :]) * 4
    a, b, c, d = kernels._words(seed, tl.load(row + r), tl.load(group + g))
    tl.store(out + at, a)
    tl.store(out + at + 1, b)
    tl.store(out + at + 2, c)
    tl.store(out + at + 3, d)


@triton.jit
def gumbel_kernel(word, out):
    at = tl.arange(0, 64)
    tl.store(out + at, kernels._gumbel(tl.load(word + at)))


def words(seed, row, group):
    out = torch.empty(8, 16, 4, dtype=torch.uint32)
    words_kernel[(1,)](torch.tensor([seed]), torch.tensor(row), torch.tensor(group), out)
    return out.numpy()


def test_known_answer():
    """Of the authors of Philox, for a counter and a key of zeros."""
    answer = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, [0], [0]).tolist() == [[answer]]
    assert words(0, [0] * 8, [0] * 16)[0, 0].tolist() == answer


def test_words():
    rows = [0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**40, 2**62]
    groups = [*range(14), 2**29, 2**29 - 1]
    for seed in (0, SEED, 2**63 - 1, -1, -(2**63)):
        assert np.array_equal(words(seed, rows, groups), philox(seed % 2**64, rows, groups))


def test_gumbel():
    """Accurate at both ends: float32 has no number between the largest u and 1."""
    word = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    word[:9] = [0, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 257, 2**32 - 2**26, 2**32 - 2**26 - 256]
    word[9:30] = 2**32 - 1 - 256 * 2 ** np.arange(21)
    out = torch.empty(64)
    gumbel_kernel[(1,)](torch.from_numpy(word), out)
    assert np.abs(out.numpy() - gumbel(word)).max() < 4e-6


def test_draws_follow_p():
    """The share of each column among 2048 equal rows."""
    x, clean, scale, std, log_prior = noisy(1, 8, 3, 2.0, prior=True)
    p, _ = backend.psel(x, clean, scale, std, log_prior)
    rows = 2048
    many = x.expand(rows, 3).contiguous(), clean, scale.repeat(rows), std.repeat(rows), log_prior
    index, _ = backend.psel_sample(*many, torch.tensor([5]), 0)
    drawn = torch.bincount(index, minlength=8)
    assert ((drawn - rows * p[0]).square() / (rows * p[0])).sum() < 24.3  # chi^2, 7 degrees of freedom, 1 in 1000


@triton.jit
def silence(word):
    return (word >> 8).to(tl.float32) * 0.0


def test_ties_go_to_the_lower_column(monkeypatch):
    monkeypatch.setattr(kernels, "_gumbel", silence)
    case = changed(PLAIN, clean=gauss(1, 9).repeat(300, 1))
    assert (backend.psel_sample(*case, torch.tensor([SEED]), 0)[0] == 0).all()


# ---- what an answer depends on


def both(case, row_offset=OFFSET):
    return [*backend.psel(*case), *backend.psel_sample(*case, torch.tensor([SEED]), row_offset)]


def test_rows_do_not_depend_on_their_batch():
    case = CASES["ragged tiles, with a prior"]
    x, clean, scale, std, log_prior = case
    whole = both(case)
    for part in (slice(0, 1), slice(1, 20), slice(20, 37)):
        alone = both((x[part].contiguous(), clean, scale[part], std[part], log_prior), OFFSET + part.start)
        assert all(same(a, b[part]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize(
    "name, value",
    {
        "_tile_rows": lambda *_: 8,
        "_chunks": lambda n, *_: [slice(first, min(first + 16, n)) for first in range(0, n, 16)],
        "SLAB": 4 * 32 * 128,
    }.items(),
)
def test_bits_do_not_depend_on_how_the_work_is_split(monkeypatch, name, value):
    case = CASES["ragged tiles, with a prior"]
    launches = []
    whole = both(case)
    monkeypatch.setattr(backend, name, value)
    score = backend._score
    monkeypatch.setattr(backend, "_score", type("Counted", (), {"__getitem__": lambda _, grid: launches.append(grid) or score[grid]})())
    assert all(same(a, b) for a, b in zip(both(case), whole, strict=True))
    assert launches[: len(launches) // 2] == {"_tile_rows": [(15,)], "_chunks": [(3,)] * 3, "SLAB": [(2,)] * 3}[name]  # of psel


def test_indices_do_not_depend_on_tiles(monkeypatch):
    case = CASES["ragged tiles, with a prior"]
    *_, index, log_normalizer = both(case)
    for columns in (32, 64, 256):
        monkeypatch.setattr(backend, "COLUMNS", columns)
        *_, other, value = both(case)
        assert torch.equal(other, index)
        torch.testing.assert_close(value, log_normalizer, rtol=0, atol=2e-6)


NEAR, WIDE = noisy(9, 300, 16, 0.1), noisy(20, 600, 64, 0.1, prior=True)
ONLY_7 = torch.full((300,), -INF).index_fill(0, torch.tensor(7), 0)
# name: (case, the share of all pairs of a row and a tile in which a logit is left)
SCREENED = {
    "each row its own tile": (WIDE, 1 / 5),
    "float16": (changed(WIDE, x=WIDE[0].half(), clean=WIDE[1].half()), 1 / 5),
    "bfloat16": (changed(WIDE, x=WIDE[0].bfloat16(), clean=WIDE[1].bfloat16()), 1 / 5),
    "all times": (noisy(40, 600, 64, T.sqrt(), (1 - T).sqrt(), prior=True), 0.595),
    "std 1 of 64 coordinates": (noisy(40, 300, 64, 1.0), 1),
    "scale 0": (noisy(6, 300, 16, 0.5, 0.0, prior=True), 1),
    "far from the origin": (changed(WIDE, x=WIDE[0] + 1e4, clean=WIDE[1] + 1e4), 1),
    "one column has all of the prior": (changed(noisy(9, 300, 4, 5.0), log_prior=ONLY_7), 1 / 3),
    "the nearest is no number": (changed(NEAR, clean=spoil(NEAR[1], dict.fromkeys(range(0, 63, 7), NAN))), 17 / 27),
    "nothing left": (changed(NEAR, clean=torch.full((300, 16), NAN)), 0),
    "x with NaN and inf": (changed(NEAR, x=spoil(NEAR[0], {2: NAN, 5: INF})), 7 / 27),
    "squares beyond float32": (changed(NEAR, clean=spoil(NEAR[1], {2: 1e25, 150: -1e25})), 2 / 3),
    "x beyond them": (changed(NEAR, x=spoil(NEAR[0], {2: 1e25})), 8 / 27),
    "std 1e-30": (noisy(9, 300, 16, 1e-30), 1 / 3),
}


@pytest.mark.parametrize(("case", "share"), SCREENED.values(), ids=SCREENED)
def test_screen_changes_no_bit(monkeypatch, case, share):
    kept = []
    monkeypatch.setattr(backend, "Parts", lambda *parts, make=backend.Parts: kept.append(parts[0]) or make(*parts))
    whole = both(case)
    kept.clear()
    monkeypatch.setattr(backend, "SCREENED", 0)
    assert all(same(a, b) for a, b in zip(both(case), whole, strict=True))
    assert (kept[0][:, : len(case[0])] > -INF).float().mean() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("std", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("d", [16, 400])
def test_screen_bounds_every_logit(std, d):
    """Operands cut to tf32, and the error of that far above what is divided by 2 std^2."""
    x, clean, scale, stds, log_prior = noisy(9, 300, d, std, prior=True)
    for more in (0, 3):
        case = x + more, clean + more, scale, stds, log_prior
        square = backend._packed(case[0], 32)[1]
        upper, reach = backend._screened(*case, square, 3)
        true = torch.nn.functional.pad(logits(*case), (0, 84), value=-INF).reshape(9, 3, 128).amax(2)
        assert (upper[:, :9].T >= true).all()
        assert (reach[:9] <= true.amax(1) - 104).all()
        largest = (case[0].norm(dim=1).max() + case[1].norm(dim=1).max()) ** 2 / (2 * std**2)
        assert (upper[:, :9].T - true <= 4e-3 * largest + 1e-3).all() and (true.amax(1) - 105 - reach[:9] <= 4e-3 * largest + 1e-3).all()


def test_small_problems_are_not_screened(monkeypatch):
    sizes = []
    monkeypatch.setattr(backend, "_screened", lambda x, clean, *_: sizes.append(len(clean)) or (None, None))
    for n_columns in (100, 600):
        both(noisy(3, n_columns, 4, 1.0))
    monkeypatch.setattr(backend, "SCREENED", 3 * 600 * 4)
    for n_columns in (100, 599, 600):
        both(noisy(3, n_columns, 4, 1.0))
    assert sizes == [600, 600]


@pytest.mark.parametrize("d", [1, 16, 300, 4096])
def test_error_terms_hold(d):
    """The bound of the screen against tiles rounded as a tf32 tensor core does: cut operands, float32 sums of exact products."""
    alpha, beta, tau, _ = backend._error_terms(d, torch.float32)
    x = torch.cat([gauss(20, d, seed=9), 1e3 * gauss(4, d, seed=8)])
    clean = torch.cat([gauss(60, d), 1e3 * gauss(4, d, seed=5), gauss(60, d) + 30])
    for scale in (0.0, 0.3, 1.0):
        cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, clean)]
        dot = (cut[0][:, None] * cut[1]).sum(2)
        norm_x, norm_z = x.square().sum(1)[:, None], clean.square().sum(1)
        found = norm_x + scale**2 * norm_z - 2 * scale * dot
        true = (x.double()[:, None] - scale * clean.double()).square().sum(2)
        both = norm_x + scale**2 * norm_z
        assert ((found - true).abs() <= alpha * scale * (norm_x * norm_z).sqrt() + beta * both + tau * (1 + scale)).all()


def test_rows_of_a_tile():
    """On a card, which the interpreter is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "INTERPRETED", False)
        assert [backend._tile_rows(n, 4, 132) for n in (64, 512, 4096)] == [2, 2, 8]


@pytest.mark.parametrize("n_rows, n_columns, d", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_empty(n_rows, n_columns, d):
    case = torch.zeros(n_rows, d), torch.zeros(n_columns, d), torch.ones(n_rows), torch.ones(n_rows), None
    p, log_normalizer, index, _ = both(case)
    assert p.shape == (n_rows, n_columns) and index.shape == log_normalizer.shape == (n_rows,)
    if n_columns == 0:
        assert (log_normalizer == -INF).all() and (index == -1).all()
    elif d == 0:
        assert torch.equal(p, torch.full((n_rows, n_columns), 0.2))
    assert torch.equal(backend.psel_mix(torch.zeros(n_rows, n_columns), case[1]), torch.zeros(n_rows, d))


# ---- mixtures


@pytest.mark.parametrize("n_rows, n_columns, d", [(1, 1, 1), (3, 70, 5), (65, 33, 130), (4, 1100, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mix(n_rows, n_columns, d, dtype):
    weight, clean = gauss(n_rows, n_columns, seed=3).softmax(1), gauss(n_columns, d).to(dtype)
    out = backend.psel_mix(weight, clean)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), weight.double() @ clean.double(), rtol=0, atol=1e-6)
    assert same(backend.psel_mix(weight[-1:].contiguous(), clean), out[-1:])


def test_mix_of_what_is_not_finite():
    """No weight, no trace; otherwise what arithmetic says."""
    weight, clean = uniform(5, 40, seed=3), gauss(40, 70)
    clean[3, :2], clean[9, 65], clean[11, 65] = torch.tensor([NAN, INF]), INF, -INF
    weight[:, [3, 9, 11]] = 0
    others = clean.double().nan_to_num(0, 0, 0)
    torch.testing.assert_close(backend.psel_mix(weight, clean).double(), weight.double() @ others, rtol=0, atol=1e-5)
    weight[1, 3], weight[2, 9], weight[3, 9], weight[3, 11], weight[4, 0] = 0.5, -0.5, 0.5, 0.5, NAN
    out = backend.psel_mix(weight, clean)
    assert out[1, 0].isnan() and out[1, 1] == INF and out[2, 65] == -INF and out[3, 65].isnan() and out[4].isnan().all()
    common = torch.ones(5, 70, dtype=torch.bool)
    common[1, :2] = common[2, 65] = common[3, 65] = common[4] = False
    torch.testing.assert_close(out.double()[common], (weight.double() @ others)[common], rtol=0, atol=1e-5)
