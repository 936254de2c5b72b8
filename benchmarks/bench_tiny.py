"""Every op on four rows of eight numbers, where what surrounds the kernel is all there is; and what importing ltkernels takes.

    pytest benchmarks --benchmark-only -k tiny

Goal: 25 us a call, 40 where an input requires a gradient, forward alone. torch.cdist of the same rows says what torch itself takes.
"""

import statistics
import subprocess
import sys

import pytest
import torch

import ltkernels

IMPORT = "import time, torch; start = time.perf_counter(); import ltkernels; print(time.perf_counter() - start)"
B, D, K = 4, 8, 2
LABELS = torch.arange(B)
OPS = {
    "knn": lambda x, y: ltkernels.knn(x, y, K),
    "knn_kde_grad": lambda x, y: ltkernels.knn_kde_grad(x, y, K, bandwidth=1.0),
    "p_sel": lambda x, y: ltkernels.p_sel(x, y, 0.8, 0.6),
    "score_select": lambda x, y: ltkernels.score_select(x, y, 0.8, 0.6, seed=0),
    "posterior_mean": lambda x, y: ltkernels.posterior_mean(x, y, 0.8, 0.6),
    "denoising_target": lambda x, y: ltkernels.denoising_target(x, y, 0.8, 0.6, prediction="epsilon"),
    "pairwise_sqdist": lambda x, y: ltkernels.pairwise_sqdist(x, y),
    "pcl_loss": lambda x, y: ltkernels.pcl_loss(x, LABELS),
    "torch.cdist": lambda x, y: torch.cdist(x, y),
}


@pytest.mark.parametrize("grad", [False, True], ids=["without grad", "with grad"])
@pytest.mark.parametrize("name", OPS)
def test_tiny(name, grad, benchmark):
    x, y = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(grad)
    if name.startswith("knn"):
        y = ltkernels.Bank(y)
    benchmark.group = f"tiny B={B} D={D} {'with' if grad else 'without'} grad cpu, {torch.get_num_threads()} threads"
    # seconds: on a virtual machine everything may take twice as long for one, and the median should not be of that one alone
    benchmark.pedantic(OPS[name], (x, y), rounds=800, iterations=200, warmup_rounds=2)


@pytest.mark.parametrize("name", ["import"])
def test_tiny_import(name, benchmark):
    """Beyond `import torch`, each in a process of its own, which says how long it took."""
    benchmark.group = f"import ltkernels cpu, {torch.get_num_threads()} threads"
    seconds = []
    command = [sys.executable, "-c", IMPORT]
    benchmark.pedantic(lambda: seconds.append(float(subprocess.check_output(command))), rounds=5, warmup_rounds=1)
    benchmark.extra_info["seconds"] = statistics.median(seconds[1:])
