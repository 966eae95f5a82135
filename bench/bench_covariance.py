"""covariance_ against its fp64 reference and a full torch matmul with fp32 sums; FLOPs counted for one triangle."""

from functools import partial

import pytest
import torch
from timing import DEVICE, by_kernel, random

from slicegpt_fast.ops import covariance_

SHAPES = {  # tokens, width
    "cuda": [(65536, D) for D in (2872, 4096, 8192)],
    "cpu": [pytest.param(4096, 576, marks=pytest.mark.quick), (1024, 2872), (1024, 4096)],
}[DEVICE.type]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"]}[DEVICE.type]


def full_matmul(x):
    return torch.mm(x.T, x, out_dtype=torch.float32) if x.is_cuda else x.float().T @ x.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), SHAPES)
def bench_covariance(measure, N, D, dtype):
    x = random(N, D, dtype=dtype)
    acc = torch.zeros(D, D, dtype=torch.float64, device=DEVICE)
    measure(
        {
            "auto": [partial(covariance_, acc, x)],
            **by_kernel(lambda backend: [partial(covariance_, acc, x, backend=backend)]),
            "reference": [partial(covariance_, acc, x, backend="reference")],
            "torch": [partial(full_matmul, x)],
        },
        dtype=dtype,
        bytes=x.nbytes + 2 * acc.nbytes,
        flops=N * D * (D + 1),
    )
