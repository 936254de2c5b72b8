"""Clustering heads on frozen features, CLUDI's rivals: Self-Classifier*, SCAN, CC and TEMI, each with its paper's loss.

Every head is a small MLP with K outputs, Adam at 1e-3 falling to zero; the rows' views are those that CLUDI's student sees. Temperatures
and weights are the papers'. SCAN's later self-labelling is left out; TEMI has 8 heads instead of 50.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltkernels

from .config import CLUDIConfig
from .loop import Stage, batch_rows
from .methods.cludi import class_loss
from .networks import mlp
from .views import info_nce, perturb_features


class Head(Stage):
    """What the heads share: features, networks, batches, and labels from the logits."""

    outputs = 1  # heads trained side by side

    def __init__(self, x: Tensor, clusters: int, config: CLUDIConfig):
        self.x, self.clusters, self.config, self.cache = x, clusters, config, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.modules = {"net": self.build(x.shape[1]).to(x.device)}
        self.lr = {"net": 1e-3}
        self.steps = config.baseline_steps

    def build(self, width: int) -> nn.Module:
        return mlp(width, self.clusters * self.outputs)

    def batch(self, step: int) -> Tensor:
        return batch_rows(len(self.x), self.config.batch_size, step, self.config.seed, self.name)

    def view(self, x: Tensor, rng: torch.Generator) -> Tensor:
        c = self.config
        return perturb_features(x, rng, c.augment, (c.aug_noise_min, c.aug_noise_max), (c.aug_drop_min, c.aug_drop_max))

    def logits(self, x: Tensor) -> Tensor:
        return self.modules["net"](x)

    @torch.no_grad()
    def labels(self, x: Tensor) -> np.ndarray:
        return torch.cat([self.logits(part).argmax(1) for part in x.split(4096)]).cpu().numpy()


class NeighbourHead(Head):
    """A head that asks rows and their nearest neighbours, mined once, to agree."""

    def __init__(self, x: Tensor, clusters: int, config: CLUDIConfig):
        super().__init__(x, clusters, config)
        k = min(config.neighbours, len(x) - 1)
        self.neighbours = ltkernels.knn(x, ltkernels.Bank(x), k, self_index=True).index  # (N, k)

    def pairs(self, step: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(rows, one random neighbour of each)."""
        rows = self.batch(step)
        choice = torch.randint(self.neighbours.shape[1], (len(rows),), generator=rng, device=self.x.device)
        return self.x[rows], self.x[self.neighbours[rows, choice]]


class SelfClassifier(Head):
    """Self-Classifier* (Amrani et al., 2022, features frozen): CLUDI's l_cls between two views, and nothing else."""

    name = "self-classifier"

    def loss(self, step, rng):
        x = self.x[self.batch(step)]
        logits = [F.linear(F.normalize(self.hidden(self.view(x, rng)), dim=1), F.normalize(self.prototypes, dim=1)) for _ in range(2)]
        prior = torch.full((self.clusters,), 1 / self.clusters, device=x.device).log()
        return class_loss(logits[0][None], logits[1][None], prior, tau=self.config.tau, tau_col=self.config.tau_col), {}

    @property
    def hidden(self) -> nn.Module:
        return self.modules["net"][:-1]

    @property
    def prototypes(self) -> Tensor:
        return self.modules["net"][-1].weight

    def logits(self, x):
        return F.linear(F.normalize(self.hidden(x), dim=1), F.normalize(self.prototypes, dim=1))


class SCAN(NeighbourHead):
    """SCAN's clustering step (Van Gansbeke et al., 2020): -log <p(x), p(x')> for neighbours x', less 5 times the entropy of mean p."""

    name = "scan"

    def loss(self, step, rng):
        x, near = self.pairs(step, rng)
        p, p_near = (self.logits(self.view(part, rng)).softmax(1) for part in (x, near))
        agree = -(p * p_near).sum(1).clamp(min=1e-8).log().mean()
        mean = p.mean(0).clamp(min=1e-8)
        return agree + 5.0 * (mean * mean.log()).sum(), {}


class CC(Head):
    """Contrastive clustering (Li et al., 2021): InfoNCE over rows (T = .5) and columns of p (T = 1), less the entropy of mean p."""

    name = "cc"

    def build(self, width):
        return nn.ModuleDict({"instance": mlp(width, 64), "cluster": mlp(width, self.clusters)})

    def logits(self, x):
        return self.modules["net"]["cluster"](x)

    def loss(self, step, rng):
        x = self.x[self.batch(step)]
        views = torch.cat([self.view(x, rng), self.view(x, rng)])
        p = self.logits(views).softmax(1)
        first, second = p.chunk(2)
        rows, columns = self.modules["net"]["instance"](views), torch.cat([first.T, second.T])
        entropy = -sum((mean * mean.clamp(min=1e-8).log()).sum() for mean in (first.mean(0), second.mean(0)))
        return twins(rows, 0.5) + twins(columns, 1.0) - entropy, {}


def twins(x: Tensor, temperature: float) -> Tensor:
    """InfoNCE of rows whose positive is the row half the way round."""
    row = torch.arange(len(x), device=x.device) % (len(x) // 2)
    return info_nce(x, x, row[:, None] == row, temperature)


class TEMI(NeighbourHead):
    """TEMI (Adaloglou et al., 2023): pointwise mutual information of neighbours between student and EMA teacher heads, each pair weighted
    by the teacher's agreement. Several heads learn side by side; the one of the lowest loss answers, which takes no label."""

    name, outputs, beta, temperature = "temi", 8, 0.6, 0.1

    def __init__(self, x, clusters, config):
        super().__init__(x, clusters, config)
        self.modules["teacher"] = copy.deepcopy(self.modules["net"])
        self.cache["prior"] = torch.full((self.outputs, clusters), 1 / clusters, device=x.device)
        self.cache["losses"] = torch.zeros(self.outputs, device=x.device)

    def split(self, logits: Tensor) -> Tensor:
        return logits.view(len(logits), self.outputs, self.clusters)  # (B, H, K)

    def loss(self, step, rng):
        with torch.no_grad():
            for slow, fast in zip(self.modules["teacher"].parameters(), self.modules["net"].parameters(), strict=True):
                slow.lerp_(fast, 0.02 if step else 1.0)  # the paper's .004 is for a hundred times as many steps
        pair = self.pairs(step, rng)
        with torch.no_grad():
            teacher = [(self.split(self.modules["teacher"](x)) / self.temperature).softmax(-1) for x in pair]
            self.cache["prior"] = self.cache["prior"].lerp(torch.cat(teacher).mean(0), 0.1)
            weight = (teacher[0] * teacher[1]).sum(-1)  # (B, H)
        student = [(self.split(self.modules["net"](self.view(x, rng))) / self.temperature).log_softmax(-1) for x in pair]
        prior = self.cache["prior"].clamp(min=1e-8).log()
        pmi = [(self.beta * (student[i] + teacher[1 - i].clamp(min=1e-8).log()) - prior).logsumexp(-1) for i in (0, 1)]
        losses = -(weight * (pmi[0] + pmi[1]) / 2).mean(0)  # (H,)
        self.cache["losses"] = self.cache["losses"].lerp(losses.detach(), 0.02)
        return losses.mean(), {}

    def logits(self, x):
        return self.split(self.modules["net"](x))[:, int(self.cache["losses"].argmin())]


HEADS = (SelfClassifier, SCAN, CC, TEMI)
