"""CLUDI: clustering via self-supervised diffusion (004; equations by their numbers there).

A diffusion model, conditioned on a row's features, generates its assignment embedding. The teacher denoises pure noise into targets,
the student, with the same weights, predicts them from noised targets and a perturbed view of the features. `CLUDI` is stateless and works
in anybody's loop: `loss(net, x, rng)`, then `assign(net, x, rng)`. Where paper and released code disagree, the choice is an option of
CLUDIConfig, marked L1..L14.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import CLUDIConfig
from ..diffusion import SqrtDiffusion
from ..loop import Stage, batch_rows, batches_per_epoch
from ..networks import AssignmentNet
from ..views import perturb_features


def snr_weight(snr: Tensor, kind: str, gamma: float) -> Tensor:
    """Min-SNR weight of a replica (L4): the loss is that of predicted z_0, whose weight is min(SNR, gamma); / (SNR + 1) belongs to v.
    Eq. 26 prints max, which weighs pure noise most."""
    if kind == "none":
        return torch.ones_like(snr)
    if kind == "paper_max":
        return snr.clamp(min=gamma) / (snr + 1)
    return snr.clamp(max=gamma) / (snr + 1 if kind == "min_v" else 1)


def class_targets(logits: Tensor, tau: float, log_prior: Tensor, rows: tuple[int, ...]) -> Tensor:
    """p(k | z) proportional to p(k) p(z | k), where p(z | k) is the softmax over `rows` (Eq. 21, 22). No log of a small number."""
    return ((logits / tau) - (logits / tau).logsumexp(rows, keepdim=True) + log_prior).softmax(-1)


def log_predictions(logits: Tensor, tau: float, log_prior: Tensor, rows: tuple[int, ...]) -> Tensor:
    """log of p(k) N p(k | z) / sum over `rows` of p(k | z) (Eq. 23)."""
    log_p = (logits / tau).log_softmax(-1)
    count = math.prod(logits.shape[dim] for dim in rows)
    return log_p - log_p.logsumexp(rows, keepdim=True) + math.log(count) + log_prior


def class_loss(
    teacher: Tensor, student: Tensor, log_prior: Tensor, *, weight: Tensor | None = None, tau: float = 0.1, tau_col: float = 0.05,
    pairs: str = "matched", norm: str = "joint",
) -> Tensor:  # fmt: skip
    """l_cls (Eq. 24) of logits (B, N, K), weighted by the student's replica (B,). A collapsed clustering is no optimum: log K, as much
    as constant logits.

    pairs: replica b with replica b, or every one with every one (L9); the mean over all B x B pairs of a product is the product of two
    means, so nothing of that size is ever made. norm: what Eq. 21 and 23 sum over, all (b, i) or the rows of each replica (L9).
    """
    rows = (0, 1) if norm == "joint" else (1,)
    targets = [class_targets(logits, tau_col, log_prior, rows) for logits in (teacher, student)]
    log_p = [log_predictions(logits, tau, log_prior, rows) for logits in (teacher, student)]
    if weight is not None:  # each product below has exactly one factor of the student
        targets[1], log_p[1] = weight[:, None, None] * targets[1], weight[:, None, None] * log_p[1]
    if pairs == "all":
        targets, log_p = [x.mean(0) for x in targets], [x.mean(0) for x in log_p]
    return -0.5 * (targets[0] * log_p[1] + targets[1] * log_p[0]).sum(-1).mean()


class CLUDI:
    """Teacher, student, losses and inference for clusters with prior probabilities `prior` (K,), uniform unless given (L14)."""

    def __init__(self, config: CLUDIConfig, prior: Tensor):
        self.config, self.log_prior = config, prior.log()
        self.diffusion = SqrtDiffusion(config.timesteps, config.sqrt_mode)

    def denoise(self, net: AssignmentNet, x: Tensor, replicas: int, steps: int, rng: torch.Generator) -> Tensor:
        """(replicas, N, d) assignment embeddings of features x (N, n), or (replicas, N, n): stochastic DDIM from noise of standard
        deviation F (Eq. 6 to 10; every alpha there has to be alpha bar, L2)."""
        h = net.condition(x if x.dim() == 3 else x[None])
        z = self.config.std * self.noise((replicas, x.shape[-2], net.dim), x, rng)
        guess, times = torch.zeros_like(z), self.diffusion.times(steps)
        for t, s in zip(times[:-1], times[1:], strict=True):
            z0 = net(z, h, torch.full((replicas,), t, device=x.device), guess)
            if self.config.clip_z0:
                z0 = z0.clamp(-1, 1)
            guess = z0 if self.config.self_conditioning else guess
            mean, variance = self.diffusion.reverse_x0(z, z0, t, s)
            z = mean + self.config.std * math.sqrt(variance) * self.noise(z.shape, x, rng)
        return z

    def teach(self, net: AssignmentNet, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Targets (z_0 (B, N, d), logits (B, N, K)): Eq. 13 and 14, or the logits of the denoised embedding itself (L5)."""
        config = self.config
        with torch.set_grad_enabled(config.teacher_grad == "full" and torch.is_grad_enabled()):
            denoised = self.denoise(net, x, config.replicas, config.teacher_steps, rng)
        logits = net.head(denoised)
        z0 = net.embed((logits / config.tau).softmax(-1))
        logits = net.head(z0) if config.teacher_logits == "paper" else logits
        return (z0 if config.teacher_grad == "full" else z0.detach()), (logits.detach() if config.teacher_grad == "none" else logits)

    def study(self, net: AssignmentNet, x: Tensor, z0: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
        """The student's prediction (B, N, d) of z_0 from its noised version (Eq. 15) at the replicas' times t (B,) and a view of x."""
        config = self.config
        view = perturb_features(
            x.expand(len(t), *x.shape), rng, config.augment,
            (config.aug_noise_min, config.aug_noise_max), (config.aug_drop_min, config.aug_drop_max),
        )  # fmt: skip
        h = net.condition(view, config.dropout, rng)
        z_t = self.diffusion.add_noise(z0, config.std * self.noise(z0.shape, x, rng), t)
        guess = torch.zeros_like(z0)
        if float(torch.rand((), generator=rng, device=x.device)) < config.self_conditioning:
            with torch.no_grad():
                guess = net(z_t, h, t, guess)
        return net(z_t, h, t, guess)

    def loss(self, net: AssignmentNet, x: Tensor, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 27 for one batch of features (N, n)."""
        config = self.config
        z0, teacher = self.teach(net, x, rng)
        t = torch.randint(1, config.timesteps + 1, (config.replicas,), generator=rng, device=x.device)
        predicted = self.study(net, x, z0, t, rng)
        student = net.head(predicted)

        weight = snr_weight(self.diffusion.snr(t), config.snr_weight, config.snr_gamma).to(x) / (config.std if config.snr_over_std else 1)
        guess = predicted if config.dif_target == "raw" else net.embed((student / config.tau).softmax(-1))
        square = (z0 - guess).square()
        square = square.sum(-1) if config.dif_reduce == "sum" else square.mean(-1)
        dif = (weight[:, None] * square).mean()
        cls = class_loss(
            teacher, student, self.log_prior, weight=weight, tau=config.tau, tau_col=config.tau_col,
            pairs=config.cls_pairs, norm=config.cls_norm,
        )  # fmt: skip
        return dif + config.lam * cls, {"loss_dif": dif, "loss_cls": cls}

    @torch.no_grad()
    def assign(self, net: AssignmentNet, x: Tensor, rng: torch.Generator, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """(logits (M, N, K), mean embedding (N, d)) of M sampled assignments of every row of x (N, n) or (M, N, n)."""
        samples, logits, total = samples or self.config.eval_samples, [], 0.0
        for m in range(samples):
            z = self.denoise(net, x[m] if x.dim() == 3 else x, 1, self.config.eval_steps, rng)[0]
            logits.append(net.head(z))
            total = total + z
        return torch.stack(logits), total / samples

    @torch.no_grad()
    def score(self, net: AssignmentNet, x: Tensor, rng: torch.Generator) -> float:
        """Class loss between two sampled assignments of all rows: takes no label, and low where clusters are certain and as large as
        the prior says. Tells which of several networks found the better clusters."""
        first, second = self.assign(net, x, rng, 2)[0]
        return float(class_loss(first[None], second[None], self.log_prior, tau=self.config.tau, tau_col=self.config.tau_col))

    def probabilities(self, logits: Tensor) -> Tensor:
        """p(k | x) (N, K) of sampled logits (M, N, K): Eq. 3, or the softmax of the mean logits (L11)."""
        logits = logits / self.config.tau
        return logits.softmax(-1).mean(0) if self.config.avg == "probs" else logits.mean(0).softmax(-1)

    @staticmethod
    def noise(shape: tuple[int, ...], like: Tensor, rng: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=rng, device=like.device, dtype=like.dtype)


class Distil(Stage):
    """Teacher and student learn from each other; AdamW and clipping as in the released code."""

    def __init__(self, x: Tensor, modules: dict[str, nn.Module], config: CLUDIConfig, prior: Tensor, name: str = "distil"):
        self.x, self.modules, self.config, self.cache, self.method, self.name = x, modules, config, {}, CLUDI(config, prior), name
        self.lr, self.epoch = {"net": config.lr}, batches_per_epoch(len(x), config.batch_size)
        self.steps = config.steps or config.epochs * self.epoch

    def loss(self, step, rng):
        rows = batch_rows(len(self.x), self.config.batch_size, step, self.config.seed, self.name)
        return self.method.loss(self.modules["net"], self.x[rows], rng)

    def optimiser(self, groups):
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self.config.weight_decay)

    def decay(self, step):
        warmup, low = self.config.warmup_epochs * self.epoch, self.config.min_lr / self.config.lr
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.steps - warmup, 1)))

    def clip_gradients(self, params):
        for param in params:
            if param.grad is not None:
                nn.utils.clip_grad_norm_([param], self.config.clip)
