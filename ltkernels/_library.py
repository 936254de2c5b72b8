"""Finds and loads the compiled part: `_C` (the kernels) and `_build_info` (what was built, and why not more).

It lies beside this file or, where a checkout shadows an installed wheel (`python -m training` puts the checkout first
on sys.path), in the ltkernels/ folder of a later sys.path entry. setup.py executes this file for `csrc_hash`: importing
it does nothing and needs the standard library only.
"""

import functools
import hashlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

HAS_CPP: bool  # the C++ CPU kernels are there
HAS_CUDA: bool  # and the CUDA kernels

_HERE = Path(__file__).resolve().parent
_CSRC = _HERE.parent / "csrc"  # in a checkout only


def csrc_hash(csrc: Path) -> str:
    """Identifies the sources that a compiled part was made from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in {".cpp", ".cu", ".cuh", ".h"}):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def load() -> None:
    """Loads `_C`, whose kernels fill in operators already defined. Does nothing in a pure-Python installation."""
    folder, info = _found()
    if not info["cpp"]:
        return
    if _CSRC.is_dir() and info["csrc_hash"] != csrc_hash(_CSRC):
        warnings.warn(
            f"ltkernels: the compiled part in {folder} was built from another csrc/ than {_CSRC}; "
            f"rebuild it: {_rebuild(folder)}",
            stacklevel=2,
        )
    import torch

    spec = PathFinder.find_spec("ltkernels._C", [str(folder)])
    try:
        torch.ops.load_library(spec.origin if spec else str(folder / "_C"))
    except OSError as error:
        raise ImportError(  # the linker's own words are in the cause
            f"ltkernels: the compiled part does not load: {error.__cause__ or error}. It was built with torch {info['torch']}; installed "
            f"is torch {torch.__version__}. Rebuild it for this torch: {_rebuild(folder)} "
            "(or set LTKERNELS_CPP=0 to do without it)"
        ) from error


def build_info() -> dict:
    """What was built (cpp, cuda, cuda_archs, compiler, nvcc, flags, torch, torch_target, csrc_hash), why not more
    (cpp_reason, cuda_reason), and the folder it was found in."""
    folder, info = _found()
    return {**info, "folder": folder and str(folder)}


@functools.cache
def _found() -> tuple[Path | None, dict]:
    """The folder of the compiled part and its build info; in a checkout, one made from its csrc/ goes before others."""
    if os.environ.get("LTKERNELS_CPP") == "0":
        return None, _nothing("LTKERNELS_CPP=0 is set")
    builds = _builds()
    first = next(builds, None)
    if first is None:
        return None, _nothing("no compiled part was found: run `pip install .` in the source folder")
    wanted = csrc_hash(_CSRC) if _CSRC.is_dir() else first[1]["csrc_hash"]
    if first[1]["csrc_hash"] == wanted:
        return first
    return next((build for build in builds if build[1]["csrc_hash"] == wanted), first)


def _builds() -> Iterator[tuple[Path, dict]]:
    for folder in dict.fromkeys([_HERE, *(Path(entry).resolve() / "ltkernels" for entry in sys.path)]):
        spec = PathFinder.find_spec("ltkernels._build_info", [str(folder)])
        if spec and spec.loader:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            yield folder, module.build_info()


def _nothing(reason: str) -> dict:
    return {"cpp": False, "cpp_reason": reason, "cuda": False, "cuda_reason": reason, "cuda_archs": []}


def _rebuild(folder: Path) -> str:
    if not _CSRC.is_dir():
        return "pip install --no-build-isolation --no-deps --force-reinstall <source folder of ltkernels>"
    command = "python setup.py build_ext --inplace" if folder == _HERE else "pip install --no-build-isolation --no-deps ."
    return f"cd {_HERE.parent} && {command}"


def __getattr__(name: str) -> bool:
    if name in ("HAS_CPP", "HAS_CUDA"):
        return _found()[1]["cpp" if name == "HAS_CPP" else "cuda"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
