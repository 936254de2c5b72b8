"""The ideal denoiser against a float64 softmax mean, and that its samples are training images."""

import json

import numpy as np
import pytest
import torch

from training import data, evaluate
from training.__main__ import main
from training.diffusion import Diffusion
from training.methods.analytic import IdealDenoiser


def mean64(x_t, t, clean, log_prior, diffusion):
    scale, std = diffusion.alpha_bar[t].sqrt(), (1 - diffusion.alpha_bar[t]).sqrt()
    logits = -(x_t.double().flatten(1)[:, None] - scale * clean.double().flatten(1)).square().sum(2) / (2 * std**2) + log_prior
    return (logits.softmax(1) @ clean.double().flatten(1)).view(x_t.shape), scale, std


@pytest.mark.parametrize("mix", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("t", [1, 10, 100, 300, 500, 1000])
def test_denoiser_is_the_softmax_mean(t, mix):
    dataset, diffusion = data.load("digits-lt", imbalance_ratio=20), Diffusion()
    net, rng = IdealDenoiser(dataset, diffusion, mix), torch.Generator().manual_seed(t)
    rows = torch.randint(len(dataset), (24,), generator=rng)
    y, times = dataset.labels[rows].clone(), torch.full((24,), t)
    y[::4] = -1
    x_t = diffusion.add_noise(dataset.images[rows], torch.randn(24, 1, 8, 8, generator=rng), times)
    denoised, eps = net.denoised(x_t, *diffusion.coefficients(times, x_t), y), net(x_t, times, y)
    for i in range(24):
        prior = torch.where(dataset.labels == y[i], 1.0, mix if y[i] >= 0 else 1.0).double().log()
        x0, scale, std = mean64(x_t[i : i + 1], t, dataset.images, prior, diffusion)
        torch.testing.assert_close(denoised[i : i + 1].double(), x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(scale * x0 + std * eps[i : i + 1].double(), x_t[i : i + 1].double(), rtol=0, atol=2e-5)


def test_every_sample_is_a_training_image_of_its_class(tmp_path):
    words = "analytic --no-progress --no-evaluate --samples 100 --out".split()
    assert main([*words, str(tmp_path / "run")]) == 0
    dataset = data.load("digits-lt", imbalance_ratio=20)
    train = evaluate.to_uint8(dataset.images).flatten(1).int()

    def nearest(folder):
        samples, labels = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("samples", "sample_labels"))
        away = (samples.flatten(1).int()[:, None] - train).abs().amax(2)
        return away.masked_fill(labels[:, None] != dataset.labels, 999).amin(1)

    assert nearest(tmp_path / "run").max() <= 1
    assert main(["sample", str(tmp_path / "run"), "--n", "20", "--seed", "5"]) == 0
    assert nearest(tmp_path / "run" / "samples").max() <= 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["method"] == "analytic"
