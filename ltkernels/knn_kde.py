"""Truncated k-nearest-neighbour kernel density, its score, and the search behind them."""

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _arrays, backends, reference
from .bank import Bank, as_bank

_KERNEL_NORMS = ("peak", "density")
_RULES = ("knn-median", "scott")


class Neighbors(NamedTuple):
    """sqdist (Q, k) ascending, index (Q, k) int64 rows of the bank."""

    sqdist: Tensor
    index: Tensor


class KDE(NamedTuple):
    """What knn_kde_grad answers; the properties are derived from the fields when read."""

    log_density: Tensor  # (Q,)
    score: Tensor  # (Q, d)  d log p / d query
    index: Tensor  # (Q, k)
    sqdist: Tensor  # (Q, k)
    truncation: Tensor  # (Q,)

    @property
    def density(self):
        """(Q,) p. It underflows where log_density does not: prefer the logarithm."""
        return _arrays.in_kind(self.log_density)(_tensor(self.log_density).exp())

    @property
    def density_grad(self):
        """(Q, d) dp / d query = p * score."""
        return _arrays.in_kind(self.log_density)(_tensor(self.log_density).exp()[:, None] * _tensor(self.score))

    def potential(self, rho: float):
        """(U (Q,), dU / d query (Q, d)) of U = -log(p + rho) in log domain; rho >= 0 bounds the gradient far away.   (000: A.4, A.5)"""
        if not (isinstance(rho, _arrays.REAL) and 0 <= rho < math.inf):
            raise ValueError(f"KDE.potential: rho must be a finite number >= 0; got {rho!r}")
        log_density, score, back = _tensor(self.log_density), _tensor(self.score), _arrays.in_kind(self.log_density)
        if rho == 0:
            return back(-log_density), back(-score)
        log_rho = torch.full_like(log_density, math.log(rho))
        return back(-torch.logaddexp(log_density, log_rho)), back(-torch.sigmoid(log_density - log_rho)[:, None] * score)


def knn(queries, bank, k: int, *, self_index=None) -> Neighbors:
    r"""The k nearest rows of the bank for every query, by squared Euclidean distance.

    Args:
        queries: (Q, d) in float16, bfloat16, float32 or float64; any strides; Q may be 0.
        bank: Bank, or (N, d) points of the same dtype and device.
        k: 1 <= k <= N; at most 256 on the cuda and triton backends, where d is at most 4096.
        self_index: rows to leave out. True: query i is row i of the bank, by position (needs Q = N and k <= N - 1).
            (Q,) int64: the row of the bank to skip for each query, -1 for none.

    Returns:
        Neighbors(sqdist (Q, k), index (Q, k)). sqdist is float32 (float64 for float64 inputs), a sum of direct differences, ascending;
        equal values are ordered by index, also at the k-th place. Both are the same, bit by bit, in every run on a backend and
        machine, for any number of threads and any split of the queries.

    A row of the bank with NaN or inf is infinitely far. A query with NaN or inf answers NaN distances.
    sqdist is differentiable once in queries and points; the choice of neighbours is constant.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, k or self_index. RuntimeError: no backend for the device.

    Example:
        >>> sqdist, index = knn(torch.randn(5, 8), torch.randn(100, 8), k=3)
    """
    kind = _arrays.in_kind(queries)
    queries, bank, self_rows, bound = _checked("knn", queries, bank, k, self_index)
    sqdist, index = backends.call(
        "knn", queries, bank.points, bank.centre, bank.centred, bank.sqnorm, self_rows, bound, k
    )
    if self_index is True:
        bank._remember(queries, k, sqdist)
    return Neighbors(kind(sqdist), kind(index))


def knn_kde_grad(queries, bank, k: int = 64, *, bandwidth, self_index=None, kernel_norm: str = "peak") -> KDE:
    r"""Log-density of a Gaussian kernel density estimate over the k nearest points, and its gradient (the score).

    log p(q) = log 1/k sum_{i in kNN(q)} w_i K_h(q - z_i),   K_h(r) = exp(-|r|^2 / 2 h^2)
    score(q) = d log p / dq = sum_i softmax_i(log w_i - |q - z_i|^2 / 2 h^2) (z_i - q) / h^2        (000: A.13, A.14)

    Args:
        queries: (Q, d) in float16, bfloat16, float32 or float64; any strides; Q may be 0.
        bank: Bank (with optional weights of mean 1), or (N, d) points of the same dtype and device.
        k: neighbours kept, 1 <= k <= N; at most 256 on the cuda and triton backends, where d is at most 4096.
        bandwidth: h > 0 in units of the data: a number, a 0-dim tensor, or (Q,). `knn_bandwidth` proposes one.
        self_index: rows to leave out, e.g. True for leave-one-out densities of the bank itself; see `knn`.
        kernel_norm: "peak": kernels of height 1, so log p <= max log w. "density": kernels of mass 1, so that k = N is the ordinary
            kernel density estimate.

    Returns:
        KDE(log_density (Q,), score (Q, d), index (Q, k), sqdist (Q, k), truncation (Q,)), float32 (float64 for float64 inputs).
        truncation bounds what the dropped points could add: log(S_N / S_k) <= log1p(exp(truncation)), S the sum over N or k points.
            It is a constant for autograd.

    Deterministic, see `knn`. Extra memory O(Q k), never Q x N. Differentiable: log_density and score any number of times in queries;
    log_density, score and sqdist once in the bank's points and log_weight. Neighbours are constants. Everything else raises.
    A query with NaN or inf answers NaN; a query infinitely far from all neighbours answers log_density -inf and score NaN.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, k, bandwidth, self_index or kernel_norm. RuntimeError: no backend.

    Example:
        >>> points = torch.randn(1000, 16)
        >>> kde = knn_kde_grad(points, points, 64, bandwidth=knn_bandwidth(points), self_index=True)
        >>> uphill = points + 0.1 * kde.score
    """
    op = "knn_kde_grad"
    if kernel_norm not in _KERNEL_NORMS:
        raise ValueError(f"{op}: kernel_norm must be one of {', '.join(_KERNEL_NORMS)}; got {kernel_norm!r}")
    kind = _arrays.in_kind(queries)
    queries, bank, self_rows, bound = _checked(op, queries, bank, k, self_index)
    h = _bandwidth_rows(op, bandwidth, queries)
    log_weight = bank._mean_one_log_weight()
    log_density, score, sqdist, index, truncation = backends.call(
        "knn_kde_bounded", queries, bank.points, bank.centre, bank.centred, bank.sqnorm, self_rows, bound, k, h, log_weight
    )
    if self_index is True:
        bank._remember(queries, k, sqdist)
    if kernel_norm == "density":
        log_density = log_density - 0.5 * queries.shape[1] * (math.log(2 * math.pi) + 2 * h.log())
    return KDE(*(kind(x) for x in (log_density, score, index, sqdist, truncation)))


def knn_bandwidth(bank, k: int = 64, rule: str = "knn-median") -> Tensor:
    r"""A bandwidth for `knn_kde_grad`, in units of the data, as a 0-dim tensor.

    rule "knn-median": median over the bank's rows of the distance to the k-th nearest other row (000 gives no rule; ours).
    rule "scott": N^(-1/(d+4)) times the root of the mean variance of the columns (Scott 1992), k is not used.
    Rows with NaN or inf do not count. No gradient.

    Raises:
        ValueError: unknown rule, k outside [1, N - 1], no finite row, or a bandwidth of 0 (more than k exact copies of most rows).
    """
    op = "knn_bandwidth"
    if rule not in _RULES:
        raise ValueError(f"{op}: rule must be one of {', '.join(_RULES)}; got {rule!r}")
    source, bank = bank, as_bank(op, bank)
    kind = _arrays.in_kind(bank.points if isinstance(source, (Bank, str, os.PathLike)) else source)
    with torch.no_grad():
        if rule == "scott":
            variance, n = _mean_variance(bank)
            h = variance.sqrt().to(_answer_dtype(bank.points)) * max(n, 1) ** (-1 / (bank.points.shape[1] + 4))
        else:
            points, bank, self_rows, bound = _checked(op, bank.points, bank, k, True)
            sqdist, _ = backends.call(
                "knn", points, bank.points, bank.centre, bank.centred, bank.sqnorm, self_rows, bound, k
            )
            bank._remember(points, k, sqdist)
            radius = sqdist[:, -1].sqrt().sort().values  # inf and NaN come last
            finite = int((radius < math.inf).sum())
            h = (radius[(finite - 1) // 2] + radius[finite // 2]) / 2 if finite else radius.new_tensor(math.nan)
    if not h.item() > 0:
        raise ValueError(f"{op}: rule {rule!r} gives {h.item()}; the bank has too few finite or too many identical rows; name a bandwidth")
    return kind(h)


def _mean_variance(bank: Bank) -> tuple[Tensor, int]:
    """Of the columns of the finite rows, and the number of these; NaN for fewer than two."""
    finite = torch.isfinite(bank.sqnorm)
    n, square = int(finite.sum()), 0.0
    total = torch.zeros(bank.points.shape[1], dtype=torch.float64, device=bank.points.device)
    for points, kept in zip(bank.points.split(1 << 14), finite.split(1 << 14), strict=True):
        rows = points[kept].double() - bank.centre
        total += rows.sum(0)
        square = square + rows.square().sum()
    return (square - total.square().sum() / max(n, 1)) / (n - 1 or math.nan) / len(total), n


def _tensor(x) -> Tensor:
    return _arrays.tensor("KDE", "field", x)


def _has_tangent(x: Tensor) -> bool:
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def _answer_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _checked(op: str, queries, bank, k, self_index) -> tuple[Tensor, Bank, Tensor | None, Tensor | None]:
    """Validated queries, bank, rows to skip and warm bound: every error a caller can make in a search is raised here."""
    queries = _arrays.matrix(op, "queries", queries)
    bank = as_bank(op, bank)
    points = bank.points
    for x in (queries, points, bank.log_weight):
        if x is not None and _has_tangent(x):  # torch.library has no forward mode: the answers' tangents would silently be zero
            raise NotImplementedError(f"{op}: no forward-mode derivatives; use torch.autograd.grad")
    if queries.shape[1] != points.shape[1]:
        raise ValueError(
            f"{op}: expected queries and bank with the same number of columns; got {tuple(queries.shape)} and {tuple(points.shape)}"
        )
    if queries.device != points.device:
        raise ValueError(f"{op}: expected queries and bank on one device; got {queries.device} and {points.device}")
    if queries.dtype != points.dtype:
        if not torch.is_autocast_enabled(queries.device.type):
            raise TypeError(f"{op}: expected queries and bank of one dtype; got {queries.dtype} and {points.dtype}")
        queries = queries.to(points.dtype)  # the bank is the large one: autocast must not copy it
    n = len(points)
    if isinstance(k, bool) or not isinstance(k, _arrays.INTEGRAL):
        raise TypeError(f"{op}: k must be an int; got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"{op}: k must be in [1, N]; got k={k} with N={n}")
    if self_index is None or self_index is False:
        return queries, bank, None, None
    if self_index is True:
        if len(queries) != n:
            raise ValueError(f"{op}: self_index=True needs as many queries as points; got Q={len(queries)} and N={n}")
        rows, bound = torch.arange(n, device=queries.device), bank._bound(queries, k)
    else:
        rows, bound = _self_rows(op, self_index, queries, n), None
    if k == n and (self_index is True or bool((rows >= 0).any())):
        raise ValueError(f"{op}: k must be in [1, N-1] where self_index leaves a row out; got k={k} with N={n}")
    return queries, bank, rows, bound


def _self_rows(op: str, self_index, queries: Tensor, n: int) -> Tensor:
    rows = _arrays.tensor(op, "self_index", self_index)
    if rows.dtype != torch.int64 or rows.shape != queries.shape[:1]:
        expected = f"True or an int64 tensor of shape ({len(queries)},)"
        raise ValueError(f"{op}: expected self_index as {expected}; got {rows.dtype} of shape {tuple(rows.shape)}")
    if rows.device != queries.device:
        raise ValueError(f"{op}: expected self_index on the device of the queries, {queries.device}; got {rows.device}")

    def error() -> ValueError:
        return ValueError(f"{op}: self_index must be in [-1, N); got {rows.min().item()} .. {rows.max().item()} with N={n}")

    _arrays.settle([_arrays.Doubt(rows, -1, n - 1, error)])
    return rows.contiguous()


def _bandwidth_rows(op: str, bandwidth, queries: Tensor) -> Tensor:
    """(Q,) in the dtype of the answers."""
    dtype = _answer_dtype(queries)
    if isinstance(bandwidth, _arrays.REAL) and not isinstance(bandwidth, bool):
        tiny, most = _arrays.LIMITS[dtype]
        if not tiny <= bandwidth <= most:
            raise ValueError(f"{op}: bandwidth must be positive and finite in {dtype}; got {bandwidth}")
        return torch.full((len(queries),), float(bandwidth), dtype=dtype, device=queries.device)
    try:
        h = _arrays.tensor(op, "bandwidth", bandwidth)
    except TypeError:
        raise TypeError(f"{op}: bandwidth must be a number, a 0-dim tensor or (Q,); got {type(bandwidth).__name__}") from None
    if h.dim() > 1 or (h.dim() == 1 and len(h) != len(queries)):
        raise ValueError(f"{op}: bandwidth must be a number, a 0-dim tensor or (Q,); got shape {tuple(h.shape)} with Q={len(queries)}")
    if not h.is_floating_point():
        raise TypeError(f"{op}: bandwidth must be in a floating-point dtype; got {h.dtype}")
    if h.device != queries.device and h.dim() == 1:
        raise ValueError(f"{op}: expected bandwidth on the device of the queries, {queries.device}; got {h.device}")
    (tiny, most), cast = _arrays.LIMITS[dtype], h.to(dtype)

    def error() -> ValueError:
        valid = (cast >= tiny) & torch.isfinite(cast)
        return ValueError(f"{op}: bandwidth must be positive and finite in {dtype}; got {h[~valid].flatten()[0].item()}")

    _arrays.settle([_arrays.Doubt(cast, tiny, most, error)])
    if h.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: no derivative in bandwidth; pass bandwidth.detach()")
    return (cast if cast.dim() else cast.to(queries.device).expand(len(queries))).contiguous()


@torch.library.register_fake("ltkernels::bank_prepare")
def _(points, copy=True):
    n, d = points.shape
    return tuple(points.new_empty(shape, dtype=torch.float32) for shape in ((d,), (n if copy else 0, d), (n,)))


@torch.library.register_fake("ltkernels::knn")
def _(queries, points, centre, centred, sqnorm, self_index, bound, k):
    sqdist = queries.new_empty((len(queries), k), dtype=_answer_dtype(queries))
    return sqdist, torch.empty_like(sqdist, dtype=torch.int64)


@torch.library.register_fake("ltkernels::knn_kde")
def _(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight):
    log_density = queries.new_empty(len(queries), dtype=_answer_dtype(queries))
    sqdist = log_density.new_empty((len(queries), k))
    return log_density, log_density.new_empty(queries.shape), sqdist, torch.empty_like(sqdist, dtype=torch.int64)


@torch.library.register_fake("ltkernels::knn_kde_bounded")
def _(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight):
    answers = torch.ops.ltkernels.knn_kde(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight)
    return *answers, torch.empty_like(bandwidth)


@torch.library.register_fake("ltkernels::diff_sum")
def _(queries, points, index, coefficient):
    return torch.empty_like(queries, dtype=_answer_dtype(queries), memory_format=torch.contiguous_format)


@torch.library.register_fake("ltkernels::diff_dot")
def _(queries, points, index, vector):
    return queries.new_empty(index.shape, dtype=_answer_dtype(queries))


@torch.library.register_fake("ltkernels::diff_scatter")
def _(queries, points, index, coefficient):
    return torch.empty_like(points, dtype=_answer_dtype(points), memory_format=torch.contiguous_format)


# Derivatives. With the neighbours constant and w_i = softmax_i(log w_i - r_i^2 / 2h^2), every derivative in the queries is made of two
# sums over direct differences, each bilinear and the other's adjoint: diff_sum(c) = sum_i c_i (z_i - q), diff_dot(v)_i = (z_i - q).v
#   d log p        = score . dq
#   d (score . v)  = [diff_sum(w_i (diff_dot(v)_i / h^2 - score . v) / h^2) - v / h^2] . dq        (the Hessian-vector product)
# so the formulas below differentiate to any order; derivatives in the points exist once and then raise.


def _setup_knn(ctx, inputs, output):
    queries, points, *_ = inputs
    ctx.save_for_backward(queries, points, output[1])
    ctx.set_materialize_grads(False)


def _backward_knn(ctx, grad_sqdist, _):
    queries, points, index = ctx.saved_tensors
    grad_queries = grad_points = None
    if grad_sqdist is not None:
        if ctx.needs_input_grad[0]:
            grad_queries = torch.ops.ltkernels.diff_sum(queries, points, index, -2 * grad_sqdist).to(queries.dtype)
        if ctx.needs_input_grad[1]:
            grad_points = torch.ops.ltkernels.diff_scatter(queries, points, index, 2 * grad_sqdist).to(points.dtype)
    return grad_queries, grad_points, None, None, None, None, None, None


def _setup_knn_kde(ctx, inputs, output):
    queries, points, bandwidth, log_weight = inputs[0], inputs[1], inputs[8], inputs[9]
    ctx.save_for_backward(queries, points, bandwidth, log_weight, *output[1:4])
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)


def _backward_knn_kde(ctx, grad_log_density, grad_score, grad_sqdist, *_):
    queries, points, bandwidth, log_weight, score, sqdist, index = ctx.saved_tensors
    need_queries, need_points, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[9]
    diff_sum, diff_dot, diff_scatter = (getattr(torch.ops.ltkernels, f"diff_{name}") for name in ("sum", "dot", "scatter"))
    inverse = bandwidth[:, None].square().reciprocal()  # 1 / h^2
    weight = torch.softmax(reference.kernel_logits(sqdist, index, bandwidth, log_weight), 1)
    grad_queries = grad_points = grad_weight = None

    along = curvature = None  # d (score . v) / d log w_i, and its coefficient of (z_i - q)
    if grad_score is not None:
        along = weight * (diff_dot(queries, points, index, grad_score) * inverse - (score * grad_score).sum(1, keepdim=True))
        curvature = along * inverse
    if need_queries:
        grad_queries = torch.zeros_like(score)
        if grad_log_density is not None:
            grad_queries = grad_queries + grad_log_density[:, None] * score
        coefficient = None if grad_sqdist is None else -2 * grad_sqdist
        if grad_score is not None:
            coefficient = curvature if coefficient is None else coefficient + curvature
            grad_queries = grad_queries - grad_score * inverse
        if coefficient is not None:
            grad_queries = grad_queries + diff_sum(queries, points, index, coefficient)
        grad_queries = grad_queries.to(queries.dtype)
    if need_points:
        coefficient = torch.zeros_like(sqdist) if grad_sqdist is None else 2 * grad_sqdist
        if grad_log_density is not None:
            coefficient = coefficient - grad_log_density[:, None] * weight * inverse
        if grad_score is not None:
            coefficient = coefficient - curvature
        grad_points = diff_scatter(queries, points, index, coefficient)
        if grad_score is not None:  # score also moves with z_i itself, by w_i / h^2; the scatter of 0 - (-v)
            origin = torch.zeros_like(points, dtype=score.dtype)
            grad_points = grad_points + diff_scatter(-grad_score, origin, index, weight * inverse)
        grad_points = grad_points.to(points.dtype)
    if need_weight and (grad_log_density is not None or grad_score is not None):
        rows = torch.zeros_like(weight) if grad_log_density is None else grad_log_density[:, None] * weight
        rows = rows if grad_score is None else rows + along
        grad_weight = reference.scatter_add(torch.zeros_like(log_weight), index.flatten(), rows.flatten())
    return grad_queries, grad_points, None, None, None, None, None, None, None, grad_weight


def _setup_diff(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_diff_sum(ctx, grad):
    queries, points, index, coefficient = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("knn_kde_grad: second derivatives in the bank's points are not implemented; detach the bank")
    grad_queries = (-coefficient.sum(1, keepdim=True) * grad).to(queries.dtype) if ctx.needs_input_grad[0] else None
    grad_coefficient = torch.ops.ltkernels.diff_dot(queries, points, index, grad) if ctx.needs_input_grad[3] else None
    return grad_queries, None, None, grad_coefficient


def _backward_diff_dot(ctx, grad):
    queries, points, index, vector = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("knn_kde_grad: second derivatives in the bank's points are not implemented; detach the bank")
    grad_queries = (-grad.sum(1, keepdim=True) * vector).to(queries.dtype) if ctx.needs_input_grad[0] else None
    grad_vector = torch.ops.ltkernels.diff_sum(queries, points, index, grad) if ctx.needs_input_grad[3] else None
    return grad_queries, None, None, grad_vector


def _backward_diff_scatter(ctx, grad):
    raise NotImplementedError("knn_kde_grad: the derivative in the bank's points is differentiable no further")


backends.register_autograd("knn", _backward_knn, setup_context=_setup_knn)
backends.register_autograd("knn_kde_bounded", _backward_knn_kde, setup_context=_setup_knn_kde)
backends.register_autograd("diff_sum", _backward_diff_sum, setup_context=_setup_diff)
backends.register_autograd("diff_dot", _backward_diff_dot, setup_context=_setup_diff)
backends.register_autograd("diff_scatter", _backward_diff_scatter, setup_context=_setup_diff)
backends.register_no_second("knn_kde", "knn_kde_grad")
