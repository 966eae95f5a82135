"""Small calls of every kernel of csrc/cuda, for compute-sanitizer to watch; bench/smoke.py says whether they are right.

compute-sanitizer --tool memcheck|racecheck|synccheck|initcheck python bench/sanitize.py [--emulate]
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from slicegpt_fast.ops.backends import smoke
from slicegpt_fast.ops.dispatch import HALF, OPS

SMALL = 1 << 27  # multiplications of a call
EMULATED = 1 << 16


def calls(largest: int) -> Iterator[smoke.Case]:
    """Return the cases up to a size: aligned and not, each way to divide the work, each shortcut and activation."""
    for number in smoke.cases("cuda"):
        case = smoke.CASES[number]
        if case.m * case.n * max(case.k, case.n) <= largest:
            yield case


def run(device: str, largest: int) -> None:
    for case in calls(largest):
        op = OPS[case.op]
        for dtype in HALF:
            for arguments in smoke.operands(case, dtype, device):
                if op.refusal("cuda", op.request(*arguments)) is None:
                    with smoke.divided(case):
                        op.backends["cuda"].run(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    emulate = "--emulate" in sys.argv
    if emulate:
        from emulator.emulate import emulating
    with emulating("90a") if emulate else nullcontext():
        run(*(("cpu", EMULATED) if emulate else ("cuda", SMALL)))
