"""DGD: density-gradient guided diffusion for long-tailed clustering (supplement 000; equations A.x, Algorithm 1).

`DensityGuidance` works in anybody's sampler: add its `shift` to the mean of a reverse step. The three stages are Algorithm 1.
Where the supplement is silent or wrong, the choice is an option of DGDConfig, marked G1..G14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ltkernels

from ..clustering import SoftClusters, soft_kmeans
from ..config import BANDWIDTHS, DGDConfig
from ..diffusion import Diffusion, denoising_loss, sample
from ..loop import Stage, batch_rows, batches_per_epoch, generator
from ..views import contrast

SCHEDULES = {  # eta_t / eta_0 at t / T: strong early in reverse time, weak at the end (G8)
    "linear": lambda fraction, power: fraction**power,
    "cosine": lambda fraction, power: 0.5 * (1 - math.cos(math.pi * fraction)),
    "const": lambda fraction, power: 1.0,
}


@dataclass(frozen=True, eq=False)
class DensityGuidance:
    """The mean shift eta_t Sigma grad U(z) of A.11, with U = -log(p + rho) and p the kNN-KDE of real latents (A.4, A.5, A.13).

    It points away from the neighbours' weighted mean, towards low density (G1), and fades where p << rho (G4). Stateless: make one per
    set of latents with `fit`, use it in any sampler. `scale` is scale-free (G14): a latent of typical gradient is moved by scale x the
    norm of the step's noise at t = T; `eta0`, when given, is the absolute eta_0 of A.6 instead.
    """

    bank: ltkernels.Bank
    bandwidth: Tensor  # ()
    rho: float
    cached: Tensor  # (N, d) grad U(z_i), leave-one-out: a latent that counted itself would hide that it is an outlier (G9)
    k: int = 64
    kernel_norm: str = "peak"
    scale: float = 0.1
    eta0: float | None = None
    schedule: str = "linear"
    power: float = 1.0
    max_shift: float = 1.0
    at: str = "x0hat"
    query: str = "recompute"

    @classmethod
    def fit(
        cls, latents: Tensor, k: int = 64, bandwidth: str | float = "knn-median", rho: float | None = None,
        rho_quantile: float = 0.05, kernel_norm: str = "peak", bank: ltkernels.Bank | None = None, **options,
    ) -> DensityGuidance:  # fmt: skip
        """Density field of real latents (N, d). `bank`: a Bank of the previous latents of the same rows, to be refreshed in place."""
        bank = ltkernels.Bank(latents) if bank is None else bank.update(latents)
        h = ltkernels.knn_bandwidth(bank, k, bandwidth) if bandwidth in BANDWIDTHS else latents.new_tensor(float(bandwidth))
        kde = ltkernels.knn_kde_grad(latents, bank, k, bandwidth=h, self_index=True, kernel_norm=kernel_norm)
        if rho is None and not 0 < (rho := float(kde.density.quantile(rho_quantile))) < math.inf:
            found = f"the {rho_quantile:g} quantile of the density is {rho} with kernel_norm={kernel_norm!r}"
            raise ValueError(f"DensityGuidance: rho must be > 0 and finite; {found}")
        return cls(bank, h, rho, kde.potential(rho)[1], k, kernel_norm, **options)

    def grad(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """grad U at z (Q, d): recomputed there, or the cached gradient of the nearest latent, or of latent rows[i] (G6)."""
        if self.query == "recompute":
            kde = ltkernels.knn_kde_grad(z, self.bank, self.k, bandwidth=self.bandwidth, kernel_norm=self.kernel_norm)
            return kde.potential(self.rho)[1]
        if self.query == "nearest":
            return self.cached[ltkernels.knn(z, self.bank, 1).index[:, 0]]
        if rows is None:
            raise ValueError("DensityGuidance: query='index' needs rows, the latent that each z was made from; got None")
        return self.cached[rows]

    def shift(self, z_t: Tensor, mu: Tensor, var: float, x0hat: Tensor, fraction: float, rows: Tensor | None = None) -> Tensor:
        """What to add to the mean `mu` of the step from z_t whose covariance is var x identity, and stays so (A.10, A.7's
        linearisation; G13). fraction = t / T."""
        grad = self.grad({"zt": z_t, "mu": mu, "x0hat": x0hat}[self.at], rows)
        noise = math.sqrt(var * grad.shape[1])  # root mean square norm of the step's noise
        typical = self.cached.norm(dim=1).square().mean().sqrt().clamp(min=1e-30)
        strength = self.scale * noise / typical if self.eta0 is None else self.eta0 * var
        step = SCHEDULES[self.schedule](fraction, self.power) * strength * grad
        return step * (self.max_shift * noise / step.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def fit_guidance(latents: Tensor, config: DGDConfig, bank: ltkernels.Bank | None = None) -> DensityGuidance:
    return DensityGuidance.fit(
        latents, config.k, config.bandwidth, config.rho, config.rho_quantile, config.kde_kernel_norm, bank,
        scale=config.guidance_scale, eta0=config.eta0, schedule=config.eta_schedule, power=config.eta_power,
        max_shift=config.max_shift, at=config.density_at, query=config.density_query,
    )  # fmt: skip


def diffusion_of(config: DGDConfig) -> Diffusion:
    return Diffusion(config.timesteps, config.beta_start, config.beta_end)


@torch.no_grad()
def generate(
    denoiser: nn.Module, real: Tensor, guidance: DensityGuidance | None, count: int, config: DGDConfig, rng: torch.Generator
) -> Tensor:
    """`count` latents by reverse diffusion from noised real ones (Alg. 1). The noise drawn does not depend on the guidance."""
    diffusion = diffusion_of(config)
    rows = torch.randint(len(real), (count,), generator=rng, device=real.device)
    eps = torch.randn(count, real.shape[1], generator=rng, device=real.device)
    z = diffusion.add_noise(real[rows], eps, torch.full((count,), config.timesteps))
    shift = None if guidance is None else lambda *step: guidance.shift(*step, rows=rows)
    box = (real.amin(0), real.amax(0)) if config.clip_x0 else None
    return sample(diffusion, denoiser, z, config.sample_steps, rng, shift=shift, clip=box)


def cluster(real: Tensor, generated: Tensor, clusters: int, config: DGDConfig, rng: torch.Generator) -> SoftClusters:
    """Soft clusters of Z_real and, with --cluster-on union, Z_gen; a generated latent weighs gen_weight (G14)."""
    points = torch.cat([real, generated]) if config.cluster_on == "union" else real
    weight = torch.full((len(points),), config.gen_weight, device=real.device)
    weight[: len(real)] = 1
    return soft_kmeans(points, clusters, rng, weight=weight, kind=config.clustering, temperature=config.cluster_temperature)


class Pretrain(Stage):
    """Stage 1: the encoder learns from two views of every image."""

    name = "pretrain"

    def __init__(self, x: Tensor, modules: dict[str, nn.Module], config: DGDConfig):
        self.x, self.modules, self.config, self.cache = x, modules, config, {}
        self.lr = dict.fromkeys(("latent", "head"), config.lr)
        epochs = config.encoder_epochs if list(modules["latent"].parameters()) else 0  # the identity has nothing to learn
        self.steps = epochs * batches_per_epoch(len(x), config.batch_size)

    def loss(self, step, rng):
        x = self.x[batch_rows(len(self.x), self.config.batch_size, step, self.config.seed, self.name)]
        return contrast(self.modules["latent"], self.modules["head"], x, rng, self.config.infonce_temperature), {}


class LatentDiffusion(Stage):
    """Stage 2: the encoder is frozen, the denoiser learns its latents."""

    name = "diffusion"

    def __init__(self, x: Tensor, modules: dict[str, nn.Module], config: DGDConfig):
        self.modules, self.config, self.lr, self.cache = modules, config, {"denoiser": config.lr}, {}
        self.steps = config.diffusion_epochs * batches_per_epoch(len(x), config.batch_size)
        modules["latent"].fit(x)
        self.z = modules["latent"].encode(x)

    def loss(self, step, rng):
        rows = batch_rows(len(self.z), self.config.batch_size, step, self.config.seed, self.name)
        return denoising_loss(diffusion_of(self.config), self.modules["denoiser"], self.z[rows], rng, self.config.noise_draws), {}


class Joint(Stage):
    """Stage 3: L_DM + lambda L_InfoNCE on both networks. Confident pseudo-labels of real and generated latents add positives to
    InfoNCE; where nothing is confident the two views are all there is (G12)."""

    stream = "joint"  # of the run without guidance, too: nothing but guidance tells the two apart

    def __init__(self, x: Tensor, modules: dict[str, nn.Module], config: DGDConfig, clusters: int, name: str = "joint"):
        self.x, self.modules, self.config, self.clusters, self.name = x, modules, config, clusters, name
        self.lr = {"latent": config.joint_lr, "head": config.joint_lr, "denoiser": config.lr}  # the field is to outlive a refresh
        self.cache, self.guidance, self.epoch = {}, None, batches_per_epoch(len(x), config.batch_size)
        self.steps = config.joint_epochs * self.epoch

    def loss(self, step, rng):
        config, modules, cache = self.config, self.modules, self.cache
        if step % (config.refresh_every * self.epoch) == 0:
            self.refresh()
        if step % config.gen_every == 0:
            self.generate(step)
        rows = batch_rows(len(self.x), config.batch_size, step, config.seed, "joint")
        x, label = self.x[rows], cache["real_label"][rows]
        confident = (cache["generated_label"] >= 0).nonzero().flatten()
        mates = confident[torch.randperm(len(confident), generator=rng, device=x.device)[: len(x)]]
        nce = contrast(
            modules["latent"], modules["head"], x, rng, config.infonce_temperature,
            label=label, extra=cache["generated"][mates], extra_label=cache["generated_label"][mates],
        )  # fmt: skip
        z = modules["latent"](x)
        z = z if config.encoder_learns_from == "both" else z.detach()
        dm = denoising_loss(diffusion_of(config), modules["denoiser"], z, rng, config.noise_draws)
        return dm + config.lam * nce, {"loss_dm": dm, "loss_infonce": nce}

    def refresh(self) -> None:
        """Outer loop: encode everything and make the density field of it."""
        self.modules["latent"].fit(self.x)
        self.cache["bank"] = self.modules["latent"].encode(self.x)
        self.guidance = fit_guidance(self.cache["bank"], self.config, self.guidance and self.guidance.bank)

    def generate(self, step: int) -> None:
        """Inner loop: guided latents, clusters of real and generated ones, confident pseudo-labels."""
        if self.guidance is None:  # resumed between two refreshes
            self.guidance = fit_guidance(self.cache["bank"], self.config)
        rng = generator(self.config.seed, "joint", "generate", step, device=self.x.device)
        real, field = self.modules["latent"].encode(self.x), self.guidance if self.config.guided else None
        made = generate(self.modules["denoiser"], real, field, self.config.gen_per_refresh, self.config, rng)
        clusters = cluster(real, made, self.clusters, self.config, rng)
        labels = {"real_label": clusters.labels(real, self.config.tau), "generated_label": clusters.labels(made, self.config.tau)}
        self.cache.update(labels, generated=made)
