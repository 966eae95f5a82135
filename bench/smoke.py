"""The first thing to run on a GPU: every kernel on its awkward shapes, a process each; prints a table.

    python bench/smoke.py [--emulate]

--emulate, for a machine without a GPU, runs a few small cases in the emulator and in Triton's interpreter. On a GPU the
kernels that pass are noted for `auto`, as `slicegpt-fast tune --quick` does.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from markdown_table import table

from slicegpt_fast.ops.backends import smoke

SMALL = 1 << 16  # multiplications of a case that the emulator runs
FEW = 2  # cases of each backend
PATIENCE = 200  # seconds: a machine without a GPU may be a busy one


def outcomes(emulate: bool) -> Iterator[smoke.Outcome]:
    if not emulate:
        return smoke.quick()
    from emulator.emulate import emulated

    emulated("90a")  # compiled now, not under a case's watchdog
    smoke.WATCHDOG = PATIENCE
    small = [n for n, c in enumerate(smoke.CASES) if c.m * c.n * max(c.k, c.n) <= SMALL and not c.divided][-FEW:]
    numbered = [(backend, number) for backend in smoke.BACKENDS for number in small]
    return smoke.check_all(numbered, (sys.executable, __file__, "--case"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--case", nargs=2, metavar=("BACKEND", "NUMBER"), help="a single one, emulated in this process")
    options = parser.parse_args()
    if options.case:
        from emulator.emulate import emulating

        with emulating("90a") if options.case[0] == "cuda" else nullcontext():
            return smoke.main(*options.case, device="cpu")
    rows, wrong = [], []
    for outcome in outcomes(options.emulate):
        rows.append({"backend": outcome.backend, "case": str(outcome.case), "outcome": outcome.said})
        wrong += [] if outcome.right else rows[-1:]
        print(*rows[-1].values(), f"{outcome.seconds:.1f} s", sep=" | ", flush=True)
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} right\n", table(wrong) if wrong else "", sep="\n")
    return int(bool(wrong) or not rows)


if __name__ == "__main__":
    sys.exit(main())
