"""Compiles every kernel for a GPU that is not here and says what is wrong with it.

python tests/ops/aot.py sm_90 some|all bfloat16 float16 float32
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from compile_ahead import GPUS, Compiled, compile_calls, dump, serialised_by, waits_for_each_wgmma

from slicegpt_fast.triton_kernels import attend, covariance, norm_linear, residual_linear, tiles
from slicegpt_fast.triton_kernels.launch import Gpu

# The compiler may trade a few bytes of an fp32 kernel's registers for a full step of occupancy.
SPILLED_BYTES = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 32}

Case = tuple[str, Callable[[], Any], str]  # name, call, kernel whose MMAs are checked
# Three extras that a call has or has not: each pair of them in all four ways.
EXTRAS = ((False, False, False), (False, True, True), (True, False, True), (True, True, False))


def attend_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    sizes, tokens = ((64, 80, 128, 250, 256), (1, 16)) if everything else ((128,), (1, 16))
    # Whether there are norms, angles, a mask.
    extras = EXTRAS if everything else ((False, True, False), (True, True, True))
    for (D, T), (norms, angles, mask) in product(product(sizes, tokens), extras):
        q, new, kept = (torch.empty(shape, dtype=dtype) for shape in ((1, T, 32, D), (1, T, 8, D), (1, 8, 4096, D)))
        cosine = torch.empty(1, T, D, dtype=dtype) if angles else None
        weight = torch.empty(D, dtype=dtype) if norms else None
        allowed = torch.ones(1, T, 4096, dtype=torch.bool) if mask else None
        rest = (kept, kept, torch.zeros((), dtype=torch.int64), 0.1, allowed, weight, weight, 1e-5)
        name = f"attend T={T} D={D} norms={norms} angles={angles} mask={mask}"
        yield name, partial(attend.attend, q, new, new, cosine, cosine, *rest), ""


def covariance_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    scale, mask = torch.empty(8192), torch.ones(8192, dtype=torch.bool)
    extras = product((None, scale), (None, mask)) if everything else ((None, None), (scale, mask))
    for (row_scale, selected), width in product(extras, (2872, 3072, 2871) if everything else (2872,)):
        x = torch.empty(8192, width, dtype=dtype)
        acc = torch.empty(width, width, dtype=torch.float64)
        name = f"covariance_ D={width} scale={row_scale is not None} mask={selected is not None}"
        yield name, partial(covariance.covariance_, acc, x, row_scale, selected), "partial_tiles"


def norm_linear_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    activations = (None, "relu", "gelu", "gelu_tanh", "silu_gate") if everything else ("silu_gate",)
    # Whether there are a bias, a statistic, unscaled columns.
    extras = EXTRAS if everything else ((False, True, False), (True, False, True))
    for M, d, activation in product(*shapes(everything), activations):
        kernel = "norm_linear_decode" if M <= 16 else "norm_linear_prefill"
        h = torch.empty(M, d, dtype=dtype)
        for bias, sumsq, unscaled in extras:
            u = 0 if not unscaled else 64 if d % 8 == 0 else 3
            weight, b = torch.empty(4096 + u, d, dtype=dtype), torch.empty(4096, dtype=dtype) if bias else None
            rest = (b, 1e-5, 4096, torch.empty(M) if sumsq else None, activation, u)
            for tile in tiles.tiles_for(gpu, dtype, M, d % 8 == 0, activation, bias):
                name = f"norm_linear M={M} d={d} {activation} bias={bias} sumsq={sumsq} unscaled={u} {tile}"
                yield name, partial(norm_linear.norm_linear, h, weight, *rest, tile=tile), kernel


def residual_linear_cases(gpu: Gpu, dtype: torch.dtype, everything: bool) -> Iterator[Case]:
    for M, d in product(*shapes(everything)):
        kernel = "residual_linear_decode" if M <= 16 else "residual_linear_prefill"
        a, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((M, 4096), (d, 4096), (d,)))
        h, t, S, V = (torch.empty(shape, dtype=dtype) for shape in ((M, d), (M, 64), (d, d), (64, d)))
        shortcuts: dict[str, tuple[Any, ...]] = {"dense": (None, h, S)}
        if everything:
            shortcuts |= {"transposed": (None, h, S.T), "add": (h, None, None), "low rank": (h, t, V)}
        for (shortcut, rest), b in product(shortcuts.items(), (None, bias)):
            epilogue = "dense" if shortcut == "transposed" else shortcut
            for tile in tiles.tiles_for(gpu, dtype, M, d % 8 == 0, epilogue, b is not None):
                run = partial(residual_linear.residual_linear, a, weight, b, *rest, tile=tile)
                yield f"residual_linear M={M} d={d} {shortcut} bias={b is not None} {tile}", run, kernel


def shapes(everything: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows, and widths: multiples of 8 and of 16, and one whose rows are not aligned."""
    return ((1, 16, 4096), (2872, 3072, 2871)) if everything else ((16, 4096), (2872,))


CASES = (attend_cases, covariance_cases, norm_linear_cases, residual_linear_cases)


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
    if "wgmma.mma_async" in kernel.ptx:
        yield from serialised_by(kernel.ptx)
        if waits_for_each_wgmma(dump(kernel.cubin, "-sass")):
            yield "the machine code waits for every single wgmma"


def main(target: str, how_much: str, *dtypes: str) -> int:
    gpu = GPUS[target]
    checked: set[Compiled] = set()
    failures = 0
    for dtype, cases in product([getattr(torch, dtype) for dtype in dtypes], CASES):
        for name, call, mma_kernel in cases(gpu, dtype, how_much == "all"):
            for kernel in set(compile_calls(gpu, call)) - checked:
                checked.add(kernel)
                for problem in problems(gpu, dtype, mma_kernel, kernel):
                    failures += 1
                    print(f"{target} {dtype} {name}: {kernel.name}: {problem}", flush=True)
    print(f"{target}: {len(checked)} kernels compiled, {failures} problems")
    return int(failures > 0 or not checked)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
