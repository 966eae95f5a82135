"""Small random models that hide nothing: uneven norms, biases and spectra, nonzero embedding means, an unusual eps."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
EPS = 3e-4

SIZES = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=12, rms_norm_eps=EPS)
NEOX = SIZES | dict(layer_norm_eps=EPS, rotary_pct=0.5)
STABLELM = SIZES | dict(num_key_value_heads=2, layer_norm_eps=EPS, use_qkv_bias=True, partial_rotary_factor=0.5)
FALCON = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, layer_norm_epsilon=EPS, bias=True, alibi=False
)

LLAMA_FAMILIES = {
    "llama": ("llama", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", GROUPED | dict(sliding_window=8)),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | dict(attention_bias=True)),
}
FAMILIES = LLAMA_FAMILIES | {
    "phi3": ("phi3", GROUPED | dict(pad_token_id=0)),
    "mixtral": ("mixtral", GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": (
        "qwen3_moe",
        GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, decoder_sparse_step=2),
    ),
    "opt": (
        "opt",
        dict(hidden_size=48, word_embed_proj_dim=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4),
    ),
    "phi": (
        "phi",
        SIZES | dict(num_key_value_heads=2, layer_norm_eps=EPS, partial_rotary_factor=0.5, qk_layernorm=True),
    ),
    "gpt2": ("gpt2", dict(n_embd=48, n_inner=80, n_layer=3, n_head=4, n_positions=128, layer_norm_epsilon=EPS)),
    "gpt-neox": ("gpt_neox", NEOX),
    "gpt-neox-sequential": ("gpt_neox", NEOX | dict(use_parallel_residual=False)),
    "stablelm": ("stablelm", STABLELM),
    "stablelm-parallel": ("stablelm", STABLELM | dict(use_parallel_residual=True)),
    "falcon-7b": ("falcon", FALCON | dict(parallel_attn=True, multi_query=True)),
    "falcon-11b": ("falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    "falcon-40b": ("falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=2)),
    "falcon-rw": ("falcon", FALCON | dict(parallel_attn=False, multi_query=False, alibi=True)),
}


def tiny_model(
    family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A model of 3 layers and hidden size 48: 4 query heads over 2 key heads, biases where the family has them."""
    model_type, sizes = FAMILIES[family]
    common = dict(vocab_size=VOCABULARY, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    config = CONFIG_MAPPING[model_type](**common | sizes | overrides)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:  # columns of very different size: an uneven spectrum
                scale = torch.logspace(0, -1.5, parameter.shape[-1])
                values *= scale[torch.randperm(parameter.shape[-1], generator=generator)]
            elif ("norm" in name or "ln_" in name) and name.endswith("weight"):
                values = 1 + 0.5 * values
            if "embed" in name or "wte" in name:
                values += 0.7
            parameter.copy_(values)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
