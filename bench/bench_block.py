"""The linear part of a sliced block as one chain: QKV, output projection, gate and up, down; no attention between."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timing import DEVICE, PREFILL_ROWS, compiled, copies, random

from slicegpt_fast.ops import norm_linear, residual_linear

EPS = 1e-5
# Sliced width, width of the heads, of keys and values, of the MLP; dense shortcuts or none.
BLOCKS = {
    "cuda": [(d, 4096, 4096, 11008, "dense") for d in (2872, 3072, 3328)],
    "cpu": [
        pytest.param(456, 576, 192, 1536, "none", marks=pytest.mark.quick),
        (2872, 4096, 4096, 11008, "dense"),
    ],
}[DEVICE.type]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16"]}[DEVICE.type]


def fused(h, sumsq, qkv, out, gate_up, down, shortcut, *, backend):
    read = norm_linear(h, qkv, None, EPS, h.shape[1], sumsq, backend=backend)
    h, sumsq = residual_linear(read[:, : out.shape[1]], out, None, h, shortcut, backend=backend)
    read = norm_linear(h, gate_up, None, EPS, h.shape[1], sumsq, "silu_gate", backend=backend)
    return residual_linear(read, down, None, h, shortcut, backend=backend)


def torch_formulation(h, _, qkv, out, gate_up, down, shortcut):
    def add(written, h):
        return written + h if shortcut is None else torch.addmm(written, h, shortcut)

    read = F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), qkv)
    h = add(F.linear(read[:, : out.shape[1]], out), h)
    gate, up = F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), gate_up).chunk(2, dim=-1)
    return add(F.linear(F.silu(gate) * up, down), h)


@pytest.mark.parametrize("M", [1, PREFILL_ROWS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "heads", "keys", "mlp", "kind"), BLOCKS)
def bench_block(measure, d, heads, keys, mlp, kind, dtype, M):
    shapes = [(heads + 2 * keys, d), (d, heads), (2 * mlp, d), (d, mlp)]
    weights = sum(n * k for n, k in shapes) + (2 * d * d if kind == "dense" else 0)
    h = random(M, d, dtype=dtype)
    sumsq = h.float().square().sum(1)
    sets = [
        (
            h,
            sumsq,
            *(random(*shape, dtype=dtype) for shape in shapes),
            random(d, d, dtype=dtype) if kind == "dense" else None,
        )
        for _ in range(copies(weights * h.element_size(), M))
    ]
    by_compiler = compiled(torch_formulation)
    measure(
        {
            "auto": [partial(fused, *operands, backend="auto") for operands in sets],
            "reference": [partial(fused, *operands, backend="reference") for operands in sets],
            "torch": [partial(torch_formulation, *operands) for operands in sets],
            "torch.compile": [partial(by_compiler, *operands) for operands in sets],
        },
        dtype=dtype,
        bytes=weights * h.element_size(),
        flops=2 * M * weights,
    )
