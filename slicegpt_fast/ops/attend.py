"""``attend``: the attention of a decode step, from the projections' result to what the output projection reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicegpt_fast.kernels.regimes import matmul_regime
from slicegpt_fast.ops.dispatch import HALF, KERNELS, Op, Request, Rule, require


def attend(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    scale: float,
    mask: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Append T new tokens to a cache, in place, and return their attention over all of it.

    Neighbouring query heads share a key-value head. Queries and new keys are normalised, where there are norms, then
    rotated (the halves of their first R numbers against each other), then rounded.

    Args:
        queries: [B, T, H, D], each head contiguous, anything between them.
        new_keys: [B, T, G, D], G a divisor of H.
        new_values: [B, T, G, r], r <= D.
        cosine, sine: [1 or B, T, R], R <= D and even, what the model's rotary embedding gives; or both None.
        keys: [B, G, C, D] with room for C tokens, positions [0, start) filled; its two last dimensions contiguous.
        values: [B, G, C, D]; of the new tokens' values the first r numbers are written, then zeros.
        start: int64, one element: how many positions are filled. At most C - T; a kernel does not check it.
        scale: by which the products of queries and keys are multiplied.
        mask: [1 or B, T, S] bool, S >= start + T: which positions a token attends to; a token that attends to none
            gets zeros. None: all up to its own.
        query_norm, key_norm: [D], the weights of an RMSNorm over each head, or None.
        eps: of these norms.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B T, H r]: each token's heads, one behind the other.

    Raises:
        InputError: an argument's shape, dtype or device does not fit, or the backend cannot run the call.
    """
    arguments = (queries, new_keys, new_values, cosine, sine, keys, values, start, scale, mask, query_norm, key_norm)
    return OP(*arguments, eps, backend=backend)


def reference(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    scale: float,
    mask: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """The op in plain torch."""
    (B, T, H, _), r = queries.shape, new_values.shape[-1]
    end = int(start) + T
    new = slice(end - T, end)
    keys[:, :, new] = _rotated(_normalised(new_keys, key_norm, eps), cosine, sine).transpose(1, 2)
    values[:, :, new, :r] = new_values.transpose(1, 2)
    values[:, :, new, r:] = 0
    q = _rotated(_normalised(queries, query_norm, eps), cosine, sine).transpose(1, 2)  # [B, H, T, D]
    shared = H // max(new_keys.shape[2], 1)
    k, v = (x.repeat_interleave(shared, dim=1) for x in (keys[:, :, :end], values[:, :, :end, :r]))
    if mask is None:
        allowed = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(end - T)
    else:
        allowed = mask[:, None, :, :end]
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).nan_to_num()
    return (weights.to(q.dtype) @ v).transpose(1, 2).reshape(B * T, H * r)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotated(x: Tensor, cosine: Tensor | None, sine: Tensor | None) -> Tensor:
    """x [B, T, heads, D], its first R numbers rotated as Llama does it (arXiv 2104.09864 with halves for pairs)."""
    if cosine is None or sine is None:
        return x
    turned, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cosine[:, :, None] + torch.cat([-b, a], dim=-1) * sine[:, :, None]
    return torch.cat([turned, rest], dim=-1)


def check(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    scale: float,
    mask: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> None:
    require(queries.dim() == 4, f"argument queries has {queries.dim()} dimensions; pass [B, T, H, D].")
    require(queries.is_floating_point(), f"argument queries has dtype {queries.dtype}; pass a floating-point tensor.")
    B, T, H, D = queries.shape
    require(new_keys.dim() == 4, f"argument new_keys has {new_keys.dim()} dimensions; pass [B, T, G, D].")
    G = new_keys.shape[2]
    require(G > 0 and H % G == 0, f"argument new_keys has {G} heads; their number must divide that of queries, {H}.")
    require(new_values.dim() == 4, f"argument new_values has {new_values.dim()} dimensions; pass [B, T, G, r].")
    r = new_values.shape[3]
    require(r <= D, f"argument new_values has heads of {r} numbers; they must have at most {D}.")
    require((cosine is None) == (sine is None), "argument sine must be None where cosine is, and only there.")
    R = 0 if cosine is None else cosine.shape[-1]
    require(R <= D and R % 2 == 0, f"argument cosine rotates {R} numbers; heads of {D} need an even number up to that.")
    require(keys.dim() == 4, f"argument keys has {keys.dim()} dimensions; pass [B, G, C, D].")
    C = keys.shape[2]
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "new_keys": (new_keys, [(B,), (T,), (G,), (D,)]),
        "new_values": (new_values, [(B,), (T,), (G,), (r,)]),
        "cosine": (cosine, [(1, B), (T,), (R,)]),
        "sine": (sine, [(1, B), (T,), (R,)]),
        "keys": (keys, [(B,), (G,), (C,), (D,)]),
        "values": (values, [(B,), (G,), (C,), (D,)]),
        "query_norm": (query_norm, [(D,)]),
        "key_norm": (key_norm, [(D,)]),
    }
    for name, (x, sizes) in shapes.items():
        if x is not None:
            fits = x.dim() == len(sizes) and all(n in known for n, known in zip(x.shape, sizes, strict=True))
            expected = [" or ".join(dict.fromkeys(map(str, known))) for known in sizes]
            require(fits, f"argument {name} has shape {list(x.shape)}; it must be [{', '.join(expected)}].")
            require(x.dtype == queries.dtype, f"argument {name} has dtype {x.dtype}; it must be {queries.dtype}.")
            require(x.device == queries.device, f"argument {name} is on {x.device}; move it to {queries.device}.")
    for name, x in {"keys": keys, "values": values}.items():
        require(x.stride()[2:] == (D, 1), f"argument {name} is no cache: its last two dimensions must be contiguous.")
        require(
            B == 1 or x.stride(0) == G * x.stride(1), f"argument {name} is no cache: expand no batch, cut no heads."
        )
    require(start.numel() == 1 and start.dtype == torch.int64, "argument start must be one int64.")
    for name, x in {"start": start, "mask": mask}.items():
        elsewhere = x is not None and x.device != queries.device
        require(not elsewhere, f"argument {name} is on another device; move it to {queries.device}.")
    if mask is not None:
        fits = mask.dim() == 3 and mask.shape[0] in (1, B) and mask.shape[1] == T and mask.dtype == torch.bool
        require(fits, f"argument mask must be bool of shape [1 or {B}, {T}, positions], not {list(mask.shape)}.")


def fake(queries: Tensor, new_keys: Tensor, new_values: Tensor, *others: Any) -> Tensor:
    B, T, H, _ = queries.shape
    return queries.new_empty(B * T, H * new_values.shape[3])


def request(queries: Tensor, new_keys: Tensor, new_values: Tensor, *others: Any) -> Request:
    B, T, H, D = queries.shape
    keys = others[2]
    shape = (B * T, H * D, keys.shape[2])
    return Request("attend", queries.device, queries.dtype, matmul_regime(B * T), shape)


def operands(request: Request) -> tuple[Any, ...]:
    """Return random arguments that ask for ``request``: heads of 64 numbers, four for each key-value head."""
    M, width, C = request.shape
    D = 64 if width % 64 == 0 else width
    H = width // D
    G = H // 4 if H % 4 == 0 else H
    new = [request.random(1, M, heads, D) for heads in (H, G, G)]
    caches = [request.random(1, G, C, D) for _ in range(2)]
    angles = torch.rand(1, M, D, device=request.device) * 6
    start = torch.tensor(max(C - M, 0), device=request.device)
    cosine, sine = (f(angles).to(request.dtype) for f in (torch.cos, torch.sin))
    return (*new, cosine, sine, *caches, start, D**-0.5, None, None, None, 0.0)


OP = Op(
    "attend",
    "(Tensor queries, Tensor new_keys, Tensor new_values, Tensor? cosine, Tensor? sine, Tensor(a!) keys,"
    " Tensor(b!) values, Tensor start, float scale, Tensor? mask, Tensor? query_norm, Tensor? key_norm, float eps,"
    " str backend) -> Tensor",
    reference=reference,
    check=check,
    request=request,
    fake=fake,
    operands=operands,
    regime=matmul_regime,
    epilogues=(None,),
    rules=(
        Rule("cuda", (8, 0), HALF, "decode", KERNELS, "one pass over the cache, split over its length"),
        Rule("cuda", (8, 0), HALF, "prefill", KERNELS, "the same for many sequences"),
        Rule("cpu", (0, 0), (), "decode", ("cpu",), "one pass over the cache, no copy of it"),
    ),
)
