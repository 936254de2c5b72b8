"""Runs a host entry of tests/simt on nvcc's PTX in place of its fibers: the same launches, arguments and memory."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simt"))

import simt_host  # noqa: E402
from interpreter import Module  # noqa: E402
from toolkit import setup, toolkit  # noqa: E402

EXECUTOR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))


def missing() -> str | None:
    """Why PTX can't be made and run here, or None."""
    return simt_host.missing() or (None if toolkit().home else toolkit().reason)


@functools.cache
def module(entry: str, arch: int, csrc: Path = simt_host.ROOT / "csrc") -> Module:
    """What nvcc makes of tests/simt/<entry>: its kernels are those that the entry launches."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        command = [toolkit().home / "bin/nvcc", *setup.NVCC_FLAGS, f"-I{csrc}", f"-I{csrc / 'simt'}", "-x", "cu"]
        subprocess.run([*command, "-ptx", f"-arch=sm_{arch}", simt_host.HERE / entry, "-o", out], check=True)
        return Module(out.read_text())


@contextmanager
def launches_on(module: Module, library: ctypes.CDLL, regions) -> Iterator[list[str]]:
    """Inside, the library's launches run on the module; yields the kernels launched. regions() gives the memory they may touch. A
    Fault leaves the library by its return code and is raised at the end."""
    launched, faults = [], []

    def execute(kernel, shape, shared, params):
        try:
            name = kernel.decode()
            entry = module.entries[name]
            arguments = [ctypes.string_at(params[i], declared.size) for i, declared in enumerate(entry.params)]
            module.launch(name, tuple(shape[:3]), tuple(shape[3:6]), shared, arguments, regions())
            launched.append(name)
            return 0
        except Exception as fault:  # no exception crosses C++
            faults.append(fault)
            return 1

    executor = EXECUTOR(execute)
    library.simt_options(0, 0, ctypes.cast(executor, ctypes.c_void_p))
    try:
        yield launched
    except RuntimeError:
        if not faults:
            raise
    finally:
        library.simt_options(0, 0, None)
    if faults:
        raise faults[0]
