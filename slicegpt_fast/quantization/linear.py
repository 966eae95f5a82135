"""Modules whose matrix has 8 or 4 bits: a linear layer, and an embedding table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicegpt_fast.ops.quantized import check_quantized, dequantize

STORED = "levels"  # the name of ``weight`` in files: a loader that does not know the format must not find a weight


class Quantized(nn.Module):
    """A matrix [n, width] of 8 or 4 bits, as ``ops/quantized.py`` describes it.

    Attributes:
        weight: integers, without a gradient.
        scales: fp16, without a gradient; they stay fp16 when the model is cast.
        width: how many columns the matrix has.
        stands_for: the class of the module that it took the place of.
    """

    stands_for: type[nn.Module] = nn.Module

    def __init__(self, weight: Tensor, scales: Tensor, width: int) -> None:
        nn.Module.__init__(self)
        check_quantized("weight", weight, scales, width)
        self.width = width
        self.weight, self.scales = _frozen(weight), _frozen(scales)

    def ordinary(self, dtype: torch.dtype) -> nn.Module:
        """Return what this module stands for, with weights of ``dtype``."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [n, width] in ``dtype``."""
        return dequantize(self.weight, self.scales, self.width, dtype)

    def rename_(self, name: str) -> None:
        """Call the parameter ``weight`` STORED while a file is read, or "weight" again after."""
        self._parameters[name] = self._parameters.pop("weight" if name == STORED else STORED)

    def __getattr__(self, name: str) -> Any:
        renamed = name == "weight" and STORED in self.__dict__.get("_parameters", ())
        return super().__getattr__(STORED if renamed else name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = self.scales.data
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales.data = scales.to(self.scales.device)
        return self


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc]
    """``x @ W.T + bias`` with a quantised W, which is dequantised for each call.

    It counts as a linear layer for adapters, which add to what it computes.

    Attributes:
        in_features, out_features: the shape of W is [out_features, in_features].
        bias: [out_features] in the activations' dtype, or None.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, weight: Tensor, scales: Tensor, in_features: int, bias: Tensor | None = None) -> None:
        super().__init__(weight, scales, in_features)
        self.in_features = in_features
        self.out_features = weight.shape[0]
        self.bias = None if bias is None else _frozen(bias)

    def ordinary(self, dtype: torch.dtype) -> nn.Module:
        """Return the linear layer of the family that this one stands for, with weights of ``dtype``."""
        transposed = issubclass(self.stands_for, Conv1D)
        sizes = (self.out_features, self.in_features) if transposed else (self.in_features, self.out_features)
        with torch.device("meta"):
            made: Any = self.stands_for(*sizes)
        matrix = self.dequantized(dtype)
        made.weight = nn.Parameter(matrix.T.contiguous() if transposed else matrix)
        made.bias = self.bias
        return cast(nn.Module, made)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(x, self.weight, self.scales, self.in_features, self.bias))


class QuantizedEmbedding(Quantized, nn.Embedding):  # type: ignore[misc]
    """A table of quantised rows; those of the tokens are dequantised.

    Attributes:
        num_embeddings, embedding_dim: the shape of the table.
        padding_idx: as of the table that it was.
        like: [0], of the dtype of the result, which is the model's.
    """

    like: nn.Parameter

    def __init__(self, weight: Tensor, scales: Tensor, width: int, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__(weight, scales, width)
        self.num_embeddings, self.embedding_dim, self.padding_idx = weight.shape[0], width, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        # Holds the dtype of the result, and stands first, where transformers looks for the model's.
        like = nn.Parameter(torch.empty(0, dtype=dtype, device=weight.device), requires_grad=False)
        self._parameters = {"like": like, **self._parameters}

    def ordinary(self, dtype: torch.dtype) -> nn.Module:
        """Return the embedding table that this one stands for, with weights of ``dtype``."""
        sizes = (self.num_embeddings, self.embedding_dim)
        return nn.Embedding(*sizes, self.padding_idx, _weight=self.dequantized(dtype))

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., width]
        return dequantize(self.weight[ids], self.scales[ids], self.width, self.like.dtype)


def count_parameters(model: nn.Module) -> int:
    """How many parameters a model stores: shared ones once, those of a quantised matrix as many as it stands for."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, Quantized):
            counts[id(module.weight)] = module.weight.shape[0] * module.width
            counts[id(module.scales)] = 0
    return sum(counts.values())


def _frozen(value: Tensor) -> nn.Parameter:
    """``value`` as a parameter without a gradient: itself if it is one, which modules may share."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


class _Product(torch.autograd.Function):
    """``x @ W.T + bias``; for the gradient W is dequantised again, so that training does not keep it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor, width: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.width = width
        return F.linear(x, dequantize(weight, scales, width, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scales = ctx.saved_tensors
        inputs, *_, bias = ctx.needs_input_grad
        return (
            gradient @ dequantize(weight, scales, ctx.width, gradient.dtype) if inputs else None,
            *(None, None, None),
            gradient.flatten(0, -2).sum(0) if bias else None,
        )
