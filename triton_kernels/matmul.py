"""The parts that the matmul kernels share: loading a tile, walking over K, ordering tiles, activations."""

from __future__ import annotations

import triton
import triton.language as tl


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
