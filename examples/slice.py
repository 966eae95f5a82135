"""Slice a model, compare it with the dense one on other text, and save it.

python examples/slice.py MODEL corpus.txt held-out.txt sliced --target-params 0.8
"""

import argparse
from pathlib import Path

import slicegpt_fast as sf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="hub id, folder or GGUF file")
parser.add_argument("text", type=Path, help="text file to calibrate on")
parser.add_argument("held_out", type=Path, help="text file to measure perplexity on")
parser.add_argument("out", help="new folder")
parser.add_argument("--target-params", type=float, default=0.8, help="share of the blocks' parameters to keep")
parser.add_argument("--sequences", type=int, default=64, help="of the calibration text")
parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
options = parser.parse_args()

dense, tokenizer = sf.load_model(options.model), sf.load_tokenizer(options.model)
calibration = sf.token_batches(tokenizer, options.text.read_text(), length=options.length, sequences=options.sequences)
held_out = sf.token_batches(tokenizer, options.held_out.read_text(), length=options.length, sequences=None)

sliced = sf.slice_model(dense, calibration, target_params=options.target_params)
for name, model in {"dense": dense, "sliced": sliced}.items():
    print(f"{name}: {model.num_parameters():,} parameters, perplexity {sf.perplexity(model, held_out):.2f}")
sf.save_model(sliced, options.out, tokenizer)
