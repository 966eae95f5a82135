"""``y = act(rstd * (h W^T) + b)``, with rstd = rsqrt(sumsq / D + eps) per row: the norm rides in the matmul's epilogue.

            K = d                        W [n, d]: n - u rows, then u unscaled rows
      h  +---------+                   y [M, out + u]
    [M,d]| BM x BK |--> acc [BM, BN] --> * rstd, + b, act --> +------------------+-----+
         +---------+     fp32              (tiles of rows     |  act(rstd hW^T + b) | hW^T |
            W^T --------^                   < n - u only)      +------------------+-----+

A row scale commutes with the matmul, so h is never normalised in memory. Without ``sumsq`` every program sums the
squares of its rows as they pass by. With a silu-gate, rows 2j and 2j+1 of W are gate and up row j, so both meet in
one tile and the epilogue writes silu(gate) * up, half as wide.

Prefill, M > 16 (``norm_linear_prefill``): persistent programs own BM x BN tiles, chosen by the wave model; operands
come by TMA from Hopper on. On Hopper the next tile's loads start under this tile's epilogue (flattened loop).
    FLOPs  2 M n d
    Bytes  2 (M d + n d + M out)
    Floor  at M=4096, n=12288, d=2872, one H200 (780 TFLOP/s): 0.37 ms of MMA
    Share  not yet measured

Decode, M <= 16 (``norm_linear_decode``): program (tile, split) streams BN rows of W over its share of K. W is the MMA's
left operand, so 64 rows of it meet 16 rows of h. Shares go to a workspace; the last to arrive adds them in order.
    Bytes  2 n d
    Floor  at n=12288, d=2872, one H200 (4.3 TB/s copy): 16.4 us
    Share  not yet measured
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from slicegpt_fast.counters import counters

from .launch import arrives_last, fits_tma, gpu_of, launch, matrix, vector_width
from .matmul import activate, load_tile, store_tile, tile_position
from .tiles import DECODE_ROWS, Tile, choose_split, choose_tile, programs


@triton.jit
def column_tile(tile, scaled, columns, BN: tl.constexpr):
    """First row of W that the ``tile``-th tile takes, and the end of its block: no tile straddles the two blocks."""
    scaled_tiles = tl.cdiv(scaled, BN)
    inside = tile < scaled_tiles
    return tl.where(inside, tile * BN, scaled + (tile - scaled_tiles) * BN), tl.where(inside, scaled, columns)


@triton.jit
def finish(
    acc,  # [BM, BN] fp32
    square,  # [BM] fp32: sum of h^2
    rows,  # [BM]
    n,  # first row of W
    end,  # end of its block
    bias,
    y,
    M,
    scaled,  # rows of W that are scaled
    out,  # columns of y that they give
    stride_y,
    eps,
    inverse_width,
    ACTIVATION: tl.constexpr,
    UNSCALED: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue: scale, bias, activation and store."""
    # Without branches: the compiler cannot flatten a tile loop around one.
    w_rows = n + tl.arange(0, BN)
    inside = end == scaled
    scale = tl.where(inside, tl.rsqrt(square * inverse_width + eps), 1.0)
    value = acc * scale[:, None]
    if bias is not None:
        value += tl.load(bias + w_rows, mask=w_rows < scaled, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu_gate":
        gate, up = tl.split(tl.reshape(value, (value.shape[0], BN // 2, 2)))
        columns = n // BN * (BN // 2) + tl.arange(0, BN // 2)
        store_tile(y, rows, columns, M, tl.where(inside, out, 0), stride_y, activate(gate, "silu") * up)
        if UNSCALED:
            store_tile(y + (out - scaled), rows, w_rows, M, tl.where(inside, 0, end), stride_y, value)
    else:
        activated = activate(value, ACTIVATION)
        if UNSCALED:
            activated = tl.where(inside, activated, value)
        store_tile(y, rows, w_rows, M, end, stride_y, activated)


@triton.jit
def norm_linear_prefill(
    h,  # [M, K] pointer or descriptor of [BM, BK] blocks
    w,  # [scaled + unscaled, K] pointer or descriptor of [BN, BK] blocks
    bias,  # [scaled] or None
    sumsq,  # [M] fp32 or None
    y,  # [M, out + unscaled]
    M,
    K,  # K and the strides of h and w in units of VEC; out, unscaled and the stride of y in units of VEC_Y
    out,
    unscaled,
    stride_h,
    stride_w,
    stride_y,
    eps,
    inverse_width,
    ACTIVATION: tl.constexpr,
    UNSCALED: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    VEC: tl.constexpr,
    VEC_Y: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K = K * VEC
    stride_h = stride_h * VEC
    stride_w = stride_w * VEC
    out = out * VEC_Y
    scaled = out * 2 if ACTIVATION == "silu_gate" else out
    columns = scaled + unscaled * VEC_Y
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(scaled, BN) + tl.cdiv(unscaled * VEC_Y, BN)

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        m = tile_m * BM
        n, end = column_tile(tile_n, scaled, columns, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        square = tl.zeros((BM,), dtype=tl.float32)
        for k in range(0, K, BK):
            h_tile = load_tile(h, m, k, M, K, stride_h, TMA, BM, BK)
            w_tile = load_tile(w, n, k, columns, K, stride_w, TMA, BN, BK)
            if sumsq is None:
                square += tl.sum(h_tile.to(tl.float32) * h_tile.to(tl.float32), axis=1)
            acc = tl.dot(h_tile, tl.trans(w_tile), acc, input_precision="ieee")
        rows = m + tl.arange(0, BM)
        if sumsq is not None:
            square = tl.load(sumsq + rows, mask=rows < M, other=1.0)
        finish(
            acc, square, rows, n, end, bias, y, M, scaled, out, stride_y * VEC_Y, eps, inverse_width,
            ACTIVATION, UNSCALED, BN,
        )  # fmt: skip


@triton.jit
def norm_linear_decode(
    h,  # [M, K], M <= BM
    w,  # [scaled + unscaled, K]
    bias,  # [scaled] or None
    sumsq,  # [M] fp32 or None
    y,  # [M, out + unscaled]
    partial,  # [tiles, SPLIT, BN, BM] fp32
    partial_square,  # [tiles, SPLIT, BM] fp32
    counter,  # [tiles] int32, zero
    M,
    K,  # units as above
    out,
    unscaled,
    stride_h,
    stride_w,
    stride_y,
    split_k,
    eps,
    inverse_width,
    ACTIVATION: tl.constexpr,
    UNSCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    VEC: tl.constexpr,
    VEC_Y: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    K = K * VEC
    stride_h = stride_h * VEC
    stride_w = stride_w * VEC
    out = out * VEC_Y
    scaled = out * 2 if ACTIVATION == "silu_gate" else out
    columns = scaled + unscaled * VEC_Y
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n, end = column_tile(tile, scaled, columns, BN)
    rows = tl.arange(0, BM)

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    square = tl.zeros((BM,), dtype=tl.float32)
    first = split * split_k
    for k in range(first, tl.minimum(first + split_k, K), BK):
        w_tile = load_tile(w, n, k, columns, K, stride_w, False, BN, BK)
        h_tile = load_tile(h, 0, k, M, K, stride_h, False, BM, BK)
        if sumsq is None:
            square += tl.sum(h_tile.to(tl.float32) * h_tile.to(tl.float32), axis=1)
        acc = tl.dot(w_tile, tl.trans(h_tile), acc, input_precision="ieee")

    complete = True
    if SPLIT > 1:
        cells = tl.arange(0, BN)[:, None] * BM + rows[None, :]
        share = tile.to(tl.int64) * SPLIT + split
        tl.store(partial + share * (BN * BM) + cells, acc)
        tl.store(partial_square + share * BM + rows, square)
        complete = arrives_last(counter + tile, SPLIT)
        if complete:
            acc = tl.zeros((BN, BM), dtype=tl.float32)
            square = tl.zeros((BM,), dtype=tl.float32)
            for other in range(SPLIT):
                share = tile.to(tl.int64) * SPLIT + other
                acc += tl.load(partial + share * (BN * BM) + cells, cache_modifier=".cg")
                square += tl.load(partial_square + share * BM + rows, cache_modifier=".cg")
    if complete:
        if sumsq is not None:
            square = tl.load(sumsq + rows, mask=rows < M, other=1.0)
        finish(
            tl.trans(acc), square, rows, n, end, bias, y, M, scaled, out, stride_y * VEC_Y, eps, inverse_width,
            ACTIVATION, UNSCALED, BN,
        )  # fmt: skip


def norm_linear(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    full_width: int,
    sumsq: torch.Tensor | None,
    activation: str | None,
    unscaled: int,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``act(rsqrt(sumsq / full_width + eps) * (h W^T) + b)``; arguments as in the op. ``tile`` overrules the choice."""
    h, weight = matrix(h), matrix(weight)
    (M, K), N = h.shape, weight.shape[0]
    out = (N - unscaled) // 2 if activation == "silu_gate" else N - unscaled
    y = torch.empty(M, out + unscaled, dtype=h.dtype, device=h.device)
    gpu = gpu_of(h.device)
    vec = vector_width(h, weight)
    tile = tile or choose_tile(gpu, "norm_linear", h.dtype, M, N, K, vec > 1, activation)
    tiles_n = triton.cdiv(N - unscaled, tile.n) + triton.cdiv(unscaled, tile.n)
    vec_y = 16 // y.element_size()
    if out % vec_y or unscaled % vec_y:
        vec_y = 1
    bias = None if bias is None else bias.contiguous()
    sumsq = None if sumsq is None else sumsq.contiguous()
    sizes = (M, K // vec, out // vec_y, unscaled // vec_y, h.stride(0) // vec, weight.stride(0) // vec)
    options = dict(ACTIVATION=activation, UNSCALED=unscaled > 0, VEC=vec, VEC_Y=vec_y, **tile.meta())
    stride_y, inverse_width = y.stride(0) // vec_y, 1.0 / full_width

    if M <= DECODE_ROWS:
        split, split_k = choose_split(gpu, tile, tiles_n, K)
        partial = torch.empty(tiles_n * split * tile.m * tile.n if split > 1 else 0, device=h.device)
        partial_square = torch.empty(tiles_n * split * tile.m if split > 1 else 0, device=h.device)
        launch(
            norm_linear_decode, (tiles_n, split), h.device,
            h, weight, bias, sumsq, y, partial, partial_square, counters(tiles_n, h.device),
            *sizes, stride_y, split_k, eps, inverse_width, SPLIT=split, **options,
        )  # fmt: skip
        return y

    tma = gpu.has_tma and fits_tma(h, weight)
    tiles = triton.cdiv(M, tile.m) * tiles_n
    launch(
        norm_linear_prefill, (min(tiles, programs(gpu, tile, h.element_size())),), h.device,
        TensorDescriptor.from_tensor(h, [tile.m, tile.k]) if tma else h,
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]) if tma else weight,
        bias, sumsq, y, *sizes, stride_y, eps, inverse_width,
        TMA=tma, FLATTEN=tma and gpu.capability[0] == 9, **options,  # elsewhere flattening spills registers
    )  # fmt: skip
    return y
