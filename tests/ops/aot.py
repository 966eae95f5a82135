"""Compiles every kernel for a GPU that is not here and says what is wrong with it.

python tests/ops/aot.py sm_90 some|all
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from slicegpt_fast.triton_kernels import covariance, norm_linear, residual_linear, tiles
from slicegpt_fast.triton_kernels.compile_ahead import GPUS, Compiled, compile_calls
from slicegpt_fast.triton_kernels.launch import Gpu

# The compiler may trade a few bytes of an fp32 kernel's registers for a full step of occupancy.
SPILLED_BYTES = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 64}

Case = tuple[str, Callable[[], Any], str]  # name, call, kernel whose MMAs are checked


def covariance_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    scale, mask = torch.empty(8192), torch.ones(8192, dtype=torch.bool)
    extras = {"plain": (None, None), "scaled, masked": (scale, mask)}
    if everything:
        extras |= {"masked": (None, mask), "scaled": (scale, None)}
    for width in (2872, 2871) if everything else (2872,):
        x = torch.empty(8192, width, dtype=dtype)
        acc = torch.empty(width, width, dtype=torch.float64)
        for name, extra in extras.items():
            yield f"covariance_ D={width} {name}", partial(covariance.covariance_, acc, x, *extra), "partial_tiles"


def norm_linear_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    activations = (None, "relu", "gelu", "gelu_tanh", "silu_gate") if everything else ("silu_gate",)
    for M, d, activation in product((16, 4096), (2872, 2871) if everything else (2872,), activations):
        kernel = "norm_linear_decode" if M == 16 else "norm_linear_prefill"
        h, sumsq = torch.empty(M, d, dtype=dtype), torch.empty(M)
        bias = torch.empty(4096, dtype=dtype)
        plain = torch.empty(4096, d, dtype=dtype)
        with_unscaled = torch.empty(4096 + 64, d, dtype=dtype)
        for tile in tiles.tiles_for(gpu, dtype, M, d == 2872, activation):
            name = f"norm_linear M={M} d={d} {activation} {tile}"
            run = partial(norm_linear.norm_linear, eps=1e-5, full_width=4096, activation=activation, tile=tile)
            yield name, partial(run, h, plain, None, sumsq=sumsq, unscaled=0), kernel
            yield name, partial(run, h, with_unscaled, bias, sumsq=None, unscaled=64), kernel


def residual_linear_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    for M, d in product((16, 4096), (2872, 2871) if everything else (2872,)):
        kernel = "residual_linear_decode" if M == 16 else "residual_linear_prefill"
        a, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((M, 4096), (d, 4096), (d,)))
        h, t, S, V = (torch.empty(shape, dtype=dtype) for shape in ((M, d), (M, 64), (d, d), (64, d)))
        shortcuts = {"dense": dict(bias=bias, residual=None, a2=h, weight2=S)}
        if everything:
            shortcuts["add"] = dict(bias=None, residual=h, a2=None, weight2=None)
            shortcuts["low rank"] = dict(bias=bias, residual=h, a2=t, weight2=V)
        for shortcut, rest in shortcuts.items():
            for tile in tiles.tiles_for(gpu, dtype, M, d == 2872, shortcut):
                run = partial(residual_linear.residual_linear, a, weight, **rest, tile=tile)
                yield f"residual_linear M={M} d={d} {shortcut} {tile}", run, kernel


CASES = (covariance_cases, norm_linear_cases, residual_linear_cases)


def problems(gpu: Gpu, dtype: torch.dtype, mma_kernel: str, kernel: Compiled) -> Iterator[str]:
    """What is wrong with a compiled kernel."""
    if kernel.spilled_bytes > SPILLED_BYTES[dtype]:
        yield f"{kernel.spilled_bytes} bytes spilled ({kernel.registers} registers)"
    if kernel.shared_memory > gpu.shared_memory:
        yield f"{kernel.shared_memory} bytes of shared memory"
    if dtype == torch.float32:
        if "tf32" in kernel.ptx:
            yield "fp32 operands are rounded to tf32"
    elif kernel.name == mma_kernel:
        mma = {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma"}[gpu.capability[0]]
        if mma not in kernel.ptx:
            yield f"no {mma}"


def main(target: str, how_much: str) -> int:
    gpu = GPUS[target]
    half = [torch.bfloat16, torch.float16] if how_much == "all" else [torch.bfloat16]
    count = failures = 0
    for dtype in [*half, torch.float32] if gpu.capability < (10, 0) else half:
        for cases in CASES:
            for name, call, mma_kernel in cases(gpu, dtype, how_much == "all"):
                for kernel in compile_calls(gpu, call):
                    count += 1
                    for problem in problems(gpu, dtype, mma_kernel, kernel):
                        failures += 1
                        print(f"{target} {dtype} {name}: {kernel.name}: {problem}")
    print(f"{target}: {count} kernels compiled, {failures} problems")
    return int(failures > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
