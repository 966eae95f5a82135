"""What is committed as predicted is what the script predicts, and a run's times come to stand beside it."""

from pathlib import Path

import pytest
from predictions import BANDWIDTH, ROWS, SHARES, cases, expected, markdown

PAGE = Path(__file__).parents[2] / "docs/benchmarks/gpu_predictions.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == markdown([])


def test_floors_are_those_of_bytes_and_flops():
    found = {tuple(case["case"].values()): case for case in cases()}
    assert all(len(shares) == len(ROWS) for shares in SHARES.values())
    floor, least, most = expected(found["norm, QKV", 3072, 1], "H100")
    weight = 2 * 12288 * 3072  # bytes, beside which nothing else counts
    assert floor == pytest.approx(1e6 * weight / BANDWIDTH["H100"], rel=1e-3)
    assert (least, most) == pytest.approx((floor / 0.9, floor / 0.85))
    floor, *_ = expected(found["norm, gate/up, silu", 3072, 4096], "H200")
    assert floor == pytest.approx(1e6 * 2 * 4096 * 22016 * 3072 / 798e12)
    for case in found.values():
        h100, h200 = expected(case, "H100"), expected(case, "H200")
        assert h200[1] - h200[0] == pytest.approx(h100[1] - h100[0])


def test_what_was_measured_stands_beside_it():
    params = {"d": 3072, "k": 4096, "kind": "dense", "dtype": "bfloat16", "M": 64}
    row = {"group": "residual_linear", "params": params, "extra_info": {"seconds": {"auto": 2.5e-5}}}
    text = markdown([{"machine_info": {"processor": "NVIDIA H100"}, "benchmarks": [row]}])
    (line,) = [line for line in text.splitlines() if line.endswith("| 25.0 (NVIDIA H100) |")]
    assert line.startswith("| out + dense S | 3072 | 64 |")
