"""norm_linear against the best torch formulation, on Llama-2-7B's projections at sliced widths.

python bench/bench_norm_linear.py [--out FOLDER]

Prefill, M = 4096: against rms_norm + linear + activation, eager and under torch.compile(max-autotune). Decode,
M = 1, 4, 16: the share of the copy bandwidth reached on the weight's bytes, inside a CUDA graph.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernels import copies, copy_bandwidth, graph_us, main, median_us, unless_refused

from slicegpt_fast.ops import norm_linear

WIDTHS = (2872, 3072, 3328)
LAYERS = {"qkv": (3 * 4096, None), "gate/up": (2 * 11008, "silu_gate")}  # rows of the weight, activation
EPS = 1e-5


def torch_formulation(h, weight, activation):
    y = F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), weight)
    if activation is None:
        return y
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def prefill(M: int) -> list[dict[str, Any]]:
    rows = []
    for d in WIDTHS:
        for layer, (n, activation) in LAYERS.items():
            h = torch.randn(M, d, dtype=torch.bfloat16, device="cuda")
            weight = torch.randn(n, d, dtype=torch.bfloat16, device="cuda") / d**0.5
            sumsq = h.float().square().sum(1)
            compiled = torch.compile(torch_formulation, mode="max-autotune-no-cudagraphs", dynamic=False)
            eager = median_us(partial(torch_formulation, h, weight, activation))
            best = min(eager, median_us(partial(compiled, h, weight, activation)))
            run = partial(norm_linear, h, weight, None, EPS, 4096, activation=activation)
            ours = median_us(partial(run, sumsq=sumsq, backend="triton"))
            rows.append(
                {
                    "layer": layer,
                    "M": M,
                    "d": d,
                    "triton_us": ours,
                    "own_statistic_us": median_us(partial(run, backend="triton")),
                    "auto_us": median_us(partial(run, sumsq=sumsq)),
                    "torch_us": best,
                    "TFLOP/s": 2 * M * n * d / ours / 1e6,
                    "x torch": best / ours,
                }
            )
    return rows


def decode(rows_of_h: tuple[int, ...]) -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    rows = []
    for M in rows_of_h:
        for d in WIDTHS:
            for layer, (n, activation) in LAYERS.items():
                weights = torch.randn(copies(2 * n * d), n, d, dtype=torch.bfloat16, device="cuda")
                h = torch.randn(M, d, dtype=torch.bfloat16, device="cuda")
                rest = (None, EPS, 4096, None, activation)
                ours = graph_us([partial(norm_linear, h, w, *rest, backend="triton") for w in weights])
                by_cuda = unless_refused(graph_us, [partial(norm_linear, h, w, *rest, backend="cuda") for w in weights])
                by_torch = graph_us([partial(torch_formulation, h, w, activation) for w in weights])
                rows.append(
                    {
                        "layer": layer,
                        "M": M,
                        "d": d,
                        "triton_us": ours,
                        "cuda_us": by_cuda,
                        "torch_us": by_torch,
                        "x torch": by_torch / ours,
                        "share of copy bandwidth (target 0.8)": 2 * n * d / (1e-6 * ours) / bandwidth,
                    }
                )
    return rows


if __name__ == "__main__":
    main("norm_linear", lambda: prefill(4096) + decode((1, 4, 16)))
