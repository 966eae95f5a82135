"""``residual_linear``: a linear layer, the shortcut of the residual stream, and the next norm's statistic."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt_fast.kernels.regimes import Residual, matmul_regime
from slicegpt_fast.ops.dispatch import HALF, KERNELS, Op, Request, Rule, check_matrix, check_vector, require
from slicegpt_fast.ops.quantized import check_weight, full_weight, weight_format


def residual_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    shortcut: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    scales: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return ``h' = a @ weight.T + bias + shortcut(h)`` and each row's sum of squares of h'.

    Args:
        a: [M, k] input of the layer that writes to the residual stream.
        weight: [n, k], same dtype as ``a``.
        bias: [n] or None, same dtype.
        h: the residual stream: [M, d] with a dense shortcut, else [M, n]. Same dtype.
        shortcut: None: h itself. S [d, n]: ``h @ S``. A pair (t [M, r], V [r, n]): ``h + t @ V``, a low-rank shortcut
            where t = h @ U came from the unscaled columns of the ``norm_linear`` before. Best passed as the transposed
            view of a linear layer's weight, which is what a model holds: Triton's kernels copy any other layout.
        scales: fp16, of a quantised ``weight``: int8 [n, k] or uint8 [n, ceil(k / 2)], as ``ops/quantized.py`` says.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        h' [M, n], same dtype as ``a``, and [M] fp32, the sums of squares of the rounded h'.

    Raises:
        InputError: an argument's shape, dtype or device does not fit, or the backend cannot run the call.
    """
    if shortcut is None:
        return OP(a, weight, bias, h, None, None, scales, backend=backend)
    if isinstance(shortcut, Tensor):
        return OP(a, weight, bias, None, h, shortcut, scales, backend=backend)
    return OP(a, weight, bias, h, *shortcut, scales, backend=backend)


def reference(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch: each addition rides in a matmul (beta = 1), and the squares are a second pass."""
    weight = full_weight(weight, scales, a.shape[1], a.dtype)
    if residual is None:
        y = F.linear(a, weight, bias)
    else:
        y = torch.addmm(residual, a, weight.T)
        y = y if bias is None else y + bias
    if a2 is not None and weight2 is not None:
        y = torch.addmm(y, a2, weight2)
    wide = torch.promote_types(y.dtype, torch.float32)
    return y, y.to(wide).square().sum(dim=1).float()


def check(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    scales: Tensor | None = None,
) -> None:
    check_matrix("a", a)
    check_weight(weight, scales, "a", a)
    M, n = a.shape[0], weight.shape[0]
    check_vector("bias", bias, n, a.dtype, a.device)
    require(residual is not None or a2 is not None, "argument h is None; pass the residual stream.")
    if residual is not None:
        check_matrix("h", residual, a.dtype, a.device)
        require(
            residual.shape[0] == M and residual.shape[1] == n,
            f"argument h has shape {list(residual.shape)}; without a dense shortcut it must be [{M}, {n}].",
        )
    require((a2 is None) == (weight2 is None), "argument shortcut must be None, a matrix or a pair of matrices.")
    if a2 is not None and weight2 is not None:
        left = "h" if residual is None else "shortcut[0]"
        right = "shortcut" if residual is None else "shortcut[1]"
        check_matrix(left, a2, a.dtype, a.device)
        check_matrix(right, weight2, a.dtype, a.device)
        require(a2.shape[0] == M, f"argument {left} has {a2.shape[0]} rows; like a it must have {M}.")
        require(
            weight2.shape[0] == a2.shape[1] and weight2.shape[1] == n,
            f"argument {right} has shape {list(weight2.shape)}; it must be [{a2.shape[1]}, {n}].",
        )


def fake(a: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[0], weight.shape[0]), a.new_empty(a.shape[0], dtype=torch.float32)


def request(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    scales: Tensor | None = None,
) -> Request:
    (M, k), n = a.shape, weight.shape[0]
    K = k + (0 if a2 is None else a2.shape[1])
    epilogue: Residual = "dense" if residual is None else "add" if a2 is None else "low rank"
    return Request("residual_linear", a.device, a.dtype, matmul_regime(M), (M, n, K), epilogue, weight_format(weight))


def operands(request: Request) -> tuple[Tensor | None, ...]:
    """Return random arguments that ask for ``request``, as the layers of a patched model would."""
    M, n, K = request.shape
    # How K divides between the layer and the shortcut matters little.
    k2 = {"dense": n, "low rank": 64}.get(request.epilogue or "add", 0)
    k2 = k2 if k2 < K else K // 2
    residual = None if request.epilogue == "dense" else request.random(M, n)
    shortcut = (request.random(M, k2), request.random_weight(n, k2).T) if k2 else (None, None)
    weight, scales = request.random_operand(n, K - k2)
    return request.random(M, K - k2), weight, None, residual, *shortcut, scales


OP = Op(
    "residual_linear",
    "(Tensor a, Tensor weight, Tensor? bias, Tensor? residual, Tensor? a2, Tensor? weight2, Tensor? scales,"
    " str backend) -> (Tensor, Tensor)",
    reference=reference,
    check=check,
    request=request,
    fake=fake,
    operands=operands,
    regime=matmul_regime,
    epilogues=get_args(Residual),
    rules=(
        Rule("cuda", (8, 0), HALF, "decode", KERNELS, "one pass over the weights"),
        Rule("cuda", (8, 0), HALF, "prefill", KERNELS, "no add kernel"),
        Rule("cpu", (0, 0), (), "decode", ("cpu",), "one pass over the weights"),
        Rule("cpu", (0, 0), (), "prefill", ("cpu",), "torch's matmul, one pass for all else; its own in fp16"),
    ),
)
