"""What is particular to knn_kde on the fibers: its options, and which rung of the search answered."""

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
