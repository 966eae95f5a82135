"""Builds csrc/ into the extension slicegpt_fast._C; everything else about the package is in pyproject.toml.

A source file's name says what it is compiled for: `covariance.cpp` for any machine, `covariance_avx512.cpp` with the
flags of that row of CPU_FLAGS, `covariance_sm90a.cu` for that one CUDA architecture. A new kernel is a new file.

Environment variables:
    CXX                       C++ compiler (otherwise c++, g++ or clang++ from PATH)
    SLICEGPT_FAST_CUDA        auto (default): compile csrc/cuda/ when a CUDA compiler is found; 1: must; 0: never
    SLICEGPT_FAST_CUDA_ARCHS  architectures, "80;90a" if unset
    CUDACXX, CUDA_HOME        where the CUDA compiler is looked for before PATH
    SLICEGPT_FAST_SANITIZE    1: C++ with AddressSanitizer and UBSan, as `make sanitize` runs it
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from io import StringIO
from pathlib import Path
from typing import NoReturn

import ninja
import pybind11
from ninja.ninja_syntax import Writer, escape
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
SANITIZE = os.environ.get("SLICEGPT_FAST_SANITIZE") == "1"
BUILD = Path("build", (sys.implementation.cache_tag or "native") + ("-sanitize" if SANITIZE else ""))

CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# At -O1, since GCC takes 10 minutes for one kernel file at -O3 with checks.
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"] if SANITIZE else []
# -DNDEBUG matters on the device too: with asserts compiled in, nvcc serialises asynchronous tensor-core instructions.
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# The CUDA runtime is linked in and its symbols are kept private, so that it cannot meet the one that torch loads. No
# kernel calls device code of another file, so there is nothing to link on the device side.
NVCC_LINK_FLAGS = ["-cudart=static", "-Xlinker", "--exclude-libs=ALL", "-nodlink"]

# File-name suffix -> compiler flags, weakest instruction set first. csrc/cpu/isa.cpp holds the same levels with the
# CPU features that each one needs at run time; flags and features must agree.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
CPU_FLAGS = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": AVX512BF16,
    },
    "aarch64": {},
}


def fail(message: str) -> NoReturn:
    """Stop with one sentence and no traceback, whichever installer runs this file."""
    raise SystemExit(f"error: slicegpt-fast: {message}")


def find_cxx() -> str:
    if cxx := os.environ.get("CXX"):
        return shutil.which(cxx) or fail(f"CXX is {cxx!r}, which cannot be run; set it to a C++ compiler's path.")
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return found or fail("no C++ compiler found; install g++ or clang++, or set CXX to a C++ compiler's path.")


def find_nvcc() -> str | None:
    mode = os.environ.get("SLICEGPT_FAST_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        fail(f"SLICEGPT_FAST_CUDA is {mode!r}; set it to auto, 0 or 1.")
    if mode == "0":
        return None
    if cudacxx := os.environ.get("CUDACXX"):
        return shutil.which(cudacxx) or fail(f"CUDACXX is {cudacxx!r}, which cannot be run; set it to nvcc's path.")
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which(f"{home}/bin/nvcc") if home else None) or shutil.which("nvcc")
    if mode == "1" and nvcc is None:
        fail("SLICEGPT_FAST_CUDA is 1, but no CUDA compiler was found; set CUDACXX to nvcc's path.")
    return nvcc


def find_cuda_archs() -> list[str]:
    archs = (os.environ.get("SLICEGPT_FAST_CUDA_ARCHS") or "80;90a").split(";")
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
            fail(f"SLICEGPT_FAST_CUDA_ARCHS contains {arch!r}; write architectures like 80;90a.")
    return archs


def revision(version: str) -> str:
    """`git describe` of the checkout, or the package's version where this is none (an sdist)."""
    command = ["git", "describe", "--tags", "--always", "--dirty"]
    try:
        # Asked only beside our own .git: an sdist may be unpacked inside somebody else's checkout.
        described = Path(".git").exists() and subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        described = False
    return described.strip() if described else version


def cxx_sources(cuda: bool) -> list[tuple[Path, list[str]]]:
    """C++ sources of this machine, each with the flags that its suffix stands for."""
    here = CPU_FLAGS.get(platform.machine(), {})
    elsewhere = {suffix for levels in CPU_FLAGS.values() for suffix in levels} - here.keys()
    suffixes = {source: source.stem.rpartition("_")[2] for source in sorted(CSRC.rglob("*.cpp"))}
    suffixes = {source: suffix for source, suffix in suffixes.items() if cuda or source.parent != CSRC / "cuda"}
    return [(source, here.get(suffix, [])) for source, suffix in suffixes.items() if suffix not in elsewhere]


def cuda_sources(archs: list[str]) -> list[tuple[Path, list[str]]]:
    """CUDA sources for these architectures, each with the code to generate."""
    # PTX of the newest architecture that later GPUs understand: "90a" runs on 9.0 alone, "80" on 8.0 and all above.
    portable = max((arch for arch in archs if arch.isdigit()), key=int, default=None)
    sources = []
    for source in sorted(CSRC.rglob("*.cu")):
        only = re.search(r"_sm(\d+[af]?)$", source.stem)
        codes = {arch: f"sm_{arch}" for arch in archs if not only or only[1] == arch}
        if portable and not only:
            codes[portable] = f"[sm_{portable},compute_{portable}]"
        if codes:
            sources.append((source, [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes.items()]))
    return sources


def ninja_file(version: str) -> str:
    """The build graph: one edge per source file, and one that links them all into BUILD/_C.so."""
    cxx, nvcc = find_cxx(), find_nvcc()
    archs = find_cuda_archs() if nvcc else []
    # SGF_CUDA: this build has csrc/cuda/. SGF_SM90A and the like: it has the files named *_sm90a.cu.
    defines = ["-DSGF_CUDA", *(f"-DSGF_SM{arch.upper()}" for arch in archs)] if nvcc else []
    # Flags of single files, because a changed command recompiles: pip's build isolation moves the Python headers with
    # every build, and every commit is a new revision.
    python_flags = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    own_flags = {
        CSRC / "bindings.cpp": python_flags,
        CSRC / "cuda/bindings.cpp": python_flags,
        CSRC / "build_info.cpp": [f'-DSGF_REVISION="{revision(version)}"', f'-DSGF_CUDA_ARCHS="{";".join(archs)}"'],
    }

    text = StringIO()
    file = Writer(text)

    def rule(name: str, command: list[str], tail: str, **options: str) -> None:
        file.rule(name, f"{escape(shlex.join(command))} {tail}", description=f"{name} $out", **options)

    file.variable("builddir", str(BUILD))
    compiling = {"tail": "$flags -MMD -MF $out.d -c $in -o $out", "depfile": "$out.d", "deps": "gcc"}
    rule("cxx", [cxx, *CXX_FLAGS, *SANITIZE_FLAGS, *defines, f"-I{CSRC}"], **compiling)
    if nvcc:
        rule("nvcc", [nvcc, "-ccbin", cxx, *NVCC_FLAGS, *defines, f"-I{CSRC}"], **compiling)
    linker = [nvcc, "-ccbin", cxx, *NVCC_LINK_FLAGS] if nvcc else [cxx, *SANITIZE_FLAGS]
    rule("link", [*linker, "-shared"], "$in -o $out")

    objects = []
    for name, sources in {"cxx": cxx_sources(nvcc is not None), "nvcc": cuda_sources(archs)}.items():
        for source, flags in sources:
            flags = escape(shlex.join(flags + own_flags.get(source, [])))
            objects += file.build(f"{BUILD / source}.o", name, str(source), variables={"flags": flags})
    file.build(str(BUILD / "_C.so"), "link", objects)
    return text.getvalue()


class NinjaBuild(build_ext):
    """Builds through ninja: in parallel, and only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        if platform.system() != "Linux" or platform.machine() not in CPU_FLAGS:
            fail(f"{platform.system()} on {platform.machine()} is not supported; use Linux on x86_64 or aarch64.")
        graph = ninja_file(self.distribution.get_version())
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text(graph)
        if subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-f", BUILD / "build.ninja"]).returncode:
            fail("csrc/ did not compile; the compiler's message stands above.")
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # processes may run the old one
        shutil.copy(BUILD / "_C.so", library)


class FreshBuild(build_py):
    """Copies the Python files into an empty folder: what an earlier build left there would be packed."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(include=["slicegpt_fast", "slicegpt_fast.*"]), "slicegpt_fast.triton_kernels"],
    package_dir={"slicegpt_fast.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("slicegpt_fast._C", sources=[])],
    cmdclass={"build_py": FreshBuild, "build_ext": NinjaBuild},
)
