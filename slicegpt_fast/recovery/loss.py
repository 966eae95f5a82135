"""How far a model's next-token distributions are from its teacher's, in pieces: T x V logits never exist whole.

At every position the teacher tells its K likeliest tokens and their log-probabilities. What is compared is the
distribution over these K tokens and one more outcome, "any other", which bounds the divergence over the whole
vocabulary from below and is exact where the model spreads the rest as the teacher does:

    KL = sum_k p_k (log p_k - log q_k) + p_0 (log p_0 - log q_0),      p_0 = 1 - sum_k p_k,  q_0 likewise

The head runs on ROWS positions at a time and again in the backward pass: at a vocabulary of 49152, 50 MB of logits in
fp32, and as much for their gradient, instead of both for all positions of a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of, at

ROWS = 256
LEAST = 1e-6  # what is left for all other tokens is no less than this


def divergence(logits: Tensor, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
    """Return KL(teacher || model) in nats for each of N positions, over the teacher's K tokens and all others as one.

    Args:
        logits: [N, V], the model's.
        tokens: [N, K] int64, the teacher's likeliest.
        log_probabilities: [N, K], the teacher's.
    """
    theirs = log_probabilities.float()
    ours = logits.float().log_softmax(-1).gather(-1, tokens)
    kept = (theirs.exp() * (theirs - ours)).sum(-1)
    other, our_other = _others(theirs), _others(ours)
    return kept + other.exp() * (other - our_other)


def _others(log_probabilities: Tensor) -> Tensor:
    """The log-probability of any other token than these."""
    return (1 - log_probabilities.exp().sum(-1)).clamp_min(LEAST).log()


def summed_divergence(
    model: PreTrainedModel, batch: dict[str, Tensor], tokens: Tensor, log_probabilities: Tensor
) -> Tensor:
    """Return the summed divergence of the positions of a batch that are no padding; arguments as of :func:`divergence`.

    Args:
        model: in evaluation mode or not; N = B T.
        batch: ``input_ids`` and ``attention_mask``, both [B, T].
        tokens, log_probabilities: [N, K], the teacher's.
    """
    counted = batch["attention_mask"].flatten().bool()
    hidden, kind = run_base(model, batch)
    rows = [each[counted] for each in (hidden, tokens, log_probabilities)]

    def piece(hidden: Tensor, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
        with head_alone(model, kind, hidden) as logits:
            return divergence(logits, tokens, log_probabilities).sum()

    pieces = zip(*(each.split(ROWS) for each in rows), strict=True)
    return torch.stack([checkpoint(piece, *each, use_reentrant=False) for each in pieces]).sum()


def run_base(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, type]:
    """Run a model up to its final norm; return the hidden states [B T, D], and the class of the output they were in."""
    base = _base(model)
    padded = not batch["attention_mask"].all()
    output = base(**(batch if padded else {"input_ids": batch["input_ids"]}), use_cache=False)
    return output.last_hidden_state.flatten(0, 1), type(output)


def _base(model: PreTrainedModel) -> Any:
    """The module that holds the decoder layers, which the model calls before its head."""
    return at(model, architecture_of(model.config).layers.rpartition(".")[0])


@contextmanager
def head_alone(model: PreTrainedModel, kind: type, hidden: Tensor) -> Iterator[Tensor]:
    """Inside, the logits [n, V] that the model makes of ``hidden`` [n, D].

    The model's own forward makes them, scales and caps included; what it calls before its head gives back ``hidden``,
    in an output of the class ``kind``.
    """
    base = _base(model)
    own = vars(base).get("forward")
    base.forward = lambda *arguments, **options: kind(last_hidden_state=hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        yield model(input_ids=ids, use_cache=False).logits[0]
    finally:
        if own is None:
            del base.forward
        else:
            base.forward = own
