"""attend against its reference, and against rotary embedding, torch.cat and attention as transformers runs them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timing import DEVICE, MACHINE, by_kernel, copies, random

from slicegpt_fast.ops import attend

# Query heads, key and value heads, numbers of a head: SmolLM2-135M's, Llama-2-7B's, Llama-3-8B's.
SMOLLM2, LLAMA_2, LLAMA_3 = (9, 3, 64), (32, 32, 128), (32, 8, 128)
LAYERS = {
    "cuda": [(*heads, S) for heads in (LLAMA_2, LLAMA_3) for S in (1024, 4096)],
    "cpu": [pytest.param(*SMOLLM2, 512, marks=pytest.mark.quick), (*SMOLLM2, 4096), (*LLAMA_3, 1024)],
    "tiny": [(4, 2, 16, 40)],
}[MACHINE]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"], "tiny": ["float16"]}[MACHINE]
TOKENS = {"cuda": [1, 8], "cpu": [1, 4], "tiny": [1, 4]}[MACHINE]


def rotate(x, cosine, sine):
    a, b = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-b, a], dim=-1) * sine


def torch_formulation(q, k, v, cosine, sine, keys, values, mask):
    """x [B, T, heads, D] onto caches that are no longer than what they hold, as a dynamic cache keeps them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    cosine, sine = cosine[:, None], sine[:, None]
    keys, values = torch.cat([keys, rotate(k, cosine, sine)], dim=2), torch.cat([values, v], dim=2)
    y = F.scaled_dot_product_attention(rotate(q, cosine, sine), keys, values, attn_mask=mask, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "D", "S"), LAYERS)
def bench_attend(measure, H, G, D, S, dtype, T):
    """S positions with the new tokens, one sequence."""
    qkv = random(1, T, H + 2 * G, D, dtype=dtype).split([H, G, G], dim=2)
    angles = [random(1, T, D, dtype=dtype) for _ in range(2)]
    room = torch.stack([random(1, G, S, D, dtype=dtype) for _ in range(2)])
    mask = torch.ones(T, S, dtype=torch.bool, device=DEVICE).tril(S - T) if T > 1 else None
    start = torch.tensor(S - T, device=DEVICE)

    def contenders():
        caches = [room.clone() for _ in range(copies(room.nbytes, T))]
        filled = [cache[:, :, :, : S - T].clone() for cache in caches]

        def on(backend):
            return [partial(attend, *qkv, *angles, *pair, start, D**-0.5, backend=backend) for pair in caches]

        by_torch = {"torch": [partial(torch_formulation, *qkv, *angles, *pair, mask) for pair in filled]}
        if DEVICE.type == "cuda":  # the reference reads `start` on the host, which no captured graph can
            return by_kernel(on) | by_torch
        return {"auto": on("auto"), "reference": on("reference")} | by_torch

    measure(contenders, dtype=dtype, bytes=room.nbytes, flops=4 * T * H * D * S)
