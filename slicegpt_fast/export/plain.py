"""Write a sliced model as a plain checkpoint, which stock transformers and other engines load without this package.

A model whose MLPs were cut to one number of channels is an ordinary model of that intermediate size, in any family.

A model whose stream was sliced by one basis has no shortcuts and one width d, so it is an ordinary model of a smaller
hidden size, but for its norms: they divide by the dense width D. A stock norm over P >= d entries with weight
``sqrt(D/P)`` and ``eps P = eps_dense D`` computes the same:

    h / sqrt(sum(h^2)/D + eps) = sqrt(D/P) * h / sqrt(sum(h^2)/P + eps D/P)

P is d itself, or the next size that the family's config accepts: the stream is then padded with P - d zeros, which no
norm, weight or residual addition ever fills (rows of writers and columns of embeddings and readers are zero).

Where queries and keys have norms, these take the same eps from the config. Their inputs are linear in the weights of
the queries and keys, so ``sqrt(D/P)`` times these weights give what the dense eps gave.

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

from slicegpt_fast.architectures import Decoder, architecture_of, embedding_scale, weights
from slicegpt_fast.checkpoint import check_writable, save_model
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing import SlicePlan, slice_config_of
from slicegpt_fast.slicing.layers import WeightlessNorm, norm_eps
from slicegpt_fast.slicing.summary import span

EXPORTABLE = "cut=('channels',), uniform=True"
# Norms inside an attention, and the linear layer whose output each of them divides.
INNER_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj", "query_layernorm": "q_proj", "key_layernorm": "k_proj"}


@torch.no_grad()
def export_plain(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """Write a sliced model as a checkpoint that needs nothing but transformers to load.

    Its logits are those of ``model`` to rounding. The family stays the same, but Qwen2 becomes Llama where it can.

    Args:
        model: cut with ``cut=("channels",), uniform=True``; or, of a family with RMSNorms, its stream sliced by one
            basis (``basis="shared"``, or ``cut=("stream", "channels"), uniform=True``). Unchanged on return.
        folder: does not exist yet, or is empty; it appears complete or not at all.
        tokenizer: saved beside the model.

    Returns:
        The config that was written. Of a sliced stream its ``hidden_size`` is the kept size d or, where the family's
        config refuses d (Llama's must be a multiple of the number of heads), the next multiple of that number: the
        difference is zeros. Slice with ``round_to`` a common multiple of 8 and the number of heads for a size that
        needs none and is fast. A head that shared a table with the embeddings gets its own.

    Raises:
        InputError: the model is dense, or carries adapters; its layers differ in their channels, or its values are of a
            lower rank; its stream has shortcuts or several widths, or was sliced in a LayerNorm family; or the folder
            has something in it, or the disk refuses or is too small.
    """
    plan = _exportable_plan(model)
    check_writable(folder)
    config = _plain_config(model, plan)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.generation_config = model.generation_config
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    tensors = model.state_dict() | _norm_weights(model, config)
    if plan.tied:
        _give_tables_(tensors, Decoder(model))
    _rescale_embeddings_(tensors, Decoder(model), plain)
    _rescale_inner_norms_(tensors, model, plain)
    if config.model_type != model.config.model_type:  # a bias that Llama has and Qwen2 has not
        tensors |= {name: model.lm_head.weight.new_empty(0) for name in shapes if name.endswith("o_proj.bias")}
    foreign = sorted(tensors.keys() ^ shapes.keys())
    if foreign:
        raise InputError(
            f"{foreign[0]} is not a tensor of both the given model and a stock {type(plain).__name__}: merge adapters "
            "before exporting."
        )
    padded = {name: _padded(tensors[name], shape) for name, shape in shapes.items()}
    plain.load_state_dict(padded, assign=True)
    plain.tie_weights()
    save_model(plain, folder, tokenizer)
    return config


def _exportable_plan(model: PreTrainedModel) -> SlicePlan:
    """The plan of a model that can be exported; InputError for any other."""
    decoder = Decoder(model)
    sliced = slice_config_of(model)
    if sliced is None:
        raise InputError("the model is dense: save it with save_pretrained, or slice it before exporting.")
    if sliced.rounding() is not None:
        raise InputError("the model is quantised: give its weights back with dequantize_model before exporting.")
    plan = sliced.plan()
    if min(plan.values, default=decoder.heads.size) < decoder.heads.size:
        raise InputError(
            f"the attention's values have a rank of {span(plan.values)} of {decoder.heads.size}, which no stock model "
            f"has: cut with {EXPORTABLE} to export."
        )
    if plan.basis is not None and decoder.architecture.centered:
        raise InputError(
            f"{model.config.model_type} models have LayerNorms, which cannot express the weightless norm of a sliced "
            f"stream, so that of these only RMSNorm families can be exported: cut with {EXPORTABLE} instead."
        )
    if plan.basis is not None and not decoder.architecture.resizable:
        raise InputError(
            f"the code of {model.config.model_type} models ties other sizes to the hidden size, so a sliced stream has "
            f"no stock model: cut with {EXPORTABLE} instead."
        )
    if len(set(plan.widths)) > 1 or any(map(plan.has_shortcut, range(len(plan.widths) - 1))):
        raise InputError(
            "the model has shortcuts or several widths, which no stock model has: slice with basis='shared' to export."
        )
    return plan


def _channels(decoder: Decoder, plan: SlicePlan) -> dict[str, int]:
    """The numbers of channels that were cut, by the config's names for them."""
    found: dict[str, set[int]] = {}
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            if plan.channels and branch.activation is not None:
                experts = any(weight.matrix.ndim == 3 for weight in weights(site.part, branch.writers))
                row = decoder.architecture
                name = row.expert_channels if experts and row.expert_channels else row.channels
                found.setdefault(name, set()).add(plan.channels[site.index])
    for name, sizes in found.items():
        if len(sizes) > 1:
            raise InputError(
                f"the layers keep {span([*sizes])} channels, but a stock config has one {name}: cut with {EXPORTABLE} "
                "to export."
            )
    return {name: size for name, (size,) in found.items()}


def _plain_config(model: PreTrainedModel, plan: SlicePlan) -> PreTrainedConfig:
    """The stock config of the exported model; of a sliced stream, with the first hidden size that its class accepts."""
    dense, width = model.config, plan.widths[0]
    full, heads = dense.hidden_size, dense.num_attention_heads
    values: dict[str, Any] = dense.to_dict() | _channels(Decoder(model), plan)
    del values["quantization_config"]
    if plan.basis is None:
        return type(dense).from_dict(values)
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
    size, offset = config.hidden_size, architecture_of(model.config).norm_offset
    return {
        f"{name}.weight": model.lm_head.weight.new_full((size,), math.sqrt(norm.full_width / size) - offset)
        for name, norm in model.named_modules()
        if isinstance(norm, WeightlessNorm)
    }


def _rescale_embeddings_(tensors: dict[str, Tensor], decoder: Decoder, plain: PreTrainedModel) -> None:
    """Make up for a factor of the embeddings that depends on the hidden size."""
    (path, ours), *others = decoder.embeddings.items()
    ratio = embedding_scale(ours) / embedding_scale(plain.get_submodule(path))
    if ratio != 1 and not others:
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] * ratio


def _rescale_inner_norms_(tensors: dict[str, Tensor], model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Make up for another eps of the queries' and keys' norms by their inputs' weights and biases."""
    for path, norm in plain.named_modules():
        parent, _, name = path.rpartition(".")
        if name in INNER_NORMS:
            ratio = math.sqrt(norm_eps(norm) / norm_eps(model.get_submodule(path)))
            for kind in ("weight", "bias"):
                key = f"{parent}.{INNER_NORMS[name]}.{kind}"
                if key in tensors and ratio != 1:
                    tensors[key] = tensors[key] * ratio


def _give_tables_(tensors: dict[str, Tensor], decoder: Decoder) -> None:
    """Replace a table E of embeddings and head, and its two maps, by the tables of a stock model: E M^T and E M'."""
    (embeddings,) = decoder.embeddings
    narrow, wide = (tensors.pop(f"{path}.map.weight") for path in (embeddings, decoder.sites[-1].path))
    table = tensors[f"{embeddings}.weight"]
    exact = table.to(torch.promote_types(table.dtype, torch.float32))
    tensors[f"{embeddings}.weight"] = (exact @ narrow.to(exact).T).to(table.dtype)
    tensors[f"{decoder.head_path}.weight"] = (exact @ wide.to(exact)).to(table.dtype)


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` with zeros behind it in every dimension in which ``shape`` is larger: only the stream's is."""
    missing = [new - old for old, new in zip(tensor.shape, shape, strict=True)]
    return nn.functional.pad(tensor, [end for length in reversed(missing) for end in (0, length)])
