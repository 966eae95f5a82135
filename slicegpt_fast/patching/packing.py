"""One matrix for all the weights that one op reads, and the parameters as views of it."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from slicegpt_fast.architectures import Weight

Slot = tuple[dict[str, Any], str]  # a module's parameters, and the name of one


class PackedWeight:
    """Weights stored as the rows of one matrix [n, d], one below the other, and their biases as one vector [n].

    The parameters become views of the matrix: their names, shapes and values stay, and no memory is added. What cannot
    be a view is copied: every row where a norm's weight has to be folded in, and ``negated`` rows.

    Whoever replaces a parameter or moves the model leaves the matrix behind; it is then packed again at the next use.
    """

    def __init__(self, weights: list[Weight], gamma: Any = None, negated: Any = None) -> None:
        """
        Args:
            weights: what is packed, in order.
            gamma: a norm module whose weight [d] is folded into the rows.
            negated: a linear layer whose weight [r, d] follows, times -1.
        """
        self.weights = weights
        self.gamma = gamma
        self.negated = negated
        # Where the parameters stand that are views and those that are copied: looked at on every call.
        own: list[Slot] = [(w.owner._parameters, name) for w in weights for name in (w.name, "bias")]
        own = [(slots, name) for slots, name in own if slots.get(name) is not None]
        others: list[Slot] = [(module._parameters, "weight") for module in (gamma, negated) if module is not None]
        self._shared, self._copied = (own, others) if gamma is None else ([], own + others)
        self._matrix: Tensor | None = None
        self._bias: Tensor | None = None
        self._packed: list[int] = []

    @property
    def matrix(self) -> Tensor:
        """[n + r, d], up to date; inside a compiled graph as it was when the graph was traced."""
        if not torch.compiler.is_compiling() and self._packed != self._identity():
            self.pack()
        return cast(Tensor, self._matrix)

    @property
    def bias(self) -> Tensor | None:
        """[n], zero where a weight has none; None where none has one. Read ``matrix`` first."""
        return self._bias

    @property
    def copied_bytes(self) -> int:
        """Memory that the matrix adds to the parameters."""
        rows = [] if self.gamma is None else [weight.matrix for weight in self.weights]
        rows += [] if self.negated is None else [self.negated.weight]
        return sum(tensor.nbytes for tensor in rows)

    def rows(self) -> list[slice]:
        """Which rows each weight takes."""
        ends = accumulate(weight.matrix.shape[0] for weight in self.weights)
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> None:
        """Fills the matrix and lets the parameters be views of it."""
        parts = [weight.matrix for weight in self.weights]
        biases = [weight.bias for weight in self.weights]
        bias = None
        if any(each is not None for each in biases):
            filled = [
                b if b is not None else part.new_zeros(part.shape[0]) for b, part in zip(biases, parts, strict=True)
            ]
            bias = _joined(filled)
        if self.gamma is not None:
            gamma = self.gamma.weight.float()
            parts = [(part * gamma).to(part.dtype) for part in parts]
        matrix = _joined([*parts, *([] if self.negated is None else [-self.negated.weight])])
        if self.gamma is None:
            for weight, rows in zip(self.weights, self.rows(), strict=True):
                weight.view_of(matrix[rows], None if bias is None else bias[rows])
        self._matrix, self._bias, self._packed = matrix, bias, self._identity()

    def unpack(self) -> None:
        """Gives every parameter memory of its own again, laid out as it was before."""
        with torch.inference_mode(False):
            for slots, name in self._shared:
                slots[name].data = slots[name].data.clone(memory_format=torch.contiguous_format)

    def _identity(self) -> list[int]:
        """Where all that is packed stands; changes when it is replaced and, for copies, when it is updated in place."""
        identity = [slots[name].data_ptr() for slots, name in self._shared]
        for slots, name in self._copied:
            parameter = slots[name]
            identity += [parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version]
        return identity


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one below the other; a single one is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0].detach().contiguous()
