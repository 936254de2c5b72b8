"""Every kernel of csrc/<op>/<op>_cuda.cu, compiled for every architecture, keeps the rules of expected.py."""

import cubins
import pytest
from expected import EXPECTED
from ops import OPS
from rules import faults, unmatched
from sass import ARCHS

pytestmark = pytest.mark.usefixtures("needs_nvcc")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_keep_the_rules(op, arch, cover):
    if arch not in cubins.known_archs():
        pytest.skip(f"nvcc {cubins.toolkit().version} does not know sm_{arch}")
    kernels = cubins.cuda_kernels(op)[arch]
    cover(kernels)
    assert not faults(kernels, EXPECTED[op].cuda)
    assert not unmatched(kernels, EXPECTED[op].cuda)
