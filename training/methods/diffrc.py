"""DiffRC: long-tailed recognition with images from a diffusion model (003; equations by their numbers there).

A source model learns the head classes, the target model goes on from it with the medium and tail classes, while L_pair keeps its images of
a class as far from one another as the source would have them (Eq. 7 to 9). An encoder f(x_t, t) with one prototype a class gives L_PC
(Eq. 11, 12), and its gradient leads the sampling to a class (Eq. 13). `DiffRC` is stateless and works in anybody's loop and sampler.
Where the paper is silent or wrong, the choice is an option of DiffRCConfig, marked C1..C10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data
from ..config import DDPMConfig, DiffRCConfig
from ..diffusion import Diffusion, _column
from ..loop import Stage
from .ddpm import Batch, Denoise, mirrored

LEAST = 3  # members of a class in a batch: with two, every softmax is over one other image, and the divergence is 0
CHOICES = {
    "pair_weight": ("paper", "effective", "none"), "pair_kl": ("tar_sou", "sou_tar"), "pair_reduce": ("mean", "sum"),
    "pc_prior": ("train", "uniform"), "guidance_sign": ("descend", "paper"), "grad_norm": ("rms", "l2", "none"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class DiffRC:
    """class_counts (C,): rows of each class in the training set; a class without rows takes no part in anything.

    pair_gamma, pair_weight: the factor of Eq. 8 (C1). pair_kl: KL(target, source) or the other way round (C2). pair_reduce: the mean over
    the rows that count, or the sum of Eq. 9 (C3). momentum, tau, pc_prior: m, tau and pi of Eq. 11 and 12 (C8). s, guidance_sign,
    grad_norm: strength of Eq. 13, down or up L_PC (C5), and the length of its gradient: sqrt(D), 1, or as it is (C7).
    """

    class_counts: Sequence[int] | Tensor
    pair_gamma: float = 0.1
    pair_weight: str = "paper"
    pair_kl: str = "tar_sou"
    pair_reduce: str = "mean"
    momentum: float = 0.999
    tau: float = 0.07
    pc_prior: str = "train"
    s: float = 0.6
    guidance_sign: str = "descend"
    grad_norm: str = "rms"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"DiffRC: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        object.__setattr__(self, "class_counts", torch.as_tensor(self.class_counts))

    # ---- the pair-wise diversity loss

    def factors(self) -> Tensor:
        """(C,) float64: 1 / (1 + gamma^N_k) of Eq. 8; "effective": 1 - gamma^N_k, Cui et al.'s effective number over its limit."""
        power = torch.as_tensor(self.pair_gamma, dtype=torch.float64) ** self.class_counts
        return {"paper": 1 / (1 + power), "effective": 1 - power, "none": torch.ones_like(power)}[self.pair_weight]

    def pair_loss(self, target: Tensor, source: Tensor, y: Tensor, group: Tensor | None = None) -> Tensor:
        """Eq. 7 to 9 for the two models' x0hat (B, ...) of the same x_t, labels y (B,): a scalar; `source` takes no gradient.

        A row is compared with the others of its group (B,), rows of one class; default: all of its class. Groups of fewer than three rows
        count 0. Of a group of n rows n^2 cosines are formed, for all groups of one size at once; for so few rows these are small matrix
        products, and no kernel of ltkernels would save anything. Computed in float32 at least: x0hat is 157 times the noise at t = T (C10).
        """
        unit = [F.normalize(x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (target, source.detach())]
        group = y if group is None else group
        order, sizes = group.argsort(stable=True), torch.unique(group, return_counts=True)[1]
        first, rows = sizes.cumsum(0) - sizes, []
        for n in sizes.unique().tolist():
            if n < LEAST:
                continue
            members = order[first[sizes == n, None] + torch.arange(n, device=y.device)]  # (groups, n)
            tar, sou = (_cosines(x[members]) for x in unit)
            tar = tar * self.factors().to(tar)[y[members[:, 0]]][:, None, None]
            p, q = (x.log_softmax(2) for x in ((tar, sou) if self.pair_kl == "tar_sou" else (sou, tar)))
            rows.append((p.exp() * (p - q)).sum(2).flatten())
        return getattr(torch.cat(rows), self.pair_reduce)() if rows else target[:0].sum()  # nothing to compare: 0, with a gradient of 0

    # ---- prototypes and their loss

    def update(self, prototypes: Tensor, features: Tensor, y: Tensor) -> Tensor:
        """Prototypes (C, d) after Eq. 11 for features (B, d), row by row, normalised at the end; zeros stand for a class not yet seen."""
        mine = F.one_hot(y, len(prototypes)).to(features)  # (B, C)
        later = (mine.flip(0).cumsum(0).flip(0) - mine)[torch.arange(len(y), device=y.device), y]  # rows of the same class still to come
        added = (mine * ((1 - self.momentum) * self.momentum**later)[:, None]).T @ features
        kept = torch.where(mine.sum(0) > 0, self.momentum ** mine.sum(0), 1.0)[:, None] * prototypes
        return F.normalize(kept + added, dim=1)

    def prototype_loss(self, features: Tensor, prototypes: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """L_PC (Eq. 12) of features (B, d) of unit length and labels y (B,). A label without training rows makes it infinite."""
        counts = self.class_counts.to(features)
        prior = counts if self.pc_prior == "train" else (counts > 0).to(features)
        logits = features @ prototypes.T / self.tau + (prior / prior.sum()).log()
        return F.cross_entropy(logits, y, reduction=reduction)

    # ---- guided sampling

    def gradient(self, x_t: Tensor, t: Tensor, encoder: nn.Module, prototypes: Tensor, y: Tensor) -> Tensor:
        """grad* of Eq. 13, like x_t (B, ...): the gradient of L_PC(f(x_t, t), y) in x_t, at the length that grad_norm says; 0 stays 0."""
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.prototype_loss(encoder(x, t), prototypes, y, "sum"), x)
        if self.grad_norm == "none":
            return grad
        length = math.sqrt(x_t.shape[1:].numel()) if self.grad_norm == "rms" else 1.0
        return F.normalize(grad.flatten(1), dim=1, eps=1e-30).view_as(grad) * length

    def shift(self, x_t: Tensor, t: Tensor, var: float, encoder: Callable, prototypes: Tensor, y: Tensor) -> Tensor:
        """What to add to the mean of the step from x_t (B, ...), times t (B,), covariance var x identity, towards the classes y (B,).

        The noise of the step keeps the standard deviation sqrt(var); Eq. 13 prints var (C6). Example: `mean = mean + method.shift(...)`.
        """
        towards = -1.0 if self.guidance_sign == "descend" else 1.0
        return towards * self.s * var * self.gradient(x_t, t, encoder, prototypes, y)


def _cosines(unit: Tensor) -> Tensor:
    """Of unit rows (G, n, D) with the others of their group: (G, n, n - 1)."""
    groups, n, _ = unit.shape
    with torch.autocast(unit.device.type, enabled=False):
        every = (unit @ unit.mT).flatten(1)  # without the first entry, every (n + 1)-th is one of the diagonal
    return every[:, :-1].view(groups, n - 1, n + 1)[:, :, 1:].reshape(groups, n, n - 1)


class Adapt(Denoise):
    """Stage 2: the target model learns the medium and tail classes, from batches made of groups of one class."""

    name = "target"

    def __init__(self, dataset, modules, config: DDPMConfig, method: DiffRC, source: nn.Module, own: DiffRCConfig):
        super().__init__(dataset, modules, config)
        self.method, self.source, self.own = method, source.eval().requires_grad_(False), own

    def draw(self, step, rng):
        own, device = self.own, self.x.device
        groups = max(own.batch_size // own.group_size, 1)
        label = data.batch_of_rows(self.y, own.group_classes, groups, step, own.seed, rng)
        members = [(self.y == self.y[row]).nonzero().flatten() for row in label]
        members = [rows[torch.randperm(len(rows), generator=rng, device=device)[: own.group_size]] for rows in members]
        rows, sizes = torch.cat(members), torch.tensor([len(rows) for rows in members], device=device)
        t = torch.randint(1, own.timesteps + 1, (len(rows) if own.pair_t == "sample" else groups,), generator=rng, device=device)
        t = t if own.pair_t == "sample" else t.repeat_interleave(sizes)
        self.group = torch.arange(groups, device=device).repeat_interleave(sizes)
        eps = torch.randn(len(rows), *self.x.shape[1:], generator=rng, device=device)
        flipped = (torch.rand(len(rows), generator=rng, device=device) < 0.5) & self.flips
        x0, y = mirrored(self.x[rows], flipped), self.y[rows]
        scale, std = self.diffusion.coefficients(t, x0)
        x_t = self.diffusion.add_noise(x0, eps, t)
        return Batch(rows, x0, y, None, flipped, None, t, scale, std, x_t, rng, 0, x0, y, None, t, eps, None)

    def further_terms(self, batch, output):
        if self.own.lam == 0:
            return {}
        with torch.no_grad():
            eps = self.source(batch.x_t, batch.t)
        scale, std = (_column(values, output) for values in (batch.scale, batch.std))
        target, source = ((batch.x_t - std * noise) / scale for noise in (output, eps))  # Eq. 6
        pair = self.method.pair_loss(target, source, batch.y, self.group)
        return {"loss_pair": self.own.lam * pair / (output[0].numel() if self.own.pair_reduce == "sum" else 1)}


class Prototypical(Stage):
    """Stage 3: the encoder of noisy images learns by L_PC; the prototypes follow it."""

    name = "encoder"

    def __init__(self, dataset: data.Dataset, modules: dict[str, nn.Module], method: DiffRC, own: DiffRCConfig, flips: bool):
        self.modules, self.lr, self.steps, self.cache = modules, {"encoder": own.encoder_lr}, own.encoder_steps, {}
        self.x, self.y = dataset.images.to(own.device), dataset.labels.to(own.device)
        self.method, self.own, self.flips = method, own, flips
        self.diffusion = Diffusion(own.timesteps, own.beta_start, own.beta_end)

    def loss(self, step, rng):
        rows = data.batch_of_rows(self.y, "none", self.own.batch_size, step, self.own.seed, rng)
        x0 = mirrored(self.x[rows], (torch.rand(len(rows), generator=rng, device=self.x.device) < 0.5) & self.flips)
        t = torch.randint(1, self.own.timesteps + 1, (len(rows),), generator=rng, device=self.x.device)
        eps = torch.randn(x0.shape, generator=rng, device=self.x.device)
        features = self.modules["encoder"](self.diffusion.add_noise(x0, eps, t), t)
        self.seen = features.detach(), self.y[rows]
        return self.method.prototype_loss(features, self.modules["prototypes"].rows, self.y[rows]), {}

    def after_step(self, step):
        self.modules["prototypes"].rows.copy_(self.method.update(self.modules["prototypes"].rows, *self.seen))


class Prototypes(nn.Module):
    """One a class, (C, d), zeros where the class was not seen."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_classes, dim))
