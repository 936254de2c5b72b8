"""Small networks: encoders into the latent space, the latents' normalisation, and an MLP that predicts noise in latent space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODERS = ("auto", "cnn", "resnet18", "mlp", "identity")
LATENT_NORMS = ("l2", "whiten", "none")


class SmallCNN(nn.Module):
    """Three 3x3 convolutions for images of 8 to 16 pixels. GroupNorm: a latent does not depend on the batch it was encoded with, and
    training and evaluation are the same function."""

    def __init__(self, channels: int, dim: int, width: int = 24):
        super().__init__()
        shapes = [(channels, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]  # in, out, stride
        self.body = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(8, o), nn.ReLU()) for i, o, stride in shapes]
        )
        self.out = nn.LazyLinear(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).flatten(1))


def resnet18(channels: int, dim: int) -> nn.Module:
    """torchvision's ResNet-18 with the 3x3 stem and no pooling, as used on 32-pixel images."""
    from torchvision.models import resnet18 as build

    net = build(num_classes=dim, norm_layer=lambda c: nn.GroupNorm(8, c))
    net.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.Identity()
    return net


def mlp(inputs: int, dim: int, width: int = 256) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, dim))


def build_encoder(kind: str, example: Tensor, dim: int) -> nn.Module:
    """The encoder E_phi for rows like `example` (1, ...). auto: cnn up to 16 pixels, resnet18 above, identity for features."""
    image = example.dim() == 4
    if kind == "auto":
        kind = "identity" if not image else "cnn" if example.shape[-1] <= 16 else "resnet18"
    if image != (kind in ("cnn", "resnet18")):
        raise ValueError(f"encoder: {kind} does not fit {'images' if image else 'features'} of shape {tuple(example.shape[1:])}")
    if kind == "identity":
        return nn.Identity()
    if kind == "mlp":
        return mlp(example.shape[1], dim)
    net = {"cnn": SmallCNN, "resnet18": resnet18}[kind](example.shape[1], dim)
    net(example)  # gives the lazy layer its shape
    return net


class LatentSpace(nn.Module):
    """z = norm(E_phi(x)).

    l2: every latent has norm sqrt(d), unit mean square per coordinate as the diffusion's unit noise presumes; no statistics that go
    stale while the encoder moves. whiten: ZCA whitening by the last `fit`; unlike PCA it turns no axis when it is fitted
    again. none: as the encoder says.
    """

    def __init__(self, encoder: nn.Module, norm: str, example: Tensor):
        super().__init__()
        self.encoder, self.norm = encoder, norm
        with torch.no_grad():
            self.dim = encoder(example).shape[1]
        self.register_buffer("mean", example.new_zeros(self.dim))
        self.register_buffer("matrix", torch.eye(self.dim, dtype=example.dtype, device=example.device))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        if self.norm == "l2":
            return F.normalize(h, dim=1) * math.sqrt(h.shape[1])
        return (h - self.mean) @ self.matrix

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Whitening of these rows; does nothing for the other norms."""
        if self.norm != "whiten":
            return
        h = torch.cat([self.encoder(part) for part in x.split(1024)]).double()
        centred = h - h.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / max(len(h) - 1, 1))
        scale = values.clamp(min=1e-4 * values.max().clamp(min=1e-30)).rsqrt()
        self.mean.copy_(h.mean(0))
        self.matrix.copy_((vectors * scale) @ vectors.T)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents of a whole data set, in pieces, without gradients."""
        return torch.cat([self(part) for part in x.split(1024)])


class Denoiser(nn.Module):
    """eps_theta(z_t, t) for latents (B, d): a residual MLP whose blocks are scaled and shifted by the time.

    The time has to multiply: near t = 0 the answer is a difference divided by a small noise level, which sums cannot imitate.
    """

    def __init__(self, dim: int, steps: int, width: int = 256, depth: int = 3):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000.0), 32)), persistent=False)
        self.steps = steps
        self.inside = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2 * depth * width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth))
        self.outside = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        phase = (t / self.steps)[:, None].to(z.dtype) * self.frequencies.to(z.dtype)
        films = self.time(torch.cat([phase.sin(), phase.cos()], 1)).chunk(2 * len(self.blocks), dim=1)
        h = self.inside(z)
        for norm, block, scale, shift in zip(self.norms, self.blocks, films[::2], films[1::2], strict=True):
            h = h + block(norm(h) * (1 + scale) + shift)
        return self.outside(h)


class AssignmentNet(nn.Module):
    """CLUDI's z~_theta(z_t, x, t), which predicts an assignment embedding z_0 (..., d), with its class head L and embeddings E.

    The features' part of the input does not depend on z_t or t: `condition` computes it once for a whole reverse sampling.
    """

    def __init__(self, features: int, dim: int, clusters: int, steps: int, width: int = 128, depth: int = 3, trainable: bool = False):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000.0), 32)), persistent=False)
        self.dim, self.steps, half = dim, steps, width // 2
        both = width + half
        self.condition_part = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width),
            nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, width),
        )  # fmt: skip
        self.assignment_part = nn.Sequential(
            nn.Linear(2 * dim, half), nn.SiLU(), nn.Linear(half, half), nn.LayerNorm(half), nn.Linear(half, half)
        )
        self.time = nn.Sequential(nn.Linear(64, both), nn.SiLU(), nn.Linear(both, both))
        self.trunk = nn.ModuleList(nn.Linear(both, both) for _ in range(depth))
        self.outside = nn.Sequential(nn.Linear(both, dim), nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.head = nn.Linear(dim, clusters)  # L, with a bias as in the released code
        self.embedding = nn.Parameter(F.normalize(torch.randn(clusters, dim), dim=1), requires_grad=trainable)  # rows: columns of E

    def condition(self, x: Tensor, dropout: float = 0.0, rng: torch.Generator | None = None) -> Tensor:
        """(..., width) of features x (..., n). The mask is drawn from `rng`, so that a resumed run draws it again."""
        h = self.condition_part(x)
        if dropout:
            h = h * (torch.rand(h.shape, generator=rng, device=h.device) >= dropout) / (1 - dropout)
        return h

    def forward(self, z_t: Tensor, h: Tensor, t: Tensor, guess: Tensor) -> Tensor:
        """z~ for z_t (B, N, d), h (B or 1, N, width), times t (B,) and an earlier guess of z_0 like z_t, zero for none."""
        phase = (t / self.steps).to(z_t)[:, None] * self.frequencies.to(z_t)
        time = self.time(torch.cat([phase.sin(), phase.cos()], 1))[:, None]  # (B, 1, both)
        assignment = self.assignment_part(torch.cat([guess, z_t], -1))
        out = torch.cat([h.expand(*assignment.shape[:-1], -1), assignment], -1) + time
        for layer in self.trunk:
            out = F.silu(layer(out)) / 0.596  # MPSiLU: keeps the magnitude of unit normal inputs
        return self.outside(out)

    def embed(self, u: Tensor) -> Tensor:
        """sqrt(d) E u / |E u| of cluster probabilities u (..., K) (Eq. 13)."""
        return math.sqrt(self.dim) * F.normalize(u @ F.normalize(self.embedding, dim=1), dim=-1)
