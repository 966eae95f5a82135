"""Where each Hugging Face family keeps the parts that touch the residual stream: one row per family.

A decoder layer is a sequence of residual branches, ``h <- h + module(norm(h))``. A branch's *readers* are the linear
layers whose input is the normalised stream, its *writer* the one whose output is added to the stream. Slicing narrows
the inputs of readers and the outputs of writers; heads, rotary embeddings, query norms and caches are left alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slicegpt_fast.errors import InputError


@dataclass(frozen=True)
class Sublayer:
    """One residual branch of a decoder layer; the strings are submodule paths inside the layer."""

    norm: str
    module: str
    readers: tuple[str, ...]
    writer: str
    takes_layer_arguments: bool
    """Whether the module is called with the layer's keyword arguments (masks, positions, cache), as attention is."""


@dataclass(frozen=True)
class Architecture:
    """One family; the strings are submodule paths inside the causal language model, ``norm_eps`` a config field."""

    sublayers: tuple[Sublayer, ...]
    embeddings: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm_eps: str = "rms_norm_eps"

    def sites(self, model: nn.Module) -> Iterator[tuple[int, nn.Module, Sublayer]]:
        """Yield ``(layer index, layer, sublayer)`` for every norm site of the decoder layers, in the stream's order."""
        for index, layer in enumerate(at(model, self.layers).children()):
            for sublayer in self.sublayers:
                yield index, layer, sublayer


def at(module: nn.Module, path: str) -> Any:
    """The submodule at a path of the table; typed Any, since the path decides what it is."""
    return module.get_submodule(path)


LLAMA = Architecture(
    sublayers=(
        Sublayer(
            norm="input_layernorm",
            module="self_attn",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            writer="self_attn.o_proj",
            takes_layer_arguments=True,
        ),
        Sublayer(
            norm="post_attention_layernorm",
            module="mlp",
            readers=("mlp.gate_proj", "mlp.up_proj"),
            writer="mlp.down_proj",
            takes_layer_arguments=False,
        ),
    )
)

ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}


def architecture_of(model: Any) -> Architecture:
    """Return the table row for a causal language model or its config.

    Raises:
        InputError: not a transformers model, an encoder model, an unknown family, or a model without its language head.
    """
    if not isinstance(model, PreTrainedModel | PreTrainedConfig):
        raise InputError(f"model must be a transformers causal language model, not {type(model).__name__}.")
    config = model if isinstance(model, PreTrainedConfig) else model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"model type {config.model_type!r} is not supported: slicegpt-fast slices the decoder-only families "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} has no language head: load the model with AutoModelForCausalLM.from_pretrained."
        )
    return architecture
