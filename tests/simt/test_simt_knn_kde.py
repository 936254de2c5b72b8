"""What is particular to knn_kde on the fibers: its options, and which rung of the search answered."""

import ctypes

import numpy as np
import pytest
import simt_host
from knn_kde import ENTRY, HALVES, clusters, duplicates, gaussian, judge, run_half, solve

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))


@pytest.fixture(scope="module")
def library():
    return simt_host.load(simt_host.build(ENTRY))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types(library, dtype):
    simt_host.schedule(library, "random")
    run_half(library, dtype)


def test_self_index_weights_bound_and_chunks(library):
    rng = np.random.default_rng(3)
    points = gaussian(rng, 1, 1500, 8)[1]
    queries = points[:40].copy()
    options = dict(
        self_index=np.arange(40),
        log_weight=rng.standard_normal(1500).astype(np.float32),
        bandwidth=np.linspace(0.1, 2, 40, dtype=np.float32),
    )
    simt_host.schedule(library, "forward")
    plain = solve(library, queries, points, 50, **options)
    judge(plain, queries, points, 50, **options)
    assert solve(library, queries, points, 50, chunk=16, **options).bits() == plain.bits()
    # The tightest bound there is, a loose one, and none: a bound prunes and nothing else.
    tight = plain.sqdist[:, -1]
    simt_host.schedule(library, "random")
    for bound in (tight, tight * 4, np.where(np.arange(40) % 2, tight, np.float32(np.inf))):
        bounded = solve(library, queries, points, 50, bound=bound.astype(np.float32), multiprocessors=2, **options)
        assert bounded.bits() == plain.bits()
    options["self_index"] = np.where(np.arange(40) % 3 == 0, -1, np.arange(40))
    judge(solve(library, queries, points, 50, **options), queries, points, 50, **options)


def test_which_rung_answered(library):
    rng = np.random.default_rng(0)
    simt_host.schedule(library, "forward")
    easy = solve(library, *gaussian(rng, 20, 2000, 32), 64)
    assert easy.paths.tolist() == [0, 0]
    clustered = solve(library, *clusters(rng, 6, 6000, 64, 5, 4, 0.05), 64)  # too tight for tf32, not for 3xTF32
    assert clustered.paths.tolist() == [6, 0]
    equal = solve(library, *duplicates(rng, 5, 6000), 64)
    assert equal.paths.tolist() == [5, 5]


def test_overflow_under_a_split_bank(library):
    queries, points = duplicates(np.random.default_rng(1), 3, 9000)
    simt_host.schedule(library, "reverse")
    judge(solve(library, queries, points, 64, multiprocessors=3), queries, points, 64)


def test_more_neighbours_than_rows(library):
    """Only a caller of the raw operator can ask for it: the places left over are nobody's, infinitely far."""
    queries, points = gaussian(np.random.default_rng(2), 5, 5, 3)
    simt_host.schedule(library, "random")
    answer = solve(library, queries, points, 5, self_index=np.arange(5))
    assert (answer.index[:, 4] == -1).all() and np.isposinf(answer.sqdist[:, 4]).all()
    assert (answer.index[:, :4] >= 0).all() and np.isfinite(answer.log_density).all() and np.isfinite(answer.score).all()


def test_many_queries_over_parts_of_a_bank(library):
    """More than one block of `collect`, tiles times parts, and two tiles on the second rung."""
    points = gaussian(np.random.default_rng(4), 1, 1, 3)[1].repeat(2100, 0)
    simt_host.schedule(library, "reverse")
    options = dict(self_index=np.arange(300))
    answer = solve(library, points[:300], points, 9, multiprocessors=6, **options)
    assert answer.paths.tolist() == [300, 300]
    judge(answer, points[:300], points, 9, **options)
    close = clusters(np.random.default_rng(5), 140, 3000, 64, 5, 4, 0.05)
    answer = solve(library, *close, 64)
    assert answer.paths.tolist() == [140, 0]
    judge(answer, *close, 64)


def test_a_broken_query_that_is_a_row_of_the_bank(library):
    """It answers the lowest rows, its own left out: one more of them has to be looked at."""
    queries, points = gaussian(np.random.default_rng(6), 3, 30, 5)
    queries[1] = np.nan
    options = dict(self_index=np.array([-1, 2, 0]))
    simt_host.schedule(library, "forward")
    judge(solve(library, queries, points, 7, **options), queries, points, 7, **options)


def bound_of(library, d: int, terms: int) -> np.ndarray:
    bound = np.zeros(4, np.float32)
    library.knn_kde_error_bound(d, terms, bound.ctypes.data_as(ctypes.c_void_p))
    return bound.astype(np.float64)


@pytest.mark.parametrize("d", [1, 16, 300, 4096])
def test_error_bound_covers_its_derivation(library, d):
    """Each term at least what it is made of: the operands' rounding, sums that tensor cores truncate (2^-23 each, 10 a step of 8), f's own
    rounding, underflow. Truncation to this extent shows on no CPU, so the terms are compared with what hardware may do at worst."""
    steps, u = -(-d // 8), 2.0**-24
    f = (-(-d // 32) + 8) * u
    operands = {1: 2.0**-11 + 2.0**-10, 3: 3 * 2.0**-22}  # the query's rounded, the bank's truncated
    sums = {1: 10 * steps * 2.0**-23, 3: 10 * 2.0**-23 + steps * u}
    for terms in (1, 3):
        cross, own, query, tiny = bound_of(library, d, terms)
        assert cross >= 2 * (operands[terms] + sums[terms]) + 2 * f
        assert own >= f + u and query >= 2 * f + u and tiny >= d * 2.0**-126


@pytest.mark.parametrize("d", [1, 16, 300, 4096])
@pytest.mark.parametrize("terms", [1, 3])
def test_error_bound_holds(library, d, terms):
    """Keys of a tensor core that cuts its operands to tf32, after the query's are rounded, and truncates every sum, on rows that point the
    same way, so that nothing cancels; f as the kernels sum it."""
    rng = np.random.default_rng(d)
    queries, points = (np.abs(rng.standard_normal((rows, d))).astype(np.float32) for rows in (4, 60))
    cut = lambda x: (x.view(np.uint32) & 0xFFFFE000).view(np.float32)  # noqa: E731
    high = cut((queries.view(np.uint32) + 0x1000).view(np.float32)), cut((points.view(np.uint32) + 0x1000).view(np.float32))
    rest = cut(queries - high[0]), cut(points - high[1])
    pairs = [(high[0], cut(points))] if terms == 1 else [(rest[0], high[1]), (high[0], rest[1]), high]
    total = np.zeros((4, 60), np.float32)
    for first in range(0, d, 8):
        step = total.astype(np.float64) if terms == 1 else np.zeros((4, 60))
        for a, b in pairs:
            step = truncated(step + a[:, first : first + 8].astype(np.float64) @ b[:, first : first + 8].astype(np.float64).T)
        total = step.astype(np.float32) if terms == 1 else (total + step.astype(np.float32)).astype(np.float32)
    sqnorm = (points.astype(np.float64) ** 2).sum(1).astype(np.float32)
    key = sqnorm - 2 * total.astype(np.float64)
    q2 = (queries.astype(np.float64) ** 2).sum(1)[:, None]
    true = ((queries[:, None].astype(np.float64) - points) ** 2).sum(2) - q2
    q, c = np.sqrt(q2), np.sqrt(sqnorm.astype(np.float64))
    cross, own, query, tiny = bound_of(library, d, terms)
    error = np.abs(key - true)
    assert (error <= cross * q * c + own * c**2 + query * q2 + tiny * (1 + q + c)).all()
    assert (error > 0.01 * cross * q * c).any()  # not so loose that this could not fail


def truncated(x: np.ndarray) -> np.ndarray:
    """To float32, towards zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near).astype(np.float64)
