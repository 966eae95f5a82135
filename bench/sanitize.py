"""Small calls of every kernel of csrc/cuda, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck|racecheck python bench/sanitize.py
"""

import torch

from slicegpt_fast.ops import covariance_, norm_linear, residual_linear, use_backend


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


with use_backend("cuda"):
    for dtype in (torch.float16, torch.bfloat16):
        # Shapes: aligned and not, one and several tiles, one and several splits, up to 8 rows and more.
        for M, n, K in ((1, 64, 32), (3, 34, 33), (8, 200, 1024), (16, 136, 1500)):
            h, bias = random(M, K, dtype=dtype), random(n, dtype=dtype)
            norm_linear(h, random(n + 24, K, dtype=dtype), bias, 1e-5, K, activation="silu_gate", unscaled=24)
            norm_linear(h, random(n, K, dtype=dtype), None, 1e-5, K, sumsq=torch.ones(M, device="cuda"))
            weight, S = random(n, K, dtype=dtype), random(n, n, dtype=dtype)
            for shortcut in (None, S, S.T, (random(M, 5, dtype=dtype), random(5, n, dtype=dtype))):
                residual_linear(h, weight, bias, random(M, n, dtype=dtype), shortcut)
        if torch.cuda.get_device_capability() == (9, 0):
            for N, D in ((64, 40), (300, 301), (2500, 264)):
                x, acc = random(N, D, dtype=dtype), torch.zeros(D, D, dtype=torch.float64, device="cuda")
                covariance_(acc, x)
                covariance_(acc, x, torch.rand(N, device="cuda"), torch.rand(N, device="cuda") > 0.5)
torch.cuda.synchronize()
