"""An exponential moving average of a network's weights, which is what samples are drawn from."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema(nn.Module):
    """`net` is the average: w <- decay w + (1 - decay) w_new at every `update`, from the first one on and without a warm-up.

    Buffers are copied: an average of integers, or of statistics that are averages themselves, means nothing. The average takes no
    gradient and stays in evaluation mode, so that it can lie beside the trained network in a dict of modules.
    """

    def __init__(self, net: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"Ema: decay must be in [0, 1]; got {decay}")
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        get_ema_multi_avg_fn(self.decay)(list(self.net.parameters()), list(net.parameters()), None)
        for mine, new in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(new)

    def train(self, mode: bool = True) -> Ema:
        return super().train(False)

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)
