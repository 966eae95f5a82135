"""Kept sizes: the published rounding, the parameter budget, and every refusal."""

import numpy as np
import peft
import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_model, tokens
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2DoubleHeadsModel,
    T5Config,
    T5ForConditionalGeneration,
)

from slicegpt_fast import InputError, patch_model, quantize_model, slice_model
from slicegpt_fast.architectures import Decoder, architecture_of
from slicegpt_fast.slicing import SliceOptions, block_parameters, make_plan, slice_config_of


@pytest.mark.parametrize(
    ("sparsity", "round_to", "width"),
    [(0, 8, 48), (0.25, 8, 32), (0.25, 4, 36), (0.25, 1, 36), (0.3, 8, 32), (0.3, 1, 33), (0.9, 1, 4), (0.1, 1, 43)],
)
def test_sparsity_rounds_down_to_a_multiple(sparsity, round_to, width):
    plan = make_plan(tiny_model(), SliceOptions(sparsity=sparsity, round_to=round_to))
    assert plan.widths == (width,) * 6 + (48,)
    assert plan.groups == tuple(range(7))


def test_a_share_that_floats_cannot_hold_is_not_rounded_away():
    model = tiny_model(hidden_size=640, head_dim=8, num_hidden_layers=1)
    assert make_plan(model, SliceOptions(sparsity=0.1)).widths[0] == 576  # (1 - 0.1) * 640 is 576 in mathematics


def test_what_the_head_reads():
    model = tiny_model()
    assert make_plan(model, SliceOptions(sparsity=0.25, slice_head=True)).widths == (32,) * 7
    shared = make_plan(model, SliceOptions(sparsity=0.25, basis="shared"))
    assert shared.widths == (32,) * 7
    assert shared.groups == (0,) * 7


@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_target_params_counts_what_is_stored(family, basis):
    model = tiny_model(family)
    options = dict(basis=basis, round_to=4, slice_head=Decoder(model).architecture.keeps_width, progress=False)
    sliced = slice_model(model, [tokens(4, 32)], target_params=0.8, **options)
    share = block_parameters(sliced) / block_parameters(model)
    assert share <= 0.8
    width = sliced.config.quantization_config.widths[0]
    wider = slice_model(model, [tokens(4, 32)], sparsity=1 - (width + 4) / 48, **options)
    assert block_parameters(wider) / block_parameters(model) > 0.8


def test_sliced_state_dict_holds_only_narrow_weights():
    model = tiny_model(tied=True)
    sliced = slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in sliced.state_dict().items()
        if ".1." in name or "layers" not in name
    }
    assert shapes == {
        "model.embed_tokens.weight": (97, 32),
        "model.layers.1.self_attn.q_proj.weight": (48, 32),
        "model.layers.1.self_attn.q_proj.bias": (48,),
        "model.layers.1.self_attn.k_proj.weight": (24, 32),
        "model.layers.1.self_attn.k_proj.bias": (24,),
        "model.layers.1.self_attn.v_proj.weight": (24, 32),
        "model.layers.1.self_attn.v_proj.bias": (24,),
        "model.layers.1.self_attn.o_proj.weight": (32, 48),
        "model.layers.1.self_attn.o_proj.bias": (32,),
        "model.layers.1.mlp.gate_proj.weight": (80, 32),
        "model.layers.1.mlp.gate_proj.bias": (80,),
        "model.layers.1.mlp.up_proj.weight": (80, 32),
        "model.layers.1.mlp.up_proj.bias": (80,),
        "model.layers.1.mlp.down_proj.weight": (32, 80),
        "model.layers.1.mlp.down_proj.bias": (32,),
        "model.layers.1.attention_shortcut.weight": (32, 32),
        "model.layers.1.feedforward_shortcut.weight": (32, 32),
        "lm_head.weight": (97, 48),
    }


def test_shortcuts_are_products_of_bases():
    from slicegpt_fast.slicing import apply_bases, find_bases

    model = tiny_model()
    bases = find_bases(model, [tokens(4, 32)], make_plan(model, SliceOptions(sparsity=0.25)), progress=False)
    sliced = apply_bases(model, bases, progress=False)
    for index, layer in enumerate(sliced.model.layers):
        first, second, third = bases.matrices[2 * index : 2 * index + 3]
        torch.testing.assert_close(layer.attention_shortcut.weight, (first.T @ second).T.float())
        torch.testing.assert_close(layer.feedforward_shortcut.weight, (second.T @ third).T.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "x"}, "sparsity must be a number, not 'x'"),
        ({"target_params": "0.5"}, "target_params must be a number, not '0.5'"),
        ({"widths": 32}, "widths must be a list with the size of every norm site, not 32"),
        ({"widths": [True] * 7}, "has 7 sizes and does not fit a model of 7 norm sites"),
        ({"widths": [32] * 3}, "has 3 sizes and does not fit"),
        ({"sparsity": 0.1, "shortcut": "aligned", "shortcut_rank": 2.5}, "to a rank of 0 or more, not 2.5"),
        ({}, "exactly one of sparsity, target_params and widths"),
        ({"sparsity": 0.1, "target_params": 0.9}, "exactly one of sparsity, target_params and widths"),
        ({"sparsity": 1.0}, r"sparsity must be at least 0 and below 1, not 1\.0"),
        ({"sparsity": -0.1}, r"sparsity must be at least 0 and below 1, not -0\.1"),
        ({"sparsity": float("nan")}, "sparsity must be at least 0"),
        ({"sparsity": 0.9}, r"sparsity 0\.9 keeps 4 of 48 directions, which round_to=8 rounds to zero"),
        ({"target_params": 0.0}, r"target_params must be above 0 and at most 1, not 0\.0"),
        ({"target_params": 1.2}, r"target_params must be above 0 and at most 1, not 1\.2"),
        (
            {"target_params": 0.05, "basis": "per-norm"},
            r"target_params 0\.05 cannot be met: the smallest slice \(d=8\) still stores 0\.\d+",
        ),
        ({"sparsity": 0.1, "round_to": 0}, "round_to must be 'auto' or a whole number of at least 1, not 0"),
        (
            {"sparsity": 0.1, "basis": "pca"},
            "basis must be 'per-norm', 'shared' or a number of groups from 1 to 6, not 'pca'",
        ),
        ({"sparsity": 0.1, "basis": ["shared"]}, r"basis must be .*, not \['shared'\]"),
        ({"sparsity": 0.1, "basis": 2.0}, r"basis must be .*, not 2\.0"),
        ({"sparsity": torch.tensor(0.1)}, r"sparsity must be a number, not tensor\("),
        ({"widths": 40}, r"widths must be a list with the size of every norm site, not 40"),
        ({"widths": np.full(7, 40.0)}, r"the plan \(widths, .* does not fit"),
        ({"widths": torch.full((7,), 40)}, r"the plan \(widths, .* does not fit"),
        ({"sparsity": 0.1, "signal": "output"}, "signal must be one of 'raw', 'normalized', not 'output'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        slice_model(tiny_model(), [tokens(4, 32)], progress=False, **arguments)


@pytest.mark.parametrize(
    ("of_numpy", "of_python"),
    [
        (dict(widths=list(np.full(7, 40))), dict(widths=[40] * 7)),
        (dict(widths=np.full(7, 40)), dict(widths=[40] * 7)),
        (dict(sparsity=np.float32(0.25)), dict(sparsity=0.25)),
        (
            dict(target_params=np.float32(0.75), basis="shared", round_to=np.int32(4)),
            dict(target_params=0.75, basis="shared", round_to=4),
        ),
        (dict(sparsity=np.float16(0.25), basis=np.int64(3)), dict(sparsity=0.25, basis=3)),
        (
            dict(sparsity=0.25, shortcut="aligned", shortcut_rank=np.uint8(3)),
            dict(sparsity=0.25, shortcut="aligned", shortcut_rank=3),
        ),
    ],
)
def test_numbers_of_numpy_are_numbers(of_numpy, of_python, tmp_path):
    sliced = slice_model(tiny_model(), [tokens(4, 32)], progress=False, **of_numpy)
    assert slice_config_of(sliced).plan() == make_plan(tiny_model(), SliceOptions(**of_python))
    sliced.save_pretrained(tmp_path / "sliced")  # as JSON, which knows no numpy


def adapted(config):
    def adapt(model):
        return peft.get_peft_model(model, config).get_base_model()

    return adapt


lora = adapted(peft.LoraConfig(target_modules=["q_proj"]))


class Quantised(torch.Tensor):
    """What quantisation libraries put into a parameter: another class of tensor, with a dtype as before."""


def other_tensors(path):
    def replace(model):
        weight = model.get_submodule(path).weight.detach()
        model.get_submodule(path).weight = nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)
        return model

    return replace


def normalised_weight(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def gpt2_with_two_heads(_):
    sizes = dict(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    return GPT2DoubleHeadsModel(GPT2Config(**sizes)).eval()


def with_a_probe(model):
    model.probe = nn.Linear(48, 1)  # reads the stream, which will be narrower
    return model


def on_meta(model):
    return model.to("meta")


def quantised(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def spread_over_devices(model):
    model.model.layers[1].to("meta")
    return model


def already_sliced(model):
    return slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (already_sliced, "the model is sliced or quantised already"),
        (on_meta, "is on the meta device"),
        (
            quantised,
            r"the model is quantised \(bitsandbytes\): slice the unquantised model with basis='shared', export it, and",
        ),
        (
            spread_over_devices,
            r"is spread over several devices \(cpu, meta\): load it on one device, or slice from file",
        ),
        (lora, r"model\.layers\.0\.self_attn\.q_proj is a peft\.tuners\.lora\.layer\.Linear, not a torch\.nn"),
        (
            adapted(peft.LoraConfig(target_modules=["lm_head"])),
            r"lm_head is a peft\..*Linear, not a .*adapters merged",
        ),
        (
            adapted(peft.LoraConfig(target_modules=["embed_tokens"])),
            r"embed_tokens is a peft\..*Embedding, not a",
        ),
        (adapted(peft.LNTuningConfig(task_type="CAUSAL_LM")), r"is a peft\..*, not a .*adapters merged"),
        (normalised_weight, r"lm_head is a .*ParametrizedLinear, not a "),
        (
            other_tensors("lm_head"),
            r"lm_head\.weight is a .*Quantised, not a plain parameter: slice the model before it is quant",
        ),
        (other_tensors("model.layers.1.mlp.up_proj"), r"up_proj\.weight is a .*Quantised, not a plain parameter"),
        (other_tensors("model.norm"), r"model\.norm\.weight is a .*Quantised, not a plain parameter"),
        (
            gpt2_with_two_heads,
            r"the model is a .*GPT2DoubleHeadsModel, and slicing knows the causal langu",
        ),
        (with_a_probe, r"probe is a .*Linear that a stock LlamaForCausalLM lacks"),
        (lambda model: model.model, "LlamaModel has no language head"),
        (lambda model: nn.Linear(3, 3), "model must be a transformers causal language model, not Linear"),
        (
            lambda model: BertLMHeadModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
            "'bert' cannot be sliced: it is an encoder",
        ),
        (lambda model: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1)), "'t5' is not supported"),
    ],
)
def test_models_that_cannot_be_sliced_are_refused(spoil, message):
    with pytest.raises(InputError, match=message):
        slice_model(spoil(tiny_model()), [tokens(4, 32)], sparsity=0.25, progress=False)


@pytest.mark.parametrize(
    "work",
    [
        lambda model: slice_model(model, [tokens(4, 32)], sparsity=0.25),
        lambda model: quantize_model(model, 8),
        patch_model,
    ],
    ids=["slice", "quantize", "patch"],
)
def test_something_else_in_the_place_of_a_layer_is_refused(work):
    model = tiny_model()
    model.model.layers[1] = nn.Sequential(model.model.layers[1])
    with pytest.raises(InputError, match=r"model.layers.1 is a Sequential, which has no input_layernorm: put"):
        work(model)


def test_integer_weights_are_refused():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(80, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"up_proj\.weight has dtype torch\.int8"):
        make_plan(model, SliceOptions(sparsity=0.25))


def test_the_dense_model_class_is_kept():
    model = tiny_model("qwen3")
    assert type(slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)) is type(model)
    assert AutoModelForCausalLM._model_mapping[type(model.config)] is type(model)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_families_that_hold_the_stream_to_one_width(family):
    with pytest.raises(
        InputError, match=f"the code of {family} models holds the stream to one width: use slice_head=True"
    ):
        make_plan(tiny_model(family), SliceOptions(sparsity=0.25))
    make_plan(tiny_model(family), SliceOptions(sparsity=0.25, slice_head=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG_MAPPING["opt"](do_layer_norm_before=False), "this OPT normalises after its residual additions"),
        (CONFIG_MAPPING["olmo2"](), "model type 'olmo2' cannot be sliced: a weighted norm stands between"),
        (CONFIG_MAPPING["gemma2"](), "model type 'gemma2' cannot be sliced: a weighted norm stands between"),
        (CONFIG_MAPPING["t5"](), "model type 't5' is not supported: slicegpt-fast slices .*llama, mellum"),
    ],
)
def test_families_the_method_does_not_apply_to(config, message):
    with pytest.raises(InputError, match=message):
        architecture_of(config)


def test_bases_of_another_model_are_refused():
    from slicegpt_fast.slicing import apply_bases, find_bases

    deep = tiny_model(num_hidden_layers=4)
    bases = find_bases(deep, [tokens(4, 32)], make_plan(deep, SliceOptions(sparsity=0.25)), progress=False)
    with pytest.raises(InputError, match="does not fit a model of 7 norm sites and hidden size 48"):
        apply_bases(tiny_model(), bases, progress=False)
