"""A causal language model, read once through its row of the table."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slicegpt_fast.architectures.table import Sublayer, architecture_of
from slicegpt_fast.architectures.weights import at
from slicegpt_fast.errors import InputError


@dataclass(frozen=True)
class Site:
    """A norm site: where a sublayer, or at the end the head, reads the residual stream through a norm.

    Attributes:
        number: counts the sites along the stream from 0.
        index: counts the decoder layers; the final norm comes after the last.
        path, part: the decoder layer, or the final norm: its path in the model, and the module.
        norm_path, norm: the norm; the first one where branches have norms of their own.
        sublayer: what reads here, None at the final norm.
    """

    number: int
    index: int
    path: str
    part: nn.Module
    norm_path: str
    norm: nn.Module
    sublayer: Sublayer | None = None


class Decoder:
    """The parts of a causal language model that touch its residual stream. Paths are those of the model's submodules.

    It holds the modules that it found: make a new one where modules have been replaced since.

    Args:
        model: dense or sliced; its weights may be on the meta device.

    Attributes:
        model: the model.
        architecture: its row of the table.
        heads: those of its attention.
        width: D, the hidden size of the dense model.
        embeddings: path and module of each table whose rows are summed into the stream.
        layers: the decoder layers, in order.
        final_norm: the norm before the head.
        head: the language head.
        head_path: its path.
        sites: the norm sites in the stream's order; the last one is the final norm.

    Raises:
        InputError: not a transformers model, one of an encoder or of an unknown family, one to which the method does
            not apply, one without its language head, or with something else in the place of a decoder layer.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"model must be a transformers causal language model, not {type(model).__name__}.")
        self.model = model
        self.architecture = architecture_of(model.config)
        self.heads = self.architecture.heads(model.config)
        head = model.get_output_embeddings()
        if head is None:
            name = type(model).__name__
            raise InputError(f"{name} has no language head: load the model with AutoModelForCausalLM.from_pretrained.")
        self.width: int = model.config.hidden_size
        self.embeddings: dict[str, Any] = {path: at(model, path) for path in self.architecture.embeddings}
        self.layers: list[nn.Module] = list(at(model, self.architecture.layers).children())
        self.final_norm: nn.Module = at(model, self.architecture.final_norm)
        self.head: nn.Module = head
        self.head_path = next(path for path, module in model.named_modules() if module is head)
        self.sites = self._sites()

    @property
    def may_stay_tied(self) -> bool:
        """Whether the config ties the head to the embedding table, and the family's code takes a wider final norm."""
        return bool(self.model.config.tie_word_embeddings) and not self.architecture.keeps_width

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding table."""
        return bool(self.head.weight is self.model.get_input_embeddings().weight)  # type: ignore[union-attr]

    def layer_path(self, index: int) -> str:
        """Return the path of a decoder layer."""
        return f"{self.architecture.layers}.{index}"

    def sublayers(self) -> Iterator[tuple[Site, Sublayer]]:
        """Yield the sites of the decoder layers, each with the sublayer that reads there."""
        for site in self.sites:
            if site.sublayer is not None:
                yield site, site.sublayer

    def _sites(self) -> list[Site]:
        sites: list[Site] = []
        for index, layer in enumerate(self.layers):
            path = self.layer_path(index)
            for sublayer in self.architecture.sublayers:
                norm = sublayer.branches[0].norm
                try:
                    module = at(layer, norm)
                except AttributeError as error:
                    raise InputError(
                        f"{path} is a {type(layer).__name__}, which has no {norm}: put the family's own layer there."
                    ) from error
                sites.append(Site(len(sites), index, path, layer, f"{path}.{norm}", module, sublayer))
        path, final = self.architecture.final_norm, self.final_norm
        return [*sites, Site(len(sites), len(self.layers), path, final, path, final)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, each module's own mode after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
