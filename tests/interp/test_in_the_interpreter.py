"""Runs each Triton kernel in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ops import OPS

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize("op", OPS)
def test_in_the_interpreter(op, covered):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / f"test_interp_{op}.py")]
    run = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and " skipped" not in run.stdout, run.stdout[-500:]
    covered["tests in Triton's interpreter"] += int(passed[1])
