"""What is particular to score_select on the fibers: its random words, half types, and that a batch may be cut anywhere."""

import ctypes

import numpy as np
import pytest
import simt_host
from score_select import CASES, ENTRY, HALVES, OFFSET, philox, run_half, solve

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))


@pytest.fixture(scope="module")
def library():
    return simt_host.load(simt_host.build(ENTRY))


def words_of(library, seed: int, row: int, group: int) -> list[int]:
    words = np.zeros(4, np.uint32)
    library.score_select_words(
        ctypes.c_uint64(seed), ctypes.c_uint64(row), ctypes.c_uint32(group), words.ctypes.data_as(ctypes.c_void_p)
    )
    return words.tolist()


def test_words(library):
    assert words_of(library, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the authors' known answer
    rng = np.random.default_rng(0)
    for seed, row, group in rng.integers(0, 2**63, (50, 3)).tolist():
        expected = philox(seed, np.array([row]), 4 * (group >> 33) + np.arange(4))[0]
        assert words_of(library, seed, row, group >> 33) == expected.tolist()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types(library, dtype):
    simt_host.schedule(library, "random")
    run_half(library, dtype)


@pytest.mark.parametrize("case", ["ddpm", "tiny"])
def test_a_batch_may_be_cut_anywhere(library, case):
    x, clean, scale, std = CASES[case](np.random.default_rng(0))
    simt_host.schedule(library, "reverse")
    whole = solve(library, x, clean, scale, std)
    for first in (1, len(x) // 2):
        part = solve(library, x[first:], clean, scale[first:], std[first:], offset=OFFSET + first)
        for name in ("index", "p", "log_normalizer", "drawn_normalizer"):
            assert getattr(part, name).tobytes() == getattr(whole, name)[first:].tobytes()
