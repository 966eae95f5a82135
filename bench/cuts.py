"""Perplexity of cut models, predicted and measured: MLP channels alone, and with V/O ranks, at three budgets.

    python bench/cuts.py [--windows 24]

The model, the text and the held-out windows are the quickstart's (see perplexity.py). Cuts are made in a copy of the
dense model: the MLPs' weights are narrowed, value vectors are projected to the directions that they would keep.
"""

import argparse
import copy
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slicegpt_fast import load_model, load_tokenizer, perplexity
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.quickstart import CHARACTERS, FIRST_HELD_OUT, HELD_OUT, LENGTH, smollm2, wikipedia_leads
from slicegpt_fast.slicing import block_parameters
from slicegpt_fast.slicing.cuts.allocation import Cost, Cut, allocate
from slicegpt_fast.slicing.cuts.channels import eliminate, repair, survivors
from slicegpt_fast.slicing.cuts.curve import Curve
from slicegpt_fast.slicing.cuts.sensitivity import Sensitivity, WriterStatistics, measure_sensitivity
from slicegpt_fast.slicing.cuts.values import principal_values, project, refit

BUDGETS = (0.9, 0.8, 0.7)


class Cuts:
    """The cuts of a Llama: orders of channels, bases of values, and their curves, layer by layer."""

    def __init__(self, model, statistics: Sensitivity) -> None:
        config = model.config
        self.model, self.statistics, self.heads = model, statistics, config.num_key_value_heads
        self.sharing = config.num_attention_heads // self.heads
        self.orders, self.bases, self.channels, self.values = [], [], [], []
        for index, layer in enumerate(model.model.layers):
            there = self.of(index, "mlp.down_proj")
            order, curve = eliminate(rows(layer.mlp.down_proj), there.inputs, there.gradients)
            self.orders.append(order)
            self.channels.append(Cut(curve, Cost(3)))
            there, attention = self.of(index, "self_attn.o_proj"), layer.self_attn
            bases, curve = principal_values(
                rows(attention.o_proj), there.inputs, there.gradients, heads=self.heads, head_dim=attention.head_dim
            )
            self.bases.append(bases)
            self.values.append(Cut(curve, Cost(self.heads * (1 + self.sharing))))

    def of(self, index: int, writer: str) -> WriterStatistics:
        return self.statistics.writers[f"model.layers.{index}.{writer}"][0]

    @torch.no_grad()
    def apply(self, channels: Sequence[int], ranks: Sequence[int]):
        """A copy of the model with the cuts made."""
        made = copy.deepcopy(self.model)
        for index, (layer, size, rank) in enumerate(zip(made.model.layers, channels, ranks, strict=True)):
            mlp, attention, bases = layer.mlp, layer.self_attn, self.bases[index]
            kept = survivors(self.orders[index], size)
            inputs = self.of(index, "mlp.down_proj").inputs
            mlp.down_proj.weight = nn.Parameter(repair(rows(mlp.down_proj), inputs, kept).T.float().contiguous())
            for reader in (mlp.gate_proj, mlp.up_proj):
                reader.weight = nn.Parameter(reader.weight[kept])
            basis = bases[:, :, :rank]
            values = project(attention.v_proj.weight, bases, rank).unflatten(0, (self.heads, rank))
            attention.v_proj.weight.copy_((basis @ values).flatten(0, 1))
            inputs = self.of(index, "self_attn.o_proj").inputs
            fitted = refit(rows(attention.o_proj), inputs, bases, rank).unflatten(0, (self.heads, self.sharing, rank))
            attention.o_proj.weight.copy_((basis[:, None] @ fitted).flatten(0, 2).T)
        return made


def rows(linear: nn.Linear) -> Tensor:
    """A writer's weight with one row per input."""
    return linear.weight.detach().T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help="calibration windows (%(default)s)")
    options = parser.parse_args()
    model, tokenizer = load_model(smollm2()), load_tokenizer(smollm2())
    text = join_documents(wikipedia_leads(), seed=0)[:CHARACTERS]
    windows = token_windows(tokenizer, text, LENGTH, count=FIRST_HELD_OUT + HELD_OUT)
    held_out = batched(windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT])
    dense, whole = perplexity(model, held_out), block_parameters(model)
    start = time.perf_counter()
    statistics = measure_sensitivity(model, batched(windows[: options.windows]))
    measured = time.perf_counter()
    cuts = Cuts(model, statistics)
    print(f"statistics {measured - start:.0f} s, curves {time.perf_counter() - measured:.0f} s, dense {dense:.2f}")
    head_dim, width = model.model.layers[0].self_attn.head_dim, model.config.hidden_size
    uncut = [Cut(Curve((head_dim,), (0.0,)), cut.cost) for cut in cuts.values]
    stream = Curve((width,), (0.0,))
    for name, values in {"channels": uncut, "channels and values": cuts.values}.items():
        axes = [*cuts.channels, *values]
        fixed = Cost((whole - sum(cut.cost.at(width) * cut.curve.sizes[0] for cut in axes)) // width)
        for budget in BUDGETS:
            (best,) = allocate(axes, stream, fixed, int(budget * whole))
            sizes = best.sizes[: len(uncut)], best.sizes[len(uncut) :]
            found = perplexity(cuts.apply(*sizes), held_out)
            increase = f"predicted {best.loss:.3f}, measured {math.log(found / dense):.3f}"
            print(f"{name}, {best.stored / whole:.3f} of the blocks: perplexity {found:.2f}; {increase}")


if __name__ == "__main__":
    main()
