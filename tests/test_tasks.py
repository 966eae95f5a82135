"""Scores on tasks against their definition, on a local task; no network."""

import json

import pytest
import torch
from models import tiny_model, tokens
from texts import word_tokenizer

from slicegpt_fast import InputError, patch_model, slice_model
from slicegpt_fast.tasks import Score, Tasks

QUESTIONS = [
    {"start": "the cat sat on the", "ends": ["mat", "night by the door"], "answer": 0},
    {"start": "the dog lay by", "ends": ["on and", "the door"], "answer": 1},
    {"start": "rain fell on", "ends": ["old", "the old town"], "answer": 1},
    {"start": "the dog and", "ends": ["the cat", "rain", "long"], "answer": 0},
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No look at the hub; what datasets keeps of a file stands in a folder of the test's own."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder with one task: which end goes with a start."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "ends.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "ends.yaml").write_text(f"""
task: ends
dataset_path: json
dataset_kwargs:
  data_files: {folder / "ends.jsonl"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
""")
    return folder


@torch.no_grad()
def accuracy(model, questions=QUESTIONS) -> float:
    """The share of questions whose right end has the greatest sum of log-probabilities, in fp64."""
    model, tokenizer, right = model.double(), word_tokenizer(), 0
    for question in questions:
        start = tokenizer(question["start"]).input_ids
        sums = []
        for end in question["ends"]:
            ids = torch.tensor([start + tokenizer(end, add_special_tokens=False).input_ids])
            losses = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            sums.append(losses[len(start) - 1 :].sum())
        right += int(torch.stack(sums).argmax() == question["answer"])
    return right / len(questions)


def test_scores_are_their_definition(folder):
    """Of a dense model, a sliced one and the same patched; what is handed in stays as it was."""
    dense = tiny_model()
    sliced = slice_model(dense, [tokens(4, 32)], sparsity=0.25, progress=False)
    tasks, tokenizer = Tasks(["ends"], folder=folder), word_tokenizer()
    state = torch.get_rng_state()
    for model in (dense.train(), sliced):
        (score,) = tasks.scores(model, tokenizer)
        assert (score.task, score.metric, score.higher_is_better) == ("ends", "acc", True)
        spread = score.value * (1 - score.value)
        assert score.error == pytest.approx((spread / (len(QUESTIONS) - 1)) ** 0.5)
    assert dense.training
    assert tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), state)
    (patched,) = tasks.scores(patch_model(sliced), tokenizer, batch_size=2)
    assert patched == score
    (half,) = Tasks(["ends"], folder=folder, limit=2).scores(dense, tokenizer)
    assert half.value == accuracy(dense.eval(), QUESTIONS[:2])
    assert score.value == accuracy(slice_model(tiny_model(), [tokens(4, 32)], sparsity=0.25, progress=False))
    assert tasks.scores(dense.float(), tokenizer)[0].value == accuracy(dense)


def test_recovery():
    score = Score("task", "acc", 0.6, None, True)
    assert score._replace(value=0.45).recovery(score) == pytest.approx(0.75)
    perplexity = Score("task", "word_perplexity", 10.0, None, False)
    assert perplexity._replace(value=12.5).recovery(perplexity) == pytest.approx(0.8)
    assert score.recovery(score._replace(value=0.0)) is None


class TestRefusals:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.errors.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"lm_eval is not installed: pip install 'slicegpt-fast\[tasks\]' brings"):
            Tasks(["piqa"])

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"gone is no folder: give the one that holds the task files"):
            Tasks(["piqa"], folder=tmp_path / "gone")

    @pytest.mark.slow
    def test_no_such_task(self, folder):
        with pytest.raises(InputError, match=r"^lm-eval knows no task 'begins': lm-eval ls tasks lists all, and a"):
            Tasks(["ends", "piqa", "begins"], folder=folder)

    def test_no_task(self, folder):
        with pytest.raises(InputError, match=r"^no task is named: "):
            Tasks([], folder=folder)

    def test_data_that_cannot_be_had(self, folder):
        (folder / "ends.jsonl").unlink()
        with pytest.raises(InputError, match=r"^the data of ends cannot be had: Unable to find .*ends\.jsonl'"):
            Tasks(["ends"], folder=folder).scores(tiny_model(), word_tokenizer())

    def test_no_language_model(self, folder):
        with pytest.raises(InputError, match="model must be a transformers causal language model"):
            Tasks(["ends"], folder=folder).scores(torch.nn.Linear(2, 2), word_tokenizer())
