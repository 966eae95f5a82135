"""Run a model, dense or sliced, on the fused kernels, and see which kernel serves each layer.

python examples/patch.py MODEL "The first telescope"
"""

import sys
import time

import slicegpt_fast as sf

source, prompt = sys.argv[1:]
model, tokenizer = sf.load_model(source), sf.load_tokenizer(source)
inputs = tokenizer(prompt, return_tensors="pt")


def tokens_per_second() -> float:
    """Greedy generation of 64 tokens, prefill included; the first call warms up."""
    for _ in range(2):
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    return 64 / (time.perf_counter() - start)


print(f"as it is: {tokens_per_second():.1f} tokens/s")
sf.patch_model(model)
print(f"patched: {tokens_per_second():.1f} tokens/s")
print(sf.patch_report(model))
