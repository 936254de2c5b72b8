"""The device code of score_select: what each kernel is for is told where they are launched, in score_select.py."""

import triton
import triton.language as tl

_INF = tl.constexpr(float("inf"))
_ZERO = tl.constexpr(-104.0)  # exp of this and of less is 0 in float32, and no noise makes up for it


# ---- small device functions --------------------------------------------------------------------------------------------


@triton.jit
def _row_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of each row as a tree of two-term sums, so that the bits do not depend on how the rows are spread over threads."""
    for level in tl.static_range(0, 10):
        if COLUMNS >> level > 1:
            x = tl.sum(tl.reshape(x, [ROWS, COLUMNS >> (level + 1), 2]), 2)
    return tl.reshape(x, [ROWS])


@triton.jit
def _words(seed, row, group):
    """The four words of Philox4x32-10 for rows (R,) int64 and groups of four columns (G,): each (R, G)."""
    key = tl.load(seed)
    shape = row[:, None] * 0 + group[None, :]  # int64 (R, G)
    return tl.philox_impl(
        shape.to(tl.uint32), (row[:, None] + shape * 0).to(tl.uint32), ((row >> 32)[:, None] + shape * 0).to(tl.uint32),
        (shape * 0).to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def _gumbel(word):
    """-log(-log u), u = ((word >> 8) + .5) 2^-24. Float32 cannot hold u above 1/2, and where it is close to 1, that is where the noise
    is largest, all would be lost: -log u comes from v = 1 - u there."""
    high = (word >> 8).to(tl.int32)
    u = (high.to(tl.float32) + 0.5) * 2.0**-24
    v = ((0xFFFFFF - high).to(tl.float32) + 0.5) * 2.0**-24
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * (0.25 + v * 0.2))))
    return -tl.log(tl.where(v < 0.015625, series, -tl.log(u)))


# ---- which tiles count -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows", "n_columns", "row_tiles"])
def _screen(
    x, clean, square_x, square_clean, scale, std, log_prior, upper, lower, n_rows, n_columns, d, stride, row_tiles,
    alpha, beta, tau, slack,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each row of a tile: no logit that `_score` would find is above `upper`, and one is at least `lower`."""
    tile = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    column = tile * BN + tl.arange(0, BN)
    x_at = row[:, None].to(tl.int64) * d
    z_at = column[None, :].to(tl.int64) * d
    dot = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        at = start + tl.arange(0, BK)
        q = tl.load(x + x_at + at[None, :], mask=(row < n_rows)[:, None] & (at < d)[None, :], other=0.0)
        z = tl.load(clean + z_at + at[:, None], mask=(at < d)[:, None] & (column < n_columns)[None, :], other=0.0)
        if UPCAST:  # the interpreter has no arithmetic in bfloat16
            q = q.to(tl.float32)
            z = z.to(tl.float32)
        dot = tl.dot(q, z, dot, input_precision=PRECISION)

    s = tl.load(scale + row, mask=row < n_rows, other=0.0)[:, None]
    near = tl.div_rn(1.0, tl.load(std + row, mask=row < n_rows, other=1.0))[:, None]
    norm_x = tl.load(square_x + row, mask=row < n_rows, other=0.0)[:, None]
    norm_z = tl.load(square_clean + column, mask=column < n_columns, other=float("nan"))[None, :]
    both = norm_x + s * s * norm_z
    error = alpha * tl.abs(s) * tl.sqrt(norm_x) * tl.sqrt(norm_z) + beta * both + tau * (1.0 + tl.abs(s))
    middle = both - 2.0 * s * dot
    least = tl.maximum(middle - error, 0.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 - slack)
    most = (middle + error) * (1.0 + slack)
    high = -0.5 * (least * near * near)
    low = -0.5 * (most * near * near)
    if log_prior is not None:
        prior = tl.load(log_prior + column, mask=column < n_columns, other=-_INF)[None, :]
        around = tl.where(prior > -_INF, slack * tl.abs(prior), 0.0)
        high += prior + around
        low += prior - around
    high = tl.where(norm_z == norm_z, tl.where(high == high, high, _INF), -_INF)  # a row of clean with NaN or inf is out of the way
    low = tl.where(low == low, low, -_INF)
    at = tl.cast(tile, tl.int64) * stride + row
    tl.store(upper + at, tl.max(high, 1), mask=row < stride)
    tl.store(lower + at, tl.max(low, 1), mask=row < stride)


@triton.jit(do_not_specialize=["tiles"])
def _reach(lower, reach, tiles, stride, ROWS: tl.constexpr, TILES: tl.constexpr):
    """What a logit has to reach to leave a trace: rounding done, more than 104 below the largest it has none."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    some = tl.arange(0, TILES)
    top = tl.full([ROWS], -_INF, tl.float32)
    for first in range(0, tiles, TILES):
        at = (first + some).to(tl.int64)[:, None] * stride + row[None, :]
        top = tl.maximum(top, tl.max(tl.load(lower + at, mask=(first + some < tiles)[:, None], other=-_INF), 0))
    tl.store(reach + row, tl.where(top > -_INF, top + (_ZERO - 1.0) - 2.0**-20 * tl.abs(top), -_INF))


# ---- scores ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows"])
def _pack(source, packed, square, n_rows, d, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows of BLOCK coordinates, transposed to float32 and padded with zeros; the sum of their squares, NaN for a row with NaN or
    inf. Neighbouring threads of `_score` hold neighbouring rows of clean, so it wants them side by side."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (at < d)[None, :]
    value = tl.load(source + row[:, None].to(tl.int64) * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
    if packed is not None:
        tl.store(packed + at[:, None].to(tl.int64) * stride + row[None, :], tl.trans(value))
    finite = tl.min((tl.abs(value) < _INF).to(tl.int32), 1) != 0
    total = tl.sum(value * value, 1)
    tl.store(square + tl.program_id(1).to(tl.int64) * stride + row, tl.where(finite, total, float("nan")))


@triton.jit(do_not_specialize=["n_rows", "n_columns", "depth", "row_offset", "row_tiles", "first_tile"])
def _score(
    packed_x, packed_clean, scale, std, log_prior, seed, upper, reach, logits, part_max, part_sum, part_best, part_index,
    n_rows, n_columns, depth, x_stride, clean_stride, row_offset, row_tiles, first_tile,
    BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """A tile of logits by direct differences: to memory if there is room for them (`logits`), and of each row the largest, the sum of
    their exponentials relative to it and, given a seed, the largest perturbed one and its column.

    A squared distance is a compensated sum of partial sums of STEP terms: divided by a small 2 std^2 its rounding is what is left of
    the logit's accuracy."""
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BM
    row = first_row + tl.arange(0, BM)
    shrink = -tl.load(scale + row, mask=row < n_rows, other=0.0)[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    lost = tl.zeros([BM, BN], tl.float32)
    packed_x += first_row
    packed_clean += tl.cast(tile, tl.int64) * BN
    tile += first_tile  # of all columns, where packed_clean is a piece of them
    if upper is not None:
        upper += tl.cast(tile, tl.int64) * x_stride
        counts = tl.load(upper + row, mask=row < n_rows, other=-_INF) >= tl.load(reach + row, mask=row < n_rows, other=0.0)
        depth = tl.where(tl.max(counts.to(tl.int32), 0) != 0, depth, 0)
    for _ in range(0, depth, STEP):
        part = tl.zeros([BM, BN], tl.float32)
        for _some in range(0, STEP, UNROLLED):
            for _one in tl.static_range(UNROLLED):
                q = tl.load(packed_x + tl.arange(0, BM)[:, None])
                z = tl.load(packed_clean + tl.arange(0, BN)[None, :])
                diff = tl.fma(z, shrink, q)
                part = tl.fma(diff, diff, part)
                packed_x += x_stride
                packed_clean += clean_stride
        part -= lost
        whole = total + part
        lost = (whole - total) - part
        total = whole

    column = tile * BN + tl.arange(0, BN)
    h = tl.load(std + row, mask=row < n_rows, other=1.0)[:, None]
    near = tl.div_rn(1.0, h)
    rest = tl.fma(-near, h, 1.0) * near  # 1 / std = near + rest: a division costs more, a product with near alone is less exact
    # by std twice: its square would under- or overflow sooner
    total = tl.fma(total, rest, total * near)
    logit = -0.5 * tl.fma(total, rest, total * near)
    if log_prior is not None:
        logit += tl.load(log_prior + column, mask=column < n_columns, other=-_INF)[None, :]
    # NaN: the row of clean has one. (If it is the row of x, `_combine` says so.) An infinite sum has lost its compensation to inf - inf
    logit = tl.where((logit == logit) & (column < n_columns)[None, :], logit, -_INF)
    if upper is not None:
        # what this row needs, whatever the others of the tile do
        counts = tl.load(upper + row, mask=row < n_rows, other=-_INF) >= tl.load(reach + row, mask=row < n_rows, other=0.0)
        logit = tl.where(counts[:, None], logit, -_INF)
    if logits is not None:
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        tl.store(logits + row[:, None].to(tl.int64) * n_columns + column[None, :], logit, mask=inside)
    top = tl.max(logit, 1)
    at = tl.cast(tile, tl.int64) * x_stride + row
    tl.store(part_max + at, top)
    share = tl.exp(logit - tl.where(top > -_INF, top, 0.0)[:, None])
    tl.store(part_sum + at, _row_sum(share, BM, BN))
    if seed is not None:
        group = (tile * (BN // 4) + tl.arange(0, BN // 4)).to(tl.int64)
        a, b, c, d = _words(seed, tl.cast(row_offset, tl.int64) + row, group)
        noise = _gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))
        perturbed = logit + noise
        best = tl.max(perturbed, 1)
        tl.store(part_best + at, best)
        tl.store(part_index + at, tl.min(tl.where(perturbed == best[:, None], column[None, :], 0x7FFFFFFF), 1))


@triton.jit(do_not_specialize=["n_rows", "tiles", "blocks"])
def _combine(
    square, part_max, part_sum, part_best, part_index, row_max, row_sum, log_normalizer, index, n_rows, tiles, blocks, x_stride,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The parts of ROWS rows, in the order of the tiles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    some = tl.arange(0, TILES)
    valid = row < n_rows
    norm = tl.zeros([TILES, ROWS], tl.float32)
    for first in range(0, blocks, TILES):
        at = (first + some).to(tl.int64)[:, None] * x_stride + row[None, :]
        norm += tl.load(square + at, mask=(first + some < blocks)[:, None], other=0.0)
    norm = tl.sum(norm, 0)
    spoilt = norm != norm

    top = tl.full([ROWS], -_INF, tl.float32)
    best = tl.full([ROWS], -_INF, tl.float32)
    winner = tl.full([ROWS], -1, tl.int32)
    for first in range(0, tiles, TILES):
        at = (first + some).to(tl.int64)[:, None] * x_stride + row[None, :]
        live = (first + some < tiles)[:, None]
        top = tl.maximum(top, tl.max(tl.load(part_max + at, mask=live, other=-_INF), 0))
        if index is not None:
            value = tl.load(part_best + at, mask=live, other=-_INF)
            column = tl.load(part_index + at, mask=live, other=0)
            most = tl.max(value, 0)
            column = tl.min(tl.where(value == most[None, :], column, 0x7FFFFFFF), 0)
            winner = tl.where(most > best, column, winner)
            best = tl.maximum(best, most)
    base = tl.where(top > -_INF, top, 0.0)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, tiles, TILES):
        at = (first + some).to(tl.int64)[:, None] * x_stride + row[None, :]
        live = (first + some < tiles)[:, None]
        gap = tl.load(part_max + at, mask=live, other=-_INF) - base[None, :]
        total += tl.sum(tl.where(gap > _ZERO, tl.exp(gap) * tl.load(part_sum + at, mask=live, other=0.0), 0.0), 0)
    value = tl.where(top > -_INF, top + tl.log(total), -_INF)
    tl.store(log_normalizer + row, tl.where(spoilt, float("nan"), value), mask=valid)
    if index is not None:
        tl.store(index + row, tl.where(spoilt, -1, winner).to(tl.int64), mask=valid)
    if row_max is not None:
        tl.store(row_max + row, tl.where(spoilt, float("nan"), top), mask=valid)
        tl.store(row_sum + row, total, mask=valid)


@triton.jit(do_not_specialize=["n_rows", "n_columns"])
def _normalise(logits, row_max, row_sum, n_rows, n_columns, BLOCK: tl.constexpr):
    """Logits of a part of a row to probabilities, in place."""
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    column = tl.program_id(0) // n_rows * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * n_columns + column
    gap = tl.load(at, mask=column < n_columns, other=-_INF) - tl.load(row_max + row)  # NaN where no logit is finite
    share = tl.div_rn(tl.exp(gap), tl.load(row_sum + row))
    tl.store(at, tl.where(gap <= _ZERO, 0.0, share), mask=column < n_columns)


# ---- mixtures ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_rows", "n_columns", "row_tiles"])
def _mix(
    weight, clean, out, n_rows, n_columns, d, row_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SEGMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of weight @ clean. Rows of clean with NaN or inf must not touch what gives them no weight, so their elements are left out,
    and added one by one if there were any."""
    row = (tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)).to(tl.int64)
    at = tl.program_id(0) // row_tiles * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    broken = tl.zeros([BK, BN], tl.int32)
    weight += row[:, None] * n_columns
    for first in range(0, n_columns, SEGMENT):
        part = tl.zeros([BM, BN], tl.float32)  # tensor cores cut what they add to an accumulator; over a short one that is little
        for start in range(first, tl.minimum(first + SEGMENT, n_columns), BK):
            column = start + tl.arange(0, BK)
            inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
            w = tl.load(weight + column[None, :], mask=inside, other=0.0)
            inside = (column < n_columns)[:, None] & (at < d)[None, :]
            z = tl.load(clean + column.to(tl.int64)[:, None] * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
            finite = tl.abs(z) < _INF
            broken |= finite.to(tl.int32) ^ 1
            part = tl.dot(w, tl.where(finite, z, 0.0), part, input_precision=PRECISION)
        total += part
    if tl.max(tl.max(broken, 1), 0) != 0:
        for column in range(0, n_columns):
            w = tl.load(weight + column, mask=(row < n_rows)[:, None], other=0.0)
            z = tl.load(clean + tl.cast(column, tl.int64) * d + at, mask=at < d, other=0.0).to(tl.float32)[None, :]
            total += tl.where((tl.abs(z) < _INF) | (w == 0.0), 0.0, w * z)
    tl.store(out + row[:, None] * d + at[None, :], total, mask=(row < n_rows)[:, None] & (at < d)[None, :])
