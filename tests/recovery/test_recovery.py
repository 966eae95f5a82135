"""Training brings a sliced model closer to its teacher, goes on exactly where it was killed, and leaves it ordinary."""

import copy
import json
import math

import pytest
import torch
from models import tiny_model, tokens
from transformers import AutoModelForCausalLM

from slicegpt_fast import InputError, patch_model, quantize_model, recover_model, slice_model, unpatch_model
from slicegpt_fast import recovery as recovery_
from slicegpt_fast.recovery import training

TEXT = [tokens(2, 16, seed=seed) for seed in range(12)]
HELD_OUT = [tokens(2, 16, seed=100)]
CUTS = {
    "layers": dict(target_params=0.8, cut=("channels", "values")),
    "stream": dict(sparsity=0.4, basis="shared", round_to=1),
}


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(recovery_, "EVERY", 4)


def sliced_pair(cut="stream", family="llama", **overrides):
    dense = tiny_model(family, **overrides)
    return dense, slice_model(dense, TEXT, progress=False, **CUTS[cut])


@torch.no_grad()
def said_by(dense, seed):
    """Text of the dense model's own, so that whoever predicts what it predicts has a low perplexity."""
    torch.manual_seed(seed)
    return dense.generate(tokens(8, 1, seed=seed), max_new_tokens=24, min_new_tokens=24, do_sample=True, top_k=0)


def recovered(model, dense, **options):
    return recover_model(model, dense, TEXT, HELD_OUT, progress=False, **{"learning_rate": 2e-3} | options)


def weights_of(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_the_divergence_falls(family, train):
    dense, model = sliced_pair(family=family)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    text = [said_by(dense, seed) for seed in range(9)]
    asked = dict(train=train, steps=36, rank=8, learning_rate=1e-3, progress=False)
    found = recover_model(model, dense, text[:-1], text[-1:], **asked)
    assert found.model is model
    before, *losses = [point.loss for point in found.points]
    assert math.isnan(before)
    assert losses[-1] < 0.8 * losses[0]
    assert [point.step for point in found.points] == [0, *range(4, 37, 4)]
    assert found.best.perplexity < found.points[0].perplexity
    assert found.best.perplexity == min(point.perplexity for point in found.points)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_experts_learn_too():
    dense, model = sliced_pair("layers", "mixtral")
    before = weights_of(model)
    recovered(model, dense, steps=4)
    experts = [name for name, each in model.state_dict().items() if each.ndim == 3]
    assert experts
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in experts)


def test_saves_and_loads_as_before(tmp_path):
    dense, model = sliced_pair("layers")
    recovered(model, dense, steps=4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = HELD_OUT[0]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(train, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    dense, model = sliced_pair()
    options = dict(train=train, steps=10, rank=4)
    whole = copy.deepcopy(model)
    expected = recovered(whole, dense, **options)
    step = training.Training.step
    for last in (0, 2, 6):

        def killed(self, *lesson, last=last):
            if self.done == last:
                raise Killed
            return step(self, *lesson)

        monkeypatch.setattr(training.Training, "step", killed)
        with pytest.raises(Killed):
            recovered(copy.deepcopy(model), dense, work=tmp_path / "work", **options)
        monkeypatch.setattr(training.Training, "step", step)
    asked = []
    found = recovered(model, lambda: asked.append(1), work=tmp_path / "work", **options)
    assert not asked  # the teacher had said all
    assert same(model.state_dict(), whole.state_dict())
    assert [point.perplexity for point in found.points] == [point.perplexity for point in expected.points]
    assert not (tmp_path / "work").exists()


def test_another_run_in_the_work_folder_is_refused(tmp_path):
    dense, model = sliced_pair()
    work = tmp_path / "work"
    work.mkdir()
    (work / "settings.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(InputError, match=r"unfinished run that differs in steps \(3 there, 4 now\)"):
        recovered(model, dense, steps=4, work=work)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_keeps_the_best_weights(what, monkeypatch):
    dense, model = sliced_pair()
    divergence = training.summed_divergence

    def spoilt(model, *lesson):
        spoilt.calls += 1
        value = divergence(model, *lesson)
        if spoilt.calls < 7:
            return value
        return value * math.inf if what == "loss" else value + (value - value.detach()) * math.inf

    spoilt.calls = 0
    monkeypatch.setattr(training, "summed_divergence", spoilt)
    with pytest.warns(UserWarning, match="diverged after 6 steps: the weights of step"):
        found = recovered(model, dense)
    assert found.diverged
    assert found.best.step in (0, 4)
    assert all(each.isfinite().all() for each in model.parameters())


def test_training_that_only_harms_gives_back_the_weights_that_were_given():
    dense, model = sliced_pair()
    before = weights_of(model)
    text = [said_by(dense, seed) for seed in range(9)]
    found = recover_model(model, dense, text[:-1], text[-1:], learning_rate=1.0, steps=40, progress=False)
    assert found.best.step == 0
    assert found.points[-1].step == 16  # four looks without a better one
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_16_bit_weights_come_back_in_16_bits(train):
    dense, model = sliced_pair(dtype=torch.bfloat16)
    dtypes = {name: each.dtype for name, each in model.state_dict().items()}
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    text = [said_by(dense, seed) for seed in range(9)]
    found = recover_model(model, dense, text[:-1], text[-1:], train=train, rank=8, learning_rate=1e-3, progress=False)
    assert found.best.perplexity < found.points[0].perplexity
    assert {name: each.dtype for name, each in model.state_dict().items()} == dtypes
    assert same(dict(model.named_buffers()), buffers)


def test_a_patched_model_trains_and_computes_its_new_weights():
    dense, model = sliced_pair()
    twin = copy.deepcopy(model)
    recovered(patch_model(model), dense, steps=4)
    recovered(twin, dense, steps=4)
    ids = HELD_OUT[0]
    with torch.no_grad():
        patched, expected = model(ids).logits, twin(ids).logits
    torch.testing.assert_close(patched, expected, rtol=1e-3, atol=1e-3)
    assert unpatch_model(model) is model


def test_padding_teaches_nothing():
    dense, model = sliced_pair()
    twin, mask = copy.deepcopy(model), torch.ones(2, 16, dtype=torch.long)
    mask[:, 11:] = 0
    for each, beyond in ((model, 5), (twin, 7)):
        text = [{"input_ids": ids.masked_fill(mask == 0, beyond), "attention_mask": mask} for ids in TEXT]
        recover_model(each, dense, text, HELD_OUT, steps=4, progress=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(train="some"), "train must be 'all' or 'lora', not 'some'"),
        (dict(steps=0), "steps must be a whole number of at least 1, not 0"),
        (dict(rank=2.5), "rank must be a whole number of at least 1, not 2.5"),
        (dict(learning_rate=math.nan), "learning_rate must be greater than 0, not nan"),
    ],
)
def test_wrong_arguments(options, message):
    dense, model = sliced_pair()
    with pytest.raises(InputError, match=message):
        recovered(model, dense, **options)


def test_wrong_models_and_texts():
    dense, model = sliced_pair()
    with pytest.raises(InputError, match="the model is quantised"):
        recovered(quantize_model(model, 8, progress=False), dense)
    with pytest.raises(InputError, match="the teacher's vocabulary has 50 tokens, the model's 97"):
        recovered(model, tiny_model(vocab_size=50))
    with pytest.raises(InputError, match="text holds no batch"):
        recover_model(model, dense, [], HELD_OUT, progress=False)
