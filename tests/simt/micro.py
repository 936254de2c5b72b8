"""What each kernel of micro.cuh answers, by NumPy."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import simt_host

ENTRY = "host_entry_micro.cpp"
KERNELS = re.findall(r"^__global__ void (\w+)\(", (simt_host.HERE / "micro.cuh").read_text(), re.MULTILINE)
THREADS, BLOCKS, WORDS = 64, 2, 8
LANE, THREAD = np.arange(128) % 32, np.arange(128) % 64


def inputs(kernel: str) -> np.ndarray:
    """(128, 8) uint32: random bits; floats where the kernel takes them."""
    rng = np.random.default_rng(KERNELS.index(kernel))
    if kernel == "mma_tf32":
        return rng.standard_normal((128, WORDS)).astype(np.float32).view(np.uint32)
    if kernel == "arithmetic":
        return rng.uniform(2**-6, 4, (128, WORDS)).astype(np.float32).view(np.uint32)
    if kernel == "halves":  # subnormal, common, overflowing, NaN, halfway between two halves
        values = rng.standard_normal((128, WORDS)) * 10.0 ** rng.integers(-9, 7, (128, WORDS))
        values[:8, 0] = [np.nan, np.inf, -np.inf, 65520, 65519.9, 1 + 2**-11, 2**-25, -0.0]
        return values.astype(np.float32).view(np.uint32)
    return rng.integers(2**32, size=(128, WORDS), dtype=np.uint32)


def run(library: ctypes.CDLL, kernel: str, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out, total = np.zeros((128, WORDS), np.uint32), np.zeros(WORDS, np.uint32)
    library.regions = [(a.ctypes.data, a.nbytes) for a in (given, out, total)]  # all that a kernel may touch
    status = getattr(library, f"micro_{kernel}")(*(ctypes.c_void_p(a.ctypes.data) for a in (given, out, total)))
    if status:
        raise RuntimeError(library.simt_error().decode())
    return out, total


def judge(kernel: str, given: np.ndarray, out: np.ndarray, total: np.ndarray) -> None:
    answer = EXPECTED[kernel](given)
    for column, expected in answer.items():
        found = out[:, column]
        if np.asarray(expected).dtype.kind == "f":
            np.testing.assert_allclose(found.view(np.float32), expected, rtol=2e-6, atol=1e-6 if kernel == "mma_tf32" else 0)
        else:
            expected = np.broadcast_to(np.asarray(expected).astype(np.int64), 128)
            np.testing.assert_array_equal(found, expected.astype(np.uint32), err_msg=f"{kernel}, word {column}")
    if kernel == "last_block":
        sums = (given >> 8).astype(np.uint64).sum(0).astype(np.uint32)
        np.testing.assert_array_equal(total, [BLOCKS, *sums[1:]])


def copied(words: int):
    def answer(x):
        taken = (np.arange(128) // 64) * 64 + (THREAD + 1) % 64  # a thread reads its neighbour's
        parts = [np.where((THREAD % 3 != skipped)[:, None], x[:, at : at + words], 0)[taken] for skipped, at in ((0, 0), (1, 4))]
        return {4 * part + i: parts[part][:, i] for part in range(2) for i in range(words)}

    return answer


def multiplied(x):
    cut = (x & 0xFFFFE000).view(np.float32).astype(np.float64)
    real = x.view(np.float32).astype(np.float64)
    out = np.zeros((128, 4))
    for first in range(0, 128, 32):
        a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
        for lane in range(32):
            g, t, word = lane // 4, lane % 4, first + lane
            a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4] = cut[word, :4]
            b[t, g], b[t + 4, g] = cut[word, 4:6]
            c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = real[word, [6, 7, 0, 1]]
        d = a @ b + c
        for lane in range(32):
            g, t = lane // 4, lane % 4
            out[first + lane] = d[g, 2 * t], d[g, 2 * t + 1], d[g + 8, 2 * t], d[g + 8, 2 * t + 1]
    return {i: out[:, i] for i in range(4)}


def warps(column: np.ndarray) -> np.ndarray:
    return column.reshape(4, 32)


def per_warp(values) -> np.ndarray:
    return np.repeat(np.asarray(values), 32)


def per_block(values) -> np.ndarray:
    return np.repeat(np.asarray(values), 64)


def shuffled(x):
    v, first = x[:, 0], np.arange(128) // 32 * 32
    return {
        0: v[first + LANE * 7 % 32],
        1: v[first + np.where(LANE < 3, LANE, LANE - 3)],
        2: v[first + np.where(LANE > 26, LANE, LANE + 5)],
        3: v[first + (LANE ^ 9)],
        4: v[first + (LANE ^ 1)],
    }


def voted(x):
    one = warps(x[:, 0] & 1).astype(np.uint64)
    return {
        0: per_warp((one << np.arange(32, dtype=np.uint64)).sum(1)),
        1: per_warp((warps(x[:, 1]) > 0xE0000000).any(1)),
        2: per_warp((warps(x[:, 1]) < 0xE0000000).all(1)),
    }


def reduced(x):
    v, signed = warps(x[:, 0]), warps(x[:, 0]).view(np.int32)
    low, high = warps(x[:, 1] & x[:, 2]), warps(x[:, 1] | x[:, 2])
    return {
        0: per_warp(v.astype(np.uint64).sum(1) % 2**32),
        1: per_warp(v.min(1)),
        2: per_warp(v.max(1)),
        3: per_warp(signed.min(1)),
        4: per_warp(signed.max(1)),
        5: per_warp(np.bitwise_or.reduce(low, 1)),
        6: per_warp(np.bitwise_and.reduce(high, 1)),
        7: per_warp((signed >> 8).astype(np.int64).sum(1)),
    }


def met(x):
    v = x[:, 0].reshape(2, 64)
    return {
        0: per_block((v > 0xFC000000).any(1)),
        1: per_block((v > 0x04000000).all(1)),
        2: per_block((v & 1).sum(1)),
    }


def halved(x):
    v, low = x[:, 0], LANE < 16
    first = np.arange(128)
    sums, most = warps(x[:, 1])[:, :16].astype(np.uint64).sum(1) % 2**32, warps(x[:, 1])[:, 16:].max(1)
    return {0: np.where(low, v[first ^ 15], v[first ^ 7]), 1: np.where(low, per_warp(sums), per_warp(most)), 2: v[first ^ 31]}


def collatz(x):
    steps = []
    for v in (x[:, 0] & 255).tolist():
        steps.append(0)
        while v > 1:
            v = 3 * v + 1 if v % 2 else v // 2
            steps[-1] += 1
    steps = np.array(steps)
    return {0: steps, 1: steps[np.arange(128) ^ 16]}


def collected(x):
    v = x.reshape(2, 64, WORDS).astype(np.uint64)
    return {
        0: per_block(v[..., 0].sum(1) % 2**32),
        1: per_block(v[..., 0].min(1)),
        2: per_block(v[..., 0].max(1)),
        3: per_block(np.bitwise_or.reduce(v[..., 1] & v[..., 2], 1)),
        4: per_block(np.bitwise_and.reduce(v[..., 1] | v[..., 2], 1)),
        5: 1,
        6: per_block((v[..., 0] << np.uint64(8)).sum(1) >> np.uint64(16) & np.uint64(0xFFFFFFFF)),
        7: per_block((v[..., 0] & np.uint64(1023)).sum(1).astype(np.float32).view(np.uint32)),
    }


def twiddled(x):
    a, b, c = (x[:, i].astype(np.uint64) for i in range(3))
    shifted = a >> (b & np.uint64(31))
    return {
        0: [int(v).bit_count() for v in a],
        1: [32 - int(v).bit_length() for v in shifted],
        2: a * b >> np.uint64(32),
        3: x[:, 2],
        4: x[:, 3],
        5: x[:, 5],
        6: (x[:, 0].view(np.int32) >> 3).view(np.uint32) % 1000003,
        7: a * b // (c | np.uint64(1)) % 2**32,
    }


def computed(x):
    v, w = (x[:, i].view(np.float32).astype(np.float64) for i in range(2))
    return {0: v**-0.5, 1: np.exp(v), 3: np.exp(-v), 4: np.sqrt(v), 6: v / w, 7: np.exp(v) / 2} | {
        5: (v * w - v).astype(np.float32).view(np.uint32)  # fused: rounded once
    }


def narrowed(x):
    v = x[:, 0].view(np.float32)
    with np.errstate(over="ignore"):
        half = v.astype(np.float16)
    bits = v.view(np.uint32).astype(np.uint64)
    bfloat = np.where(np.isnan(v), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint32)
    return {
        0: np.where(np.isnan(v), 0, half.view(np.uint16)),
        1: np.where(np.isnan(v), 0, bfloat),
        2: half.astype(np.float32),
        3: (bfloat << 16).view(np.float32),
    }


def numbered(x):
    row = np.arange(64)
    x_, y, z = row % 4, row // 4 % 8, row // 32
    odd = int(sum(1 << lane for lane in range(32) if lane // 4 % 2))
    twice = {0: x_, 1: y, 2: z}
    return {i: np.tile(v, 2) for i, v in twice.items()} | {3: per_block([0, 1]), 4: 8, 5: 2, 6: 2, 7: odd}


EXPECTED = {
    "copy4": copied(1), "copy8": copied(2), "copy16": copied(4), "copy16_cached": copied(4),
    "mma_tf32": multiplied, "shuffles": shuffled, "votes": voted, "reductions": reduced, "barriers": met, "half_warps": halved,
    "loops": collatz, "atomics": collected, "last_block": lambda x: {i: x[:, i] >> 8 for i in range(WORDS)}, "bits": twiddled,
    "arithmetic": computed, "halves": narrowed, "shapes": numbered,
}  # fmt: skip
