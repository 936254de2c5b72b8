"""Contrastive learning: random views, drawn on the device as a pure function of (batch, generator), and InfoNCE between them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """One view of every row: images (B, C, H, W) in [-1, 1], or features (B, D)."""
    return augment_images(x, rng) if x.dim() == 4 else augment_features(x, rng)


def _uniform(x: Tensor, rng: torch.Generator, low: float, high: float, *trailing: int) -> Tensor:
    return low + (high - low) * torch.rand(len(x), *trailing, generator=rng, device=x.device, dtype=x.dtype)


def augment_images(x: Tensor, rng: torch.Generator) -> Tensor:
    """Rotation, zoom, shear and shift in one resampling, then contrast and brightness. Colour photographs are zoomed more (SimCLR's
    crops), mirrored, and sometimes made grey; digits and other one-channel images are not mirrored, since a mirrored digit is another sign.
    """
    photo = x.shape[1] == 3
    angle = _uniform(x, rng, -0.3, 0.3)
    zoom = _uniform(x, rng, 0.5, 1.0) if photo else _uniform(x, rng, 0.8, 1.2)
    shear = _uniform(x, rng, -0.2, 0.2)
    reach = 0.5 if photo else 0.3  # of half the image's side
    move = _uniform(x, rng, -reach, reach, 2)
    mirror = torch.where(_uniform(x, rng, 0, 1) < 0.5, -1.0, 1.0) if photo else torch.ones(len(x), device=x.device)

    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    rows = torch.stack([mirror * cos, shear - sin, move[:, 0], mirror * sin, cos, move[:, 1]], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3).to(x.dtype), list(x.shape), align_corners=False)
    view = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    view = view * _uniform(x, rng, 0.6, 1.4, 1, 1, 1) + _uniform(x, rng, -0.2, 0.2, 1, 1, 1)
    if photo:
        view = view * _uniform(x, rng, 0.8, 1.2, 3, 1, 1)  # hue, roughly
        grey = _uniform(x, rng, 0, 1, 1, 1, 1) < 0.2
        view = torch.where(grey, view.mean(1, keepdim=True).expand_as(view), view)
    return view


def augment_features(x: Tensor, rng: torch.Generator, drop: float = 0.2, noise: float = 0.1) -> Tensor:
    """Drop a fifth of the coordinates and add a tenth of the batch's root mean square as noise."""
    keep = _uniform(x, rng, 0, 1, x.shape[1]) >= drop
    scale = noise * x.square().mean().sqrt()
    jitter = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return torch.where(keep, x / math.sqrt(1 - drop), 0) + scale * jitter


def info_nce(anchors: Tensor, candidates: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """-mean_i mean_{p in P(i)} log softmax_p(cos(i, .) / T). The candidates begin with the anchors, and no anchor meets itself.

    positive (A, M) bool: P(i) is row i; one that is empty adds zero.
    """
    logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature  # (A, M)
    own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    log_p = logits.masked_fill(own, -torch.inf).log_softmax(1).masked_fill(own, 0)
    positive = positive & ~own
    return -((log_p * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def contrast(
    encoder: nn.Module,
    head: nn.Module,
    x: Tensor,
    rng: torch.Generator,
    temperature: float,
    *,
    label: Tensor | None = None,
    extra: Tensor | None = None,
    extra_label: Tensor | None = None,
) -> Tensor:
    """InfoNCE of two views of each row of x (B, ...). Positives of a view are the other view of its row (SimCLR) and, where label (B,)
    is not -1, every view and extra latent (M, d) of the same label. Latents pass `head` before they are compared."""
    rows = torch.arange(len(x), device=x.device)
    z = encoder(torch.cat([augment(x, rng), augment(x, rng)]))
    label = torch.full_like(rows, -1) if label is None else label
    extra = z[:0] if extra is None else extra
    extra_label = label[:0] if extra_label is None else extra_label

    label, row = torch.cat([label, label, extra_label]), torch.cat([rows, rows, torch.full_like(extra_label, -1)])
    first = 2 * len(x)  # anchors: the views
    positive = (row[:first, None] == row) | ((label[:first, None] == label) & (label[:first, None] >= 0))
    projected = head(torch.cat([z, extra]))
    return info_nce(projected[:first], projected, positive, temperature)


def perturb_features(
    x: Tensor, rng: torch.Generator, kind: str = "gaussian", noise: tuple[float, float] = (0.1, 0.3), drop: tuple[float, float] = (0.2, 0.2)
) -> Tensor:
    """CLUDI's view of every row of features x (..., n). Two forms:

    gaussian: coordinates are set to zero, then noise whose variance is uniform in `noise` is added (paper). direction: a vector of
    random direction whose length is uniform in `noise`, in units of the rows' root mean square norm, is added, then coordinates are
    set to zero (released code, whose rows have norm 1). The share of zeroed coordinates is uniform in `drop`, one draw a row.
    """
    row = (*x.shape[:-1], 1)
    uniform = lambda low, high, shape: low + (high - low) * torch.rand(shape, generator=rng, device=x.device, dtype=x.dtype)  # noqa: E731
    keep = uniform(0, 1, x.shape) >= uniform(*drop, row)
    jitter = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    amount = uniform(*noise, row)
    if kind == "gaussian":
        return x * keep + amount.sqrt() * jitter
    length = x.square().sum(-1).mean().sqrt()
    return (x + amount * length * F.normalize(jitter, dim=-1)) * keep
