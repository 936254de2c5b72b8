"""Every Triton kernel of knn and knn_kde, as it would be launched, to a cubin: no spills, shared memory that fits, and the
instructions meant."""
import contextlib

import pytest
import torch

pytest.importorskip("triton")
from launches import SHARED_KIB, compiled, recorded

from ltkernels.triton import knn_kde as backend

MMA = {80: "mma.sync.aligned", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync.aligned"}
# (d, k, dtype, self_index, bound, log_weight): each path of the code once. Rows of 16 bytes go by TMA where there is one, others by pointer
CASES = {
    "plain": (64, 16, torch.float32, False, False, False),
    "everything given": (1024, 64, torch.bfloat16, True, True, True),
    "odd rows, largest k": (39, 256, torch.float16, True, False, False),
}


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A cache hit would hide that a kernel no longer compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def launches(monkeypatch, arch, d, k, dtype, self_index, bound, log_weight):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(backend, "_guard", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(backend, "_config", lambda _, aligned: backend._CONFIGS[arch // 10] if aligned else backend._UNALIGNED)
    monkeypatch.setattr(backend, "_multiprocessors", lambda *_: 132)
    n_queries, n = 4000, 100_000
    arguments = (
        meta(n_queries, d, dtype=dtype), meta(n, d, dtype=dtype), meta(d), meta(n, d), meta(n),
        meta(n_queries, dtype=torch.int64) if self_index else None, meta(n_queries) if bound else None,
        k, meta(n_queries), meta(n) if log_weight else None,
    )  # fmt: skip
    return recorded(monkeypatch, lambda: backend.knn_kde(*arguments))


@pytest.mark.parametrize("arch", MMA)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_without_spills(monkeypatch, arch, case):
    found = launches(monkeypatch, arch, *case)
    assert {launch.name for launch in found} == {"_rows", "_columns", "_filter", "_merge", "_select", "_density"}
    assert len(found) == 8  # _select has three sources
    for launch in found:
        kernel = compiled(launch, arch)
        fact = f"{launch.name}: {kernel.registers} registers, {kernel.stack} B stack, {kernel.spills} spills, {kernel.shared} B shared"
        assert (kernel.stack, kernel.spills) == (0, 0), fact
        assert kernel.shared <= SHARED_KIB[arch] * 1024, fact
        if launch.name == "_filter":
            assert MMA[arch] in kernel.ptx
            by_tma = arch >= 90 and case[0] % 4 == 0
            assert ("UTMALDG" in kernel.sass) == by_tma
            assert "LDGSTS" in kernel.sass or by_tma
