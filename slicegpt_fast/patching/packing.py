"""One matrix for all the weights that one op reads, and the parameters as views of it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from slicegpt_fast.architectures import Weight
from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels.regimes import Activation
from slicegpt_fast.ops.dispatch import HALF
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.ops.quantized import check_quantized
from slicegpt_fast.quantization import QuantizedLinear

DTYPES = (torch.float32, *HALF)

Slot = tuple[dict[str, Any], str]  # a module's parameters, and the name of one


class PackedWeight:
    """Weights stored as the rows of one matrix [n, d], one below the other, and their biases as one vector [n].

    The parameters become views of the matrix: their names, shapes and values stay, no memory is added, and whoever
    writes into them writes into the matrix. Whoever replaces a parameter or moves the model leaves the matrix behind:
    it must then be packed again. Quantised weights are packed the same way, their integers and their scales.
    """

    def __init__(self, weights: list[Weight]) -> None:
        """``weights``: what is packed, in order."""
        self.weights = weights
        self.matrix = torch.empty(0)  # [n, d], as it was packed; integers where the weights are quantised
        self.scales: Tensor | None = None  # of the integers
        self.bias: Tensor | None = None  # [n], zero where a weight has none; None where none has one
        quantized = [weight.owner for weight in weights if isinstance(weight.owner, QuantizedLinear)]
        self.quantized = len(quantized) == len(weights)
        self.width: int = quantized[0].in_features if quantized else weights[0].matrix.shape[1]  # d
        self.slots: list[Slot] = [(w.owner._parameters, w.name) for w in weights]
        self.slots += [(w.owner._parameters, "bias") for w in weights]
        self.slots += [(linear._parameters, "scales") for linear in quantized]
        self._shapes = [weight.matrix.shape for weight in weights]

    def rows(self) -> list[slice]:
        """Which rows each weight takes."""
        ends = accumulate(shape[0] for shape in self._shapes)
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    def parts(self) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """The weights [out, in] as they are now, their biases, and the scales of those that are quantised."""
        scales: list[Tensor] = [
            weight.owner.scales for weight in self.weights if isinstance(weight.owner, QuantizedLinear)
        ]
        return [weight.matrix for weight in self.weights], [weight.bias for weight in self.weights], scales

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the weights, as they were packed, belong to activations of ``dtype``."""
        floating = [self.bias] if self.quantized else [self.matrix, self.bias]
        return all(x is None or x.dtype == dtype for x in floating)

    def refusal(self) -> str | None:
        """Why the weights, as they are now, cannot be one matrix of the ops, or None."""
        found, count = [parameters.get(name) for parameters, name in self.slots], len(self.weights)
        held, biases, scales = found[:count], found[count : 2 * count], found[2 * count :]
        if any(parameter is None for parameter in (*held, *scales)):
            return "one of its weights is no parameter of its module"
        if scales and not self.quantized:
            return "only some of its weights are quantised"
        present = [parameter for parameter in found if parameter is not None]
        floating = [parameter for parameter in biases if parameter is not None] if self.quantized else present
        for parameter in present:
            known = type(parameter) is Parameter and (self.quantized or parameter.dtype in DTYPES)
            if not known:
                return f"its weights are quantised or of dtype {parameter.dtype}"
        if any(p.dtype != floating[0].dtype for p in floating) or any(p.device != present[0].device for p in present):
            return "its weights have more than one dtype or device"
        if [weight.matrix.shape for weight in self.weights] != self._shapes:
            return "one of its weights has another shape"
        if any(b is not None and b.shape != s[:1] for b, s in zip(biases, self._shapes, strict=True)):
            return "one of its biases has another shape"
        reason = self._unlike_quantized() if self.quantized else None
        if reason is not None:
            return reason
        if torch.compiler.is_compiling() or present[0].device.type != "cpu":
            return None
        shared = any(parameter.is_shared() for parameter in present)
        return "its weights are in shared memory" if shared and stacked(self.parts()[0]) is None else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> None:
        """Fill the matrix and let the parameters be views of it."""
        parts, biases, scales = self.parts()
        matrix, bias = joined(parts, biases)
        self.scales = stacked_or_copied(scales) if scales else None
        for weight, rows in zip(self.weights, self.rows(), strict=True):
            weight.view_of(matrix[rows], None if bias is None else bias[rows])
            if self.scales is not None:
                weight.owner.scales.data = self.scales[rows]
        self.matrix, self.bias = matrix, bias

    def _unlike_quantized(self) -> str | None:
        """Why quantised weights cannot be one matrix of the ops, or None."""
        parts, _, scales = self.parts()
        if len({(weight.dtype, scale.shape[-1]) for weight, scale in zip(parts, scales, strict=True)}) > 1:
            return "its weights are quantised in more than one format"
        try:
            for weight, scale in zip(parts, scales, strict=True):
                check_quantized("weight", weight, scale, self.width)
        except InputError:
            return "its quantised weights and their scales do not fit each other"
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose parameters stand by themselves until they are packed."""
        return self.__dict__ | {"matrix": torch.empty(0), "scales": None, "bias": None}


class PackedWeights:
    """All the packed weights of a sublayer, whose parameters are looked at in one pass."""

    def __init__(self, packed: Iterable[PackedWeight]) -> None:
        self._packed = list(packed)
        self.slots = [slot for each in self._packed for slot in each.slots]
        self._state: list[Any] = []
        self.packs = 0  # how often they were packed: the matrices are others each time

    def refresh(self) -> str | None:
        """Pack where parameters no longer lie as they were packed; return why that cannot be, or None.

        A compiled graph cannot see where a parameter's memory lies; it reads the parameters themselves.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._state == where(self.slots):
            return None
        reason = self.refusal()
        if reason is None and not compiling:
            for packed in self._packed:
                packed.pack()
            self.packs += 1
            self._state = where(self.slots)
        return reason

    def refusal(self) -> str | None:
        """Why the weights, as they are now, cannot be packed, or None."""
        return next((reason for packed in self._packed if (reason := packed.refusal()) is not None), None)

    def take(self, dtype: torch.dtype) -> bool:
        """Whether all of them, as they were packed, belong to activations of ``dtype``."""
        return all(packed.takes(dtype) for packed in self._packed)

    def absent(self) -> bool:
        """True where a weight is not here, but on the device "meta"."""
        found = [parameters.get(name) for parameters, name in self.slots]
        return any(parameter is not None and parameter.device.type == "meta" for parameter in found)

    def unpack(self) -> None:
        """Give every parameter memory of its own again, laid out as it was before."""
        with torch.inference_mode(False):
            for parameters, name in self.slots:
                parameter = parameters.get(name)
                if type(parameter) is Parameter and not (parameter.is_shared() and parameter.device.type == "cpu"):
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which is packed at its first use."""
        return self.__dict__ | {"_state": []}


def where(slots: list[Slot]) -> list[Any]:
    """Return where each parameter lies, and what tells other views of the same memory from it."""
    return [
        (p.data_ptr(), p.size(0), p.is_contiguous()) if type(p := parameters.get(name)) is Parameter else type(p)
        for parameters, name in slots
    ]


def joined(parts: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weights [out, in] as one matrix and biases [out] as one vector or None: views where they lie as its rows."""
    matrix = stacked_or_copied(parts)
    known = next((bias for bias in biases if bias is not None), None)
    if known is None:
        return matrix, None
    filled = [known.new_zeros(part.shape[0]) if b is None else b for b, part in zip(biases, parts, strict=True)]
    return matrix, stacked_or_copied(filled)


def stacked_or_copied(parts: list[Tensor]) -> Tensor:
    """The tensor of which ``parts`` are the rows, or a copy of them one below the other."""
    found = stacked(parts)
    return torch.cat(parts) if found is None else found


def stacked(parts: list[Tensor]) -> Tensor | None:
    """The tensor of which ``parts`` are the rows, one below the other in one memory; None where there is none."""
    first = parts[0]
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        alike = part.dtype == first.dtype and part.shape[1:] == first.shape[1:] and part.is_contiguous()
        if not alike or part.storage_offset() != end or part.untyped_storage().data_ptr() != storage:
            return None
        end += part.numel()
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, (*first.shape[1:], 1))  # row-major


def _norm_linear_of_parts(
    h: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    scales: list[Tensor],
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: str | None,
    unscaled: int,
    backend: str,
) -> Tensor:
    """``norm_linear`` for compiled graphs: the weights one by one, joined without a copy where they lie as packed."""
    weight, bias = joined(weights, biases)
    bias = bias[:-unscaled] if bias is not None and unscaled else bias
    joined_scales = stacked_or_copied(scales) if scales else None
    norm, activated = (eps, full_width, sumsq), cast(Activation | None, activation)
    return norm_linear(h, weight, bias, *norm, activated, unscaled, scales=joined_scales, backend=backend)


def _norm_linear_of_parts_fake(h: Tensor, weights: list[Tensor], *others: Any) -> Tensor:
    *_, activation, unscaled, _ = others
    rows = sum(weight.shape[0] for weight in weights) - unscaled
    return h.new_empty(h.shape[0], (rows // 2 if activation == "silu_gate" else rows) + unscaled)


LIBRARY = torch.library.Library("slicegpt_fast", "FRAGMENT")
LIBRARY.define(
    "norm_linear_of_parts(Tensor h, Tensor[] weights, Tensor?[] biases, Tensor[] scales, float eps, int full_width,"
    " Tensor? sumsq, str? activation, int unscaled, str backend) -> Tensor"
)
LIBRARY.impl("norm_linear_of_parts", _norm_linear_of_parts, "CompositeExplicitAutograd")
torch.library.register_fake("slicegpt_fast::norm_linear_of_parts", _norm_linear_of_parts_fake, lib=LIBRARY)
norm_linear_of_parts = torch.ops.slicegpt_fast.norm_linear_of_parts.default
