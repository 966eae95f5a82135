"""Six calls of the CUDA kernels at the shapes of a sliced Llama-2-7B, for ncu to look at.

ncu --section SpeedOfLight python bench/representative.py [--emulate]
"""

import sys
from contextlib import nullcontext

import torch

from slicegpt_fast.ops.dispatch import OPS, Request
from slicegpt_fast.ops.tuning import Shape

D, HEADS, MLP = 3072, 4096, 11008
SHAPES = (
    Shape("norm_linear", 1, 2 * MLP, D, "silu_gate"),
    Shape("residual_linear", 1, D, MLP + D, "dense"),
    Shape("norm_linear", 4096, 2 * MLP, D, "silu_gate"),
    Shape("residual_linear", 4096, D, HEADS + D, "dense"),
    Shape("covariance_", 16384, D, D),
    Shape("attend", 1, HEADS, 4096),
)
TINY = (Shape("norm_linear", 1, 48, 40, "silu_gate"), Shape("covariance_", 40, 24, 24), Shape("attend", 1, 256, 40))

if __name__ == "__main__":
    emulate = "--emulate" in sys.argv
    if emulate:
        from emulator.emulate import emulating
    device = torch.device("cpu" if emulate else "cuda")
    with emulating("90a") if emulate else nullcontext():
        for shape in TINY if emulate else SHAPES:
            op, sizes = OPS[shape.op], (shape.m, shape.n, shape.k)
            request = Request(shape.op, device, torch.bfloat16, op.regime(shape.m), sizes, shape.epilogue)
            op.backends["cuda"].run(*op.operands(request))
