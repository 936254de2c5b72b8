"""Builds kernels for the CPU executor of csrc/simt, from g++ and the headers of a CUDA toolkit alone."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 0), ("random", 1), ("random", 2)]
# flavour -> flags of everything, of the kernels alone, of the runtime alone
FLAGS = {
    "plain": (["-O2"], [], []),
    "asan": (["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"], [], []),
    # the runtime moves data between fibers: instrumented, a shuffle would look like a race
    "tsan": (["-O1", "-g1"], ["-fsanitize=thread"], ["-DSIMT_TSAN"]),
}
SANITIZERS = {"plain": [], "asan": ["asan", "ubsan"], "tsan": ["tsan"]}  # libraries that must be in the process before Python


class SanitizerBroken(RuntimeError):
    """The sanitizer itself fails, so it has found nothing and cleared nothing."""


@functools.cache
def cuda_include() -> Path | None:
    """The directory of cuda_runtime.h, or None."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc on PATH may be a script that calls the real one, which alone knows where it lives.
        dry = subprocess.run([nvcc, "-v", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.+)$", dry.stderr, re.M)]
        homes.append(Path(nvcc).resolve().parent.parent)
    found = importlib.util.find_spec("nvidia")
    wheels = [Path(p) / "cu13" for p in (found.submodule_search_locations or [])] if found else []
    for home in [*homes, *wheels]:
        for include in (home / "include", home / "targets" / "x86_64-linux" / "include"):
            if (include / "cuda_runtime.h").is_file() and (include / "cuda_fp16.h").is_file():
                return include.resolve()
    return None


def missing() -> str | None:
    """Why the executor can't be built here, or None."""
    if platform.machine() != "x86_64":
        return "needs an x86-64 processor: the fibers are switched by its assembly"
    if shutil.which("g++") is None:
        return "needs g++"
    if cuda_include() is None:
        return "needs the headers of a CUDA toolkit (cuda_runtime.h): nvcc, CUDA_HOME or the nvidia wheels"
    return None


def build(entry: str, flavour: str = "plain", tests: Path = HERE, csrc: Path = ROOT / "csrc") -> Path:
    """tests/simt/<entry> and the runtime as a shared library, cached by the text of everything that goes into it."""
    common, for_kernels, for_runtime = FLAGS[flavour]
    command = ["g++", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-fPIC", *common, f"-isystem{cuda_include()}", f"-I{csrc / 'simt'}"]
    command += [f"-I{csrc}"]
    sources = {tests / entry: for_kernels, csrc / "simt" / "runtime.cpp": for_runtime}
    parts = [*sources, *sorted(tests.glob("*.cuh")), *(path for path in sorted(csrc.rglob("*.*")) if path.suffix in (".cuh", ".h"))]
    digest = hashlib.sha256(repr((command, for_kernels)).encode() + b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]
    cache = Path(os.environ.get("LTKERNELS_SIMT_CACHE", Path(tempfile.gettempdir()) / f"ltkernels-simt-{os.getuid()}"))
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{Path(entry).stem}-{flavour}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            jobs = [
                subprocess.Popen([*command, *extra, "-c", str(source), "-o", str(target)])
                for (source, extra), target in zip(sources.items(), objects, strict=True)
            ]
            if any([job.wait() for job in jobs]):
                raise RuntimeError(f"g++ failed on {entry}")
            linked = Path(folder) / library.name
            subprocess.run([*command, *for_kernels, "-shared", *map(str, objects), "-o", str(linked)], check=True)
            linked.rename(library)
    return library


def edited(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc/ in which the one place of `file` that reads `old` reads `new`."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} should have {old!r} once; it has it {text.count(old)} times")
    (csrc / file).write_text(text.replace(old, new))
    return csrc


def load(built: str | Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(built))
    library.simt_error.restype = ctypes.c_char_p
    library.simt_options.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p]
    return library


def schedule(library: ctypes.CDLL, order: str, seed: int = 0) -> None:
    """In which order the launches to come run their threads."""
    library.simt_options(ORDERS[order], seed, None)


def python(flavour: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """A Python process that can load a library of this flavour. It cannot build one: compilers do not run under a sanitizer."""
    paths = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in SANITIZERS[flavour]
    ]
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=0 report_thread_leaks=0 history_size=7",
        "OPENBLAS_NUM_THREADS": "1",  # its threads would be ThreadSanitizer's business
    }
    command = ["env", f"LD_PRELOAD={' '.join(paths)}", sys.executable, *arguments]  # for Python alone: setarch could not start with it
    if flavour == "tsan" and fixed_addresses():
        command = ["setarch", platform.machine(), "-R", *command]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)
    silent = not any(word in done.stderr for word in ("WARNING: ThreadSanitizer", "ERROR: AddressSanitizer", "runtime error"))
    if silent and flavour != "plain" and ("FATAL: " in done.stderr or done.returncode < 0):
        why = done.stderr.strip() or f"signal {-done.returncode}"
        raise SanitizerBroken(f"the sanitizers of {flavour} do not run on this machine, which says nothing of the kernels: {why}")
    return done


@functools.cache
def fixed_addresses() -> bool:
    """Whether address-space randomisation can be left out here: ThreadSanitizer wants its shadow where it may put the process."""
    return shutil.which("setarch") is not None and subprocess.run(["setarch", platform.machine(), "-R", "true"]).returncode == 0


def assert_clean(done: subprocess.CompletedProcess) -> None:
    """It printed `clean` and no sanitizer had anything to say."""
    report = done.stdout[-2000:] + done.stderr[:6000]
    assert done.returncode == 0 and done.stdout.strip().endswith("clean"), report
    assert not any(word in done.stderr for word in ("AddressSanitizer", "ThreadSanitizer", "runtime error")), report
