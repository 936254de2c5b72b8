"""`ltkernels.backend`: on which backend the ops of a block run, and their backward passes. Tables of routes: test_selftest.py."""

import threading

import pytest
import torch

import ltkernels
from ltkernels import backends, pcl_loss, posterior_mean

LABELS = torch.arange(6) % 3


def kept(x):
    """Asked for a second time, the gradient is made anew."""
    loss = pcl_loss(x, LABELS)
    torch.autograd.grad(loss, x, retain_graph=True)
    return loss


LOSSES = {  # whose backward pass calls a routed op
    "posterior_mean": lambda x: posterior_mean(x, torch.ones(4, 5), 1.0, 0.5).sum(),
    "pcl_loss": kept,
}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in this thread", "in another thread"])
@pytest.mark.parametrize("op", LOSSES)
def test_the_backward_pass_runs_where_the_forward_pass_ran(op, elsewhere, monkeypatch):
    """Autograd has a thread for each card, which no block of the caller's reaches."""
    used, choose = [], backends.choose
    monkeypatch.setattr(backends, "choose", lambda *args: (used.append(choose(*args)), used[-1])[1])
    x = torch.randn(6, 5, requires_grad=True)
    with ltkernels.backend("reference"):
        loss = LOSSES[op](x)
    used.clear()
    backward = threading.Thread(target=loss.backward) if elsewhere else None
    if backward:
        backward.start()
        backward.join()
    else:
        loss.backward()
    assert x.grad is not None and set(used) == {"reference"}


def test_without_a_block_the_backward_pass_obeys_its_own(monkeypatch):
    used, choose = [], backends.choose
    monkeypatch.setattr(backends, "choose", lambda *args: (used.append(choose(*args)), used[-1])[1])
    x = torch.randn(6, 5, requires_grad=True)
    loss = LOSSES["posterior_mean"](x)
    used.clear()
    with ltkernels.backend("reference"):
        loss.backward()
    assert set(used) == {"reference"}
