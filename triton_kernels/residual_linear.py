"""``h' = a W^T + b + shortcut(h)`` and the row sums of squares of h': the residual stream's update as one matmul.

               K = k            K2 = d or r
      a     +---------+  a2   +---------+        h' [M, n]
    [M,k]   | BM x BK |       | BM x BK |  --->  +------+------+------+
            +---------+       +---------+        |      |      |      |   + b, + h, rounded
       W^T ------^       W2 ------^              +------+------+------+
            one fp32 accumulator [BM, BN]          s0     s1     s2       sums of squares per row and tile

The shortcut decides the second operand pair and the residual: absent (add h), dense S (pair h, S), low rank (pair t, V,
and add h). A pair costs no kernel and no pass over memory of its own. The next norm needs sum(h'^2) of the *rounded*
h': every tile leaves its rows' sums in a workspace, and the last tile of a block of rows to arrive adds them in order.

W2 is read as it lies in a model, [n, K2]: the weight of a linear layer, of which the shortcut is the transposed view.

Prefill, M > 16 (``residual_linear_prefill``): persistent programs own BM x BN tiles; operands by TMA from Hopper on.
The accumulator starts from b and h. As compiled for sm_90, wgmma and loads overlap as in ``norm_linear``, pair by pair.
    FLOPs  2 M n (k + K2)
    Bytes  2 (M k + n k + M K2 + n K2 + M n), and 2 M n more where h is added
    Floor  at M=4096, n=2872, k=11008, dense S, one H200 (780 TFLOP/s): 0.42 ms of MMA
    Share  not yet measured

Decode, M <= 16 (``residual_linear_decode``): program (tile, split) streams BN rows of W, and BN columns of S, over its
share of both K. The last share of a tile to arrive finishes the tile, the last tile the sums of squares.
    Bytes  2 n (k + K2)
    Floor  at n=2872, k=11008, dense S, one H200 (4.3 TB/s copy): 18.5 us
    Share  not yet measured
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from slicegpt_fast.kernels.counters import counters
from slicegpt_fast.kernels.operands import rows, vector
from slicegpt_fast.kernels.regimes import DECODE_ROWS

from .launch import arrives_last, fits_tma, gpu_of, interpreting, launch, vector_width
from .matmul import SIZES, add_in_order, multiply, store_tile, tile_position
from .tiles import Tile, choose_split, choose_tile, programs


@triton.jit
def add_terms(
    acc,  # [BM, BN] fp32
    rows,  # [BM]
    columns,  # [BN]
    bias,  # [N] or None
    residual,  # [M, N] or None
    M,
    N,
    stride_residual,
):
    """``acc`` plus the bias and the residual."""
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        pointers = residual + rows.to(tl.int64)[:, None] * stride_residual + columns[None, :]
        acc += tl.load(pointers, mask=(rows < M)[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)
    return acc


PAIR_TO_FP32: tl.constexpr = tl.constexpr(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


@triton.jit
def to_fp32(x, PTX: tl.constexpr):
    """``x`` in fp32. fp16 goes by pairs: ptxas serialises the wgmma before one that is converted back alone (C7514)."""
    if PTX and x.dtype == tl.float16:
        x = tl.inline_asm_elementwise(PAIR_TO_FP32, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return x.to(tl.float32)


@triton.jit
def finish(acc, rows, columns, y, M, N, stride_y, PTX: tl.constexpr):  # -> [BM] fp32
    """Rounds and stores; returns the sums of squares of what was stored."""
    rounded = acc.to(y.dtype.element_ty)
    store_tile(y, rows, columns, M, N, stride_y, rounded)
    rounded = to_fp32(rounded, PTX)
    return tl.sum(rounded * rounded, axis=1)


@triton.jit(do_not_specialize=SIZES)
def residual_linear_prefill(
    a,  # [M, K] pointer or descriptor of [BM, BK] blocks
    w,  # [N, K] pointer or descriptor of [BN, BK] blocks
    a2,  # [M, K2] likewise, or None
    w2,  # [N, K2] likewise
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    partial,  # [tiles_n, M] fp32
    sumsq,  # [M] fp32
    counter,  # [tiles_m] int32, zero
    M,
    N,  # N, K, K2 and the strides in units of VEC
    K,
    K2,
    stride_a,
    stride_w,
    stride_a2,
    stride_w2,
    stride_residual,
    stride_y,
    TMA: tl.constexpr,
    PTX: tl.constexpr,  # not in Triton's interpreter
    VEC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    N, K, K2 = N * VEC, K * VEC, K2 * VEC
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        m = tile_m * BM
        n = tile_n * BN
        rows = m + tl.arange(0, BM)
        columns = n + tl.arange(0, BN)
        # They come first: behind the products they would take registers beside a full accumulator.
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = add_terms(acc, rows, columns, bias, residual, M, N, stride_residual * VEC)
        acc = multiply(acc, a, w, m, n, 0, K, M, N, K, stride_a * VEC, stride_w * VEC, TMA, BM, BN, BK)
        if a2 is not None:
            acc = multiply(acc, a2, w2, m, n, 0, K2, M, N, K2, stride_a2 * VEC, stride_w2 * VEC, TMA, BM, BN, BK)
        square = finish(acc, rows, columns, y, M, N, stride_y * VEC, PTX)
        tl.store(partial + tile_n.to(tl.int64) * M + rows, square, mask=rows < M)
        if arrives_last(counter + tile_m, tiles_n):
            tl.store(sumsq + rows, add_in_order(partial, rows, rows < M, tiles_n, M), mask=rows < M)


@triton.jit(do_not_specialize=SIZES)
def residual_linear_decode(
    a,  # [M, K], M <= BM
    w,  # [N, K]
    a2,  # [M, K2] or None
    w2,  # [N, K2] or None
    bias,
    residual,
    y,
    shares,  # [tiles, SPLIT, BN, BM] fp32
    partial,  # [tiles, BM] fp32
    sumsq,
    counter,  # [tiles + 1] int32, zero
    M,
    N,  # units as above
    K,
    K2,
    stride_a,
    stride_w,
    stride_a2,
    stride_w2,
    stride_residual,
    stride_y,
    split_k,
    split_k2,
    SPLIT: tl.constexpr,
    VEC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    N, K, K2 = N * VEC, K * VEC, K2 * VEC
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * BN
    rows = tl.arange(0, BM)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    last = tl.minimum((split + 1) * split_k, K)
    acc = multiply(acc, w, a, n, 0, split * split_k, last, N, M, K, stride_w * VEC, stride_a * VEC, False, BN, BM, BK)
    if a2 is not None:
        first, last = split * split_k2, tl.minimum((split + 1) * split_k2, K2)
        acc = multiply(acc, w2, a2, n, 0, first, last, N, M, K2, stride_w2 * VEC, stride_a2 * VEC, False, BN, BM, BK)

    complete = True
    if SPLIT > 1:
        cells = tl.arange(0, BN)[:, None] * BM + rows[None, :]
        tile_shares = shares + tile.to(tl.int64) * (SPLIT * BN * BM)
        tl.store(tile_shares + split * (BN * BM) + cells, acc)
        complete = arrives_last(counter + 1 + tile, SPLIT)
        if complete:
            acc = add_in_order(tile_shares, cells, None, SPLIT, BN * BM)
    if complete:
        columns = n + tl.arange(0, BN)
        whole = add_terms(tl.trans(acc), rows, columns, bias, residual, M, N, stride_residual * VEC)
        square = finish(whole, rows, columns, y, M, N, stride_y * VEC, False)
        tl.store(partial + tile * BM + rows, square)
        if arrives_last(counter, tl.num_programs(0)):
            tl.store(sumsq + rows, add_in_order(partial, rows, None, tl.num_programs(0), BM), mask=rows < M)


def residual_linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    a2: torch.Tensor | None,
    weight2: torch.Tensor | None,
    scales: None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``a W^T + b + residual + a2 W2`` and its row sums of squares; ``tile`` overrules the choice."""
    a, weight, residual, bias = rows(a), rows(weight), rows(residual), vector(bias)
    # W2 as it lies in a model, the transposed view of a linear layer's weight; any other is copied.
    a2, w2 = (None, None) if a2 is None or weight2 is None or a2.shape[1] == 0 else (rows(a2), rows(weight2.T))
    (M, K), N = a.shape, weight.shape[0]
    K2 = 0 if a2 is None else a2.shape[1]
    y = torch.empty(M, N, dtype=a.dtype, device=a.device)
    sumsq = torch.empty(M, dtype=torch.float32, device=a.device)
    gpu = gpu_of(a.device)
    shortcut = "dense" if residual is None else "add" if a2 is None else "low rank"
    vec = vector_width(a, weight, a2, w2, residual, y)
    tile = tile or choose_tile(gpu, "residual_linear", a.dtype, M, N, K + K2, vec > 1, shortcut, bias is not None)
    tiles_m, tiles_n = triton.cdiv(M, tile.m), triton.cdiv(N, tile.n)
    strides = [0 if x is None else x.stride(0) // vec for x in (a, weight, a2, w2, residual, y)]
    sizes = (M, N // vec, K // vec, K2 // vec, *strides)

    if M <= DECODE_ROWS:
        split, split_k = choose_split(gpu, tile, tiles_n, K)
        split_k2 = triton.cdiv(triton.cdiv(K2, split), tile.k) * tile.k
        cells = tiles_n * split * tile.m * tile.n if split > 1 else 0
        shares = torch.empty(cells, dtype=torch.float32, device=a.device)
        partial = torch.empty(tiles_n * tile.m, dtype=torch.float32, device=a.device)
        launch(
            residual_linear_decode, (tiles_n, split), a.device,
            a, weight, a2, w2, bias, residual, y, shares, partial, sumsq, counters(tiles_n + 1, a.device),
            *sizes, split_k, split_k2, SPLIT=split, VEC=vec, **tile.meta(),
        )  # fmt: skip
        return y, sumsq

    tma = gpu.has_tma and fits_tma(a, weight, a2, w2)
    blocks = ((a, tile.m), (weight, tile.n), (a2, tile.m), (w2, tile.n))
    operands = [TensorDescriptor.from_tensor(x, [b, tile.k]) if tma and x is not None else x for x, b in blocks]
    partial = torch.empty(tiles_n * M, dtype=torch.float32, device=a.device)
    launch(
        residual_linear_prefill, (min(tiles_m * tiles_n, programs(gpu, tile, a.element_size())),), a.device,
        *operands, bias, residual, y, partial, sumsq, counters(tiles_m, a.device),
        *sizes, TMA=tma, PTX=not interpreting(), VEC=vec, **tile.meta(),
    )  # fmt: skip
    return y, sumsq
