"""A small trained model: what a cut was predicted to cost against what it costs, and what plays no part in it."""

import pytest
import torch
from models import VOCABULARY, tiny_model

from slicegpt_fast.slicing import SliceOptions, cut_to_budget
from slicegpt_fast.slicing.cuts import budget
from slicegpt_fast.slicing.cuts.budget import mean_loss
from slicegpt_fast.slicing.cuts.sensitivity import measure_sensitivity


def text(sequences, generator):
    """Words of three tokens, each followed by one of six words; [sequences, 48] token ids."""
    rules = torch.Generator().manual_seed(0)
    words = torch.randint(3, VOCABULARY, (90, 3), generator=rules)
    following = torch.randint(90, (90, 6), generator=rules)
    word = torch.randint(90, (sequences,), generator=generator)
    written = []
    for _ in range(16):
        written.append(words[word])
        choice = torch.multinomial(torch.tensor([8.0, 4, 2, 1, 1, 1]).expand(sequences, -1), 1, generator=generator)
        word = following[word].gather(1, choice).squeeze(1)
    return torch.cat(written, 1)


def batches(seed, number=8):
    generator = torch.Generator().manual_seed(seed)
    ids = [text(16, generator) for _ in range(number)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


@pytest.fixture(scope="module")
def trained():
    """A Llama of two layers that has learned the words and what follows them."""
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        ids = text(16, generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("cut", "targets"),
    [
        (("channels",), (0.9, 0.8, 0.7)),
        (("values",), (0.9,)),
        (("channels", "values"), (0.9, 0.8, 0.7)),
        (("stream",), (0.8,)),
        ("auto", (0.6,)),
    ],
)
def test_predicted_loss_is_measured_within_a_factor_of_two(trained, cut, targets):
    dense = mean_loss(trained, batches(seed=3))
    for target in targets:
        options = SliceOptions(target_params=target, cut=cut, round_to=8)
        found = cut_to_budget(trained, batches(seed=2), options, progress=False)
        measured = mean_loss(found.model, batches(seed=3)) - dense
        assert 0.5 <= found.trials[0].sizes.loss / measured <= 2


def test_the_plan_taken_is_the_best_on_held_out_text(trained):
    options = SliceOptions(target_params=0.7, round_to=8)
    found = cut_to_budget(trained, batches(seed=2), options, progress=False)
    tried = [trial for trial in found.trials if trial.added is not None]
    assert len(tried) > 1
    assert found.trials[: len(tried)] == tuple(sorted(tried, key=lambda trial: trial.added))
    assert found.plan.widths[0] == found.trials[0].sizes.width
    assert all(trial.sizes.stored <= 0.7 for trial in found.trials)


def test_plans_are_compared_on_text_that_they_were_not_fitted_to(trained, monkeypatch):
    fitted, tried = [], []

    def fit(model, text, **options):
        fitted.append(text)
        return measure_sensitivity(model, text, **options)

    def attempt(model, text):
        tried.append(text)
        return mean_loss(model, text)

    monkeypatch.setattr(budget, "measure_sensitivity", fit)
    monkeypatch.setattr(budget, "mean_loss", attempt)
    cut_to_budget(trained, batches(seed=2), SliceOptions(target_params=0.7, round_to=8), progress=False)
    assert [len(text) for text in fitted] == [8, 6]
    assert len(tried) > 2  # the dense model's, and of two plans
    for text in tried:
        assert len(text) == 2
        assert not any(torch.equal(a["input_ids"], b["input_ids"]) for a in text for b in fitted[1])


@pytest.mark.parametrize("cut", [("channels", "values"), ("stream",)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_plays_no_part(trained, side, cut):
    """What stands under the mask is text too, of another kind."""
    options = SliceOptions(target_params=0.8, cut=cut, round_to=8)
    expected = cut_to_budget(trained, batches(seed=2), options, progress=False)
    padded = []
    for index, batch in enumerate(batches(seed=2)):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        filler = torch.full((len(ids), 3 + index), 5)
        order = slice(None) if side == "left" else slice(None, None, -1)
        padded.append(
            {
                "input_ids": torch.cat([filler, ids][order], 1),
                "attention_mask": torch.cat([torch.zeros_like(filler), mask][order], 1),
            }
        )
    found = cut_to_budget(trained, padded, options, progress=False)
    assert found.plan == expected.plan
    assert found.trials[0].sizes.loss == pytest.approx(expected.trials[0].sizes.loss, rel=1e-3)
    assert found.model.config.quantization_config.calibration_tokens == 8 * 16 * 48
    ids = batches(seed=3)[0]["input_ids"]
    with torch.no_grad():
        logits = expected.model(ids).logits
        assert (found.model(ids).logits - logits).abs().max() <= 1e-3 * (logits.max() - logits.min())


def test_more_budget_costs_less(trained):
    losses = []
    for target in (0.6, 0.7, 0.8, 0.9, 1.0):
        found = cut_to_budget(
            trained, batches(seed=2, number=2), SliceOptions(target_params=target, round_to=8), progress=False
        )
        losses.append(found.trials[0].sizes.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    assert (set(found.plan.widths), set(found.plan.channels), set(found.plan.values)) == ({32}, {64}, {16})


def test_little_memory_gives_the_same_model(trained, monkeypatch):
    options = SliceOptions(target_params=0.7, round_to=8)
    expected = cut_to_budget(trained, batches(seed=2, number=4), options, progress=False)
    monkeypatch.setattr(budget, "free_memory", lambda device: 1)  # one layer at a time
    found = cut_to_budget(trained, batches(seed=2, number=4), options, progress=False)
    assert found.trials == expected.trials
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, expected.model.state_dict()[name])


def test_correction_lowers_the_loss_of_other_text(trained, monkeypatch):
    options = SliceOptions(target_params=0.7, cut=("channels", "values"), round_to=8)
    corrected = cut_to_budget(trained, batches(seed=2), options, progress=False)
    monkeypatch.setattr(budget, "correct_", lambda *arguments, **options: None)
    plain = cut_to_budget(trained, batches(seed=2), options, progress=False)
    assert corrected.plan == plain.plan
    assert mean_loss(corrected.model, batches(seed=3)) < mean_loss(plain.model, batches(seed=3))
