"""Every Triton kernel, as it would be launched, compiled for every architecture, keeps the rules of expected.py."""

import pytest

pytest.importorskip("triton")
from expected import EXPECTED
from launches import launches_of, triton_kernels
from ops import OPS
from rules import faults, unmatched
from sass import ARCHS

pytestmark = pytest.mark.usefixtures("needs_triton")
VARIANTS = [(op, variant) for op in OPS for variant in EXPECTED[op].variants]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op, variant", VARIANTS)
def test_kernels_keep_the_rules(op, variant, arch, cover):
    kernels, failed = triton_kernels(op, variant)[arch]
    cover(kernels)
    assert not failed
    assert not faults(kernels, EXPECTED[op].triton)


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_of_the_table_was_launched(op):
    kernels = [kernel for variant in EXPECTED[op].variants for found, _ in triton_kernels(op, variant).values() for kernel in found]
    assert not unmatched(kernels, EXPECTED[op].triton)


@pytest.mark.parametrize("op", OPS)
def test_kernels_can_be_launched_twice(op):
    """A launch compares the globals that the kernel was compiled with to what they are now: NaN is not equal to itself."""
    for fn in {launch.fn for variant in EXPECTED[op].variants for launch in launches_of(op, variant, ARCHS[0])}:
        assert fn.cache_key  # finds the globals
        changed = {name: value for (name, _), (value, now) in fn.used_global_vals.items() if now[name] != value}
        assert not changed, f"{fn.fn.__name__}: {changed}"
