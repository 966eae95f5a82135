"""``y = act(rstd * (h W^T) + b)``, with rstd = rsqrt(sumsq / D + eps) per row: the norm rides in the matmul's epilogue.

            K = d                        W [n, d]: n - u rows, then u unscaled rows
      h  +---------+                   y [M, out + u]
    [M,d]| BM x BK |--> acc [BM, BN] --> * rstd, + b, act --> +------------------+-----+
         +---------+     fp32              (tiles of columns  |  act(rstd hW^T + b) | hW^T |
            W^T --------^                   < out only)       +------------------+-----+

A row scale commutes with the matmul, so h is never normalised in memory. Without ``sumsq`` every program sums the
squares of its rows as they pass by. With a silu-gate, W holds the gate rows, then the up rows: a tile takes BN rows of
the one and the same BN rows of the other against the same h, into two accumulators of equal layout, and the epilogue
writes silu(gate) * up from registers. An unscaled tile then takes 2 BN neighbouring rows.

Prefill, M > 16 (``norm_linear_prefill``): persistent programs own BM x BN tiles, chosen by the wave model; operands
come by TMA from Hopper on. On Hopper the next tile's loads start under this tile's epilogue (flattened loop), but with
a gate: ptxas waits for every single wgmma of a flattened loop with two accumulators. In the machine code for sm_90, a
K step's wgmma are in flight while the next step's operands are waited for (wait_group 1, or 2 with a gate), and loads
run further ahead. warp_specialize of Triton 3.7 leaves that code as it is.
    FLOPs  2 M n d
    Bytes  2 (M d + n d + M out)
    Floor  at M=4096, n=12288, d=2872, one H200 (780 TFLOP/s): 0.37 ms of MMA
    Share  not yet measured

Decode, M <= 16 (``norm_linear_decode``): program (tile, split) streams its rows of W over its share of K. W is the
MMA's left operand, so 64 rows of it meet 16 rows of h. Shares go to a workspace; the last to arrive adds them in order.
    Bytes  2 n d
    Floor  at n=12288, d=2872, one H200 (4.3 TB/s copy): 16.4 us
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

from .launch import arrives_last, fits_tma, gpu_of, launch, vector_width
from .matmul import SIZES, activate, add_in_order, load_tile, store_tile, tile_position
from .tiles import Tile, choose_split, choose_tile, programs


@triton.jit
def locate(tile, out, unscaled, GATED: tl.constexpr, BN: tl.constexpr):
    """Where the ``tile``-th tile lies: first rows of its blocks of W, first column of y, end of its part of y.

    No tile straddles the scaled and the unscaled part. Without a gate there is no second block.
    """
    tiles = tl.cdiv(out, BN)
    inside = tile < tiles
    up_rows = out if GATED else 0
    width = 2 * BN if GATED else BN  # of an unscaled tile
    column = tl.where(inside, tile * BN, out + (tile - tiles) * width)
    n = tl.where(inside, column, column + up_rows)
    return n, n + tl.where(inside, up_rows, BN), column, tl.where(inside, out, out + unscaled)


@triton.jit
def products(
    h, w, sumsq, m, n, n_up, first, last, M, w_rows, K, stride_h, stride_w,
    GATED: tl.constexpr, W_LEFT: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h W^T of the two blocks of W over columns first to last, [BM, BN] or [BN, BM], and the sums of h^2 [BM]."""
    acc = tl.zeros((BN, BM) if W_LEFT else (BM, BN), dtype=tl.float32)
    up = tl.zeros(acc.shape, dtype=tl.float32)  # stays zero without a gate
    square = tl.zeros((BM,), dtype=tl.float32)
    for k in range(first, last, BK):
        h_tile = load_tile(h, m, k, M, K, stride_h, TMA, BM, BK)
        if sumsq is None:
            square += tl.sum(h_tile.to(tl.float32) * h_tile.to(tl.float32), axis=1)
        acc = multiply_tiles(acc, h_tile, load_tile(w, n, k, w_rows, K, stride_w, TMA, BN, BK), W_LEFT)
        if GATED:
            up = multiply_tiles(up, h_tile, load_tile(w, n_up, k, w_rows, K, stride_w, TMA, BN, BK), W_LEFT)
    return acc, up, square


@triton.jit
def multiply_tiles(acc, h_tile, w_tile, W_LEFT: tl.constexpr):
    """``acc`` plus h W^T, or plus W h^T."""
    left, right = (w_tile, h_tile) if W_LEFT else (h_tile, w_tile)
    return tl.dot(left, tl.trans(right), acc, input_precision="ieee")


@triton.jit
def finish(
    acc,  # [BM, BN] fp32
    up,  # [BM, BN] fp32, of the second block of W, with a gate
    square,  # [BM] fp32: sum of h^2
    rows,  # [BM]
    column,  # first column of y
    end,  # end of its part of y
    bias,
    y,
    M,
    out,  # columns of y that are scaled
    stride_y,
    eps,
    inverse_width,
    ACTIVATION: tl.constexpr,
    UNSCALED: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue: scale, bias, activation and store."""
    # Without branches: the compiler cannot flatten a tile loop around one.
    columns = column + tl.arange(0, BN)
    inside = end == out
    scale = tl.where(inside, tl.rsqrt(square * inverse_width + eps), 1.0)[:, None]
    value = acc * scale
    if bias is not None:
        value += tl.load(bias + columns, mask=columns < out, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu_gate":
        up *= scale
        if bias is not None:
            up += tl.load(bias + out + columns, mask=columns < out, other=0.0).to(tl.float32)[None, :]
        if UNSCALED:  # first, for the registers that up and the activated take
            store_tile(y, rows, columns + BN, M, tl.where(inside, 0, end), stride_y, up)
        activated = activate(value, "silu") * up
    else:
        activated = activate(value, ACTIVATION)
    if UNSCALED:
        activated = tl.where(inside, activated, value)
    store_tile(y, rows, columns, M, end, stride_y, activated)


@triton.jit(do_not_specialize=SIZES)
def norm_linear_prefill(
    h,  # [M, K] pointer or descriptor of [BM, BK] blocks
    w,  # [n, K] pointer or descriptor of [BN, BK] blocks
    bias,  # [n - unscaled] or None
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
    K, stride_h, stride_w = K * VEC, stride_h * VEC, stride_w * VEC
    out, unscaled, stride_y = out * VEC_Y, unscaled * VEC_Y, stride_y * VEC_Y
    GATED: tl.constexpr = ACTIVATION == "silu_gate"
    w_rows = (2 * out if GATED else out) + unscaled
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(out, BN) + tl.cdiv(unscaled, 2 * BN if GATED else BN)

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, 8)
        m = tile_m * BM
        n, n_up, column, end = locate(tile_n, out, unscaled, GATED, BN)
        acc, up, square = products(
            h, w, sumsq, m, n, n_up, 0, K, M, w_rows, K, stride_h, stride_w, GATED, False, TMA, BM, BN, BK
        )
        rows = m + tl.arange(0, BM)
        if sumsq is not None:
            square = tl.load(sumsq + rows, mask=rows < M, other=1.0)
        finish(
            acc, up, square, rows, column, end, bias, y, M, out, stride_y, eps, inverse_width, ACTIVATION, UNSCALED, BN
        )


@triton.jit(do_not_specialize=SIZES)
def norm_linear_decode(
    h,  # [M, K], M <= BM
    w,  # [n, K]
    bias,  # [n - unscaled] or None
    sumsq,  # [M] fp32 or None
    y,  # [M, out + unscaled]
    partial,  # [tiles, blocks of W, SPLIT, BN, BM] fp32
    partial_square,  # [tiles, SPLIT, BM] fp32
    counter,  # [tiles] int32, zero; None without a split
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
    K, stride_h, stride_w = K * VEC, stride_h * VEC, stride_w * VEC
    out, unscaled, stride_y = out * VEC_Y, unscaled * VEC_Y, stride_y * VEC_Y
    GATED: tl.constexpr = ACTIVATION == "silu_gate"
    BLOCKS: tl.constexpr = 2 if GATED else 1
    w_rows = (2 * out if GATED else out) + unscaled
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n, n_up, column, end = locate(tile, out, unscaled, GATED, BN)
    rows = tl.arange(0, BM)

    first = split * split_k
    last = tl.minimum(first + split_k, K)
    acc, up, square = products(
        h, w, sumsq, 0, n, n_up, first, last, M, w_rows, K, stride_h, stride_w, GATED, True, False, BM, BN, BK
    )

    complete = True
    if SPLIT > 1:
        cells = tl.arange(0, BN)[:, None] * BM + rows[None, :]
        shares = partial + tile.to(tl.int64) * (BLOCKS * SPLIT * BN * BM)
        up_shares = shares + SPLIT * BN * BM
        squares = partial_square + tile.to(tl.int64) * (SPLIT * BM)
        tl.store(shares + split * (BN * BM) + cells, acc)
        if GATED:
            tl.store(up_shares + split * (BN * BM) + cells, up)
        tl.store(squares + split * BM + rows, square)
        complete = arrives_last(counter + tile, SPLIT)
        if complete:
            acc = add_in_order(shares, cells, None, SPLIT, BN * BM)
            if GATED:
                up = add_in_order(up_shares, cells, None, SPLIT, BN * BM)
            square = add_in_order(squares, rows, None, SPLIT, BM)
    if complete:
        if sumsq is not None:
            square = tl.load(sumsq + rows, mask=rows < M, other=1.0)
        finish(
            tl.trans(acc), tl.trans(up), square, rows, column, end, bias, y, M, out, stride_y, eps, inverse_width,
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
    scales: None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``act(rsqrt(sumsq / full_width + eps) * (h W^T) + b)``; arguments as in the op. ``tile`` overrules the choice."""
    h, weight = rows(h), rows(weight)
    (M, K), N = h.shape, weight.shape[0]
    blocks = 2 if activation == "silu_gate" else 1  # of W in a tile
    out = (N - unscaled) // blocks
    y = torch.empty(M, out + unscaled, dtype=h.dtype, device=h.device)
    gpu = gpu_of(h.device)
    vec = vector_width(h, weight)
    tile = tile or choose_tile(gpu, "norm_linear", h.dtype, M, N, K, vec > 1, activation, bias is not None)
    block_n = tile.n // blocks
    tiles_n = triton.cdiv(out, block_n) + triton.cdiv(unscaled, tile.n)
    vec_y = 16 // y.element_size()
    if out % vec_y or unscaled % vec_y:
        vec_y = 1
    bias, sumsq = vector(bias), vector(sumsq)
    sizes = (M, K // vec, out // vec_y, unscaled // vec_y, h.stride(0) // vec, weight.stride(0) // vec)
    options = dict(ACTIVATION=activation, UNSCALED=unscaled > 0, VEC=vec, VEC_Y=vec_y, **tile.meta() | {"BN": block_n})
    stride_y, inverse_width = y.stride(0) // vec_y, 1.0 / full_width

    if M <= DECODE_ROWS:
        split, split_k = choose_split(gpu, tile, tiles_n, K)
        shares = tiles_n * split if split > 1 else 0
        partial = torch.empty(shares * tile.m * tile.n, dtype=torch.float32, device=h.device)
        partial_square = torch.empty(shares * tile.m, dtype=torch.float32, device=h.device)
        launch(
            norm_linear_decode, (tiles_n, split), h.device,
            h, weight, bias, sumsq, y, partial, partial_square, counters(tiles_n if split > 1 else 0, h.device),
            *sizes, stride_y, split_k, eps, inverse_width, SPLIT=split, **options,
        )  # fmt: skip
        return y

    tma = gpu.has_tma and fits_tma(h, weight)
    tiles = triton.cdiv(M, tile.m) * tiles_n
    launch(
        norm_linear_prefill, (min(tiles, programs(gpu, tile, h.element_size())),), h.device,
        TensorDescriptor.from_tensor(h, [tile.m, tile.k]) if tma else h,
        TensorDescriptor.from_tensor(weight, [block_n, tile.k]) if tma else weight,
        bias, sumsq, y, *sizes, stride_y, eps, inverse_width,
        TMA=tma, FLATTEN=tma and gpu.capability[0] == 9 and blocks == 1,  # elsewhere flattening spills registers
        **options,
    )  # fmt: skip
    return y
