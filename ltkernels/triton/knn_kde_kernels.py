"""The device code of knn_kde: what each kernel is for is told where they are launched, in knn_kde.py."""

import triton
import triton.language as tl

GROUP = 8  # columns whose minimum is kept: what one thread of an mma accumulator holds of 32 columns, so no shuffles

_INF = tl.constexpr(float("inf"))
_LAST = tl.constexpr(2**63 - 1)  # orders behind every (sqdist, index) key
_HUGE = tl.constexpr(2.0**126)  # an upper bound above this prunes nothing: rows whose sqnorm overflowed are not ruled out by it
_REGULAR = tl.constexpr(2.0**120)  # |q|^2 above this could overflow a product with a finite bank row
_NUMBER = tl.constexpr(2**24 - 1)  # a queued word: the group's number, and from bit 24 on which of its columns pass


# ---- small device functions --------------------------------------------------------------------------------------------


@triton.jit
def _ordered(x):
    """Unsigned integers in the order of the floats x."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _rank_limit(keys, rank, BITS: tl.constexpr):
    """For each row of unsigned-ordered keys (R, C): a limit with at least `rank` keys <= it, exactly the rank-th key unless ties
    stop the count from being met sooner. Most significant bit first; no sort, and it stops as soon as the count is met."""
    high = tl.max(keys, 1)
    low = high * 0
    within = low.to(tl.int32) + keys.shape[1]  # keys <= high
    bit = BITS - 1
    pending = 1
    while pending > 0:
        trial = low + ((low * 0 + 1) << bit)
        below = tl.sum((keys < trial[:, None]).to(tl.int32), 1)
        enough = below >= rank
        low = tl.where(enough, low, trial)
        high = tl.where(enough, trial - 1, high)
        within = tl.where(enough, below, within)
        bit -= 1
        pending = tl.where(bit >= 0, tl.max(within, 0) - rank, 0)
    return high


@triton.jit
def _group(word, MARKED: tl.constexpr):
    """The number of a group in a queued word."""
    return word & _NUMBER if MARKED else word


@triton.jit
def _tighten(lower, word, live, norm, bound, group_norm, rank, alpha, beta, tau, slack, MARKED: tl.constexpr):
    """The smaller of `bound` and what the rank-th smallest upper bound among the queued groups proves, per row of (R, C)."""
    far = tl.load(group_norm + _group(word, MARKED), mask=live, other=0.0)
    upper = lower + 2.0 * (alpha * norm[:, None] * far + beta * far * far + tau)
    upper = tl.where(live, upper, _INF)
    limit = _rank_limit(_ordered(upper), rank, 32)
    kth = tl.max(tl.where(_ordered(upper) <= limit[:, None], upper, -_INF), 1)
    enough = tl.sum(live.to(tl.int32), 1) >= rank
    kth = tl.where(enough & (kth <= _HUGE), kth, _INF)
    # the answer is ordered by the rounded sqdist: `slack` covers its rounding, at the radius that kth proves
    return tl.minimum(bound, kth + slack * (tl.abs(kth) + norm * norm) + 3.0 * tau)


@triton.jit
def _sqdist(query, points, column, valid, d, ROWS: tl.constexpr, LANES: tl.constexpr):
    """|q - z|^2 in LANES partial sums and a tree of two-term sums. Each two-term sum commutes, so the bits depend on neither the
    register layout nor the kernel this is inlined in: they are a function of the two rows alone."""
    lane = tl.arange(0, LANES)
    base = column.to(tl.int64) * d
    total = tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, d, LANES):
        at = start + lane
        q = tl.load(query + at, mask=at < d, other=0.0).to(tl.float32)
        z = tl.load(points + base[:, None] + at[None, :], mask=valid[:, None] & (at < d)[None, :], other=0.0).to(tl.float32)
        diff = z - q[None, :]
        total = tl.fma(diff, diff, total)
    for level in tl.static_range(0, 6):
        if LANES >> level > 1:
            total = tl.sum(tl.reshape(total, [ROWS, LANES >> (level + 1), 2]), 2)
    return tl.reshape(total, [ROWS])


# ---- filter ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_queries"])
def _rows(
    queries, centre, bound, centred_query, row_norm, row_bound, exact_count, n_queries, d, tau, slack,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per query, padded to whole tiles: the centred row, an upper bound of its norm, and what `bound` says in the filter's terms.

    Row norm NaN marks a query with NaN or inf, inf one whose norm is beyond the filter; both skip the filter (row bound -inf)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(exact_count, 0, mask=tl.program_id(0) == 0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    broken = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, d, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (row < n_queries)[:, None] & (at < d)[None, :]
        q = tl.load(queries + row[:, None] * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
        diff = q - tl.load(centre + at, mask=at < d, other=0.0)[None, :]
        diff = tl.where((row < n_queries)[:, None], diff, 0.0)
        tl.store(centred_query + row[:, None] * d + at[None, :], diff, mask=(at < d)[None, :])
        broken += (tl.abs(q) < _INF).to(tl.int32) ^ 1
        total += diff * diff
    square = tl.sum(total, 1)
    regular = square <= _REGULAR  # False for NaN
    if tl.min(regular.to(tl.int32), 0) == 0:
        tl.debug_barrier()  # erases what the loop above wrote
        for start in range(0, d, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = (regular.to(tl.int32) == 0)[:, None] & (at < d)[None, :]
            tl.store(centred_query + row[:, None] * d + at[None, :], tl.zeros([ROWS, BLOCK], tl.float32), mask=inside)

    norm = tl.where(regular, tl.sqrt(square * (1 + 2.0**-18) + tau) * (1 + 2.0**-20), _INF)
    tl.store(row_norm + row, tl.where(tl.sum(broken, 1) > 0, float("nan"), norm))
    limit = norm * 0 + _INF
    if bound is not None:
        given = tl.load(bound + row, mask=row < n_queries, other=0.0).to(tl.float32)
        limit = given + slack * (tl.abs(given) + norm * norm) + 3.0 * tau - square * (1 - 2.0**-18)
        limit = tl.where(limit <= _HUGE, limit, _INF)
    tl.store(row_bound + row, tl.where(regular & (row < n_queries), limit, -_INF))


@triton.jit
def _columns(sqnorm, column_bias, group_norm, n_points, beta, tau, BLOCK: tl.constexpr):
    """Per bank row, padded to whole tiles: sqnorm lowered by its own rounding; per group an upper bound of the largest norm. A row
    with sqnorm = inf gets bias inf: it passes the filter only while nothing is pruned."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    square = tl.load(sqnorm + column, mask=column < n_points, other=_INF)
    finite = square < _INF
    norm = tl.where(finite, tl.sqrt(square * (1 + 2.0**-18) + tau) * (1 + 2.0**-20), 0.0)
    tl.store(column_bias + column, tl.where(finite, square - beta * norm * norm - tau, _INF))
    largest = tl.max(tl.max(tl.reshape(norm, [BLOCK // 32, 4, 4, 2]), 3), 1)
    group = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(group_norm + group, tl.reshape(largest, [BLOCK // 8]))


@triton.jit
def _compact(
    queue_lower, queue_group, queue_count, queue_bound, row_norm, group_norm, rank, alpha, beta, tau, slack,
    BQ: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Tighten the bound of BQ queues and drop the groups above it. A queue left without ROOM (ties, tight clusters) gives up its
    row to the exact rung: bound -inf. The queue is written by other warps than read it, hence the barriers and .cg loads."""
    tl.debug_barrier()
    for first in range(0, BQ, ROWS):
        row = first + tl.arange(0, ROWS)
        count = tl.load(queue_count + row, cache_modifier=".cg")
        bound = tl.load(queue_bound + row, cache_modifier=".cg")
        norm = tl.load(row_norm + row)
        entry = tl.arange(0, CAP)
        live = entry[None, :] < count[:, None]
        at = row[:, None] * CAP + entry[None, :]
        lower = tl.load(queue_lower + at, mask=live, other=_INF, cache_modifier=".cg")
        group = tl.load(queue_group + at, mask=live, other=0, cache_modifier=".cg")
        bound = _tighten(lower, group, live, norm, bound, group_norm, rank, alpha, beta, tau, slack, MARKED)
        keep = (live & (lower <= bound[:, None])).to(tl.int32)
        count = tl.sum(keep, 1)
        to = row[:, None] * CAP + tl.cumsum(keep, 1) - keep
        tl.debug_barrier()
        tl.store(queue_lower + to, lower, mask=keep != 0)
        tl.store(queue_group + to, group, mask=keep != 0)
        full = count > CAP - ROOM
        tl.store(queue_count + row, tl.where(full, 0, count))
        tl.store(queue_bound + row, tl.where(full, -_INF, bound))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_points", "rank", "n_tiles", "tiles_per_split", "n_rows"])
def _filter(
    centred_query, centred, row_norm, row_bound, column_bias, group_norm,
    queue_lower, queue_group, queue_count, queue_bound,
    n_points, d, rank, alpha, beta, tau, slack, n_tiles, tiles_per_split, n_rows,
    BQ: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    TMA: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Program (i, s): BQ queries against the tiles of bank split s."""
    first_row = tl.program_id(0) * BQ
    row = tl.arange(0, BQ)
    state = tl.program_id(1).to(tl.int64) * n_rows + first_row  # first row of this program in the per-split arrays
    queue_count += state
    queue_bound += state
    queue_lower += state * CAP
    queue_group += state * CAP
    row_norm += first_row
    norm = tl.load(row_norm + row)
    reach = tl.where(norm < _INF, alpha * norm, 0.0)  # a row that skips the filter appends nothing
    bound = tl.load(row_bound + first_row + row)
    count = tl.zeros([BQ], tl.int32)
    GROUPS: tl.constexpr = BN // 8

    first_tile = tl.program_id(1) * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, n_tiles)
    if not TMA:
        if ALIGNED:
            d = d // 4 * 4  # tells the compiler that rows can be read 16 bytes at a time
        centred_query += first_row.to(tl.int64) * d
        q_at = row[:, None] * d
    for tile in range(first_tile, last_tile):
        column = tile * BN + tl.arange(0, BN)
        dot = tl.zeros([BQ, BN], tl.float32)
        if TMA:
            for start in range(0, d, BK):
                q = centred_query.load([first_row, start])
                z = centred.load([tile * BN, start])
                dot = tl.dot(q, z.T, dot, input_precision=PRECISION)
        else:
            bank = centred + tl.cast(tile, tl.int64) * BN * d  # 32-bit offsets inside a tile: half the registers
            z_at = tl.arange(0, BN)[None, :] * d
            for start in range(0, d, BK):
                at = start + tl.arange(0, BK)
                q = tl.load(centred_query + q_at + at[None, :], mask=(at < d)[None, :], other=0.0)
                z = tl.load(bank + z_at + at[:, None], mask=(at < d)[:, None] & (column < n_points)[None, :], other=0.0)
                dot = tl.dot(q, z, dot, input_precision=PRECISION)

        group = tile * GROUPS + tl.arange(0, GROUPS)
        key = tl.reshape(tl.load(column_bias + column)[None, :] - 2.0 * dot, [BQ, BN // 32, 4, 4, 2])
        # min skips NaN, which only a row with sqnorm = inf can give: such a row is no candidate once the bound is finite
        lower = tl.reshape(tl.min(tl.min(key, 4), 2), [BQ, GROUPS])
        margin = reach[:, None] * tl.load(group_norm + group)[None, :]
        lower -= margin
        lower = tl.where(lower == lower, lower, _INF)
        passes = lower <= bound[:, None]
        ones = passes.to(tl.int32)
        at = (row * CAP + count)[:, None] + tl.cumsum(ones, 1) - ones
        word = tl.broadcast_to(group[None, :], [BQ, GROUPS])
        if MARKED:
            bit = (1 << 24) << (2 * tl.arange(0, 4)[:, None, None] + tl.arange(0, 2)[None, None, :])
            far = key - tl.reshape(margin, [BQ, BN // 32, 1, 4, 1]) > tl.reshape(bound, [BQ, 1, 1, 1, 1])  # not those with NaN
            word |= tl.reshape(tl.sum(tl.sum(tl.where(far, 0, bit[None, None]), 4), 2), [BQ, GROUPS])
        tl.store(queue_lower + at, lower, mask=passes)
        tl.store(queue_group + at, word, mask=passes)
        count += tl.sum(ones, 1)
        if tl.max(count, 0) > CAP - GROUPS:
            tl.store(queue_count + row, count)
            tl.store(queue_bound + row, bound)
            _compact(
                queue_lower, queue_group, queue_count, queue_bound, row_norm, group_norm,
                rank, alpha, beta, tau, slack, BQ, CAP, ROWS, GROUPS, MARKED,
            )  # fmt: skip
            count = tl.load(queue_count + row, cache_modifier=".cg")
            bound = tl.load(queue_bound + row, cache_modifier=".cg")
    tl.store(queue_count + row, count)
    tl.store(queue_bound + row, bound)


@triton.jit(do_not_specialize=["n_queries", "rank", "n_rows"])
def _merge(
    queue_lower, queue_group, queue_count, queue_bound, row_norm, group_norm, listed, exact_rows, exact_count,
    n_queries, rank, alpha, beta, tau, slack, n_rows, ROWS: tl.constexpr, CAP: tl.constexpr, SPLITS: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """ROWS queries: the groups of a query from all splits, tightened once more, to the front of its first queue; `listed` of them.
    A query that any split gave up, or with more groups than a queue holds, goes to the exact rung instead (listed = 0)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, CAP * SPLITS)
    state = (entry // CAP).to(tl.int64)[None, :] * n_rows + row[:, None]
    live = (entry % CAP)[None, :] < tl.load(queue_count + state)
    at = state * CAP + (entry % CAP)[None, :]
    lower = tl.load(queue_lower + at, mask=live, other=_INF)
    group = tl.load(queue_group + at, mask=live, other=0)
    split = tl.arange(0, SPLITS).to(tl.int64)
    bound = tl.min(tl.load(queue_bound + split[None, :] * n_rows + row[:, None]), 1)
    searched = bound > -_INF
    if tl.max(tl.sum(live.to(tl.int32), 1), 0) > rank:
        norm = tl.load(row_norm + row)
        bound = _tighten(lower, group, live, norm, bound, group_norm, rank, alpha, beta, tau, slack, MARKED)
    keep = (live & (lower <= bound[:, None])).to(tl.int32)
    count = tl.sum(keep, 1)
    to = tl.cumsum(keep, 1) - keep
    count = tl.where(searched & (count <= CAP), count, 0)
    tl.debug_barrier()  # the list overwrites the queue it was read from
    tl.store(queue_group + row[:, None] * CAP + to, group, mask=(keep != 0) & (to < count[:, None]))
    tl.store(listed + row, count)
    lost = (count == 0) & (row < n_queries)
    # the order of this list depends on timing, the answers of its rows do not
    tl.store(exact_rows + tl.atomic_add(exact_count + row * 0, 1, mask=lost), row.to(tl.int32), mask=lost)


# ---- exact distances and the k best ------------------------------------------------------------------------------------


@triton.jit
def _keep_smallest(buffer, count, k, SIZE: tl.constexpr):
    """Move the k smallest of `count` > k distinct keys to the front of the buffer; returns the k-th."""
    tl.debug_barrier()  # the buffer was written by other warps than read it
    entry = tl.arange(0, SIZE)
    keys = tl.load(buffer + entry, mask=entry < count, other=_LAST, cache_modifier=".cg")
    limit = tl.max(_rank_limit(keys[None, :], k, 63), 0)
    keep = (keys <= limit).to(tl.int32)
    to = tl.cumsum(keep, 0) - keep
    tl.debug_barrier()
    tl.store(buffer + to, keys, mask=keep != 0)
    tl.debug_barrier()
    return tl.max(tl.where(keep != 0, keys, 0), 0)


@triton.jit
def _spread(columns, queue, first, end, SOME: tl.constexpr, MARKED: tl.constexpr):
    """Write the columns of the groups first .. first + SOME - 1 of a queue of `end`, where marked only those that passed; how many."""
    tl.debug_barrier()  # the columns of the groups before have been read
    entry = first + tl.arange(0, SOME)
    word = tl.load(queue + entry, mask=entry < end, other=0)
    member = tl.arange(0, 8)[None, :]
    live = (entry < end).to(tl.int32)[:, None] + member * 0
    if MARKED:
        live = (word[:, None] >> (24 + member)) & 1
    group = _group(word, MARKED)
    column = (group // 4 * 32 + group % 4 * 2)[:, None] + member // 2 * 8 + member % 2
    each = tl.sum(live, 1)
    to = (tl.cumsum(each, 0) - each)[:, None] + tl.cumsum(live, 1) - live
    tl.store(columns + to, column, mask=live != 0)
    tl.debug_barrier()  # and will be read by other warps
    return tl.sum(each, 0)


@triton.jit
def _write_sorted(buffer, sqdist, index, k, spoilt, KP: tl.constexpr):
    """The k keys at the front of the buffer, in order, as (sqdist, index): each key's place is the number of smaller ones."""
    entry = tl.arange(0, KP)
    keys = tl.load(buffer + entry, mask=entry < k, other=_LAST, cache_modifier=".cg")
    place = tl.zeros([KP], tl.int32)
    for first in range(0, KP, 16):
        some = first + tl.arange(0, 16)
        others = tl.load(buffer + some, mask=some < k, other=_LAST, cache_modifier=".cg")
        place += tl.sum((others[None, :] < keys[:, None]).to(tl.int32), 1)
    distance = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(sqdist + place, tl.where(spoilt, float("nan"), distance), mask=entry < k)
    tl.store(index + place, keys & 0xFFFFFFFF, mask=entry < k)


@triton.jit(do_not_specialize=["n_queries", "n_points", "k"])
def _select(
    queries, points, self_index, row_norm, queue_group, listed, exact_rows, exact_count, exact_keys, scratch, columns, sqdist, index,
    n_queries, n_points, d, k,
    SOURCE: tl.constexpr, KP: tl.constexpr, CAP: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, MAX_PARTS: tl.constexpr, SOME: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """The k smallest keys (sqdist bits, index) of each query, by a buffer that is cut back to k whenever it is full.

    SOURCE "groups": the bank rows of the listed groups, every query that has a list. "bank": a part of the bank for a query of the
    exact rung; as many parts as there are programs to spare, each leaving k keys. "parts": those keys. Keys are distinct, so cutting
    back always works. Programs walk over the items, because only the device knows how many queries need the exact rung."""
    program = tl.program_id(0)
    buffer = scratch + program.to(tl.int64) * SIZE
    columns += program.to(tl.int64) * (8 * SOME)
    parts = 1
    items = n_queries
    if SOURCE != "groups":
        exact = tl.load(exact_count)
        parts = tl.minimum(tl.maximum(tl.num_programs(0) // tl.maximum(exact, 1), 1), MAX_PARTS)
        items = exact
    if SOURCE == "bank":
        items = exact * parts
    for item in range(program, items, tl.num_programs(0)):
        begin = 0
        if SOURCE == "groups":
            row = tl.cast(item, tl.int64)
            end = tl.load(listed + row)
        elif SOURCE == "bank":
            row = tl.load(exact_rows + item // parts).to(tl.int64)
        else:
            row = tl.load(exact_rows + item).to(tl.int64)
            end = parts * KP
        norm = tl.load(row_norm + row)
        spoilt = norm != norm
        if SOURCE == "bank":
            # a query with NaN is equally far from all rows: the first k + 1 hold its answer
            last = tl.where(spoilt, tl.minimum(n_points, k + 1), n_points)
            share = tl.maximum(tl.cdiv(last, parts), 8 * ROWS)
            begin = tl.minimum(item % parts * share, last)
            end = tl.minimum(begin + share, last)
        skip = -1
        if self_index is not None:
            skip = tl.load(self_index + row).to(tl.int32)
        count = 0
        kth = tl.full([], _LAST, tl.int64)
        for first in range(begin, end, SOME if SOURCE == "groups" else tl.maximum(end - begin, 1)):
            found = end - begin
            if SOURCE == "groups":
                found = _spread(columns, queue_group + row * CAP, first, end, SOME, MARKED)
            for start in range(0, found, ROWS):
                entry = start + tl.arange(0, ROWS)
                if SOURCE == "parts":
                    keys = tl.load(exact_keys + (item * parts).to(tl.int64) * KP + entry, mask=entry < found, other=_LAST)
                else:
                    column = first + entry
                    if SOURCE == "groups":
                        column = tl.load(columns + entry, mask=entry < found, other=0, cache_modifier=".cg")
                    valid = (entry < found) & (column < n_points) & (column != skip)
                    distance = _sqdist(queries + row * d, points, column, valid, d, ROWS, LANES)
                    distance = tl.where(spoilt, 0.0, tl.where(distance == distance, distance, _INF))
                    keys = (distance.to(tl.int32, bitcast=True).to(tl.int64) << 32) | column.to(tl.int64)
                    keys = tl.where(valid, keys, _LAST)
                passes = (keys < kth).to(tl.int32)
                tl.store(buffer + count + tl.cumsum(passes, 0) - passes, keys, mask=passes != 0)
                count += tl.sum(passes, 0)
                if count > SIZE - ROWS:
                    kth = _keep_smallest(buffer, count, k, SIZE)
                    count = k
        if (SOURCE != "groups") | (end > 0):
            tl.debug_barrier()
            if count > k:
                _keep_smallest(buffer, count, k, SIZE)
            if SOURCE == "bank":
                entry = tl.arange(0, KP)
                keys = tl.load(buffer + entry, mask=entry < tl.minimum(count, k), other=_LAST, cache_modifier=".cg")
                tl.store(exact_keys + tl.cast(item, tl.int64) * KP + entry, keys)
            else:
                _write_sorted(buffer, sqdist + row * k, index + row * k, k, spoilt, KP)
        tl.debug_barrier()  # the next item reuses the buffer


@triton.jit(do_not_specialize=["k"])
def _density(
    queries, points, bandwidth, log_weight, sqdist, index, log_density, score, d, k, log_k,
    KP: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a query. Divides by the bandwidth twice rather than by its square, which would under- or overflow sooner."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.load(bandwidth + row).to(tl.float32)
    sqdist += row * k
    index += row * k
    entry = tl.arange(0, KP)
    logit = -0.5 * tl.div_rn(tl.div_rn(tl.load(sqdist + entry, mask=entry < k, other=_INF), h), h)
    if log_weight is not None:
        logit += tl.load(log_weight + tl.load(index + entry, mask=entry < k, other=0))
    top = tl.max(logit, 0)
    first = tl.load(sqdist)
    spoilt = first != first
    empty = top == -_INF  # every winner has weight 0
    total = tl.sum(tl.where(logit > -_INF, tl.exp(logit - tl.where(empty, 0.0, top)), 0.0), 0)
    value = tl.where(empty, -_INF, top + tl.log(total) - log_k)
    tl.store(log_density + row, tl.where(spoilt, float("nan"), value))

    scale = tl.where(empty | spoilt, float("nan"), 1.0)
    for start in range(0, d, BLOCK):
        at = start + tl.arange(0, BLOCK)
        q = tl.load(queries + row * d + at, mask=at < d, other=0.0).to(tl.float32)
        pull = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, k, SOME):
            some = begin + tl.arange(0, SOME)
            neighbour = tl.load(index + some, mask=some < k, other=0)
            share = -0.5 * tl.div_rn(tl.div_rn(tl.load(sqdist + some, mask=some < k, other=_INF), h), h)
            if log_weight is not None:
                share += tl.load(log_weight + neighbour)
            share = tl.where(share > -_INF, tl.exp(share - tl.where(empty, 0.0, top)), 0.0)
            used = (share > 0)[:, None] & (at < d)[None, :]
            z = tl.load(points + neighbour[:, None] * d + at[None, :], mask=used, other=0.0).to(tl.float32)
            pull += tl.sum(tl.where(used, share[:, None] * (z - q[None, :]), 0.0), 0)
        pull = tl.div_rn(tl.div_rn(tl.div_rn(pull, tl.where(empty, 1.0, total)), h), h)
        tl.store(score + row * d + at, pull * scale, mask=at < d)
