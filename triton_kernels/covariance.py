"""``acc += X^T X`` for tall X [N, D]: one triangle of tiles, split over N, summed in order, mirrored once.

    acc [D, D], tiles of 128 x 128            X [N, D]
    +----+                                   +---------------+
    | 0  |                                   |     split 0   |   every tile is computed once per split,
    +----+----+                              +---------------+   all tiles of split 0 first: programs that run
    | 1  | 2  |      tile 4 = rows 256..383  |     split 1   |   together read the same rows of X, which
    +----+----+----+          cols 128..255  +---------------+   stay in L2
    | 3  | 4  | 5  |                         |     split 2   |
    +----+----+----+                         +---------------+

1. ``partial_tiles``: program (tile, split) owns one tile over one split's rows and writes it to a workspace, fp32.
   MMA chains of 256 tokens (fp16: 128) end in a second fp32 accumulator: the tensor core truncates at every step of a
   chain. By the published model of its arithmetic (arXiv 2512.07004) white noise in fp16 then errs by 2e-6 over 256
   tokens on Ampere and by 9e-7 on Hopper, over 128 by 8e-7 and 4e-7; in bf16 by at most 8e-7 over 256.
2. ``reduce_mirror``: a program owns a 32 x 32 piece of a tile, adds the splits in order in fp64, then acc's old value,
   and writes both halves. With acc in fp64 nothing is lost over any number of calls. Same inputs, same bits.

A row scale s enters as s^2 on one side. Rounding s^2 x to 16 bits would cost 1e-4, so that side is a sum of two 16-bit
terms and the MMA runs twice. To keep fp16 in range, s^2 = p * q with p the power of two in s: (q x_i) and (p x_j) are
both of the size of s x, and p x_j is exact.

FLOPs  N * D * (D + 128), half of a full matmul; twice that with a row scale.
Bytes  X once (2 N D) while a split's rows fit in L2; the workspace, 2 * splits * D * (D + 128), written and read; of
       acc in fp64, half (4 D^2) read and all (8 D^2) written.
Floor  at N=65536, D=4096, bf16, one H200 (780 TFLOP/s, 4.3 TB/s): 1.45 ms of MMA; 0.2 ms of bytes beside it.
Share  not yet measured.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from slicegpt_fast.kernels.operands import rows

from .launch import Gpu, fits_tma, gpu_of, launch, vector_width
from .matmul import SIZES, load_tile
from .tiles import RATES, Tile, generation

# Keyed on the major compute capability.
TILE = {8: Tile(128, 128, 32, 8, 3), 9: Tile(128, 128, 64, 8, 4), 10: Tile(128, 128, 64, 8, 4)}
# Without TMA, addresses take registers: a smaller tile where a row scale has two terms or rows do not align.
SMALL_TILE = Tile(64, 64, 32, 4, 3)
FP32_TILE = Tile(64, 64, 32, 8, 3)
PIECE = 32
CHAIN = {torch.float16: 128, torch.bfloat16: 256, torch.float32: 256}  # tokens of one MMA chain
LONGEST_SPLIT = 65536  # rows: bounds the second accumulator's own rounding


@triton.jit
def triangle_tile(tile):
    """Row and column of the ``tile``-th block of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit(do_not_specialize=SIZES)
def partial_tiles(
    x,  # [N, D] pointer, or descriptor of [BK, BM] blocks
    row_scale,  # [N] fp32
    mask,  # [N] uint8
    partial,  # [splits, tiles, BM, BM] fp32
    N,
    D,  # in units of VEC
    stride_x,  # in units of VEC
    split_rows,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    VEC: tl.constexpr,
    CHAIN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    D = D * VEC
    stride_x = stride_x * VEC
    tile = tl.program_id(0)
    split = tl.program_id(1)
    i, j = triangle_tile(tile)
    first = split * split_rows
    last = tl.minimum(first + split_rows, N)

    total = tl.zeros((BM, BN), dtype=tl.float32)
    chain = tl.zeros((BM, BN), dtype=tl.float32)
    for row in tl.range(first, last, BK):
        xi = load_tile(x, row, i * BM, N, D, stride_x, TMA, BK, BM)
        xj = load_tile(x, row, j * BN, N, D, stride_x, TMA, BK, BN)
        rows = row + tl.arange(0, BK)
        if MASKED:
            selected = tl.load(mask + rows, mask=rows < N, other=0) != 0
            xi = tl.where(selected[:, None], xi, 0.0).to(xi.dtype)
            xj = tl.where(selected[:, None], xj, 0.0).to(xj.dtype)
        if SCALED:
            s = tl.load(row_scale + rows, mask=rows < N, other=0.0)
            if MASKED:
                s = tl.where(selected, s, 0.0)
            p = (s.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            q = s * (s / tl.where(p > 0.0, p, 1.0))
            scaled = xi.to(tl.float32) * q[:, None]
            xi = scaled.to(xi.dtype)
            xj = (xj.to(tl.float32) * p[:, None]).to(xj.dtype)
            if xi.dtype != tl.float32:
                rest = (scaled - xi.to(tl.float32)).to(xi.dtype)
                chain = tl.dot(tl.trans(rest), xj, chain)
        chain = tl.dot(tl.trans(xi), xj, chain, input_precision="ieee")
        if (row - first) % CHAIN == CHAIN - BK:
            total += chain
            chain = tl.zeros((BM, BN), dtype=tl.float32)
    total += chain

    cell = (split.to(tl.int64) * tl.num_programs(0) + tile) * (BM * BN)
    offsets = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(partial + cell + offsets, total)


@triton.jit(do_not_specialize=SIZES)
def reduce_mirror(
    partial,  # [splits, tiles, BM, BM] fp32
    acc,  # [D, D] fp32 or fp64, symmetric
    D,
    stride_row,
    stride_col,
    splits,
    BM: tl.constexpr,
    PIECE: tl.constexpr,
):
    tile = tl.program_id(0)
    i, j = triangle_tile(tile)
    r = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    c = tl.program_id(2) * PIECE + tl.arange(0, PIECE)
    total = tl.zeros((PIECE, PIECE), dtype=tl.float64)
    for split in range(splits):
        cell = (split * tl.num_programs(0) + tile).to(tl.int64) * (BM * BM)
        total += tl.load(partial + cell + r[:, None] * BM + c[None, :]).to(tl.float64)

    rows = (i * BM + r).to(tl.int64)[:, None]
    cols = (j * BM + c).to(tl.int64)[None, :]
    lower = (rows < D) & (rows >= cols)
    pointers = acc + rows * stride_row + cols * stride_col
    total = (tl.load(pointers, mask=lower, other=0.0).to(tl.float64) + total).to(acc.dtype.element_ty)
    tl.store(pointers, total, mask=lower)
    mirrored = acc + tl.trans(cols) * stride_row + tl.trans(rows) * stride_col
    tl.store(mirrored, tl.trans(total), mask=tl.trans(lower & (rows > cols)))


def choose_tile(gpu: Gpu, dtype: torch.dtype, scaled: bool, aligned: bool, tma: bool) -> Tile:
    """The square tile for a call."""
    if dtype == torch.float32:
        return FP32_TILE
    return TILE[generation(gpu)] if tma or (aligned and not scaled) else SMALL_TILE


@lru_cache(maxsize=4096)
def choose_splits(gpu: Gpu, tile: Tile, N: int, D: int) -> int:
    """Splits of N that finish first: full waves and L2-sized splits against the workspace's traffic."""
    rates = RATES[generation(gpu)]
    blocks = -(-D // tile.m)
    triangle = blocks * (blocks + 1) // 2
    step = max(2 * tile.m * tile.n * tile.k / rates.flops, 2 * (tile.m + tile.n) * tile.k / rates.l2_bytes)

    def clocks(splits: int) -> float:
        waves = -(-triangle * splits // gpu.sms)
        workspace = 2 * 4 * splits * triangle * tile.m * tile.n
        return waves * -(-N // splits // tile.k) * step + workspace / (gpu.sms * rates.l2_bytes / 2)

    fewest = -(-N // LONGEST_SPLIT)
    return min(range(fewest, max(fewest, min(64, N // 1024)) + 1), key=clocks)


def covariance_(
    acc: torch.Tensor, x: torch.Tensor, row_scale: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> None:
    """Adds (diag(row_scale * mask) x)^T (...) to ``acc`` [D, D], which must be symmetric; arguments as in the op."""
    x = rows(x)
    N, D = x.shape
    gpu = gpu_of(x.device)
    vec = vector_width(x)
    tma = gpu.has_tma and fits_tma(x)
    tile = choose_tile(gpu, x.dtype, row_scale is not None, vec > 1, tma)
    blocks = triton.cdiv(D, tile.m)
    triangle = blocks * (blocks + 1) // 2
    splits = choose_splits(gpu, tile, N, D)
    split_rows = triton.cdiv(triton.cdiv(N, splits), tile.k) * tile.k
    splits = triton.cdiv(N, split_rows)
    partial = torch.empty(splits * triangle * tile.m * tile.n, dtype=torch.float32, device=x.device)
    launch(
        partial_tiles,
        (triangle, splits),
        x.device,
        TensorDescriptor.from_tensor(x, [tile.k, tile.m]) if tma else x,
        None if row_scale is None else row_scale.float().contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        partial,
        N,
        D // vec,
        x.stride(0) // vec,
        split_rows,
        SCALED=row_scale is not None,
        MASKED=mask is not None,
        TMA=tma,
        VEC=vec,
        CHAIN=CHAIN[x.dtype],
        **tile.meta(),
    )
    pieces = tile.m // PIECE
    launch(
        reduce_mirror,
        (triangle, pieces, pieces),
        x.device,
        partial,
        acc,
        D,
        *acc.stride(),
        splits,
        BM=tile.m,
        PIECE=PIECE,
        num_warps=4,
    )
