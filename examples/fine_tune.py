"""Recover some of a sliced model's quality: train LoRA adapters on text, merge them, save the model.

python examples/fine_tune.py sliced corpus.txt recovered        (pip install peft)
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import slicegpt_fast as sf

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder of a sliced model")
parser.add_argument("text", type=Path, help="text file")
parser.add_argument("out", help="new folder")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--learning-rate", type=float, default=2e-4)
options = parser.parse_args()

tokenizer = sf.load_tokenizer(options.model)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(sf.load_model(options.model, dtype=torch.float32), lora).train()
batches = sf.token_batches(tokenizer, options.text.read_text(), length=options.length, sequences=None)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.learning_rate)
for step in range(options.steps):
    batch = batches[step % len(batches)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

sf.save_model(model.merge_and_unload().eval(), options.out, tokenizer)
