"""Measures on this GPU the shapes that the benchmarks call in bf16, into the user's tuning table, the first ones first.

    python bench/tune.py [--seconds 220] [--copy FILE]

First comes the model of the end-to-end benchmark, then the other widths. At the end of its seconds it stops; what was
measured until then stays in the table. --copy also writes the table to FILE.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch

from slicegpt_fast.kernels.measured import user_table
from slicegpt_fast.ops import tuning
from slicegpt_fast.ops.tuning import Shape, tune

TINY = os.environ.get("BENCH_MACHINE") == "tiny"
ROWS = (1, 2048, 8, 16, 64, 4096, 32, 256, 512)  # 2048 is the bucket of a prompt of 1984 tokens


def block_shapes(
    width: int, attention: int, key_value: int, intermediate: int, rows: Iterable[int], rank: int = 64
) -> list[Shape]:
    """Return the matmuls of a gated decoder block, with every way to take the residual stream in.

    Args:
        width: d, the kept size of the residual stream.
        attention: heads * head_dim. key_value: key/value heads * head_dim. intermediate: width of the gated MLP.
        rows: values of M (tokens in a call) to measure.
        rank: of the low-rank shortcut.
    """
    readers = ((attention + 2 * key_value, None), (2 * intermediate, "silu_gate"))
    shortcuts = (("dense", width), ("low rank", rank), ("add", 0))
    return [
        shape
        for m in rows
        for shape in (
            *(Shape("norm_linear", m, n, width, activation) for n, activation in readers),
            *(Shape("residual_linear", m, width, k + k2, s) for k in (attention, intermediate) for s, k2 in shortcuts),
        )
    ]


def model_shapes() -> list[Shape]:
    """Return what the patched model of the end-to-end benchmark asks for: its blocks, and its head in decode."""
    from bench_end_to_end import BATCHES, GEOMETRIES, KEPT, MODELS, PROMPT
    from transformers import AutoModelForCausalLM

    from slicegpt_fast.patching import op_requests
    from slicegpt_fast.slicing import SliceOptions, make_plan
    from slicegpt_fast.slicing.layers import narrow_

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GEOMETRIES[MODELS[0]], dtype=torch.bfloat16)
    narrow_(model, make_plan(model, SliceOptions(target_params=KEPT, basis="shared")))
    pairs = op_requests(model)
    decode = [(m, first) for m in BATCHES for first, _ in pairs]
    prefill = [(m * PROMPT, second) for m in BATCHES for _, second in pairs if second is not None]
    return [Shape(each.op, m, *each.shape[1:], each.epilogue) for m, each in chain(decode, prefill)]


def shapes() -> list[Shape]:
    """Return all that is to be measured, the most telling first."""
    if TINY:
        return [*model_shapes()[:1], Shape("norm_linear", 3, 48, 40), Shape("covariance_", 40, 24, 24)]
    found = model_shapes()
    found += [Shape("covariance_", 65536, D, D) for D in (2872, 4096, 8192)]
    found += [Shape("covariance_", 512, D, D) for D in (2048, 4096)]
    for width in (3072, 2872, 2880, 3328):
        found += [Shape("norm_linear", m, 32000, width) for m in (1, 8)]  # the head
        found += block_shapes(width, 4096, 4096, 11008, ROWS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--copy", type=Path)
    options = parser.parse_args()
    todo = list(dict.fromkeys(shapes()))
    end, done = time.monotonic() + options.seconds, 0
    for timing in tune(todo, torch.float16 if TINY else torch.bfloat16):
        done += 1
        print(timing, flush=True)
        if options.copy:
            shutil.copy(user_table(), options.copy)
        if time.monotonic() > end:
            break
    print(f"{done} of {len(todo)} shapes measured")


if __name__ == "__main__":
    if TINY:  # there is no GPU to ask, and no time to tell
        tuning.current_gpu, tuning.microseconds = lambda: torch.device("cpu"), lambda run: 1.0
    main()
