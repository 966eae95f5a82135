"""The CUDA kernels on the CPU, in the emulator: emulator.h says what that is."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pybind11
import pytest
import torch

from slicegpt_fast.ops.backends import cuda
from slicegpt_fast.ops.dispatch import OPS, Backend, Request

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or shutil.which("c++")
SANITIZE = ["-fsanitize=address"] if os.environ.get("SLICEGPT_FAST_SANITIZE") == "1" else []
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w", *SANITIZE]
FLAGS += [f"-I{HERE}", f"-I{CSRC}", "-include", "cuda_runtime.h"]  # nvcc includes it too
SMS = 3  # few, so that persistent blocks take several tiles each
NO_COMPILER = [f"-D__CUDACC_VER_{part}__=0" for part in ("MAJOR", "MINOR", "BUILD")]


@contextmanager
def emulating(arch: str) -> Iterator[None]:
    """Lets the backend "cuda" take tensors of the host, and run the kernels compiled for ``arch``: "80" or "90a"."""
    gpu = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_C", emulated(arch))
        patch.setattr(cuda, "on", lambda device: nullcontext())
        patch.setattr(cuda, "multiprocessors", lambda device: SMS)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        patch.setattr(cuda, "build_info", lambda: SimpleNamespace(cuda_compiler="emulator", cuda_archs=(arch,)))
        patch.setattr(Request, "capability", property(lambda request: (int(arch[0]), int(arch[1]))))
        for op in (op for op in OPS.values() if "cuda" in op.backends):
            run, refuses = op.backends["cuda"].run, op.backends["cuda"].refuses
            on_host = Backend(run, lambda request, refuses=refuses: refuses(replace(request, device=gpu)))
            patch.setitem(op.backends, "cuda", on_host)
        yield
    for op in OPS.values():
        op._plans.clear()  # which send host tensors to the backend


@cache
def emulated(arch: str) -> ModuleType:
    """The launchers of csrc/cuda, bound as in slicegpt_fast._C, of kernels compiled for ``arch``."""
    folder = ROOT / "build" / f"emulator-{arch}-{sys.implementation.cache_tag}{'-asan' * bool(SANITIZE)}"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"emulated_{arch}"
    defines = [f"-D__CUDA_ARCH__={arch[:2]}0", "-DSGF_CUDA", f"-DEMULATED={name}", *NO_COMPILER]
    defines += ["-DSGF_SM90A"] * (arch == "90a")
    kernels = [file for file in CSRC.glob("cuda/*.cu") if "_sm" not in file.name or file.stem.endswith(arch)]
    sources = [*kernels, CSRC / "cuda/bindings.cpp", CSRC / "status.cpp", *HERE.glob("*.cpp")]
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]

    newest = max(file.stat().st_mtime for root in (HERE, CSRC) for file in root.rglob("*.[ch]*"))

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.name}.o"
        if not target.exists() or target.stat().st_mtime < newest:
            subprocess.run([CXX, *FLAGS, *defines, *includes, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of pytest want the same
        objects = list(pool.map(compile_one, sources))
        if not library.exists() or library.stat().st_mtime < max(file.stat().st_mtime for file in objects):
            subprocess.run([CXX, "-shared", *SANITIZE, *objects, "-lpthread", "-o", library], check=True)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
