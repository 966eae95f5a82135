"""``attend``: the attention of a decode step over a cache of keys and values, and its new tokens' append to it.

                  cached positions                 new      a program has one split of one sequence's key and value
    K, V [S, D]  +---------+---------+---------+--------+   head, and up to BM of the queries that read it: those of
                 | split 0 | split 1 | split 2          |   all heads that share it, of all new tokens
                 +---------+---------+---------+--------+
                   BN rows at a time: p = exp(q K^T - max), O += p V, the maximum and the sum of p beside it

Queries are normalised and rotated by every program, new keys and values by the last split's alone, which reads them
from there and not from the cache, where it leaves them. So nobody reads what another program writes. A split's length
follows from the number of cached positions, which is read on the GPU: the grid depends on the cache's room alone, and
a captured graph serves all lengths. The last split to arrive adds all of them, in order.

    FLOPs  4 S D per query
    Bytes  4 S D per sequence and key and value head: each is read once for up to BM queries
    Floor  32 heads of 128 numbers, S = 4096, B = 1, one H200 (4.3 TB/s copy): 16 us
    Share  not yet measured
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slicegpt_fast.kernels.counters import counters
from slicegpt_fast.kernels.operands import cache, heads, tokens, vector

from .launch import Gpu, arrives_last, gpu_of, launch

SIZES = ("T", "groups", "shared", "rank", "splits", "stride_y")
SIZES += tuple(f"stride_{x}" for x in ("q", "k", "v", "q_head", "k_head", "v_head", "keys", "values"))
SIZES += tuple(f"{x}_{y}" for x in ("angles", "mask") for y in ("row", "sequence"))

NEVER = tl.constexpr(-3e38)  # the score of a position that counts nowhere
LOG2_E = 1.4426950408889634


@triton.jit
def rotated(
    first,  # [ROWS]: the heads' first numbers
    present,  # [ROWS]
    norm,  # [D] or None
    cosine,  # [.., R] or None
    sine,
    angles,  # [ROWS]: where the heads' angles begin
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):  # -> [ROWS, BD]
    """Heads, normalised and rotated as the model does it, in the model's dtype; zeros behind them."""
    dtype: tl.constexpr = first.dtype.element_ty
    column = tl.arange(0, BD)
    partner = tl.where(column < R // 2, column + R // 2, tl.where(column < R, column - R // 2, column))
    inside = present[:, None] & (column < D)[None, :]
    x = tl.load(first[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = (x * scale).to(dtype).to(tl.float32)
        x *= tl.load(norm + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if cosine is not None:
        # Once more from memory, rather than from the threads that hold it.
        other = tl.load(first[:, None] + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm is not None:
            other = (other * scale).to(dtype).to(tl.float32)
            other *= tl.load(norm + partner, mask=column < D, other=0.0).to(tl.float32)[None, :]
        cells = angles[:, None] + column[None, :]
        turned = present[:, None] & (column < R)[None, :]
        c = tl.load(cosine + cells, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sine + cells, mask=turned, other=0.0).to(tl.float32)
        x = x * c + tl.where((column < R // 2)[None, :], -other, other) * s
    return x.to(dtype)


@triton.jit
def add_positions(sums, maximum, total, q, k, v, allowed, scale):
    """The softmax over the positions so far and those of k and v [positions, BD], to the base 2 and not yet divided."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(allowed, scores, NEVER)
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.where(allowed, tl.exp2(scores - highest[:, None]), 0.0)
    before = tl.exp2(maximum - highest)
    sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
    return sums, highest, total * before + tl.sum(weights, axis=1)


@triton.jit
def attends(mask, begin, positions, inside, present, known):
    """[rows, positions]: which of the positions a row attends to: where there is no mask, to those that it knows."""
    allowed = present[:, None] & inside[None, :]
    if mask is not None:
        return tl.load(mask + begin[:, None] + positions[None, :], mask=allowed, other=0) != 0
    return allowed & (positions[None, :] < known[:, None])


@triton.jit(do_not_specialize=SIZES)
def attend_decode(
    queries,  # [B T, H]: the first numbers of heads of D
    new_keys,  # [B T, groups]
    new_values,  # [B T, groups], of `rank`
    cosine,  # [T or B T, R] or None
    sine,
    keys,  # [B groups, positions * D]
    values,
    start,  # [1] int64
    mask,  # [T or B T, positions] bytes or None
    query_norm,  # [D] or None
    key_norm,
    y,  # [B T, H rank]
    shares,  # [items, splits, BM * (BD + 2)] fp32
    counter,  # [items] int32, zero
    scale,
    eps,
    T,
    groups,
    shared,  # heads that share a key and value head
    rank,
    splits,
    stride_q,
    stride_k,
    stride_v,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_keys,  # of keys and values in units of VEC
    stride_values,
    angles_row,
    angles_sequence,
    mask_row,
    mask_sequence,
    stride_y,
    D: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    split = tl.program_id(0)
    item = tl.program_id(1)
    tiles = tl.cdiv(T * shared, BM)
    head = item // tiles
    sequence, group = (head // groups).to(tl.int64), head % groups
    column = tl.arange(0, BD)
    of_head, of_value = column < D, column < tl.cdiv(rank, VEC) * VEC  # behind the rank there are the cache's zeros

    query = item % tiles * BM + tl.arange(0, BM)
    present = query < T * shared
    token, m = query // shared, sequence * T + query // shared
    first = queries + m * stride_q + (group * shared + query % shared) * stride_q_head
    angles = sequence * angles_sequence + token.to(tl.int64) * angles_row
    q = rotated(first, present, query_norm, cosine, sine, angles, eps, D, R, BD)
    mask_begin = sequence * mask_sequence + token.to(tl.int64) * mask_row
    length = tl.load(start)
    known = length + token + 1

    sums = tl.zeros((BM, BD), dtype=tl.float32)
    maximum = tl.full((BM,), NEVER, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    keys += head.to(tl.int64) * (stride_keys * VEC)
    values += head.to(tl.int64) * (stride_values * VEC)
    size = tl.cdiv(tl.cdiv(length, BN), splits) * BN
    end = tl.minimum((split + 1) * size, length)
    for begin in range(split * size, end, BN):
        position = begin + tl.arange(0, BN)
        inside = position < end
        cells = position[:, None] * D + column[None, :]
        k = tl.load(keys + cells, mask=inside[:, None] & of_head[None, :], other=0.0)
        v = tl.load(values + cells, mask=inside[:, None] & of_value[None, :], other=0.0)
        allowed = attends(mask, mask_begin, position, inside, present, known)
        sums, maximum, total = add_positions(sums, maximum, total, q, k, v, allowed, scale)

    if split == splits - 1:
        for t in range(0, T, BT):
            new = t + tl.arange(0, BT)
            there = new < T
            m_new = sequence * T + new
            angles_new = sequence * angles_sequence + new.to(tl.int64) * angles_row
            first_k = new_keys + m_new * stride_k + group * stride_k_head
            first_v = new_values + m_new * stride_v + group * stride_v_head
            new_k = rotated(first_k, there, key_norm, cosine, sine, angles_new, eps, D, R, BD)
            tl.debug_barrier()  # the values are read only now: fp32 has no registers for both at once
            of_new = there[:, None] & (column < rank)[None, :]
            new_v = tl.load(first_v[:, None] + column[None, :], mask=of_new, other=0.0)
            if item % tiles == 0:
                to = (length + new)[:, None] * D + column[None, :]
                tl.store(keys + to, new_k, mask=there[:, None] & of_head[None, :])
                tl.store(values + to, new_v, mask=there[:, None] & of_head[None, :])
            attended = attends(mask, mask_begin, length + new, there, present, known)
            sums, maximum, total = add_positions(sums, maximum, total, q, new_k, new_v, attended, scale)

    complete = True
    if splits > 1:
        row = tl.arange(0, BM)
        own_cells = row[:, None] * BD + column[None, :]
        share = shares + item.to(tl.int64) * splits * (BM * (BD + 2))
        own = share + split * (BM * (BD + 2))
        tl.store(own + own_cells, sums)
        tl.store(own + BM * BD + row, maximum)
        tl.store(own + BM * (BD + 1) + row, total)
        complete = arrives_last(counter + item, splits)
        if complete:
            sums = tl.zeros((BM, BD), dtype=tl.float32)
            maximum = tl.full((BM,), NEVER, dtype=tl.float32)
            total = tl.zeros((BM,), dtype=tl.float32)
            for _ in range(splits):
                its_maximum = tl.load(share + BM * BD + row, cache_modifier=".cg")
                highest = tl.maximum(maximum, its_maximum)
                before, its = tl.exp2(maximum - highest), tl.exp2(its_maximum - highest)
                total = total * before + tl.load(share + BM * (BD + 1) + row, cache_modifier=".cg") * its
                sums = sums * before[:, None] + tl.load(share + own_cells, cache_modifier=".cg") * its[:, None]
                maximum = highest
                share += BM * (BD + 2)
    if complete:
        result = sums / tl.where(total > 0, total, 1.0)[:, None]
        first_y = y + m * stride_y + (group * shared + query % shared) * rank
        of_y = present[:, None] & (column < rank)[None, :]
        tl.store(first_y[:, None] + column[None, :], result.to(y.dtype.element_ty), mask=of_y)


def choose_splits(gpu: Gpu, items: int, positions: int) -> int:
    """Programs that share a key and value head's positions: two per SM in all, none with fewer than a few steps."""
    return max(1, min(2 * gpu.sms // items, positions // 128))


def attend(
    queries: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The op, for tensors with elements."""
    (B, T, H, D), (_, G, C, _), rank, dtype = queries.shape, keys.shape, new_values.shape[3], queries.dtype
    rows, narrow = T * H // G, dtype != torch.float32
    BD = max(16, triton.next_power_of_2(D))
    BM = 32 if rows > 16 and narrow and (BD <= 128 or BD == D) else 16  # with a mask over 256 columns, 32 rows spill
    BN = min(64, max(16, (8192 if narrow else 2048) // BD))
    items = B * G * triton.cdiv(rows, BM)
    splits = choose_splits(gpu_of(queries.device), items, C)

    new = [heads(x) for x in (queries, new_keys, new_values)]
    keys, values = cache(keys), cache(values)
    cosine, sine, mask = tokens(cosine), tokens(sine), tokens(mask)
    of_rows = [(0, 0) if x is None else (x.stride(0), 0 if len(x) == T else T * x.stride(0)) for x in (cosine, mask)]
    width = 16 // keys.element_size()
    aligned = D % width == 0 and all(x.data_ptr() % 16 == 0 and x.stride(0) % width == 0 for x in (keys, values))
    vec = width if aligned else 1
    y = queries.new_empty(B * T, H * rank)
    shares = torch.empty(items * splits * BM * (BD + 2) * (splits > 1), dtype=torch.float32, device=y.device)
    launch(
        attend_decode, (splits, items), y.device,
        *new, cosine, sine, keys, values, start, None if mask is None else mask.view(torch.uint8),
        vector(query_norm), vector(key_norm), y, shares, counters(items, y.device), scale * LOG2_E, eps,
        T, G, H // G, rank, splits, *(x.stride(0) for x in new), *(x.stride(1) for x in new),
        keys.stride(0) // vec, values.stride(0) // vec, *of_rows[0], *of_rows[1], y.stride(0),
        D=D, R=0 if cosine is None else cosine.shape[1], VEC=vec, BM=BM, BN=BN, BT=16, BD=BD,
        num_warps=4 if narrow and BM == 16 and BD <= 128 else 8, num_stages=3 if aligned else 1,
        maxnreg=255,  # no spill for occupancy, nor for the addresses of a pipeline that loads element by element
    )  # fmt: skip
    return y
