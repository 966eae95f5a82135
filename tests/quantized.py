"""Quantised weights for tests, and models that have them in place of their linear layers'."""

import torch
from torch import Tensor, nn

from slicegpt_fast.ops.quantized import LARGEST, pack
from slicegpt_fast.quantization import QuantizedLinear

FORMATS = [(8, None), (4, 32), (4, 64), (4, 128), (4, None)]  # bits, and columns to a scale; None: the row


def quantized(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """The integers and scales of a weight [n, k], rounded to the nearest of levels up to the largest of each group."""
    n, k = weight.shape
    group = group or max(k, 1)
    groups = max(-(-k // group), 1)
    by_group = nn.functional.pad(weight.float(), (0, groups * group - k)).view(n, groups, group)
    scales = (by_group.abs().amax(dim=2) / LARGEST[bits]).half().clamp_(min=1e-6)
    levels = (by_group / scales.float()[..., None]).round().clamp_(-LARGEST[bits], LARGEST[bits])
    levels = levels.to(torch.int8).view(n, groups * group)[:, :k].contiguous()
    return levels if bits == 8 else pack(levels), scales


def quantize_linears(model: nn.Module, bits: int = 4, group: int | None = 32, only: str = "") -> nn.Module:
    """The model with a QuantizedLinear in place of each linear layer whose name has ``only`` in it, but the head."""
    for path, linear in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if type(linear) is nn.Linear and only in path and linear is not model.get_output_embeddings():
            stored = quantized(linear.weight.detach(), bits, group)
            setattr(model.get_submodule(parent), name, QuantizedLinear(*stored, linear.in_features, linear.bias))
    return model.requires_grad_(False)
