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

    The parameters become views of the matrix: their names, shapes and values stay, no memory is added, and whoever
    writes into them writes into the matrix. Whoever replaces a parameter or moves the model leaves the matrix behind;
    it is then packed again at the next use.
    """

    def __init__(self, weights: list[Weight]) -> None:
        """``weights``: what is packed, in order."""
        self.weights = weights
        slots: list[Slot] = [(w.owner._parameters, name) for w in weights for name in (w.name, "bias")]
        self._slots = [(parameters, name) for parameters, name in slots if parameters.get(name) is not None]
        self._matrix: Tensor | None = None
        self._bias: Tensor | None = None
        self._packed: list[int] = []

    @property
    def matrix(self) -> Tensor:
        """[n, d], up to date; inside a compiled graph as it was when the graph was traced."""
        self.refresh()
        return cast(Tensor, self._matrix)

    @property
    def bias(self) -> Tensor | None:
        """[n], zero where a weight has none; None where none has one. Read ``matrix`` first."""
        return self._bias

    def rows(self) -> list[slice]:
        """Which rows each weight takes."""
        ends = accumulate(weight.matrix.shape[0] for weight in self.weights)
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    @torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
    def refresh(self) -> None:
        """Packs what no longer lies in the matrix."""
        if self._packed != self._addresses():
            self.pack()

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
        matrix = _joined(parts)
        for weight, rows in zip(self.weights, self.rows(), strict=True):
            weight.view_of(matrix[rows], None if bias is None else bias[rows])
        self._matrix, self._bias, self._packed = matrix, bias, self._addresses()

    def unpack(self) -> None:
        """Gives every parameter memory of its own again, laid out as it was before."""
        with torch.inference_mode(False):
            for parameters, name in self._slots:
                parameters[name].data = parameters[name].data.clone(memory_format=torch.contiguous_format)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, whose parameters stand by themselves until they are packed."""
        return self.__dict__ | {"_matrix": None, "_bias": None, "_packed": []}

    def _addresses(self) -> list[int]:
        """Where the parameters stand."""
        return [parameters[name].data_ptr() for parameters, name in self._slots]


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one below the other; a single one is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0].detach().contiguous()
