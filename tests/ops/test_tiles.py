"""Tile choice: the wave model, split-K, registers, measured tiles."""

from dataclasses import asdict

import pytest
import torch

from slicegpt_fast.kernels import measured
from slicegpt_fast.triton_kernels import covariance, tiles
from slicegpt_fast.triton_kernels.launch import Gpu
from slicegpt_fast.triton_kernels.tiles import Tile

H200 = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024)
BF16 = torch.bfloat16


def choose(m, n, k, op="norm_linear"):
    return tiles.choose_tile(H200, op, BF16, m, n, k, True, None, False)


def test_wave_model_counts_true_widths(cache):
    large, small = tiles.TILES[9][0], tiles.TILES[9][1]
    assert choose(4096, 22016, 2872) == large  # 2752 tiles of 128x256: 20.8 waves
    # One column of tiles more than fits a wave costs a whole wave of large tiles, but less of small ones.
    assert tiles.clocks(H200, large, 128, 132 * 256 + 8, 4096) == 2 * tiles.clocks(H200, large, 128, 132 * 256, 4096)
    assert tiles.clocks(H200, small, 2048, 2048 + 8, 4096) > tiles.clocks(H200, small, 2048, 2048, 4096)
    assert choose(64, 512, 4096).m == 64
    assert choose(16, 12288, 2872) == tiles.DECODE_TILES[1][0]


def share_of_waves(tile, m, n):
    """How much of its waves of tiles an [m, n] output fills."""
    tiles_mn = -(-m // tile.m) * -(-n // tile.n)
    return m * n / (-(-tiles_mn // H200.sms) * H200.sms * tile.m * tile.n)


@pytest.mark.parametrize(("m", "shares"), [(2048, (0.68, 0.73, 0.79)), (4096, (0.91, 0.97, 0.79))])
def test_predicted_shares_of_the_waves(m, shares, cache):
    """The table in tiles.py."""
    widths = (2872, 3072, 3328)
    chosen = [choose(m, d, 4096 + d, "residual_linear") for d in widths]
    assert {(tile.m, tile.n) for tile in chosen} == {(128, 256)}
    assert tuple(round(share_of_waves(tile, m, d), 2) for tile, d in zip(chosen, widths, strict=True)) == shares
    assert all(0.94 < share_of_waves(choose(m, n, d), m, n) < 1 for d in widths for n in (12288, 22016))
    assert round(share_of_waves(Tile(128, 192, 64, 8, 3), 2048, 2872), 2) == 0.91


@pytest.mark.parametrize("k", [1, 64, 2872, 13880])
@pytest.mark.parametrize("count", [1, 45, 192, 1000])
def test_splits_cover_k(count, k):
    split, split_k = tiles.choose_split(H200, tiles.DECODE_TILES[1][0], count, k)
    assert (split - 1) * split_k < k <= split * split_k
    if count == 1000:
        assert split == 1


@pytest.mark.parametrize("N", [1, 5000, 65536, 10**6])
@pytest.mark.parametrize("D", [8, 2872, 8192])
def test_covariance_splits_are_short_enough(N, D):
    splits = covariance.choose_splits(H200, covariance.TILE[9], N, D)
    assert splits >= 1
    assert N / splits <= covariance.LONGEST_SPLIT


def record(tile):
    entry = measured.Entry({"reference": 90.0, "triton": 100.0}, asdict(tile))
    measured.record(H200.name, "norm_linear", measured.bucket(BF16, (4096, 4096, 2872), None), entry)
    tiles.choose_tile.cache_clear()


def test_measured_tile_wins(cache):
    tile = Tile(64, 128, 64, 4, 4)
    assert choose(3000, 4096, 2872) != tile
    record(tile)
    assert choose(3000, 4096, 2872) == tile  # same bucket: M up to 4096
    assert choose(5000, 4096, 2872) != tile
    assert choose(3000, 4096, 2872, "residual_linear") != tile


def test_measured_tile_that_a_call_cannot_use_is_passed_over(cache):
    record(tiles.TILES[9][0])
    assert choose(4096, 4096, 2872) == tiles.TILES[9][0]
    assert tiles.choose_tile(H200, "norm_linear", BF16, 4096, 4096, 2872, False, None, False) in tiles.UNALIGNED_TILES


def test_registers_bound_the_programs_of_an_sm():
    a100 = Gpu("NVIDIA A100", (8, 0), 108, 163 * 1024)
    assert [tiles.programs(a100, tile, 2) // a100.sms for tile in tiles.TILES[8]] == [1, 1, 2]
    assert tiles.programs(H200, tiles.TILES[9][0], 2) == H200.sms
