"""The Gaussian-kernel softmax over clean samples: probabilities, a draw from it, its mean, and the training target that follows."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _arrays, backends
from .bank import Bank
from .knn_kde import _answer_dtype, _has_tangent
from .reference import GATES

_PREDICTIONS = ("epsilon", "v", "x0", "flow")


class ScoreSelection(NamedTuple):
    """What score_select answers."""

    index: Tensor  # (B,) int64, rows of clean
    moved: Tensor  # (B,) bool: index != self_index
    log_normalizer: Tensor  # (B,)


def p_sel(x_t, clean, scale, std, *, log_prior=None) -> Tensor:
    r"""Probability of every clean sample under each noisy one.

    p[i, j] = softmax_j(-|x_t[i] - scale_i clean[j]|^2 / (2 std_i^2) + log_prior[j])                    (001: Eq. 5, 7, 8)

    Args:
        x_t: (B, ...) in float16, bfloat16, float32 or float64; trailing dimensions are flattened; B may be 0.
        clean: (K, ...) of the same dtype, device and number of elements a row, K >= 1; or a Bank, whose log_weight is added to the logits.
        scale, std: x_t = scale x_0 + std noise. Numbers, 0-dim tensors, (B,) or (B, 1, ..., 1); finite, std > 0. DDPM:
            sqrt(abar_t), sqrt(1 - abar_t).
            EDM: 1, sigma. Flow matching: 1 - t, t. Where scale is 0 all samples are equally far and p is the prior.
        log_prior: (K,) without NaN or +inf, such as beta log q(y_j); -inf leaves a sample out.

    Returns:
        (B, K) float32 (float64 for float64 inputs). Rows sum to 1. A row of clean with NaN or inf has probability 0; a row of x_t with NaN
        or inf answers NaN, and so does one without any finite logit.

    Differentiable once in x_t, clean, scale, std and log_prior. Extra memory O(B K), never B x K x D. Deterministic: the same bits in every
    run on a backend and machine, for any number of threads; a row's bits do not depend on the rest of the batch. (Where a 0-dim scale or
    std needs a gradient, torch sums it over the rows.) Under torch.compile, values are not checked.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, scale, std or log_prior. RuntimeError: no backend for the device.

    Example:
        >>> x0 = torch.randn(128, 3, 32, 32)
        >>> p = p_sel(0.5 * x0 + 0.8 * torch.randn_like(x0), x0, 0.5, 0.8)
    """
    op, kind = "p_sel", _arrays.in_kind(x_t)
    x, points, scale, std, log_prior = _checked(op, x_t, clean, scale, std, log_prior)
    return kind(backends.call("psel", x.flatten(1), points.flatten(1), scale, std, log_prior)[0])


def posterior_mean(x_t, clean, scale, std, *, log_prior=None) -> Tensor:
    r"""sum_j p[i, j] clean[j] for the p of `p_sel`: the ideal denoiser of the set `clean`, like x_t in shape and dtype.   (001: Eq. 5, 6)

    Arguments, errors and determinism as in `p_sel`. p is made for a few rows at a time: 16 MB of it, on a card 256 MB, for K and D up to
    4 million. Differentiable once in x_t, clean, scale, std and log_prior; that takes three times the size of clean, with clean's own
    gradient eight times.

    Example:
        >>> x0 = torch.randn(128, 3, 32, 32)
        >>> denoised = posterior_mean(x0 + 2 * torch.randn_like(x0), x0, 1.0, 2.0)
    """
    op, kind = "posterior_mean", _arrays.in_kind(x_t)
    noisy = _arrays.tensor(op, "x_t", x_t)
    x, points, scale, std, log_prior = _checked(op, noisy, clean, scale, std, log_prior)
    mean, _ = backends.call("psel_mean", x.flatten(1), points.flatten(1), scale, std, log_prior)
    mean = mean if mean.shape == x.shape else mean.reshape(x.shape)
    return kind(mean.to(noisy.dtype))


def score_select(
    x_t, clean, scale, std, *, gate: str = "full", labels=None, class_counts=None, self_index=None, self_labels=None, log_prior=None,
    seed=None, row_offset: int = 0,
) -> ScoreSelection:  # fmt: skip
    r"""For every noisy sample, one clean sample drawn from `p_sel`, and whether the gate lets the score move there.

    z_i ~ p[i, :];  kept if gate is "full", or q(y_z) >= q(y_i) ("t2h"), or q(y_z) <= q(y_i) ("h2t"); otherwise i's own row.   (001: Alg. 1)

    Args:
        x_t, clean, scale, std, log_prior: as in `p_sel`.
        gate: "full", "t2h" (tail to head) or "h2t" (head to tail). Equal counts pass both.
        labels: (K,) int64, classes of clean; for t2h and h2t.
        class_counts: (C,) rows of each class in the long-tailed training set, whatever resampling made the batch; for t2h and h2t.
        self_index: (B,) int64, the row of clean that x_t[i] was made from, -1 for none (gate "full" only). Default: i where B = K.
        self_labels: (B,) int64, classes of x_t. Default: labels[self_index].
        seed: int or 0-dim int64 tensor; None draws one from torch's generator.
        row_offset: the global number of row 0, for a batch that is split over calls or processes.

    Returns:
        ScoreSelection(index (B,) int64, moved (B,) = index != self_index, log_normalizer (B,) = logsumexp of the logits). A row of x_t with
        NaN or inf has log_normalizer NaN, one without a finite logit -inf; both keep their own row, or answer -1 where they have none.

    Random numbers: Gumbel-max with Philox4x32-10, key = seed, counter = (column / 4, row low, row high, 0), rows and columns global: the
    same words on every backend. Indices agree between backends where the two largest perturbed logits differ by more than 1e-3, and
    between any two cuts of the batch on one backend always. Memory O(B) beyond the inputs: B x K is not formed. No gradient.

    Raises:
        ValueError, TypeError: as in `p_sel`; labels, class_counts, self_index, self_labels, gate, seed or row_offset wrong or missing.

    Example:
        >>> x0, y, counts = torch.randn(128, 3, 32, 32), torch.randint(10, (128,)), torch.arange(100, 0, -10)
        >>> chosen = score_select(x0 + torch.randn_like(x0), x0, 1.0, 1.0, gate="t2h", labels=y, class_counts=counts)
        >>> target = x0[chosen.index]
    """
    op = "score_select"
    if gate not in GATES:
        raise ValueError(f"{op}: gate must be one of {', '.join(GATES)}; got {gate!r}")
    kind = _arrays.in_kind(x_t)
    doubts = []
    x, points, scale, std, log_prior = _checked(op, x_t, clean, scale, std, log_prior, doubts=doubts)
    b, k, device = x.shape[0], points.shape[0], x.device
    own = _own_rows(op, self_index, b, k, device, gate, doubts)
    classes = None, None, None
    if gate != "full":
        classes = _classes(op, gate, labels, class_counts, self_labels, b, k, device, doubts)
    _arrays.settle(doubts)
    if isinstance(row_offset, bool) or not isinstance(row_offset, _arrays.INTEGRAL) or not 0 <= row_offset < 2**63:
        raise ValueError(f"{op}: row_offset must be an int in [0, 2^63); got {row_offset!r}")
    index, moved, log_normalizer = backends.call(
        "score_select", x.flatten(1), points.flatten(1), scale, std, log_prior, _seed(op, seed, device), row_offset, own, *classes,
        GATES.index(gate),
    )  # fmt: skip
    return ScoreSelection(kind(index), kind(moved), kind(log_normalizer))


def denoising_target(x_t, x0, scale, std, *, prediction: str = "epsilon") -> Tensor:
    r"""What a network should answer for x_t = scale x0 + std noise, like x_t; x0 need not be the sample that x_t was made from.

    noise = (x_t - scale x0) / std;  "epsilon": noise, "v": scale noise - std x0, "x0": x0, "flow": noise - x0   (001: Alg. 1)

    Args:
        x_t, x0: (B, ...) of one shape, dtype and device. scale, std: as in `p_sel`; std > 0.
        prediction: one of the four above. "v" and "flow" are the velocities of scale^2 + std^2 = 1 and of scale = 1 - t, std = t.

    Differentiable any number of times: ordinary torch arithmetic, in float32 for the half types.
    """
    op = "denoising_target"
    if prediction not in _PREDICTIONS:
        raise ValueError(f"{op}: prediction must be one of {', '.join(_PREDICTIONS)}; got {prediction!r}")
    kind = _arrays.in_kind(x_t)
    x, clean = _samples(op, "x_t", x_t), _samples(op, "x0", x0)
    if clean.dtype != x.dtype and torch.is_autocast_enabled(x.device.type):
        clean = clean.to(x.dtype)
    x, clean, scale, std, _ = _checked(op, x, clean, scale, std, None, "x0")
    if clean.shape != x.shape:
        raise ValueError(f"{op}: expected x0 in the shape of x_t, {tuple(x.shape)}; got {tuple(clean.shape)}")
    wide, clean = x.to(scale.dtype), clean.to(scale.dtype)
    scale, std = (value.reshape(-1, *[1] * (x.dim() - 1)) for value in (scale, std))
    if prediction == "x0":
        target = clean.clone()  # nobody's own memory
    else:
        noise = (wide - scale * clean) / std
        target = {"epsilon": lambda: noise, "v": lambda: scale * noise - std * clean, "flow": lambda: noise - clean}[prediction]()
    return kind(target.to(x.dtype))


def _checked(
    op: str, x_t, clean, scale, std, log_prior, name: str = "clean", doubts: list | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x_t and clean as they came but of one dtype; scale, std (B,) and log_prior (K,) in the dtype of the answers. What is doubted of their
    values is settled here, or left to a caller who has further `doubts`."""
    x = _samples(op, "x_t", x_t)
    if isinstance(clean, Bank):
        if clean.log_weight is not None:
            if log_prior is not None:
                raise ValueError(f"{op}: give log_prior or a Bank with log_weight, not both")
            log_prior = clean.log_weight
        clean = clean.points
    clean = _samples(op, name, clean)
    if clean.shape[0] == 0 and op != "denoising_target":
        raise ValueError(f"{op}: expected clean with at least one row; got shape {tuple(clean.shape)}")
    if x.shape[1:] != clean.shape[1:] and math.prod(x.shape[1:]) != math.prod(clean.shape[1:]):
        raise ValueError(f"{op}: expected x_t and {name} with as many elements a row; got {tuple(x.shape)} and {tuple(clean.shape)}")
    if x.device != clean.device:
        raise ValueError(f"{op}: expected x_t and {name} on one device; got {x.device} and {clean.device}")
    if x.dtype != clean.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{op}: expected x_t and {name} of one dtype; got {x.dtype} and {clean.dtype}")
        x = x.to(clean.dtype)  # clean may be a whole data set: autocast must not copy it
    dtype = _answer_dtype(x)
    own = [] if doubts is None else doubts
    scale, std = _coefficient(op, "scale", scale, x, dtype, own), _coefficient(op, "std", std, x, dtype, own)
    log_prior = None if log_prior is None else _log_prior(op, log_prior, clean, dtype, own)
    if doubts is None:
        _arrays.settle(own)
    return x, clean, scale, std, log_prior


def _samples(op: str, name: str, value) -> Tensor:
    value = _arrays.tensor(op, name, value)
    if value.dim() < 2 or value.numel() == 0 and math.prod(value.shape[1:]) == 0:
        raise ValueError(f"{op}: expected {name} of shape (rows, ...) with at least one element a row; got {tuple(value.shape)}")
    if value.dtype not in _arrays.FLOATS:
        raise TypeError(f"{op}: expected {name} in float16, bfloat16, float32 or float64; got {value.dtype}")
    _refuse_tangent(op, value)
    return value


def _refuse_tangent(op: str, value: Tensor) -> None:
    if _has_tangent(value):  # torch.library has no forward mode: the answers' tangents would silently be zero
        raise NotImplementedError(f"{op}: no forward-mode derivatives; use torch.autograd.grad")


def _coefficient(op: str, name: str, value, x: Tensor, dtype: torch.dtype, doubts: list) -> Tensor:
    rows = x.shape[0]
    if isinstance(value, _arrays.REAL) and not isinstance(value, bool):  # the loops of training and sampling: no tensor has to be read back
        tiny, most = _arrays.LIMITS[dtype]
        if not abs(value) <= most:
            raise ValueError(f"{op}: {name} must be finite in {dtype}; got {value}")
        if name == "std" and not value >= tiny:
            raise ValueError(f"{op}: std must be positive in {dtype}; got {value}")
        return torch.full((rows,), float(value), dtype=dtype, device=x.device)
    value = _arrays.tensor(op, name, value)
    if value.dim() > 1 and value.shape == (rows, *[1] * (value.dim() - 1)):  # as it multiplies images
        value = value.flatten()
    if value.dim() > 1 or value.dim() == 1 and value.shape[0] != rows:
        expected = "a number, a 0-dim tensor, (B,) or (B, 1, ..., 1)"
        raise ValueError(f"{op}: {name} must be {expected}; got shape {tuple(value.shape)} with B={rows}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be in a floating-point dtype; got {value.dtype}")
    if value.dim() == 1 and value.device != x.device:
        raise ValueError(f"{op}: expected {name} on the device of x_t, {x.device}; got {value.device}")
    _refuse_tangent(op, value)
    value = value.to(device=x.device, dtype=dtype)
    tiny, most = _arrays.LIMITS[dtype]

    def error() -> ValueError:
        finite = torch.isfinite(value)
        wanted, kept = ("positive", finite & (value >= tiny)) if finite.all() else ("finite", finite)
        return ValueError(f"{op}: {name} must be {wanted} in {dtype}; got {value.detach()[~kept][0].item()}")

    doubts.append(_arrays.Doubt(value, tiny if name == "std" else -most, most, error))
    return (value if value.dim() else value.expand(rows)).contiguous()


def _log_prior(op: str, log_prior, clean: Tensor, dtype: torch.dtype, doubts: list) -> Tensor:
    log_prior = _arrays.tensor(op, "log_prior", log_prior)
    if log_prior.shape != clean.shape[:1]:
        raise ValueError(f"{op}: expected log_prior with one entry a row of clean, shape ({len(clean)},); got {tuple(log_prior.shape)}")
    if not log_prior.is_floating_point():
        raise TypeError(f"{op}: expected log_prior in a floating-point dtype; got {log_prior.dtype}")
    if log_prior.device != clean.device:
        raise ValueError(f"{op}: expected log_prior on the device of clean, {clean.device}; got {log_prior.device}")
    _refuse_tangent(op, log_prior)
    cast = log_prior.to(dtype)

    def error() -> ValueError:
        return ValueError(f"{op}: log_prior must be below infinity in {dtype}; got {log_prior.detach()[~(cast < math.inf)][0].item()}")

    doubts.append(_arrays.Doubt(cast, -math.inf, _arrays.LIMITS[dtype][1], error))
    return cast.contiguous()


def _integers(op: str, name: str, value, length: int, device: torch.device, low: int, high: int, doubts: list) -> Tensor:
    """Whether it is in [low, high) has to be settled before it is an index."""
    value = _arrays.tensor(op, name, value)
    if value.dtype != torch.int64 or value.shape != (length,):
        raise ValueError(f"{op}: expected {name} as an int64 tensor of shape ({length},); got {value.dtype} of shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{op}: expected {name} on the device of x_t, {device}; got {value.device}")

    def error() -> ValueError:
        return ValueError(f"{op}: {name} must be in [{low}, {high}); got {value.min().item()} .. {value.max().item()}")

    doubts.append(_arrays.Doubt(value, low, high - 1, error))
    return value.contiguous()


def _own_rows(op: str, self_index, rows: int, k: int, device: torch.device, gate: str, doubts: list) -> Tensor | None:
    """None: row i."""
    if self_index is None or self_index is True:
        if rows == k:
            return None
        if self_index is True:
            raise ValueError(f"{op}: self_index=True needs as many noisy as clean rows; got B={rows} and K={k}")
        if gate == "full":
            return torch.full((rows,), -1, device=device)
        raise ValueError(f"{op}: self_index is required for gate {gate!r} where B != K; got B={rows} and K={k}")
    return _integers(op, "self_index", self_index, rows, device, -1 if gate == "full" else 0, k, doubts)


def _classes(
    op: str, gate: str, labels, class_counts, self_labels, rows: int, k: int, device: torch.device, doubts: list
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training count of every class (C,), class of every row of clean (K,), and of every row of x_t (B,) where they were given."""
    for name, value in (("labels", labels), ("class_counts", class_counts)):
        if value is None:
            raise ValueError(f"{op}: gate {gate!r} needs {name}; got None")
    counts = _arrays.tensor(op, "class_counts", torch.tensor(class_counts) if _is_list_of_numbers(class_counts) else class_counts)
    if counts.dim() != 1 or len(counts) == 0 or counts.is_complex():
        raise ValueError(f"{op}: expected class_counts of shape (C,), the rows of each class; got shape {tuple(counts.shape)}")
    counts = counts.to(device, torch.float64).contiguous()
    doubts.append(_arrays.Doubt(counts, 0, math.inf, lambda: ValueError(f"{op}: class_counts must be >= 0; got {counts.min().item()}")))
    labels = _integers(op, "labels", labels, k, device, 0, len(counts), doubts)
    if self_labels is not None:
        self_labels = _integers(op, "self_labels", self_labels, rows, device, 0, len(counts), doubts)
    return counts, labels, self_labels


def _is_list_of_numbers(value) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, _arrays.REAL) for x in value)


def _seed(op: str, seed, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, _arrays.INTEGRAL) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"{op}: seed must fit 64 bits; got {seed}")
        return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)  # nothing to copy
    if isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.dim() == 0:
        return seed.reshape(1).to(device)
    fact = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
    raise TypeError(f"{op}: seed must be an int, a 0-dim int64 tensor or None; got {fact}")


@torch.library.register_fake("ltkernels::psel")
def _(x, clean, scale, std, log_prior):
    return scale.new_empty((len(x), len(clean))), torch.empty_like(scale)


@torch.library.register_fake("ltkernels::psel_sample")
def _(x, clean, scale, std, log_prior, seed, row_offset):
    return torch.empty_like(scale, dtype=torch.int64), torch.empty_like(scale)


@torch.library.register_fake("ltkernels::score_select")
def _(x, clean, scale, *rest):
    index = torch.empty_like(scale, dtype=torch.int64)
    return index, torch.empty_like(scale, dtype=torch.bool), torch.empty_like(scale)


@torch.library.register_fake("ltkernels::psel_mix")
def _(weight, clean):
    return weight.new_empty((len(weight), clean.shape[1]))


@torch.library.register_fake("ltkernels::psel_mean")
def _(x, clean, scale, std, log_prior):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(scale)


def _like_where_needed(tensors: tuple[Tensor, ...], needed: list[bool]) -> tuple[Tensor, ...]:
    pairs = zip(tensors, needed, strict=True)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0) for t, need in pairs)


@torch.library.register_fake("ltkernels::psel_backward")
def _(grad, p, x, clean, scale, std, needed):
    return _like_where_needed((x, clean, scale, std, scale.new_empty(len(clean))), needed)


@torch.library.register_fake("ltkernels::psel_mean_backward")
def _(grad, x, clean, scale, std, log_prior, needed):
    return _like_where_needed((x, clean, scale, std, scale.new_empty(len(clean))), needed)


# Derivatives. With l_ij = -|x_i - s_i c_j|^2 / (2 std_i^2) + b_j, everything follows from dl: p's is p (G - sum_k p_k G_k), the mean's
# p_ij (c_j - m_i) . G_i. Both sum to 0 over j.


def _needed(ctx) -> list[bool]:
    return list(ctx.needs_input_grad[:5])


def _setup_psel(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_psel(ctx, grad_p, _):
    x, clean, scale, std, p = ctx.saved_tensors
    if grad_p is None:
        return (None,) * 5
    needed = _needed(ctx)
    grads = torch.ops.ltkernels.psel_backward(grad_p, p, x, clean, scale, std, needed)
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _setup_psel_mean(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_psel_mean(ctx, grad_mean, _):
    x, clean, scale, std, log_prior = ctx.saved_tensors
    if grad_mean is None:
        return (None,) * 5
    needed = _needed(ctx)
    grads = torch.ops.ltkernels.psel_mean_backward(grad_mean, x, clean, scale, std, log_prior, needed)
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


backends.register_autograd("psel", _backward_psel, setup_context=_setup_psel)
backends.register_autograd("psel_mean", _backward_psel_mean, setup_context=_setup_psel_mean)
backends.register_autograd(
    "score_select", lambda ctx, *grads: None, setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(*output)
)
backends.register_no_second("psel_backward", "p_sel")
backends.register_no_second("psel_mean_backward", "posterior_mean")
backends.register_no_second("psel_sample", "score_select")
backends.register_no_second("psel_mix", "posterior_mean")
