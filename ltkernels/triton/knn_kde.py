"""knn and knn_kde in Triton: a certified filter on tensor cores, then exact distances for the few rows it lets through.

    _rows, _columns   what the filter needs to know of each query and of each bank row
    _filter           a lower bound of |q - z|^2 - |q|^2 for every pair, from tf32 tiles; minima over groups of 8 columns that may
                      still belong to the answer are appended to a queue, one per query and bank split
    _merge            the queues of a query become one short list of groups, or the query is handed to the exact rung
    _select           squared distances by direct differences, running k best by (sqdist, index); first over the listed groups,
                      then, for the queries of the exact rung, over the whole bank in two stages
    _density          log density and score of the k winners

The filter bounds its own error (see `_error_terms`) and never drops a row that could be in the answer, so the answer does not depend
on tiles, splits, the chunking of the queries or `bound`. Nothing waits for the GPU: the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import reference
from .knn_kde_kernels import GROUP, _columns, _density, _filter, _merge, _rows, _select

INTERPRETED = triton.knobs.runtime.interpret
SPREAD = 128  # groups whose columns `_select` lists at a time; k = 64 is one turn
# Marks cost every tile of the filter and save exact distances, which are as many as k d for each query whatever the bank's size. On an
# H100, k = 64: 20000 x 512 in 7.5 instead of 8.6 ms; 20000 x 64 in 3.8 and 3.8; 4096 queries of 500000 x 128 in 6.1 and 4.8
MARKED_SHARE = 0.5  # of the bank's rows that k d has to reach: at most 2^21 rows then, and a word has 24 bits for the number of a group


class Config(NamedTuple):
    """How `_filter` is compiled for one kind of card."""

    rows: int  # queries of a tile
    columns: int  # bank rows of a tile
    depth: int  # coordinates of a step
    warps: int
    stages: int
    registers: int | None  # cap a thread, None = the compiler's choice
    tma: bool
    marked: bool = False  # a queued group can say which of its columns passed: an eighth of the exact distances, at the price of registers
    candidates: int = 32  # bank rows whose exact distances `_select` computes together
    merged: int = 1024  # groups, of several queries where they are few, that `_merge` holds together


_CONFIGS = {
    # wgmma; two programs fit an SM only below 128 registers, and the cap costs no spill
    9: Config(rows=128, columns=128, depth=32, warps=8, stages=3, registers=128, tma=True, marked=True),
    # tcgen05: the accumulator is in tensor memory. Marked, it spills (8 to 27 accesses), as does sm_120
    10: Config(rows=128, columns=128, depth=32, warps=8, stages=3, registers=128, tma=True),
    # mma.sync; 99 KiB of shared memory and 128 registers hold two programs of half the queries
    12: Config(rows=64, columns=128, depth=32, warps=8, stages=3, registers=128, tma=True),
    # mma.sync and cp.async: the pointers take the registers of a second program (capped at 128 it spills), so one with a large tile
    8: Config(rows=128, columns=128, depth=32, warps=8, stages=3, registers=None, tma=False),
    # the interpreter pays for each operation, whatever its size
    0: Config(rows=32, columns=128, depth=64, warps=4, stages=1, registers=None, tma=True, marked=True, candidates=128, merged=8192),
}
# rows that are no multiple of 16 bytes, on any card: 4-byte copies need four times the pointers, and 128 queries of them spill
_UNALIGNED = Config(rows=64, columns=128, depth=32, warps=8, stages=3, registers=None, tma=False)


class Problem(NamedTuple):
    """Sizes that follow from (d, k) alone."""

    kp: int  # k rounded up to a power of two
    cap: int  # groups a queue holds
    size: int  # keys a buffer of `_select` holds
    lanes: int  # partial sums of a distance
    block: int  # coordinates `_density` handles together


def _major(device: torch.device) -> int:
    """The card's generation, 0 for the interpreter."""
    return 0 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


def _config(major: int, aligned: bool, cap: int) -> Config:
    if not aligned:
        return _UNALIGNED
    config = _CONFIGS.get(major, _CONFIGS[8])
    # compacting the longest queues spills under sm_90's cap of 128 registers (9 accesses, Triton 3.8), but not beside half a tile
    return config._replace(columns=64) if major == 9 and cap > 512 else config


def _problem(d: int, k: int) -> Problem:
    kp = max(16, triton.next_power_of_2(k))
    # 8k: room for a cluster of a few hundred near-ties before a row needs the exact rung, and few compactions. More would not fit
    # the registers of a compaction
    cap = min(max(128, 8 * kp), 1024)
    lanes = min(max(16, triton.next_power_of_2(d)), 64)
    return Problem(kp, cap, max(512, 2 * kp), lanes, min(lanes, 64))


def _error_terms(d: int, lanes: int) -> dict[str, float]:
    """|A - (r^2 - |q|^2)| <= alpha |q||c| + beta |c|^2 + tau for A = sqnorm - 2 q.c as the filter computes it; and the relative slack
    for the rounding of the sqdist that orders the answer. u = 2^-24.

    alpha: both operands cut to tf32 (2^-10, truncation), d additions in an accumulator that truncates (2^-23 each), centring both rows and
    the two operations of the epilogue (16u). beta: centring and whatever order sqnorm was summed in. tau: underflow."""
    tile, accumulate, u = 2.0**-10, 2.0**-23, 2.0**-24
    longest = math.ceil(d / lanes) + 10
    return {
        "alpha": 1.01 * (2 * (2 * tile + tile**2) + 2 * d * accumulate + 16 * u),
        "beta": 2.0**-18,
        "tau": d * 2.0**-120,
        "slack": 2.1 * longest * u + 2.0**-21,
    }


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _splits(q_tiles: int, n_tiles: int, processors: int, cap: int) -> int:
    """Parts of the bank, a power of two: two programs an SM, within the 4096 groups of a query that `_merge` holds in registers."""
    return min(*map(triton.next_power_of_2, (triton.cdiv(2 * processors, q_tiles), n_tiles)), 4096 // cap)


class Workspace(NamedTuple):
    """Device memory of one chunk of queries."""

    centred_query: Tensor  # (rows, d) float32
    row_norm: Tensor  # (rows,) float32
    row_bound: Tensor  # (rows,) float32
    column_bias: Tensor  # (columns,) float32
    group_norm: Tensor  # (columns / 8,) float32
    queue_lower: Tensor  # (splits, rows, cap) float32
    queue_group: Tensor  # (splits, rows, cap) int32
    queue_count: Tensor  # (splits, rows) int32
    queue_bound: Tensor  # (splits, rows) float32
    listed: Tensor  # (rows,) int32
    exact_rows: Tensor  # (rows,) int32
    exact_count: Tensor  # (1,) int32
    exact_keys: Tensor  # (items, kp) int64
    scratch: Tensor  # (programs, size) int64
    columns: Tensor  # (programs, 8 spread) int32


def _workspace(device, rows: int, columns: int, d: int, splits: int, programs: int, problem: Problem) -> Workspace:
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    int32, int64 = torch.int32, torch.int64
    return Workspace(
        empty(rows, d), empty(rows), empty(rows),
        empty(columns), empty(columns // GROUP),
        empty(splits, rows, problem.cap), empty(splits, rows, problem.cap, dtype=int32),
        empty(splits, rows, dtype=int32), empty(splits, rows),
        empty(rows, dtype=int32), empty(rows, dtype=int32), empty(1, dtype=int32),
        empty(max(rows, programs), problem.kp, dtype=int64), empty(programs, problem.size, dtype=int64),
        empty(programs, 8 * SPREAD, dtype=int32),
    )  # fmt: skip


def _neighbours(queries, points, centre, centred, sqnorm, self_index, bound, k, sqdist, index) -> None:
    """Fill sqdist and index for one chunk of queries."""
    n_queries, d = queries.shape
    n_points = points.shape[0]
    aligned = d % 4 == 0 and centred.data_ptr() % 16 == 0  # what TMA and 16-byte copies ask for
    problem = _problem(d, k)
    config = _config(_major(queries.device), aligned, problem.cap)
    error = _error_terms(d, problem.lanes)
    processors = _multiprocessors(queries.device)
    q_tiles, n_tiles = triton.cdiv(n_queries, config.rows), triton.cdiv(n_points, config.columns)
    rows, columns = q_tiles * config.rows, n_tiles * config.columns
    splits = _splits(q_tiles, n_tiles, processors, problem.cap)
    programs = 8 * processors
    work = _workspace(queries.device, rows, columns, d, splits, programs, problem)

    rank = k + (self_index is not None)  # the skipped row may be one of the groups that a bound counts on
    marked = config.marked and MARKED_SHARE * n_points <= k * d
    terms = error["alpha"], error["beta"], error["tau"], error["slack"]
    _rows[(rows // 16,)](
        queries, centre, bound, work.centred_query, work.row_norm, work.row_bound, work.exact_count,
        n_queries, d, error["tau"], error["slack"], ROWS=16, BLOCK=64, num_warps=4,  # 128 spills on sm_120
    )  # fmt: skip
    _columns[(n_tiles,)](
        sqnorm, work.column_bias, work.group_norm, n_points, error["beta"], error["tau"],
        BLOCK=config.columns, num_warps=1,
    )  # fmt: skip

    left, right = work.centred_query, centred
    depth = min(config.depth, max(16, triton.next_power_of_2(d)))
    if config.tma:
        left = TensorDescriptor.from_tensor(left, [config.rows, depth])
        right = TensorDescriptor.from_tensor(right, [config.columns, depth])
    _filter[(q_tiles, splits)](
        left, right, work.row_norm, work.row_bound, work.column_bias, work.group_norm,
        work.queue_lower, work.queue_group, work.queue_count, work.queue_bound,
        n_points, d, rank, *terms, n_tiles, triton.cdiv(n_tiles, splits), rows,
        BQ=config.rows, BN=config.columns, BK=depth, CAP=problem.cap, ROWS=max(1, (512 if marked else 1024) // problem.cap),
        TMA=config.tma, ALIGNED=aligned, PRECISION="tf32", MARKED=marked,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip
    together = min(config.rows, max(1, config.merged // (problem.cap * splits)))
    _merge[(triton.cdiv(n_queries, together),)](
        work.queue_lower, work.queue_group, work.queue_count, work.queue_bound, work.row_norm, work.group_norm,
        work.listed, work.exact_rows, work.exact_count, n_queries, rank, *terms, rows,
        ROWS=together, CAP=problem.cap, SPLITS=splits, MARKED=marked, num_warps=4,
    )  # fmt: skip
    for source in ("groups", "bank", "parts"):
        _select[(min(programs, n_queries) if source == "groups" else programs,)](
            queries, points, self_index, work.row_norm, work.queue_group, work.listed, work.exact_rows, work.exact_count,
            work.exact_keys, work.scratch, work.columns, sqdist, index, n_queries, n_points, d, k,
            SOURCE=source, KP=problem.kp, CAP=problem.cap, SIZE=problem.size, ROWS=config.candidates, LANES=problem.lanes, MAX_PARTS=16,
            SOME=SPREAD, MARKED=marked and source == "groups", num_warps=4, maxnreg=168,
        )  # fmt: skip


def _chunk(d: int, problem: Problem) -> int:
    """Queries handled together: a workspace of about 256 MiB, in whole tiles."""
    return max(1024, 2**28 // (8 * problem.cap + 4 * d + 8 * problem.kp) // 1024 * 1024)


def _guard(queries: Tensor):
    return torch.cuda.device(queries.device) if queries.is_cuda else contextlib.nullcontext()


def _knn(queries, points, centre, centred, sqnorm, self_index, bound, k) -> tuple[Tensor, Tensor]:
    n_queries, d = queries.shape
    if len(centred) < len(points):  # a bank on a disk keeps no copy; only the interpreter meets one
        centred, _ = reference.bank_rows(points, centre, copy=True)
    sqdist = torch.empty(n_queries, k, dtype=torch.float32, device=queries.device)
    index = torch.empty(n_queries, k, dtype=torch.int64, device=queries.device)
    with _guard(queries):
        chunk = _chunk(d, _problem(d, k))
        for first in range(0, n_queries, chunk):
            part = slice(first, first + chunk)
            _neighbours(
                queries[part], points, centre, centred, sqnorm, None if self_index is None else self_index[part],
                None if bound is None else bound[part], k, sqdist[part], index[part],
            )  # fmt: skip
    return sqdist, index


def knn(queries, points, centre, centred, sqnorm, self_index, bound, k) -> tuple[Tensor, Tensor]:
    """(sqdist (Q, k), index (Q, k)); arguments as in the schema of `ltkernels::knn`."""
    return _knn(queries, points, centre, centred, sqnorm, self_index, bound, k)


def knn_kde(
    queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_density (Q,), score (Q, d), sqdist (Q, k), index (Q, k)); arguments as in the schema of `ltkernels::knn_kde`."""
    sqdist, index = _knn(queries, points, centre, centred, sqnorm, self_index, bound, k)
    n_queries, d = queries.shape
    log_density = torch.empty(n_queries, dtype=torch.float32, device=queries.device)
    score = torch.empty(n_queries, d, dtype=torch.float32, device=queries.device)
    if n_queries == 0:
        return log_density, score, sqdist, index
    problem = _problem(d, k)
    with _guard(queries):
        _density[(n_queries,)](
            queries, points, bandwidth, log_weight, sqdist, index, log_density, score, d, k, math.log(k),
            KP=problem.kp, SOME=16, BLOCK=problem.block, num_warps=4,
        )  # fmt: skip
    return log_density, score, sqdist, index
