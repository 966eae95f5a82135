"""Write a sliced model as a plain checkpoint, which stock transformers and other engines load without this package.

A model sliced by one basis has no shortcuts and one width d, so it is an ordinary model of a smaller hidden size, but
for its norms: they divide by the dense width D. A stock norm over P >= d entries with weight ``sqrt(D/P)`` and
``eps P = eps_dense D`` computes the same:

    h / sqrt(sum(h^2)/D + eps) = sqrt(D/P) * h / sqrt(sum(h^2)/P + eps D/P)

P is d itself, or the next size that the family's config accepts: the stream is then padded with P - d zeros, which no
norm, weight or residual addition ever fills (rows of writers and columns of embeddings and readers are zero).

The head dim is no longer hidden_size / heads. transformers reads it from the config in every family here, but other
engines' code for Qwen2 does not, so a Qwen2 without sliding windows is written as the Llama that it is, with biases.
"""

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from slicegpt_fast.architectures import Decoder
from slicegpt_fast.checkpoint import check_writable, save_model
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing import slice_config_of
from slicegpt_fast.slicing.layers import WeightlessNorm


@torch.no_grad()
def export_plain(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """Write a sliced model as a checkpoint that needs nothing but transformers to load.

    Its logits are those of ``model`` to rounding. The family stays the same, but Qwen2 becomes Llama where it can.

    Args:
        model: sliced with ``basis="shared"``, of a family with RMSNorms; unchanged on return.
        folder: does not exist yet, or is empty; it appears complete or not at all.
        tokenizer: saved beside the model.

    Returns:
        The config that was written. Its ``hidden_size`` is the kept size d or, where the family's config refuses d
        (Llama's must be a multiple of the number of heads), the next multiple of that number: the difference is zeros.
        Slice with ``round_to`` a common multiple of 8 and the number of heads for a size that needs none and is fast.

    Raises:
        InputError: the model is dense, has shortcuts or several widths, is of a LayerNorm family or carries adapters;
            or the folder has something in it, or the disk refuses or is too small.
    """
    width = _shared_width(model)
    check_writable(folder)
    config = _plain_config(model, width)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.generation_config = model.generation_config
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    weights = model.state_dict() | _norm_weights(model, config)
    if config.model_type != model.config.model_type:  # a bias that Llama has and Qwen2 has not
        weights |= {name: model.lm_head.weight.new_empty(0) for name in shapes if name.endswith("o_proj.bias")}
    foreign = sorted(weights.keys() ^ shapes.keys())
    if foreign:
        raise InputError(
            f"{foreign[0]} is not a tensor of both the given model and a stock {type(plain).__name__}: merge adapters "
            "before exporting."
        )
    padded = {name: _padded(weights[name], shape) for name, shape in shapes.items()}
    plain.load_state_dict(padded, assign=True)
    save_model(plain, folder, tokenizer)
    return config


def _shared_width(model: PreTrainedModel) -> int:
    """The one width d of a model that can be exported; InputError for any other."""
    decoder = Decoder(model)
    sliced = slice_config_of(model)
    if sliced is None:
        raise InputError("the model is dense: save it with save_pretrained, or slice it before exporting.")
    if decoder.architecture.centered:
        raise InputError(
            f"{model.config.model_type} models have LayerNorms, which cannot express the weightless norm of a slice: "
            "only RMSNorm families can be exported."
        )
    plan = sliced.plan()
    if len(set(plan.widths)) > 1 or any(map(plan.has_shortcut, range(len(plan.widths) - 1))):
        raise InputError(
            "the model has shortcuts or several widths, which no stock model has: slice with basis='shared' to export."
        )
    return plan.widths[0]


def _plain_config(model: PreTrainedModel, width: int) -> PreTrainedConfig:
    """The stock config of the exported model, of the first hidden size from ``width`` on that its class accepts."""
    dense = model.config
    full, heads = dense.hidden_size, dense.num_attention_heads
    values: dict[str, Any] = dense.to_dict()
    del values["quantization_config"]
    values |= {"tie_word_embeddings": False, "head_dim": getattr(dense, "head_dim", None) or full // heads}
    config_class = type(dense)
    if isinstance(dense, Qwen2Config) and set(dense.layer_types or ()) == {"full_attention"}:
        config_class = LlamaConfig
        known = config_class().to_dict()
        values = {name: value for name, value in values.items() if name in known}
        values |= {"model_type": config_class.model_type, "attention_bias": True}
    for size in (width, math.ceil(width / heads) * heads):
        values |= {"hidden_size": size, "rms_norm_eps": dense.rms_norm_eps * full / size}
        try:
            return config_class.from_dict(values)
        except (StrictDataclassError, ValueError) as error:
            reason = str(error.__cause__ or error).rstrip(".")
    raise InputError(
        f"{config_class.__name__} accepts neither {width} nor {size} as hidden_size ({reason}): slice to another "
        "width, or keep the sliced format."
    )


def _norm_weights(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Tensor]:
    """``sqrt(D/P)`` [P] for every norm of the stream, by the name that it has in the stock model."""
    size = config.hidden_size
    return {
        f"{name}.weight": model.lm_head.weight.new_full((size,), math.sqrt(norm.full_width / size))
        for name, norm in model.named_modules()
        if isinstance(norm, WeightlessNorm)
    }


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` with zeros behind it in every dimension in which ``shape`` is larger: only the stream's is."""
    missing = [new - old for old, new in zip(tensor.shape, shape, strict=True)]
    return nn.functional.pad(tensor, [end for length in reversed(missing) for end in (0, length)])
