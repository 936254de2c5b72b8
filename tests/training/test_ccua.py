"""CCUA's two terms are what they say, and its stage makes them of the right outputs."""

import math

import pytest
import torch

from training import config, data, loop, run_images
from training.methods import CCUA, DiffROP


def images(count=6, seed=0):
    return torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrast_is_that_of_two_loops():
    x, t = images().requires_grad_(), torch.tensor([1, 100, 400, 400, 900, 1000])
    method, total = CCUA(alpha=0.7, temperature=0.2), 0
    for i in range(6):
        cosines = [torch.cosine_similarity(x[i].flatten(), x[j].flatten(), dim=0) for j in range(6)]
        total = total - t[i] / 1000 * torch.log(math.e**5 / sum(torch.exp(c / 0.2) for c in cosines))  # cos with itself is 1
    expected = 0.7 * total / 6
    found = method.contrast(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)


def test_a_step_makes_images_less_alike():
    x = (images() * 0.3 + 1).requires_grad_()
    cosines = lambda x: (u := torch.nn.functional.normalize(x.flatten(1), dim=1)) @ u.T  # noqa: E731
    (gradient,) = torch.autograd.grad(CCUA().contrast(x, torch.full((6,), 800)), x)
    assert (cosines(x - 0.1 * gradient).sum() < cosines(x).sum() - 0.01).item()


def test_one_row_and_equal_rows():
    assert CCUA().contrast(images(1), torch.tensor([500])) == 0
    same = images(1).expand(4, -1, -1, -1)
    assert CCUA().contrast(same, torch.full((4,), 500)).item() == pytest.approx(0.5 * math.log(4))  # nothing tells them apart


def test_alignment():
    a, b, t = images(seed=1), images(seed=2), torch.tensor([1, 100, 400, 400, 900, 1000])
    expected = sum(t[i] / 1000 * (a[i] - b[i]).square().mean() for i in range(6)) / 6
    torch.testing.assert_close(CCUA(gamma=3.0).align(a, b, t), 3 * expected)


def stage_of(**changes):
    settings = config.CCUAConfig(**{"batch_size": 16, "width": 32, "steps": 10, **changes})
    dataset = data.load("digits-lt", imbalance_ratio=20)
    return run_images.STAGES["ccua"](dataset, run_images.build_modules(settings, (1, 8, 8), 10), settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_terms_of_a_step_are_those_of_its_outputs(prediction):
    stage = stage_of(ccua_alpha=0.5, ccua_gamma=2.0, prediction=prediction)
    rng = lambda: loop.generator(0, 0, "denoise", 0)  # noqa: E731
    batch, (loss, figures) = stage.draw(0, rng()), stage.loss(0, rng())
    output, unlabelled = (stage.net(batch.x_t, batch.t, label, None) for label in (batch.label, torch.full_like(batch.label, -1)))
    image = DiffROP(space="x0").rows(batch.x_t, unlabelled, batch.scale, batch.std, prediction)
    torch.testing.assert_close(figures["loss_ucl"], CCUA(alpha=0.5).contrast(image, batch.t))
    torch.testing.assert_close(figures["loss_al"], CCUA(gamma=2.0).align(output, unlabelled, batch.t))
    torch.testing.assert_close(loss, figures["loss_mse"] + figures["loss_ucl"] + figures["loss_al"])
    assert figures["loss_ucl"] > 0 and figures["loss_al"] > 0


def test_rows_without_a_label_are_aligned_already():
    _, figures = stage_of(cfg_drop=1.0).loss(0, loop.generator(0, 0, "denoise", 0))
    assert figures["loss_al"] == 0 and figures["loss_ucl"] > 0


def test_it_needs_labels():
    with pytest.raises(ValueError, match="config: CCUA compares outputs with and without labels, so it needs conditional"):
        config.CCUAConfig(conditional=False)
