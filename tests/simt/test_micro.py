"""Every wrapper of ptx.h and everything that host.h offers, on the fibers: in three orders and under the sanitizers."""

import os
import re
import shutil
import subprocess
import sys

import micro
import pytest
import simt_host

pytestmark = pytest.mark.skipif(simt_host.missing() is not None, reason=str(simt_host.missing()))


@pytest.fixture(scope="module")
def library():
    return simt_host.load(simt_host.build(micro.ENTRY))


@pytest.mark.parametrize("kernel", micro.KERNELS)
def test_answers_as_numpy_does(library, kernel, covered):
    given = micro.inputs(kernel)
    for order, seed in simt_host.SCHEDULES:
        simt_host.schedule(library, order, seed)
        micro.judge(kernel, given, *micro.run(library, kernel, given))
        covered["runs in some order of threads"] += 1


def test_covers_every_wrapper():
    text = (simt_host.ROOT / "csrc/simt/ptx.h").read_text()
    wrappers = set(re.findall(r"__forceinline__ \w+ (\w+)\(", text))
    used = (simt_host.HERE / "micro.cuh").read_text()
    assert "mma_tf32" in wrappers and len(wrappers) == text.count("asm volatile(") - 1  # one of them has two forms
    assert all(f"ptx::{name}" in used for name in wrappers), wrappers


@pytest.mark.parametrize("flavour", ["asan", "tsan"])
def test_clean_under(flavour):
    built = simt_host.build(micro.ENTRY, flavour)
    code = (
        "import simt_host, micro, sys; library = simt_host.load(sys.argv[1])\n"
        "for kernel in micro.KERNELS: given = micro.inputs(kernel); micro.judge(kernel, given, *micro.run(library, kernel, given))\n"
        "print('clean')"
    )
    simt_host.assert_clean(simt_host.python(flavour, "-c", code, built))


def test_stands_alone(tmp_path):
    """csrc/simt builds and runs with no other file of the project but its own tests."""
    shutil.copytree(simt_host.ROOT / "csrc/simt", tmp_path / "csrc/simt")
    tests = tmp_path / "tests/simt"
    tests.mkdir(parents=True)
    for name in ("simt_host.py", "micro.py", "micro.cuh", micro.ENTRY):
        shutil.copy(simt_host.HERE / name, tests)
    code = (
        "import simt_host, micro; library = simt_host.load(simt_host.build(micro.ENTRY)); given = micro.inputs('shuffles')\n"
        "micro.judge('shuffles', given, *micro.run(library, 'shuffles', given)); print(simt_host.ROOT)"
    )
    environment = {**os.environ, "LTKERNELS_SIMT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tests, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path), done.stderr
