"""``norm_linear``: a linear layer with the weightless norm before it and the activation after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from slicegpt_fast.kernels.regimes import Activation, matmul_regime
from slicegpt_fast.ops.dispatch import HALF, KERNELS, Op, Request, Rule, check_matrix, check_vector, require
from slicegpt_fast.ops.quantized import check_weight, full_weight, weight_format

ACTIVATE: dict[Activation | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu_gate": lambda y: F.silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :],
}


def norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None = None,
    activation: Activation | None = None,
    unscaled: int = 0,
    *,
    scales: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``act(rsqrt(sumsq / full_width + eps) * (h @ weight.T) + bias)``.

    The norm has no weight (it is folded into ``weight``), and a row's scale commutes with the matmul.

    Args:
        h: [M, d] residual stream.
        weight: [n, d], same dtype as ``h``. Its last ``unscaled`` rows skip the scale, the bias and the activation.
        bias: [n - unscaled] or None, same dtype.
        eps: the norm's epsilon.
        full_width: D, the width that the norm divides by; the full one, also where ``h`` is sliced.
        sumsq: [M] fp32, each row's sum of squares; computed in the same pass where it is None.
        activation: None, "relu", "gelu" (erf), "gelu_tanh", or "silu_gate": the first half of the scaled rows are the
            gate's, the second half those of up, and column j of the result is silu(gate j) * up j.
        unscaled: rows at the end of ``weight`` that give plain ``h @ weight.T``.
        scales: fp16, of a quantised ``weight``: int8 [n, d] or uint8 [n, ceil(d / 2)], as ``ops/quantized.py`` says.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [M, n], or [M, (n - unscaled) / 2 + unscaled] with a gate; the unscaled columns come last. Same dtype as ``h``.

    Raises:
        InputError: an argument's shape, dtype or device does not fit, or the backend cannot run the call.
    """
    return OP(h, weight, bias, float(eps), full_width, sumsq, activation, unscaled, scales, backend=backend)


def reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: Activation | None,
    unscaled: int,
    scales: Tensor | None = None,
) -> Tensor:
    """The op in plain torch: the norm in fp32, rounded, then the linear layer, then the activation."""
    wide = torch.promote_types(h.dtype, torch.float32)
    if sumsq is None:
        sumsq = h.to(wide).square().sum(dim=1)
    scale = torch.rsqrt(sumsq / full_width + eps)
    weight = full_weight(weight, scales, h.shape[1], h.dtype)
    scaled = weight.shape[0] - unscaled
    y = F.linear((h.to(wide) * scale[:, None]).to(h.dtype), weight[:scaled], bias)
    y = ACTIVATE[activation](y)
    return torch.cat((y, F.linear(h, weight[scaled:])), dim=1) if unscaled else y


def check(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: Activation | None,
    unscaled: int,
    scales: Tensor | None = None,
) -> None:
    check_matrix("h", h)
    check_weight(weight, scales, "h", h)
    M, n = h.shape[0], weight.shape[0]
    require(0 <= unscaled <= n, f"argument unscaled is {unscaled}; it must be between 0 and weight's {n} rows.")
    check_vector("bias", bias, n - unscaled, h.dtype, h.device)
    check_vector("sumsq", sumsq, M, torch.float32, h.device)
    require(full_width > 0, f"argument full_width is {full_width}; it must be positive.")
    require(
        activation in ACTIVATE,
        f"argument activation is {activation!r}; it must be None or one of {', '.join(get_args(Activation))}.",
    )
    require(
        activation != "silu_gate" or (n - unscaled) % 2 == 0,
        f"argument weight has {n - unscaled} scaled rows; silu_gate needs as many gate rows as up rows.",
    )


def fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: Activation | None,
    unscaled: int,
    scales: Tensor | None = None,
) -> Tensor:
    scaled = weight.shape[0] - unscaled
    return h.new_empty(h.shape[0], (scaled // 2 if activation == "silu_gate" else scaled) + unscaled)


def request(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: Activation | None,
    unscaled: int,
    scales: Tensor | None = None,
) -> Request:
    (M, d), n = h.shape, weight.shape[0]
    return Request("norm_linear", h.device, h.dtype, matmul_regime(M), (M, n, d), activation, weight_format(weight))


def operands(request: Request) -> tuple[Any, ...]:
    """Return random arguments that ask for ``request``, as the layers of a patched model would."""
    M, n, d = request.shape
    sumsq = torch.full((M,), float(d), dtype=torch.float32, device=request.device)
    unscaled = n % 2  # a gate needs pairs of rows
    weight, scales = request.random_operand(n, d)
    return request.random(M, d), weight, None, 1e-5, d, sumsq, request.epilogue, unscaled, scales


OP = Op(
    "norm_linear",
    "(Tensor h, Tensor weight, Tensor? bias, float eps, SymInt full_width, Tensor? sumsq, str? activation, "
    "SymInt unscaled, Tensor? scales, str backend) -> Tensor",
    reference=reference,
    check=check,
    request=request,
    fake=fake,
    operands=operands,
    regime=matmul_regime,
    epilogues=tuple(ACTIVATE),
    rules=(
        Rule("cuda", (8, 0), HALF, "decode", KERNELS, "one pass over the weight"),
        Rule("cuda", (8, 0), HALF, "prefill", KERNELS, "no norm kernel"),
        Rule("cpu", (0, 0), (), "decode", ("cpu",), "one pass over the weight"),
        Rule("cpu", (0, 0), (), "prefill", ("cpu",), "torch's matmul, one pass for all else; its own in fp16"),
    ),
)
