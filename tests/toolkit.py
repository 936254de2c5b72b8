"""The CUDA toolkit of the tests is the one that setup.py would build with."""

import functools
import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)


@functools.cache
def toolkit() -> setup.Cuda:
    """Its `home` is None where there is none, and `reason` says why."""
    return setup.find_cuda({name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}, [])
