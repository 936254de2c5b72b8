"""The device code of pairwise_pcl: what each kernel is for is told where they are launched, in pairwise_pcl.py."""

import triton
import triton.language as tl

from .score_select_kernels import _row_sum

_INF = tl.constexpr(float("inf"))


# ---- small device functions --------------------------------------------------------------------------------------------


@triton.jit
def _squares(packed_x, packed_y, x_stride, y_stride, depth, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr):
    """|x - y|^2 for BM and BN columns of packed_x and packed_y, by direct differences: a function of the two rows alone, bit for bit, and
    symmetric in them.

    Sums of RUN squares are added up to sums of STEP of them, and these in a compensated sum. In units of 2^-24 the error is below 2 for the
    difference, RUN - 1, STEP / RUN - 1 and 2 for the compensated sum, however many coordinates there are."""
    total = tl.zeros([BM, BN], tl.float32)
    lost = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, depth, STEP):
        part = tl.zeros([BM, BN], tl.float32)
        for _some in range(0, STEP, RUN):
            run = tl.zeros([BM, BN], tl.float32)
            for _one in tl.static_range(RUN):
                x = tl.load(packed_x + tl.arange(0, BM)[:, None])
                y = tl.load(packed_y + tl.arange(0, BN)[None, :])
                diff = x - y
                run = tl.fma(diff, diff, run)
                packed_x += x_stride
                packed_y += y_stride
            part += run
        part -= lost
        whole = total + part
        lost = tl.where(whole < _INF, (whole - total) - part, 0.0)  # an infinite sum stays infinite
        total = whole
    return total


@triton.jit
def _exp_minus(d):
    """exp(-d) for d >= 0, to a few units in the last place. On a card tl.exp rounds d log2(e), and loses what d has after its point."""
    d = tl.minimum(d, 256.0)  # where it is 0; and inf - inf would be NaN
    whole = tl.floor(1.4426950216293335 * d)  # log2(e) in two floats
    rest = tl.fma(d, 1.9259629911266175e-8, tl.fma(d, 1.4426950216293335, -whole))
    return tl.exp2(-rest) * tl.exp2(-whole)


@triton.jit
def _slope(d, margin, FORM: tl.constexpr):
    """phi'(d)"""
    if FORM == "exponential":
        return -_exp_minus(d)
    elif FORM == "reciprocal":
        near = tl.div_rn(1.0, 1.0 + d)
        return -near * near
    elif FORM == "hinge":
        return tl.where(d < margin, -1.0, 0.0)
    else:
        return tl.full(d.shape, -1.0, tl.float32)


# ---- distances ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows", "n_columns", "depth", "row_tiles"])
def _sqdist(
    packed_x, packed_y, out, n_rows, n_columns, depth, x_stride, y_stride, out_stride, row_tiles,
    BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A tile of squared distances."""
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    column = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
    packed_x += tl.program_id(0) % row_tiles * BM
    packed_y += tl.program_id(0) // row_tiles * BN
    total = _squares(packed_x, packed_y, x_stride, y_stride, depth, BM, BN, STEP, RUN)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * out_stride + column[None, :], total, mask=inside)


# ---- the loss ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows", "n_columns", "depth", "row_tiles"])
def _pairs(
    packed_x, packed_y, square_x, square_y, labels, their_labels, group, their_group, weight, their_weight, margin, their_margin,
    part_row, part_pairs, part_active, coefficient, scale, n_rows, n_columns, depth, x_stride, y_stride, row_tiles,
    FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A tile of pairs: of each row the sum of phi, how many pairs count and how many of them are within the margin; to memory, if there
    is room for it, what the gradient takes of each pair: w_i phi'(d; m_i), and w_j phi'(d; m_j) as well where (j, i) is a pair too."""
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BM
    row = first_row + tl.arange(0, BM)
    column = tile * BN + tl.arange(0, BN)
    d = scale * _squares(packed_x + first_row, packed_y + tile * BN, x_stride, y_stride, depth, BM, BN, STEP, RUN)

    valid = row < n_rows
    theirs = column < n_columns
    mine = tl.load(labels + row, mask=valid, other=0)[:, None]
    counts = (mine != tl.load(their_labels + column, mask=theirs, other=0)[None, :]) & theirs[None, :]  # nobody reads rows beyond n_rows
    if group is not None:
        mine = tl.load(group + row, mask=valid, other=0)[:, None]
        counts = counts & (mine == tl.load(their_group + column, mask=theirs, other=0)[None, :])
    norm = tl.load(square_x + row)[:, None] + tl.load(square_y + column)[None, :]
    d = tl.where(norm == norm, d, float("nan"))  # the difference of an infinite row from a finite one is inf
    m = 0.0
    if margin is not None:
        m = tl.load(margin + row, mask=valid, other=0.0)[:, None]

    slope = _slope(d, m, FORM)
    if FORM == "exponential":
        phi = -slope
    elif FORM == "reciprocal":
        phi = tl.div_rn(1.0, 1.0 + d)
    elif FORM == "hinge":
        phi = tl.maximum(m - d, 0.0)
    else:
        phi = -d
    at = tl.cast(tile, tl.int64) * x_stride + row
    tl.store(part_row + at, _row_sum(tl.where(counts, tl.where(d == d, phi, float("nan")), 0.0), BM, BN))
    tl.store(part_pairs + at, tl.sum(counts.to(tl.int32), 1))
    if margin is not None:
        inside = tl.where(d == d, (d < m).to(tl.float32), float("nan"))
        tl.store(part_active + at, _row_sum(tl.where(counts, inside, 0.0), BM, BN))
    if coefficient is not None:
        pull = tl.load(weight + row, mask=valid, other=0.0)[:, None] * slope
        if their_weight is not None:
            if margin is not None:
                slope = _slope(d, tl.load(their_margin + column, mask=theirs, other=0.0)[None, :], FORM)
            pull += tl.load(their_weight + column, mask=theirs, other=0.0)[None, :] * slope
        pull = tl.where(counts, tl.where(d == d, pull, float("nan")), 0.0)
        tl.store(coefficient + column[None, :].to(tl.int64) * x_stride + row[:, None], pull)


@triton.jit(do_not_specialize=["n_rows", "tiles"])
def _sums(
    part_row, part_pairs, part_active, row_sum, pairs, active, n_rows, tiles, x_stride, ROWS: tl.constexpr, TILES: tl.constexpr
):
    """The parts of ROWS rows, in the order of the tiles; few enough for float64."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float64)
    number = tl.zeros([ROWS], tl.int64)
    within = tl.zeros([ROWS], tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = tile.to(tl.int64)[:, None] * x_stride + row[None, :]
        live = (tile < tiles)[:, None]
        total += tl.sum(tl.load(part_row + at, mask=live, other=0.0).to(tl.float64), 0)
        number += tl.sum(tl.load(part_pairs + at, mask=live, other=0).to(tl.int64), 0)
        if active is not None:
            within += tl.sum(tl.load(part_active + at, mask=live, other=0.0).to(tl.float64), 0)
    tl.store(row_sum + row, total.to(tl.float32), mask=row < n_rows)
    tl.store(pairs + row, number, mask=row < n_rows)
    if active is not None:
        tl.store(active + row, within.to(tl.float32), mask=row < n_rows)


# ---- the gradient ------------------------------------------------------------------------------------------------------


@triton.jit
def _half(value):
    """Half of it, so that no difference of finite values overflows; 0 for NaN and inf, which must not touch rows that take nothing of
    them. Where they count, the coefficient is NaN."""
    value = value.to(tl.float32)
    return tl.where(tl.abs(value) < _INF, 0.5 * value, 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_partners", "row_tiles"])
def _pull(
    rows, partners, coefficient, out, factor, n_rows, n_partners, d, row_stride, partner_stride, row_tiles,
    BM: tl.constexpr, BN: tl.constexpr, SEGMENT: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """out_i += factor sum_j c_ij (row_i - partner_j) / 2, for BM rows and BN coordinates, by direct differences and in segments."""
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    at = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
    inside = (row < n_rows)[:, None] & (at < d)[None, :]
    place = row[:, None].to(tl.int64) * d + at[None, :]
    mine = _half(tl.load(rows + place, mask=inside, other=0.0))
    total = tl.load(out + place, mask=inside, other=0.0)
    for first in range(0, n_partners, SEGMENT):
        part = tl.zeros([BM, BN], tl.float32)
        for start in range(first, tl.minimum(first + SEGMENT, n_partners), UNROLLED):
            for some in tl.static_range(UNROLLED):
                live = start + some < n_partners
                c = tl.load(coefficient + row[:, None].to(tl.int64) * row_stride, mask=live, other=0.0)
                theirs = _half(tl.load(partners + at[None, :], mask=(at < d)[None, :] & live, other=0.0))
                part = tl.fma(c, mine - theirs, part)
                coefficient += partner_stride
                partners += d
        total = tl.fma(part, factor, total)
    tl.store(out + place, total, mask=inside)
