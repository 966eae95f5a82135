"""What a model is worth and what it costs: perplexity, stored parameters, bytes, FLOPs per token."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of, evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.quantization import QuantizedLinear, count_parameters
from slicegpt_fast.slicing.batches import Batch, check_iterable, checked

ROWS_PER_STEP = 256  # bounds the fp32 copy of the logits: 50 MB at a vocabulary of 49152


@torch.inference_mode()
def perplexity(model: PreTrainedModel, batches: Iterable[Batch], *, progress: bool = False) -> float:
    """Return exp of the mean negative log-likelihood over every token that has a predecessor in its sequence.

    The log-softmax is taken in fp32 and summed in fp64, whatever the model's dtype. Padded positions are neither scored
    nor predicted from. Pad on the right: the positions of padding on the left count in most models.

    Args:
        model: a causal language model; its training mode is left as it was.
        batches: as for :func:`slicegpt_fast.slice_model`: token ids [B, T], or mappings with ``input_ids`` and
            ``attention_mask``, both [B, T].
        progress: show a progress bar.

    Raises:
        InputError: no causal language model, a malformed batch, or no token to score.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(f"model must be a transformers causal language model, not {type(model).__name__}.")
    check_iterable(batches, "batches")
    total, scored = 0.0, 0
    with evaluating(model):
        bar = tqdm(batches, desc="perplexity", unit="batch", disable=not progress)
        for inputs in checked(bar, model.config, model.device, "batches"):
            tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()
            given = {"input_ids": tokens} if mask.all() else inputs
            output = model(**given, use_cache=False)
            if "logits" not in output:
                raise InputError(f"{type(model).__name__} has no logits: load the model with AutoModelForCausalLM.")
            logits = output.logits[:, :-1]
            keep = mask[:, 1:] & mask[:, :-1]
            targets = tokens[:, 1:].masked_fill(~keep, -100)
            total += _negative_log_likelihood(logits, targets)
            scored += int(keep.sum())
    if not scored:
        raise InputError("there is no token to score: give a sequence of at least two tokens.")
    return torch.tensor(total / scored, dtype=torch.float64).exp().item()  # inf instead of an overflow error


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log softmax(logits)[target]. logits: [B, T, V]; targets: [B, T], -100 where nothing is scored."""
    return sum(
        F.cross_entropy(rows.float(), wanted, ignore_index=-100, reduction="sum").item()
        for sequence, row_targets in zip(logits, targets, strict=True)
        for rows, wanted in zip(sequence.split(ROWS_PER_STEP), row_targets.split(ROWS_PER_STEP), strict=True)
    )


def stored_parameters(model: nn.Module) -> int:
    """Number of parameters of the model; a tensor that several modules share (a tied head) counts once.

    A matrix of 8 or 4 bits counts as many as it stands for, and its scales none.
    """
    return count_parameters(model)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the stored parameters in their present dtypes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def flops_per_token(model: PreTrainedModel) -> int:
    """Matmul FLOPs of a token's forward pass: 2 for each weight of each matrix that it is multiplied with.

    These are all matrices, the head (tied or not) and shortcuts included; not embedding tables, which are looked up; of
    stacked experts [E, out, in] only those a token is routed to. Left out are norms, activations, and the attention
    scores, whose cost grows with the context.
    """
    return sum(2 * used for used, _ in _matrices(model))


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a token's forward pass reads: of the matrices that :func:`flops_per_token` counts."""
    return sum(size for _, size in _matrices(model))


def _matrices(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """How many weights of every matrix, or stack of experts, a token is multiplied with, and their bytes."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size = sum(each.numel() * each.element_size() for each in (module.weight, module.scales))
            yield module.in_features * module.out_features, size
            continue
        for parameter in module.parameters(recurse=False):
            used = parameter.numel()
            if parameter.ndim == 3:
                used = used // parameter.shape[0] * architecture_of(model.config).experts_of(model.config)
            if parameter.ndim == 3 or (parameter.ndim == 2 and not isinstance(module, nn.Embedding)):
                yield used, used * parameter.element_size()
