"""``covariance_``: accumulate the (uncentred) covariance of token activations, ``acc += X^T X``."""

from __future__ import annotations

import torch
from torch import Tensor

from slicegpt_fast.ops.backends import cpu, cuda, triton
from slicegpt_fast.ops.dispatch import Op, Request, check_matrix, check_vector, require

ROWS_PER_STEP = 4096  # bounds the fp64 copy of x


def covariance_(
    acc: Tensor, x: Tensor, row_scale: Tensor | None = None, mask: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Adds ``X^T X`` to ``acc`` in place, where X is the scaled and selected rows of ``x``.

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
    epilogue = None if row_scale is None else "row scale"
    return Request("covariance_", x.device, x.dtype, "tall", (N, D, D), epilogue)


def _triton(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    from slicegpt_fast.triton_kernels import covariance

    if x.numel() > 0:
        covariance.covariance_(acc, x, row_scale, mask)


def _cuda(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    if x.numel() > 0:
        cuda.covariance_(acc, x, row_scale, mask)


OP = Op(
    "covariance_",
    "(Tensor(a!) acc, Tensor x, Tensor? row_scale, Tensor? mask, str backend) -> ()",
    reference=reference,
    check=check,
    request=request,
    fake=lambda acc, x, row_scale, mask: None,
)
OP.add_backend("cpu", cpu.covariance_, cpu.refuses)
OP.add_backend("triton", _triton, triton.refuses)
OP.add_backend("cuda", _cuda, cuda.hopper_refuses)
