"""The loss is the divergence that its definition says, in pieces as at once, for the head of every family."""

import pytest
import torch
from models import FAMILIES, VOCABULARY, in_double, tiny_model, tokens

from slicegpt_fast.recovery.loss import divergence, head_alone, run_base, summed_divergence

K = 8


def top(logits):
    """The likeliest tokens and their log-probabilities."""
    log_probabilities, chosen = logits.log_softmax(-1).topk(K)
    return chosen, log_probabilities


def batch_of(ids, padding=0):
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_divergence_is_that_over_the_kept_tokens_and_one_more():
    logits, theirs = torch.randn(2, 5, VOCABULARY, dtype=torch.float64)
    chosen, log_probabilities = top(theirs)
    p, q = (each.softmax(-1).gather(-1, chosen) for each in (theirs, logits))
    p, q = (torch.cat((each, 1 - each.sum(-1, keepdim=True)), -1) for each in (p, q))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(logits, chosen, log_probabilities).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_does_not_diverge_from_itself():
    logits = 30 * torch.randn(4, VOCABULARY)  # nearly all on the kept tokens
    torch.testing.assert_close(divergence(logits, *top(logits)), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_head_alone_gives_the_models_logits(family):
    model = in_double(tiny_model(family))
    ids = tokens(2, 9)
    expected = model(input_ids=ids, use_cache=False).logits
    hidden, kind = run_base(model, batch_of(ids))
    with head_alone(model, kind, hidden[:7]) as logits:
        torch.testing.assert_close(logits, expected.flatten(0, 1)[:7], rtol=1e-12, atol=1e-12)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)  # and is an ordinary model again


@pytest.mark.parametrize("padding", [0, 3])
def test_pieces_have_the_gradient_of_the_whole(padding, monkeypatch):
    monkeypatch.setattr("slicegpt_fast.recovery.loss.ROWS", 4)
    model, batch = in_double(tiny_model()), batch_of(tokens(2, 9), padding)
    counted = batch["attention_mask"].flatten().bool()
    chosen, log_probabilities = top(torch.randn(18, VOCABULARY, dtype=torch.float64))
    given = {name: each for name, each in batch.items() if padding or name == "input_ids"}
    logits = model(**given, use_cache=False).logits.flatten(0, 1)
    whole = divergence(logits, chosen, log_probabilities)[counted].sum()
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pieces = summed_divergence(model, batch, chosen, log_probabilities)
    pieces.backward()
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
