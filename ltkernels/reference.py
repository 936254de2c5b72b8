"""Plain-PyTorch definition of every op: the specification, the oracle of the tests and the baseline of the benchmarks.

Everything here is written for reading. Memory is bounded by splitting the queries; nothing else is optimised. The functions run on
any device and dtype; feed them float64 to get the numbers that every kernel is compared with.
"""

import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of the largest temporary: 4 MB in float32 stays in a cache; 64 MB took twice as long


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the answers: half types are computed and answered in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_chunks(of: Tensor, cost: int, elements: int = _CHUNK, on_a_card: int = 16):
    """Slices of the rows of `of`, each of which costs so many elements. On a card they are longer: it has launches to pay for."""
    step = max(1, (on_a_card * elements if of.is_cuda else elements) // max(1, cost))
    return (slice(i, min(i + step, len(of))) for i in range(0, len(of), step))


def centre(sample: Tensor) -> Tensor:
    """(d,) in float32, the median of the rows, column by column: any point serves, and one row far away would drag the mean off and loosen
    every row's error bound."""
    sample = sample[torch.isfinite(sample).all(1)].float()
    if len(sample) == 0:
        return sample.new_zeros(sample.shape[1], dtype=torch.float32)
    return sample.median(0).values.nan_to_num(posinf=0, neginf=0)  # float64 beyond float32


def bank_rows(points: Tensor, centre: Tensor, copy: bool) -> tuple[Tensor, Tensor]:
    """points - centre, (N, d) or without `copy` (0, d), and its squared norms (N,), in float32: what the filters of the fast kernels work
    on. Rows with NaN or inf become zero rows with an infinite norm."""
    centred = torch.empty(len(points) if copy else 0, points.shape[1], dtype=torch.float32, device=points.device)
    sqnorm = torch.empty(len(points), dtype=torch.float32, device=points.device)
    for rows in _row_chunks(points, points.shape[1]):
        finite = torch.isfinite(points[rows]).all(1)
        shifted = torch.where(finite[:, None], points[rows].to(_arithmetic(points.dtype)) - centre, 0).float()
        sqnorm[rows] = torch.where(finite, shifted.double().square().sum(1), math.inf).float()
        if copy:
            centred[rows] = shifted
    return centred, sqnorm


def knn(queries: Tensor, points: Tensor, k: int, self_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest rows of points (N, d) for each row of queries (Q, d): sqdist (Q, k) ascending, index (Q, k).

    Distances are sums of direct differences. Equal distances are ordered by index. A row of points with NaN or inf is infinitely
    far, a query with NaN or inf answers NaN, and row self_index[i] (-1: none) is no candidate of query i.
    """
    dtype = _arithmetic(queries.dtype)
    sqdist = torch.empty(len(queries), k, dtype=dtype, device=queries.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    points = points.to(dtype)
    far = ~torch.isfinite(points).all(1)
    for rows in _row_chunks(queries, points.numel()):
        chunk = queries[rows].to(dtype)
        distance = (points - chunk[:, None]).square().sum(-1, dtype=torch.float64).to(dtype)  # (rows, N)
        broken = ~torch.isfinite(chunk).all(1, keepdim=True)
        key = distance.masked_fill(far, math.inf).masked_fill(broken, 0)
        if self_index is not None:
            column = torch.arange(len(points), device=queries.device)
            key = key.masked_fill(self_index[rows, None] == column, math.nan)  # sort puts NaN behind inf
        key, order = torch.sort(key, dim=1, stable=True)
        sqdist[rows] = key[:, :k].masked_fill(broken, math.nan)
        index[rows] = order[:, :k]
    return sqdist, index


def knn_kde(
    queries: Tensor,
    points: Tensor,
    k: int,
    bandwidth: Tensor,
    self_index: Tensor | None = None,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_density (Q,), score (Q, d), sqdist (Q, k), index (Q, k) of the truncated kernel density with peak-1 Gaussian kernels.

    log p(q) = log 1/k sum_i w_i exp(-|q - z_i|^2 / 2h^2) over the k nearest z_i; score = d log p / dq.   (000: A.13, A.14)
    """
    sqdist, index = knn(queries, points, k, self_index)
    logits = kernel_logits(sqdist, index, bandwidth, log_weight)
    log_density = torch.logsumexp(logits, 1) - math.log(k)
    weight = torch.softmax(logits, 1) / bandwidth[:, None].square()
    return log_density, diff_sum(queries, points, index, weight), sqdist, index


def knn_kde_bounded(
    queries: Tensor, points: Tensor, centre: Tensor, centred: Tensor, sqnorm: Tensor, self_index: Tensor | None, bound: Tensor | None,
    k: int, bandwidth: Tensor, log_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the backend's `knn_kde` answers, and the truncation (Q,)."""
    found = torch.ops.ltkernels.knn_kde(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight)
    log_density, _, sqdist, index = found
    return *found, truncation(log_density, sqdist, index, bandwidth, log_weight, len(points), self_index)


def truncation(
    log_density: Tensor, sqdist: Tensor, index: Tensor, h: Tensor, log_weight: Tensor | None, n: int, self_rows: Tensor | None
) -> Tensor:
    """log(rest * exp(-r_k^2 / 2h^2) / S_k), rest the weight of the points that were dropped: N - k without weights. A constant."""
    k, wide, eps = index.shape[1], torch.finfo(torch.float64), torch.finfo(h.dtype).eps
    h, dtype = h.double(), h.dtype
    log_last = sqdist.detach().select(1, -1).double() / (h * h * -2.0)
    # where all neighbours are at infinity, whatever was dropped lies there, too: log_kept is finite for log_last - log_kept to be -inf
    log_kept = log_density.detach().double().clamp(min=wide.min) + math.log(k)
    rest = h.new_full((), n - k) if self_rows is None else n - k - (self_rows >= 0).double()
    if log_weight is not None:
        weight = log_weight.detach().double().exp()
        total = weight.sum()
        difference = total - weight[index].sum(1)
        if self_rows is not None:
            difference = difference - torch.where(self_rows >= 0, weight[self_rows.clamp(min=0)], 0)
        cancelled = 4 * n * wide.eps * total  # what the subtraction may have lost of a small rest
        rest = torch.where(rest > 0, difference.clamp(min=0) + cancelled, 0)
    # A bound must not fail in its last bit: kernels sum k terms in the inputs' arithmetic, in any order; log_last <= 0, log_kept and log k
    # are rounded in it, too.
    rounding = 8 * eps + 2 * wide.eps
    bound = torch.add((1 - rounding) * log_last - log_kept, log_kept.abs(), alpha=rounding)
    return (bound + (rest.log() + (rounding * (1 + math.log(k)) + k * eps))).to(dtype)


def kernel_logits(sqdist: Tensor, index: Tensor, bandwidth: Tensor, log_weight: Tensor | None) -> Tensor:
    logits = -sqdist / (2 * bandwidth[:, None].square())
    return logits if log_weight is None else logits + log_weight[index]


def diff_sum(queries: Tensor, points: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """(Q, d): sum_i coefficient[q, i] * (points[index[q, i]] - queries[q]). Terms with coefficient 0 count as 0, also at infinity."""
    dtype = _arithmetic(queries.dtype)
    out = torch.empty(queries.shape, dtype=dtype, device=queries.device)
    for rows in _row_chunks(queries, index.shape[1] * queries.shape[1]):
        out[rows] = _terms(queries[rows], points, index[rows], coefficient[rows]).sum(1)
    return out


def _terms(queries: Tensor, points: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    dtype = _arithmetic(queries.dtype)
    weight = coefficient[..., None]
    return (weight * (points[index].to(dtype) - queries[:, None].to(dtype))).masked_fill(weight == 0, 0)


def diff_dot(queries: Tensor, points: Tensor, index: Tensor, vector: Tensor) -> Tensor:
    """(Q, k): (points[index[q, i]] - queries[q]) . vector[q]. Rows of points with NaN or inf answer 0: their weight is 0 everywhere."""
    dtype = _arithmetic(queries.dtype)
    out = torch.empty(index.shape, dtype=dtype, device=queries.device)
    for rows in _row_chunks(queries, index.shape[1] * queries.shape[1]):
        neighbour = points[index[rows]].to(dtype)
        dot = ((neighbour - queries[rows, None].to(dtype)) * vector[rows, None]).sum(-1)
        out[rows] = dot.masked_fill(~torch.isfinite(neighbour).all(-1), 0)
    return out


def diff_scatter(queries: Tensor, points: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """(N, d): row j sums coefficient[q, i] * (points[j] - queries[q]) over all (q, i) with index[q, i] = j, in the order of (q, i)."""
    dtype = _arithmetic(queries.dtype)
    out = torch.zeros(points.shape, dtype=dtype, device=points.device)
    for rows in _row_chunks(queries, index.shape[1] * queries.shape[1]):
        scatter_add(out, index[rows].flatten(), _terms(queries[rows], points, index[rows], coefficient[rows]).flatten(0, 1))
    return out


def scatter_add(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """out[index] += rows with the same bits in every run: index_add_ is serial on the CPU, a sorting index_put_ is on CUDA."""
    return out.index_add_(0, index, rows) if out.device.type == "cpu" else out.index_put_((index,), rows, accumulate=True)


def psel_logits(x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None) -> Tensor:
    """(B, K): -|x_i - scale_i clean_j|^2 / (2 std_i^2) + log_prior_j; -inf for a row of clean with NaN or inf, NaN for such a row of x.

    Direct differences: expanding the square and dividing by 2 std^2 = 2e-4 would lose everything in float32.   (001: Eq. 5, 7, 8)
    """
    dtype = _arithmetic(x.dtype)
    points = clean.double()
    logits = torch.empty(len(x), len(clean), dtype=dtype, device=x.device)
    for rows in _row_chunks(x, clean.numel()):
        difference = x[rows, None].double() - scale[rows, None, None].double() * points  # rounded to float32, scale * clean would show
        wide = std[rows, None].double()
        logits[rows] = -(difference.square().sum(-1) / wide / wide / 2).to(dtype)  # std^2 could underflow
    if log_prior is not None:
        logits = logits + log_prior
    logits = logits.masked_fill(~torch.isfinite(points).all(1), -math.inf)
    return logits.masked_fill(~torch.isfinite(x).all(1, keepdim=True), math.nan)


def psel(x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax_j of the logits (B, K), and their logsumexp (B,)."""
    logits = psel_logits(x, clean, scale, std, log_prior)
    return torch.softmax(logits, 1), torch.logsumexp(logits, 1)


def psel_sample(
    x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None, seed: Tensor, row_offset: int
) -> tuple[Tensor, Tensor]:
    """A draw from each row's softmax (B,) by the Gumbel-max rule, -1 where no logit is finite; and the logsumexp (B,).

    Row i is row row_offset + i of the stream that `seed` (1,) names: a batch may be cut anywhere."""
    index, log_normalizer = torch.empty(len(x), dtype=torch.int64, device=x.device), torch.empty_like(scale)
    columns = torch.arange(len(clean), device=x.device)
    for rows in _row_chunks(x, 16 * len(clean)):  # the noise takes a dozen integers a pair
        logits = psel_logits(x[rows], clean, scale[rows], std[rows], log_prior)
        numbers = row_offset + torch.arange(rows.start, rows.stop, device=x.device)
        perturbed = logits + gumbel(philox(seed, numbers, columns)).to(logits.dtype)
        best = perturbed.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1)
        first = (perturbed == best[:, None]).to(torch.uint8).argmax(1)  # max promises no order among equals; argmax of a 0/1 row does
        index[rows] = torch.where(best > -math.inf, first, -1)
        log_normalizer[rows] = torch.logsumexp(logits, 1)
    return index, log_normalizer


def psel_mix(weight: Tensor, clean: Tensor) -> Tensor:
    """weight (B, K) @ clean (K, D). A weight of 0 takes nothing from its row, whatever is in it; a NaN weight gives a NaN row."""
    dtype = _arithmetic(clean.dtype)
    points = clean.to(dtype)
    out = torch.empty(len(weight), points.shape[1], dtype=dtype, device=points.device)
    for rows in _row_chunks(weight, points.numel()):
        share = weight[rows, :, None].to(dtype)
        out[rows] = (share * points).masked_fill(share == 0, 0).sum(1)  # the bits of a matrix product change with the number of threads
    return out


# The three that follow run on every backend: they are made of the ops psel and psel_mix, a few rows at a time.
GATES = ("full", "t2h", "h2t")


def score_select(
    x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None, seed: Tensor, row_offset: int, own: Tensor | None,
    counts: Tensor | None, labels: Tensor | None, self_labels: Tensor | None, gate: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """index (B,), whether it is another than own (B,) (None: i), and the logsumexp (B,): what the backend's `psel_sample` draws, where the
    gate lets it move there, else own. GATES[gate] compares counts (C,) of the class of the row drawn with that of row i, which is
    self_labels[i] or labels[own[i]].   (001: Alg. 1)"""
    index, log_normalizer = torch.ops.ltkernels.psel_sample(x, clean, scale, std, log_prior, seed, row_offset)
    if own is None:
        own = torch.arange(len(x), device=x.device)
    kept = index >= 0
    if counts is not None:
        there = counts[labels]
        here = there[own] if self_labels is None else counts[self_labels]
        drawn = there[index]  # of any row where the index is -1
        kept = kept & (drawn >= here if GATES[gate] == "t2h" else drawn <= here)
    index = torch.where(kept, index, own)
    return index, index != own, log_normalizer


_MIX_CHUNK = 1 << 22  # elements of p, or of the answer, held at a time: 16 MB in float32


def psel_mean(x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_j p_ij clean_j (B, D) in the dtype of x, and the logsumexp (B,): the backend's `psel` and `psel_mix`."""
    ops, clean = torch.ops.ltkernels, clean.contiguous()  # once, not in every chunk

    def part(x: Tensor, scale: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        p, log_normalizer = ops.psel(x, clean, scale, std, log_prior)
        return ops.psel_mix(p, clean).to(x.dtype), log_normalizer

    chunks = list(_row_chunks(x, max(clean.shape), _MIX_CHUNK))
    if len(chunks) == 1:  # a few rows, which putting together would cost as much again
        return part(x, scale, std)
    mean, log_normalizer = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(scale)
    for rows in chunks:
        mean[rows], log_normalizer[rows] = part(x[rows], scale[rows], std[rows])
    return mean, log_normalizer


def psel_backward(
    grad: Tensor, p: Tensor, x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, clean, scale, std, log_prior for grad (B, K) of p; an empty tensor for what is not needed."""
    part = slice(0, len(x)), p * (grad - _row_sums(p * grad))
    points, centre = _centred(clean)
    return _gradients([part], x, clean, scale, std, needed, points, points.T.contiguous(), centre, None)


def psel_mean_backward(
    grad: Tensor, x: Tensor, clean: Tensor, scale: Tensor, std: Tensor, log_prior: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same for grad (B, D) of the posterior mean m: dl_ij = p_ij (clean_j - m_i) . grad_i, and m . grad is sum_j p_j clean_j . grad.
    Memory: three times the size of clean, eight times where clean needs a gradient."""
    ops, wide, clean = torch.ops.ltkernels, grad.to(scale.dtype), clean.contiguous()
    shares = torch.zeros_like(clean, dtype=scale.dtype) if needed[1] else None  # of clean by way of the sum itself: p^T grad
    points, centre = _centred(clean)
    transposed = points.T.contiguous()

    def logits():
        for rows in _row_chunks(x, max(clean.shape), _MIX_CHUNK, on_a_card=1):
            p, _ = ops.psel(x[rows], clean, scale[rows], std[rows], log_prior)
            if shares is not None:
                shares.add_(ops.psel_mix(p.T.contiguous(), wide[rows]))
            along = torch.where(p == 0, 0, ops.psel_mix(wide[rows], transposed))
            yield rows, p * (along - _row_sums(p * along))

    return _gradients(logits(), x, clean, scale, std, needed, points, transposed, centre, shares)


def _gradients(parts, x, clean, scale, std, needed, points, transposed, centre, shares):
    """From (rows, dl (rows, K)): sum_j dl_ij = 0, so what is constant over j is left out; and x and clean are taken from a centre of clean,
    or the squares would cancel where that is far from the origin."""
    dtype, mix = scale.dtype, torch.ops.ltkernels.psel_mix
    likes = zip((x, clean, scale, std), needed[:4], strict=True)
    grads = [torch.zeros(like.shape if need else 0, dtype=dtype, device=x.device) for like, need in likes]
    prior = torch.zeros(len(clean) if needed[4] else 0, dtype=dtype, device=x.device)
    for rows, dl in parts:
        s, h = scale[rows, None], std[rows, None]
        wide = x[rows].to(dtype) - s * centre
        if needed[0]:  # -(x - s c) / std^2, whose x drops out
            grads[0][rows] = mix(dl, points) * s / h / h  # std^2 could underflow
        if needed[1]:  # s (x - s c) / std^2
            factor = dl * s / h / h
            grads[1].add_(mix(factor.T.contiguous(), wide) - (factor * s).sum(0)[:, None] * points)
        if needed[2] or needed[3]:
            cross = mix(wide, transposed)  # x . c
            norms = points.square().sum(1)
        if needed[2]:  # c . (x - s c) / std^2, c here with its centre
            shift = mix(centre[None], transposed)
            grads[2][rows] = _row_sums(torch.where(dl == 0, 0, dl * (cross - s * norms - s * shift)))[:, 0] / std[rows] / std[rows]
        if needed[3]:  # |x - s c|^2 / std^3, whose |x|^2 drops out
            terms = torch.where(dl == 0, 0, dl * (s.square() * norms - 2 * s * cross))
            grads[3][rows] = _row_sums(terms)[:, 0] / std[rows] / std[rows] / std[rows]
        if needed[4]:
            prior.add_(dl.sum(0))
    if shares is not None:
        grads[1].add_(shares)
    return grads[0].to(x.dtype), grads[1].to(clean.dtype), grads[2], grads[3], prior


def _row_sums(values: Tensor) -> Tensor:
    """(rows, 1), with the same bits for any number of threads, which torch's sum over one long row has not."""
    return torch.ops.ltkernels.psel_mix(values, values.new_ones(values.shape[1], 1))


def _centred(clean: Tensor) -> tuple[Tensor, Tensor]:
    """(clean - centre, centre (D,)) in the dtype of the answers. Rows with NaN or inf are zeros: their probability is 0, and so is all that
    they pass on. The centre is a median, as in `centre`: one row far away must not move it."""
    wide = clean.to(_arithmetic(clean.dtype))
    finite = torch.isfinite(wide).all(1)
    sample = wide[:: max(1, len(wide) // 1024)]
    sample = sample[torch.isfinite(sample).all(1)]
    centre = sample.median(0).values if len(sample) else wide.new_zeros(wide.shape[1])
    return torch.where(finite[:, None], wide - centre, 0), centre


def pair_sqdist(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 (B, B'), by direct differences."""
    out = torch.empty(len(x), len(y), dtype=_arithmetic(x.dtype), device=x.device)
    points = y.double()
    for rows in _row_chunks(x, y.numel()):
        out[rows] = (x[rows, None].double() - points).square().sum(-1).to(out.dtype)
    return out


def pair_sqdist_backward(grad: Tensor, x: Tensor, y: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor]:
    """2 sum_j grad_ij (x_i - y_j), and the same for y; an empty tensor for what is not needed. On every backend."""

    def along(rows: Tensor, points: Tensor, coefficient: Tensor) -> Tensor:
        every = torch.arange(len(points), device=rows.device).expand(len(rows), -1)
        return -2 * diff_sum(rows, points, every, coefficient)

    x_grad = along(x, y, grad) if needed[0] else x.new_empty(0)
    y_grad = along(y, x, grad.T) if needed[1] else y.new_empty(0)
    return x_grad.to(x.dtype), y_grad.to(y.dtype)


PCL_FORMS = ("exponential", "reciprocal", "hinge", "negative_l2")


def pcl_rows(
    mu: Tensor, labels: Tensor, group: Tensor | None, weight: Tensor, margin: Tensor | None,
    other: Tensor | None, other_labels: Tensor | None, other_group: Tensor | None, form: int, scale: float, grad: bool, other_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """For rows mu (B, D), against each other or against `other` (B', D); a pair counts where labels differ and groups are equal.

    row (B,) = sum_j phi(d_ij), d_ij = scale |mu_i - other_j|^2, phi the form of that number in PCL_FORMS; pairs (B,) int64, how many there
    are; active (B,), how many of them have d < margin (hinge; else empty); and the gradients of sum_i weight_i row_i with respect to mu and
    other, empty where not asked for. A pair with NaN or inf in one of its rows is NaN; a pair that does not count takes nothing from its
    rows, whatever is in them.   (002: Eq. 11 to 15)
    """
    dtype = _arithmetic(mu.dtype)
    among = other is None
    points, their_labels, their_group = (mu, labels, group) if among else (other, other_labels, other_group)
    row, active = torch.empty_like(weight), torch.empty_like(weight if margin is not None else weight[:0])
    pairs = torch.empty(len(mu), dtype=torch.int64, device=mu.device)
    mu_grad = torch.zeros(mu.shape if grad else 0, dtype=dtype, device=mu.device)
    partner_grad = torch.zeros(points.shape if other_grad else 0, dtype=torch.float64, device=mu.device)
    wide, broken = points.double(), ~torch.isfinite(points).all(1)
    for rows in _row_chunks(mu, points.numel()):
        difference = mu[rows, None].double() - wide  # (rows, B', D)
        d = scale * difference.square().sum(-1)
        counts = labels[rows, None] != their_labels
        if group is not None:
            counts &= group[rows, None] == their_group
        nan = broken | ~torch.isfinite(mu[rows]).all(1, keepdim=True)
        own, slope = _pcl_term(form, d, None if margin is None else margin[rows, None].double())
        row[rows] = torch.where(counts, own.masked_fill(nan, math.nan), 0).sum(1).to(dtype)
        pairs[rows] = counts.sum(1)
        if margin is not None:
            inside = (d < margin[rows, None]).double().masked_fill(nan, math.nan)
            active[rows] = torch.where(counts, inside, 0).sum(1).to(dtype)
        pull = weight[rows, None].double() * slope
        if among:  # (j, i) is a pair, too
            pull = pull + weight.double() * _pcl_term(form, d, None if margin is None else margin.double())[1]
        pull = torch.where(counts, pull.masked_fill(nan, math.nan), 0)[..., None]
        if grad or other_grad:
            terms = 2 * scale * torch.where(pull == 0, 0, pull * difference)
            if grad:
                mu_grad[rows] = terms.sum(1).to(dtype)
            if other_grad:
                partner_grad -= terms.sum(0)
    return row, pairs, active, mu_grad, partner_grad.to(dtype)


def _pcl_term(form: int, d: Tensor, margin: Tensor | None) -> tuple[Tensor, Tensor]:
    """phi(d) and its derivative."""
    name = PCL_FORMS[form]
    if name == "exponential":
        return (-d).exp(), -(-d).exp()
    if name == "reciprocal":
        return 1 / (1 + d), -1 / (1 + d).square()
    if name == "hinge":
        return (margin - d).clamp(min=0), -(d < margin).to(d.dtype)
    return -d, torch.full_like(d, -1)


def pcl(
    mu: Tensor, labels: Tensor, group: Tensor | None, weight: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum_i weight_i row_i / divisor (), the divisor (), the number of pairs or 1 if `mean`, else 1, and what else the backend's `pcl_rows`
    answers, of which the gradients are those of the sum."""
    *rest, mean = rest
    row, pairs, active, mu_grad, partner_grad = torch.ops.ltkernels.pcl_rows(mu, labels, group, weight, *rest)
    total = _row_sums((weight * row).unsqueeze(0)).squeeze() if len(row) else row.new_zeros(())
    divisor = pairs.sum().clamp(min=1).to(total.dtype) if mean else torch.ones_like(total)
    return total / divisor, divisor, row, active, mu_grad, partner_grad


def pcl_scaled(grad: Tensor, factor: Tensor, source: Tensor) -> Tensor:
    """grad * factor (), a derivative with respect to `source`: an op of its own so that deriving it once more can be refused."""
    return (grad * factor).to(source.dtype)


def philox(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows, columns) words of Philox4x32-10 (Salmon et al., 2011) as int64: key = seed, counter = (column / 4, row low, row high, 0)."""
    word = 0xFFFFFFFF
    seed = seed.reshape(()).to(rows.device)
    key = [seed & word, (seed >> 32) & word]
    group = torch.div(columns, 4, rounding_mode="floor")
    counter = [group & word, rows[:, None] & word, (rows[:, None] >> 32) & word, torch.zeros_like(rows[:, None])]
    counter = list(torch.broadcast_tensors(*counter))
    for _ in range(10):
        (high0, low0), (high2, low2) = _product(0xD2511F53, counter[0]), _product(0xCD9E8D57, counter[2])
        counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return torch.stack(counter).gather(0, (columns % 4).expand(1, len(rows), len(columns)))[0]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit numbers, in halves: int64 would overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(words: Tensor) -> Tensor:
    """-log(-log u), u = ((word >> 8) + .5) 2^-24, in float64."""
    return -((((words >> 8).double() + 0.5) * 2.0**-24).log().neg().log())
