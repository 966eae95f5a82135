"""Measures on this GPU every shape that the benchmarks call in bf16, into the user's tuning table.

python bench/tune.py
"""

from collections.abc import Iterable

import torch

from slicegpt_fast.ops.tuning import Shape, tune


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


def main() -> None:
    # Covariance, slicing (batches of 512 tokens), then the blocks and their ops.
    shapes = [Shape("covariance_", 65536, D, D) for D in (2872, 4096, 8192)]
    shapes += [Shape("covariance_", 512, D, D) for D in (2048, 4096)]
    for width in (2872, 3072, 3328):
        shapes += block_shapes(width, 4096, 4096, 11008, (1, 4, 16, 4096))
    for timing in tune(shapes, torch.bfloat16):
        print(timing, flush=True)


if __name__ == "__main__":
    main()
