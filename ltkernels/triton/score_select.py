"""psel, psel_sample and psel_mix in Triton.

    _screen      for problems large enough: bounds of the logits of each row and tile, from tensor cores
    _reach       which of them can matter
    _pack        x and clean, transposed for the next kernel
    _score       tiles of logits by direct differences, and what a softmax and a draw need to know of each tile
    _combine     the tiles of a row: log_normalizer, and the index drawn
    _normalise   logits to probabilities, for psel only: a draw leaves no (B, K) array behind
    _mix         weight @ clean on tensor cores

`_screen` bounds its own error (see `_error_terms`) and rules out what float32 would round away, so it saves time where the rows of clean
are far apart for a row's std and changes no bit of an answer. What is ruled out at small std is nearly everything, at large std nothing; a
tile is left out when none of its rows needs it, so rows of like std belong side by side.

A logit is a function of its two rows, bit for bit, and so are the sums over a row: they depend on neither the other rows of the batch nor
the tiles. The noise is counted by the row's and the column's number. Nothing waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .knn_kde import INTERPRETED, _guard, _multiprocessors
from .score_select_kernels import _combine, _mix, _normalise, _pack, _reach, _score, _screen

COLUMNS = 128  # of a tile of logits, a multiple of 32; sums over a row are made of such parts, whatever the card
STEP = 32  # coordinates whose squares are added up before the sum is compensated
BLOCK = 64  # coordinates that `_pack` handles together, and pads to
SLAB = 2**28  # bytes of a transposed piece of clean
SCREENED = 4e8  # products of coordinates from which on `_screen` is worth its launches; unmeasured


class Parts(NamedTuple):
    """What `_score` leaves of each tile for `_combine`."""

    maximum: Tensor  # (tiles, rows) float32
    total: Tensor  # (tiles, rows) float32
    best: Tensor | None  # (tiles, rows) float32, for a draw
    index: Tensor | None  # (tiles, rows) int32


def _empty(like: Tensor, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _packed(source: Tensor, stride: int, copy: bool = True) -> tuple[Tensor | None, Tensor]:
    """(coordinates, stride), the rows of source as columns, if asked for; (blocks of coordinates, stride) the sums of their squares."""
    n, d = source.shape
    blocks = max(1, triton.cdiv(d, BLOCK))
    packed, square = _empty(source, blocks * BLOCK, stride) if copy else None, _empty(source, blocks, stride)
    _pack[(stride // 32, blocks)](source, packed, square, n, d, stride, ROWS=32, BLOCK=BLOCK, num_warps=4)
    return packed, square


def _error_terms(d: int, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """(alpha, beta, tau, slack): |A - r^2| <= alpha s|x||z| + beta (|x|^2 + s^2 |z|^2) + tau (1 + s) for A = |x|^2 + s^2 |z|^2 - 2s x.z as
    `_screen` computes it, and the relative rounding of a logit of `_score` from r^2 = |x - s z|^2. u = 2^-24.

    alpha: float32 operands cut to tf32 (2^-10, truncation), d additions in an accumulator that truncates (2^-23 each), and the operations
    of the epilogue. beta: the squares, summed in blocks, and the epilogue. tau: underflow. slack: the difference twice (it is squared),
    STEP additions, the compensated ones, four products, and the operations of the bound itself, twice over."""
    u, cut = 2.0**-24, 2.0**-10 if dtype == torch.float32 else 0.0
    alpha = 1.01 * (2 * (2 * cut + cut**2) + 2 * d * 2.0**-23 + 16 * u)
    return alpha, 1.01 * (BLOCK + d / BLOCK + 16) * u, d * 2.0**-120, 2.0**-17


def _screened(x, clean, scale, std, log_prior, square, tiles) -> tuple[Tensor, Tensor]:
    """(tiles, rows) a bound of the logits of each tile and row, (rows,) what it has to reach for the tile to count."""
    n_rows, d = x.shape
    stride = square.shape[1]
    _, square_clean = _packed(clean, tiles * COLUMNS, copy=False)
    upper, lower, reach = _empty(x, tiles, stride), _empty(x, tiles, stride), _empty(x, stride)
    row_tiles = triton.cdiv(n_rows, 64)
    _screen[(row_tiles * tiles,)](
        x, clean, square.sum(0), square_clean.sum(0), scale, std, log_prior, upper, lower, n_rows, len(clean), d, stride, row_tiles,
        *_error_terms(d, x.dtype),
        BM=64, BN=COLUMNS, BK=32, UPCAST=INTERPRETED, PRECISION="tf32", num_warps=8, num_stages=3,
    )  # fmt: skip
    _reach[(stride // 32,)](lower, reach, tiles, stride, ROWS=32, TILES=16, num_warps=4)
    return upper, reach


def _tile_rows(n_rows: int, tiles: int, processors: int) -> int:
    """Rows of a tile of logits, which is one warp's work: 8 read least, but 2 where schedulers would be idle, as in a batch of training."""
    if INTERPRETED:
        return 32  # it pays for each operation, whatever its size
    return 8 if triton.cdiv(n_rows, 8) * tiles >= 8 * processors else 2


def _scored(x, clean, scale, std, log_prior, seed, row_offset, logits, log_normalizer, index) -> tuple[Tensor, Tensor] | None:
    """Fill log_normalizer and, where they are given, logits and index for one chunk of rows. With logits: (rows,) the largest of each row
    and (rows,) the sum of exponentials relative to it."""
    n_rows, d = x.shape
    n_columns = len(clean)
    tiles, depth = triton.cdiv(n_columns, COLUMNS), triton.cdiv(d, STEP) * STEP
    rows = _tile_rows(n_rows, tiles, _multiprocessors(x.device))
    stride = triton.cdiv(n_rows, 32) * 32
    packed_x, square = _packed(x, stride)
    drawn = (None, None) if seed is None else (_empty(x, tiles, stride), _empty(x, tiles, stride, dtype=torch.int32))
    parts = Parts(_empty(x, tiles, stride), _empty(x, tiles, stride), *drawn)
    worthwhile = tiles > 1 and n_rows * n_columns * d >= SCREENED
    screen = _screened(x, clean, scale, std, log_prior, square, tiles) if worthwhile else (None, None)
    row_tiles = triton.cdiv(n_rows, rows)
    slab = max(1, SLAB // (4 * max(depth, 1) * COLUMNS)) * COLUMNS
    for first in range(0, n_columns, slab):
        piece = clean[first : first + slab]
        piece_tiles = triton.cdiv(len(piece), COLUMNS)
        packed_clean, _ = _packed(piece, piece_tiles * COLUMNS)
        _score[(row_tiles * piece_tiles,)](
            packed_x, packed_clean, scale, std, log_prior, seed, *screen, logits, *parts,
            n_rows, n_columns, depth, stride, piece_tiles * COLUMNS, row_offset, row_tiles, first // COLUMNS,
            BM=rows, BN=COLUMNS, STEP=STEP, UNROLLED=8, num_warps=1, maxnreg=255,  # its own choice of 168 spills
        )  # fmt: skip
    softmax = (None, None) if logits is None else (_empty(x, n_rows), _empty(x, n_rows))
    _combine[(triton.cdiv(n_rows, 32),)](
        square, *parts, *softmax, log_normalizer, index, n_rows, tiles, len(square), stride, ROWS=32, TILES=16, num_warps=4
    )
    return softmax


def _chunks(n_rows: int, n_columns: int, d: int) -> list[slice]:
    """Rows handled together: their transposed copy and what is kept of their tiles are about 256 MiB."""
    step = max(1024, 2**28 // (4 * d + 24 * triton.cdiv(n_columns, COLUMNS) + 1) // 64 * 64)
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def psel(x, clean, scale, std, log_prior) -> tuple[Tensor, Tensor]:
    """(p (B, K), log_normalizer (B,)); arguments as in the schema of `ltkernels::psel`."""
    (n_rows, d), n_columns = x.shape, len(clean)
    p, log_normalizer = _empty(x, n_rows, n_columns), _empty(x, n_rows)
    with _guard(x):
        for part in _chunks(n_rows, n_columns, d):
            row_max, row_sum = _scored(x[part], clean, scale[part], std[part], log_prior, None, 0, p[part], log_normalizer[part], None)
            if n_columns > 0:
                _normalise[(len(row_max) * triton.cdiv(n_columns, 1024),)](
                    p[part], row_max, row_sum, len(row_max), n_columns, BLOCK=1024, num_warps=4
                )
    return p, log_normalizer


def psel_sample(x, clean, scale, std, log_prior, seed, row_offset) -> tuple[Tensor, Tensor]:
    """(index (B,), log_normalizer (B,)); arguments as in the schema of `ltkernels::psel_sample`."""
    index, log_normalizer = _empty(x, len(x), dtype=torch.int64), _empty(x, len(x))
    with _guard(x):
        for part in _chunks(len(x), len(clean), x.shape[1]):
            given = x[part], clean, scale[part], std[part], log_prior, seed, row_offset + part.start
            _scored(*given, None, log_normalizer[part], index[part])
    return index, log_normalizer


def psel_mix(weight, clean) -> Tensor:
    """weight @ clean, (B, D) float32; arguments as in the schema of `ltkernels::psel_mix`."""
    (n_rows, n_columns), d = weight.shape, clean.shape[1]
    out = _empty(weight, n_rows, d)
    row_tiles = triton.cdiv(n_rows, 64)
    tiles = row_tiles * triton.cdiv(d, 64)
    if tiles > 0:
        with _guard(weight):
            _mix[(tiles,)](
                weight, clean, out, n_rows, n_columns, d, row_tiles,
                BM=64, BN=64, BK=16, SEGMENT=512, PRECISION="tf32x3", num_warps=8, num_stages=3,
            )  # fmt: skip
    return out
