"""psel, psel_sample and psel_mix in Triton.

    _pack        x and clean, transposed for the next kernel
    _score       tiles of logits by direct differences, and what a softmax and a draw need to know of each tile
    _combine     the tiles of a row: log_normalizer, and the index drawn
    _normalise   logits to probabilities, for psel only: a draw leaves no (B, K) array behind
    _mix         weight @ clean on tensor cores

A logit is a function of its two rows, bit for bit, and so are the sums over a row: they depend on neither the other rows of the batch nor
the tiles. The noise is counted by the row's and the column's number. Nothing waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .knn_kde import INTERPRETED, _guard, _multiprocessors
from .score_select_kernels import _combine, _mix, _normalise, _pack, _score

COLUMNS = 128  # of a tile of logits; sums over a row are made of such parts, whatever the card
STEP = 16  # coordinates whose squares are added up before the sum is compensated
BLOCK = 64  # coordinates that `_pack` handles together, and pads to
SLAB = 2**28  # bytes of a transposed piece of clean


class Parts(NamedTuple):
    """What `_score` leaves of each tile for `_combine`."""

    maximum: Tensor  # (tiles, rows) float32
    total: Tensor  # (tiles, rows) float32
    best: Tensor | None  # (tiles, rows) float32, for a draw
    index: Tensor | None  # (tiles, rows) int32


def _empty(like: Tensor, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _packed(source: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """(coordinates, stride), the rows of source as columns; (blocks of coordinates, stride) their squares."""
    n, d = source.shape
    blocks = max(1, triton.cdiv(d, BLOCK))
    packed, square = _empty(source, blocks * BLOCK, stride), _empty(source, blocks, stride)
    _pack[(stride // 32, blocks)](source, packed, square, n, d, stride, ROWS=32, BLOCK=BLOCK, num_warps=4)
    return packed, square


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
    row_tiles = triton.cdiv(n_rows, rows)
    slab = max(1, SLAB // (4 * max(depth, 1) * COLUMNS)) * COLUMNS
    for first in range(0, n_columns, slab):
        piece = clean[first : first + slab]
        piece_tiles = triton.cdiv(len(piece), COLUMNS)
        packed_clean, _ = _packed(piece, piece_tiles * COLUMNS)
        _score[(row_tiles * piece_tiles,)](
            packed_x, packed_clean, scale, std, log_prior, seed, logits, *parts,
            n_rows, n_columns, depth, stride, piece_tiles * COLUMNS, row_offset, row_tiles, first // COLUMNS,
            BM=rows, BN=COLUMNS, STEP=STEP, num_warps=1,
        )  # fmt: skip
    softmax = (None, None) if logits is None else (_empty(x, n_rows), _empty(x, n_rows))
    _combine[(triton.cdiv(n_rows, 32),)](
        square, *parts, *softmax, log_normalizer, index, n_rows, tiles, len(square), stride, ROWS=32, TILES=16, num_warps=4
    )
    return softmax


def _chunks(n_rows: int, n_columns: int, d: int) -> list[slice]:
    """Rows handled together: their transposed copy and parts are about 256 MiB."""
    step = max(1024, 2**28 // (4 * d + 16 * triton.cdiv(n_columns, COLUMNS) + 1) // 64 * 64)
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def psel(x, clean, scale, std, log_prior) -> tuple[Tensor, Tensor]:
    """(p (B, K), log_normalizer (B,)); arguments as in the schema of `ltkernels::psel`."""
    (n_rows, d), n_columns = x.shape, len(clean)
    p, log_normalizer = _empty(x, n_rows, n_columns), _empty(x, n_rows)
    with _guard(x):
        for part in _chunks(n_rows, n_columns, d):
            row_max, row_sum = _scored(x[part], clean, scale[part], std[part], log_prior, None, 0, p[part], log_normalizer[part], None)
            if n_columns > 0:
                _normalise[(len(row_max), triton.cdiv(n_columns, 1024))](p[part], row_max, row_sum, n_columns, BLOCK=1024, num_warps=4)
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
