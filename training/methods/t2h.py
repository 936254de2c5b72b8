"""T2H: long-tailed diffusion with oriented calibration (001; equations by their numbers there).

A noisy image could have been made from any image of a reference batch; which one, p_sel says (Eq. 8), and the target of the noisy image
becomes the one that is drawn from it, if a gate allows: "t2h" lets a noisy tail image take a clean image of a class at least as frequent.
The label that the network is told stays. `T2H` is stateless and works in anybody's loop, for every process x_t = scale x0 + std noise.
Where paper and released code disagree, the choice is an option of T2HConfig, marked D1..D13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import ltkernels

from .. import ranks
from .ddpm import Denoise, mirrored

MODES = ("t2h", "h2t", "full")
BINS = 20  # of the times, for the counters of Fig. 7


class Transfer(NamedTuple):
    """What `T2H.transfer` answers.

    clean, like x0: the images that the targets point to. moved (B,): True where that is another row of the reference than the own one,
    which a copy of x0 is, too; with the estimator "mean" the probability of it. index (B,): the row; None with the estimator "mean".
    """

    clean: Tensor
    moved: Tensor
    index: Tensor | None


class Reference(NamedTuple):
    images: Tensor | ltkernels.Bank
    points: Tensor  # (K, D) the same, one a row
    labels: Tensor  # (K,)
    own: Tensor  # (B,) rows that the noisy images were made from


@dataclass(frozen=True, eq=False)
class T2H:
    """class_counts (C,): rows of each class in the long-tailed training set, also where batches are resampled: with the batches' own
    frequencies every gate would be a tie. Ties pass (D4).

    mode: "t2h", "h2t", or "full", which has no gate. estimator: "sample" one image (Eq. 8), or the "mean" of what would be sampled (Eq. 6).
    beta: prior q(y)^beta of Eq. 7 instead of any gate. cut_time: rows with t >= cut_time keep their own target (D6). uncond_mode: mode of
    rows whose label was dropped: "same", "none" or another mode (D5). The numbers D are explained in training/docs/t2h.md.
    """

    class_counts: Sequence[int] | Tensor
    mode: str = "t2h"
    estimator: str = "sample"
    beta: float | None = None
    cut_time: int | None = None
    uncond_mode: str = "same"

    def __post_init__(self) -> None:
        choices = {"mode": MODES, "estimator": ("sample", "mean"), "uncond_mode": ("same", "none", *MODES)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"T2H: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.beta is not None and self.uncond_mode not in ("same", "none"):
            raise ValueError(f"T2H: beta replaces every gate, so uncond_mode must be same or none; got {self.uncond_mode!r}")

    def target(self, x_t: Tensor, x0: Tensor, y: Tensor, scale, std, prediction: str = "epsilon", **options) -> Tensor:
        """What a network that sees x_t (B, ...) should answer; options as for `transfer`. Takes no gradient."""
        clean = self.transfer(x_t, x0, y, scale, std, **options).clean
        return ltkernels.denoising_target(x_t, clean, scale, std, prediction=prediction)

    @torch.no_grad()
    def transfer(
        self, x_t: Tensor, x0: Tensor, y: Tensor, scale, std, *, reference: Tensor | ltkernels.Bank | None = None,
        reference_labels: Tensor | None = None, self_index: Tensor | None = None, seed: int | Tensor | None = None, row_offset: int = 0,
        t: Tensor | None = None, dropped: Tensor | None = None,
    ) -> Transfer:  # fmt: skip
        """Images for the targets of x_t = scale x0 + std noise, labels y (B,).

        reference (K, ...), reference_labels (K,): the images to choose from, of which row self_index[i] is x0[i]; by default the batch
        itself. t (B,): times, for cut_time. dropped (B,): rows whose label was dropped, for uncond_mode. seed, row_offset: those of
        `ltkernels.score_select`. Example: `T2H(counts).transfer(x_t, x0, y, scale, std, seed=0).moved`.
        """
        if reference is None:
            reference, reference_labels, self_index = x0, y, torch.arange(len(x0), device=x0.device)
        if reference_labels is None or self_index is None:
            raise ValueError("T2H: a reference needs reference_labels and self_index; got None")
        if self.uncond_mode != "same" and dropped is None:
            raise ValueError(f"T2H: uncond_mode {self.uncond_mode!r} needs dropped, the rows whose label was dropped; got None")
        if self.cut_time is not None and t is None:
            raise ValueError("T2H: cut_time needs the times t; got None")
        points = (reference.points if isinstance(reference, ltkernels.Bank) else reference).flatten(1)
        source = Reference(reference, points, reference_labels, self_index)
        choose = partial(self._mean, x_t, x0, y, scale, std, source)
        if self.estimator == "sample":  # one seed for both modes: which image a row would be given does not depend on them
            seed = torch.randint(2**62, (), device=x_t.device) if seed is None else seed
            choose = partial(self._sampled, x_t, x0, scale, std, source, seed, row_offset)
        try:
            found = choose(self.mode)
        except ValueError as error:
            if "labels must be in" in str(error):
                raise ValueError(f"T2H: {error}; y and reference_labels are the true labels, also where one was dropped") from error
            raise
        stay = Transfer(x0, torch.zeros_like(found.moved), self_index)

        if dropped is not None and self.uncond_mode not in ("same", self.mode):
            found = _where(dropped, stay if self.uncond_mode == "none" else choose(self.uncond_mode), found)
        if self.cut_time is not None:
            found = _where(t < self.cut_time, found, stay)
        return found if self.estimator == "sample" else found._replace(index=None)

    def _log_prior(self, labels: Tensor, like: Tensor) -> Tensor | None:
        if not self.beta:
            return None
        counts = torch.as_tensor(self.class_counts, dtype=torch.float64, device=labels.device)
        return (self.beta * (counts / counts.sum()).log())[labels].to(like)

    def _sampled(self, x_t, x0, scale, std, source: Reference, seed, row_offset: int, mode: str) -> Transfer:
        choice = ltkernels.score_select(
            x_t, source.images, scale, std, gate="full" if self.beta is not None else mode, labels=source.labels,
            class_counts=torch.as_tensor(self.class_counts, device=x_t.device), self_index=source.own,
            log_prior=self._log_prior(source.labels, x_t), seed=seed, row_offset=row_offset,
        )  # fmt: skip
        # x0 and not the reference's own row where nothing moved: a bank holds it without the augmentation of this step
        clean = source.points[choice.index].to(x0.dtype).view_as(x0)
        return Transfer(torch.where(_rows(choice.moved, x0), clean, x0), choice.moved, choice.index)

    def _mean(self, x_t, x0, y, scale, std, source: Reference, mode: str) -> Transfer:
        """The mean of `_sampled`: what the gate refuses, the own image receives."""
        _, points, labels, self_index = source
        prior = self._log_prior(labels, x_t)
        p = ltkernels.p_sel(x_t, source.images, scale, std, log_prior=prior)  # (B, K)
        own = p.gather(1, self_index[:, None])[:, 0]
        if self.beta is not None or mode == "full":
            mean = ltkernels.posterior_mean(x_t, source.images, scale, std, log_prior=prior)
            return Transfer(mean.view_as(x0), 1 - own, self_index)
        q = torch.as_tensor(self.class_counts, device=labels.device)
        allowed = q[labels] >= q[y][:, None] if mode == "t2h" else q[labels] <= q[y][:, None]
        p = p * allowed
        moved = p.sum(1) - own
        p[torch.arange(len(p), device=p.device), self_index] = 0
        mean = (p @ points.to(p.dtype)).view_as(x0) + _rows(1 - moved, x0) * x0
        return Transfer(mean.to(x0.dtype), moved, self_index)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _where(rows: Tensor, one: Transfer, other: Transfer) -> Transfer:
    return Transfer(*(torch.where(_rows(rows, mine), mine, theirs) for mine, theirs in zip(one, other, strict=True)))


class Calibrate(Denoise):
    """Denoise with T2H's targets, and counters of how many rows moved at which t (Fig. 7)."""

    def __init__(self, dataset, modules, config):
        super().__init__(dataset, modules, config)
        self.method = T2H(
            self.counts, config.transfer_mode, config.transfer_estimator, config.transfer_beta, config.transfer_cut_time,
            config.uncond_transfer_mode,
        )  # fmt: skip
        self.bank = ltkernels.Bank(self.x.flatten(1)) if config.reference == "bank" else None
        self.cache = {name: torch.zeros(BINS, dtype=torch.float64, device=self.x.device) for name in ("rows", "moved")}

    def notes(self):
        text, whole = f"the whole data set, {len(self.x)} images", self.config.batch_size
        if self.config.reference == "gather" or self.config.reference == "batch" and ranks.size() == 1:
            text = f"the batch, {whole} images"
        elif self.config.reference == "batch":
            own = f"{whole // ranks.size()} images of a batch of {whole} on {ranks.size()} ranks"
            text = f"each rank's own {own}; --reference gather takes all of them"
        return {"reference_batch": text}

    def report(self):
        """Share of the rows that moved at t in (low, high], over all of training (Fig. 7)."""
        rows, moved = (self.cache[name].tolist() for name in ("rows", "moved"))
        edges = [round(i * self.config.timesteps / BINS) for i in range(BINS + 1)]
        share = [m / n if n else None for m, n in zip(moved, rows, strict=True)]
        return {"transfer": {"edges": edges, "rows": rows, "share": share}}

    def target(self, batch):
        x_t, x0 = batch.x_t, batch.x0
        if self.config.reference == "bank":  # of images that are not flipped, so the noisy ones are turned back
            x_t, x0 = mirrored(x_t, batch.flipped), mirrored(x0, batch.flipped)
            reference = {"reference": self.bank, "reference_labels": self.y, "self_index": batch.rows}
        elif self.config.reference == "gather":
            own = torch.arange(len(x0), device=x0.device) + batch.offset
            reference = {"reference": batch.whole_x0, "reference_labels": batch.whole_y, "self_index": own}
        else:
            reference = {}
        seed = torch.randint(2**62, (), generator=batch.rng, device=x_t.device)
        dropped = None if batch.label is None else batch.label < 0
        transfer = self.method.transfer(
            x_t, x0, batch.y, batch.scale, batch.std, seed=seed, row_offset=batch.offset, t=batch.t, dropped=dropped, **reference
        )
        clean = mirrored(transfer.clean, batch.flipped) if self.config.reference == "bank" else transfer.clean
        moved = transfer.moved.float()
        if self.config.transfer_estimator == "sample":  # a balanced batch holds tail images twice: the copy is no other target
            moved = moved * (transfer.clean != x0).flatten(1).any(1)
        self.count(batch.t, moved)
        target = ltkernels.denoising_target(batch.x_t, clean, batch.scale, batch.std, prediction=self.config.prediction)
        return target, {"moved": moved.mean()}

    def count(self, t: Tensor, moved: Tensor) -> None:
        counts = torch.zeros(2, BINS, dtype=torch.float64, device=t.device)
        counts.index_add_(1, (t - 1) * BINS // self.config.timesteps, torch.stack([torch.ones_like(moved), moved]).double())
        for name, new in zip(("rows", "moved"), ranks.total(counts), strict=True):
            self.cache[name] = self.cache[name] + new
