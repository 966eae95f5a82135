"""Perplexity against its definition in fp64, sizes against formulas."""

import math

import numpy as np
import pytest
import torch
from models import FAMILIES, VOCABULARY, sparse_layers, tiny_model, tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchEncoding

from slicegpt_fast import InputError, perplexity, slice_model
from slicegpt_fast.evaluation import ROWS_PER_STEP, flops_per_token, stored_bytes, stored_parameters


@torch.no_grad()
def defined(model, sequences) -> float:
    """exp(mean of -ln p(token | tokens before it)) over sequences of any lengths, all in fp64."""
    model = model.double()
    losses = []
    for sequence in sequences:
        probabilities = model(sequence[None]).logits[0].softmax(-1)
        losses += [-math.log(probabilities[i, token]) for i, token in enumerate(sequence[1:].tolist())]
    return math.exp(math.fsum(losses) / len(losses))


def relative_error(value: float, exact: float) -> float:
    return abs(value / exact - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (1, ROWS_PER_STEP + 1), (2, 2 * ROWS_PER_STEP + 3)])
@torch.no_grad()
def test_perplexity_is_its_definition(shape, dtype):
    model = tiny_model(dtype=dtype, max_position_embeddings=1024)
    ids = tokens(*shape)
    value = perplexity(model, [ids])
    # The model's own rounding is no error of the perplexity, so the same logits are evaluated in fp64.
    losses = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    exact = losses.mean().exp().item()
    in_fp32 = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    ).exp()
    assert relative_error(value, exact) <= 2 * relative_error(in_fp32.item(), exact) + 1e-6


def test_perplexity_against_fp64_throughout():
    sequences = tokens(4, 33)
    model = tiny_model()
    value = perplexity(model, sequences.split(3))
    assert relative_error(value, defined(model, sequences)) < 1e-5


def test_every_token_counts_the_same_however_it_is_batched():
    sequences = [tokens(length, seed=length) for length in (5, 30, 12)]
    model = tiny_model()
    alone = perplexity(model, [sequence[None] for sequence in sequences])
    assert relative_error(alone, defined(model.float(), sequences)) < 1e-5  # not the mean of the sequences' means


@pytest.mark.parametrize(
    ("family", "side"), [("llama", "right"), ("llama", "left"), ("opt", "right"), ("gpt2", "right")]
)
def test_padding_changes_nothing(family, side):
    model = tiny_model(family)
    sequences = [tokens(length, seed=length) for length in (6, 19, 11)]
    ids, mask = torch.full((3, 19), 2), torch.zeros(3, 19, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(19 - len(sequence), 19)
        ids[row, place], mask[row, place] = sequence, 1
    padded = perplexity(model, [{"input_ids": ids, "attention_mask": mask}])
    alone = perplexity(model, [sequence[None] for sequence in sequences])
    assert relative_error(padded, alone) < 1e-5
    assert relative_error(perplexity(model, [ids]), alone) > 1e-3  # the mask matters


def test_uniform_logits_give_the_vocabulary_size():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert relative_error(perplexity(model, [tokens(2, 9)]), VOCABULARY) < 1e-6


def test_hopeless_predictions_are_infinite_and_not_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    assert perplexity(model, [tokens(2, 9)]) == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_and_dropout_is_off(training):
    model = tiny_model(attention_dropout=0.9).train(training)
    assert perplexity(model, [tokens(2, 9)]) == perplexity(model, [tokens(2, 9)])
    assert model.training is training
    with pytest.raises(InputError, match=f"batches: batch 1 holds token id {VOCABULARY}, but"):
        perplexity(model, [tokens(2, 9), torch.full((1, 4), VOCABULARY)])
    assert model.training is training


NOTHING = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[0, 0, 0], [0, 1, 0]])}


@pytest.mark.parametrize("batches", [[], [tokens(3, 1)], [NOTHING]])
def test_nothing_to_score(batches):
    with pytest.raises(InputError, match=r"^there is no token to score: give a sequence of at least two tokens\.$"):
        perplexity(tiny_model(), batches)


def test_takes_what_slicing_takes():
    """A tensor of rows, arrays, lists, encodings of lists; of tensors as of any other."""
    ids = tokens(3, 9)
    model = tiny_model()
    expected = perplexity(model, [ids])
    encoding = BatchEncoding({"input_ids": ids.tolist(), "token_type_ids": [[0] * 9] * 3})
    masked = {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 9))}
    for batches in ([ids.int()], [ids.numpy()], [ids.tolist()], [encoding], [masked], iter([ids])):
        assert perplexity(model, batches) == expected
        assert slice_model(model, [tokens(2, 32), ids.tolist()], sparsity=0.25, progress=False) is not None
    for rows in (ids, ids.numpy(), ids.tolist()):
        assert relative_error(perplexity(model, rows), expected) < 1e-6


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"^batches must be a list of batches of token ids, not a single NoneType: make them with token_batches"),
        (7, r"^batches must be a list of batches of token ids, not a single int"),
        ("some text", r"^batches must be a list of batches of token ids, not a single str"),
        ({"input_ids": tokens(2, 9)}, r"^batches must be a list of batches of token ids, not a single dict"),
        (torch.tensor(3), r"^batches must be a list of batches of token ids, not a single Tensor"),
        (["some text"], r"^batches: batch 0 must be a tensor of token ids or a mapping with input_ids, not str"),
        (tokens(9), r"^batches: batch 0: input_ids must be integers of shape \[B, T\], not torch\.int64 \[\]"),
        ([tokens(2, 9), tokens(2, 0)], r"^batches: batch 1 is empty \(input_ids have shape \[2, 0\]\): leave it out"),
    ],
)
def test_bad_batches_are_named(batches, message):
    with pytest.raises(InputError, match=message):
        perplexity(tiny_model(), batches)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a-model", r"^model must be a transformers causal language model, not str\."),
        (torch.nn.Linear(3, 3), r"^model must be a transformers causal language model, not Linear\."),
        (tiny_model().model, r"^LlamaModel has no logits: load the model with AutoModelForCausalLM\."),
    ],
)
def test_what_is_no_language_model(model, message):
    with pytest.raises(InputError, match=message):
        perplexity(model, [tokens(2, 9)])


def test_progress(capsys):
    perplexity(tiny_model(), [tokens(1, 5)], progress=True)
    assert "perplexity: 100%" in capsys.readouterr().err
    perplexity(tiny_model(), [tokens(1, 5)])
    assert capsys.readouterr().err == ""


def test_a_tied_head_is_stored_once_and_multiplied_with_all_the_same():
    tied, untied = tiny_model(tied=True), tiny_model()
    table = VOCABULARY * 48
    assert stored_parameters(untied) - stored_parameters(tied) == table
    assert stored_bytes(untied) - stored_bytes(tied) == 4 * table
    assert stored_bytes(tiny_model(dtype=torch.bfloat16)) == 2 * stored_parameters(untied)
    assert flops_per_token(tied) == flops_per_token(untied)


def test_flops_of_a_dense_and_a_sliced_llama():
    dense = tiny_model()
    attention, mlp = 48 * 48 + 2 * 48 * 24 + 48 * 48, 3 * 48 * 80
    assert flops_per_token(dense) == 2 * (3 * (attention + mlp) + VOCABULARY * 48)

    sliced = slice_model(dense, [tokens(4, 32)], sparsity=0.5, round_to=1, progress=False)
    shortcuts = 5 * 24 * 24 + 24 * 48
    last = 80 * 24  # the last block writes all 48 directions
    assert flops_per_token(sliced) == 2 * (3 * (attention + mlp) // 2 + last + shortcuts + VOCABULARY * 48)


@torch.no_grad()
def counted_by_torch(model) -> int:
    """FLOPs of one token's linear layers; attention scores are matmuls of other kinds."""
    with FlopCounterMode(display=False) as counter:
        model(tokens(1, 1))
    return sum(
        flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family):
    model = tiny_model(family)
    if sparse_layers(model):
        model.set_experts_implementation("eager")  # torch counts no grouped matmul
    assert flops_per_token(model) == counted_by_torch(model)


@pytest.mark.parametrize(
    "plan",
    [
        dict(),
        dict(shortcut="aligned"),
        dict(shortcut="aligned", shortcut_rank=3, slice_head=True),
        dict(basis=2, refit=True),
        dict(basis="shared"),
    ],
)
def test_flops_of_every_plan_are_those_that_torch_counts(plan):
    dense = tiny_model()
    sliced = slice_model(dense, [tokens(4, 32)], sparsity=0.25, round_to=1, progress=False, **plan)
    assert flops_per_token(sliced) == counted_by_torch(sliced) != flops_per_token(dense)
