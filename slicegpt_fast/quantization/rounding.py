"""Rounding a matrix to 8 or 4 bits: to nearest, or with error feedback.

To nearest, each scale is the best of a few: an extreme value of its columns over a trial number of levels, then what
least squares make of the levels that follow, each column weighted by the mean square of its input where that is known.

With error feedback (GPTQ, arXiv 2210.17323), columns are rounded one after the other, and those to come make up for
what rounding changed, in the metric A of the inputs: the elimination of ``elimination.py``, row by row of the factor,
where the column j of a block costs error_j^2 / taken_jj^2, which weights the choice of the scales too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from slicegpt_fast.elimination import inverse_metric, take_
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.quantized import LARGEST, pack
from slicegpt_fast.quantization.plan import Bits, Rounded

DAMPING = 0.01  # a share of the mean diagonal of the inputs' covariance
BLOCK = 128  # columns that are taken at once at 8 bits
LOWEST = {8: -127, 4: -8}
# Over how many levels an extreme value is tried to be spread; the sign says which end it takes.
TRIALS = {8: (127.0, 132.0, 140.0, 152.0), 4: (-8.0, -7.4, -6.8, -6.2, 7.6, 7.0, 6.4, 5.8)}


def round_nearest(matrix: Tensor, bits: Bits, group: int | None, importance: Tensor | None = None) -> Rounded:
    """Round each element of a matrix to its nearest level.

    Args:
        matrix: [n, k], floating.
        bits: 8 or 4.
        group: columns that share a scale; None for whole rows.
        importance: [k], the mean square of each input; by default all are equal.

    Returns:
        Integers and scales, as ``ops/quantized.py`` describes them.

    Raises:
        InputError: the matrix is not finite or beyond what fp16 scales reach.
    """
    width = matrix.shape[1]
    weights = matrix.new_ones(width) if importance is None else importance
    values, weights = _grouped(matrix.float(), group), _grouped(weights.float(), group)
    scales = fit_scales(values, weights, bits)
    return _packed(_levels(values, scales, bits).flatten(-2)[:, :width], scales.squeeze(-1), bits)


def round_with_feedback(matrix: Tensor, inputs: Tensor, bits: Bits, group: int | None) -> Rounded:
    """Round a matrix column by column; later columns make up for the errors of earlier ones.

    Args:
        matrix: [n, k], floating.
        inputs: [k, k], the covariance of the inputs, up to a factor.
        bits, group: as of :func:`round_nearest`.

    Returns, raises: as of :func:`round_nearest`.
    """
    width = matrix.shape[1]
    inverse = inverse_metric(inputs, DAMPING)
    left = matrix.T.float().clone()  # [k, n]: what the columns are to be, less the errors made up for
    levels = torch.empty_like(left)
    scales = [] if group else [fit_scales(left.T, inputs.diagonal().float(), bits)]
    for start in range(0, width, group or BLOCK):
        block = slice(start, min(start + (group or BLOCK), width))
        taken = take_(inverse, block).float()
        own = taken[:, block]
        if group:
            scales.append(fit_scales(left[block].T, own.diagonal().square().reciprocal(), bits))
        error, scale = torch.empty_like(left[block]), scales[-1].squeeze(1)
        for column in range(len(error)):
            value = left[start + column]
            levels[start + column] = level = _levels(value, scale, bits)
            error[column] = (value - level * scale) / own[column, column]
            left[start + column + 1 : block.stop].addr_(own[column, column + 1 :], error[column], alpha=-1)
        left[block.stop :].addmm_(taken[:, block.stop :].T, error, alpha=-1)
    return _packed(levels.T, torch.cat(scales, 1), bits)


def fit_scales(values: Tensor, weights: Tensor, bits: Bits) -> Tensor:
    """Return the scales [..., 1] that values [..., k] are rounded with at the least weighted squared error.

    They are fp16's numbers, in fp32. ``weights`` [k] or [..., k] are those of the columns.
    """
    extreme = values.gather(-1, values.abs().argmax(-1, keepdim=True)) if values.numel() else values[..., :1]
    best, least = extreme.new_zeros(extreme.shape), torch.full_like(extreme, torch.inf)
    for trial in TRIALS[bits]:
        levels = _levels(values, extreme / trial, bits)
        weighted = levels * weights
        scales = (weighted * values).sum(-1, keepdim=True) / (weighted * levels).sum(-1, keepdim=True)
        scales = scales.nan_to_num(0.0).half().float()
        error = (weights * (values - scales * _levels(values, scales, bits)).square()).sum(-1, keepdim=True)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _levels(values: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """The nearest levels, in the dtype of ``values``; 0 where the scale is."""
    return (values / scales).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(LOWEST[bits], LARGEST[bits])


def _grouped(values: Tensor, group: int | None) -> Tensor:
    """[..., k] -> [..., groups, group], the last group filled up with zeros; one group of all where there is none."""
    width = group or max(values.shape[-1], 1)
    return F.pad(values, (0, -values.shape[-1] % width)).unflatten(-1, (-1, width))


def _packed(levels: Tensor, scales: Tensor, bits: Bits) -> Rounded:
    if not scales.isfinite().all():
        raise InputError(
            "a weight is not a finite number, or too large for a scale in float16: check the model, or slice it anew."
        )
    integers = levels.to(torch.int8).contiguous()
    return (pack(integers) if bits == 4 else integers), scales.half()
