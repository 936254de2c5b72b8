"""CCUA: contrastive conditional-unconditional alignment (Chen et al., 2025, arXiv:2507.09052).

To the denoising loss come two terms whose weight t / T grows with the noise: alpha InfoNCE, which pushes the images that the network makes
without a label apart, and gamma |output(y) - output(no label)|^2, which lets rare classes start where all images do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ltkernels

from .. import ranks
from .ddpm import Denoise
from .diffrop import DiffROP


@dataclass(frozen=True)
class CCUA:
    """Stateless. alpha, gamma: weights of the two terms; temperature: of the softmax; steps: the last time."""

    alpha: float = 1.0
    gamma: float = 1.0
    temperature: float = 0.1
    steps: float = 1000

    def contrast(self, images: Tensor, t: Tensor, whole: Tensor | None = None, offset: int = 0) -> Tensor:
        """alpha times the mean over rows of -t / T log softmax_j(cos(image_i, whole_j) / temperature) at j = i, for images (B, ...) and
        times (B,). whole (B', ...): those of all ranks, of which row `offset` is the first here. A batch of one row: 0."""
        unit = F.normalize(images.flatten(1), dim=1)
        every = unit if whole is None else F.normalize(whole.flatten(1), dim=1)
        logits = (1 - ltkernels.pairwise_sqdist(unit, every) / 2) / self.temperature  # |u - v|^2 = 2 - 2 cos
        own = torch.arange(offset, offset + len(unit), device=unit.device)
        return self.alpha * (t / self.steps * F.cross_entropy(logits, own, reduction="none")).mean()

    def align(self, output: Tensor, unlabelled: Tensor, t: Tensor) -> Tensor:
        """gamma times the mean over rows of t / T |output - unlabelled|^2, |.|^2 a mean over pixels. Both sides take the gradient."""
        return self.gamma * (t / self.steps * (output - unlabelled).square().flatten(1).mean(1)).mean()


class Align(Denoise):
    """Denoise with CCUA's terms; one more forward pass, without labels."""

    def further_terms(self, batch, output):
        config = self.config
        method = CCUA(config.ccua_alpha, config.ccua_gamma, config.ccua_temperature, config.timesteps)
        unlabelled = self.predict(batch, torch.full_like(batch.label, -1))
        images = DiffROP(space="x0").rows(batch.x_t, unlabelled, batch.scale, batch.std, config.prediction)
        contrast = method.contrast(images, batch.t, ranks.gathered(images) if ranks.size() > 1 else None, batch.offset)
        return {"loss_ucl": contrast, "loss_al": method.align(output, unlabelled, batch.t)}
