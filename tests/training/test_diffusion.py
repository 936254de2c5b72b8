"""Closed-form facts of the linear schedule and of one reverse step."""

import math

import pytest
import torch

from training.diffusion import Diffusion, sample


@pytest.fixture
def diffusion():
    return Diffusion()


def test_alpha_bar_of_the_linear_schedule(diffusion):
    expected = {1: 0.9999, 100: 0.897018, 250: 0.524085, 500: 0.0785872, 800: 0.00153209, 1000: 4.03583e-5}
    for t, value in expected.items():
        assert float(diffusion.alpha_bar[t]) == pytest.approx(value, rel=2e-6)


def test_variance_exploding_view(diffusion):
    sigma2 = (1 - diffusion.alpha_bar) / diffusion.alpha_bar
    expected = {1: 1.0001e-4, 100: 0.114805, 250: 0.908086, 500: 11.7247, 800: 651.703, 1000: 24777.1}
    for t, value in expected.items():
        assert float(sigma2[t]) == pytest.approx(value, rel=1e-5)


def test_signal_to_noise_thresholds(diffusion):
    snr = diffusion.alpha_bar[1:] / (1 - diffusion.alpha_bar[1:])  # by index t - 1, as the public code counts
    assert int((snr >= 5).nonzero().max()) == 129
    assert int((snr >= 1).nonzero().max()) == 258


def test_posterior_variance(diffusion):
    assert diffusion.reverse_variance(2, 1) == pytest.approx(5.4532e-5, rel=1e-4)
    assert diffusion.reverse_variance(1000, 999) == pytest.approx(0.0199999840, rel=1e-6)
    assert diffusion.reverse_variance(1, 0) == 0


def test_mean_is_a2_with_the_typo_corrected(diffusion):
    z, eps = torch.randn(2, 5, 7, dtype=torch.float64)
    for t in (1, 2, 10, 100, 500, 1000):
        alpha = float(diffusion.alpha_bar[t] / diffusion.alpha_bar[t - 1])
        alpha_bar = float(diffusion.alpha_bar[t])
        expected = (z - (1 - alpha) / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha)
        torch.testing.assert_close(diffusion.reverse(z, eps, t, t - 1)[1], expected, rtol=1e-10, atol=1e-10)
        if t > 1:  # the printed sqrt(1 - alpha_t) is another number
            printed = (z - (1 - alpha) / math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
            assert not torch.allclose(printed, expected, rtol=1e-3)


def test_epsilon_coefficient_of_the_mean(diffusion):
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    expected = {1: 0.010001, 10: 0.006417, 100: 0.006464, 500: 0.010512, 1000: 0.020203}
    for t, value in expected.items():
        assert -float(diffusion.reverse(zero, one, t, t - 1)[1]) == pytest.approx(value, abs=1e-6)


def test_an_oracle_returns_the_clean_latent_and_ddim_draws_no_noise(diffusion):
    x0, noise = torch.randn(2, 64, 3, dtype=torch.float64)
    start = diffusion.add_noise(x0, noise, torch.full((64,), 1000))

    def oracle(z, t):
        alpha_bar = diffusion.alpha_bar[int(t[0])]
        return (z - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(sample(diffusion, oracle, start, 20, rng, eta=0), x0)
    torch.testing.assert_close(sample(diffusion, oracle, start, 20, rng, eta=1), x0)
    assert diffusion.reverse_variance(500, 400, eta=0) == 0


def test_respaced_times(diffusion):
    times = diffusion.times(100)
    assert len(times) == 101 and times[0] == 1000 and times[-1] == 0
    assert {a - b for a, b in zip(times[:-1], times[1:], strict=True)} == {10}
    for count in (1, 7, 333, 1000):
        times = diffusion.times(count)
        assert len(set(times)) == count + 1 and times == sorted(times, reverse=True)


def test_ancestral_samples_of_a_gaussian_have_its_moments(diffusion):
    mean, std = 2.0, 0.5  # eps of the exact score of N(mean, std^2)

    def denoise(z, t):
        alpha_bar = diffusion.alpha_bar[int(t[0])].float()
        return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)

    rng = torch.Generator().manual_seed(0)
    z = sample(diffusion, denoise, torch.randn(20000, 1, generator=rng), 200, rng)
    assert float(z.mean()) == pytest.approx(mean, abs=0.02)
    assert float(z.std()) == pytest.approx(std, abs=0.03)


@pytest.mark.parametrize("count", [0, 1001, -1])
def test_wrong_number_of_steps(diffusion, count):
    with pytest.raises(ValueError, match=rf"Diffusion.times: count must be in \[1, 1000\]; got {count}"):
        diffusion.times(count)


def test_wrong_schedule():
    with pytest.raises(ValueError, match="beta_start=0.5, beta_end=0.02"):
        Diffusion(beta_start=0.5)
