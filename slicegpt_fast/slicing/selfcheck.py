"""Does a rotated decoder layer compute what the dense one does? Asked of every layer before anything is deleted.

What the table says of a family is tried, not believed: on a few calibration tokens a layer whose readers, writers and
shortcuts are turned, but not cut, must give the turned output of the dense layer. The turn of a site is a reflection,
``h - 2 (h v) v`` for a random unit vector v: as good as any basis for this, and cheap to apply to a weight.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Architecture, Decoder, Weight, at, evaluating, weights
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.batches import Batch, checked
from slicegpt_fast.slicing.layers import WeightlessNorm, norm_eps, shortcut_name, with_shortcuts
from slicegpt_fast.slicing.storage import IN_MEMORY
from slicegpt_fast.slicing.walk import enter

TOKENS = 16
OUTLIERS = 2  # tokens that may differ: rounding can send one to another expert
# The difference that rounding explains, as a share of a token's norm before and after the layer.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.02}


class Turn(nn.Module):
    """Takes the stream from the turn of one site to that of the next."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., D] -> [..., D]
        return turned(turned(hidden_states, self.before), self.after)


@torch.no_grad()
def check_layers(model: PreTrainedModel, calibration: Iterable[Batch]) -> None:
    """Compare every decoder layer of the dense ``model``, turned, with itself on the first calibration tokens.

    Layers in 16 bits are compared in fp32, but for attention kernels that know 16 bits alone.

    Raises:
        InputError: the first layer that differs by more than rounding.
    """
    IN_MEMORY.check(model)
    decoder = Decoder(model)
    architecture = decoder.architecture
    attention = str(getattr(model.config, "_attn_implementation", ""))
    dtype = model.dtype if "flash" in attention else torch.promote_types(model.dtype, torch.float32)
    with evaluating(model):
        stream = enter(decoder, [_first_tokens(model, calibration)], IN_MEMORY, at_least=1)
        state, arguments = stream.states[0].to(dtype), stream.layer_arguments[0]
        turns = _unit_vectors(len(architecture.sublayers) + 1, state)
        for index, layer in enumerate(decoder.layers):
            given = _cast(arguments[index], dtype)
            plain = all(parameter.dtype == dtype for parameter in layer.parameters())
            rotated = _copy(layer, model, sharing=plain).to(dtype)
            target = _output((layer if plain else rotated)(state, **given))
            if not target.isfinite().all():
                return  # the weights are at fault, which calibration tells
            following = target
            if architecture.centered:
                state, target = (each - each.mean(-1, keepdim=True) for each in (state, target))
            turn_layer_(rotated, architecture, turns)
            actual = turned(_output(rotated(turned(state, turns[0]), **given)), turns[-1])
            scale = torch.linalg.vector_norm(state, dim=-1) + torch.linalg.vector_norm(target, dim=-1)
            error = (torch.linalg.vector_norm(actual - target, dim=-1) / scale).flatten().sort().values
            if not error[-1 - min(OUTLIERS, len(error) - 1)] <= TOLERANCE[dtype]:
                raise InputError(
                    f"{decoder.layer_path(index)} ({type(layer).__module__}.{type(layer).__qualname__}), when it is "
                    f"rotated, differs from the dense layer by {float(error[-1]):.1e} of its output: it computes "
                    f"something that slicing {model.config.model_type} models does not know, so load the stock model."
                )
            state = following


def turned(rows: Tensor, vector: Tensor) -> Tensor:
    """Rows [..., D] reflected at the plane whose normal is the unit vector [D]: its own inverse."""
    return torch.addcmul(rows, (rows @ vector)[..., None], vector, value=-2)


def turn_layer_(layer: nn.Module, architecture: Architecture, turns: list[Tensor]) -> None:
    """Make a dense layer one of a sliced model of full width: turned by the vectors of its sites and the next."""
    for sublayer, before, after in zip(architecture.sublayers, turns, turns[1:], strict=False):
        norms = {branch.norm: at(layer, branch.norm) for branch in sublayer.branches}
        for branch in sublayer.branches:
            norm = norms[branch.norm]
            for reader in weights(layer, branch.readers):
                _turn_reader_(reader, norm, architecture.gain(norm), before)
            for writer in weights(layer, branch.writers):
                _turn_writer_(writer, after, centred=architecture.centered)
        for path, norm in norms.items():
            layer.set_submodule(path, WeightlessNorm(len(before), norm_eps(norm)))
        layer.add_module(shortcut_name(sublayer), Turn(before, after))
    layer.__class__ = with_shortcuts(type(layer), architecture)  # type: ignore[arg-type]


def _turn_reader_(reader: Weight, norm: Any, gain: Tensor | None, vector: Tensor) -> None:
    matrix, beta = reader.matrix, getattr(norm, "bias", None)
    if beta is not None:
        reader.bias = matrix @ beta if reader.bias is None else matrix @ beta + reader.bias
    reader.matrix = turned(matrix if gain is None else matrix * gain, vector)


def _turn_writer_(writer: Weight, vector: Tensor, *, centred: bool) -> None:
    columns, bias = writer.matrix.mT, writer.bias
    writer.matrix = turned(columns - columns.mean(-1, keepdim=True) if centred else columns, vector).mT
    if bias is not None:
        writer.bias = turned(bias - bias.mean() if centred else bias, vector)


def _first_tokens(model: PreTrainedModel, calibration: Iterable[Batch]) -> Tensor:
    """The first tokens [1, T] of the first calibration batch, without padding."""
    for batch in calibration:
        (first,) = checked([batch], model.config, model.device)
        return first["input_ids"][first["attention_mask"].bool()][None, :TOKENS]
    raise InputError("calibration has 0 tokens: give some text.")


def _unit_vectors(number: int, like: Tensor) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    vectors = torch.randn(number, like.shape[-1], generator=generator, dtype=torch.float64, device="cpu")
    return list(nn.functional.normalize(vectors, dim=-1).to(like))


def _copy(layer: nn.Module, model: PreTrainedModel, *, sharing: bool) -> nn.Module:
    """A copy of a layer with the model's config and, where ``sharing``, with the parameters themselves."""
    kept = [model.config, *(layer.parameters() if sharing else ())]
    return copy.deepcopy(layer, {id(each): each for each in kept})


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    """The arguments of a layer with floating-point tensors in ``dtype``."""
    if isinstance(argument, Tensor):
        return argument.to(dtype) if argument.is_floating_point() else argument
    if isinstance(argument, dict):
        return {name: _cast(value, dtype) for name, value in argument.items()}
    return tuple(_cast(value, dtype) for value in argument) if isinstance(argument, tuple) else argument


def _output(result: Any) -> Tensor:
    stream: Tensor = result[0] if isinstance(result, tuple) else result
    return stream
