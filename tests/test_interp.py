"""Runs tests/interp, each Triton kernel in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when triton is
imported."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
INTERP = Path(__file__).parent / "interp"


@pytest.mark.parametrize("file", sorted(INTERP.glob("test_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, env=environment, cwd=INTERP.parent.parent, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout[-500:]
