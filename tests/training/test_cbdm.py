"""CBDM's term has the minimiser that 001's appendix D derives, and the released code's weights."""

import pytest
import torch

from training.methods import CBDM

T = 1000


def test_the_weight_at_the_last_time_is_999_thousandths_of_tau():
    method, ones = CBDM([5, 1], tau=2.0, steps=T), torch.ones(3, 1, 2, 2)
    loss = method.loss(ones, torch.zeros(3, 1, 2, 2), torch.tensor([1000, 1000, 1000]))
    assert loss == pytest.approx(0.999 * 2.0 * 1.25)  # (1 + 1/4) |1 - 0|^2
    assert method.loss(ones, 0 * ones, torch.ones(3, dtype=torch.long)) == 0  # t = 1 is the code's index 0


@pytest.mark.parametrize("weight, minimiser", [(1.0, 2.0), (0.0, 1.0), (1e6, 3.0)])
def test_minimiser_between_the_noise_and_the_other_labels_mean(weight, minimiser):
    """Proposition D.1 with eps = 1 and predictions for y' of mean 3."""
    output = torch.full((2, 1, 1, 1), minimiser, dtype=torch.float64, requires_grad=True)
    others = torch.tensor([1.0, 5.0], dtype=torch.float64).view(2, 1, 1, 1)  # one y' a row
    t = torch.tensor([501, 501])
    loss = (output - 1).square().mean() + CBDM([1, 1], tau=weight / 0.5, steps=T).loss(output, others, t)
    (gradient,) = torch.autograd.grad(loss, output)
    # Rows share one prediction in D.1: the mean over labels is what its minimiser sees.
    assert abs(gradient.mean()) <= 2e-6 * max(weight, 1)


def test_minimiser_when_y_is_among_the_other_labels():
    """With y' = y at eps_y itself: (eps + w S) / (1 + w (L - 1) / L), S the sum over the others / L."""
    w, eps, others = 0.8, 0.3, torch.tensor([2.0, -1.0, 4.0], dtype=torch.float64)
    count = len(others) + 1
    minimiser = (eps + w * others.sum() / count) / (1 + w * (count - 1) / count)
    output = minimiser.repeat(count).view(count, 1).requires_grad_()
    predicted = torch.cat([minimiser[None], others])[:, None]
    loss = (output - eps).square().mean() + CBDM([1], tau=w / 0.5, steps=T).loss(output, predicted, torch.full((count,), 501))
    (gradient,) = torch.autograd.grad(loss, output)
    assert abs(gradient.sum()) < 1e-12


def test_each_prediction_is_pulled_by_a_constant_other_one():
    output = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    t, tau = torch.tensor([1, 200, 601, 1000]), 1.5
    CBDM([3, 1], tau=tau, steps=T).loss(output, other, t).backward()
    weight = (tau * (t - 1) / T / output.numel() * 2).view(4, 1, 1, 1)
    torch.testing.assert_close(output.grad, weight * (output - other).detach())
    torch.testing.assert_close(other.grad, weight / 4 * (other - output).detach())


def test_rows_without_a_label_count_as_zero():
    output, other = torch.randn(2, 4, 1, 2, 2).unbind()
    method, t, kept = CBDM([3, 1]), torch.full((4,), 500), torch.tensor([True, False, True, False])
    assert method.loss(output, other, t, kept) == pytest.approx(method.loss(output[::2], other[::2], t[::2]) / 2)
    assert method.loss(output, other, t, torch.zeros(4, dtype=torch.bool)) == 0


@pytest.mark.parametrize("sampling, power", [("train", 1.0), ("uniform", 0.0), ("sqrt", 0.5)])
def test_other_labels_follow_their_law(sampling, power):
    counts = torch.tensor([100, 25, 4, 0])
    drawn = CBDM(counts, sampling=sampling).labels(20_000, torch.Generator().manual_seed(0)).bincount(minlength=4)
    expected = 20_000 * (shares := counts[:3].double() ** power) / shares.sum()
    assert drawn[3] == 0  # a class without rows is no other label
    assert ((drawn[:3] - expected).square() / expected).sum() < 13.8  # chi^2, 2 degrees of freedom, one in a thousand


def test_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match="CBDM: sampling must be one of train, uniform, sqrt; got 'even'"):
        CBDM([1], sampling="even")
