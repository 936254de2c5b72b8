"""Builds ltkernels/_C (the kernels) and ltkernels/_build_info (what was built, and why not more).

What can be built is decided here, once, from the machine and these variables; everything else is in pyproject.toml.
    LTKERNELS_CPP=0         no C++: a pure-Python package (=1 insists on C++)
    LTKERNELS_CUDA=0 | 1    skip or insist on the CUDA kernels (FORCE_CUDA=1 insists, too)
    CUDA_HOME               the toolkit to use; then nvcc on PATH, then NVIDIA's nvcc wheel
    TORCH_CUDA_ARCH_LIST    default 8.0;9.0;10.0;12.0+PTX, less what nvcc does not know
    CXX, MAX_JOBS, NVCC_APPEND_FLAGS    as ever
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)  # the oldest torch whose stable ABI has all that csrc/ uses
TORCH_MACRO = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-DUSE_CUDA", TORCH_MACRO]  # USE_CUDA declares aoti_torch_get_current_cuda_stream
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
GET_NVCC = "set CUDA_HOME to a CUDA toolkit, or `pip install 'cuda-toolkit[nvcc,cccl]'`"


class Torch(NamedTuple):
    version: str
    cuda: str | None  # the CUDA version it was built for


class Cuda(NamedTuple):
    home: Path | None  # None: no CUDA kernels
    reason: str
    version: str | None = None  # nvcc's
    arch_list: str = ""  # in the notation of TORCH_CUDA_ARCH_LIST


def switch(env: Mapping[str, str], name: str) -> bool | None:
    """True insists, False skips, None takes what the machine offers."""
    value = env.get(name) or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"ltkernels: {name} must be 0, 1 or auto; got {value!r}")
    return None if value == "auto" else value == "1"


def ask(*command: object, text: str = "") -> tuple[bool, str]:
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([str(word) for word in command], input=text, text=True, **both)
    return done.returncode == 0, done.stdout


def complaint(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


# ---- the toolkit


def cudart(home: Path) -> Path | None:
    # NVIDIA's wheels have libcudart.so.13 and no libcudart.so, so the linker is given the file instead of -lcudart
    for folder in ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib"):
        if found := sorted(home.glob(f"{folder}/libcudart.so*")):
            return found[0]
    return None


def toolkit_defect(home: Path) -> str | None:
    """What `home` lacks to be a CUDA toolkit; None if it is one."""
    if not (home / "bin/nvcc").is_file():
        return f"{home} has no bin/nvcc"
    if not any(next(home.glob(f"{folder}/cuda_runtime.h"), None) for folder in ("include", "targets/*/include")):
        return f"{home} has no include/cuda_runtime.h"
    return None if cudart(home) else f"{home} has no lib64/libcudart.so"


def toolkit_candidates(env: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            yield name, Path(env[name])
    if nvcc := shutil.which("nvcc", path=env.get("PATH", "")):
        yield "PATH", Path(nvcc).resolve().parent.parent
        # a wrapper script lies elsewhere than its toolkit; nvcc itself knows where it is
        if top := re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "--dryrun", "-x", "cu", os.devnull)[1], re.MULTILINE):
            yield "PATH", Path(top[1].strip()).resolve()
    # an isolated build does not have the environment it builds for on sys.path
    for site in dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        for nvcc in sorted(Path(site).glob("nvidia/*/bin/nvcc")):
            yield "NVIDIA's wheel", nvcc.parent.parent


def find_toolkit(env: Mapping[str, str]) -> tuple[Path | None, str]:
    """The first complete toolkit and how it was found, or None and what was wrong with each candidate."""
    rejected: list[str] = []
    for origin, home in toolkit_candidates(env):
        if (defect := toolkit_defect(home)) is None:
            others = (reason for reason in rejected if not reason.startswith(origin))
            return home, "; ".join([f"toolkit {home} from {origin}", *others])
        rejected.append(f"{origin}: {defect}")
    return None, "; ".join(rejected) or "nvcc not found in CUDA_HOME, on PATH or in NVIDIA's wheel"


def trim_archs(wanted: Iterable[str], known: str) -> str:
    """`wanted` less what is not in the output of `nvcc --list-gpu-arch`, with PTX of the last for cards yet to come."""
    kept = [arch for arch in wanted if f"compute_{arch.replace('.', '')}" in known.split()]
    return ";".join(kept) + "+PTX" if kept else ""


def cuda_conflict(toolkit: str, torch: Torch) -> str | None:
    """Why kernels of this toolkit cannot work with this torch, with both ways out; None if they can."""
    major = toolkit.split(".")[0]
    if torch.cuda is None:
        return (
            f"nvcc is CUDA {toolkit}, but torch {torch.version} was built without CUDA: install a torch built for CUDA "
            f"{major} and build with --no-build-isolation, or stay with the CPU kernels (LTKERNELS_CUDA=0)"
        )
    if torch.cuda.split(".")[0] != major:
        return (
            f"nvcc is CUDA {toolkit}, but torch {torch.version} was built for CUDA {torch.cuda}: set CUDA_HOME to a "
            f"CUDA {torch.cuda.split('.')[0]} toolkit, or install a torch built for CUDA {major} and build with "
            "--no-build-isolation"
        )
    return None


def find_cuda(env: Mapping[str, str], torches: Iterable[Torch]) -> Cuda:
    home, found = find_toolkit(env)
    if home is None:
        return Cuda(None, f"{found}: {GET_NVCC}")
    nvcc = home / "bin/nvcc"
    release = re.search(r"release [\d.]+, V([\d.]+)", ask(nvcc, "--version")[1])
    if release is None:
        return Cuda(None, f"{nvcc} --version fails: {GET_NVCC}")
    for torch in torches:
        if conflict := cuda_conflict(release[1], torch):
            return Cuda(None, conflict)
    arch_list = env.get("TORCH_CUDA_ARCH_LIST") or trim_archs(DEFAULT_ARCHS, ask(nvcc, "--list-gpu-arch")[1])
    if not arch_list:
        return Cuda(None, f"nvcc {release[1]} knows none of the architectures {', '.join(DEFAULT_ARCHS)}: {GET_NVCC}")
    with tempfile.TemporaryDirectory() as folder:  # headers and host compiler fit nvcc only if a file compiles
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_bf16.h>\n__global__ void f(__nv_bfloat16* x) { x[0] = x[1]; }\n")
        works, output = ask(nvcc, "-std=c++20", "-c", probe, "-o", Path(folder, "probe.o"))
    if not works:
        return Cuda(None, f"{nvcc} cannot compile: {complaint(output)}: {GET_NVCC}")
    return Cuda(home, found, release[1], arch_list)


def wants_cuda(env: Mapping[str, str]) -> bool | None:
    wanted = switch(env, "LTKERNELS_CUDA")
    return True if wanted is None and env.get("FORCE_CUDA") == "1" else wanted


def plan_cuda(env: Mapping[str, str], torches: Iterable[Torch]) -> Cuda:
    wanted = wants_cuda(env)
    if wanted is False:
        return Cuda(None, "LTKERNELS_CUDA=0 was set at build time")
    cuda = find_cuda(env, torches)
    if wanted and cuda.home is None:
        raise SystemExit(f"ltkernels: LTKERNELS_CUDA=1 insists on the CUDA kernels: {cuda.reason}")
    return cuda


# ---- the compiler and torch


def cpp_defect(env: Mapping[str, str]) -> str | None:
    """Why C++ cannot be compiled here; None if it can."""
    if switch(env, "LTKERNELS_CPP") is False:
        return "LTKERNELS_CPP=0 was set at build time"
    cxx = shlex.split(env.get("CXX") or "c++")
    if shutil.which(cxx[0], path=env.get("PATH", "")) is None:
        return f"no C++ compiler: {cxx[0]} not found; install g++, or set CXX"
    probe = "#include <Python.h>\n#include <span>\n"
    flags = ["-std=c++20", f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c++", "-"]
    works, output = ask(*cxx, *flags, text=probe)
    return None if works else f"{cxx[0]} cannot compile C++20 with Python's headers: {complaint(output)}"


def plan_cpp(env: Mapping[str, str]) -> str | None:
    defect = cpp_defect(env)
    for name, insisted in (("LTKERNELS_CPP", switch(env, "LTKERNELS_CPP")), ("LTKERNELS_CUDA", wants_cuda(env))):
        if defect and insisted:
            raise SystemExit(f"ltkernels: {name}=1 insists on compiled kernels: {defect}")
    return defect


def find_torches() -> list[Torch]:
    """The torch to build with and, where an isolated build has another, the one that the kernels will run with."""
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        raise SystemExit(
            f"ltkernels: {error}; build without --no-build-isolation, or first `pip install torch ninja pybind11 numpy`"
        ) from error
    torches = [Torch(torch.__version__, torch.version.cuda)]
    installed = Path(sysconfig.get_path("platlib"), "torch/version.py")
    if installed.is_file():
        facts: dict = {}
        exec(installed.read_text(), facts)
        torches.append(Torch(facts["__version__"], facts["cuda"]))
    return list(dict.fromkeys(torches))


# ---- what is built


def extensions(cuda: Cuda, info: dict) -> tuple[list[Extension], type[Command]]:
    """The two extension modules and the command that builds them; completes `info` and bakes it into the second."""
    if cuda.home:  # torch reads both; unset, it takes /usr for the toolkit of /usr/bin/nvcc and wants a GPU to be there
        os.environ |= {"CUDA_HOME": str(cuda.home), "TORCH_CUDA_ARCH_LIST": cuda.arch_list}
    import pybind11
    from torch.utils import cpp_extension

    flags = {"cxx": ["-O3", "-std=c++20", TORCH_MACRO], "nvcc": []}
    sources = ["csrc/ltkernels.cpp", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*/*_cpu.cpp")))]
    if cuda.home:
        kernels = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*/*_cuda.cu"))]
        codes = re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
        # ninja runs the files side by side; where cores are left over, nvcc runs the architectures side by side
        threads = min(len(codes), int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) // max(1, len(kernels)))
        flags["nvcc"] = [*NVCC_FLAGS, f"--threads={max(1, threads)}"]
        sources += kernels
        info["cuda_archs"] = sorted(codes, key=lambda code: (code.startswith("compute"), int(re.sub(r"\D", "", code))))
    info["flags"] = flags
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/build_facts.inc").write_text(f'R"json({json.dumps(info, indent=1)})json"\n')
    modules = [
        Extension(
            "ltkernels._C",
            sources,
            include_dirs=[str(ROOT / "csrc"), *cpp_extension.include_paths()],
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu", *(["torch_cuda"] if cuda.home else [])],
            extra_link_args=[str(cudart(cuda.home))] if cuda.home else [],
            extra_compile_args=flags,
            depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))],  # so sdist takes them
            language="c++",
            py_limited_api=True,
        ),
        Extension(
            "ltkernels._build_info",
            ["csrc/build_info.cpp"],
            include_dirs=[str(ROOT / "build"), pybind11.get_include()],
            extra_compile_args={"cxx": ["-O1", "-g0", "-std=c++20", "-fvisibility=hidden"]},
            language="c++",
        ),
    ]
    return modules, cpp_extension.BuildExtension


def packages() -> dict[str, str]:
    """Package -> folder. training/ is installed as ltkernels.training."""
    found = find_packages(str(ROOT), include=["ltkernels", "ltkernels.*", "training", "training.*"])
    return {f"ltkernels.{name}" if name.startswith("training") else name: name.replace(".", "/") for name in found}


def csrc_hash() -> str:
    spec = importlib.util.spec_from_file_location("_library", ROOT / "ltkernels/_library.py")
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library.csrc_hash(ROOT / "csrc")


class BuildPy(build_py):
    """Leaves no file of an earlier build in the package, and writes the build info of a pure-Python one."""

    info: dict = {}

    def run(self) -> None:
        target = ROOT / "ltkernels" if self.editable_mode else Path(self.build_lib, "ltkernels")
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if not self.info["cpp"]:
            for stale in [*target.glob("_C.*"), *target.glob("_build_info.*")]:
                stale.unlink()
            text = f'"""Written by setup.py."""\n\n\ndef build_info():\n    return {self.info!r}\n'
            Path(target, "_build_info.py").write_text(text)


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:  # as venv brings it: its own error is cryptic
        raise SystemExit(
            f"ltkernels: setuptools must be 77 or newer; got {setuptools.__version__}: "
            "`pip install -U setuptools`, or build without --no-build-isolation"
        )
    modules: list[Extension] = []
    commands: dict = {"build_py": BuildPy}
    # torch and the compilers are asked when there is something to build, not each time pip asks for the metadata
    if not {"egg_info", "dist_info"} & set(sys.argv):
        defect = plan_cpp(os.environ)
        torches = [] if defect else find_torches()
        cuda = Cuda(None, defect) if defect else plan_cuda(os.environ, torches)
        BuildPy.info = info = {
            "cpp": defect is None,
            "cpp_reason": defect or "built",
            "cuda": cuda.home is not None,
            "cuda_reason": cuda.reason,
            "cuda_archs": [],
            "compiler": None,
            "nvcc": cuda.version,
            "flags": {},
            "torch": torches[0].version if torches else None,
            "torch_target": ".".join(map(str, TORCH_TARGET)),
            "csrc_hash": csrc_hash(),
        }
        if defect is None:
            modules, commands["build_ext"] = extensions(cuda, info)
        print("ltkernels builds:", json.dumps(info, indent=1), flush=True)
    folders = packages()
    setup(
        packages=list(folders),
        package_dir=folders,
        package_data={"": ["py.typed", "*.json"]},
        ext_modules=modules,
        cmdclass=commands,
    )


if __name__ == "__main__":
    main()
