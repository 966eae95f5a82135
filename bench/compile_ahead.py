"""Compiles kernels for GPUs that are not here, through the launch code that a user's call takes.

A stand-in driver names the target, and `launch` compiles in place of launching, so every specialisation (alignment,
descriptors, tile) is the one that a real call would compile.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from slicegpt_fast import triton_kernels
from slicegpt_fast.triton_kernels.launch import Gpu

GPUS = {
    "sm_80": Gpu("NVIDIA A100", (8, 0), 108, 163 * 1024),
    "sm_90": Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024),
    "sm_100": Gpu("NVIDIA B200", (10, 0), 148, 227 * 1024),
}
MODULES = [import_module(f"{triton_kernels.__name__}.{found.name}") for found in iter_modules(triton_kernels.__path__)]


class _Driver:
    """Answers what Triton's compiler asks a driver."""

    def __init__(self, gpu: Gpu) -> None:
        self.target = GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # the key of Triton's kernel caches: one per target

    def get_current_stream(self, device: Any) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled: registers and spilled bytes per thread, bytes of shared memory and warps per program."""

    name: str
    registers: int
    spilled_bytes: int
    shared_memory: int
    warps: int
    ptx: str
    cubin: bytes


def cuobjdump(file: Path | str, *options: str) -> str:
    """What cuobjdump prints about a cubin or a library: the one beside nvcc, whose output it knows, else Triton's."""
    compilers = (os.environ.get("CUDACXX", ""), f"{os.environ.get('CUDA_HOME')}/bin/nvcc", "nvcc")
    nvcc = next(filter(None, map(shutil.which, compilers)), None)
    program = shutil.which("cuobjdump", path=Path(nvcc).resolve().parent) if nvcc else None
    program = program or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *options, file], capture_output=True, text=True, check=True).stdout


def resources(usage: str) -> dict[str, tuple[int, int, int]]:
    """Registers per thread, bytes of stack (which is where spills go) and of shared memory, by function."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {name: (int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found}


def serialised_by(ptx: str) -> list[str]:
    """What ptxas says of a kernel whose wgmma it lets wait for each other: C7510, C7515 and the like."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a", file.name]
        said = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
    return re.findall(r"\(C75\d\d\).*serialized.*", said)


def waits_for_each_wgmma(sass: str) -> bool:
    """Return whether machine code of Hopper waits for every one of its wgmma before it issues the next."""
    opcodes = re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR)\b", sass)
    return "HGMMA" in opcodes and ("HGMMA", "HGMMA") not in pairwise(opcodes)


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump prints about a kernel as compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return cuobjdump(file.name, option)


@lru_cache(maxsize=4096)
def facts_of(binary: Any) -> Compiled:
    """What there is to know of a kernel that Triton compiled."""
    cubin, facts = binary.asm["cubin"], binary.metadata
    registers, spilled, _ = resources(dump(cubin, "-res-usage"))[facts.name]
    return Compiled(facts.name, registers, spilled, facts.shared, facts.num_warps, binary.asm["ptx"], cubin)


def compile_calls(gpu: Gpu, call: Callable[[], Any]) -> list[Compiled]:
    """Every kernel that ``call`` would launch on ``gpu``, compiled."""
    compiled = []

    def compile_only(kernel: Any, grid: Any, device: Any, *args: Any, **meta: Any) -> None:
        compiled.append(facts_of(kernel.warmup(*args, grid=grid, **meta)))

    names = {"launch": compile_only, "gpu_of": lambda device: gpu}
    used = [(module, name) for module in MODULES for name in names if hasattr(module, name)]
    originals = [(module, name, getattr(module, name)) for module, name in used]
    driver.set_active(_Driver(gpu))
    try:
        for module, name, _ in originals:
            setattr(module, name, names[name])
        call()
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
        driver._active = None
    return compiled
