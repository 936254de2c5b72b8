"""A training step of every image method, and a sampling step, with the network and the batch of the papers' CIFAR-10-LT runs on a card.

    pytest benchmarks --benchmark-only -m gpu -k training

The data are noise of the shape of CIFAR-10-LT: a step costs the same. A step is what `training.loop.train` does between two checkpoints:
draw, target, network, gradients, clipping, Adam, average of the weights. Ratios to ddpm say what a method adds.
"""

import dataclasses

import pytest
import torch
from bench_knn_kde import a_card, time_on_the_card

from training import config, run_images
from training.data import Dataset, long_tail_counts
from training.loop import generator

METHODS = {  # what differs from ddpm's settings, which all have in common: a step of another batch would be another comparison
    "ddpm": {}, "t2h": {}, "t2h, all images for reference": {"reference": "bank"}, "cbdm": {}, "diffrop": {},
}  # fmt: skip
SPEEDS = {"float32": {}, "bf16, channels_last": {"amp": "bf16", "channels_last": True}}


def cifar10_lt() -> Dataset:
    counts = long_tail_counts(5000, 10, 100)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (sum(counts), 3, 32, 32), generator=g) / 127.5 - 1
    labels = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    return Dataset("cifar10-lt", images, None, labels, torch.arange(len(images)), 10, tuple(counts))


def settings_of(name: str, speed: str):
    method, base = name.split(",")[0], config.IMAGE_PRESETS["ddpm"]["table2-cifar10"]
    shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)} | {"device": "cuda", "ddim_quirk": False}
    return method, config.IMAGE_CONFIGS[method](**(shared | SPEEDS[speed] | METHODS[name]))


@pytest.mark.gpu
@a_card
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("name", METHODS)
def test_training_step(name, speed, benchmark):
    method, settings = settings_of(name, speed)
    dataset = cifar10_lt()
    stage = run_images.STAGES[method](dataset, run_images.build_modules(settings, (3, 32, 32), 10), settings)
    params = [p for module in stage.lr for p in stage.modules[module].parameters()]
    optimiser, number = stage.optimiser([{"params": params, "lr": 1e-4}]), iter(range(10**6))

    def step():
        n = next(number)
        loss, _ = stage.loss(n, generator(0, 0, stage.name, n, device="cuda"))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        stage.clip_gradients(params)
        optimiser.step()
        stage.after_step(n)

    benchmark.group = f"training step B=128, U-Net of CIFAR-10, {speed} {torch.cuda.get_device_name()}"
    time_on_the_card(benchmark, step, rounds=5, calls=4)


@pytest.mark.gpu
@a_card
@pytest.mark.parametrize("speed", SPEEDS)
def test_training_sampling_step(speed, benchmark):
    """Five DDIM steps of 500 images with guidance: ten passes of the network."""
    _, settings = settings_of("t2h", speed)
    settings = dataclasses.replace(settings, samples=500, sample_steps=5, progress=False)
    net = run_images.build_modules(settings, (3, 32, 32), 10)["ema"]
    benchmark.group = f"500 images, 5 DDIM steps with guidance, {speed} {torch.cuda.get_device_name()}"
    time_on_the_card(benchmark, lambda: run_images.draw_samples(net, settings, (3, 32, 32), 10), rounds=3)
