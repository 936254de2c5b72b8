"""Augmentation that does not leak into the samples: the network is told what was done to an image, and asked for images to which
nothing was (Karras et al., 2020, 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = ("x-flip", "y-flip", "log2 scale", "cos - 1", "sin", "log2 stretch cos 2", "log2 stretch sin 2", "shift x", "shift y")
_SCALE_STD, _STRETCH_STD, _SHIFT_STD = 0.2, 0.2, 0.125  # of log2, log2 and parts of the image's edge


def ada_augment(x: Tensor, rng: torch.Generator, p: float = 0.12) -> tuple[Tensor, Tensor]:
    """(images like x (B, C, H, W), labels (B, 9)): every transformation with probability p, independently, but the x-flip for half of all
    images whatever p > 0 is.

    In order: flips, isotropic scaling by 2^N(0, .2^2), rotation by U(-pi, pi), stretching by 2^N(0, .2^2) along a random direction (and its
    inverse across), shift by N(0, .125^2) of the edge. All are one resampling, bilinear, with the image mirrored beyond its border; an
    image to which nothing happened is returned bit by bit. Labels are 0 for what was not done; all of them for p = 0.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"ada_augment: p must be in [0, 1]; got {p}")
    count = len(x)
    uniform = torch.rand(count, 9, generator=rng, device=x.device)
    normal = torch.randn(count, 4, generator=rng, device=x.device)
    chance = uniform[:, :6] < torch.tensor([1.0 if p > 0 else 0.0, p, p, p, p, p], device=x.device)
    x_flip, y_flip = (chance[:, i] & (uniform[:, 6 + i].mul(2 if i == 0 else 1) < 1) for i in range(2))
    zoom = chance[:, 2] * _SCALE_STD * normal[:, 0]
    turn = chance[:, 3] * math.pi * (2 * uniform[:, 7] - 1)
    stretch, direction = chance[:, 4] * _STRETCH_STD * normal[:, 1], math.pi * (2 * uniform[:, 8] - 1)
    shift = chance[:, 5, None] * _SHIFT_STD * normal[:, 2:]
    labels = torch.stack(
        # of twice the angle: 2^w along a direction is 2^-w across it, and needs the same label
        [x_flip.float(), y_flip.float(), zoom, turn.cos() - 1, turn.sin(), stretch * (2 * direction).cos(), stretch * (2 * direction).sin(),
         shift[:, 0], shift[:, 1]], 1,
    )  # fmt: skip

    # the map from places of the answer to places of x, in edges from the centre: the inverses in reverse order
    flip = torch.diag_embed(torch.stack([1 - 2 * x_flip.float(), 1 - 2 * y_flip.float()], 1))
    scale = torch.exp2(-zoom)[:, None, None]
    across = torch.diag_embed(torch.stack([torch.exp2(-stretch), torch.exp2(stretch)], 1))
    matrix = flip @ (scale * _rotation(-turn)) @ _rotation(direction) @ across @ _rotation(-direction)
    offset = -2 * (matrix @ shift[:, :, None])  # affine_grid's edges are -1 and 1
    ratio = x.shape[3] / x.shape[2]
    aspect = torch.tensor([[1.0, 1 / ratio], [ratio, 1.0]], device=x.device)  # rotations are of pixels, the grid's unit is an edge
    grid = F.affine_grid(torch.cat([matrix * aspect, offset], 2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="reflection", align_corners=False)
    mirrored = torch.where(x_flip[:, None, None, None], x.flip(3), x)
    resampled = (labels[:, 1:] != 0).any(1)[:, None, None, None]
    return torch.where(resampled, moved, mirrored), labels


def _rotation(angle: Tensor) -> Tensor:
    """(B, 2, 2) of angles (B,)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
