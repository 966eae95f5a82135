"""Builds csrc/ into the extension slicegpt_fast._C; everything else about the package is in pyproject.toml.

A source file's name says what it is compiled for: `covariance.cpp` for any machine, `covariance_avx512.cpp` with the
flags of that row of CPU_FLAGS, `covariance_sm90a.cu` for that one CUDA architecture. A new kernel is a new file.

Environment:
    CXX                       C++ compiler (otherwise c++, g++ or clang++ from PATH)
    SLICEGPT_FAST_CUDA        auto (default): compile csrc/cuda when a CUDA compiler is found; 1: must; 0: never
    SLICEGPT_FAST_CUDA_ARCHS  architectures, "80;90a" if unset
    CUDACXX, CUDA_HOME        where the CUDA compiler is looked for, before PATH
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")

CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# -DNDEBUG matters on the device too: with asserts compiled in, nvcc serialises asynchronous tensor-core instructions.
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# The CUDA runtime is linked in and its symbols are kept private, so that it cannot meet the one that torch loads.
LINK_FLAGS = ["-shared", "-Xlinker", "--exclude-libs=ALL"]

# File-name suffix -> compiler flags, from the weakest to the strongest instruction set. csrc/cpu/isa.cpp holds the
# same levels with the CPU features that each one needs at run time; flags and features must agree.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
CPU_FLAGS = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512bf16": AVX512BF16,
        "amxbf16": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {
        "neonbf16": ["-march=armv8.2-a+bf16"],
        "svebf16": ["-march=armv8.2-a+sve+bf16"],
    },
}
CPU_SUFFIXES = {suffix for levels in CPU_FLAGS.values() for suffix in levels}


def fail(message: str) -> None:
    """One sentence and no traceback, whichever installer is running this file."""
    raise SystemExit(f"error: slicegpt-fast: {message}")


def find_cxx() -> str:
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    return fail("no C++ compiler found; install g++ or clang++, or set CXX to the compiler's path.")


def find_nvcc() -> str | None:
    mode = os.environ.get("SLICEGPT_FAST_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        fail(f"SLICEGPT_FAST_CUDA is {mode!r}; set it to auto, 0 or 1.")
    if mode == "0":
        return None
    if cudacxx := os.environ.get("CUDACXX"):
        return shutil.which(cudacxx) or fail(f"CUDACXX is {cudacxx!r}, which is no executable; set it to nvcc's path.")
    cuda_home = os.environ.get("CUDA_HOME")
    nvcc = (cuda_home and shutil.which(f"{cuda_home}/bin/nvcc")) or shutil.which("nvcc")
    if nvcc is None and mode == "1":
        fail("SLICEGPT_FAST_CUDA is 1, but no CUDA compiler was found; set CUDACXX to nvcc's path, or CUDA_HOME.")
    return nvcc


def find_cuda_archs() -> list[str]:
    archs = (os.environ.get("SLICEGPT_FAST_CUDA_ARCHS") or "80;90a").split(";")
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
            fail(f"SLICEGPT_FAST_CUDA_ARCHS contains {arch!r}; write architectures like 80;90a.")
    return archs


def gencode(archs: list[str], ptx: str | None) -> list[str]:
    """Machine code for each architecture, and for `ptx` the portable form from which drivers serve newer GPUs."""
    codes = [(arch, f"[sm_{arch},compute_{arch}]" if arch == ptx else f"sm_{arch}") for arch in archs]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]


def revision(version: str) -> str:
    """`git describe` of the checkout, or the package's version where this is no checkout (an sdist)."""
    if not Path(".git").exists():
        return version
    command = ["git", "describe", "--tags", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version


class NinjaBuild(build_ext):
    """Writes build/<python tag>/build.ninja and runs it: parallel, and only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        if platform.system() != "Linux":
            fail(f"this package builds on Linux, not on {platform.system()}.")
        folder = Path("build") / (sys.implementation.cache_tag or "native")
        library = folder / "_C.so"
        folder.mkdir(parents=True, exist_ok=True)
        self.write_ninja(folder / "build.ninja", library)
        import ninja

        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(folder / "build.ninja")]
        if subprocess.run(command).returncode:
            fail("compiling csrc/ failed; the compiler's message stands above.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Remove first: writing into a file that a running process has mapped would crash that process.
        target.unlink(missing_ok=True)
        shutil.copy(library, target)

    def write_ninja(self, path: Path, library: Path) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        cxx, nvcc = find_cxx(), find_nvcc()
        archs = find_cuda_archs() if nvcc else []
        ptx = max((arch for arch in archs if arch.isdigit()), key=int, default=None)
        cpu_flags = CPU_FLAGS.get(platform.machine(), {})
        defines = ["-DSGF_CUDA", *(f"-DSGF_SM{arch.upper()}" for arch in archs)] if nvcc else []
        includes = [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
        baked = {"SGF_REVISION": revision(self.distribution.get_version()), "SGF_CUDA_ARCHS": ";".join(archs)}

        with path.open("w") as file:
            writer = Writer(file)

            def rule(name: str, command: list[str], tail: str, **options: str) -> None:
                quoted = shlex.join(command).replace("$", "$$")
                writer.rule(name, f"{quoted} {tail}", description=f"{name} $out", **options)

            def compile_(name: str, source: Path, flags: list[str]) -> str:
                out = str(path.parent / source.with_suffix(source.suffix + ".o"))
                writer.build(out, name, str(source), variables={"flags": shlex.join(flags).replace("$", "$$")})
                return out

            tail = "$flags -MMD -MF $out.d -c $in -o $out"
            rule("cxx", [cxx, *CXX_FLAGS, *defines, *includes], tail, depfile="$out.d", deps="gcc")
            if nvcc:
                command = [nvcc, "-ccbin", cxx, *NVCC_FLAGS, *defines, f"-I{CSRC}"]
                rule("nvcc", command, tail, depfile="$out.d", deps="gcc")
            linker = [nvcc, "-ccbin", cxx, "-cudart=static"] if nvcc else [cxx]
            rule("link", [*linker, *LINK_FLAGS], "$in -o $out")

            objects = []
            for source in sorted(CSRC.rglob("*.cpp")):
                suffix = source.stem.rpartition("_")[2]
                if suffix in CPU_SUFFIXES - cpu_flags.keys():
                    continue  # written for another machine
                flags = [f'-D{name}="{value}"' for name, value in baked.items() if source.stem == "build_info"]
                objects.append(compile_("cxx", source, flags + cpu_flags.get(suffix, [])))
            for source in sorted(CSRC.rglob("*.cu")) if nvcc else []:
                only = re.search(r"_sm(\d+[af]?)$", source.stem)
                if only and only[1] not in archs:
                    continue
                objects.append(compile_("nvcc", source, gencode([only[1]], None) if only else gencode(archs, ptx)))
            writer.build(str(library), "link", objects)


setup(
    packages=[*find_packages(include=["slicegpt_fast", "slicegpt_fast.*"]), "slicegpt_fast.triton_kernels"],
    package_dir={"slicegpt_fast.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("slicegpt_fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
