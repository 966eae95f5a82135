"""What the matmul kernels share: tiles in and out, their products and their order, adding shares, activations."""

from __future__ import annotations

import triton
import triton.language as tl

# A kernel is compiled once for all sizes: Triton would compile it anew for those that are 1 or not a multiple of 16.
# What loads need to know of them, that rows align, VEC says: sizes and strides arrive in units of it.
SIZES = ("M", "N", "K", "K2", "D", "out", "unscaled", "splits")
SIZES += tuple(f"stride_{x}" for x in ("a", "w", "a2", "w2", "h", "x", "y", "residual", "row", "col"))


@triton.jit
def load_tile(
    source, row, col, rows, cols, stride, TMA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # -> [ROWS, COLS]
    """Tile at (row, col) of a row-major matrix [rows, cols], zero outside; with TMA, ``source`` is a descriptor."""
    if TMA:
        tile = source.load([row, col])
    else:
        r = row + tl.arange(0, ROWS)[:, None]
        c = col + tl.arange(0, COLS)[None, :]
        tile = tl.load(source + r.to(tl.int64) * stride + c, mask=(r < rows) & (c < cols), other=0.0)
    return tile


@triton.jit
def multiply(
    acc, x, w, m, n, first, last, M, N, K, stride_x, stride_w,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc`` [BM, BN] plus X W^T: the rows from m of X [M, K], those from n of W [N, K], columns first to last."""
    for k in range(first, last, BK):
        x_tile = load_tile(x, m, k, M, K, stride_x, TMA, BM, BK)
        w_tile = load_tile(w, n, k, N, K, stride_w, TMA, BN, BK)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def store_tile(target, rows, columns, row_end, column_end, stride, value):
    """Stores ``value`` at the given rows and columns of a row-major matrix, where they lie before both ends."""
    pointers = target + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    tl.store(pointers, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def add_in_order(shares, cells, mask, count, stride):
    """Sum of the fp32 values at ``cells`` of ``count`` shares, ``stride`` apart, from the first to the last."""
    total = tl.zeros(cells.shape, dtype=tl.float32)
    pointers = shares + cells
    for _ in range(count):
        total += tl.load(pointers, mask=mask, cache_modifier=".cg")
        pointers += stride
    return total


@triton.jit
def tile_position(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP rows of tiles advance together: neighbours in time share operands in L2."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 ``x``, elementwise."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x
