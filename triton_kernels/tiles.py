"""Which tile a matmul uses: a table of tiles, a wave model that picks one, measured choices that overrule it.

The wave model: a GPU works through the tiles of an output in waves of one tile per SM, so a tile shape is as good as
its speed times the share of the last wave that it fills. At M=2048, N=2872 on 132 SMs, tiles of 128x256 leave a third
of their second wave empty. The model counts over the true widths, so it sees this; nothing is padded to a power of
two.

    clocks(tile) = ceil(tiles / SMs) * (ceil(K / BK) * max(MMA clocks, L2 clocks of one K step) + fill and epilogue)

For Llama-2-7B's residual stream (n = d, K = 4096 + d) on 132 SMs the model takes 128x256, which fills of its waves

              d = 2872   3072   3328
    M = 2048      0.68   0.73   0.79
    M = 4096      0.91   0.97   0.79

and at least 0.94 for QKV and gate/up. Triton's blocks are powers of two: at M=2048, d=2872 one of 192 would fill 0.91.

Measured choices are those of `slicegpt-fast tune` (``kernels/measured.py``). Nothing is ever timed during a call.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

from slicegpt_fast.kernels import measured
from slicegpt_fast.kernels.regimes import DECODE_ROWS

from .launch import Gpu


@dataclass(frozen=True)
class Tile:
    """One program's output block, its K step, and how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def meta(self) -> dict[str, int]:
        """Launch arguments of a kernel that takes a tile."""
        return {"BM": self.m, "BN": self.n, "BK": self.k, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Rates:
    """Per SM and clock: dense 16-bit MMA FLOPs (datasheet), and bytes from L2 (an estimate until it is measured)."""

    flops: int
    l2_bytes: int


# Keyed on the major compute capability.
RATES = {8: Rates(2048, 40), 9: Rates(4096, 40), 10: Rates(8192, 64)}
TILES = {
    8: (Tile(128, 128, 32, 8, 4), Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
    9: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 5)),
    10: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 5)),
}
# Keyed on the blocks of W in a tile, two with a gate: an MMA takes 64 rows of W on its left, so a block has no fewer.
DECODE_TILES = {1: (Tile(16, 64, 128, 4, 4), Tile(16, 128, 64, 4, 4)), 2: (Tile(16, 128, 64, 4, 4),)}
# For fp32, which runs on the FMA units.
FP32_TILES = (Tile(64, 64, 32, 8, 3),)
# For rows that are not 16-byte aligned, which load element by element: no asynchronous copy takes two bytes, and in a
# pipeline without such copies sm_90's MMAs wait for each other.
UNALIGNED_TILES = (Tile(64, 64, 32, 8, 1),)
# For both.
SMALL_DECODE_TILES = {1: (Tile(16, 64, 64, 4, 3),), 2: (Tile(16, 128, 32, 4, 3),)}
# Epilogues that need registers, and some that do with a bias: at most 64 accumulators per thread then.
HEAVY_EPILOGUES = {8: (), 9: ("gelu", "silu_gate + bias", "low rank + bias"), 10: ("gelu", "silu_gate + bias")}
SM_REGISTERS = 65536
OTHER_REGISTERS = 112  # per thread, beside the accumulators: as compiled for sm_80, where there are most
TILE_OVERHEAD = 2000  # clocks to fill the pipeline and write a tile out


def generation(gpu: Gpu) -> int:
    """The newest major capability in the tables that ``gpu`` can run."""
    return max((major for major in TILES if major <= gpu.capability[0]), default=min(TILES))


def tiles_for(
    gpu: Gpu, dtype: torch.dtype, m: int, aligned: bool, epilogue: str | None, bias: bool = False
) -> tuple[Tile, ...]:
    """Every tile that may be used for ``m`` rows on ``gpu``.

    ``aligned``: rows load in vectors of 16 bytes. ``epilogue``: the activation, or the kind of shortcut.
    """
    fp32 = dtype == torch.float32
    if m <= DECODE_ROWS:
        return (DECODE_TILES if aligned and not fp32 else SMALL_DECODE_TILES)[2 if epilogue == "silu_gate" else 1]
    tiles = FP32_TILES if fp32 else TILES[generation(gpu)] if aligned else UNALIGNED_TILES
    kinds = {epilogue, f"{epilogue} + bias"} if bias else {epilogue}
    most = 128 if kinds.isdisjoint(HEAVY_EPILOGUES[generation(gpu)]) else 64
    return tuple(tile for tile in tiles if tile.m * tile.n <= most * 32 * tile.warps)


def programs(gpu: Gpu, tile: Tile, element_size: int) -> int:
    """Programs with this tile that ``gpu`` runs at once: one per SM, or two where buffers and registers let it."""
    buffers = tile.stages * (tile.m + tile.n) * tile.k * element_size
    threads = 32 * tile.warps
    registers = tile.m * tile.n + OTHER_REGISTERS * threads
    return gpu.sms * max(1, min(2, gpu.shared_memory // buffers, SM_REGISTERS // registers))


@lru_cache(maxsize=4096)
def choose_split(gpu: Gpu, tile: Tile, tiles: int, k: int) -> tuple[int, int]:
    """Programs that share one decode tile's K, and the K of each: enough to keep every SM streaming, in full waves."""
    steps = -(-k // tile.k)

    def time(split: int) -> float:
        waves = -(-tiles * split // (2 * gpu.sms))
        return waves * -(-steps // split) + (2 + 0.5 * split if split > 1 else 0)  # in K steps

    split = min((split for split in (1, 2, 4, 8, 16) if split <= steps), key=time)
    split_steps = -(-steps // split)
    return -(-steps // split_steps), split_steps * tile.k


def clocks(gpu: Gpu, tile: Tile, m: int, n: int, k: int) -> float:
    """The wave model's estimate for an [m, n] output with K = k."""
    rates = RATES[generation(gpu)]
    tiles = -(-m // tile.m) * -(-n // tile.n)
    waves = -(-tiles // gpu.sms)
    step = max(2 * tile.m * tile.n * tile.k / rates.flops, 2 * (tile.m + tile.n) * tile.k / rates.l2_bytes)
    return waves * (-(-k // tile.k) * step + TILE_OVERHEAD)


@lru_cache(maxsize=4096)
def choose_tile(
    gpu: Gpu, op: str, dtype: torch.dtype, m: int, n: int, k: int, aligned: bool, epilogue: str | None, bias: bool
) -> Tile:
    """The measured tile for this shape where there is one, else the first for decode, else the wave model's choice."""
    allowed = tiles_for(gpu, dtype, m, aligned, epilogue, bias)
    found = measured.lookup(gpu.name, op, measured.bucket(dtype, (m, n, k), epilogue))
    best = [] if found is None else [tile for tile in allowed if asdict(tile) == found.tile]
    return best[0] if best else allowed[0] if m <= DECODE_ROWS else min(allowed, key=lambda t: clocks(gpu, t, m, n, k))
