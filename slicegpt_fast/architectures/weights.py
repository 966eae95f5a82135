"""Modules and weights at the paths of the table."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class Weight:
    """A weight ``owner.<name>`` as a matrix [..., out, in] (Conv1D holds its transpose), and its bias [out] or None.

    Assigning keeps the parameter's dtype and whether it is trained.
    """

    owner: nn.Module
    name: str = "weight"

    @property
    def matrix(self) -> Tensor:
        return self._oriented(cast(Tensor, getattr(self.owner, self.name)))

    @matrix.setter
    def matrix(self, value: Tensor) -> None:
        old = getattr(self.owner, self.name)
        setattr(self.owner, self.name, _parameter(self._oriented(value), old))

    @property
    def bias(self) -> Tensor | None:
        return cast(Tensor | None, getattr(self.owner, "bias", None)) if self.name == "weight" else None

    @bias.setter
    def bias(self, value: Tensor) -> None:
        self.owner.bias = _parameter(value, self.matrix)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter behind ``matrix``."""
        return cast(nn.Parameter, getattr(self.owner, self.name))

    def view_of(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Let the parameters live in memory that already holds their values: [..., out, in] and [out]."""
        self.parameter.data = self._oriented(matrix)
        if self.bias is not None and bias is not None:
            self.bias.data = bias

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.mT if isinstance(self.owner, Conv1D) else matrix


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=like.requires_grad)


def at(module: nn.Module, path: str) -> Any:
    """The submodule at a path of the table; typed Any, since the path decides what it is."""
    return module.get_submodule(path)


def embedding_scale(embeddings: nn.Module) -> float:
    """What a table of embeddings multiplies its rows by."""
    scale: Any = getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", 1.0))
    return float(scale)


def weights(layer: nn.Module, paths: tuple[str, ...]) -> list[Weight]:
    """The weights at those of ``paths`` that ``layer`` has."""
    found = []
    for path in paths:
        parent, _, name = path.rpartition(".")
        try:
            owner = at(layer, parent)
        except AttributeError:
            continue
        value = getattr(owner, name, None)
        if isinstance(value, nn.Parameter):
            found.append(Weight(owner, name))
        elif value is not None:
            found.append(Weight(value))
    return found
