"""A plain export is loaded by stock transformers alone and computes what the sliced model computes."""

import copy
import errno
import functools
import os
import subprocess
import sys

import pytest
import torch
from models import CHANNELS, LATER, ROWS, in_double, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from slicegpt_fast import InputError, export_plain, load_model, load_tokenizer, slice_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing import dense_sizes, slice_config_of

IDS = tokens(2, 19)
WIDTHS = {"odd": dict(sparsity=0.27, round_to=1), "even": dict(sparsity=0.3, round_to=8)}  # 35 and 32 of 48
EXPERTS = ("mixtral", "qwen3-moe")  # torch's grouped matmul knows no odd widths
LATER_STREAMS = [family for family in LATER if ROWS[family].resizable and not ROWS[family].centered]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(family, "odd", dtype) for family in FAMILIES for dtype in DTYPES]
CASES += [(family, "even", dtype) for family in EXPERTS for dtype in DTYPES]
CASES += [(family, "even", torch.float32) for family in (*FAMILIES, *LATER_STREAMS)]


def sliced_model(family="llama", *, sparsity=0.25, round_to=8, basis="shared", **options):
    model = tiny_model(family, **options)
    return slice_model(
        model, [tokens(4, 32, seed=1)], sparsity=sparsity, basis=basis, round_to=round_to, progress=False
    )


def cut_model(dense, *, target_params=0.8, uniform=True, **options):
    return slice_model(
        dense,
        [tokens(4, 32, seed=1)],
        target_params=target_params,
        uniform=uniform,
        round_to=8,
        progress=False,
        **options,
    )


@functools.cache
def sliced_case(family, width):
    # An eps large enough to show whichever norm is left with a wrong one.
    return sliced_model(family, tied=True, rms_norm_eps=0.01, **WIDTHS[width])


@pytest.mark.parametrize(("family", "width", "dtype"), CASES)
@torch.no_grad()
def test_stock_model_computes_the_sliced_model(family, width, dtype, tmp_path):
    model = copy.deepcopy(sliced_case(family, width)).to(dtype)
    width = model.get_input_embeddings().embedding_dim
    before = model(IDS).logits
    config = export_plain(model, tmp_path / "plain")
    assert torch.equal(model(IDS).logits, before)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    stock = LlamaForCausalLM if family == "qwen2" else type(model)
    assert type(plain) is stock
    assert plain.dtype == dtype
    padded = 36 if width == 35 and stock is LlamaForCausalLM else width  # a multiple of Llama's four heads
    assert plain.config.hidden_size == config.hidden_size == padded
    assert not plain.config.tie_word_embeddings
    assert not hasattr(plain.config, "quantization_config")

    # The norms' weights and products are rounded once more: at most twice the sliced model's own error.
    exact = in_double(model)(IDS).logits
    tiny = 1e-5 * (exact.max() - exact.min())
    error = (plain(IDS).logits - exact).abs()
    assert error.mean() <= 2 * (before - exact).abs().mean() + tiny
    if dtype == torch.float32:
        assert error.max() <= tiny + 2 * (before - exact).abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CHANNELS)
@torch.no_grad()
def test_uniform_channels_are_exported_in_any_family(family, tied, tmp_path):
    overrides = dict(decoder_sparse_step=1) if family == "qwen3-moe" else {}  # else some layers have no experts
    dense = tiny_model(family, tied=tied, **overrides)
    model = cut_model(dense, cut=("channels",))
    plan = slice_config_of(model).plan()
    assert len(set(plan.channels)) == 1
    assert plan.channels[0] < dense_sizes(Decoder(dense))["channels"][0]
    export_plain(model, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is type(dense)
    assert plain.config.tie_word_embeddings == tied
    assert not hasattr(plain.config, "quantization_config")
    assert plain.num_parameters() == model.num_parameters() < dense.num_parameters()
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
@torch.no_grad()
def test_uniform_channels_on_a_sliced_stream(family, tmp_path):
    model = cut_model(tiny_model(family, tied=True), cut=("stream", "channels"), target_params=0.35)
    plan = slice_config_of(model).plan()
    assert (plan.basis, plan.widths[0] < 48, plan.channels[0] < 80) == ("shared", True, True)
    config = export_plain(model, tmp_path / "plain")
    assert (config.hidden_size, config.intermediate_size) == (plan.widths[0], plan.channels[0])
    expected, actual = model(IDS).logits, load_model(tmp_path / "plain")(IDS).logits
    assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_qwen2_with_sliding_windows_stays_qwen2(tmp_path):
    """Llama has none."""
    windows = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model = sliced_model("qwen2", **windows)
    assert export_plain(model, tmp_path / "plain").model_type == "qwen2"
    with torch.no_grad():
        expected, actual = model(IDS).logits, load_model(tmp_path / "plain")(IDS).logits
    assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_qwen2_where_config_classes_have_no_attributes(tmp_path, monkeypatch):
    """As in transformers 5.0."""
    for name in ("num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        monkeypatch.delattr(LlamaConfig, name, raising=False)
    config = export_plain(sliced_model("qwen2"), tmp_path / "plain")
    assert (config.model_type, config.num_hidden_layers, config.intermediate_size) == ("llama", 3, 80)


def test_loads_and_generates_without_this_package(tmp_path):
    """In another process, which must not even import it."""
    model = sliced_model(round_to=1, sparsity=0.27, attention_bias=False)
    export_plain(model, tmp_path / "plain")
    with torch.no_grad():
        expected = {"logits": model(IDS).logits, "tokens": model.generate(IDS, max_new_tokens=8, do_sample=False)}
    program = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.tensor(eval(sys.argv[2]))
with torch.no_grad():
    out = {"logits": model(ids).logits, "tokens": model.generate(ids, max_new_tokens=8, do_sample=False)}
assert not [name for name in sys.modules if name.startswith("slicegpt_fast")]
save_file(out, sys.argv[3])
"""
    command = [sys.executable, "-c", program, tmp_path / "plain", str(IDS.tolist()), tmp_path / "out"]
    subprocess.run(command, check=True, cwd=tmp_path)
    actual = load_file(tmp_path / "out")
    assert torch.equal(actual["tokens"], expected["tokens"])
    spread = expected["logits"].max() - expected["logits"].min()
    assert (actual["logits"] - expected["logits"]).abs().max() <= 1e-5 * spread


@torch.no_grad()
def test_tokenizer_generation_config_and_loaded_models(tmp_path):
    """A sliced model that was saved and loaded again exports like the one in memory; what is beside it comes along."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    model = sliced_model()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "sliced")
    export_plain(load_model(tmp_path / "sliced"), tmp_path / "plain", tokenizer)
    export_plain(model, tmp_path / "again")
    plain = load_model(tmp_path / "plain")
    assert plain.generation_config.max_new_tokens == 7
    assert torch.equal(plain(IDS).logits, load_model(tmp_path / "again")(IDS).logits)
    assert load_tokenizer(tmp_path / "plain")("a b").input_ids == tokenizer("a b").input_ids


@torch.no_grad()
def test_training_after_slicing_is_exported(tmp_path):
    model = sliced_model()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    export_plain(model, tmp_path / "plain")
    expected = model(IDS).logits
    plain = load_model(tmp_path / "plain")(IDS).logits
    assert (plain - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


class TestRefusals:
    def refused(self, model, folder, match):
        with pytest.raises(InputError, match=match):
            export_plain(model, folder / "plain")
        assert not (folder / "plain").exists()

    def test_dense(self, tmp_path):
        self.refused(tiny_model(), tmp_path, "the model is dense: save it with save_pretrained")

    @pytest.mark.parametrize("sparsity", [0, 0.25])
    def test_shortcuts(self, sparsity, tmp_path):
        self.refused(sliced_model(sparsity=sparsity, basis="per-norm"), tmp_path, "slice with basis='shared' to export")

    @pytest.mark.parametrize("family", ["opt", "gpt-neox", "stablelm"])
    def test_layer_norms(self, family, tmp_path):
        self.refused(sliced_model(family), tmp_path, "models have LayerNorms, .* only RMSNorm families can be exported")

    def test_channels_of_each_layer(self, tmp_path):
        model = cut_model(tiny_model(), cut=("channels",), uniform=False)
        match = (
            r"keep \d+ to \d+ channels, .* one intermediate_size: cut with cut=\('channels',\), uniform=True to export"
        )
        self.refused(model, tmp_path, match)

    def test_values_of_a_lower_rank(self, tmp_path):
        model = cut_model(tiny_model(), cut=("values",), target_params=0.95)
        match = r"values have a rank of 8 of 12, which no stock model has: cut with cut=\('channels',\), uniform=True"
        self.refused(model, tmp_path, match)

    def test_config_that_accepts_no_smaller_size(self, tmp_path):
        """Phi-3's config holds the lengths of its long-context factors against the hidden size."""
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [1.5] * 6}
        model = sliced_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
        self.refused(model, tmp_path, r"Phi3Config accepts neither 32 nor 32 as hidden_size \(.*short_factor")

    def test_adapters(self, tmp_path):
        model = get_peft_model(sliced_model(), LoraConfig(target_modules=["q_proj"])).base_model.model
        self.refused(model, tmp_path, "layers.0.self_attn.q_proj.* merge adapters before exporting")

    def test_full_folder(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            export_plain(sliced_model(), tmp_path)
        assert os.listdir(tmp_path) == ["notes"]

    def test_failing_disk(self, tmp_path, monkeypatch):
        def fail(self, folder, **_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
        self.refused(sliced_model(), tmp_path, "cannot write .*plain: ")
        assert os.listdir(tmp_path) == []
