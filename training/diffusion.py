"""The forward process and one reverse step of DDPM/DDIM, shared by every method, and a sampler that takes guidance as a function.

Time is the papers' t in {1..T}; t = 0 is clean data (alpha_bar_0 = 1), so no step is special. The schedule is kept in float64 and cast
where it meets data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

Shift = Callable[[Tensor, Tensor, float, Tensor, float], Tensor]  # (z_t, mu, var, x0hat, t / T) -> what is added to mu
Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x_t, t (B,), labels (B,) or None) -> like x_t
PREDICTIONS = ("epsilon", "v", "x0")
SAMPLERS = ("ddim", "ddpm")
VARIANCES = ("fixedlarge", "fixedsmall")


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the dtype and on the device of `like`."""
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))


class Schedule:
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps at times t = 0..steps; subclasses say which abar."""

    steps: int
    alpha_bar: Tensor  # (steps + 1,) float64, alpha_bar[0] = 1

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, std) = sqrt(abar_t), sqrt(1 - abar_t) for times t (B,), computed in float64, in the dtype and on the device of `like`."""
        alpha_bar = self.alpha_bar.to(t.device)[t]  # the table to the times: the other way round, a GPU would be waited for
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    @property
    def betas(self) -> Tensor:
        """(steps + 1,) float64: beta_t = 1 - abar_t / abar_{t-1}, the papers' sigma_t^2; 0 at t = 0."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), 1 - self.alpha_bar[1:] / self.alpha_bar[:-1]])

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """q(z_t | z_0) for times t (B,)."""
        scale, std = self.coefficients(t, x0)
        return _column(scale, x0) * x0 + _column(std, x0) * eps

    def predict_x0(self, z_t: Tensor, eps: Tensor, t: int) -> Tensor:
        alpha_bar = float(self.alpha_bar[t])
        return (z_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)

    def estimates(
        self, z_t: Tensor, output: Tensor, t: int, prediction: str = "epsilon", clip: tuple[Tensor | float, Tensor | float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x0hat, eps) of a network whose output is eps, z_0, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0.

        With `clip` = (low, high), x0hat stays between them and eps becomes what would have led here from there.
        """
        scale, std = math.sqrt(float(self.alpha_bar[t])), math.sqrt(1 - float(self.alpha_bar[t]))
        if prediction == "epsilon":
            x0, eps = self.predict_x0(z_t, output, t), output
        elif prediction == "v":
            x0, eps = scale * z_t - std * output, std * z_t + scale * output
        elif prediction == "x0":  # by way of eps, z_0 would lose its digits where abar_t is small
            x0, eps = output, (z_t - scale * output) / std
        else:
            raise ValueError(f"estimates: prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
        if clip is not None:
            x0 = x0.clamp(*clip)
            eps = (z_t - scale * x0) / std
        return x0, eps

    def reverse_variance(self, t: int, s: int, eta: float = 1.0) -> float:
        """Sigma of the step t -> s: eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s). eta = 1 is the DDPM posterior, 0 is DDIM."""
        at, as_ = float(self.alpha_bar[t]), float(self.alpha_bar[s])
        return eta**2 * (1 - as_) / (1 - at) * (1 - at / as_)

    def reverse(
        self, z_t: Tensor, eps: Tensor, t: int, s: int, eta: float = 1.0, clip: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """(x0hat, mean, variance) of the step t -> s, any 0 <= s < t; with `clip` = (low, high), x0hat stays between them.

        mean = sqrt(abar_s) x0hat + sqrt(1 - abar_s - Sigma) eps. With s = t - 1 and eta = 1 this is A.2 of 000,
        (z_t - (1 - alpha_t) / sqrt(1 - abar_t) eps) / sqrt(alpha_t); the supplement prints sqrt(1 - alpha_t), a typo.
        """
        x0, eps = self.estimates(z_t, eps, t, clip=clip)
        variance = self.reverse_variance(t, s, eta)
        return x0, self._mean(x0, eps, s, variance), variance

    def reverse_x0(self, z_t: Tensor, x0: Tensor, t: int, s: int, eta: float = 1.0) -> tuple[Tensor, float]:
        """(mean, variance) of the step t -> s of a network that predicts z_0."""
        variance = self.reverse_variance(t, s, eta)
        return self._mean(*self.estimates(z_t, x0, t, "x0"), s, variance), variance

    def _mean(self, x0: Tensor, eps: Tensor, s: int, variance: float) -> Tensor:
        alpha_bar = float(self.alpha_bar[s])
        return math.sqrt(alpha_bar) * x0 + math.sqrt(max(1 - alpha_bar - variance, 0.0)) * eps

    def times(self, count: int) -> list[int]:
        """T = t_0 > t_1 > ... > t_count = 0, evenly spaced: the times that `count` reverse steps visit."""
        if not 1 <= count <= self.steps:
            raise ValueError(f"Diffusion.times: count must be in [1, {self.steps}]; got {count}")
        return [round(self.steps * (count - i) / count) for i in range(count + 1)]

    def snr(self, t: Tensor) -> Tensor:
        """abar_t / (1 - abar_t), float64; infinite at t = 0."""
        alpha_bar = self.alpha_bar[t.cpu()]
        return alpha_bar / (1 - alpha_bar)


@dataclass(frozen=True, eq=False)
class Diffusion(Schedule):
    """Linear betas from beta_start to beta_end over `steps` times."""

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    alpha_bar: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                "Diffusion: expected steps >= 1 and 0 < beta_start <= beta_end < 1; "
                f"got steps={self.steps}, beta_start={self.beta_start}, beta_end={self.beta_end}"
            )
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])
        object.__setattr__(self, "alpha_bar", alpha_bar)


@dataclass(frozen=True, eq=False)
class SqrtDiffusion(Schedule):
    """abar_t = 1 - sqrt(t / T + 1e-4) (Li et al., 2022; Eq. 12 of 004), which is -5e-5 at t = T.

    mode "paper": as printed, but no smaller than 1e-6. "betas": betas from the ratios of neighbouring values, at most .999, as
    released; this divides everything by the curve's value at 0, .99.
    """

    steps: int = 1000
    mode: str = "betas"
    alpha_bar: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.mode not in ("paper", "betas"):
            raise ValueError(f"SqrtDiffusion: expected steps >= 1 and mode paper or betas; got steps={self.steps}, mode={self.mode!r}")
        curve = 1 - torch.sqrt(torch.arange(self.steps + 1, dtype=torch.float64) / self.steps + 1e-4)
        if self.mode == "betas":
            alpha_bar = torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), 0)
        else:
            alpha_bar = curve[1:].clamp(min=1e-6)
        object.__setattr__(self, "alpha_bar", torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar]))


def denoising_loss(
    diffusion: Schedule, denoise: Callable[[Tensor, Tensor], Tensor], x0: Tensor, rng: torch.Generator, draws: int = 1
) -> Tensor:
    """Mean squared error of the predicted noise at t uniform in {1..T}, `draws` independent (t, eps) for each row."""
    x0 = x0.repeat(draws, *[1] * (x0.dim() - 1))
    t = torch.randint(1, diffusion.steps + 1, (len(x0),), generator=rng, device=x0.device)
    eps = torch.randn(x0.shape, generator=rng, device=x0.device, dtype=x0.dtype)
    return F.mse_loss(denoise(diffusion.add_noise(x0, eps, t), t), eps)


def sample(
    diffusion: Schedule,
    denoise: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    count: int,
    rng: torch.Generator,
    *,
    shift: Shift | None = None,
    eta: float = 1.0,
    clip: tuple[Tensor, Tensor] | None = None,
    progress: str | None = None,
) -> Tensor:
    """Reverse diffusion from z = z_T in `count` steps. `denoise(z_t, t)` answers eps; `shift` is added to each step's mean, and the
    covariance stays what it was (A.10, A.11). The noise drawn does not depend on `shift`: with the same rng two calls are paired."""
    times = diffusion.times(count)
    for t, s in tqdm(list(zip(times[:-1], times[1:], strict=True)), desc=progress, leave=False, disable=progress is None):
        eps = denoise(z, torch.full((len(z),), t, device=z.device))
        x0, mean, variance = diffusion.reverse(z, eps, t, s, eta, clip)
        if shift is not None:
            mean = mean + shift(z, mean, variance, x0, t / diffusion.steps)
        noise = torch.randn(z.shape, generator=rng, device=z.device, dtype=z.dtype)
        z = mean + math.sqrt(variance) * noise
    return z


def guided_output(net: Net, x: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """(1 + w) net(x, t, y) - w net(x, t, none): classifier-free guidance, which for v and x0 is the same as for the noise. w = 0, or no
    labels at all, is one evaluation."""
    conditional = net(x, t, labels)
    if labels is None or guidance == 0:
        return conditional
    other = net(x, t, torch.full_like(labels, -1)).to(x.dtype)  # under autocast they are halves, whose difference is what counts
    return (1 + guidance) * conditional.to(x.dtype) - guidance * other


@torch.no_grad()
def sample_images(
    diffusion: Schedule,
    net: Net,
    x_T: Tensor,
    labels: Tensor | None,
    *,
    rng: torch.Generator,
    sampler: str = "ddim",
    steps: int = 100,
    guidance: float = 0.0,
    prediction: str = "epsilon",
    clip_x0: bool = False,
    ddim_quirk: bool = False,
    variance: str = "fixedlarge",
    progress: str | None = None,
) -> Tensor:
    """Images in [-1, 1] from noise x_T (N, C, H, W) for labels (N,), -1 for none, in `steps` evenly spaced steps T -> 0.

    ddim draws nothing (eta = 0); ddpm draws its noise from `rng` with the variance beta = 1 - abar_t / abar_s of the step t -> s
    ("fixedlarge", as released) or that of the posterior ("fixedsmall"). The last step ends at x0hat, without noise.

    clip_x0 keeps every step's x0hat in [-1, 1], and with it the step: the released code clips after the mean has been computed, which
    has no effect. ddim_quirk takes the released DDIM's steps: 991, 981, .., 1 in the papers' times for 100 steps, whose last one leads
    from 1 to 1; so x_T counts as less noisy than it is, and the answer keeps the noise of t = 1.

    The result is a function of the weights, x_T, labels and rng, provided that `net` draws nothing: put it into evaluation mode.
    """
    for name, value, known in (("sampler", sampler, SAMPLERS), ("variance", variance, VARIANCES), ("prediction", prediction, PREDICTIONS)):
        if value not in known:
            raise ValueError(f"sample_images: {name} must be one of {', '.join(known)}; got {value!r}")
    if ddim_quirk and sampler != "ddim":
        raise ValueError(f"sample_images: ddim_quirk is about the sampler ddim; got {sampler!r}")
    times = _released_ddim_times(diffusion.steps, steps) if ddim_quirk else diffusion.times(steps)
    clip = (-1.0, 1.0) if clip_x0 else None
    x = x_T
    for t, s in tqdm(list(zip(times[:-1], times[1:], strict=True)), desc=progress, leave=False, disable=progress is None):
        output = guided_output(net, x, torch.full((len(x),), t, device=x.device), labels, guidance)
        x0, eps = diffusion.estimates(x, output, t, prediction, clip)
        x = diffusion._mean(x0, eps, s, 0.0 if sampler == "ddim" else diffusion.reverse_variance(t, s))
        if sampler == "ddpm" and s > 0:
            beta = 1 - float(diffusion.alpha_bar[t] / diffusion.alpha_bar[s])
            noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
            x = x + math.sqrt(beta if variance == "fixedlarge" else diffusion.reverse_variance(t, s)) * noise
    return x.clamp(-1, 1)


def _released_ddim_times(total: int, steps: int) -> list[int]:
    """Indices T - skip, .., skip, 0 and once more 0, as times."""
    if not 1 <= steps <= total or total % steps:
        raise ValueError(f"sample_images: with ddim_quirk, steps must divide {total}; got {steps}")
    return [*range(total - total // steps + 1, 0, -(total // steps)), 1]
