"""norm_linear against its reference, and against rms_norm + linear + activation as torch and torch.compile run it."""

from functools import partial

import pytest
import torch.nn.functional as F
from timing import MACHINE, PREFILL_ROWS, by_kernel, by_torch, copies, random

from slicegpt_fast.ops import norm_linear

EPS = 1e-5
# Rows and columns of the weight, activation: Llama-2-7B's at sliced widths, SmolLM2's.
LAYERS = {
    "cuda": [
        (n, d, activation) for d in (2872, 2880, 3072, 3328) for n, activation in ((12288, None), (22016, "silu_gate"))
    ],
    "cpu": [
        pytest.param(960, 456, None, marks=pytest.mark.quick),
        pytest.param(3072, 456, "silu_gate", marks=pytest.mark.quick),
        (4096, 2872, None),
    ],
    "tiny": [(48, 24, "silu_gate")],
}[MACHINE]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"], "tiny": ["float16"]}[MACHINE]
ROWS = {"cuda": [1, 16, PREFILL_ROWS], "cpu": [1, 8, PREFILL_ROWS], "tiny": [1, PREFILL_ROWS]}[MACHINE]


def torch_formulation(h, weight, activation):
    y = F.linear(F.rms_norm(h, h.shape[-1:], eps=EPS), weight)
    if activation is None:
        return y
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "activation"), LAYERS)
def bench_norm_linear(measure, n, d, activation, dtype, M):
    h, weight = random(M, d, dtype=dtype), random(n, d, dtype=dtype)
    rest = (None, EPS, d, h.float().square().sum(1), activation)
    torch_calls = by_torch(torch_formulation, d)

    def contenders():
        weights = [weight.clone() for _ in range(copies(weight.nbytes, M))]

        def on(backend):
            return [partial(norm_linear, h, w, *rest, backend=backend) for w in weights]

        sets = [(h, w, activation) for w in weights]
        return {"auto": on("auto"), **by_kernel(on), "reference": on("reference"), **torch_calls(sets)}

    columns = n // 2 if activation else n
    measure(
        contenders,
        dtype=dtype,
        bytes=(n * d + M * d + M * columns) * h.element_size(),
        flops=2 * M * n * d,
    )
