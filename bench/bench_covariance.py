"""covariance_ against a full cuBLAS matmul (bf16 operands, fp32 result) and the fp64 reference; N = 65536.

python bench/bench_covariance.py [--out FOLDER]
"""

from functools import partial
from typing import Any

import torch
from kernels import main, median_us, unless_refused

from slicegpt_fast.ops import covariance_

N = 65536
TARGETS = {2872: 1.3, 4096: 1.6, 8192: 1.6}  # times the full matmul's speed


def measure() -> list[dict[str, Any]]:
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


if __name__ == "__main__":
    main("covariance", measure)
