"""pair_sqdist and pcl_rows in Triton.

    _pack      rows, transposed for the next two kernels, and which of them hold NaN or inf
    _sqdist    tiles of squared distances, for pair_sqdist
    _pairs     tiles of pairs: the distances again, what a row sums up of each tile, and the coefficients of the gradient
    _sums      the tiles of a row: its loss, its pairs, those within the margin
    _pull      what the coefficients make of the differences of the rows

Distances and gradients come from direct differences: close rows far from the origin keep their digits, which no expansion on tensor cores
gives without proof. Both triangles are computed, so no atomics are needed, but no distance twice for the gradient's sake: the coefficients
of a panel of columns (COEFFICIENTS, or COLUMNS for each row where that is more) are kept for `_pull`, which adds up what they make of the
differences before the next panel takes their place. What is transposed is a copy of mu, and the panel's rows of other.

A distance is a function of its two rows, bit for bit. Sums over a row are made of parts of COLUMNS, gradients of parts of SEGMENT, whatever
the card, the tiles and the panels. Nothing waits for the GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..reference import PCL_FORMS
from .knn_kde import _guard, _multiprocessors
from .pairwise_pcl_kernels import _pairs, _pull, _sqdist, _sums
from .score_select import SLAB, _empty, _packed, _tile_rows

COLUMNS = 128  # of a tile of pairs; sums over a row are made of such parts
STEP, RUN = 32, 8  # coordinates whose squares are added up before the sum is compensated, and those added up straight
SEGMENT = 128  # pairs whose pull is added up before it is added to the gradient
COEFFICIENTS = 2**16  # of a panel, unless one column of tiles has more
TILE = dict(BN=COLUMNS, STEP=STEP, RUN=RUN, num_warps=1, maxnreg=255)  # noqa: C408


def _width(n_rows: int, d: int, coefficients: bool) -> int:
    """Columns of a panel, in whole tiles."""
    fitting = SLAB // (4 * max(d, 1))
    if coefficients:
        fitting = min(fitting, COEFFICIENTS // max(n_rows, 1))
    return max(1, fitting // COLUMNS) * COLUMNS


def _padded(n: int) -> int:
    return triton.cdiv(n, COLUMNS) * COLUMNS


def pair_sqdist(x, y) -> Tensor:
    """(B, B'); arguments as in the schema of `ltkernels::pair_sqdist`."""
    (n_rows, d), n_columns = x.shape, len(y)
    out = _empty(x, n_rows, n_columns)
    rows = _tile_rows(n_rows, triton.cdiv(n_columns, COLUMNS), _multiprocessors(x.device))
    row_tiles, depth = triton.cdiv(n_rows, rows), triton.cdiv(d, STEP) * STEP
    with _guard(x):
        packed_x, _ = _packed(x, _padded(n_rows))
        width = _width(n_rows, d, False)
        for first in range(0, n_columns, width):
            piece = y[first : first + width]
            stride = _padded(len(piece))
            packed_y, _ = _packed(piece, stride)
            _sqdist[(row_tiles * (stride // COLUMNS),)](
                packed_x, packed_y, out[:, first:], n_rows, len(piece), depth, _padded(n_rows), stride, n_columns, row_tiles,
                BM=rows, **TILE,
            )  # fmt: skip
    return out


def _pulled(rows, partners, coefficient, out, scale, row_stride, partner_stride) -> None:
    """Add 2 scale sum_j c_ij (row_i - partner_j) to out."""
    n_rows, d = rows.shape
    block = 128 if d > 64 else 32
    together = _tile_rows(n_rows, triton.cdiv(d, block), _multiprocessors(rows.device))
    row_tiles = triton.cdiv(n_rows, together)
    _pull[(row_tiles * triton.cdiv(d, block),)](
        rows, partners, coefficient, out, 4 * scale, n_rows, len(partners), d, row_stride, partner_stride, row_tiles,
        BM=together, BN=block, SEGMENT=SEGMENT, UNROLLED=4, num_warps=1, maxnreg=255,
    )  # fmt: skip


def pcl_rows(
    mu, labels, group, weight, margin, other, other_labels, other_group, form, scale, grad, other_grad
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row (B,), pairs (B,), active (B,), mu_grad (B, D), partner_grad (B', D)); arguments as in the schema of `ltkernels::pcl_rows`."""
    among = other is None
    partners, their_labels, their_group = (mu, labels, group) if among else (other, other_labels, other_group)
    their_weight, their_margin = (weight, margin) if among else (None, None)
    (n_rows, d), n_columns = mu.shape, len(partners)
    row, pairs = _empty(mu, n_rows), _empty(mu, n_rows, dtype=torch.int64)
    active = None if margin is None else _empty(mu, n_rows)
    mu_grad = torch.zeros(mu.shape if grad else 0, dtype=torch.float32, device=mu.device)
    partner_grad = torch.zeros(partners.shape if other_grad else 0, dtype=torch.float32, device=mu.device)

    tiles, stride, depth = triton.cdiv(n_columns, COLUMNS), _padded(n_rows), triton.cdiv(d, STEP) * STEP
    width = min(_width(n_rows, d, grad or other_grad), _padded(n_columns)) or COLUMNS
    part_row, part_pairs = _empty(mu, tiles, stride), _empty(mu, tiles, stride, dtype=torch.int32)
    part_active = None if margin is None else _empty(mu, tiles, stride)
    coefficient = _empty(mu, width, stride) if grad or other_grad else None
    with _guard(mu):
        packed, squares = _packed(mu, stride)
        square = squares.sum(0)
        for first in range(0, n_columns, width):
            panel = slice(first, min(first + width, n_columns))
            piece, done = partners[panel], slice(first // COLUMNS, tiles)
            if among:
                their_packed, their_stride, their_square = packed[:, first:], stride, square[first:]
            else:
                their_stride = _padded(len(piece))
                their_packed, their_squares = _packed(piece, their_stride)
                their_square = their_squares.sum(0)
            panel_tiles = triton.cdiv(len(piece), COLUMNS)
            together = _tile_rows(n_rows, panel_tiles, _multiprocessors(mu.device))
            row_tiles = triton.cdiv(n_rows, together)
            _pairs[(row_tiles * panel_tiles,)](
                packed, their_packed, square, their_square, labels, _part(their_labels, panel), group, _part(their_group, panel),
                weight, _part(their_weight, panel), margin, _part(their_margin, panel),
                part_row[done], part_pairs[done], _part(part_active, done), coefficient,
                scale, n_rows, len(piece), depth, stride, their_stride, row_tiles,
                FORM=PCL_FORMS[form], BM=together, **TILE,
            )  # fmt: skip
            if grad:
                _pulled(mu, piece, coefficient, mu_grad, scale, 1, stride)
            if other_grad:
                _pulled(piece, mu, coefficient, partner_grad[panel], scale, stride, 1)
        _sums[(triton.cdiv(n_rows, 32),)](part_row, part_pairs, part_active, row, pairs, active, n_rows, tiles, stride, ROWS=32, TILES=16)
    return row, pairs, _empty(mu, 0) if active is None else active, mu_grad, partner_grad


def _part(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
