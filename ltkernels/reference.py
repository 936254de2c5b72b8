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


def _row_chunks(rows: int, cost: int):
    step = max(1, _CHUNK // max(1, cost))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def prepare(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """centre (d,), points - centre (N, d) and its squared norms (N,), in float32: what the filters of the fast kernels work on.

    The centre is the median, column by column, of about a thousand rows: any point serves, and one row far away would drag the mean
    off and loosen every row's error bound. Rows with NaN or inf become zero rows with an infinite norm.
    """
    finite = torch.isfinite(points).all(1)
    sample = points[:: max(1, len(points) // 1024)]
    sample = sample[torch.isfinite(sample).all(1)].float()
    centre = sample.median(0).values if len(sample) else points.new_zeros(points.shape[1], dtype=torch.float32)
    centre = centre.nan_to_num(posinf=0, neginf=0)  # float64 beyond float32
    centred = torch.empty(points.shape, dtype=torch.float32, device=points.device)
    sqnorm = torch.empty(len(points), dtype=torch.float32, device=points.device)
    for rows in _row_chunks(len(points), points.shape[1]):
        shifted = points[rows].to(_arithmetic(points.dtype)) - centre
        centred[rows] = torch.where(finite[rows, None], shifted, 0).float()
        sqnorm[rows] = torch.where(finite[rows], centred[rows].double().square().sum(1), math.inf).float()
    return centre, centred, sqnorm


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
    for rows in _row_chunks(len(queries), points.numel()):
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


def kernel_logits(sqdist: Tensor, index: Tensor, bandwidth: Tensor, log_weight: Tensor | None) -> Tensor:
    logits = -sqdist / (2 * bandwidth[:, None].square())
    return logits if log_weight is None else logits + log_weight[index]


def diff_sum(queries: Tensor, points: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """(Q, d): sum_i coefficient[q, i] * (points[index[q, i]] - queries[q]). Terms with coefficient 0 count as 0, also at infinity."""
    dtype = _arithmetic(queries.dtype)
    out = torch.empty(queries.shape, dtype=dtype, device=queries.device)
    for rows in _row_chunks(len(queries), index.shape[1] * queries.shape[1]):
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
    for rows in _row_chunks(len(queries), index.shape[1] * queries.shape[1]):
        neighbour = points[index[rows]].to(dtype)
        dot = ((neighbour - queries[rows, None].to(dtype)) * vector[rows, None]).sum(-1)
        out[rows] = dot.masked_fill(~torch.isfinite(neighbour).all(-1), 0)
    return out


def diff_scatter(queries: Tensor, points: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """(N, d): row j sums coefficient[q, i] * (points[j] - queries[q]) over all (q, i) with index[q, i] = j, in the order of (q, i)."""
    dtype = _arithmetic(queries.dtype)
    out = torch.zeros(points.shape, dtype=dtype, device=points.device)
    for rows in _row_chunks(len(queries), index.shape[1] * queries.shape[1]):
        scatter_add(out, index[rows].flatten(), _terms(queries[rows], points, index[rows], coefficient[rows]).flatten(0, 1))
    return out


def scatter_add(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """out[index] += rows with the same bits in every run: index_add_ is serial on the CPU, a sorting index_put_ is on CUDA."""
    return out.index_add_(0, index, rows) if out.device.type == "cpu" else out.index_put_((index,), rows, accumulate=True)
