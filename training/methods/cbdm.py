"""CBDM: class-balancing diffusion models (Qin et al., 2023; 001, appendix D), the baseline with the released code's weights.

To the denoising loss comes tau t / T (|eps(y) - sg eps(y')|^2 + 1/4 |sg eps(y) - eps(y')|^2) for one other label y' a row: the prediction
for a tail label is drawn to those for other labels. 001 writes the weight as tau t, which is a thousand times larger (D12).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ranks
from .ddpm import Denoise


class CBDM:
    """Stateless: `labels` draws y', `loss` is the term for the network's outputs at y and y'.

    class_counts (C,): of the training set. sampling: y' by their shares ("train"), "uniform", or by their square roots ("sqrt").
    """

    def __init__(self, class_counts: Sequence[int] | Tensor, *, tau: float = 1.0, sampling: str = "train", steps: int = 1000):
        powers = {"train": 1.0, "uniform": 0.0, "sqrt": 0.5}
        if sampling not in powers:
            raise ValueError(f"CBDM: sampling must be one of {', '.join(powers)}; got {sampling!r}")
        counts = torch.as_tensor(class_counts, dtype=torch.float64)  # shares of float32 need not sum to one
        self.weight = torch.where(counts > 0, counts ** powers[sampling], 0.0)
        self.tau, self.steps = tau, steps

    def labels(self, count: int, rng: torch.Generator | None = None) -> Tensor:
        """y' (count,)."""
        device = rng.device if rng is not None else "cpu"
        return torch.multinomial(self.weight.to(device), count, replacement=True, generator=rng)

    def loss(self, output: Tensor, other: Tensor, t: Tensor, kept: Tensor | None = None) -> Tensor:
        """Mean over the rows of outputs for y and y' (B, ...), at times t (B,) in 1..T. `kept` (B,): rows whose label was not dropped; the
        others count as 0."""
        weight = self.tau * (t - 1).to(output.dtype) / self.steps
        weight = weight if kept is None else weight * kept
        pulled = (output - other.detach()).square().flatten(1).mean(1)
        pulling = (output.detach() - other).square().flatten(1).mean(1)
        return (weight * (pulled + pulling / 4)).mean()


class Balance(Denoise):
    """Denoise with CBDM's term; in batches whose labels were all dropped, it is 0 and costs nothing."""

    def __init__(self, dataset, modules, config):
        super().__init__(dataset, modules, config)
        self.method = CBDM(dataset.counts, tau=config.cb_tau, sampling=config.other_labels, steps=config.timesteps)

    def further_terms(self, batch, output):
        other = self.method.labels(self.config.batch_size, batch.rng)[ranks.part(self.config.batch_size)]
        kept = batch.label >= 0
        if not kept.any():
            return {"loss_cb": output.new_zeros(())}
        return {"loss_cb": self.method.loss(output, self.predict(batch, other.where(kept, -1)), batch.t, kept)}
