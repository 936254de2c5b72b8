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


# ---- images ----------------------------------------------------------------------------------------------------------
# Denoisers of images: net(x (B, C, H, W), t (B,), y (B,) or None, augment (B, 9) or None) like x. A label of -1, and y = None, add nothing:
# there is no null token. num_classes = 0 makes a net without labels, which ignores them.

NETWORKS = ("auto", "unet", "mlp")


def time_features(t: Tensor, dim: int) -> Tensor:
    """(B, dim): sin and cos of (t - 1) f_i by turns, f_i from 1 to nearly 1e-4; t - 1, since the public code's nets count from 0."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(0, dim, 2, device=t.device) / dim)
    phase = (t - 1).float()[:, None] * frequencies
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(1)


class Condition(nn.Module):
    """What a denoiser is told beside the image: the time, a label and the parameters of an augmentation, as one vector."""

    def __init__(self, inputs: int, dim: int, num_classes: int, augment_dim: int):
        super().__init__()
        self.inputs = inputs
        self.time = nn.Sequential(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes, dim) if num_classes else None
        self.augment = nn.Linear(augment_dim, dim, bias=False) if augment_dim else None
        for layer in (self.time[0], self.time[2]):
            _init(layer)

    def forward(self, t: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        out = self.time(time_features(t, self.inputs).to(self.time[0].weight.dtype))  # (B, dim)
        if y is not None and self.label is not None:
            out = out + self.label(y.clamp(min=0)) * (y >= 0)[:, None]
        if augment is not None:
            if self.augment is None:
                raise ValueError("denoiser: built with augment_dim=0, but augmentation labels were given")
            out = out + self.augment(augment)
        return out


def _init(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, gain: float = 1.0) -> nn.Conv2d:
    return _init(nn.Conv2d(inputs, outputs, size, stride, size // 2), gain)


def _norm(channels: int) -> nn.GroupNorm:
    # of 4 channels at least: a group of one would take out the very constant by which time and label are told
    return nn.GroupNorm(math.gcd(32, channels, max(1, channels // 4)), channels)


class Attention(nn.Module):
    """Self-attention with one head over the pixels, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (_conv(channels, channels, 1) for _ in range(3))
        self.out = _conv(channels, channels, 1, gain=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h[:, 0].transpose(1, 2).reshape(x.shape))


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float, attention: bool):
        super().__init__()
        self.first = nn.Sequential(_norm(inputs), nn.SiLU(), _conv(inputs, outputs))
        self.condition = nn.Sequential(nn.SiLU(), _init(nn.Linear(condition, outputs)))
        # a last convolution near 0: the net starts as the sum of its shortcuts
        self.second = nn.Sequential(_norm(outputs), nn.SiLU(), nn.Dropout(dropout), _conv(outputs, outputs, gain=1e-5))
        self.shortcut = _conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.first(x) + self.condition(c)[:, :, None, None]
        return self.attention(self.shortcut(x) + self.second(h))


class UNet(nn.Module):
    """The U-Net of DDPM (Ho et al., 2020) as in pytorch-ddpm, CBDM and OC_LT: GroupNorm and swish, `blocks` residual blocks a level on the
    way down and one more on the way up, attention at the levels `attention` (level i has 1 / 2^i of the pixels' edge) and in the middle.

    Layers are registered in the order of those code bases, so that their checkpoints can be read by position.
    """

    def __init__(
        self, channels: int, num_classes: int, *, width: int = 128, mult: tuple[int, ...] = (1, 2, 2, 2), attention: tuple[int, ...] = (1,),
        blocks: int = 2, dropout: float = 0.1, augment_dim: int = 0,
    ):  # fmt: skip
        super().__init__()
        if width % 2 or not mult or not all(0 <= level < len(mult) for level in attention):
            raise ValueError(
                f"UNet: expected an even width, and attention at levels below {len(mult)}; got width={width}, attention={attention}"
            )
        self.levels, hidden = len(mult), 4 * width
        self.condition = Condition(width, hidden, num_classes, augment_dim)
        self.inside = _conv(channels, width)

        now, skips = width, [width]
        self.down = nn.ModuleList()
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.down.append(ResBlock(now, width * factor, hidden, dropout, level in attention))
                now = width * factor
                skips.append(now)
            if level + 1 < len(mult):
                self.down.append(_conv(now, now, stride=2))
                skips.append(now)

        self.middle = nn.ModuleList(ResBlock(now, now, hidden, dropout, attend) for attend in (True, False))

        self.up = nn.ModuleList()
        for level, factor in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(now + skips.pop(), width * factor, hidden, dropout, level in attention))
                now = width * factor
            if level:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), _conv(now, now)))
        self.outside = nn.Sequential(_norm(now), nn.SiLU(), _conv(now, channels, gain=1e-5))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        part = 2 ** (self.levels - 1)
        if any(edge % part or edge < 2 * part for edge in x.shape[2:] if part > 1):
            raise ValueError(
                f"UNet: with {self.levels} levels height and width must be multiples of {part}, at least {2 * part}; got {tuple(x.shape)}"
            )
        h, skips, c = self.encode(x, t, y, augment)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), c) if isinstance(layer, ResBlock) else layer(h)
        return self.outside(h)

    def encode(self, x: Tensor, t: Tensor, y: Tensor | None, augment: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """The way down and the middle: (features, what the way up will need of them, the condition)."""
        c = self.condition(t, y, augment)
        h = self.inside(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, c) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, c)
        return h, skips, c


class ImageMLP(nn.Module):
    """A residual MLP over all pixels of a small image; time, label and augmentation scale and shift the input of every block, for the
    reason given in `Denoiser`."""

    def __init__(
        self, channels: int, size: int, num_classes: int, *, width: int = 256, depth: int = 3, dropout: float = 0.0, augment_dim: int = 0
    ):
        super().__init__()
        self.shape = (channels, size, size)
        self.condition = Condition(64, width, num_classes, augment_dim)
        self.inside = nn.Linear(math.prod(self.shape), width)
        self.films = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width)) for _ in range(depth)
        )
        self.outside = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, math.prod(self.shape)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"ImageMLP: expected x of shape (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}")
        return self.outside(self.encode(x, t, y, augment)).reshape(x.shape)

    def encode(self, x: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """(B, width): what the last layer sees."""
        c = self.condition(t, y, augment)
        h = self.inside(x.flatten(1))
        for film, norm, block in zip(self.films, self.norms, self.blocks, strict=True):
            scale, shift = film(c).chunk(2, 1)
            h = h + block(norm(h) * (1 + scale) + shift)
        return h


def build_denoiser(
    network: str, channels: int, size: int, num_classes: int, *, width: int, dropout: float = 0.1, augment_dim: int = 0, depth: int = 3,
    mult: tuple[int, ...] = (1, 2, 2, 2), attention: tuple[int, ...] = (1,), blocks: int = 2,
) -> nn.Module:  # fmt: skip
    """The denoiser of square images of `size` pixels a side. auto: mlp up to 8, unet above.

    The U-Net has the first levels of `mult` down to the last whole number of pixels of 2 or more: three of four for 28 pixels (28, 14, 7).
    """
    if network not in NETWORKS:
        raise ValueError(f"network: expected one of {', '.join(NETWORKS)}; got {network!r}")
    if network == "mlp" or network == "auto" and size <= 8:
        return ImageMLP(channels, size, num_classes, width=width, depth=depth, dropout=dropout, augment_dim=augment_dim)
    if size % 2 or size < 4:
        raise ValueError(f"unet: expected images of an even number of pixels, at least 4 a side; got {size}; --network mlp takes any")
    levels = sum(size % 2**level == 0 and size >= 2 * 2**level for level in range(len(mult)))
    attention = tuple(level for level in attention if level < levels)
    return UNet(
        channels, num_classes, width=width, mult=mult[:levels], attention=attention, blocks=blocks, dropout=dropout, augment_dim=augment_dim
    )


class NoisyEncoder(nn.Module):
    """f(x_t, t), (B, dim) of unit length: the encoding half of a denoiser, averaged over a U-Net's pixels, and a linear layer."""

    def __init__(self, denoiser: UNet | ImageMLP, dim: int):
        super().__init__()
        self.body = denoiser
        if isinstance(denoiser, UNet):
            width = denoiser.middle[-1].second[-1].out_channels
            del denoiser.up  # the other half
            self.pool = nn.Sequential(_norm(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        else:
            width, self.pool = denoiser.inside.out_features, nn.LayerNorm(denoiser.inside.out_features)
        del denoiser.outside
        self.out = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.body.encode(x, t, None, None)
        return F.normalize(self.out(self.pool(h[0] if isinstance(h, tuple) else h)), dim=1)
