"""What each op is expected to take on an H100 and an H200, written down before the first run; measured times beside it.

    python bench/predictions.py [RUN.json ...] [--out docs/benchmarks/gpu_predictions.md]

A time is the floor of its bytes and FLOPs at the rates that others measured on an H100, over the share of it that a
reading of the machine code makes likely. On an H200 the floor falls with its bandwidth, what is lost beside it stays.
RUN.json, of `make gpu-check`, fills the last column.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown_table import table

FLOPS = 798e12  # per second, of a large bf16 matmul; both GPUs have the same tensor cores
BANDWIDTH = {"H100": 3.0e12, "H200": 4.2e12}  # bytes per second, of a copy
ROWS = (1, 16, 32, 64, 256, 2048, 4096)
WIDTHS = (2872, 2880, 3072, 3328)
HEADS, MLP = 4096, 11008  # Llama-2-7B's
# Least and most of the floor's share in percent, by rows. To 16 rows it is what a kernel's start and end leave; to 64
# the weight is still what is read; at 256 both floors meet, and few tiles fill the GPU; then there are waves of them.
SHARES = {
    "norm, QKV": ((85, 90), (75, 85), (75, 85), (72, 85), (55, 72), (78, 88), (85, 92)),
    "norm, gate/up, silu": ((88, 92), (78, 87), (78, 87), (75, 87), (60, 78), (82, 90), (86, 92)),
    "out + dense S": ((75, 84), (68, 80), (60, 75), (60, 75), (50, 68), (75, 86), (82, 91)),
    "down + dense S": ((83, 89), (75, 85), (68, 82), (65, 80), (55, 72), (78, 88), (82, 91)),
}
COVARIANCE = {2872: (62, 66), 4096: (68, 72), 8192: (72, 76)}

HEADER = """# What the kernels are expected to take on a GPU

Written before any of them ran on one; bf16, Llama-2-7B's matmuls at sliced widths d, the times of `auto` with a warm
GPU, in CUDA graphs. A floor is the larger of bytes over {H100:.1f} TB/s (H100) or {H200:.1f} TB/s (H200), what a copy
reaches, and FLOPs over {flops:.0f} TFLOP/s, what a large matmul reaches: rates that others measured. How much more a
kernel takes was read from its machine code and counted in waves of tiles. `python bench/predictions.py RUN.json` fills
the last column.

"""
FOOTER = """
Whole models (Llama-2-7B at 75 % of the blocks' parameters, shared basis, d about 3072, H100, one sequence), in
milliseconds per token after a prompt of 1984:

| harness | dense | sliced | sliced, torch.compile | patched | measured |
| --- | --- | --- | --- | --- | --- |
| eager | 9–11 | 9–11 | | 8–9: bound by the host | |
| static cache in a CUDA graph | 6.3–6.7 | | 5.0–5.3 | 4.5–4.8 | |

The prompt itself: 1.28 times as fast as dense or better. Patching alone gains most where many launches become few.
"""


def cases() -> Iterator[dict[str, Any]]:
    """Return every row of the table: case, bytes, FLOPs, shares, and how the benchmarks call it."""
    for d in WIDTHS:
        for place, M in enumerate(ROWS):
            for name, n in (("norm, QKV", 3 * HEADS), ("norm, gate/up, silu", 2 * MLP)):
                activation = "silu_gate" if "silu" in name else None
                columns = n // 2 if activation else n
                yield {
                    "case": {"op": name, "d": d, "M": M},
                    "bytes": 2 * (n * d + M * d + M * columns),
                    "flops": 2 * M * n * d,
                    "share": SHARES[name][place],
                    "row": ("norm_linear", {"n": n, "d": d, "activation": activation, "M": M}),
                }
            for name, k in (("out + dense S", HEADS), ("down + dense S", MLP)):
                yield {
                    "case": {"op": name, "d": d, "M": M},
                    "bytes": 2 * (d * (k + d) + M * (k + 2 * d)),
                    "flops": 2 * M * d * (k + d),
                    "share": SHARES[name][place],
                    "row": ("residual_linear", {"d": d, "k": k, "kind": "dense", "M": M}),
                }
    for D, share in COVARIANCE.items():
        N = 65536
        yield {
            "case": {"op": "covariance, 65536 tokens", "d": D, "M": ""},
            "bytes": 2 * N * D + 16 * D * D,
            "flops": N * D * (D + 1),
            "share": share,
            "row": ("covariance", {"N": N, "D": D}),
        }


def expected(case: dict[str, Any], gpu: str) -> tuple[float, float, float]:
    """Return the floor of a case on a GPU, and the least and most that it is expected to take, in microseconds."""
    floors = {name: 1e6 * max(case["bytes"] / rate, case["flops"] / FLOPS) for name, rate in BANDWIDTH.items()}
    least, most = (floors["H100"] * (100 / share - 1) for share in reversed(case["share"]))
    return floors[gpu], floors[gpu] + least, floors[gpu] + most


def measured(case: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return the microseconds of `auto` in the runs' row of a case, with the GPU, or nothing."""
    group, params = case["row"]
    for run in runs:
        for row in run["benchmarks"]:
            if row["group"] == group and params.items() <= row["params"].items():
                return f"{1e6 * row['extra_info']['seconds']['auto']:.1f} ({run['machine_info']['processor']})"
    return ""


def markdown(runs: list[dict[str, Any]]) -> str:
    """Return the whole page."""
    rows = []
    for case in cases():
        row = dict(case["case"])
        for gpu in BANDWIDTH:
            floor, least, most = expected(case, gpu)
            row |= {f"{gpu}: floor, µs": f"{floor:.1f}", f"{gpu}: expected, µs": f"{least:.1f}–{most:.1f}"}
        rows.append(row | {"measured, µs": measured(case, runs)})
    rates = {gpu: rate / 1e12 for gpu, rate in BANDWIDTH.items()}
    return HEADER.format(flops=FLOPS / 1e12, **rates) + table(rows) + "\n" + FOOTER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="JSON files of pytest-benchmark")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/gpu_predictions.md"), help="(%(default)s)")
    options = parser.parse_args()
    options.out.write_text(markdown([json.loads(file.read_text()) for file in options.runs]))


if __name__ == "__main__":
    main()
