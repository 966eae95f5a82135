"""Small random models that hide nothing: uneven norms, biases and spectra, nonzero embedding means, an unusual eps."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 97


def tiny_model(
    family: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32, **overrides
) -> PreTrainedModel:
    """A model of 3 layers and hidden size 48: 4 query heads over 2 key heads, biases where the family has them."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=128,
        rms_norm_eps=3e-4,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    if family == "llama":
        sizes |= dict(attention_bias=True, mlp_bias=True)
    config = CONFIG_MAPPING[family](**sizes | overrides)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:  # columns of very different size: an uneven spectrum
                values *= torch.logspace(0, -1.5, parameter.shape[1])[
                    torch.randperm(parameter.shape[1], generator=generator)
                ]
            elif "norm" in name:
                values = 1 + 0.5 * values
            if name == "model.embed_tokens.weight":
                values += 0.7
            parameter.copy_(values)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
