"""How a call reaches its kernel: `ltkernels.backend` and the backward pass, past the dispatcher and through it, and the ops that C++ has
whole. Tables of routes: test_selftest.py."""

import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ltkernels
from ltkernels import Bank, backends, knn, knn_kde_grad, p_sel, pairwise_sqdist, pcl_loss, posterior_mean, reference, score_select

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


class Watched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


CALLS = {  # op: of queries and points
    "knn": lambda x, y: knn(x, Bank(y), 3).sqdist,
    "knn_kde_bounded": lambda x, y: knn_kde_grad(x, Bank(y), 3, bandwidth=1.0).log_density,
    "psel": lambda x, y: p_sel(x, y, 0.9, 0.7).square(),
    "score_select": lambda x, y: score_select(x, y, 0.9, 0.7, seed=0).log_normalizer,
    "psel_mean": lambda x, y: posterior_mean(x, y, 0.9, 0.7),
    "pair_sqdist": lambda x, y: pairwise_sqdist(x, y),
    "pcl": lambda x, y: pcl_loss(x, LABELS),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_mode_sees_the_op(op):
    """Such as what counts operations, or decides what a checkpoint keeps."""
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5)
    expected = CALLS[op](x, y)
    with Watched() as mode:
        answer = CALLS[op](x, y)
    assert f"ltkernels.{op}.default" in mode.seen and not any("native" in name for name in mode.seen)
    assert torch.equal(answer, expected) and answer.requires_grad == expected.requires_grad


@pytest.mark.parametrize("op", CALLS)
def test_parameters_and_the_op_itself(op, monkeypatch):
    """A parameter, torch.ops.ltkernels and a compiled function take the dispatcher's way, to the bits and gradients of a plain call."""
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5)
    expected = CALLS[op](x, y)
    other = torch.nn.Parameter(x.detach().clone())
    compiled = torch.compile(lambda x: CALLS[op](x, y), backend="aot_eager")
    for call, given in ((lambda x: CALLS[op](x, y), other), (compiled, x)):
        answer = call(given)
        assert torch.equal(answer, expected)
        assert answer.requires_grad == expected.requires_grad == (op != "score_select")
        if answer.requires_grad:
            gradients = [torch.autograd.grad(out.sum(), of, retain_graph=True)[0] for out, of in ((answer, given), (expected, x))]
            assert torch.equal(*gradients) and gradients[0].any()
    monkeypatch.setattr(backends, "call", lambda op, *inputs: getattr(torch.ops.ltkernels, op)(*inputs))
    answer = CALLS[op](x, y)
    assert torch.equal(answer, expected) and answer.requires_grad == expected.requires_grad


@pytest.mark.parametrize("op", CALLS)
def test_tensors_without_numbers(op):
    """On the meta device, and of a compiler beside those that it knows the numbers of."""
    x, y = torch.randn(6, 5), torch.randn(9, 5)
    expected = CALLS[op](x, y)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    answers = [CALLS[op](x.to("meta"), y.to("meta"))] if op != "pcl" else []  # whose labels are here
    answers += [CALLS[op](x, fake.from_tensor(y)), CALLS[op](fake.from_tensor(x), y)]
    for answer in answers:
        assert answer.shape == expected.shape and answer.dtype == expected.dtype
    assert isinstance(answers[-1], FakeTensor)


@pytest.mark.parametrize("op", CALLS)
def test_a_trace_holds_the_op(op, tmp_path):
    y = torch.randn(9, 5)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(5))

        def forward(self, x):
            return CALLS[op](x * self.factor, y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on the trace of a script that it no longer recommends
        traced = torch.jit.trace(Module(), torch.randn(6, 5), check_trace=False)
        torch.jit.save(traced, tmp_path / "module.pt")
        loaded = torch.jit.load(tmp_path / "module.pt")
    x = torch.randn(6, 5)
    assert f"ltkernels::{op}" in str(loaded.graph) and torch.equal(loaded(x), CALLS[op](x, y))


@pytest.mark.parametrize("op", sorted(set(CALLS) - {"score_select"}))
def test_a_node_of_the_graph_is_named_for_its_op(op):
    x = torch.randn(6, 5, requires_grad=True)
    answer = CALLS[op](x, torch.randn(9, 5))  # as long as it is there, so is its graph
    nodes, names = [answer.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [below for below, _ in node.next_functions if below is not None]
    assert f"{op}Backward" in names


def test_a_thread_that_comes_between(monkeypatch):
    """The first backward pass through a graph gets the gradients that were made with the loss, to multiply them in place: no other one
    may have them, not even one that starts in its middle."""
    x = torch.randn(6, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(pcl_loss(x, LABELS), x)
    loss, is_grad_enabled, found = pcl_loss(x, LABELS), torch.is_grad_enabled, []

    def interrupted():
        monkeypatch.setattr(torch, "is_grad_enabled", is_grad_enabled)
        other = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, x, retain_graph=True)))
        other.start()
        other.join(timeout=60)
        return is_grad_enabled()

    monkeypatch.setattr(torch, "is_grad_enabled", interrupted)
    found += torch.autograd.grad(loss, x, retain_graph=True)
    assert len(found) == 2 and all(torch.equal(grad, expected) for grad in found)


@pytest.mark.parametrize("op", CALLS)
def test_inference_mode(op):
    x, y = torch.randn(6, 5), torch.randn(9, 5)
    expected = CALLS[op](x, y)
    with torch.inference_mode():
        assert torch.equal(CALLS[op](x, y), expected)


def whole_cases():
    """name, op, arguments, and what may be rounded otherwise: place in the answer: relative difference"""
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for dtype in dtypes:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rounding = 4 * torch.finfo(wide).eps
        points = torch.randn(300, 7, dtype=dtype)
        points[7], points[9] = points[8], torch.nan
        bank = Bank(points)
        queries = points[:50] + 0.1
        queries[3, 2] = torch.inf
        own = torch.arange(50).where(torch.arange(50) % 3 > 0, -1)
        weight = torch.randn(300, dtype=wide)
        weight[5], weight[20:30] = -torch.inf, 8.0
        for name, rows, log_weight, k in (
            ("plain", None, None, 5), ("leave out", own, None, 5), ("weights", None, weight, 5), ("both", own, weight, 5),
            ("all", None, None, 300), ("all but one", own, weight, 299), ("all, weights", None, weight, 300),
        ):  # fmt: skip
            prepared = queries, bank.points, bank.centre, bank.centred, bank.sqnorm, rows, None, k
            h = torch.rand(50, dtype=wide) + 0.05
            lost = 0 if log_weight is None else 1e-8  # 4 N eps of all weights, which a subtraction may lose of what is left
            yield f"truncation, {name}, {dtype}", "knn_kde_bounded", (*prepared, h, log_weight), {4: max(lost, rounding)}

        labels, counts = torch.randint(4, (40,)), torch.tensor([9.0, 5.0, 5.0, 1.0], dtype=torch.float64)
        x, clean = torch.randn(50, 7, dtype=dtype), torch.randn(40, 7, dtype=dtype)
        x[3, 1], clean[5, 2] = torch.nan, torch.inf
        noisy = x, clean, torch.full((50,), 0.8, dtype=wide), torch.rand(50, dtype=wide) + 0.1, torch.randn(40, dtype=wide)
        seed, of_x, made_of = torch.tensor([7]), torch.randint(4, (50,)), torch.randint(40, (50,))
        for gate in range(3):
            classes = (counts, labels) if gate else (None, None)
            yield f"select, {gate}, {dtype}", "score_select", (*noisy, seed, 3, made_of, *classes, None, gate), {}
            if gate:
                yield f"select, {gate}, labels of x, {dtype}", "score_select", (*noisy, seed, 3, made_of - 1, *classes, of_x, gate), {}
        square = clean, clean, noisy[2][:40], noisy[3][:40], None
        yield f"select, of themselves, {dtype}", "score_select", (*square, seed, 0, None, None, None, None, 0), {}

        yield f"mean, {dtype}", "psel_mean", noisy, {}
        many = torch.randn(2100, 3, dtype=dtype)  # two chunks
        yield f"mean in chunks, {dtype}", "psel_mean", (many[:2050], many, *torch.ones(2, 2050, dtype=wide), None), {}
        yield f"mean of none, {dtype}", "psel_mean", (many[:0], many, *torch.ones(2, 0, dtype=wide), None), {}

        tau, margin = torch.rand(2, 50, dtype=wide)
        nothing = (None,) * 4
        for mean in (True, False):
            finite = torch.randn(50, 7, dtype=dtype)
            yield f"loss, {mean}, {dtype}", "pcl", (finite, of_x, None, tau, *nothing, 0, 0.1, True, False, mean), {0: rounding}
            apart = finite, of_x, of_x % 2, tau, margin, clean.nan_to_num(), labels, labels % 2, 2, 0.1, True, True, mean
            yield f"loss, other, {mean}, {dtype}", "pcl", apart, {0: rounding}
        yield f"loss, one class, {dtype}", "pcl", (finite, of_x * 0, None, tau, *nothing, 0, 0.1, True, False, True), {0: rounding}
        yield f"loss, NaN, {dtype}", "pcl", (x, of_x, None, tau, *nothing, 3, 0.1, True, False, True), {0: rounding}


WHOLE = {name: case for name, *case in whole_cases()}


@pytest.mark.skipif(not ltkernels.build_info()["cpp"], reason="of the compiled part")
@pytest.mark.parametrize("name", WHOLE)
def test_an_op_that_cpp_has_whole_answers_what_its_parts_do(name):
    op, arguments, rounded = WHOLE[name]
    answers, parts = getattr(torch.ops.ltkernels_native, op)(*arguments), getattr(reference, op)(*arguments)
    assert len(answers) == len(parts)
    for place, (whole, composed) in enumerate(zip(answers, parts, strict=True)):
        assert whole.dtype == composed.dtype
        torch.testing.assert_close(whole, composed, rtol=rounded.get(place, 0), atol=0, equal_nan=True)


def test_a_row_to_leave_out_that_the_bank_does_not_have():
    """Of a compiled call, whose values are not checked: it must not read weights that are not there."""
    x = torch.randn(20, 4)
    bank = Bank(x, log_weight=torch.randn(20))
    compiled = torch.compile(lambda rows: knn_kde_grad(x, bank, 3, bandwidth=1.0, self_index=rows).truncation, backend="eager")
    for beyond in (20, 10**12):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds|self_index must be below N"):
            compiled(torch.full((20,), beyond))
