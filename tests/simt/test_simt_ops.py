"""The CUDA source of every op, executed on the CPU: several orders of threads, and the host's sanitizers, against float64."""

import importlib
import re

import pytest
import simt_host
from ops import OPS

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))
HARNESS = {op: importlib.import_module(op) for op in OPS}


@pytest.fixture(scope="module")
def libraries():
    return {op: simt_host.load(simt_host.build(harness.ENTRY)) for op, harness in HARNESS.items()}


@pytest.mark.parametrize("op, case", [(op, case) for op, harness in HARNESS.items() for case in harness.CASES])
def test_same_bits_in_every_order(libraries, op, case, covered):
    """Two multiprocessors split the work where it is large enough, so the split is another thing that must not matter."""
    answers = set()
    for i, (order, seed) in enumerate(simt_host.SCHEDULES):
        simt_host.schedule(libraries[op], order, seed)
        answers.add(HARNESS[op].run_case(libraries[op], case, multiprocessors=1 + i % 2))
        covered["runs in some order of threads"] += 1
    assert len(answers) == 1
    covered["shapes on fibers"] += 1


def sanitized(flavour: str, built, op: str, cases: dict[str, int]):
    code = (
        f"import simt_host, {op}, sys; library = simt_host.load(sys.argv[1])\n"
        f"for case, rows in {cases!r}.items(): {op}.run_case(library, case, rows)\n"
        "print('clean')"
    )
    return simt_host.python(flavour, "-c", code, built)


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
@pytest.mark.parametrize("op", OPS)
def test_clean_under(flavour, op, covered):
    cases = HARNESS[op].SANITIZED | (HARNESS[op].ADDRESSES if flavour == "asan" else {})
    simt_host.assert_clean(sanitized(flavour, simt_host.build(HARNESS[op].ENTRY, flavour), op, cases))
    covered[f"shapes under {flavour}"] += len(cases)


def device_code():
    """Whatever a kernel may be made of, outside csrc/simt: no cpu_*.h, which are the CPU's own."""
    sources = [path for path in sorted((simt_host.ROOT / "csrc").rglob("*.*")) if path.suffix in (".cuh", ".cu", ".h")]
    sources = [path for path in sources if path.parent.name != "simt" and not path.name.startswith("cpu_")]
    assert not [path for path in sources if re.search(r"#include.*\bcpu_", path.read_text())]
    assert {f"{op}.cuh" for op in OPS} <= {path.name for path in sources}
    return sources


FORBIDDEN = {  # what the fibers cannot run, or would run as another program than the GPU does
    "branches on the architecture": r"__CUDA_ARCH__|__CUDACC__|__NVCC__|NV_IF_TARGET",
    "launches past simt::launch": r"<<<",
    "raw shared memory": r"__shared__|SIMT_SMEM.*\[",
    "CUB, CUTLASS, Thrust": r"\b(cub|cutlass|cute|thrust)\b",
    "inline PTX": r"\basm\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_device_code_has_no(what):
    for path in device_code():
        found = re.search(FORBIDDEN[what], re.sub(r"//.*|/\*.*?\*/", "", path.read_text()))
        assert not found, f"{path.name}: {found[0]}"


def test_only_simt_branches_on_the_architecture():
    csrc = simt_host.ROOT / "csrc"
    outside = [path for path in csrc.rglob("*.*") if path.parent.name != "simt"]
    assert not [path for path in outside if re.search(r"__CUDA_ARCH__|__CUDACC__", path.read_text())]
    assert not [path for path in (csrc / "simt").glob("*.*") if "ltkernels" in re.sub(r"README|//.*", "", path.read_text()).lower()
                and path.suffix != ".md"]  # fmt: skip


@pytest.mark.parametrize(
    "op, name", [(op, name) for op, harness in HARNESS.items() for name, removal in harness.REMOVALS.items() if removal.flavour != "ptx"]
)
def test_what_is_removed_is_missed(tmp_path, op, name, covered):
    """The kernels' own barriers, waits and guards are needed, and the layer named is the one that notices."""
    removal = HARNESS[op].REMOVALS[name]
    csrc = simt_host.edited(tmp_path, f"{op}/{removal.file}", removal.text, removal.instead)
    built = simt_host.build(HARNESS[op].ENTRY, removal.flavour, csrc=csrc)
    done = sanitized(removal.flavour, built, op, {removal.case: HARNESS[op].SANITIZED.get(removal.case)})
    assert removal.noticed_as in done.stderr, done.stdout[-500:] + done.stderr[-3000:]
    covered["removals from kernels noticed"] += 1
