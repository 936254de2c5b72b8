"""DiffROP: overlap optimisation (002; equations by their numbers there).

Two images of different classes, noised to one time t, have denoised means mu_theta (Eq. 9, 10), and the KL divergence of their reverse
steps is |mu_i - mu_j|^2 / 2 sigma_t^2 (Eq. 8). To the loss of the base, DDPM or CBDM, comes tau(t) phi(d_ij) for such pairs, which pushes
the classes apart. `DiffROP` is stateless and works in anybody's loop. Where the paper is silent or contradicts itself, the choice is an
option of DiffROPConfig, marked R1..R15.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import ltkernels

from .. import ranks
from ..diffusion import _column
from .cbdm import Balance
from .ddpm import Denoise

_PREDICTIONS = ("epsilon", "v", "x0", "flow")
_CHOICES = {
    "form": ("exponential", "reciprocal", "hinge", "negative_l2"), "tau_schedule": ("const", "exp", "linear"),
    "distance": ("mean", "sum", "kl"), "space": ("mu", "x0", "eps"), "stopgrad": ("none", "partner"), "reduction": ("mean", "sum"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class DiffROP:
    """form: phi, as `ltkernels.pcl_loss` has it (R10). margin: of the form "hinge", a number or a table (steps + 1,) by time.
    tau(t) = tau0 ("const"), tau0 exp(-t / (tau_temp steps)) ("exp"), tau0 (1 - t / steps) ("linear"), steps being the last time (R6).

    distance: d is |.|^2 over the elements by "mean" or "sum", or "kl", the divergence sum / 2 sigma_t^2 of Eq. 8, which needs the table
    variance (steps + 1,) of sigma_t^2 (R3, R4). space: what `rows` compares (R5). stopgrad: "partner" lets gradients reach the first of a
    pair only (R9); each of two is first once. reduction: "mean" over the pairs, or "sum" (R8). The numbers R are explained
    in training/docs/diffrop.md.
    """

    form: str = "exponential"
    tau0: float = 10.0
    tau_temp: float = 0.3
    tau_schedule: str = "exp"
    margin: float | Tensor | None = None
    distance: str = "mean"
    space: str = "mu"
    stopgrad: str = "none"
    reduction: str = "mean"
    steps: float = 1000
    variance: Tensor | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"DiffROP: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if (self.margin is None) == (self.form == "hinge"):
            raise ValueError(f"DiffROP: margin is required for form hinge and for no other; got {self.margin!r} with form {self.form!r}")
        if self.distance == "kl" and (self.variance is None or self.space != "mu"):
            fact = "variance=None" if self.variance is None else f"space {self.space!r}"
            raise ValueError(f"DiffROP: distance kl is between Gaussians around mu and needs their variance; got {fact}")

    def tau(self, t: Tensor) -> Tensor:
        """(B,) float64 weights at times t (B,)."""
        share = t.double() / self.steps
        if self.tau_schedule == "exp":
            return self.tau0 * torch.exp(-share / self.tau_temp)
        return self.tau0 * (1 - share if self.tau_schedule == "linear" else torch.ones_like(share))

    def rows(self, x_t: Tensor, output: Tensor, scale, std, prediction: str = "epsilon", *, beta=None) -> Tensor:
        """What `loss` is to be given, of a network's output for x_t = scale x0 + std noise (B, ...), in its dtype: the predicted x0 or
        noise, or, of space "mu", mu_theta = (x_t - beta / std eps) / sqrt(1 - beta), the mean of a step back of variance beta (Eq. 9, 10).

        prediction: "epsilon", "v", "x0" or "flow", as in `ltkernels.denoising_target`. scale, std, beta: numbers or (B,); std > 0, and
        scale > 0 where "epsilon" has to become x0. Example: `DiffROP(space="x0").rows(x_t, velocity, 1 - t, t, "flow")`.
        """
        if prediction not in _PREDICTIONS:
            raise ValueError(f"DiffROP.rows: prediction must be one of {', '.join(_PREDICTIONS)}; got {prediction!r}")
        if self.space == "mu" and beta is None:
            raise ValueError("DiffROP.rows: space mu is the mean of a step back and needs its beta, x0 and eps do not; got beta=None")
        number = {"dtype": x_t.dtype, "device": x_t.device}
        scale, std = (_column(torch.as_tensor(value, **number), x_t) for value in (scale, std))
        if self.space == "x0":
            return {
                "epsilon": lambda: (x_t - std * output) / scale, "v": lambda: scale * x_t - std * output, "x0": lambda: output,
                "flow": lambda: (x_t - std * output) / (scale + std),
            }[prediction]()  # fmt: skip
        eps = {
            "epsilon": lambda: output, "v": lambda: std * x_t + scale * output, "x0": lambda: (x_t - scale * output) / std,
            "flow": lambda: (x_t + scale * output) / (scale + std),
        }[prediction]()  # fmt: skip
        if self.space == "eps":
            return eps
        beta = torch.as_tensor(beta, dtype=torch.float64, device=x_t.device)
        return (x_t - _column(beta, x_t) / std * eps) * _column((1 - beta).rsqrt(), x_t)

    def loss(
        self, mu: Tensor, y: Tensor, t: Tensor, *, other: Tensor | None = None, other_y: Tensor | None = None, other_t: Tensor | None = None
    ) -> Tensor:
        """Mean or sum over the ordered pairs of tau(t_i) phi(d_ij), (), in pcl_loss's dtype. A pair has two labels and one time.

        mu (B, ...), y (B,) int64, t (B,) on any scale that ends at `steps`: int64, or float where no table is looked up by time
        (a margin that is one, distance "kl"). Rows with y = -1, whose label the network was
        not told, are in no pair: their mean is that of no class. other (B', ...), other_y, other_t: pairs are (mu_i, other_j) instead.
        No pair: 0, with a gradient of 0. Example: `DiffROP().loss(mu, y, t)`.
        """
        if not (other is None) == (other_y is None) == (other_t is None):
            given = [name for name, value in (("other", other), ("other_y", other_y), ("other_t", other_t)) if value is not None]
            raise ValueError(f"DiffROP.loss: other, other_y and other_t belong together; got {' and '.join(given)} only")
        if t.is_floating_point() and (self.distance == "kl" or isinstance(self.margin, Tensor)):
            raise TypeError(f"DiffROP.loss: distance kl and a margin by time look up t, so it has to be int64; got {t.dtype}")
        if self.stopgrad == "partner":
            other, other_y, other_t = (mu, y, t) if other is None else (other, other_y, other_t)
            other = other.detach()
        return ltkernels.pcl_loss(
            self._scaled(mu, t), y, form=self.form, sample_weight=self.tau(t), margin=self._margin(t), group=_group(y, t),
            distance="sum" if self.distance == "kl" else self.distance, reduction=self.reduction,
            other=None if other is None else self._scaled(other, other_t), other_labels=other_y,
            other_group=None if other is None else _group(other_y, other_t),
        )  # fmt: skip

    __call__ = loss

    def _margin(self, t: Tensor) -> float | Tensor | None:
        return self.margin.to(t.device)[t] if isinstance(self.margin, Tensor) else self.margin

    def _scaled(self, mu: Tensor, t: Tensor) -> Tensor:
        """Both rows of a pair have one t: so d / 2 sigma_t^2 is the distance of rows over sqrt(2) sigma_t."""
        return mu * _column((2 * self.variance.to(t.device)[t]).rsqrt(), mu) if self.distance == "kl" else mu


def pairs(y: Tensor, t: Tensor) -> Tensor:
    """() int64: how many ordered pairs `DiffROP.loss` finds among rows with labels y (B,), -1 for none, at times t (B,)."""
    group = _group(y, t)
    return ((y[:, None] != y) & (group[:, None] == group)).sum()


def _group(y: Tensor, t: Tensor) -> Tensor:
    """Equal times as equal numbers; -1 for rows without a label, which have one label among themselves and so no pair at all."""
    return (t.double().view(torch.int64) if t.is_floating_point() else t).where(y >= 0, -1)


class Separate(Denoise):
    """Denoise with DiffROP's term. Under several ranks the pairs are those of the whole batch."""

    def __init__(self, dataset, modules, config):
        super().__init__(dataset, modules, config)
        self.pcl = DiffROP(
            config.pcl_form, config.pcl_tau0, config.pcl_tau_temp, config.pcl_tau_schedule, config.pcl_margin, config.pcl_distance,
            config.pcl_space, config.pcl_stopgrad, "sum", config.timesteps, self.diffusion.betas,
        )  # fmt: skip
        size = {"group": config.pcl_group_size, "batch": config.batch_size, "reforward": 1}[config.pcl_t]
        self.leader = torch.arange(config.batch_size, device=self.x.device) // size * size  # the row whose time a row takes

    def times(self, rng):
        """Everything else is drawn as by Denoise, so that methods to be compared see the same rows, noise and labels."""
        return super().times(rng)[self.leader]

    def noise(self, rng):
        eps = super().noise(rng)
        return eps[self.leader] if self.config.pcl_noise == "shared" else eps

    def pairs(self, batch):
        return pairs(batch.whole_label, torch.ones_like(batch.whole_t) if self.config.pcl_t == "reforward" else batch.whole_t)

    def target(self, batch):
        target, figures = super().target(batch)
        return target, {**figures, "pairs": self.pairs(batch)}

    def rows(self, x_t, output, t):
        beta = self.diffusion.betas.to(t.device)[t]
        return self.pcl.rows(x_t, output, *self.diffusion.coefficients(t, x_t), self.config.prediction, beta=beta)

    def further_terms(self, batch, output):
        mu = self.rows(batch.x_t, output, batch.t)
        if self.config.pcl_t == "reforward":
            total = self.reforwarded(batch, mu)
        else:
            whole = {"other": ranks.gathered(mu), "other_y": batch.whole_label, "other_t": batch.whole_t} if ranks.size() > 1 else {}
            total = self.pcl.loss(mu, batch.label, batch.t, **whole)
        total = total * ranks.size()  # of this rank's rows; the mean over the ranks shall be the sum
        if self.config.pcl_reduce == "mean":
            total = total / self.pairs(batch).clamp(min=1)
        return {**super().further_terms(batch, output), "loss_pcl": total}

    def reforwarded(self, batch, mu):
        """Algorithm 1 (R1): the partners of every row are noised to its own t, a forward of the whole batch a row."""
        total, noise = mu.new_zeros(()), batch.whole_eps
        for i in range(len(mu)):
            t, eps = batch.t[i].expand_as(batch.whole_t), noise[batch.offset + i] if self.config.pcl_noise == "shared" else noise
            there = replace(batch, x_t=self.diffusion.add_noise(batch.whole_x0, eps, t), t=t, augment=batch.whole_augment)
            output = self.predict(there, batch.whole_label)
            partners = self.rows(there.x_t, output, t)
            row = slice(i, i + 1)
            total = total + self.pcl.loss(mu[row], batch.label[row], t[:1], other=partners, other_y=batch.whole_label, other_t=t)
        return total

    def loss(self, step, rng):
        loss, figures = super().loss(step, rng)
        if (every := self.config.pcl_ratio_every) and step % every == 0:
            norms = [self.gradient_norm(figures[name]) for name in ("loss_pcl", "loss_mse")]
            figures["pcl_ratio"] = norms[0] / norms[1]
        return loss, figures

    def gradient_norm(self, term):
        params = [param for param in self.modules["net"].parameters() if param.requires_grad]
        gradients = torch.autograd.grad(term, params, retain_graph=True, materialize_grads=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        ranks.average([flat])
        return flat.norm()


class SeparateBalanced(Separate, Balance):
    """The same on top of CBDM: its term comes to the two others."""


def stage(dataset, modules, config) -> Separate:
    return {"ddpm": Separate, "cbdm": SeparateBalanced}[config.base](dataset, modules, config)
