"""Every mistake a caller can make is answered by an error that names the op, what was expected and what was given."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import ltkernels
from ltkernels import (
    Bank,
    denoising_target,
    knn,
    knn_bandwidth,
    knn_kde_grad,
    p_sel,
    pairwise_sqdist,
    pcl_loss,
    posterior_mean,
    score_select,
)

Q, X = torch.zeros(5, 3), torch.zeros(32, 3)
BANK = Bank(X)


def kde(queries=Q, bank=X, k=4, **kwargs):
    return knn_kde_grad(queries, bank, k, **{"bandwidth": 1.0, **kwargs})


LABELS, COUNTS = torch.zeros(32, dtype=torch.int64), torch.tensor([7, 3])


def gated(gate="t2h", x=X, **kwargs):
    return score_select(x, X, 1.0, 1.0, gate=gate, **{"labels": LABELS, "class_counts": COUNTS, **kwargs})


FIVE = torch.arange(5)


def pcl(mu=Q, labels=FIVE, **kwargs):
    return pcl_loss(mu, labels, **kwargs)


def across(**kwargs):
    return pcl_loss(Q, FIVE, **{"other": X, "other_labels": LABELS, **kwargs})


WRONG = {
    # shapes
    "queries of one dimension": (lambda: kde(Q[0]), ValueError, "knn_kde_grad: expected queries with 2 dimensions .* got shape (3,)"),
    "queries of three dimensions": (
        lambda: knn(Q[None], X, 4),
        ValueError,
        "knn: expected queries with 2 dimensions .* got shape (1, 5, 3)",
    ),
    "bank of one dimension": (lambda: kde(bank=X[0]), ValueError, "knn_kde_grad: expected bank with 2 dimensions .* got shape (3,)"),
    "bank without rows": (lambda: kde(bank=X[:0]), ValueError, "knn_kde_grad: expected a bank of at least one point; got shape (0, 3)"),
    "no columns": (lambda: knn(Q[:, :0], X[:, :0], 4), ValueError, "knn: expected queries with at least one column; got shape (5, 0)"),
    "columns differ": (lambda: kde(Q[:, :2]), ValueError, "knn_kde_grad: expected .* same number of columns; got (5, 2) and (32, 3)"),
    # dtypes and kinds
    "integer queries": (lambda: kde(Q.long()), TypeError, "knn_kde_grad: expected queries in float16, .* got torch.int64"),
    "complex bank": (lambda: Bank(X.cfloat()), TypeError, "Bank: expected points in float16, .* got torch.complex64"),
    "mixed dtypes": (lambda: kde(Q.double()), TypeError, "knn_kde_grad: expected .* of one dtype; got torch.float64 and torch.float32"),
    "half queries, single bank": (
        lambda: knn(Q.half(), BANK, 4),
        TypeError,
        "knn: expected .* one dtype; got torch.float16 and torch.float32",
    ),
    "NumPy float64 against float32": (lambda: kde(Q.double().numpy()), TypeError, "knn_kde_grad: .* got torch.float64 and torch.float32"),
    "a list": (lambda: kde([[0.0, 0, 0]]), TypeError, "knn_kde_grad: expected queries as a torch tensor or an array .* got list"),
    "a string for the queries": (lambda: kde("zero"), TypeError, "knn_kde_grad: expected queries as a torch tensor .* got str"),
    "None for the bank": (lambda: kde(bank=None), TypeError, "knn_kde_grad: expected bank as a torch tensor .* got NoneType"),
    "array of objects": (lambda: knn(np.array([["a"]]), X, 4), TypeError, "knn: expected queries as a numeric array .* got dtype <U1"),
    # devices
    "devices differ": (lambda: kde(Q.to("meta")), ValueError, "knn_kde_grad: expected .* on one device; got meta and cpu"),
    "self_index elsewhere": (
        lambda: kde(self_index=torch.zeros(5, dtype=torch.int64, device="meta")),
        ValueError,
        "knn_kde_grad: expected self_index on the device of the queries, cpu; got meta",
    ),
    "bandwidth elsewhere": (
        lambda: kde(bandwidth=torch.ones(5, device="meta")),
        ValueError,
        "knn_kde_grad: expected bandwidth on the device of the queries, cpu; got meta",
    ),
    # k
    "k = 0": (lambda: kde(k=0), ValueError, "knn_kde_grad: k must be in [1, N]; got k=0 with N=32"),
    "k < 0": (lambda: knn(Q, X, -3), ValueError, "knn: k must be in [1, N]; got k=-3 with N=32"),
    "k > N": (lambda: kde(k=50), ValueError, "knn_kde_grad: k must be in [1, N]; got k=50 with N=32"),
    "fractional k": (lambda: kde(k=4.0), TypeError, "knn_kde_grad: k must be an int; got float"),
    "k = True": (lambda: knn(Q, X, True), TypeError, "knn: k must be an int; got bool"),
    "k as a string": (lambda: knn(Q, X, "4"), TypeError, "knn: k must be an int; got str"),
    "k = N without oneself": (lambda: knn(X, X, 32, self_index=True), ValueError, "knn: k must be in [1, N-1] .* got k=32 with N=32"),
    # self_index
    "self_index=True, Q != N": (lambda: kde(self_index=True), ValueError, "knn_kde_grad: self_index=True needs .* got Q=5 and N=32"),
    "self_index too short": (
        lambda: kde(self_index=torch.zeros(4, dtype=torch.int64)),
        ValueError,
        "knn_kde_grad: expected self_index as True or an int64 tensor of shape (5,); got torch.int64 of shape (4,)",
    ),
    "self_index in int32": (
        lambda: knn(Q, X, 4, self_index=torch.zeros(5, dtype=torch.int32)),
        ValueError,
        "knn: expected self_index as True or an int64 tensor of shape (5,); got torch.int32 of shape (5,)",
    ),
    "self_index out of range": (
        lambda: knn(Q, X, 4, self_index=torch.full((5,), 32)),
        ValueError,
        "knn: self_index must be in [-1, N); got 32 .. 32 with N=32",
    ),
    "self_index as a string": (lambda: knn(Q, X, 4, self_index="all"), TypeError, "knn: expected self_index as a torch tensor .* got str"),
    # bandwidth
    "bandwidth 0": (lambda: kde(bandwidth=0), ValueError, "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got 0"),
    "bandwidth < 0": (
        lambda: kde(bandwidth=-1.5),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got -1.5",
    ),
    "bandwidth NaN": (
        lambda: kde(bandwidth=math.nan),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got nan",
    ),
    "bandwidth below float32": (
        lambda: kde(bandwidth=1e-50),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got 1e-50",
    ),
    "bandwidth above float32": (
        lambda: kde(bandwidth=1e39),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got 1e+39",
    ),
    "float64 bandwidth below float32": (
        lambda: kde(bandwidth=torch.tensor(1e-50, dtype=torch.float64)),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got 1e-50",
    ),
    "bandwidth inf": (
        lambda: kde(bandwidth=math.inf),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got inf",
    ),
    "one bandwidth NaN": (
        lambda: kde(bandwidth=torch.tensor([1.0, 1, math.nan, 1, 1])),
        ValueError,
        "knn_kde_grad: bandwidth must be positive and finite in torch.float32; got nan",
    ),
    "bandwidths too few": (lambda: kde(bandwidth=torch.ones(4)), ValueError, "knn_kde_grad: bandwidth must be .* got shape (4,) with Q=5"),
    "bandwidth a matrix": (lambda: kde(bandwidth=torch.ones(5, 1)), ValueError, "knn_kde_grad: bandwidth .* got shape (5, 1) with Q=5"),
    "bandwidth in integers": (lambda: kde(bandwidth=torch.ones(5).long()), TypeError, "knn_kde_grad: bandwidth .* got torch.int64"),
    "bandwidth a string": (lambda: kde(bandwidth="scott"), TypeError, "knn_kde_grad: bandwidth must be a number, .* got str"),
    # names
    "kernel_norm misspelt": (
        lambda: kde(kernel_norm="mass"),
        ValueError,
        "knn_kde_grad: kernel_norm must be one of peak, density; got 'mass'",
    ),
    "rule misspelt": (
        lambda: knn_bandwidth(X, rule="median"),
        ValueError,
        "knn_bandwidth: rule must be one of knn-median, scott; got 'median'",
    ),
    "backend misspelt": (
        lambda: ltkernels.backend("gpu").__enter__(),
        ValueError,
        "backend: expected one of cpu, cuda, triton, reference; got 'gpu'",
    ),
    "rho < 0": (lambda: kde().potential(-1), ValueError, "KDE.potential: rho must be a finite number >= 0; got -1"),
    "rho NaN": (lambda: kde().potential(math.nan), ValueError, "KDE.potential: rho must be a finite number >= 0; got nan"),
    "rho a string": (lambda: kde().potential("5%"), ValueError, "KDE.potential: rho must be a finite number >= 0; got '5%'"),
    # bandwidth rules without an answer
    "identical rows": (lambda: knn_bandwidth(X, 4), ValueError, "knn_bandwidth: rule 'knn-median' gives 0.0; .* identical rows"),
    "one row": (lambda: knn_bandwidth(X[:1], 1), ValueError, "knn_bandwidth: k must be in [1, N-1] .* got k=1 with N=1"),
    "all rows NaN": (lambda: knn_bandwidth(X * math.nan, 4), ValueError, "knn_bandwidth: rule 'knn-median' gives nan; .* too few finite"),
    "k > N for the rule": (lambda: knn_bandwidth(X), ValueError, "knn_bandwidth: k must be in [1, N]; got k=64 with N=32"),
    # weights
    "weights too few": (lambda: Bank(X, log_weight=torch.zeros(3)), ValueError, "Bank: expected log_weight with .* shape (32,); got (3,)"),
    "weights in integers": (lambda: Bank(X, log_weight=torch.zeros(32).long()), TypeError, "Bank: expected log_weight .* got torch.int64"),
    "weights NaN": (
        lambda: Bank(X, log_weight=torch.full((32,), math.nan)),
        ValueError,
        "Bank: expected log_weight below infinity .* is nan",
    ),
    "weights all zero": (lambda: Bank(X, log_weight=torch.full((32,), -math.inf)), ValueError, "Bank: expected log_weight .* is -inf"),
    "weights infinite": (lambda: Bank(X, log_weight=torch.full((32,), math.inf)), ValueError, "Bank: expected log_weight .* is inf"),
    # update
    "update of another shape": (lambda: Bank(X).update(X[:9]), ValueError, "Bank.update: expected points of the same shape .* (32, 3)"),
    "update in another dtype": (
        lambda: Bank(X).update(X.double()),
        ValueError,
        "Bank.update: expected points of the same dtype .* float64",
    ),
    # files
    "no such file": (lambda: Bank("nowhere.safetensors"), FileNotFoundError, "Bank: no such file: nowhere.safetensors"),
    "another kind of file": (lambda: Bank("points.npy"), ValueError, "Bank: expected a .safetensors file; got points.npy"),
    "load of another kind of file": (lambda: Bank.load("points.pt"), ValueError, "Bank: expected a .safetensors file; got points.pt"),
    # backends
    "cuda on CPU tensors": (
        lambda: on("cuda"),
        RuntimeError,
        "knn: backend 'cuda' is not available here: it runs on CUDA tensors; got cpu",
    ),
    "triton on CPU tensors": (lambda: on("triton"), RuntimeError, "knn: backend 'triton' is not available here: .* TRITON_INTERPRET=1"),
    # selections: samples
    "x_t of one dimension": (lambda: p_sel(Q[0], X, 1, 1), ValueError, "p_sel: expected x_t of shape (rows, ...) .* got (3,)"),
    "x_t without elements": (
        lambda: p_sel(Q[:, :0], X[:, :0], 1, 1),
        ValueError,
        "p_sel: expected x_t .* at least one element a row; got (5, 0)",
    ),
    "clean without rows": (
        lambda: score_select(Q, X[:0], 1, 1),
        ValueError,
        "score_select: expected clean with at least one row; got shape (0, 3)",
    ),
    "elements differ": (
        lambda: posterior_mean(Q[:, :2], X, 1, 1),
        ValueError,
        "posterior_mean: expected x_t and clean with as many elements a row; got (5, 2) and (32, 3)",
    ),
    "integer x_t": (lambda: p_sel(Q.long(), X, 1, 1), TypeError, "p_sel: expected x_t in float16, .* got torch.int64"),
    "half x_t, single clean": (
        lambda: p_sel(Q.half(), X, 1, 1),
        TypeError,
        "p_sel: expected x_t and clean of one dtype; got torch.float16 and torch.float32",
    ),
    "half x_t, single Bank": (
        lambda: score_select(Q.half(), BANK, 1, 1),
        TypeError,
        "score_select: expected .* of one dtype; got torch.float16",
    ),
    "x_t elsewhere": (lambda: p_sel(Q.to("meta"), X, 1, 1), ValueError, "p_sel: expected x_t and clean on one device; got meta and cpu"),
    "a list for clean": (lambda: p_sel(Q, [[0.0]], 1, 1), TypeError, "p_sel: expected clean as a torch tensor .* got list"),
    "x0 of another shape": (
        lambda: denoising_target(Q, X[:4], 1, 1),
        ValueError,
        "denoising_target: expected x0 in the shape of x_t, (5, 3); got (4, 3)",
    ),
    # selections: scale and std
    "std 0": (lambda: p_sel(Q, X, 1, 0), ValueError, "p_sel: std must be positive in torch.float32; got 0"),
    "std < 0": (lambda: score_select(Q, X, 1, -0.5), ValueError, "score_select: std must be positive in torch.float32; got -0.5"),
    "std below float32": (
        lambda: posterior_mean(Q, X, 1, 1e-60),
        ValueError,
        "posterior_mean: std must be positive in torch.float32; got 1e-60",
    ),
    "std NaN": (lambda: p_sel(Q, X, 1, math.nan), ValueError, "p_sel: std must be finite in torch.float32; got nan"),
    "one std 0": (
        lambda: p_sel(Q, X, 1, torch.tensor([1.0, 1, 0, 1, 1])),
        ValueError,
        "p_sel: std must be positive in torch.float32; got 0.0",
    ),
    "scale infinite": (lambda: p_sel(Q, X, math.inf, 1), ValueError, "p_sel: scale must be finite in torch.float32; got inf"),
    "scale above float32": (lambda: p_sel(Q, X, 1e39, 1), ValueError, "p_sel: scale must be finite in torch.float32; got 1e+39"),
    "one scale NaN": (
        lambda: p_sel(Q, X, torch.tensor([1.0, 1, math.nan, 1, 1]), 1),
        ValueError,
        "p_sel: scale must be finite in torch.float32; got nan",
    ),
    "scales too few": (lambda: p_sel(Q, X, torch.ones(4), 1), ValueError, "p_sel: scale must be a number, .* got shape (4,) with B=5"),
    "std a row": (lambda: p_sel(Q, X, 1, torch.ones(1, 5)), ValueError, "p_sel: std must be a number, .* got shape (1, 5) with B=5"),
    "std in integers": (
        lambda: p_sel(Q, X, 1, torch.ones(5).long()),
        TypeError,
        "p_sel: std must be in a floating-point dtype; got torch.int64",
    ),
    "std a string": (lambda: p_sel(Q, X, 1, "80"), TypeError, "p_sel: expected std as a torch tensor .* got str"),
    "std elsewhere": (
        lambda: p_sel(Q, X, 1, torch.ones(5, device="meta")),
        ValueError,
        "p_sel: expected std on the device of x_t, cpu; got meta",
    ),
    # selections: priors
    "priors too few": (
        lambda: p_sel(Q, X, 1, 1, log_prior=torch.zeros(5)),
        ValueError,
        "p_sel: expected log_prior .* shape (32,); got (5,)",
    ),
    "priors in integers": (
        lambda: p_sel(Q, X, 1, 1, log_prior=LABELS),
        TypeError,
        "p_sel: expected log_prior in a floating-point dtype; got torch.int64",
    ),
    "prior infinite": (
        lambda: p_sel(Q, X, 1, 1, log_prior=torch.full((32,), math.inf)),
        ValueError,
        "p_sel: log_prior must be below infinity in torch.float32; got inf",
    ),
    "prior NaN": (
        lambda: score_select(Q, X, 1, 1, log_prior=torch.full((32,), math.nan)),
        ValueError,
        "score_select: log_prior must be below infinity in torch.float32; got nan",
    ),
    "prior and weights": (
        lambda: p_sel(Q, Bank(X, log_weight=torch.zeros(32)), 1, 1, log_prior=torch.zeros(32)),
        ValueError,
        "p_sel: give log_prior or a Bank with log_weight, not both",
    ),
    # selections: gates
    "gate misspelt": (lambda: gated("h2h"), ValueError, "score_select: gate must be one of full, t2h, h2t; got 'h2h'"),
    "gate without labels": (lambda: gated(labels=None), ValueError, "score_select: gate 't2h' needs labels; got None"),
    "gate without counts": (lambda: gated("h2t", class_counts=None), ValueError, "score_select: gate 'h2t' needs class_counts; got None"),
    "labels too few": (
        lambda: gated(labels=LABELS[:5]),
        ValueError,
        "score_select: expected labels as an int64 tensor of shape (32,); got .* (5,)",
    ),
    "labels in float": (
        lambda: gated(labels=LABELS.float()),
        ValueError,
        "score_select: expected labels as an int64 tensor .* got torch.float32",
    ),
    "label without a count": (lambda: gated(labels=LABELS + 2), ValueError, "score_select: labels must be in [0, 2); got 2 .. 2"),
    "label -1": (lambda: gated(labels=LABELS - 1), ValueError, "score_select: labels must be in [0, 2); got -1 .. -1"),
    "counts a matrix": (
        lambda: gated(class_counts=COUNTS[None]),
        ValueError,
        "score_select: expected class_counts of shape (C,), .* got shape (1, 2)",
    ),
    "no counts": (lambda: gated(class_counts=[]), ValueError, "score_select: expected class_counts of shape (C,), .* got shape (0,)"),
    "count < 0": (lambda: gated(class_counts=[7, -3]), ValueError, "score_select: class_counts must be >= 0; got -3"),
    "counts a string": (lambda: gated(class_counts="7, 3"), TypeError, "score_select: expected class_counts as a torch tensor .* got str"),
    "self_labels too few": (
        lambda: gated(self_labels=LABELS[:5]),
        ValueError,
        "score_select: expected self_labels as an int64 tensor of shape (32,); got .* (5,)",
    ),
    "self_label without a count": (
        lambda: gated(self_labels=LABELS + 2),
        ValueError,
        "score_select: self_labels must be in [0, 2); got 2 .. 2",
    ),
    # selections: whose row
    "gate without self_index": (
        lambda: gated(x=Q),
        ValueError,
        "score_select: self_index is required for gate 't2h' where B != K; got B=5 and K=32",
    ),
    "own row out of range": (
        lambda: gated(x=Q, self_index=torch.full((5,), 32)),
        ValueError,
        "score_select: self_index must be in [0, 32); got 32 .. 32",
    ),
    "own row -1 at a gate": (
        lambda: gated(x=Q, self_index=torch.full((5,), -1)),
        ValueError,
        "score_select: self_index must be in [0, 32); got -1 .. -1",
    ),
    "own rows in int32": (
        lambda: score_select(Q, X, 1, 1, self_index=torch.zeros(5, dtype=torch.int32)),
        ValueError,
        "score_select: expected self_index as an int64 tensor of shape (5,); got torch.int32 of shape (5,)",
    ),
    # selections: numbers
    "seed a float": (lambda: score_select(Q, X, 1, 1, seed=1.0), TypeError, "score_select: seed must be an int, .* got float"),
    "seed of shape (1,)": (
        lambda: score_select(Q, X, 1, 1, seed=torch.tensor([1])),
        TypeError,
        "score_select: seed must be an int, .* got torch.int64 of shape (1,)",
    ),
    "seed beyond 64 bits": (
        lambda: score_select(Q, X, 1, 1, seed=2**64),
        ValueError,
        "score_select: seed must fit 64 bits; got 18446744073709551616",
    ),
    "row_offset < 0": (
        lambda: score_select(Q, X, 1, 1, row_offset=-1), ValueError, "score_select: row_offset must be an int in [0, 2^63); got -1"
    ),
    "row_offset a float": (
        lambda: score_select(Q, X, 1, 1, row_offset=1.0),
        ValueError,
        "score_select: row_offset must be an int in [0, 2^63); got 1.0",
    ),
    "prediction misspelt": (
        lambda: denoising_target(Q, Q, 1, 1, prediction="eps"),
        ValueError,
        "denoising_target: prediction must be one of epsilon, v, x0, flow; got 'eps'",
    ),
    "cuda on CPU samples": (
        lambda: on("cuda", lambda: p_sel(Q, X, 1, 1)),
        RuntimeError,
        "p_sel: backend 'cuda' is not available here: it runs on CUDA tensors; got cpu",
    ),
    # pairs: distances
    "x of one dimension": (
        lambda: pairwise_sqdist(Q[0]),
        ValueError,
        "pairwise_sqdist: expected x of shape (rows, ...) .* got (3,)",
    ),
    "y without elements": (
        lambda: pairwise_sqdist(Q, X[:, :0]),
        ValueError,
        "pairwise_sqdist: expected y .* at least one element a row; got (32, 0)",
    ),
    "elements of x and y differ": (
        lambda: pairwise_sqdist(Q, X[:, :2]),
        ValueError,
        "pairwise_sqdist: expected x and y with as many elements a row; got 3 and 2",
    ),
    "integer x": (lambda: pairwise_sqdist(Q.long()), TypeError, "pairwise_sqdist: expected x in float16, .* got torch.int64"),
    "half x, single y": (
        lambda: pairwise_sqdist(Q.half(), X),
        TypeError,
        "pairwise_sqdist: expected x and y of one dtype; got torch.float16 and torch.float32",
    ),
    "y elsewhere": (
        lambda: pairwise_sqdist(Q, X.to("meta")),
        ValueError,
        "pairwise_sqdist: expected x and y on one device; got cpu and meta",
    ),
    "a list for y": (lambda: pairwise_sqdist(Q, [[0.0]]), TypeError, "pairwise_sqdist: expected y as a torch tensor .* got list"),
    "distances by cuda on CPU tensors": (
        lambda: on("cuda", lambda: pairwise_sqdist(Q)),
        RuntimeError,
        "pairwise_sqdist: backend 'cuda' is not available here: it runs on CUDA tensors; got cpu",
    ),
    # pairs: rows and labels
    "mu of one dimension": (lambda: pcl(Q[0]), ValueError, "pcl_loss: expected mu of shape (rows, ...) .* got (3,)"),
    "mu without elements": (lambda: pcl(Q[:, :0]), ValueError, "pcl_loss: expected mu .* at least one element a row; got (5, 0)"),
    "complex mu": (lambda: pcl(Q.cfloat()), TypeError, "pcl_loss: expected mu in float16, .* got torch.complex64"),
    "None for mu": (lambda: pcl(None), TypeError, "pcl_loss: expected mu as a torch tensor .* got NoneType"),
    "pcl labels too few": (
        lambda: pcl(labels=FIVE[:4]),
        ValueError,
        "pcl_loss: expected labels as an int64 tensor of shape (5,); got torch.int64 of shape (4,)",
    ),
    "pcl labels a column": (lambda: pcl(labels=FIVE[:, None]), ValueError, "pcl_loss: expected labels .* of shape (5,); got .* (5, 1)"),
    "pcl labels in float": (lambda: pcl(labels=FIVE.float()), ValueError, "pcl_loss: expected labels .* got torch.float32 of shape (5,)"),
    "pcl labels in int32": (lambda: pcl(labels=FIVE.int()), ValueError, "pcl_loss: expected labels .* got torch.int32 of shape (5,)"),
    "pcl labels elsewhere": (
        lambda: pcl(labels=FIVE.to("meta")),
        ValueError,
        "pcl_loss: expected labels on the device of its rows, cpu; got meta",
    ),
    "pcl labels a list": (lambda: pcl(labels=[0, 1, 2, 3, 4]), TypeError, "pcl_loss: expected labels as a torch tensor .* got list"),
    "groups too many": (lambda: pcl(group=LABELS), ValueError, "pcl_loss: expected group as an int64 tensor of shape (5,); got .* (32,)"),
    # pairs: names
    "form misspelt": (
        lambda: pcl(form="exp"),
        ValueError,
        "pcl_loss: form must be one of exponential, reciprocal, hinge, negative_l2; got 'exp'",
    ),
    "distance misspelt": (lambda: pcl(distance="l2"), ValueError, "pcl_loss: distance must be one of mean, sum; got 'l2'"),
    "no reduction": (lambda: pcl(reduction=None), ValueError, "pcl_loss: reduction must be one of mean, sum; got None"),
    # pairs: numbers
    "hinge without a margin": (
        lambda: pcl(form="hinge"),
        ValueError,
        "pcl_loss: form 'hinge' needs a margin and no other form takes it; got none with form 'hinge'",
    ),
    "a margin for another form": (
        lambda: pcl(margin=torch.ones(5)),
        ValueError,
        "pcl_loss: form 'hinge' needs a margin and no other form takes it; got one with form 'exponential'",
    ),
    "margin NaN": (lambda: pcl(form="hinge", margin=math.nan), ValueError, "pcl_loss: margin must be finite in torch.float32; got nan"),
    "one margin infinite": (
        lambda: pcl(form="hinge", margin=torch.tensor([1, 1, math.inf, 1, 1])),
        ValueError,
        "pcl_loss: margin must be finite in torch.float32; got inf",
    ),
    "margins too few": (
        lambda: pcl(form="hinge", margin=torch.ones(4)),
        ValueError,
        "pcl_loss: margin must be a number, a 0-dim tensor or (B,); got shape (4,) with B=5",
    ),
    "margin a string": (lambda: pcl(form="hinge", margin="2"), TypeError, "pcl_loss: expected margin as a torch tensor .* got str"),
    "sample_weight above float32": (
        lambda: pcl(sample_weight=1e39),
        ValueError,
        "pcl_loss: sample_weight must be finite in torch.float32; got 1e+39",
    ),
    "sample_weight a bool": (lambda: pcl(sample_weight=True), TypeError, "pcl_loss: expected sample_weight as .* got bool"),
    "sample_weight a matrix": (
        lambda: pcl(sample_weight=torch.ones(5, 5)),
        ValueError,
        "pcl_loss: sample_weight must be .* got shape (5, 5) with B=5",
    ),
    "sample_weight in integers": (
        lambda: pcl(sample_weight=FIVE),
        TypeError,
        "pcl_loss: sample_weight must be in a floating-point dtype; got torch.int64",
    ),
    "sample_weight elsewhere": (
        lambda: pcl(sample_weight=torch.ones(5, device="meta")),
        ValueError,
        "pcl_loss: expected sample_weight on the device of mu, cpu; got meta",
    ),
    # pairs: other rows
    "other without labels": (lambda: across(other_labels=None), ValueError, "pcl_loss: other needs other_labels; got None"),
    "other_labels without other": (lambda: pcl(other_labels=FIVE), ValueError, "pcl_loss: other_labels needs other; got other=None"),
    "other_group without other": (
        lambda: pcl(group=FIVE, other_group=FIVE),
        ValueError,
        "pcl_loss: other_group needs other; got other=None",
    ),
    "other_labels too few": (
        lambda: across(other_labels=FIVE),
        ValueError,
        "pcl_loss: expected other_labels as an int64 tensor of shape (32,); got torch.int64 of shape (5,)",
    ),
    "group of one side": (lambda: across(group=FIVE), ValueError, "pcl_loss: with other, group needs other_group; got other_group=None"),
    "group of the other side": (
        lambda: across(other_group=LABELS),
        ValueError,
        "pcl_loss: with other, other_group needs group; got group=None",
    ),
    "elements of other differ": (
        lambda: across(other=X[:, :2]),
        ValueError,
        "pcl_loss: expected mu and other with as many elements a row; got 3 and 2",
    ),
    "double other": (
        lambda: across(other=X.double()),
        TypeError,
        "pcl_loss: expected mu and other of one dtype; got torch.float32 and torch.float64",
    ),
    "other elsewhere": (lambda: across(other=X.to("meta")), ValueError, "pcl_loss: expected mu and other on one device; got cpu and meta"),
    "pcl by triton on CPU tensors": (
        lambda: on("triton", pcl),
        RuntimeError,
        "pcl_loss: backend 'triton' is not available here: .* TRITON_INTERPRET=1",
    ),
}  # fmt: skip


def on(name, call=lambda: knn(Q, X, 3)):
    with ltkernels.backend(name):
        return call()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=".*".join(re.escape(part) for part in message.split(" .* "))):
        call()


def test_a_file_without_points(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"weights": X}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"Bank: expected a tensor named 'points' in .*other.safetensors; it has \['weights'\]"):
        Bank(tmp_path / "other.safetensors")


def test_a_broken_file(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="Bank: expected a .safetensors file; .*broken.safetensors is none"):
        Bank(tmp_path / "broken.safetensors")


def test_an_unknown_backend_in_the_environment():
    code = "import torch, ltkernels; ltkernels.knn(torch.zeros(1, 1), torch.zeros(1, 1), 1)"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "LTKERNELS_BACKEND": "gpu"}, capture_output=True, text=True)
    assert run.returncode != 0 and "LTKERNELS_BACKEND: expected one of cpu, cuda, triton, reference; got 'gpu'" in run.stderr
