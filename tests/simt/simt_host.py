"""Builds kernels for the CPU executor of csrc/simt, from g++ and the headers of a CUDA toolkit alone."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "plain": ["-O2"],
    "asan": [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
}


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
    if shutil.which("g++") is None:
        return "needs g++"
    if cuda_include() is None:
        return "needs the headers of a CUDA toolkit (cuda_runtime.h): nvcc, CUDA_HOME or the nvidia wheels"
    return None


def build(entry: str, flavour: str = "plain") -> Path:
    """tests/simt/<entry> and the runtime as a shared library, cached by the text of everything that goes into it."""
    include = cuda_include()
    sources = [ROOT / "tests" / "simt" / entry, ROOT / "csrc" / "simt" / "runtime.cpp"]
    command = ["g++", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-fPIC", *FLAGS[flavour], f"-isystem{include}"]
    parts = [*sources, *sorted((ROOT / "csrc").rglob("*.cuh")), *sorted((ROOT / "csrc" / "simt").glob("*.h"))]
    digest = hashlib.sha256(repr(command).encode() + b"".join(p.read_bytes() for p in parts)).hexdigest()[:16]
    cache = Path(os.environ.get("LTKERNELS_SIMT_CACHE", Path(tempfile.gettempdir()) / f"ltkernels-simt-{os.getuid()}"))
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{Path(entry).stem}-{flavour}-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            jobs = []
            for source in sources:
                target = Path(folder) / f"{source.stem}.o"
                jobs.append(
                    (
                        target,
                        subprocess.Popen(
                            [*command, "-I", str(ROOT / "csrc" / "simt"), "-c", str(source), "-o", str(target)]
                        ),
                    )
                )
            for target, job in jobs:
                if job.wait():
                    raise RuntimeError(f"g++ failed on {target.stem}")
            linked = Path(folder) / library.name
            subprocess.run([*command, "-shared", *(str(t) for t, _ in jobs), "-o", str(linked)], check=True)
            linked.rename(library)
    return library


def load(entry: str, flavour: str = "plain") -> ctypes.CDLL:
    return ctypes.CDLL(str(build(entry, flavour)))


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs before it can load an asan library."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OPENBLAS_NUM_THREADS": "1",
    }
