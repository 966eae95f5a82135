"""covariance_ against its fp64 reference and a full torch matmul with fp32 sums; FLOPs counted for one triangle."""

from functools import partial

import pytest
import torch
from timing import DEVICE, MACHINE, by_kernel, random

from slicegpt_fast.ops import covariance_

SHAPES = {  # tokens, width
    "cuda": [(65536, D) for D in (2872, 4096, 8192)],
    "cpu": [pytest.param(4096, 576, marks=pytest.mark.quick), (1024, 2872), (1024, 4096)],
    "tiny": [(40, 24)],
}[MACHINE]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"], "tiny": ["float16"]}[MACHINE]


def full_matmul(x):
    return torch.mm(x.T, x, out_dtype=torch.float32) if x.is_cuda else x.float().T @ x.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def bench_covariance(measure, N, D, dtype):
    drawn = random(N, D, dtype=dtype)
    accumulated = 8 * D * D  # bytes

    def contenders():
        x, acc = drawn.clone(), torch.zeros(D, D, dtype=torch.float64, device=DEVICE)

        def on(backend):
            return [partial(covariance_, acc, x, backend=backend)]

        return {
            "auto": on("auto"),
            **by_kernel(on),
            "reference": on("reference"),
            "torch": [partial(full_matmul, x)],
        }

    measure(contenders, dtype=dtype, bytes=drawn.nbytes + 2 * accumulated, flops=N * D * (D + 1))
