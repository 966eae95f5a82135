"""A sliced stream leaves tied tables one table: exactly what two narrow ones compute, in fewer parameters."""

import json
from dataclasses import replace

import pytest
import torch
from models import CUTTABLE, FAMILIES, ONE_WIDTH, VOCABULARY, tiny_model, tokens
from slicing.cuts.test_families import BATCHES, assert_close, cut_family, logits
from transformers import AutoModelForCausalLM

from slicegpt_fast import InputError, export_plain, patch_model, patch_report, unpatch_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing import SliceOptions, apply_bases, cut_to_budget, find_bases, make_plan, slice_config_of
from slicegpt_fast.slicing.bases import refit_readers

STREAM = 40
TIED = [family for family in FAMILIES if family not in ONE_WIDTH]


def both(family, dtype=torch.float32):
    """A tied dense model sliced by one basis: with two narrow tables, and with one dense table and two maps."""
    model = tiny_model(family, tied=True, dtype=dtype)
    plan = make_plan(model, SliceOptions(widths=[STREAM] * len(Decoder(model).sites), basis="shared"))
    bases = refit_readers(model, BATCHES, find_bases(model, BATCHES, plan, progress=False), progress=False)
    tied = replace(bases, plan=replace(plan, tied=True))
    return apply_bases(model, bases, progress=False), apply_bases(model, tied, progress=False)


@pytest.mark.parametrize("family", TIED)
def test_one_table_computes_what_two_do(family):
    untied, tied = both(family)
    ids = tokens(2, 19)
    assert_close(logits(tied, ids), logits(untied, ids))
    embeddings, head = tied.get_input_embeddings(), tied.get_output_embeddings()
    assert head.weight is embeddings.weight
    assert not any(parameter.is_meta for parameter in tied.parameters())
    with torch.no_grad():  # the hidden states too: the stream of the narrow model, and D at the head
        narrow, wide = (model(ids, output_hidden_states=True).hidden_states for model in (untied, tied))
    for left, right in zip(narrow[:-1], wide[:-1], strict=True):
        assert_close(right, left)
    assert wide[-1].shape[-1] == 48


@pytest.mark.parametrize("family", TIED)
def test_what_it_stores(family):
    untied, tied = both(family)
    dense = Decoder(tiny_model(family))
    bias = 48 if getattr(dense.final_norm, "bias", None) is not None else 0  # which a narrow head's bias takes in
    narrow_bias = VOCABULARY if bias and dense.head.bias is None else 0
    difference = 48 * VOCABULARY + 2 * STREAM * 48 + bias - 2 * STREAM * VOCABULARY - narrow_bias
    stored = [sum(parameter.numel() for parameter in model.parameters()) for model in (untied, tied)]
    assert stored[1] - stored[0] == difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [family for family in TIED if family in CUTTABLE])
def test_it_is_saved_and_loaded_tied(family, dtype, tmp_path):
    cut = cut_family(family, STREAM, tied=True, dtype=dtype)
    assert slice_config_of(cut).plan().tied
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert slice_config_of(loaded).plan() == slice_config_of(cut).plan()
    assert loaded.dtype == dtype
    assert loaded.config.tie_word_embeddings
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, tokens(2, 9)), logits(cut, tokens(2, 9)))


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "phi"])
def test_patched_and_back_again(family):
    cut, ids = cut_family(family, STREAM, tied=True), tokens(2, 9)
    before = logits(cut, ids), logits(cut, ids[:, :1])
    patch_model(cut)
    report = patch_report(cut)
    assert report.fused == len(report.rows), str(report)
    assert_close(logits(cut, ids), before[0])
    assert_close(logits(cut, ids[:, :1]), before[1])
    assert torch.equal(logits(unpatch_model(cut), ids), before[0])
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "phi"])
@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 7])
def test_the_vocabulary_can_be_resized(family, size, tmp_path):
    cut = cut_family(family, STREAM, tied=True)
    ids = tokens(2, 9).clamp(max=VOCABULARY - 8)
    before = logits(cut, ids)
    cut.resize_token_embeddings(size, mean_resizing=False)
    after = logits(cut, ids)
    kept = min(size, VOCABULARY)
    assert after.shape[-1] == size
    assert_close(after[..., :kept], before[..., :kept])
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), after)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_trains(family):
    cut, ids = cut_family(family, STREAM, tied=True).train(), tokens(2, 9)
    cut(ids, labels=ids).loss.backward()
    for name, parameter in cut.named_parameters():
        assert "bias" in name or parameter.grad.abs().max() > 0, name


def test_only_a_sliced_stream_of_a_tied_model_has_maps():
    assert not slice_config_of(cut_family(tied=True)).plan().tied
    assert not slice_config_of(cut_family(width=STREAM)).plan().tied
    for family in (each for each in ONE_WIDTH if each in CUTTABLE):
        assert not slice_config_of(cut_family(family, STREAM, tied=True)).plan().tied
    model = tiny_model(tied=True)
    bases = find_bases(model, BATCHES, make_plan(model, SliceOptions(sparsity=0.2, basis="shared")), progress=False)
    assert not bases.plan.tied  # the published method makes two tables
    foreign = replace(bases, plan=replace(bases.plan, tied=True))
    with pytest.raises(InputError, match="tied True, which takes a model whose head is its embedding table"):
        apply_bases(tiny_model(), foreign, progress=False)
    with pytest.raises(InputError, match=r"tied 1\.5, which takes"):
        apply_bases(model, replace(bases, plan=replace(bases.plan, tied=1.5)), progress=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_plain_export_has_two_narrow_tables(family, tmp_path):
    options = SliceOptions(target_params=0.4, cut=("stream", "channels"), uniform=True, round_to=8)
    found = cut_to_budget(tiny_model(family, tied=True), BATCHES, options, progress=False)
    assert found.plan.tied
    config = export_plain(found.model, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.get_input_embeddings().weight.shape == (VOCABULARY, config.hidden_size)
    assert plain.get_output_embeddings().weight is not plain.get_input_embeddings().weight
    assert_close(logits(plain, tokens(2, 9)), logits(found.model, tokens(2, 9)))


@pytest.mark.parametrize(
    ("tied", "change", "message"),
    [
        (True, {"quantization_config": {"tied": False}}, r"has shape .*, its config asks for"),
        (True, {"tie_word_embeddings": False}, "tied True, which takes a model whose head is its embedding table"),
        (False, {"quantization_config": {"tied": True}}, "tied True, which takes a model whose head"),
        (True, {"quantization_config": {"tied": "yes"}}, "tied 'yes', which takes"),
        (True, {"quantization_config": {"basis": None, "widths": [48] * 7}}, "and a sliced stream"),
    ],
)
def test_a_config_that_was_changed(tied, change, message, tmp_path):
    cut_family(width=STREAM, tied=tied).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change = change | {"quantization_config": config["quantization_config"] | change.get("quantization_config", {})}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_of_the_embedding_adds_to_the_stream(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    cut = cut_family("llama", STREAM, tied=True)
    ids = tokens(2, 9)
    before = logits(cut, ids)
    adapted = get_peft_model(cut, LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    assert_close(logits(adapted, ids), before)
    adapted(ids, labels=ids).loss.backward()
    adapter = adapted.base_model.model.get_input_embeddings()
    assert adapter.lora_embedding_B["default"].grad is not None
    with torch.no_grad():
        adapter.lora_embedding_A["default"].normal_()
        adapter.lora_embedding_B["default"].normal_()
    after = logits(adapted, ids)
    assert not torch.allclose(after, before, rtol=0.1)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cut_family("llama", STREAM, tied=True), tmp_path)
    assert_close(logits(loaded, ids), after)
