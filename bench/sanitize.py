"""Small calls of every kernel of csrc/cuda, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck|racecheck python bench/sanitize.py
"""

import torch

from slicegpt_fast.ops import covariance_, norm_linear, residual_linear, use_backend


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


HOPPER = torch.cuda.get_device_capability() == (9, 0)
# Aligned and not, one and several tiles, one, four and eight splits, up to 8 rows and more; then prefill. A low-rank
# shortcut's columns lie behind those of h and leave its rows misaligned, but not the weight's.
SHAPES = [(1, 64, 32), (3, 34, 33), (8, 200, 1024), (16, 136, 1500), (1, 64, 2048), (16, 136, 2048)]
if HOPPER:
    SHAPES += [(17, 40, 24), (130, 300, 72), (300, 520, 333)]

with use_backend("cuda"):
    for dtype in (torch.float16, torch.bfloat16):
        for M, n, K in SHAPES:
            read, bias = random(M, K + 5, dtype=dtype), random(n, dtype=dtype)
            h, t = read[:, :K], read[:, K:]
            norm_linear(h, random(n + 24, K, dtype=dtype), bias, 1e-5, K, activation="silu_gate", unscaled=24)
            norm_linear(h, random(n, K, dtype=dtype), None, 1e-5, K, sumsq=torch.ones(M, device="cuda"))
            weight, S = random(n, K, dtype=dtype), random(n, n, dtype=dtype)
            for shortcut in (None, S, S.T, (t, random(5, n, dtype=dtype)), (t, random(n, 5, dtype=dtype).T)):
                residual_linear(h, weight, bias, random(M, n, dtype=dtype), shortcut)
        if HOPPER:
            for N, D in ((64, 40), (300, 301), (2500, 264)):
                x, acc = random(N, D, dtype=dtype), torch.zeros(D, D, dtype=torch.float64, device="cuda")
                covariance_(acc, x)
                covariance_(acc, x, torch.rand(N, device="cuda"), torch.rand(N, device="cuda") > 0.5)
torch.cuda.synchronize()
