"""residual_linear against torch with beta = 1.

python bench/bench_residual_linear.py [--out FOLDER]

On a GPU, Llama-2-7B's output and down projections at sliced widths. Prefill, M = 4096: against linear and addmm, eager
and under torch.compile(max-autotune). Decode, M = 1, 4, 16: the share of the copy bandwidth reached on the weights'
bytes, inside a CUDA graph. Shortcuts: dense, and low rank with r = 64.

On a CPU, a layer of Llama's size and those of a sliced SmolLM2, in every dtype and with every shortcut; the share of
the read bandwidth reached on the weights' bytes.
"""

from functools import partial
from typing import Any

import torch
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

from slicegpt_fast.ops import residual_linear

WIDTHS = (2872, 3072, 3328)
LAYERS = {"out": 4096, "down": 11008}  # width of the input
CPU_LAYERS = ((3072, 4096), (456, 576), (456, 1536))  # rows and columns of the weight
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANK = 64


def torch_formulation(a, weight, h, shortcut):
    """Without the sums of squares, which torch's norm computes for itself."""
    if shortcut is None:
        return torch.addmm(h, a, weight.T)
    if isinstance(shortcut, torch.Tensor):
        return torch.addmm(a @ weight.T, h, shortcut)
    return torch.addmm(torch.addmm(h, a, weight.T), *shortcut)


def operands(
    M: int, d: int, k: int, kind: str, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> tuple[Any, ...]:
    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

    shortcuts = {
        "absent": lambda: None,
        "dense": lambda: random(d, d),
        "low rank": lambda: (random(M, RANK), random(RANK, d)),
    }
    return random(M, k), random(d, k), random(M, d), shortcuts[kind]()


def ours(a, weight, h, shortcut, backend="triton"):
    return residual_linear(a, weight, None, h, shortcut, backend=backend)


def prefill(M: int) -> list[dict[str, Any]]:
    rows = []
    for d in WIDTHS:
        for layer, k in LAYERS.items():
            for kind in ("dense", "low rank"):
                arguments = operands(M, d, k, kind)
                compiled = torch.compile(torch_formulation, mode="max-autotune-no-cudagraphs", dynamic=False)
                eager = median_us(partial(torch_formulation, *arguments))
                best = min(eager, median_us(partial(compiled, *arguments)))
                kernel = median_us(partial(ours, *arguments))
                rows.append(
                    {
                        "layer": layer,
                        "shortcut": kind,
                        "M": M,
                        "d": d,
                        "triton_us": kernel,
                        "auto_us": median_us(partial(ours, *arguments, backend="auto")),
                        "torch_us": best,
                        "TFLOP/s": 2 * M * d * (k + (d if kind == "dense" else RANK)) / kernel / 1e6,
                        "x torch": best / kernel,
                    }
                )
    return rows


def decode(rows_of_a: tuple[int, ...]) -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    rows = []
    for M in rows_of_a:
        for d in WIDTHS:
            for layer, k in LAYERS.items():
                size = 2 * d * (k + d)
                sets = [operands(M, d, k, "dense") for _ in range(copies(size))]
                kernel = graph_us([partial(ours, *arguments) for arguments in sets])
                by_cuda = unless_refused(graph_us, [partial(ours, *arguments, backend="cuda") for arguments in sets])
                by_torch = graph_us([partial(torch_formulation, *arguments) for arguments in sets])
                rows.append(
                    {
                        "layer": layer,
                        "shortcut": "dense",
                        "M": M,
                        "d": d,
                        "triton_us": kernel,
                        "cuda_us": by_cuda,
                        "torch_us": by_torch,
                        "x torch": by_torch / kernel,
                        "share of copy bandwidth (target 0.8)": size / (1e-6 * kernel) / bandwidth,
                    }
                )
    return rows


def on_cpu(rows_of_a: tuple[int, ...]) -> list[dict[str, Any]]:
    bandwidth = read_bandwidth()
    rows = []
    for d, k in CPU_LAYERS:
        for dtype in DTYPES:
            for kind, width in {"absent": 0, "dense": d, "low rank": RANK}.items():
                size = d * (k + width) * dtype.itemsize
                for M in rows_of_a:
                    sets = [operands(M, d, k, kind, dtype, "cpu") for _ in range(cpu_copies(size))]
                    us = interleaved_us(
                        {
                            "cpu": [partial(ours, *arguments, backend="cpu") for arguments in sets],
                            "torch": [partial(torch_formulation, *arguments) for arguments in sets],
                        }
                    )
                    rows.append(
                        {
                            "layer": f"{k} -> {d}",
                            "shortcut": kind,
                            "dtype": str(dtype).removeprefix("torch."),
                            "M": M,
                            "cpu_us": us["cpu"],
                            "torch_us": us["torch"],
                            "x torch": us["torch"] / us["cpu"],
                            "GFLOP/s": 2e-3 * M * d * (k + width) / us["cpu"],
                            "GB/s": 1e-3 * size / us["cpu"],
                            "share of read bandwidth": 1e6 * size / us["cpu"] / bandwidth,
                        }
                    )
    return rows


if __name__ == "__main__":
    main("residual_linear", lambda: prefill(4096) + decode((1, 4, 16)), lambda: on_cpu((1, 8)))
