"""What is particular to pairwise_pcl on the fibers: half types, a loss without its gradient, and that a batch may be cut anywhere."""

import numpy as np
import pairwise_pcl
import pytest
import simt_host
from pairwise_pcl import CASES, ENTRY, HALVES, run_half, solve

from ltkernels.reference import PCL_FORMS

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))


@pytest.fixture(scope="module")
def library():
    return simt_host.load(simt_host.build(ENTRY))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_types(library, dtype):
    simt_host.schedule(library, "random")
    run_half(library, dtype)


def test_numbers_of_the_forms():
    """What run_case takes them for is what Python calls them."""
    assert [getattr(pairwise_pcl, name.upper()) for name in PCL_FORMS] == list(range(len(PCL_FORMS)))


def same(found, expected, names: str, first: int = 0) -> None:
    for name in names.split():
        assert getattr(found, name).tobytes() == getattr(expected, name)[first:].tobytes(), name


@pytest.mark.parametrize("case", ["exponential", "broken, other"])
def test_the_loss_alone(library, case):
    b = CASES[case](np.random.default_rng(0))
    simt_host.schedule(library, "forward")
    same(solve(library, b._replace(grad=False)), solve(library, b), "row pairs")


@pytest.mark.parametrize("case", ["hinge, other", "tiny"])
def test_a_batch_may_be_cut_anywhere(library, case):
    b = CASES[case](np.random.default_rng(0))
    simt_host.schedule(library, "reverse")
    whole = solve(library, b)
    for first in (1, len(b.mu) // 2):
        rows = {name: getattr(b, name) for name in ("mu", "labels", "weight", "margin", "group")}
        part = b._replace(**{name: None if value is None else value[first:] for name, value in rows.items()})
        same(solve(library, part), whole, "row pairs active mu_grad sqdist", first)
