"""The native extension: how it was built, and which instruction set its CPU kernels use here."""

from dataclasses import dataclass

import torch

from slicegpt_fast import _C
from slicegpt_fast.errors import InputError

# The codes of csrc/slicegpt_fast.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
WEIGHT_DTYPES = DTYPES | {torch.int8: 4, torch.uint8: 5}  # uint8: two levels of 4 bits each
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu_gate": 4}


@dataclass(frozen=True)
class BuildInfo:
    """How slicegpt_fast._C was compiled."""

    revision: str  # `git describe` of the sources, or the release where they came without git
    compiler: str  # C++ compiler and version, like "GCC 12.2.0"
    cuda_compiler: str | None  # like "nvcc 13.0.88"; None: built without CUDA
    cuda_archs: tuple[str, ...]  # like ("80", "90a"); empty without CUDA


def build_info() -> BuildInfo:
    """How the extension was compiled; asks no GPU."""
    info = _C.build_info()
    return BuildInfo(
        revision=info["revision"],
        compiler=info["compiler"],
        cuda_compiler=info["cuda_compiler"] or None,
        cuda_archs=tuple(filter(None, info["cuda_archs"].split(";"))),
    )


def cpu_features() -> tuple[str, ...]:
    """Instruction-set extensions usable here, out of those that CPU kernels know; named as in /proc/cpuinfo."""
    return tuple(_C.cpu_features().split())


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: the strongest that this machine supports and that
    SLICEGPT_FAST_CPU_ISA, read once per process, allows.

    From weakest to strongest, on x86-64: baseline, avx2, avx512, avx512bf16; on aarch64: baseline.

    Raises InputError where the variable holds another name.
    """
    try:
        return _C.cpu_isa()
    except ValueError as error:
        raise InputError(f"{error}; unset it or set it to one of {', '.join(_C.cpu_isa_names())}.") from None
