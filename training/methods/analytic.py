"""The ideal denoiser of the training set: what a network that fitted its class's images perfectly would answer (001: Eq. 5, 6).

Nothing is trained, and every sample ends on a training image; so it is the baseline of memorisation. With `class_mix` w an image of another
class counts w where one of the class itself counts 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ltkernels

from .. import data
from ..config import AnalyticConfig
from ..diffusion import Diffusion
from ..loop import Stage


class IdealDenoiser(nn.Module):
    """net(x_t (B, C, H, W), t (B,), labels (B,) or None) -> epsilon like x_t, where -1 and None ask for all images alike.

    A label without images raises ValueError with class_mix 0. Deterministic; float32 posterior means of `ltkernels.posterior_mean`.
    """

    def __init__(self, dataset: data.Dataset, diffusion: Diffusion, class_mix: float = 0.0, device: str = "cpu"):
        super().__init__()
        self.diffusion, self.class_mix = diffusion, class_mix
        self.register_buffer("images", dataset.images.to(device))
        self.register_buffer("labels", dataset.labels.to(device))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        scale, std = self.diffusion.coefficients(t, x_t)
        x0 = self.denoised(x_t, scale, std, torch.full_like(t, -1) if y is None else y)
        return (x_t - scale.view(-1, 1, 1, 1) * x0) / std.view(-1, 1, 1, 1)

    def denoised(self, x_t: Tensor, scale: Tensor, std: Tensor, y: Tensor) -> Tensor:
        """E[x_0 | x_t, y] (B, C, H, W) for x_t = scale x_0 + std noise, scale and std (B,)."""
        x0 = torch.empty_like(x_t)
        for label in y.unique().tolist():
            rows = y == label
            clean, log_prior = self.images_of(label)
            x0[rows] = ltkernels.posterior_mean(x_t[rows], clean, scale[rows], std[rows], log_prior=log_prior)
        return x0

    def images_of(self, label: int) -> tuple[Tensor, Tensor | None]:
        """Images (K, C, H, W) that count, and the logarithms of how much (K,), None where all count alike."""
        if label < 0 or self.class_mix == 1:
            return self.images, None
        own = self.labels == label
        if self.class_mix > 0:
            return self.images, torch.where(own, 1.0, self.class_mix).log()
        if not own.any():
            raise ValueError(f"analytic: with class_mix 0 every label needs training images; got label {label} without any")
        return self.images[own], None


class Ideal(Stage):
    """A stage of no steps, which puts the ideal denoiser where the network's average would be."""

    name, steps = "denoise", 0

    def __init__(self, dataset: data.Dataset, modules: dict[str, nn.Module], config: AnalyticConfig):
        self.modules, self.lr, self.cache = modules, {}, {}
        modules["ema"] = of_run(dataset, config)

    def notes(self) -> dict[str, str]:
        return {}

    def report(self) -> dict[str, object]:
        return {}


def of_run(dataset: data.Dataset, config: AnalyticConfig) -> IdealDenoiser:
    return IdealDenoiser(dataset, Diffusion(config.timesteps, config.beta_start, config.beta_end), config.class_mix, config.device)
