"""Says whether an op became slower: ratios to its reference, beside those committed for this kind of machine.

    python bench/compare.py RUN.json [RUN.json ...] [--baselines docs/benchmarks]

Fails where an op lost more than a third of its ratio (the geometric mean over its rows) in every one of the runs.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from report import kind_of, table

LOST = 2 / 3  # of the committed ratio


def ratios(results: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """Op, and times as fast as the reference, of each row by name."""
    return {
        row["fullname"]: (row["group"], row["extra_info"]["times as fast"]["reference"])
        for row in results["benchmarks"]
        if "reference" in row["extra_info"]["times as fast"]
    }


def compare(baseline: dict[str, Any], runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """A table with a row per op that is in all of them, and the ops that lost in every run."""
    known, measured = ratios(baseline), [ratios(run) for run in runs]
    by_op: dict[str, list[str]] = {}
    for name, (op, _) in known.items():
        if all(name in run for run in measured):
            by_op.setdefault(op, []).append(name)
    rows, lost = [], []
    for op, names in by_op.items():
        before, *after = (geometric_mean(run[name][1] for name in names) for run in (known, *measured))
        rows.append({"op": op, "rows": len(names), "x reference, committed": before})
        rows[-1] |= {f"run {number}": now for number, now in enumerate(after, 1)}
        if all(now < LOST * before for now in after):
            lost.append(op)
    return rows, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="JSON files of runs on this machine")
    parser.add_argument("--baselines", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
    options = parser.parse_args()
    runs = [json.loads(file.read_text()) for file in options.runs]
    file = options.baselines / f"{kind_of(runs[0])}.json"
    if not file.exists():
        print(f"{file} does not exist: nothing was measured on such a machine yet.")
        return
    rows, lost = compare(json.loads(file.read_text()), runs)
    if not rows:
        sys.exit(f"error: {file} and the runs have no row in common: measure it again.")
    print(table(rows))
    if lost:
        sys.exit(f"error: {', '.join(lost)} lost more than a third of the ratio to the reference.")


if __name__ == "__main__":
    main()
