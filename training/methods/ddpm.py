"""DDPM (Ho et al., 2020) on images, conditional or not: the base that CBDM, T2H and DiffROP change in one place each.

`DDPM` is the plain target in the form that T2H's has, for anybody's loop. `Denoise` is the stage of all four methods: what a step draws,
the network's input, and the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltkernels

from .. import data, ranks
from ..augment import ada_augment, diff_augment
from ..config import ImageConfig
from ..diffusion import Diffusion
from ..loop import Stage, generator


class DDPM:
    """Every noisy image's target is the image that it was made from."""

    def target(self, x_t: Tensor, x0: Tensor, y: Tensor, scale: Tensor, std: Tensor, prediction: str = "epsilon") -> Tensor:
        return ltkernels.denoising_target(x_t, x0, scale, std, prediction=prediction)


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's rows of a step, and the whole batch that they are a part of."""

    rows: Tensor  # (B,) rows of the data set
    x0: Tensor  # (B, C, H, W), flipped and augmented
    y: Tensor  # (B,) labels
    label: Tensor | None  # (B,) what the network is told: the label, -1 where it was dropped; None: unconditional
    flipped: Tensor  # (B,) bool
    augment: Tensor | None  # (B, 9) parameters of the augmentation
    t: Tensor  # (B,) in 1..T
    scale: Tensor  # (B,)
    std: Tensor  # (B,)
    x_t: Tensor  # (B, C, H, W)
    rng: torch.Generator  # for whatever else the method draws, which it does for the whole batch
    offset: int  # number of row 0 in the whole batch
    whole_x0: Tensor  # the whole batch's
    whole_y: Tensor
    whole_label: Tensor | None
    whole_t: Tensor
    whole_eps: Tensor
    whole_augment: Tensor | None


class Denoise(Stage):
    """One image diffusion model. Draws are made for the whole batch and cut by ranks, so that how many there are changes nothing."""

    name = "denoise"

    def __init__(self, dataset: data.Dataset, modules: dict[str, nn.Module], config: ImageConfig):
        self.config, self.modules, self.lr, self.steps, self.cache = config, modules, {"net": config.lr}, config.steps, {}
        self.x, self.y = dataset.images.to(config.device), dataset.labels.to(config.device)
        self.counts = torch.tensor(dataset.counts, device=config.device)  # of the training set, however its rows are drawn
        self.weight = class_weights(self.counts) if config.loss_weight == "inverse" else None
        self.flips = config.flip == "yes" or config.flip == "auto" and not dataset.name.startswith("digits")
        self.diffusion = Diffusion(config.timesteps, config.beta_start, config.beta_end)
        self.net = torch.compile(modules["net"].train()) if config.compile else modules["net"].train()
        self.picture = lambda step: None  # called every --grid-every steps

    def draw(self, step: int, rng: torch.Generator) -> Batch:
        """What step `step` works on. The order of the draws is part of a run's identity."""
        config, count, device = self.config, self.config.batch_size, self.x.device
        uniform = lambda *shape: torch.rand(shape, generator=rng, device=device)  # noqa: E731
        rows = data.batch_of_rows(self.y, config.batch_resample, count, step, config.seed, rng)
        t, eps = self.times(rng), self.noise(rng)
        dropped = uniform(count if config.cfg_drop_mode == "sample" else 1).expand(count) < config.cfg_drop
        flipped = (uniform(count) < 0.5) & self.flips
        x0, augment = mirrored(self.x[rows], flipped), None
        if config.augment == "ada":
            x0, augment = ada_augment(x0, rng, config.augment_p)
        elif config.augment == "diffaug":
            x0 = diff_augment(x0, rng)

        y, part = self.y[rows], ranks.part(count)
        label = y.where(~dropped, -1) if config.conditional else None
        scale, std = self.diffusion.coefficients(t[part], x0)
        own = lambda whole: None if whole is None else whole[part]  # noqa: E731
        return Batch(
            rows[part], x0[part], y[part], own(label), flipped[part], own(augment), t[part], scale, std,
            self.diffusion.add_noise(x0[part], eps[part], t[part]), rng, part.start, x0, y, label, t, eps, augment,
        )  # fmt: skip

    def times(self, rng: torch.Generator) -> Tensor:
        """(batch size,) in 1..T."""
        return torch.randint(1, self.config.timesteps + 1, (self.config.batch_size,), generator=rng, device=self.x.device)

    def noise(self, rng: torch.Generator) -> Tensor:
        return torch.randn(self.config.batch_size, *self.x.shape[1:], generator=rng, device=self.x.device)

    def loss(self, step, rng):
        batch = self.draw(step, rng)
        target, figures = self.target(batch)
        with self.dropout(batch):
            output = self.predict(batch, batch.label)
            mse = self.error(output, target, batch.y)
            terms = self.further_terms(batch, output)
        return mse + sum(terms.values()), {**({"loss_mse": mse} if terms else {}), **terms, **figures}

    def error(self, output: Tensor, target: Tensor, y: Tensor) -> Tensor:
        """Mean squared error, the rows weighted by their class with --loss-weight."""
        if self.weight is None:
            return F.mse_loss(output, target)
        return ((output - target).square().flatten(1).mean(1) * self.weight[y]).mean()

    def target(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the network's output should be, and figures for the log."""
        return DDPM().target(batch.x_t, batch.x0, batch.y, batch.scale, batch.std, self.config.prediction), {}

    def further_terms(self, batch: Batch, output: Tensor) -> dict[str, Tensor]:
        """Losses beside the squared error."""
        return {}

    def predict(self, batch: Batch, label: Tensor | None) -> Tensor:
        x_t = batch.x_t.contiguous(memory_format=torch.channels_last) if self.config.channels_last else batch.x_t
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            return self.net(x_t, batch.t, label, batch.augment).float()

    @contextmanager
    def dropout(self, batch: Batch) -> Iterator[None]:
        """torch's own generator, from which dropout draws, made a function of seed, step and rank, and given back as it was."""
        if not self.config.dropout:
            yield
            return
        with torch.random.fork_rng(devices=[batch.x0.device] if batch.x0.is_cuda else []):
            torch.manual_seed(generator(batch.rng.initial_seed(), "dropout", ranks.rank()).initial_seed())
            yield

    def notes(self) -> dict[str, str]:
        """What the log says before the first step."""
        return {}

    def report(self) -> dict[str, object]:
        """What the run's report says about training."""
        return {}

    def decay(self, step):
        return min((step + 1) / (self.config.warmup + 1), 1.0)

    def clip_gradients(self, params):
        nn.utils.clip_grad_norm_(params, self.config.clip)

    def after_step(self, step):
        self.modules["ema"].update(self.modules["net"])
        if self.config.grid_every and (step + 1) % self.config.grid_every == 0:
            self.picture(step + 1)


def class_weights(counts: Tensor) -> Tensor:
    """(C,) float32: 1 / w_c for the class shares w_c of the training set (002, below Eq. 6), with mean 1 over its rows; 0 without rows."""
    counts = counts.double()
    return torch.where(counts > 0, counts.sum() / (counts * (counts > 0).sum()), 0.0).float()


def mirrored(x: Tensor, rows: Tensor) -> Tensor:
    """Images x (B, C, H, W), left and right exchanged where rows (B,) is true."""
    return torch.where(rows[:, None, None, None], x.flip(-1), x)
