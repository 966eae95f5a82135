"""residual_linear against its reference, and against addmm, for each kind of shortcut."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from timing import MACHINE, PREFILL_ROWS, by_kernel, by_torch, copies, random

from slicegpt_fast.ops import residual_linear

RANK = 64
# Rows and columns of the weight, shortcut: Llama-2-7B's at sliced widths, SmolLM2's.
LAYERS = {
    "cuda": [
        *((d, 11008, "dense") for d in (2872, 2880, 3072, 3328)),
        (2872, 4096, "dense"),
        (2880, 4096, "dense"),
        (2872, 11008, "low rank"),
        (3072, 4096, "low rank"),
    ],
    "cpu": [
        pytest.param(456, 576, "none", marks=pytest.mark.quick),
        pytest.param(456, 1536, "dense", marks=pytest.mark.quick),
        (2872, 4096, "low rank"),
        (3328, 4096, "dense"),
    ],
    "tiny": [(24, 40, "dense")],
}[MACHINE]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"], "tiny": ["float16"]}[MACHINE]
ROWS = {"cuda": [1, 16, 32, 64, 256, 2048, 4096], "cpu": [1, 8, PREFILL_ROWS], "tiny": [1, PREFILL_ROWS]}[MACHINE]


def torch_formulation(a, weight, h, shortcut):
    """Without the sums of squares, which torch's norm computes for itself."""
    if shortcut is None:
        return torch.addmm(h, a, weight.T)
    if isinstance(shortcut, torch.Tensor):
        return torch.addmm(a @ weight.T, h, shortcut)
    return torch.addmm(torch.addmm(h, a, weight.T), *shortcut)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "k", "kind"), LAYERS)
def bench_residual_linear(measure, d, k, kind, dtype, M):
    shortcut = {  # as a patched model has them: weights of linear layers, transposed
        "none": lambda: None,
        "dense": lambda: random(d, d, dtype=dtype).T,
        "low rank": lambda: (random(M, RANK, dtype=dtype), random(d, RANK, dtype=dtype).T),
    }[kind]()
    a, h, weight = random(M, k, dtype=dtype), random(M, d, dtype=dtype), random(d, k, dtype=dtype)
    inner = k + {"none": 0, "dense": d, "low rank": RANK}[kind]  # of the one matmul that computes it all
    size = d * inner * h.element_size()
    torch_calls = by_torch(torch_formulation, d)

    def contenders():
        sets = [(a, weight.clone(), h, deepcopy(shortcut)) for _ in range(copies(size, M))]

        def on(backend):
            return [partial(residual_linear, a, w, None, h, s, backend=backend) for a, w, h, s in sets]

        return {"auto": on("auto"), **by_kernel(on), "reference": on("reference"), **torch_calls(sets)}

    measure(
        contenders,
        dtype=dtype,
        bytes=size + M * (k + 2 * d) * h.element_size(),
        flops=2 * M * d * inner,
    )
