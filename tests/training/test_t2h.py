"""T2H moves targets as 001 says, with the repairs of D1..D13; numbers are those of the closed forms."""

import pytest
import torch

import ltkernels
from training.data import class_counts, long_tail_counts
from training.diffusion import Diffusion
from training.methods import DDPM, T2H

LT = long_tail_counts(5000, 10, 100)  # CIFAR-10-LT
D = Diffusion()


def batch(count=64, dim=4, t=700, classes=10, seed=0):
    """(x_t, x0, y, scale, std) close enough together that most rows would move."""
    rng = torch.Generator().manual_seed(seed)
    x0, y = torch.randn(count, 1, 2, dim // 2, generator=rng), torch.randint(classes, (count,), generator=rng)
    times = torch.full((count,), t)
    scale, std = D.coefficients(times, x0)
    return D.add_noise(x0, torch.randn(x0.shape, generator=rng), times), x0, y, scale, std


def test_unit_noise_is_the_same_in_both_views():
    """D1, D2: (x_t - sqrt(abar) x_z) / sqrt(1 - abar) = (xbar - x_z) / sigma; the noise itself where nothing moves."""
    t = torch.tensor([1, 2, 10, 100, 500, 900, 999, 1000])
    x0, eps = torch.randn(2, len(t), 3, 4, 4).unbind()
    scale, std = D.coefficients(t, x0)
    x_t, other = D.add_noise(x0, eps, t), x0.roll(1, 0)
    columns = scale.view(-1, 1, 1, 1).double(), std.view(-1, 1, 1, 1).double()
    unit = (x_t.double() / columns[0] - other) / (columns[1] / columns[0])
    torch.testing.assert_close(ltkernels.denoising_target(x_t, other, scale, std).double(), unit, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(DDPM().target(x_t, x0, None, scale, std), eps, rtol=0, atol=1e-5 * 4)
    for prediction in ("epsilon", "v", "x0"):
        alone = T2H([1], mode="full").target(x_t[:1], x0[:1], torch.tensor([0]), scale[:1], std[:1], prediction, seed=0)
        assert torch.equal(alone, DDPM().target(x_t[:1], x0[:1], None, scale[:1], std[:1], prediction))  # K = 1


@pytest.mark.parametrize("batches, expected", [("long-tailed", 0.62675), ("balanced", 0.55)])
def test_share_of_choices_that_pass_the_gate_at_the_last_time(batches, expected):
    """(1 + sum p^2) / 2 of a long-tailed batch; (1 + 1/10) / 2 where all counts differ and batches are balanced."""
    weight, rng, accepted = torch.tensor(LT if batches == "long-tailed" else [1] * 10).double(), torch.Generator().manual_seed(1), []
    for seed in range(40):
        y = torch.multinomial(weight, 500, replacement=True, generator=rng)
        x = torch.zeros(500, 1)
        choice = {mode: T2H(LT, mode).transfer(x, x, y, 0.0, 1.0, seed=seed).index for mode in ("t2h", "h2t", "full")}
        counts = torch.tensor(LT)
        ok = counts[y[choice["full"]]] >= counts[y]
        accepted.append(ok.float().mean())
        own = torch.arange(500)
        assert torch.equal(choice["t2h"], choice["full"].where(ok, own))
        assert torch.equal(choice["h2t"], choice["full"].where(counts[y[choice["full"]]] <= counts[y], own))
        head = y == 0
        assert (y[choice["t2h"][head]] == 0).all() and torch.equal(choice["t2h"][y == 9], choice["full"][y == 9])
    assert sum(accepted) / len(accepted) == pytest.approx(expected, abs=0.01)


def test_a_row_never_moves_against_the_gate_and_moved_says_so():
    x_t, x0, y, scale, std = batch(256)
    q = torch.tensor(LT)
    for mode, fine in (("t2h", torch.ge), ("h2t", torch.le)):
        out = T2H(LT, mode).transfer(x_t, x0, y, scale, std, seed=3)
        assert torch.equal(out.moved, out.index != torch.arange(256)) and 0.3 < out.moved.float().mean() < 0.9
        assert fine(q[y[out.index]], q[y]).all()
        assert torch.equal(out.clean, x0[out.index])


def test_equal_counts_pass_both_gates():
    """D4. Of classes of one size, t2h, h2t and full are the same: so q(y) must not be the frequency of resampled batches."""
    x_t, x0, y, scale, std = batch()
    full = T2H([7] * 10, "full").transfer(x_t, x0, y, scale, std, seed=3)
    for mode in ("t2h", "h2t"):
        assert torch.equal(T2H([7] * 10, mode).transfer(x_t, x0, y, scale, std, seed=3).index, full.index)
    assert (T2H(LT, "t2h").transfer(x_t, x0, y, scale, std, seed=3).index != full.index).any()


def test_prior_to_the_power_beta_is_the_released_weight():
    """D7: (q_i q_j)^tau in the released code; q_i cancels. beta = 0 is full, whatever the mode."""
    x_t, x0, y, scale, std = batch()
    log_q = (torch.tensor(LT).double() / sum(LT)).log()
    logits = -(x_t.flatten(1)[:, None] - scale[:, None, None] * x0.flatten(1)).double().square().sum(-1) / (2 * std[:, None] ** 2)
    for tau in (1.0, -1.0, 0.3):
        released = (logits + tau * (log_q[y][:, None] + log_q[y])).softmax(1)
        ours = ltkernels.p_sel(x_t, x0, scale, std, log_prior=tau * log_q[y].float())
        torch.testing.assert_close(ours.double(), released, rtol=0, atol=1e-6)
        mean = T2H(LT, "t2h", "mean", beta=tau).transfer(x_t, x0, y, scale, std).clean
        torch.testing.assert_close(mean.flatten(1).double(), released @ x0.flatten(1).double(), rtol=0, atol=1e-5)
    for estimator in ("sample", "mean"):
        zero, full = T2H(LT, "t2h", estimator, beta=0.0), T2H(LT, "full", estimator)
        assert torch.equal(*(method.target(x_t, x0, y, scale, std, seed=5) for method in (zero, full)))


@pytest.mark.parametrize("mode", ["t2h", "h2t", "full"])
def test_the_soft_target_is_the_mean_of_the_sampled_ones(mode):
    x_t, x0, y, scale, std = batch(16)
    soft, method = T2H(LT, mode, "mean").transfer(x_t, x0, y, scale, std), T2H(LT, mode)
    draws = [method.transfer(x_t, x0, y, scale, std, seed=seed) for seed in range(1000)]
    mean = sum(draw.clean for draw in draws) / 1000
    assert (mean - soft.clean).abs().max() < 0.2  # 6 sd of a coordinate: x0 has unit variance
    torch.testing.assert_close(sum(draw.moved.float() for draw in draws) / 1000, soft.moved, rtol=0, atol=0.08)
    assert soft.index is None


def test_a_reference_of_other_rows():
    x_t, x0, y, scale, std = batch(32)
    order = torch.randperm(32)
    whole = torch.cat([torch.randn(9, *x0.shape[1:]), x0[order]])
    labels, own = torch.cat([torch.zeros(9, dtype=torch.long), y[order]]), order.argsort() + 9
    for reference in (whole, ltkernels.Bank(whole.flatten(1))):
        out = T2H(LT).transfer(x_t, x0, y, scale, std, reference=reference, reference_labels=labels, self_index=own, seed=0)
        assert torch.equal(out.moved, out.index != own) and torch.equal(out.clean, whole[out.index])
        assert (labels[out.index] <= y).all()
    with pytest.raises(ValueError, match="a reference needs reference_labels and self_index"):
        T2H(LT).transfer(x_t, x0, y, scale, std, reference=whole)


def test_rows_split_over_calls_choose_as_in_one():
    x_t, x0, y, scale, std = batch(64)
    one = T2H(LT).transfer(x_t, x0, y, scale, std, seed=11).index
    for parts in (2, 4):
        rows = torch.arange(64).chunk(parts)
        split = [
            T2H(LT).transfer(
                x_t[r], x0[r], y[r], scale[r], std[r], reference=x0, reference_labels=y, self_index=r, seed=11, row_offset=int(r[0])
            ).index
            for r in rows
        ]  # fmt: skip
        assert torch.equal(torch.cat(split), one)


@pytest.mark.parametrize("uncond", ["same", "none", "h2t", "full"])
@pytest.mark.parametrize("estimator", ["sample", "mean"])
def test_rows_without_a_label_have_a_mode_of_their_own(uncond, estimator):
    call = batch()
    dropped = torch.arange(64) % 3 == 0
    out = T2H(LT, "t2h", estimator, uncond_mode=uncond).transfer(*call, seed=2, dropped=dropped)
    t2h = T2H(LT, "t2h", estimator).transfer(*call, seed=2)
    assert torch.equal(out.clean[~dropped], t2h.clean[~dropped])
    if uncond == "none":
        assert not out.moved[dropped].any() and torch.equal(out.clean[dropped], call[1][dropped])
    else:
        expected = t2h if uncond == "same" else T2H(LT, uncond, estimator).transfer(*call, seed=2)
        assert torch.equal(out.clean[dropped], expected.clean[dropped]) and torch.equal(out.moved[dropped], expected.moved[dropped])


def test_cut_time():
    """D6: rows with t below the cut only."""
    x_t, x0, y, scale, std = batch()
    t = torch.where(torch.arange(64) % 2 == 0, 700, 701)
    out, free = (T2H(LT, cut_time=cut).transfer(x_t, x0, y, scale, std, seed=2, t=t) for cut in (701, None))
    assert torch.equal(out.index[::2], free.index[::2]) and not out.moved[1::2].any() and free.moved[1::2].any()
    with pytest.raises(ValueError, match="cut_time needs the times t"):
        T2H(LT, cut_time=701).transfer(x_t, x0, y, scale, std)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_in_a_loop_of_flow_matching(prediction):
    """x_t = (1 - t) x0 + t noise, up to t = 1, where scale is 0 and every image is as likely."""
    x0, y, t = torch.randn(32, 3, 4, 4), torch.randint(10, (32,)), torch.linspace(0.01, 1, 32)
    x_t = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * torch.randn_like(x0)
    target = T2H(LT).target(x_t, x0, y, 1 - t, t, prediction)
    assert target.shape == x0.shape and target.isfinite().all() and not target.requires_grad


def test_a_null_class_among_the_labels_is_refused():
    x = torch.randn(4, 1, 2, 2)
    with pytest.raises(ValueError, match=r"T2H: .* labels must be in \[0, 3\); got 0 .. 3; y and .* are the true labels"):
        T2H([5, 3, 1]).target(x, x, torch.tensor([0, 1, 2, 3]), 0.7, 0.7)


def test_a_mode_for_dropped_labels_needs_to_know_them():
    x = torch.randn(3, 1, 2, 2)
    with pytest.raises(ValueError, match="T2H: uncond_mode 'none' needs dropped"):
        T2H(LT, uncond_mode="none").target(x, x, torch.arange(3), 1.0, 1.0)


@pytest.mark.parametrize("name, value", [("mode", "both"), ("estimator", "median"), ("uncond_mode", "drop")])
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(ValueError, match=f"T2H: {name} must be one of .*; got '{value}'"):
        T2H(LT, **{name: value})


def test_class_counts_of_labels():
    assert class_counts(torch.tensor([0, 0, 2]), 3) == (2, 0, 1)
