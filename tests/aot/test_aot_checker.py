"""The inspection finds what it is there to find: each planted fault, and nothing in the same code without it."""

import importlib.util
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cubins
import pytest
import torch
from expected import MMA
from rules import Needs, faults, unmatched, violations
from sass import ARCHS, Kernel, kernels, looped, parsed

IN_LOOP = {arch: ("HMMA", "LDGSTS") for arch in ARCHS}
CUDA = """
#include "csrc/simt/simt.h"
namespace planted {

struct Small { float tile[512]; };
struct Crowded { float tile[30 * 1024]; };  // 120 KiB: one block
struct Vast { float tile[60 * 1024]; };  // 240 KiB: no card

__device__ void copy(float* tile, const float* in) {
  ptx::cp_async<16>(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

__device__ void multiply(float (&c)[4], const float* tile) {
  uint32_t a[4], b[2];
  for (int e = 0; e < 4; ++e) a[e] = __float_as_uint(tile[threadIdx.x + 64 * e]);
  for (int e = 0; e < 2; ++e) b[e] = __float_as_uint(tile[threadIdx.x + 64 * e + 32]);
  ptx::mma_tf32(c, a, b);
}

template <class Shared, bool kCopyInLoop, bool kMultiplyInLoop>
__global__ void __launch_bounds__(128, 2) filter(float* out, const float* in, int n) {
  SIMT_SMEM_DYNAMIC(Shared, sm);
  float c[4] = {};
  if (!kCopyInLoop) copy(sm.tile, in);
  for (int i = 0; i < n; ++i) {
    if (kCopyInLoop) copy(sm.tile, in + 512 * i);
    if (kMultiplyInLoop) multiply(c, sm.tile);
    c[0] += sm.tile[i % 512];
    __syncthreads();
  }
  if (!kMultiplyInLoop) multiply(c, sm.tile);
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
template __global__ void filter<Small, true, true>(float*, const float*, int);
template __global__ void filter<Small, true, false>(float*, const float*, int);
template __global__ void filter<Small, false, true>(float*, const float*, int);
template __global__ void filter<Crowded, true, true>(float*, const float*, int);
template __global__ void filter<Vast, true, true>(float*, const float*, int);

__global__ void __launch_bounds__(128, 12) spills(float* out, const float* in, int n) {  // 40 registers for 96 sums
  float sum[96] = {};
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int e = 0; e < 96; ++e) sum[e] = sum[e] * in[i] + in[e];
  }
#pragma unroll
  for (int e = 0; e < 96; ++e) out[e * 128 + threadIdx.x] = sum[e];
}

__global__ void __launch_bounds__(128) indexes(float* out, const int* at, int n) {
  float local[32];
  for (int i = 0; i < 32; ++i) local[i] = out[i];
  for (int i = 0; i < n; ++i) local[at[i] & 31] += 1.0f;
  out[threadIdx.x] = local[at[n] & 31];
}

__global__ void __launch_bounds__(128) unstated(float* out) {
  SIMT_SMEM_DYNAMIC(Small, sm);
  sm.tile[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = sm.tile[127 - threadIdx.x];
}

}  // namespace planted
"""
TABLE = {
    "filter<Small": Needs(IN_LOOP, dynamic="Small"),
    "filter<Crowded": Needs(IN_LOOP, dynamic="Crowded"),
    "filter<Vast": Needs(IN_LOOP, dynamic="Vast"),
    **dict.fromkeys(("spills", "indexes", "unstated"), Needs()),
}
FOUND = {
    "filter<Small, true, true>": [],
    "filter<Small, true, false>": ["no HMMA in a loop"],
    "filter<Small, false, true>": ["no LDGSTS in a loop"],
    "filter<Crowded, true, true>": ["blocks a multiprocessor, not 2"],
    "filter<Vast, true, true>": ["245760 B of shared memory, more than"],
    "spills": ["B of stack", "loads and stores of local memory"],
    "indexes": ["B of stack", "loads and stores of local memory"],
    "unstated": ["dynamic shared memory that the table says nothing of"],
}


@pytest.fixture(scope="module")
def in_cuda(needs_nvcc):
    flags = ["-O3", "-std=c++20", f"-I{cubins.ROOT}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda arch: cubins.image(CUDA, arch, flags, TABLE, "planted"), cubins.known_archs())
        home = cubins.toolkit().home
        return {arch: kernels("cuda", "planted", "", arch, [image], home) for arch, image in zip(cubins.known_archs(), images, strict=True)}


@pytest.mark.parametrize("name", FOUND)
def test_planted_in_cuda(in_cuda, name):
    for arch, compiled in in_cuda.items():
        found = ", ".join(violations(next(kernel for kernel in compiled if kernel.name == name), TABLE))
        assert bool(found) == bool(FOUND[name]) and all(text in found for text in FOUND[name]), (arch, found)


def test_kernels_that_the_table_lacks_and_the_reverse(in_cuda):
    compiled = next(iter(in_cuda.values()))
    table = {"gone": Needs(), **{pattern: needs for pattern, needs in TABLE.items() if pattern != "indexes"}}
    assert "the table does not know it" in next(text for text in faults(compiled, table) if " indexes " in text)
    assert unmatched(compiled, table) == ["gone"]


@pytest.mark.parametrize("arch", ARCHS)
def test_planted_in_triton(needs_triton, monkeypatch, arch):
    from launches import compiled, recorded
    from planted_triton import product, sums

    x = torch.empty(4096, 4096, device="meta")

    def run():
        product[(1,)](x, x, x, 4096, AFTER=False, num_warps=8)
        product[(1,)](x, x, x, 4096, AFTER=True, num_warps=8)
        sums[(1,)](x, x, 4096, num_warps=4, maxnreg=32)

    table = {"product": Needs({arch: [MMA[arch]]}), "sums": Needs()}
    kernels, _ = compiled("planted", "", arch, recorded(monkeypatch, run))
    sound, after, spills = (violations(kernel, table) for kernel in kernels)
    assert not sound
    assert after == [f"no {MMA[arch]} in a loop"]
    assert "B of stack" in spills[0] and "loads and stores of local memory" in spills[1]


SOUND = Kernel("cuda", "knn_kde", "collect_kernel", "", 80, 15, 0, 0, False, 256, 1, Counter(), Counter(), "")
BROKEN = SOUND._replace(name="filter_kernel<1>", stack=8)


@pytest.mark.parametrize(
    "compiled, others, status",
    [([SOUND], [], 0), ([SOUND, BROKEN], [], 1), ([SOUND], ["_filter does not compile"], 1), ([], [], 1)],
)
def test_report(tmp_path, monkeypatch, capsys, compiled, others, status):
    spec = importlib.util.spec_from_file_location("report", Path(__file__).with_name("__main__.py"))
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    monkeypatch.setattr(report, "PARTS", {"cuda": lambda: report.Part("nvcc", compiled, others)})
    assert report.main(["--json", f"{tmp_path}/report.json"]) == status
    written = json.loads((tmp_path / "report.json").read_text())
    assert [line["verdict"] == "ok" for line in written["kernels"]] == [kernel is SOUND for kernel in compiled]
    assert len(written["faults"]) == (BROKEN in compiled) + len(others)
    assert all(fault in capsys.readouterr().out for fault in written["faults"])


# ---- loops


LOOPS = {
    "a loop, and what is around it": (
        """
        /*0000*/ MOV R1, R2 ;
        /*0010*/ HMMA.1688.F32.TF32 R4, R4, R5, R6 ;
        /*0020*/ @P0 BRA 0x10 ;
        /*0030*/ EXIT ;
        /*0040*/ BRA 0x40 ;
        """,
        {0x10, 0x20, 0x40},  # the last is what the assembler puts behind every kernel
    ),
    "a rare path that returns from behind the end": (
        """
        /*0000*/ @P0 BRA 0x30 ;
        /*0010*/ HMMA.1688.F32.TF32 R4, R4, R5, R6 ;
        /*0020*/ EXIT ;
        /*0030*/ MOV R1, R2 ;
        /*0040*/ BRA 0x10 ;
        """,
        set(),
    ),
    "a loop that goes through a rare path": (
        """
        /*0000*/ HMMA.1688.F32.TF32 R4, R4, R5, R6 ;
        /*0010*/ BRA.DIV ~URZ, 0x40    &req={5,0}  ?trans5;
        /*0020*/ @!P1 BRA P0, 0x0 ;
        /*0030*/ EXIT ;
        /*0040*/ MOV R1, R2 ;
        /*0050*/ BRA 0x20              &req={5,0}  ?trans5;
        """,
        {0x00, 0x10, 0x20, 0x40, 0x50},
    ),
    "code behind a loop that always leaves": (
        """
        /*0000*/ BRA.U UP0, 0x20 ;
        /*0010*/ EXIT ;
        /*0020*/ MOV R1, R2 ;
        /*0030*/ @P0 EXIT ;
        /*0040*/ BRA 0x20 ;
        /*0050*/ HMMA.1688.F32.TF32 R4, R4, R5, R6 ;
        /*0060*/ RET.REL.NODEC R2 0x0 ;
        """,
        {0x20, 0x30, 0x40},
    ),
}


@pytest.mark.parametrize("text, inside", LOOPS.values(), ids=LOOPS)
def test_loops(text, inside):
    assert looped(parsed(text)) == inside
