from collections import Counter

import pytest
import torch

import ltkernels

BACKENDS = ["cpu", "reference"] if ltkernels.build_info()["cpp"] else ["reference"]


def pytest_report_header():
    info = ltkernels.build_info()
    cuda = ", ".join(info["cuda_archs"]) or info["cuda_reason"]
    return f"ltkernels {ltkernels.__version__}: backends under test: {', '.join(BACKENDS)}; CUDA compiled for: {cuda}"


@pytest.fixture(params=[*BACKENDS, pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request):
    """Every backend that this machine can run; the cuda and triton ones need a card."""
    with ltkernels.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    return "cuda" if backend in ("cuda", "triton") else "cpu"


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Without a card the gpu tests are left out by name, not skipped one by one: the header says which backends were tested."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)


_covered = Counter()


@pytest.fixture(scope="session")
def covered():
    """What the layers without a GPU count up and the end of the run prints."""
    return _covered


def pytest_terminal_summary(terminalreporter):
    if _covered:
        terminalreporter.section("shown without a GPU")
        for what, count in sorted(_covered.items()):
            terminalreporter.write_line(f"{count:6d} {what}")
