"""Squared distances between rows, and the contrastive loss on them that pushes the denoised means of different classes apart."""

import math
import warnings

import torch
from torch import Tensor

from . import _arrays, backends
from .knn_kde import _answer_dtype
from .reference import PCL_FORMS
from .score_select import _like_where_needed, _refuse_tangent

_DISTANCES, _REDUCTIONS = ("mean", "sum"), ("mean", "sum")
_UNDERFLOW = 87.33  # exp(-d) leaves float32's normal range: 0 on cpu and, from 103.97 on, everywhere; so is its derivative


def pairwise_sqdist(x, y=None) -> Tensor:
    r"""Squared Euclidean distances |x_i - y_j|^2.

    Args:
        x: (B, ...) in float16, bfloat16, float32 or float64; trailing dimensions are flattened; B may be 0.
        y: (B', ...) of the same dtype, device and number of elements a row; default: x, whose distances to itself are exactly 0 and whose
            answer is symmetric in every bit.

    Returns:
        (B, B') float32 (float64 for float64 inputs), sums of direct differences: close rows far from the origin keep their digits, relative
        error below 1e-6. NaN and inf go through.

    Differentiable once in x and y. Deterministic: the same bits in every run on a backend and machine, for any number of threads.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: no backend for the device.

    Example:
        >>> pairwise_sqdist(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 8])
    """
    op, kind = "pairwise_sqdist", _arrays.in_kind(x)
    x = _rows(op, "x", x)
    x, y = (x, x) if y is None else _partners(op, "x", x, "y", y)
    return kind(backends.call("pair_sqdist", x, y))


def pcl_loss(
    mu, labels, *, form: str = "exponential", sample_weight=1.0, margin=None, distance: str = "mean", group=None, other=None,
    other_labels=None, other_group=None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""Probabilistic contrastive loss: sum over the ordered pairs i != j of different labels of sample_weight_i phi(d_ij).

    phi(d) = exp(-d) ("exponential"), 1 / (1 + d) ("reciprocal"), max(0, margin_i - d) ("hinge"), -d ("negative_l2")
    d_ij = mean or sum over the elements of (mu_i - mu_j)^2                                    (002: Eq. 11, 14, 15, Alg. 1)

    All forms are to be minimised and push different classes apart.

    Args:
        mu: (B, ...) in float16, bfloat16, float32 or float64; trailing dimensions are flattened; B may be 0.
        labels: (B,) int64; only pairs with different labels count.
        form: "exponential", "reciprocal", "hinge" or "negative_l2" (unbounded below).
        sample_weight: a number or (B,), tau(t_i) of Eq. 14.
        margin: a number or (B,); required for "hinge", an error elsewhere.
        distance: "mean" or "sum" over the elements. With "sum", exp(-d) leaves float32's range where d > 87.33, to 0 at once (cpu) or
            by d = 103.97, its gradient too, as it does for images: a RuntimeWarning, once in a process.
        group: (B,) int64; only pairs of equal groups count (those noised to one t).
        other, other_labels, other_group: (B', ...), (B',), (B',): pairs are (mu_i, other_j) instead, such as the rows of all ranks, or
            mu.detach() where gradients should reach one side only. A row of mu is no pair with itself, since its label is its own.
        reduction: "mean" divides by the number of pairs, "sum" does not.

    Returns:
        0-dim float32 (float64 for float64 inputs). Without any pair it is 0, with a gradient of 0. A pair with NaN or inf in one of its
        rows makes it NaN; rows in no pair may hold anything.

    Differentiable once in mu, other, sample_weight and margin. Memory: the gradients in mu and other are made together with the loss, in
    the answer's dtype, and kept for the backward pass (a second backward through a retained graph makes them once more); of B x B no more
    than 2^20 pairs (4 MB, on cuda) exist at a time on cpu and cuda; triton copies mu once, in float32, and holds 128 columns of B x B.
    Deterministic: the same bits in every run on a backend and machine, for any number of threads. (Where a 0-dim sample_weight or margin
    needs a gradient, torch sums it over the rows.) Under torch.compile, values are not checked. Under autocast, mu and other may differ in
    dtype.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device, form, distance or reduction; margin missing or out of place; other_labels
        missing; one of group and other_group missing. RuntimeError: no backend for the device.

    Example:
        >>> mu, y = torch.randn(64, 3, 32, 32, requires_grad=True), torch.randint(10, (64,))
        >>> pcl_loss(mu, y, form="hinge", margin=2.0).backward()

        Dispersive loss (Wang & He, 2025) of features z, with every row a class of its own: log mean exp(-|z_i - z_j|^2 / (D tau)), i != j

        >>> z, tau = torch.randn(64, 256), 0.5
        >>> dispersive = pcl_loss(z / tau**0.5, torch.arange(64)).log()
    """
    op, kind = "pcl_loss", _arrays.in_kind(mu)
    for name, value, known in (("form", form, PCL_FORMS), ("distance", distance, _DISTANCES), ("reduction", reduction, _REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}; got {value!r}")
    mu = _rows(op, "mu", mu)
    labels, group = _integers(op, "labels", labels, mu), None if group is None else _integers(op, "group", group, mu)
    if other is None:
        for name, value in (("other_labels", other_labels), ("other_group", other_group)):
            if value is not None:
                raise ValueError(f"{op}: {name} needs other; got other=None")
    else:
        mu, other = _partners(op, "mu", mu, "other", other)
        if other_labels is None:
            raise ValueError(f"{op}: other needs other_labels; got None")
        other_labels = _integers(op, "other_labels", other_labels, other)
        if (group is None) != (other_group is None):
            given, missing = ("group", "other_group") if other_group is None else ("other_group", "group")
            raise ValueError(f"{op}: with other, {given} needs {missing}; got {missing}=None")
        other_group = None if other_group is None else _integers(op, "other_group", other_group, other)
    if (margin is None) == (form == "hinge"):
        fact = "none" if margin is None else "one"
        raise ValueError(f"{op}: form 'hinge' needs a margin and no other form takes it; got {fact} with form {form!r}")
    weight = _per_row(op, "sample_weight", sample_weight, mu)
    margin = None if margin is None else _per_row(op, "margin", margin, mu)
    elements = mu.shape[1]
    if form == "exponential" and distance == "sum" and weight.dtype == torch.float32 and elements > _UNDERFLOW:
        _warn_underflow(elements)

    learns = lambda x: x is not None and x.requires_grad and torch.is_grad_enabled()  # noqa: E731
    loss, *_ = backends.call(
        "pcl", mu, labels, group, weight, margin, other, other_labels, other_group, PCL_FORMS.index(form),
        1 / elements if distance == "mean" else 1.0, learns(mu), learns(other), reduction == "mean",
    )  # fmt: skip
    return kind(loss)


_warned = False


def _warn_underflow(elements: int) -> None:
    global _warned
    if not torch.compiler.is_compiling() and not _warned:
        _warned = True
        warnings.warn(
            f"pcl_loss: with distance='sum' over {elements} elements, exp(-d) and its gradient are 0 in float32 where d > {_UNDERFLOW}, "
            "at the latest where d > 103.97; distance='mean' keeps them",
            RuntimeWarning,
            stacklevel=3,
        )


def _rows(op: str, name: str, value) -> Tensor:
    """(rows, elements)"""
    value = _arrays.tensor(op, name, value)
    if value.dim() < 2 or value.numel() == 0 and math.prod(value.shape[1:]) == 0:
        raise ValueError(f"{op}: expected {name} of shape (rows, ...) with at least one element a row; got {tuple(value.shape)}")
    if value.dtype not in _arrays.FLOATS:
        raise TypeError(f"{op}: expected {name} in float16, bfloat16, float32 or float64; got {value.dtype}")
    _refuse_tangent(op, value)
    return value.flatten(1)


def _partners(op: str, first: str, x: Tensor, second: str, y) -> tuple[Tensor, Tensor]:
    """Both of one dtype: under autocast, the wider of the two."""
    y = _rows(op, second, y)
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: expected {first} and {second} with as many elements a row; got {x.shape[1]} and {y.shape[1]}")
    if y.device != x.device:
        raise ValueError(f"{op}: expected {first} and {second} on one device; got {x.device} and {y.device}")
    if y.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{op}: expected {first} and {second} of one dtype; got {x.dtype} and {y.dtype}")
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    return x, y


def _integers(op: str, name: str, value, like: Tensor) -> Tensor:
    value = _arrays.tensor(op, name, value)
    if value.dtype != torch.int64 or value.shape != like.shape[:1]:
        fact = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{op}: expected {name} as an int64 tensor of shape ({len(like)},); got {fact}")
    if value.device != like.device:
        raise ValueError(f"{op}: expected {name} on the device of its rows, {like.device}; got {value.device}")
    return value.contiguous()


def _per_row(op: str, name: str, value, mu: Tensor) -> Tensor:
    """(B,) finite, in the dtype of the answer."""
    dtype = _answer_dtype(mu)
    if isinstance(value, _arrays.REAL) and not isinstance(value, bool):
        if not abs(value) <= _arrays.LIMITS[dtype][1]:
            raise ValueError(f"{op}: {name} must be finite in {dtype}; got {value}")
        return torch.full((len(mu),), float(value), dtype=dtype, device=mu.device)
    value = _arrays.tensor(op, name, value)
    if value.dim() > 1 or value.dim() == 1 and len(value) != len(mu):
        raise ValueError(f"{op}: {name} must be a number, a 0-dim tensor or (B,); got shape {tuple(value.shape)} with B={len(mu)}")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be in a floating-point dtype; got {value.dtype}")
    if value.dim() == 1 and value.device != mu.device:
        raise ValueError(f"{op}: expected {name} on the device of mu, {mu.device}; got {value.device}")
    _refuse_tangent(op, value)
    value = value.to(device=mu.device, dtype=dtype)
    most = _arrays.LIMITS[dtype][1]

    def error() -> ValueError:
        return ValueError(f"{op}: {name} must be finite in {dtype}; got {value.detach()[~torch.isfinite(value)].flatten()[0].item()}")

    _arrays.settle([_arrays.Doubt(value, -most, most, error)])
    return (value if value.dim() else value.expand(len(mu))).contiguous()


@torch.library.register_fake("ltkernels::pair_sqdist")
def _(x, y):
    return x.new_empty((len(x), len(y)), dtype=_answer_dtype(x))


@torch.library.register_fake("ltkernels::pair_sqdist_backward")
def _(grad, x, y, needed):
    return _like_where_needed((x, y), needed)


@torch.library.register_fake("ltkernels::pcl_rows")
def _(mu, labels, group, weight, margin, other, other_labels, other_group, form, scale, grad, other_grad):
    partner = mu if other is None else other
    return (
        torch.empty_like(weight), torch.empty_like(labels), weight.new_empty(len(weight) if margin is not None else 0),
        weight.new_empty(mu.shape if grad else 0), weight.new_empty(partner.shape if other_grad else 0),
    )  # fmt: skip


@torch.library.register_fake("ltkernels::pcl")
def _(mu, labels, group, weight, margin, other, *rest):
    row, _, *more = torch.ops.ltkernels.pcl_rows(mu, labels, group, weight, margin, other, *rest[:-1])
    return row.new_empty(()), row.new_empty(()), row, *more


@torch.library.register_fake("ltkernels::pcl_scaled")
def _(grad, factor, source):
    return torch.empty_like(grad, dtype=source.dtype)


def _setup_sqdist(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward_sqdist(ctx, grad):
    if grad is None:
        return None, None
    needed = list(ctx.needs_input_grad)
    grads = torch.ops.ltkernels.pair_sqdist_backward(grad, *ctx.saved_tensors, needed)
    return tuple(one if need else None for one, need in zip(grads, needed, strict=True))


def _setup_pcl(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *output[1:4])
    ctx.form_and_scale, ctx.made, ctx.mean, ctx.grads = inputs[8:10], inputs[10:12], inputs[12], [output[4:]]


def _backward_pcl(ctx, factor, *_):
    *tensors, divisor, row, active = ctx.saved_tensors
    mu, weight, margin, other = tensors[0], tensors[3], tensors[4], tensors[5]
    if factor is None:
        return (None,) * 13
    factor = factor / divisor
    need = ctx.needs_input_grad
    asked = need[0], need[5]
    scaled = torch.ops.ltkernels.pcl_scaled
    if any(asked):
        try:
            grads = ctx.grads.pop()  # one thread has them
        except IndexError:
            grads = None
        if grads is None or any(ask and not made for ask, made in zip(asked, ctx.made, strict=True)):
            # given away before; or vmap hid that they are needed
            grads = torch.ops.ltkernels.pcl(*tensors, *ctx.form_and_scale, *asked, ctx.mean)[4:]
        if not torch.is_grad_enabled() and type(grads[0]) is Tensor:  # no compiler's stand-in for one
            # nobody else holds them, and a product of their size would double the memory
            scaled = lambda grad, factor, source: grad.mul_(factor).to(source.dtype)  # noqa: E731
        else:
            ctx.grads.append(grads)
    return (
        scaled(grads[0], factor, mu) if need[0] else None, None, None,
        torch.ops.ltkernels.pcl_scaled(row, factor, weight) if need[3] else None,
        torch.ops.ltkernels.pcl_scaled(active * weight.detach(), factor, margin) if need[4] else None,
        scaled(grads[1], factor, other) if need[5] else None, *(None,) * 7,
    )  # fmt: skip


backends.register_autograd("pair_sqdist", _backward_sqdist, setup_context=_setup_sqdist)
backends.register_autograd("pcl", _backward_pcl, setup_context=_setup_pcl)
backends.register_no_second("pair_sqdist_backward", "pairwise_sqdist")
backends.register_no_second("pcl_rows", "pcl_loss")
backends.register_no_second("pcl_scaled", "pcl_loss")
