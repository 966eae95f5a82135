"""covariance_ against torch's matmuls.

python bench/bench_covariance.py [--out FOLDER]

On a GPU, N = 65536: against a full cuBLAS matmul (bf16 operands, fp32 result) and the fp64 reference. On a CPU, the
width of a 7B model and SmolLM2's: against X^T X in fp64, the reference's formulation, and in fp32.
"""

from functools import partial
from typing import Any

import torch
from kernels import interleaved_us, main, median_us, unless_refused

from slicegpt_fast.ops import covariance_

N = 65536
CPU_SHAPES = ((2048, 4096), (4096, 576), (512, 576))
TARGETS = {2872: 1.3, 4096: 1.6, 8192: 1.6}  # times the full matmul's speed


def on_gpu() -> list[dict[str, Any]]:
    rows = []
    for D, target in TARGETS.items():
        x = torch.randn(N, D, dtype=torch.bfloat16, device="cuda")
        row_scale = torch.rand(N, device="cuda") + 0.5
        acc = torch.zeros(D, D, dtype=torch.float64, device="cuda")
        ours = median_us(partial(covariance_, acc, x, backend="triton"))
        scaled = median_us(partial(covariance_, acc, x, row_scale, backend="triton"))
        by_cuda = unless_refused(median_us, partial(covariance_, acc, x, backend="cuda"))
        full = median_us(partial(torch.mm, x.T, x, out_dtype=torch.float32))
        fp64 = median_us(partial(covariance_, acc, x, backend="reference"))
        rows.append(
            {
                "D": D,
                "triton_us": ours,
                "cuda_us": by_cuda,
                "with_row_scale_us": scaled,
                "full_matmul_us": full,
                "fp64_us": fp64,
                "TFLOP/s (half)": N * D * D / ours / 1e6,
                "x full matmul": full / ours,
                "target": target,
                "x fp64 (target 15)": fp64 / ours,
            }
        )
    return rows


def on_cpu() -> list[dict[str, Any]]:
    rows = []
    for M, D in CPU_SHAPES:
        x = torch.randn(M, D)
        row_scale = torch.rand(M) + 0.5
        acc = torch.zeros(D, D, dtype=torch.float64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            y = x.to(dtype)
            calls = {
                "cpu": [partial(covariance_, acc, y, backend="cpu")],
                "scaled": [partial(covariance_, acc, y, row_scale, backend="cpu")],
                "fp64": [lambda y=y: y.double().T @ y.double()],
                "fp32": [partial(torch.mm, x.T, x)],
            }
            us = interleaved_us(calls, rounds=5)
            rows.append(
                {
                    "N": M,
                    "D": D,
                    "dtype": str(dtype).removeprefix("torch."),
                    "cpu_us": us["cpu"],
                    "with_row_scale_us": us["scaled"],
                    "fp64_us": us["fp64"],
                    "fp32_us": us["fp32"],
                    "GFLOP/s (half)": M * D * D / us["cpu"] / 1e3,
                    "x fp64 (bf16: target 10)": us["fp64"] / us["cpu"],
                    "x fp32 (fp32: target 3)": us["fp32"] / us["cpu"],
                }
            )
    return rows


if __name__ == "__main__":
    main("covariance", on_gpu, on_cpu)
