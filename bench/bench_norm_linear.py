"""norm_linear against the best torch formulation.

python bench/bench_norm_linear.py [--out FOLDER]

On a GPU, Llama-2-7B's projections at sliced widths.
Prefill, M = 4096: against rms_norm + linear + activation, eager and under torch.compile(max-autotune). Decode,
M = 1, 4, 16: the share of the copy bandwidth reached on the weight's bytes, inside a CUDA graph.

On a CPU, a layer of Llama's size and those of a sliced SmolLM2, in every dtype: against rms_norm + linear + activation
and against linear alone; the share of the read bandwidth reached on the weight's bytes.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernels import (
    copies,
    copy_bandwidth,
    cpu_copies,
    graph_us,
    interleaved_us,
    main,
    median_us,
    read_bandwidth,
    unless_refused,
)

from slicegpt_fast.ops import norm_linear

WIDTHS = (2872, 3072, 3328)
LAYERS = {"qkv": (3 * 4096, None), "gate/up": (2 * 11008, "silu_gate")}  # rows of the weight, activation
CPU_LAYERS = ((4096, 3072, None), (960, 456, None), (3072, 456, "silu_gate"))  # rows and columns of the weight
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


def on_cpu(rows_of_h: tuple[int, ...]) -> list[dict[str, Any]]:
    bandwidth = read_bandwidth()
    rows = []
    for n, d, activation in CPU_LAYERS:
        for dtype in DTYPES:
            size = n * d * dtype.itemsize
            weights = [torch.randn(n, d).to(dtype) for _ in range(cpu_copies(size))]
            for M in rows_of_h:
                h = torch.randn(M, d).to(dtype)
                rest = (None, EPS, d, h.float().square().sum(1), activation)
                us = interleaved_us(
                    {
                        "cpu": [partial(norm_linear, h, w, *rest, backend="cpu") for w in weights],
                        "torch": [partial(torch_formulation, h, w, activation) for w in weights],
                        "linear": [partial(F.linear, h, w) for w in weights],
                    }
                )
                rows.append(
                    {
                        "layer": f"{d} -> {n}" + (f", {activation}" if activation else ""),
                        "dtype": str(dtype).removeprefix("torch."),
                        "M": M,
                        "cpu_us": us["cpu"],
                        "torch_us": us["torch"],
                        "x torch": us["torch"] / us["cpu"],
                        "x linear": us["linear"] / us["cpu"],
                        "GFLOP/s": 2e-3 * M * n * d / us["cpu"],
                        "GB/s": 1e-3 * size / us["cpu"],
                        "share of read bandwidth": 1e6 * size / us["cpu"] / bandwidth,
                    }
                )
    return rows


if __name__ == "__main__":
    main("norm_linear", lambda: prefill(4096) + decode((1, 4, 16)), lambda: on_cpu((1, 4, 8, 64)))
