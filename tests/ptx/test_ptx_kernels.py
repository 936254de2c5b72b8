"""nvcc's own output, executed: every wrapper of ptx.h, every kernel of every op, and the planted bugs."""

import importlib
import sys

import nvcc_ptx
import pytest
from interpreter import Fault
from nvcc_ptx import simt_host
from ops import OPS

sys.path.insert(0, str(simt_host.HERE))

import micro  # noqa: E402
import planted  # noqa: E402

pytestmark = pytest.mark.skipif(nvcc_ptx.missing() is not None, reason=str(nvcc_ptx.missing()))
HARNESS = {op: importlib.import_module(op) for op in OPS}
ARCHS = (80, 90)


@pytest.fixture(scope="module")
def libraries():
    return {entry: simt_host.load(simt_host.build(entry)) for entry in [micro.ENTRY, planted.ENTRY, *(h.ENTRY for h in HARNESS.values())]}


def region(*arrays):
    return [(a.ctypes.data, a.nbytes) for a in arrays]


def run_micro(module, library, kernel):
    given = micro.inputs(kernel)
    with nvcc_ptx.launches_on(module, library, lambda: library.regions) as launched:
        answer = micro.run(library, kernel, given)
    assert len(launched) == 1 and kernel in launched[0]
    micro.judge(kernel, given, *answer)


@pytest.mark.parametrize("kernel", micro.KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_micro(libraries, arch, kernel, covered):
    run_micro(nvcc_ptx.module(micro.ENTRY, arch), libraries[micro.ENTRY], kernel)
    covered["kernels run from PTX"] += 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_op(libraries, op, arch, covered):
    """Together, the op's tiny cases launch every kernel that its module has."""
    harness, library, module = HARNESS[op], libraries[HARNESS[op].ENTRY], nvcc_ptx.module(HARNESS[op].ENTRY, arch)
    seen = set()
    for case, rows in harness.TINY.items():
        with nvcc_ptx.launches_on(module, library, lambda: library.regions) as launched:
            harness.run_case(library, case, rows)
        seen |= set(launched)
        covered["shapes on PTX"] += 1
    for dtype in harness.HALVES:
        with nvcc_ptx.launches_on(module, library, lambda: library.regions) as launched:
            harness.run_half(library, dtype, **harness.TINY_HALF)
        seen |= set(launched)
    assert seen == set(module.entries)
    covered["kernels run from PTX"] += len(seen)


def test_swapped_operands_are_noticed(tmp_path, libraries):
    """The host twin of a wrapper stays right whatever its asm says: only what nvcc emits tells."""
    csrc = simt_host.edited(tmp_path, "simt/ptx.h", "{%4,%5,%6,%7}", "{%5,%4,%6,%7}")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        run_micro(nvcc_ptx.module(micro.ENTRY, 80, csrc), libraries[micro.ENTRY], "mma_tf32")


@pytest.mark.parametrize(
    "op, name", [(op, name) for op, harness in HARNESS.items() for name, removal in harness.REMOVALS.items() if removal.flavour == "ptx"]
)
def test_what_is_removed_is_missed(tmp_path, libraries, op, name, covered):
    """Here a wild address is one that no array has, however far it jumps; a sanitizer sees the edges of arrays only."""
    removal, harness, library = HARNESS[op].REMOVALS[name], HARNESS[op], libraries[HARNESS[op].ENTRY]
    module = nvcc_ptx.module(harness.ENTRY, 80, simt_host.edited(tmp_path, f"{op}/{removal.file}", removal.text, removal.instead))
    with pytest.raises(Fault, match=removal.noticed_as), nvcc_ptx.launches_on(module, library, lambda: library.regions):
        harness.run_case(library, removal.case, harness.TINY[removal.case])
    covered["removals from kernels noticed"] += 1


CAUGHT = {  # bug -> what the interpreter says; threads in lock step show no race, but what a race would spoil
    "DivergentBarrier": "Fault",
    "EarlyReturn": "Fault",
    "MissingWait": "wrong numbers",
    "SharedOutOfBounds": "Fault",
    "GlobalOutOfBounds": "Fault",
    "OutOfMaskShuffle": "Fault",
    "NonAtomicCounter": "wrong numbers",
    "MisalignedVector": "Fault",
    "TooLittleShared": "Fault",
    "UninitialisedShared": "wrong numbers",
}


def verdict(module, library, bug: str) -> str:
    given = planted.arrays()
    try:
        with nvcc_ptx.launches_on(module, library, lambda: region(*given)):
            error = planted.launch(library, planted.BUGS.index(bug), given)
            if error:
                raise RuntimeError(error)
    except Fault as fault:
        return f"Fault: {fault}"
    return planted.wrong(given)


@pytest.mark.parametrize("bug", planted.BUGS)
def test_planted(libraries, bug, covered):
    found = verdict(nvcc_ptx.module(planted.ENTRY, 80), libraries[planted.ENTRY], bug)
    assert CAUGHT[bug] in found if bug in CAUGHT else found == ""
    covered["planted bugs caught in PTX"] += bug in CAUGHT
