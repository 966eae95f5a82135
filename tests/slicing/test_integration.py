"""Whoever meets a sliced model, its config or its folder gets the sliced model, or one sentence."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from models import FAMILIES, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from slicegpt_fast import InputError, load_model, save_model, slice_checkpoint, slice_model
from slicegpt_fast.architectures import architecture_of
from slicegpt_fast.slicing import block_parameters, slice_config_of
from slicegpt_fast.slicing.card import Figure

UNSAVED = "(sliced and not saved: call save_pretrained before adapting it)"


def sliced_model(family="llama", *, sparsity=0.25, basis="per-norm", **options):
    model = tiny_model(family, **options)
    slice_head = architecture_of(model.config).keeps_width
    return slice_model(model, [tokens(4, 32)], sparsity=sparsity, basis=basis, slice_head=slice_head, progress=False)


@pytest.mark.parametrize("copied", [lambda config: config, copy.deepcopy, lambda c: LlamaConfig.from_dict(c.to_dict())])
@pytest.mark.parametrize(
    "build", [AutoModelForCausalLM.from_config, AutoModel.from_config, LlamaForCausalLM, LlamaModel]
)
@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_a_sliced_config_alone_builds_nothing(build, copied, sparsity):
    config = copied(sliced_model(sparsity=sparsity).config)
    with pytest.raises(
        InputError, match=r"the config of a sliced or quantised model does not build one .*: load it with"
    ):
        build(config)
    del config.quantization_config
    assert isinstance(build(config), PreTrainedModel)


@pytest.mark.parametrize("load", [AutoModelForCausalLM, LlamaForCausalLM])
@torch.no_grad()
def test_a_config_in_memory_loads_a_folder(load, tmp_path):
    sliced = sliced_model()
    sliced.save_pretrained(tmp_path)
    loaded = load.from_pretrained(tmp_path, config=sliced.config)
    again = load.from_pretrained(tmp_path, config=loaded.config)
    assert torch.equal(again(tokens(1, 5)).logits, sliced(tokens(1, 5)).logits)
    for model in (sliced, loaded, again):
        with pytest.raises(InputError, match="does not build one from scratch"):
            type(model)(model.config)


@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("sparsity", [0, 0.25])
def test_dense_weights_under_a_sliced_config_are_refused(sparsity, basis, tmp_path):
    sliced = sliced_model(sparsity=sparsity, basis=basis)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the files do not belong together"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=sliced.config)


@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_dense_model_cannot_take_a_sliced_folder(family, basis, tmp_path):
    """Without its plan in the config a folder of full width stands for what loads it without this package."""
    sliced = sliced_model(family, sparsity=0, basis=basis)
    sliced.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(tokens(1, 9)).logits, sliced(tokens(1, 9)).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match="mismatch"):
            load.from_pretrained(tmp_path)


def test_a_process_without_the_package_cannot_load_a_folder_of_full_width(tmp_path):
    sliced_model(sparsity=0).save_pretrained(tmp_path)
    program = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert run.returncode == 1
    assert "model.norm.weight" in run.stderr


@torch.no_grad()
def test_a_folder_without_the_empty_tensor_still_loads(tmp_path):
    sliced = sliced_model(sparsity=0)
    sliced.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.pop("model.norm.weight").numel() == 0
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(tmp_path)(tokens(1, 5)).logits, sliced(tokens(1, 5)).logits)


@pytest.mark.parametrize(
    "load",
    [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-7b", "qwen3"])
def test_other_heads_on_a_sliced_folder_end_in_a_sentence(family, load, tmp_path):
    sliced_model(family).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the model is a .*, and slicing knows the causal language models"):
        load.from_pretrained(tmp_path)


@pytest.mark.parametrize("target", [{}, {"target_modules": ["norm"]}])
@pytest.mark.parametrize("basis", ["per-norm", "shared"])
def test_adapters_of_norms_end_in_a_sentence(basis, target):
    from peft import LNTuningConfig, get_peft_model

    sliced = sliced_model(basis=basis)
    with pytest.raises(InputError, match=r"no weight to train.*: adapt those \(LoRA\), not the norms \(LNTuning"):
        get_peft_model(sliced, LNTuningConfig(task_type="CAUSAL_LM", **target))


class TestModelCard:
    def test_tells_what_the_folder_holds(self, tmp_path):
        sliced = sliced_model(tied=True)
        sliced.save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        stored = sum(parameter.numel() for parameter in sliced.parameters())
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "import slicegpt_fast\nfrom transformers import AutoModelForCausalLM" in card
        assert "* Basis: per-norm, fitted to the raw signal of 128 tokens." in card
        assert "* Directions kept: 32 of 48, 48 at the head; dense shortcuts." in card
        dense_blocks, blocks = (block_parameters(model) for model in (tiny_model(), sliced))
        assert f"| stored parameters |  | {stored:,} |" in card
        assert f"| in decoder blocks | {dense_blocks:,} | {blocks:,} ({blocks / dense_blocks:.3f}) |" in card
        assert f"| bytes |  | {4 * stored:,} |" in card

    def test_names_the_base_and_what_was_measured(self, tmp_path):
        dense = tiny_model()
        dense.name_or_path = "someone/dense-model"
        sliced = slice_model(dense, [tokens(4, 32)], sparsity=0.25, basis="shared", progress=False)
        save_model(
            sliced,
            tmp_path / "new",
            figures=[Figure("perplexity", "14.61", "16.40"), Figure("bytes", "9", "8")],
            text="notes.txt",
        )
        card = (tmp_path / "new/README.md").read_text()
        assert card.startswith("---\nbase_model: someone/dense-model\n")
        assert "| bytes | 9 | 8 |\n| perplexity | 14.61 | 16.40 |\n" in card
        assert "fitted to the raw signal of 128 tokens of notes.txt." in card
        again = load_model(tmp_path / "new")
        again.save_pretrained(tmp_path / "again")
        assert "base_model: someone/dense-model\n" in (tmp_path / "again/README.md").read_text()

    @pytest.mark.parametrize(
        ("family", "options", "takes"),
        [
            ("llama", dict(sparsity=0.25, basis="per-norm"), False),  # shortcuts
            ("llama", dict(sparsity=0.25, basis="shared"), True),
            ("opt", dict(sparsity=0.25, basis="shared"), False),  # LayerNorms
            ("llama", dict(target_params=0.8, cut=("channels",)), False),  # of different numbers
            ("opt", dict(target_params=0.8, cut=("channels",), uniform=True), True),
        ],
    )
    def test_names_export_where_that_takes_it(self, family, options, takes, tmp_path):
        sliced = slice_model(tiny_model(family), [tokens(4, 32)], round_to=8, progress=False, **options)
        sliced.save_pretrained(tmp_path)
        assert ("slicegpt-fast export PATH --out plain" in (tmp_path / "README.md").read_text()) == takes

    def test_goes_to_the_hub_with_the_model(self, tmp_path, monkeypatch):
        sent = {}

        def commit(self, repo_id, operations, **_):
            sent.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

        def missing(repo_id, **_):
            raise EntryNotFoundError("no card")

        monkeypatch.setattr(HfApi, "create_commit", commit)
        monkeypatch.setattr(
            HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}")
        )
        monkeypatch.setattr(ModelCard, "load", missing)
        sliced_model().push_to_hub("someone/smaller")
        assert sent.keys() >= {"config.json", "model.safetensors", "README.md"}
        assert b"Directions kept: 32 of 48" in sent["README.md"]

    @pytest.mark.parametrize("edit", ["# Mine\n", None])
    def test_a_readme_of_the_user_stays(self, edit, tmp_path):
        sliced = sliced_model()
        sliced.save_pretrained(tmp_path)
        text = edit or (tmp_path / "README.md").read_text().replace("sliced to", "sliced by me to")
        (tmp_path / "README.md").write_text(text)
        sliced_model(basis="shared").save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    def test_one_written_here_is_replaced(self, tmp_path):
        sliced_model().save_pretrained(tmp_path)
        sliced_model(basis="shared").save_pretrained(tmp_path)
        assert "* Basis: shared, " in (tmp_path / "README.md").read_text()

    def test_dense_models_and_adapters_get_none(self, tmp_path):
        from peft import LoraConfig, get_peft_model

        tiny_model().save_pretrained(tmp_path / "dense")
        assert not (tmp_path / "dense/README.md").exists()
        sliced = sliced_model()
        sliced.add_adapter(LoraConfig(target_modules=["q_proj"]))
        sliced.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter/README.md").exists()
        assert get_peft_model(sliced_model(), LoraConfig(target_modules=["q_proj"])) is not None

    def test_slicing_from_file_to_file_writes_one_too(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "dense")
        slice_checkpoint(tmp_path / "dense", tmp_path / "sliced", [tokens(4, 32)], sparsity=0, progress=False)
        save_model(sliced_model(sparsity=0), tmp_path / "in-memory")
        cards = [(tmp_path / name / "README.md").read_text() for name in ("sliced", "in-memory")]
        assert cards[0] == cards[1]
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_config(tiny_model().config).from_pretrained(
                tmp_path / "sliced", config=tiny_model().config
            )


class TestBaseOfAdapters:
    @staticmethod
    def adapted_base(model, folder):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.save_pretrained(folder)
        return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]

    @pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_model])
    @torch.no_grad()
    def test_is_the_sliced_folder_once_it_is_saved(self, save, tmp_path):
        from peft import AutoPeftModelForCausalLM

        tiny_model().save_pretrained(tmp_path / "dense")
        sliced = slice_model(load_model(tmp_path / "dense"), [tokens(4, 32)], sparsity=0.25, progress=False)
        save(sliced, tmp_path / "sliced")
        assert self.adapted_base(sliced, tmp_path / "adapter") == str(tmp_path / "sliced")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(again(tokens(1, 5)).logits, sliced(tokens(1, 5)).logits)

    def test_is_a_sentence_before(self, tmp_path):
        from peft import AutoPeftModelForCausalLM

        tiny_model().save_pretrained(tmp_path / "dense")
        sliced = slice_model(load_model(tmp_path / "dense"), [tokens(4, 32)], sparsity=0.25, progress=False)
        assert self.adapted_base(sliced, tmp_path / "adapter") == f"{tmp_path / 'dense'} {UNSAVED}"
        with pytest.raises(Exception, match="sliced and not saved: call save_pretrained before adapting"):
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")

    def test_is_the_folder_that_a_sliced_model_was_loaded_from(self, tmp_path):
        sliced_model().save_pretrained(tmp_path / "sliced")
        loaded = load_model(tmp_path / "sliced")
        assert self.adapted_base(loaded, tmp_path / "adapter") == str(tmp_path / "sliced")

    def test_a_save_that_fails_leaves_the_name(self, tmp_path):
        sliced = sliced_model()

        def fail(_):
            raise OSError("full")

        with pytest.raises(InputError, match="full"):
            save_model(sliced, tmp_path / "sliced", also=fail)
        assert sliced.name_or_path == UNSAVED
        assert slice_config_of(sliced) is not None
