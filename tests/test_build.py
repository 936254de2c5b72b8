"""What setup.py decides on machines that are not this one, and what the loader does with what it finds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ltkernels

ROOT = Path(__file__).resolve().parent.parent


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_file(ROOT / "setup.py")
CU130 = builder.Torch("2.14.1+cu130", "13.0")


def write(path: Path, text: str = "", executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(0o755)
    return path


# ---- the toolkit


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """The only site-packages that setup.py sees: an empty folder."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(builder.sysconfig, "get_path", lambda name: str(folder))
    return folder


LAYOUTS = {
    "installer": ("include/cuda_runtime.h", "lib64/libcudart.so"),
    "NVIDIA's wheel": ("include/cuda_runtime.h", "lib/libcudart.so.13"),
    "conda": ("targets/x86_64-linux/include/cuda_runtime.h", "lib/libcudart.so"),
    "Debian": ("include/cuda_runtime.h", "lib/x86_64-linux-gnu/libcudart.so"),
}


def toolkit(home: Path, layout: str = "installer", nvcc: str = "#!/bin/sh\n") -> Path:
    write(home / "bin/nvcc", nvcc, executable=True)
    for name in LAYOUTS[layout]:
        write(home / name)
    return home


@pytest.mark.parametrize("layout", LAYOUTS)
def test_toolkit_is_known_by_what_it_contains(tmp_path, site, layout):
    home = toolkit(tmp_path / "cuda", layout)
    found, reason = builder.find_toolkit({"CUDA_HOME": str(home)})
    assert found == home and reason == f"toolkit {home} from CUDA_HOME"
    assert builder.cudart(home) == home / LAYOUTS[layout][1]


@pytest.mark.parametrize(
    "missing, defect",
    [
        ("bin/nvcc", "no bin/nvcc"),
        ("include/cuda_runtime.h", "no include/cuda_runtime.h"),
        ("lib64/libcudart.so", "no lib64/libcudart.so"),
    ],
)
def test_incomplete_toolkit_is_passed_over_and_named(tmp_path, site, missing, defect):
    broken, whole = toolkit(tmp_path / "broken"), toolkit(tmp_path / "whole")
    (broken / missing).unlink()
    found, reason = builder.find_toolkit({"CUDA_HOME": str(broken)})
    assert found is None and reason == f"CUDA_HOME: {broken} has {defect}"
    found, reason = builder.find_toolkit({"CUDA_HOME": str(broken), "PATH": str(whole / "bin")})
    assert found == whole and reason == f"toolkit {whole} from PATH; CUDA_HOME: {broken} has {defect}"


def test_toolkit_behind_a_wrapper_script(tmp_path, site):
    home = toolkit(tmp_path / "cuda", nvcc="#!/bin/sh\necho '#$ TOP='$(dirname $0)/.. >&2\n")
    write(tmp_path / "bin/nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n', executable=True)
    assert builder.find_toolkit({"PATH": f"{tmp_path}/bin"}) == (home, f"toolkit {home} from PATH")


def test_toolkit_in_nvidias_wheel_comes_last(tmp_path, site):
    wheel, other = toolkit(site / "nvidia/cu13", "NVIDIA's wheel"), toolkit(tmp_path / "cuda")
    assert builder.find_toolkit({"PATH": ""}) == (wheel, f"toolkit {wheel} from NVIDIA's wheel")
    assert builder.find_toolkit({"PATH": "", "CUDA_HOME": str(other)})[0] == other


def test_no_toolkit(site):
    assert builder.find_toolkit({}) == (None, "nvcc not found in CUDA_HOME, on PATH or in NVIDIA's wheel")


# ---- CUDA or not


@pytest.mark.parametrize(
    "known, kept",
    [
        ("compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_103\ncompute_120\n", "8.0;9.0;10.0;12.0+PTX"),
        ("compute_80\ncompute_90\n", "8.0;9.0+PTX"),
        ("compute_50\ncompute_70\n", ""),
    ],
)
def test_archs_are_trimmed_to_what_nvcc_knows(known, kept):
    assert builder.trim_archs(builder.DEFAULT_ARCHS, known) == kept


def test_conflict_of_toolkit_and_torch_names_both_versions_and_both_fixes():
    assert builder.cuda_conflict("13.3.1", CU130) is None
    other = builder.cuda_conflict("12.4.99", CU130)
    assert other.startswith("nvcc is CUDA 12.4.99, but torch 2.14.1+cu130 was built for CUDA 13.0: ")
    assert "set CUDA_HOME to a CUDA 13 toolkit" in other and "install a torch built for CUDA 12" in other
    none = builder.cuda_conflict("13.0.88", builder.Torch("2.14.1+cpu", None))
    assert none.startswith("nvcc is CUDA 13.0.88, but torch 2.14.1+cpu was built without CUDA: ")
    assert "install a torch built for CUDA 13" in none and "LTKERNELS_CUDA=0" in none


NVCC = """#!/bin/sh
case "$*" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    --list-gpu-arch) echo compute_80; echo compute_90 ;;
    *) {compile} ;;
esac
"""


def test_plan_of_a_toolkit_that_works(tmp_path, site):
    home = toolkit(tmp_path / "cuda", nvcc=NVCC.format(compile="exit 0"))
    env = {"CUDA_HOME": str(home)}
    whole = builder.Cuda(home, f"toolkit {home} from CUDA_HOME", "13.0.88", "8.0;9.0+PTX")
    assert builder.plan_cuda(env, [CU130]) == whole
    assert builder.plan_cuda(env | {"LTKERNELS_CUDA": "1"}, [CU130]) == whole
    assert builder.plan_cuda(env | {"TORCH_CUDA_ARCH_LIST": "Hopper"}, [CU130]).arch_list == "Hopper"
    skipped = builder.plan_cuda(env | {"LTKERNELS_CUDA": "0", "FORCE_CUDA": "1"}, [CU130])
    assert skipped.home is None and "LTKERNELS_CUDA=0" in skipped.reason
    # an isolated build's own torch may have CUDA where the one that the kernels will run with has not
    assert "2.14.1+cpu" in builder.plan_cuda(env, [CU130, builder.Torch("2.14.1+cpu", None)]).reason


def test_plan_of_a_toolkit_that_does_not_compile(tmp_path, site):
    failing = "echo 'probe.cu(1): fatal error: nv/target: No such file' >&2; exit 1"
    home = toolkit(tmp_path / "cuda", nvcc=NVCC.format(compile=failing))
    plan = builder.plan_cuda({"CUDA_HOME": str(home)}, [CU130])
    assert plan.home is None and "cannot compile: probe.cu(1): fatal error: nv/target" in plan.reason


@pytest.mark.parametrize("insist", ["LTKERNELS_CUDA", "FORCE_CUDA"])
def test_insisting_on_cuda_fails_with_the_fix(site, insist):
    assert "cuda-toolkit[nvcc,cccl]" in builder.plan_cuda({}, [CU130]).reason
    with pytest.raises(SystemExit, match=r"insists on the CUDA kernels: nvcc not found .*CUDA_HOME.*cuda-toolkit\[nvcc"):
        builder.plan_cuda({insist: "1"}, [CU130])


def test_switches_take_three_values():
    assert [builder.switch({"X": value}, "X") for value in ("0", "1", "auto", "")] == [False, True, None, None]
    with pytest.raises(SystemExit, match="LTKERNELS_CUDA must be 0, 1 or auto; got 'yes'"):
        builder.plan_cuda({"LTKERNELS_CUDA": "yes"}, [CU130])


# ---- C++ or not


def test_plan_without_a_compiler(tmp_path):
    bare = {"PATH": str(tmp_path)}
    assert builder.plan_cpp(bare) == "no C++ compiler: c++ not found; install g++, or set CXX"
    assert "LTKERNELS_CPP=0" in builder.plan_cpp({"PATH": os.environ["PATH"], "LTKERNELS_CPP": "0"})
    for env in (bare | {"LTKERNELS_CPP": "1"}, {"LTKERNELS_CPP": "0", "LTKERNELS_CUDA": "1"}, bare | {"FORCE_CUDA": "1"}):
        with pytest.raises(SystemExit, match="insists on compiled kernels: "):
            builder.plan_cpp(env)


def test_plan_with_an_old_compiler(tmp_path):
    old = write(tmp_path / "g++-5", "#!/bin/sh\necho \"error: unrecognized option '-std=c++20'\" >&2; exit 1\n", True)
    assert "unrecognized option '-std=c++20'" in builder.plan_cpp({"PATH": "", "CXX": str(old)})


def test_isolated_build_minds_the_torch_it_builds_for(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", ModuleType("pybind11"))  # asked for, too, and only there in a build
    own = builder.Torch(torch.__version__, torch.version.cuda)
    assert builder.find_torches() == [own]
    write(site / "torch/version.py", "__version__ = '2.13.0+cpu'\ncuda = None\n")
    assert builder.find_torches() == [own, builder.Torch("2.13.0+cpu", None)]


# ---- what goes in


def test_every_folder_of_python_files_is_packaged():
    folders = {
        path.parent.relative_to(ROOT).as_posix() for top in ("ltkernels", "training") for path in (ROOT / top).rglob("*.py")
    }
    assert set(builder.packages().values()) == folders
    assert builder.packages()["ltkernels.training"] == "training"


def test_csrc_keeps_to_the_stable_abi():
    forbidden = re.compile(r'#\s*include\s*[<"](ATen/|c10/|torch/extension\.h|torch/torch\.h|torch/library\.h|torch/all\.h)')
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources and not [path for path in sources if forbidden.search(path.read_text())]


# ---- the loader


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Makes folders that hold a copy of the loader and, perhaps, a compiled part that was made from `csrc`."""
    monkeypatch.delenv("LTKERNELS_CPP", raising=False)
    monkeypatch.setattr(sys, "path", [])
    write(tmp_path / "sources/kernels.cpp", "int x;")
    hash_now = load_file(ROOT / "ltkernels/_library.py").csrc_hash(tmp_path / "sources")

    def make(name: str, *, csrc: bool = False, built_from: str | None = None) -> Path:
        folder = tmp_path / name / "ltkernels"
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "ltkernels/_library.py", folder)
        if csrc:
            shutil.copytree(tmp_path / "sources", tmp_path / name / "csrc")
        if built_from:
            digest = hash_now if built_from == "this csrc" else built_from
            info = {"cpp": True, "cuda": False, "csrc_hash": digest, "torch": "2.10.0+cu126"}
            write(folder / "_build_info.py", f"def build_info():\n    return {info}\n")
            write(folder / "_C.abi3.so", "not a library")
        sys.path.append(str(folder.parent))
        return folder

    return make


def found(folder: Path) -> str | None:
    return load_file(folder / "_library.py").build_info()["folder"]


def test_hash_changes_with_code_and_names_only(tmp_path):
    csrc_hash = load_file(ROOT / "ltkernels/_library.py").csrc_hash
    write(tmp_path / "a/x.cpp", "int x;"), write(tmp_path / "b/x.cpp", "int x;"), write(tmp_path / "b/README.md", "hello")
    assert csrc_hash(tmp_path / "a") == csrc_hash(tmp_path / "b")
    (tmp_path / "b/x.cpp").rename(tmp_path / "b/y.cpp")
    assert csrc_hash(tmp_path / "a") != csrc_hash(tmp_path / "b")
    assert builder.csrc_hash() == csrc_hash(ROOT / "csrc")


def test_compiled_part_is_found_beside_or_behind_the_sources(tree):
    bare = tree("bare", csrc=True)
    library = load_file(bare / "_library.py")
    assert not library.HAS_CPP and not library.HAS_CUDA
    assert "pip install" in library.build_info()["cuda_reason"] and library.load() is None
    installed = tree("installed", built_from="this csrc")
    assert found(bare) == str(installed)
    beside = tree("beside", csrc=True, built_from="this csrc")
    assert found(beside) == str(beside)


def test_a_fresh_build_goes_before_a_stale_one(tree):
    checkout = tree("checkout", csrc=True, built_from="another csrc")
    tree("older", built_from="yet another csrc")
    assert found(checkout) == str(checkout)
    assert found(checkout) != str(installed := tree("installed", built_from="this csrc"))
    assert found(checkout) == str(installed)


@pytest.mark.parametrize("inplace, command", [(True, "python setup.py build_ext --inplace"), (False, "pip install")])
def test_stale_build_is_noticed(tree, monkeypatch, inplace, command):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    checkout = tree("checkout", csrc=True, built_from="another csrc" if inplace else None)
    folder = checkout if inplace else tree("installed", built_from="another csrc")
    with pytest.warns(UserWarning, match=rf"built from another csrc/.* rebuild it: cd {checkout.parent} && {command}"):
        load_file(checkout / "_library.py").load()
    assert loaded == [str(folder / "_C.abi3.so")]
    fresh = tree("fresh", csrc=True, built_from="this csrc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_file(fresh / "_library.py").load()


def test_library_that_does_not_load_names_the_fix(tree):
    library = load_file(tree("installed", built_from="this csrc") / "_library.py")
    with pytest.raises(ImportError) as error:
        library.load()
    said = str(error.value)
    assert "_C.abi3.so: " in said and "built with torch 2.10.0+cu126" in said and f"installed is torch {torch.__version__}" in said
    assert "pip install --no-build-isolation" in said


def test_import_is_cheap_and_works_without_the_compiled_part(tmp_path):
    code = """
        import sys, torch
        before = set(sys.modules)
        import ltkernels
        assert not torch.cuda.is_initialized()
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not new & {"triton", "pybind11", "setuptools", "scipy", "sklearn", "matplotlib", "torchvision"}, new
        info = ltkernels.build_info()
        assert info["cpp"] is False and "LTKERNELS_CPP=0" in info["cuda_reason"]
        x = torch.arange(12.).reshape(4, 3)
        assert ltkernels.knn(x, x, 2).index.tolist() == [[0, 1], [1, 0], [2, 1], [3, 2]]
    """
    env = os.environ | {"LTKERNELS_CPP": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=env, check=True)


def test_this_build_says_what_it_is():
    info = ltkernels.build_info()
    assert info["cpp_reason"] and info["cuda_reason"]
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", arch) for arch in info["cuda_archs"])
    assert bool(info["cuda_archs"]) == info["cuda"] and (info["cpp"] or not info["cuda"])
    if info["cpp"]:
        assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in info["flags"]["cxx"]
        assert not any("fast" in flag or "march" in flag for flags in info["flags"].values() for flag in flags)
