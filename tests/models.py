"""Small random models that hide nothing: uneven norms, biases and spectra, nonzero embedding means, an unusual eps."""

import copy

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slicegpt_fast.architectures import Decoder, architecture_of

VOCABULARY = 97
EPS = 3e-4

SIZES = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128
)
GROUPED = SIZES | dict(num_key_value_heads=2, head_dim=12, rms_norm_eps=EPS)
NEOX = SIZES | dict(layer_norm_eps=EPS, rotary_pct=0.5)
STABLELM = SIZES | dict(num_key_value_heads=2, layer_norm_eps=EPS, use_qkv_bias=True, partial_rotary_factor=0.5)
SPANS = ("sliding", "full", "sliding")
MIXTURE = GROUPED | dict(moe_intermediate_size=40, num_experts_per_tok=2)
LATENT = GROUPED | dict(
    num_key_value_heads=4,
    head_dim=4,
    q_lora_rank=16,
    kv_lora_rank=20,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=12,
)
ROUTED = dict(n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32, llama_4_scaling_beta=0.1)
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

# Whose code differs from another family's in few lines: most of the tests of these are slow ones.
FAMILIES |= (
    LATER := {
        "apertus": ("apertus", GROUPED | dict(attention_bias=True)),
        "arcee": ("arcee", GROUPED | dict(attention_bias=True, mlp_bias=True)),
        "biogpt": ("biogpt", SIZES | dict(scale_embedding=True)),
        "bitnet": ("bitnet", GROUPED | dict(attention_bias=True)),
        "cohere": (
            "cohere",
            SIZES | dict(num_key_value_heads=2, layer_norm_eps=EPS, attention_bias=True, pad_token_id=0),
        ),
        "cohere2": (
            "cohere2",
            SIZES | dict(num_key_value_heads=2, head_dim=12, layer_norm_eps=EPS, sliding_window=8, pad_token_id=0),
        ),
        "cohere2-moe": (
            "cohere2_moe",
            SIZES
            | dict(num_key_value_heads=2, head_dim=12, layer_norm_eps=EPS, sliding_window=8, pad_token_id=0)
            | dict(num_experts=4, num_experts_per_tok=2, first_k_dense_replace=1),
        ),
        "cwm": ("cwm", GROUPED | dict(sliding_window=8, layer_types=[f"{span}_attention" for span in SPANS])),
        "deepseek-v2": ("deepseek_v2", LATENT | ROUTED | dict(moe_intermediate_size=40, num_experts_per_tok=2)),
        "deepseek-v3": ("deepseek_v3", LATENT | ROUTED | dict(moe_intermediate_size=40, num_experts_per_tok=2)),
        "dots1": ("dots1", MIXTURE | ROUTED | dict(layer_types=["full_attention"] * 3, attention_bias=True)),
        "ernie4_5": ("ernie4_5", GROUPED | dict(use_bias=True)),
        "exaone-moe": (
            "exaone_moe",
            MIXTURE
            | dict(num_experts=4, num_shared_experts=1, sliding_window=8, n_group=1, topk_group=1)
            | dict(mlp_layer_types=["dense", "sparse", "sparse"]),
        ),
        "gemma": ("gemma", GROUPED | dict(attention_bias=True)),
        "gpt-bigcode": (
            "gpt_bigcode",
            dict(n_embd=48, n_inner=80, n_layer=3, n_head=4, n_positions=128, layer_norm_epsilon=EPS),
        ),
        "gpt-bigcode-heads": (
            "gpt_bigcode",
            dict(
                n_embd=48, n_inner=80, n_layer=3, n_head=4, n_positions=128, layer_norm_epsilon=EPS, multi_query=False
            ),
        ),
        "gpt-neo": (
            "gpt_neo",
            dict(
                hidden_size=48,
                intermediate_size=80,
                num_layers=3,
                num_heads=4,
                max_position_embeddings=128,
                window_size=8,
                attention_types=[[["global", "local", "local"], 1]],
                layer_norm_epsilon=EPS,
            ),
        ),
        "gptj": (
            "gptj",
            dict(n_embd=48, n_inner=80, n_layer=3, n_head=4, n_positions=128, rotary_dim=6, layer_norm_epsilon=EPS),
        ),
        "glm": ("glm", GROUPED | dict(attention_bias=True, partial_rotary_factor=0.5, pad_token_id=0)),
        "glm4-moe": ("glm4_moe", MIXTURE | ROUTED | dict(use_qk_norm=True, attention_bias=True)),
        "glm4-moe-lite": ("glm4_moe_lite", LATENT | ROUTED | dict(moe_intermediate_size=40, num_experts_per_tok=2)),
        "granite": (
            "granite",
            GROUPED
            | dict(attention_bias=True, mlp_bias=True, residual_multiplier=0.4, embedding_multiplier=3.0)
            | dict(attention_multiplier=0.2, logits_scaling=2.0),
        ),
        "helium": ("helium", GROUPED | dict(attention_bias=True)),
        "hunyuan": ("hunyuan_v1_dense", GROUPED),
        "hunyuan-moe": ("hunyuan_v1_moe", GROUPED | dict(num_experts=4, moe_topk=2)),
        "hy-v3": (
            "hy_v3",
            MIXTURE | dict(num_experts=4, num_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"]),
        ),
        "hyperclovax": (
            "hyperclovax",
            GROUPED | dict(attention_bias=True, mlp_bias=True, residual_multiplier=0.4, use_post_norm=False),
        ),
        "internlm3": ("internlm3", GROUPED | dict(bias=True, qkv_bias=True)),
        "iquestcoder": ("iquestcoder", GROUPED),
        "jais2": ("jais2", SIZES | dict(num_key_value_heads=2, head_dim=12, layer_norm_eps=EPS)),
        "mellum": ("mellum", MIXTURE | dict(num_experts=4, sliding_window=8)),
        "minicpm3": ("minicpm3", LATENT | dict(scale_depth=0.7, dim_model_base=16, pad_token_id=0)),
        "minimax-m2": ("minimax_m2", GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)),
        "ministral": ("ministral", GROUPED | dict(sliding_window=8)),
        "ministral3": ("ministral3", GROUPED | dict(rope_parameters=YARN)),
        "nemotron": (
            "nemotron",
            SIZES | dict(num_key_value_heads=2, head_dim=12, norm_eps=EPS, attention_bias=True, mlp_bias=True),
        ),
        "olmoe": ("olmoe", GROUPED | dict(num_experts=4, num_experts_per_tok=2)),
        "persimmon": ("persimmon", SIZES | dict(layer_norm_eps=EPS, qk_layernorm=True)),
        "qwen2-moe": (
            "qwen2_moe",
            MIXTURE | dict(num_experts=4, shared_expert_intermediate_size=24, decoder_sparse_step=2),
        ),
        "seed_oss": ("seed_oss", GROUPED | dict(attention_bias=True, mlp_bias=True)),
        "smollm3": ("smollm3", GROUPED | dict(no_rope_layer_interval=2, pad_token_id=0)),
        "solar-open": ("solar_open", MIXTURE | ROUTED),
        "starcoder2": ("starcoder2", SIZES | dict(num_key_value_heads=2, norm_epsilon=EPS, use_bias=True)),
        "vaultgemma": ("vaultgemma", GROUPED | dict(sliding_window=8)),
        "youtu": ("youtu", LATENT),
    }
)


def config_of(family: str, **overrides) -> PreTrainedConfig:
    """The config of :func:`tiny_model`."""
    model_type, sizes = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2) | sizes | overrides)


ROWS = {family: architecture_of(config_of(family)) for family in FAMILIES}
ONE_WIDTH = [family for family, row in ROWS.items() if row.keeps_width]
CHANNELS, VALUES = ([family for family, row in ROWS.items() if axis in row.axes] for axis in ("channels", "values"))
CUTTABLE = [family for family in CHANNELS if family in VALUES]


def sparse_layers(model: PreTrainedModel) -> int:
    """How many decoder layers have a mixture of experts, which stays unfused."""
    layers = Decoder(model).layers
    return sum(any(parameter.ndim == 3 for parameter in layer.parameters()) for layer in layers)


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in fp64."""
    copied = copy.deepcopy(model)
    if hasattr(copied, "set_experts_implementation") and sparse_layers(copied):
        copied.set_experts_implementation("eager")  # grouped matmuls know no fp64
    return copied.double()


def tiny_model(
    family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A model of 3 layers and hidden size 48: 4 query heads over 2 key heads, biases where the family has them."""
    config = config_of(family, tie_word_embeddings=tied, **overrides)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if dtype != torch.float32:  # buffers as from_pretrained makes them, not from 16-bit numbers
        buffers = dict(AutoModelForCausalLM.from_config(config, dtype=torch.float32).named_buffers())
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name]
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
