"""The linear part of a sliced Llama-2-7B block, M = 4096: sums the prefill rows that the other two benchmarks left.

python bench/bench_block.py [--out FOLDER]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kernels import table

TARGET = 1.10


def block_rows(folder: Path) -> list[dict[str, Any]]:
    """One row per width: QKV, out, gate/up and down with dense shortcuts, kernels against torch."""
    rows = [
        row
        for op in ("norm_linear", "residual_linear")
        for row in json.loads((folder / f"{op}.json").read_text())["rows"]
        if "auto_us" in row and row.get("shortcut", "dense") == "dense"
    ]
    totals = []
    for d in dict.fromkeys(row["d"] for row in rows):
        layers = [row for row in rows if row["d"] == d]
        auto, by_torch = (sum(row[name] for row in layers) for name in ("auto_us", "torch_us"))
        slowest = min(row["torch_us"] / row["auto_us"] for row in layers)
        totals.append(
            {"d": d, "layers": len(layers), "auto_us": auto, "torch_us": by_torch, "x torch": by_torch / auto}
        )
        totals[-1] |= {"target": TARGET, "slowest op, x torch": slowest}
    return totals


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sums the kernels' times over a block.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="folder of the JSON files")
    folder = parser.parse_args().out
    rows = block_rows(folder)
    (folder / "block.json").write_text(json.dumps({"op": "block", "rows": rows}, indent=1) + "\n")
    print(f"linear part of a block\n\n{table(rows)}\n")
