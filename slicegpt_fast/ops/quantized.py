"""Weights of 8 and 4 bits: how they are stored and what they stand for.

A quantised matrix [n, k] is a ``weight`` of integers and ``scales`` in fp16; both are symmetric, so 0 stands for 0.

* 8 bits: ``weight`` int8 [n, k], ``scales`` [n, 1]. ``W[i, j] = weight[i, j] * scales[i, 0]``.
* 4 bits: ``weight`` uint8 [n, ceil(k / 2)], two levels in a byte: column 2j in its low half, 2j + 1 in its high half,
  each as level + 8, and 8 in the half that an odd k leaves over. ``scales`` [n, ceil(k / group)] with groups of 32, 64
  or 128 columns; the last group of a row may be shorter. ``W[i, j] = level[i, j] * scales[i, j // group]``.

Which of the two it is, and the group, follow from the dtype and the shapes. Matrices may be stacked: experts
are [experts, n, k].
"""

from __future__ import annotations

import torch
from torch import Tensor

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels.regimes import WeightFormat
from slicegpt_fast.ops.dispatch import check_matrix, require

GROUPS = (32, 64, 128)  # columns that share a scale at 4 bits
BITS = {torch.int8: 8, torch.uint8: 4}
FORMATS: dict[torch.dtype, WeightFormat] = {torch.int8: "int8", torch.uint8: "int4"}
LARGEST = {8: 127, 4: 7}  # the largest level; 4 bits also know -8


def pack(levels: Tensor) -> Tensor:
    """Return int8 levels [..., n, k] from -8 to 7 as bytes, uint8 [..., n, ceil(k / 2)]."""
    raised = torch.nn.functional.pad(levels + 8, (0, levels.shape[-1] % 2), value=8).to(torch.uint8)
    return raised[..., ::2] | raised[..., 1::2] << 4


def unpack(packed: Tensor, width: int) -> Tensor:
    """Return the int8 levels [..., n, width] that ``pack`` took."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return halves[..., :width].to(torch.int8) - 8


def weight_format(weight: Tensor) -> WeightFormat:
    """Return how a weight is stored, which its dtype tells."""
    return FORMATS.get(weight.dtype, "full")


def full_weight(weight: Tensor, scales: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    """Return the weight [..., n, width] of an op: itself, or dequantised to ``dtype`` where it has scales."""
    return weight if scales is None else dequantize(weight, scales, width, dtype)


def group_of(scales: Tensor, width: int) -> int:
    """Return how many columns of a matrix of ``width`` columns share a scale: the whole row, or a group.

    Raises:
        InputError: no group size leads to as many scales.
    """
    count, width = scales.shape[-1], max(width, 1)  # a matrix without columns has one scale a row, too
    for group in (width, *GROUPS):
        if -(-width // group) == count:
            return group
    raise InputError(
        f"argument scales has {count} columns; for a width of {width} it must have 1, or one for each group of 32, 64 "
        "or 128 columns."
    )


def dequantize(weight: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix [..., n, width] in ``dtype``: products in fp32, rounded once.

    Args:
        weight: int8 [..., n, width] or packed uint8 [..., n, ceil(width / 2)].
        scales: fp16 [..., n, 1] or, of a packed weight, [..., n, ceil(width / group)].
        width: k, the number of columns.
        dtype: of the result.

    Raises:
        InputError: weight and scales do not fit each other or the width.
    """
    check_quantized("weight", weight, scales, width)
    levels = weight if weight.dtype == torch.int8 else unpack(weight, width)
    wide = scales.float().repeat_interleave(group_of(scales, width), dim=-1)[..., :width]
    return (levels.float() * wide).to(dtype)


def check_weight(weight: Tensor, scales: Tensor | None, name: str, x: Tensor) -> None:
    """Check the weight [n, k] of an op, full or with scales, whose input [M, k] is ``x``, called ``name``.

    Raises:
        InputError: weight and scales do not fit each other or ``x``.
    """
    width = x.shape[1]
    if scales is None:
        check_matrix("weight", weight, x.dtype, x.device)
        sentence = f"argument weight has {weight.shape[1]} columns; for {name} of width {width} it must have {width}."
        require(weight.shape[1] == width, sentence)
        return
    require(weight.dim() == 2, f"argument weight has {weight.dim()} dimensions; pass a matrix.")
    require(weight.device == x.device, f"argument weight is on {weight.device}; move it to {x.device}.")
    check_quantized("weight", weight, scales, width)


def check_quantized(name: str, weight: Tensor, scales: Tensor, width: int) -> None:
    """Check that ``weight`` and its ``scales`` are a matrix of ``width`` columns as this module describes it.

    Raises:
        InputError: they are not; the sentence calls the weight ``name``.
    """
    bits = BITS.get(weight.dtype)
    if bits is None:
        raise InputError(f"argument {name} is {weight.dtype}; with scales it must be int8 (8 bits) or uint8 (4 bits).")
    columns = width if bits == 8 else -(-width // 2)
    if weight.shape[-1] != columns:
        raise InputError(
            f"argument {name} has {weight.shape[-1]} columns; for an input of width {width} in {bits} bits it must "
            f"have {columns}."
        )
    if scales.dtype != torch.float16 or scales.device != weight.device or scales.shape[:-1] != weight.shape[:-1]:
        raise InputError(
            f"argument scales is {scales.dtype} {list(scales.shape)} on {scales.device}; for {name} "
            f"{list(weight.shape)} it must be float16 {[*weight.shape[:-1], '*']} on {weight.device}."
        )
    if bits == 8 and scales.shape[-1] != 1:
        raise InputError(f"argument scales has {scales.shape[-1]} columns; of an 8-bit {name} it must have 1.")
    group_of(scales, width)
