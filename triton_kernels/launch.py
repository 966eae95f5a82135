"""What every kernel launch needs: the GPU's facts, the launch itself, and counters for the programs that finish last.

A result that several programs contribute to is never summed with floating-point atomics: the order, and so the bits,
would change from run to run. Each program writes its share to a workspace, then draws a number from an integer
counter; the one that draws the last number adds the shares in a fixed order and sets the counter back to zero. One
launch, same bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Gpu:
    """The facts of a GPU that kernels and tile choice depend on."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int  # bytes one program may use

    @property
    def has_tma(self) -> bool:
        return self.capability >= (9, 0)


# What the interpreter pretends to run on: the code paths of Hopper, few enough programs to be quick.
INTERPRETER = Gpu("cpu", (9, 0), 4, 227 * 1024)


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """Facts of the GPU behind ``device``; a made-up one where the kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    facts = torch.cuda.get_device_properties(device)
    return Gpu(facts.name, (facts.major, facts.minor), facts.multi_processor_count, facts.shared_memory_per_block_optin)


def interpreting() -> bool:
    """True where the environment asked for Triton's interpreter, which runs kernels on CPU tensors."""
    return bool(knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Launches ``kernel`` on ``device`` and its current stream."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **meta)


@triton.jit
def arrives_last(counter, programs):
    """Counts this program in; true for the last of ``programs``, which then sees all that the others stored."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


def vector_width(*matrices: torch.Tensor | None) -> int:
    """Elements that one load may take from any row of these matrices: 16 bytes of them, or 1 if not all align."""
    present = [x for x in matrices if x is not None]
    width = 16 // present[0].element_size()
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % width == 0 and x.shape[1] % width == 0 for x in present)
    return width if aligned else 1


def fits_tma(*matrices: torch.Tensor | None) -> bool:
    """True where the tensor memory accelerator can and should read tiles of all these matrices: aligned and 16-bit."""
    present = [x for x in matrices if x is not None]
    two_bytes = all(x.element_size() == 2 for x in present)
    return two_bytes and vector_width(*present) > 1 and all(x.stride(0) >= x.shape[1] for x in present)
