"""Perplexity against stored parameters, for every cut and basis plan at five budgets, and what re-fitting does to it.

    python bench/perplexity.py [--model M] [--out docs/benchmarks]

The model is the quickstart's unless given. Protocol: the quickstart's documents shuffled by random.Random(0), joined
by a blank line, the first 1.2 M characters tokenised without special tokens, cut into windows of 512; calibration on
the first 24, perplexity on 12 windows from the 65th on; fp32. What calibration does to text of another sort is seen on
12 windows of Python source, the quickstart's. The baseline drops whole layers, those that turn the stream least
(ShortGPT, arXiv 2403.03853). Re-fitting is compared on the first 24, 64 and 128 windows, with perplexity on the 48
windows after those, so that no text is in both. Fewer bits are compared on the dense model and on one that is cut,
rounded on the first 24 windows. One JSON, one file of tables, one figure; rows that are already in the JSON are not
measured again.
"""

import argparse
import copy
import json
import platform
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import chain
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from slicegpt_fast import InputError, load_model, load_tokenizer, perplexity, quantize_model, slice_model
from slicegpt_fast.architectures import Decoder, at
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.evaluation import stored_bytes, stored_parameters
from slicegpt_fast.plots import plot_trade_off
from slicegpt_fast.quickstart import python_source, smollm2, wikipedia_leads
from slicegpt_fast.search import plans
from slicegpt_fast.slicing import (
    SliceOptions,
    apply_bases,
    block_parameters,
    cut_to_budget,
    find_bases,
    fit_bases,
    make_plan,
)
from slicegpt_fast.slicing.bases import refit_readers

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7)
LENGTH, CALIBRATION, FIRST_HELD_OUT, HELD_OUT = 512, 24, 64, 12
CHARACTERS = 1_200_000
REFIT_CALIBRATION, REFIT_HELD_OUT = (24, 64, 128), 48  # windows
REFIT_SPARSITY = 0.09  # of the shared basis: d = 520 of 576
BITS_SHARES = (0.8, 1.0)
ROUNDED = {"8 bits": (8, None), "4 bits, groups of 32": (4, 32), "4 bits, groups of 64": (4, 64)}
CUTS = {"channels": ("channels",), "channels + values": ("channels", "values"), "auto": "auto"}
DROPPED = "whole layers dropped"
MEASURED = {  # of a row, with how it is written
    "perplexity": ("Perplexity on held-out Wikipedia leads (stream kept of {full_width}, where it is cut)", "{:.1f}"),
    "code": ("Perplexity on Python source", "{:.1f}"),
    "total": ("Stored parameters of the whole model, as a share of the dense one's", "{:.3f}"),
}


def make(model, calibration: Sequence[Tensor], name: str, budget: float) -> tuple[nn.Module, dict]:
    """The smaller model of a row, and what the row tells of how it was made."""
    if name in CUTS:
        options = SliceOptions(target_params=budget, cut=CUTS[name])
        result = cut_to_budget(model, calibration, options, progress=False)
        return result.model, {"width": result.plan.widths[0], "predicted": result.trials[0].sizes.loss}
    if name == DROPPED:
        made = drop_layers(model, calibration, budget)
        return made, {"width": model.config.hidden_size, "layers": made.config.num_hidden_layers}
    bases = fit_bases(model, calibration, plans(model, budget)[name], progress=False)
    return apply_bases(model, bases, progress=False), {"width": bases.plan.widths[0]}


def drop_layers(model, calibration: Sequence[Tensor], budget: float):
    """A copy of the model without the layers of least influence: one minus the cosine of the stream around a layer."""
    decoder = Decoder(model)
    influence = [0.0] * len(decoder.layers)

    def hook(index: int):
        def add(module: nn.Module, args: tuple, output) -> None:
            after = output[0] if isinstance(output, tuple) else output
            influence[index] += (1 - F.cosine_similarity(args[0], after, dim=-1)).sum().item()

        return add

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(decoder.layers)]
    with torch.inference_mode():
        for batch in calibration:
            model(input_ids=batch.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    most = sorted(range(len(influence)), key=influence.__getitem__)[-int(budget * len(influence)) :]
    made, path = copy.deepcopy(model), decoder.architecture.layers
    made.set_submodule(path, nn.ModuleList(layer for index, layer in enumerate(at(made, path)) if index in most))
    made.config.num_hidden_layers = len(most)
    return made


def measure(model, calibration, texts: dict[str, Sequence[Tensor]], rows: list[dict]) -> Iterator[None]:
    """Add the row of every plan and budget that ``rows`` lacks, or has without all that is measured."""
    known = {(row["plan"], row["budget"]) for row in rows if "refused" in row or MEASURED.keys() <= row.keys()}
    todo = [(name, budget) for name in names(model) for budget in BUDGETS if (name, budget) not in known]
    for name, budget in tqdm(todo, unit="slice"):
        rows[:] = [row for row in rows if (row["plan"], row["budget"]) != (name, budget)]
        row = {"plan": name, "budget": budget}
        try:
            made, told = make(model, calibration, name, budget)
        except InputError as error:
            rows.append(row | {"refused": str(error)})
        else:
            row |= told | {"stored": block_parameters(made) / block_parameters(model)}
            row |= {"total": stored_parameters(made) / stored_parameters(model)}
            rows.append(row | {text: perplexity(made, batches) for text, batches in texts.items()})
        yield


def names(model) -> list[str]:
    """The rows, in the order of the tables."""
    return [*CUTS, DROPPED, *plans(model, BUDGETS[0])]


def measure_refit(model, windows, rows: list[dict]) -> Iterator[None]:
    """Add the row of every amount of calibration text that ``rows`` lacks."""
    first = max(REFIT_CALIBRATION)
    held_out = batched(windows[first : first + REFIT_HELD_OUT])
    plan = make_plan(model, SliceOptions(sparsity=REFIT_SPARSITY, basis="shared", signal="normalized"))
    known = {row["windows"] for row in rows}
    for count in tqdm([count for count in REFIT_CALIBRATION if count not in known], unit="calibration"):
        calibration = batched(windows[:count])
        bases = find_bases(model, calibration, plan, progress=False)
        fitted = refit_readers(model, calibration, bases, progress=False)
        off, on = (perplexity(apply_bases(model, each, progress=False), held_out) for each in (bases, fitted))
        rows.append({"windows": count, "width": plan.widths[0], "perplexity": off, "refit_perplexity": on})
        yield


def measure_bits(model, windows, texts: dict[str, Sequence[Tensor]], rows: list[dict]) -> Iterator[None]:
    """Add the rows of every cut and number of bits that ``rows`` lacks, in 16 bits and rounded."""
    known = {(row["share"], row["bits"]) for row in rows}
    for share in tqdm(BITS_SHARES, unit="cut"):
        asked = [bits for bits in ("16 bits", *ROUNDED) if (share, bits) not in known]
        if not asked:
            continue
        cut = model
        if share < 1:
            cut = slice_model(model, batched(windows[:CALIBRATION]), target_params=share, progress=False)
        for bits in asked:
            made = cut
            if bits in ROUNDED:
                count, group = ROUNDED[bits]
                made = quantize_model(
                    cut, count, group=group, calibration=batched(windows[:CALIBRATION]), progress=False
                )
            size = stored_bytes(made) if bits in ROUNDED else stored_bytes(copy.deepcopy(made).bfloat16())
            row = {"share": share, "bits": bits, "bytes": size}
            rows.append(row | {text: perplexity(made, batches) for text, batches in texts.items()})
            yield


def bits_table(results: dict) -> list[str]:
    """Bytes and perplexity of every cut and number of bits."""
    rows = {(row["share"], row["bits"]): row for row in results["bits_rows"]}
    lines = ["| share of the blocks' parameters | weights | MB | perplexity | of 16 bits | Python source |"]
    lines.append("|---|---|---|---|---|---|")
    for (share, bits), row in rows.items():
        ratio = row["perplexity"] / rows[share, "16 bits"]["perplexity"]
        cells = (f"{share:g}", bits, f"{row['bytes'] / 1e6:.0f}", f"{row['perplexity']:.2f}", f"{ratio:.3f}")
        lines.append(f"| {' | '.join(cells)} | {row['code']:.2f} |")
    return lines


def markdown(results: dict) -> str:
    """The rows as tables, a line per plan and a column per budget; and re-fitting."""
    dense = f"Dense: {results['dense_perplexity']:.2f}, on Python source {results['dense_code']:.2f}."
    lines = [
        f"# Perplexity against stored parameters: {results['model']}",
        "",
        dense,
        "Columns: bound on the decoder blocks' stored parameters, shortcuts included, as a share of the dense ones.",
    ]
    cells = {(row["plan"], row["budget"]): row for row in results["rows"]}
    for measured, (title, form) in MEASURED.items():
        lines += ["", f"{title.format_map(results)}:", ""]
        lines += ["| cut or basis plan | " + " | ".join(f"{budget:g}" for budget in BUDGETS) + " |"]
        lines += ["|---|" + "---|" * len(BUDGETS)]
        for name in dict.fromkeys(name for name, _ in cells):
            row = [cells.get((name, budget), {}) for budget in BUDGETS]
            shown = [
                form.format(cell[measured]) + width(cell, measured, results) if measured in cell else "–"
                for cell in row
            ]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "Re-fitting against more calibration text (shared basis, normalised signal, other held-out text than above):",
        "",
        f"| calibration windows of {LENGTH} | shared | shared, re-fitted |",
        "|---|---|---|",
    ]
    for row in results["refit_rows"]:
        off, on = row["perplexity"], row["refit_perplexity"]
        lines.append(f"| {row['windows']} | {off:.2f} ({row['width']}) | {on:.2f} ({row['width']}) |")
    lines += ["", f"Fewer bits, rounded with error feedback on {CALIBRATION} windows:", "", *bits_table(results)]
    lines += ["", f"`bench/perplexity.py`, {results['date']}, {results['versions']}, {results['machine']}.", ""]
    return "\n".join(lines)


def width(row: dict, measured: str, results: dict) -> str:
    """The kept width of the stream in brackets, where it is cut, behind the perplexity."""
    return f" ({row['width']})" if measured == "perplexity" and row["width"] < results["full_width"] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file (SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
    options = parser.parse_args()
    source = options.model or smollm2()
    model, tokenizer = load_model(source), load_tokenizer(source)
    text = join_documents(wikipedia_leads(), seed=0)[:CHARACTERS]
    windows = token_windows(tokenizer, text, LENGTH, count=max(REFIT_CALIBRATION) + REFIT_HELD_OUT)
    calibration = batched(windows[:CALIBRATION])
    code = token_windows(tokenizer, "\n\n".join(python_source()), LENGTH, count=HELD_OUT)[:HELD_OUT]
    held_out = windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT]
    texts = {"perplexity": batched(held_out), "code": batched(code)}

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "perplexity.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    rows, refit_rows, bits_rows = (there.get(name, []) for name in ("rows", "refit_rows", "bits_rows"))
    order = names(model)
    results = {
        "model": "SmolLM2-135M-Instruct" if options.model is None else options.model,
        "full_width": model.config.hidden_size,
        "dense_perplexity": perplexity(model, texts["perplexity"]),
        "dense_code": perplexity(model, texts["code"]),
        "rows": rows,
        "refit_rows": refit_rows,
        "bits_rows": bits_rows,
        "date": date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "machine": f"{platform.machine()}",
    }
    measured = chain(
        measure(model, calibration, texts, rows),
        measure_refit(model, windows, refit_rows),
        measure_bits(model, windows, texts, bits_rows),
    )
    for _ in measured:
        rows.sort(key=lambda row: (order.index(row["plan"]), -row["budget"]))
        file.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "perplexity.md").write_text(markdown(results))
    plot_trade_off(
        {
            name: [(row["stored"], row["perplexity"]) for row in rows if row["plan"] == name and "perplexity" in row]
            for name in order
        },
        results["dense_perplexity"],
        options.out / "perplexity.png",
    )


if __name__ == "__main__":
    main()
