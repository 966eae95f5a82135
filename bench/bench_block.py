"""The linear part of a sliced block as one chain: QKV, output projection, gate and up, down; no attention between."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timing import MACHINE, PREFILL_ROWS, by_kernel, by_torch, copies, random

from slicegpt_fast.ops import norm_linear, residual_linear

EPS = 1e-5
# Sliced width, width of the heads, of keys and values, of the MLP; dense shortcuts or none.
BLOCKS = {
    "cuda": [(d, 4096, 4096, 11008, "dense") for d in (2872, 2880, 3072, 3328)],
    "cpu": [
        pytest.param(456, 576, 192, 1536, "none", marks=pytest.mark.quick),
        (2872, 4096, 4096, 11008, "dense"),
    ],
    "tiny": [(24, 32, 16, 40, "dense")],
}[MACHINE]
ROWS = {"cuda": [1, 4, 16, PREFILL_ROWS], "cpu": [1, PREFILL_ROWS], "tiny": [1, PREFILL_ROWS]}[MACHINE]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16"], "tiny": ["float16"]}[MACHINE]


def fused(h, sumsq, qkv, out, gate_up, down, into_mlp, out_of_mlp, *, backend):
    read = norm_linear(h, qkv, None, EPS, h.shape[1], sumsq, backend=backend)
    h, sumsq = residual_linear(read[:, : out.shape[1]], out, None, h, into_mlp, backend=backend)
    read = norm_linear(h, gate_up, None, EPS, h.shape[1], sumsq, "silu_gate", backend=backend)
    return residual_linear(read, down, None, h, out_of_mlp, backend=backend)


def torch_formulation(h, _, qkv, out, gate_up, down, into_mlp, out_of_mlp):
    def add(written, h, shortcut):
        return written + h if shortcut is None else torch.addmm(written, h, shortcut)

    read = F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), qkv)
    h = add(F.linear(read[:, : out.shape[1]], out), h, into_mlp)
    gate, up = F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), gate_up).chunk(2, dim=-1)
    return add(F.linear(F.silu(gate) * up, down), h, out_of_mlp)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "heads", "keys", "mlp", "kind"), BLOCKS)
def bench_block(measure, d, heads, keys, mlp, kind, dtype, M):
    h = random(M, d, dtype=dtype)
    sumsq = h.float().square().sum(1)
    shapes = [(heads + 2 * keys, d), (d, heads), (2 * mlp, d), (d, mlp)]
    weights = [random(*shape, dtype=dtype) for shape in shapes]
    shortcut = random(d, d, dtype=dtype).T if kind == "dense" else None  # a linear layer's weight
    read = sum(n * k for n, k in shapes) + (2 * d * d if kind == "dense" else 0)  # two shortcuts
    size = read * h.element_size()
    torch_calls = by_torch(torch_formulation, d)

    def contenders():
        sets = [(h, sumsq, *deepcopy(weights), deepcopy(shortcut), deepcopy(shortcut)) for _ in range(copies(size, M))]

        def on(backend):
            return [partial(fused, *operands, backend=backend) for operands in sets]

        return {"auto": on("auto"), **by_kernel(on), "reference": on("reference"), **torch_calls(sets)}

    measure(contenders, dtype=dtype, bytes=size, flops=2 * M * read)
