"""Augmentation of training images: ADA's does not leak into the samples, since the network is told what was done to an image and asked for
images to which nothing was (Karras et al., 2020, 2022); DiffAug's (Zhao et al., 2020) tells nothing."""

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


def diff_augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """DiffAug's three policies on every image of x (B, C, H, W), as released.

    Colour: brightness + U(-.5, .5), saturation times U(0, 2) around the mean over channels (which does nothing to a single one), contrast
    times U(.5, 1.5) around the image's mean. Translation by up to an eighth of the edge. Cutout of a square of half the edge around a
    uniform place. What moves in or is cut out is 0, medium grey.

    The network is told nothing of it, so samples look augmented, too: a baseline of 002.
    """
    count, _, height, width = x.shape
    uniform = torch.rand(count, 7, generator=rng, device=x.device)
    column = lambda i: uniform[:, i].view(-1, 1, 1, 1)  # noqa: E731
    x = x + (column(0) - 0.5)
    x = (x - (grey := x.mean(1, keepdim=True))) * (2 * column(1)) + grey
    x = (x - (mean := x.mean((1, 2, 3), keepdim=True))) * (column(2) + 0.5) + mean

    def places(edge: int, number: int, reach: int, low: int) -> Tensor:  # (B, 1) integers low..low + reach
        return (low + (uniform[:, number, None] * (reach + 1)).long().clamp(max=reach)).to(x.device)

    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)  # of the answer
    from_row, from_column = (
        line - places(len(line), number, 2 * (far := int(len(line) / 8 + 0.5)), -far) for line, number in ((rows, 3), (columns, 4))
    )
    inside = ((from_row >= 0) & (from_row < height))[:, :, None] & ((from_column >= 0) & (from_column < width))[:, None]
    batch = torch.arange(count, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[batch, from_row.clamp(0, height - 1)[:, :, None], from_column.clamp(0, width - 1)[:, None]]
    x = moved.permute(0, 3, 1, 2) * inside[:, None]

    hole = []
    for line, number in ((rows, 5), (columns, 6)):
        side = int(len(line) / 2 + 0.5)
        centre = places(len(line), number, len(line) - side % 2, 0)
        hole.append((line >= centre - side // 2) & (line < centre - side // 2 + side))
    return x * ~(hole[0][:, :, None] & hole[1][:, None])[:, None]


def _rotation(angle: Tensor) -> Tensor:
    """(B, 2, 2) of angles (B,)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
