"""``covariance_``: accumulate the (uncentred) covariance of token activations, ``acc += X^T X``."""

from __future__ import annotations

import torch
from torch import Tensor

from slicegpt_fast.kernels.regimes import Epilogue
from slicegpt_fast.ops.dispatch import HALF, KERNELS, Op, Request, Rule, check_matrix, check_vector, require

ROWS_PER_STEP = 4096  # bounds the fp64 copy of x


def covariance_(
    acc: Tensor, x: Tensor, row_scale: Tensor | None = None, mask: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Add ``X^T X`` to ``acc`` in place, where X is the scaled and selected rows of ``x``.

    Args:
        acc: [D, D] accumulator, fp64 (the master that loses nothing over many calls) or fp32. Symmetric: a kernel
            reads its lower triangle and writes both.
        x: [N, D] activations of any floating dtype. fp32 is not rounded to tf32. Kernels sum blocks of rows in fp32,
            which these sums must not overflow.
        row_scale: [N] factor of each row, such as the reciprocal norm of the normalised signal. With fp16 ``x``, the
            scaled rows must lie in fp16's range.
        mask: [N] bool; rows where it is false count nowhere, whatever they hold.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ``acc``.

    Raises:
        InputError: an argument's shape, dtype or device does not fit, or the backend cannot run the call.
    """
    OP(acc, x, row_scale, mask, backend=backend)
    if not torch.compiler.is_compiling() and not acc.is_inference():
        torch.autograd.graph.increment_version(acc)  # kernels write past autograd
    return acc


def reference(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    """The op in plain torch, in fp64."""
    for start in range(0, x.shape[0], ROWS_PER_STEP):
        step = slice(start, start + ROWS_PER_STEP)
        rows = x[step].double()
        if row_scale is not None:
            rows = rows * row_scale[step, None].double()
        if mask is not None:
            rows = torch.where(mask[step, None], rows, 0)
        if acc.dtype == torch.float64:
            acc.addmm_(rows.T, rows)
        else:
            acc.add_(rows.T @ rows)


def check(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    check_matrix("x", x)
    check_matrix("acc", acc, device=x.device)
    N, D = x.shape
    require(acc.dtype in (torch.float32, torch.float64), f"argument acc has dtype {acc.dtype}; use float64 or float32.")
    require(
        acc.shape[0] == D and acc.shape[1] == D,
        f"argument acc has shape {list(acc.shape)}; for x of width {D} it must be [{D}, {D}].",
    )
    require(D < 2 or 0 not in acc.stride(), "argument acc is expanded; give each element memory of its own.")
    check_vector("row_scale", row_scale, N, None, x.device)
    require(row_scale is None or row_scale.is_floating_point(), "argument row_scale must have a floating-point dtype.")
    check_vector("mask", mask, N, torch.bool, x.device)


def request(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> Request:
    N, D = x.shape
    epilogue: Epilogue | None = None if row_scale is None else "row scale"
    return Request("covariance_", x.device, x.dtype, "tall", (N, D, D), epilogue)


def operands(request: Request) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Return random arguments that ask for ``request``."""
    N, D, _ = request.shape
    row_scale = torch.rand(N, dtype=torch.float32, device=request.device) + 0.5
    acc = torch.zeros(D, D, dtype=torch.float64, device=request.device)
    return acc, request.random(N, D), row_scale if request.epilogue == "row scale" else None, None


OP = Op(
    "covariance_",
    "(Tensor(a!) acc, Tensor x, Tensor? row_scale, Tensor? mask, str backend) -> ()",
    reference=reference,
    check=check,
    request=request,
    fake=lambda acc, x, row_scale, mask: None,
    operands=operands,
    regime=lambda rows: "tall",
    epilogues=(None, "row scale"),
    rules=(
        Rule("cuda", (8, 0), HALF, "tall", KERNELS, "half the FLOPs of a full matmul"),
        Rule("cpu", (0, 0), (), "tall", ("cpu",), "half the FLOPs of a full matmul"),
    ),
)
