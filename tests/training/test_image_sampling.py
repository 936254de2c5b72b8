"""Samplers of images, against the processes they invert and the released code's steps."""

import math

import pytest
import torch

from training.diffusion import Diffusion, guided_output, sample_images

DIFFUSION = Diffusion()


class Oracle:
    """Knows the one image there is; counts its evaluations."""

    def __init__(self, x0, prediction="epsilon"):
        self.x0, self.prediction, self.times = x0, prediction, []

    def __call__(self, x, t, y):
        self.times.append(int(t[0]))
        scale, std = (c[:, None, None, None] for c in DIFFUSION.coefficients(t, x))
        eps = (x - scale * self.x0) / std
        return {"epsilon": eps, "v": scale * eps - std * self.x0, "x0": self.x0.expand_as(x)}[self.prediction]


def run(net, x_T, labels=None, **options):
    return sample_images(DIFFUSION, net, x_T, labels, rng=torch.Generator().manual_seed(1), **options)


def noise(count=3):
    return torch.randn(count, 1, 4, 4)


def test_coefficients_are_of_the_schedule_and_in_the_images_dtype():
    t = torch.tensor([0, 1, 500, 1000])
    scale, std = DIFFUSION.coefficients(t, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(scale.square(), DIFFUSION.alpha_bar[t], rtol=1e-14, atol=0)
    torch.testing.assert_close(scale.square() + std.square(), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0)
    # from float64: in float32, 1 - abar_1 would keep three digits
    torch.testing.assert_close(DIFFUSION.coefficients(t, torch.empty(0))[1], std.float(), rtol=0, atol=0)


def test_the_last_step_is_x0hat():
    x, eps = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    x0, mean, _ = DIFFUSION.reverse(x, eps, 1, 0)
    torch.testing.assert_close(mean, x0, rtol=0, atol=0)  # coefficients (1, 0) of (x0hat, x_1)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_every_prediction_leads_to_the_image(sampler, prediction):
    x0 = torch.rand(1, 1, 4, 4) * 1.6 - 0.8
    out = run(Oracle(x0, prediction), noise(), sampler=sampler, steps=50, prediction=prediction)
    torch.testing.assert_close(out, x0.expand_as(out), rtol=0, atol=2e-5)


def test_the_steps_of_ddim():
    net = Oracle(torch.zeros(1, 1, 4, 4))
    run(net, noise(), steps=100)
    assert net.times == list(range(1000, 0, -10))
    net = Oracle(torch.zeros(1, 1, 4, 4))
    out = run(net, noise(), steps=100, ddim_quirk=True)
    assert net.times == list(range(991, 0, -10)) and len(net.times) == 100
    assert out.std() > 0.5 * math.sqrt(1 - float(DIFFUSION.alpha_bar[1]))  # it keeps the noise of t = 1, and a little more
    with pytest.raises(ValueError, match="steps must divide 1000; got 30"):
        run(net, noise(), steps=30, ddim_quirk=True)


def test_guidance():
    x, labels = noise(), torch.tensor([0, 1, 2])
    calls = []

    def net(x, t, y):
        calls.append(y)
        return x * (1 + (y + 1).float())[:, None, None, None]

    t = torch.full((3,), 500)
    conditional = guided_output(net, x, t, labels, 0.0)
    assert len(calls) == 1
    torch.testing.assert_close(conditional, net(x, t, labels))
    calls.clear()
    guided = guided_output(net, x, t, labels, 1.5)
    assert len(calls) == 2 and (calls[1] == -1).all()
    torch.testing.assert_close(guided, 2.5 * conditional - 1.5 * x)
    calls.clear()
    run(net, x, labels, steps=20)
    assert len(calls) == 20  # w = 0: one evaluation a step


def test_ancestral_steps_have_the_variance_they_say():
    """A net that answers 0 leaves x_s = mean x_t + noise: two steps of T = 2, of which the second draws nothing."""
    diffusion = Diffusion(steps=2, beta_start=0.3, beta_end=0.5)
    for variance, expected in (("fixedlarge", 0.5), ("fixedsmall", 0.5 * 0.3 / 0.65)):
        out = sample_images(
            diffusion, lambda x, t, y: torch.zeros_like(x), torch.zeros(20000, 1, 1, 1), None, rng=torch.Generator().manual_seed(0),
            sampler="ddpm", steps=2, variance=variance,
        )  # fmt: skip
        inside = out[out.abs() < 0.5]  # the answer is clamped to [-1, 1]: quantiles of the middle stay
        sd = math.sqrt(expected / 0.7)
        share = math.erf(0.5 / sd / math.sqrt(2))
        assert len(inside) / len(out) == pytest.approx(share, abs=0.012)


def test_clipping_has_an_effect():
    net, last = Oracle(torch.full((1, 1, 4, 4), 3.0)), []

    def spy(x, t, y):
        last[:] = [x.mean()]
        return net(x, t, y)

    scale = math.sqrt(float(DIFFUSION.alpha_bar[10]))
    for clip, towards in ((True, 1.0), (False, 3.0)):  # the end is clamped in any case; the steps before it are not
        assert run(spy, noise(), steps=100, clip_x0=clip).max() == 1
        assert last[0] == pytest.approx(scale * towards, abs=0.2)


def test_the_noise_is_the_generators():
    def spread(x, t, y):
        return 0.1 * x

    def draw(seed, sampler):
        return sample_images(DIFFUSION, spread, x, None, rng=torch.Generator().manual_seed(seed), sampler=sampler, steps=5)

    x = 0.01 * noise()
    assert torch.equal(draw(1, "ddpm"), draw(1, "ddpm")) and not torch.equal(draw(1, "ddpm"), draw(2, "ddpm"))
    assert torch.equal(draw(1, "ddim"), draw(2, "ddim"))  # draws nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "heun"}, "sampler must be one of ddim, ddpm; got 'heun'"),
        ({"variance": "learned"}, "variance must be one of fixedlarge, fixedsmall"),
        ({"prediction": "score"}, "prediction must be one of epsilon, v, x0"),
        ({"sampler": "ddpm", "ddim_quirk": True}, "ddim_quirk is about the sampler ddim"),
        ({"steps": 0}, r"count must be in \[1, 1000\]; got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        run(Oracle(torch.zeros(1, 1, 4, 4)), noise(), **options)
