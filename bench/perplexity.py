"""Perplexity against stored parameters, for every basis plan at five budgets, and what re-fitting does to it.

    python bench/perplexity.py [--model M] [--out docs/benchmarks]

The model is the quickstart's unless given. Protocol: the quickstart's documents shuffled by random.Random(0), joined
by a blank line, the first 1.2 M characters tokenised without special tokens, cut into windows of 512; calibration on
the first 24, perplexity on 12 windows from the 65th on; fp32. Re-fitting is compared on the first 24, 64 and 128
windows, with perplexity on the 48 windows after those, so that no text is in both. One JSON, one file of tables, one
figure; rows that are already in the JSON are not measured again.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from datetime import date
from itertools import chain
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from slicegpt_fast import InputError, load_model, load_tokenizer, perplexity
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.plots import plot_trade_off
from slicegpt_fast.quickstart import smollm2, wikipedia_leads
from slicegpt_fast.search import plans
from slicegpt_fast.slicing import SliceOptions, apply_bases, block_parameters, find_bases, fit_bases, make_plan
from slicegpt_fast.slicing.bases import refit_readers

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7)
LENGTH, CALIBRATION, FIRST_HELD_OUT, HELD_OUT = 512, 24, 64, 12
CHARACTERS = 1_200_000
REFIT_CALIBRATION, REFIT_HELD_OUT = (24, 64, 128), 48  # windows
REFIT_SPARSITY = 0.09  # of the shared basis: d = 520 of 576


def measure(model, calibration, held_out, rows: list[dict]) -> Iterator[None]:
    """Add the row of every plan and budget that ``rows`` lacks."""
    known = {(row["plan"], row["budget"]) for row in rows}
    names = plans(model, BUDGETS[0])
    todo = [(name, budget) for name in names for budget in BUDGETS if (name, budget) not in known]
    for name, budget in tqdm(todo, unit="slice"):
        row = {"plan": name, "budget": budget}
        try:
            bases = fit_bases(model, calibration, plans(model, budget)[name], progress=False)
        except InputError as error:
            rows.append(row | {"refused": str(error)})
            continue
        sliced = apply_bases(model, bases, progress=False)
        row |= {"width": bases.plan.widths[0], "stored": block_parameters(sliced) / block_parameters(model)}
        rows.append(row | {"perplexity": perplexity(sliced, held_out)})
        yield


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


def markdown(results: dict) -> str:
    """The rows as tables, perplexity (kept size d): a line per plan, a column per budget; and re-fitting."""
    lines = [
        f"# Perplexity against stored parameters: {results['model']}",
        "",
        f"Dense: {results['dense_perplexity']:.2f}. Each cell: perplexity (kept size d of {results['full_width']}).",
        "Columns: bound on the decoder blocks' stored parameters, shortcuts included, as a share of the dense ones.",
        "",
        "| basis plan | " + " | ".join(f"{budget:g}" for budget in BUDGETS) + " |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    cells = {(row["plan"], row["budget"]): row for row in results["rows"]}
    for name in dict.fromkeys(name for name, _ in cells):
        row = [cells.get((name, budget), {}) for budget in BUDGETS]
        shown = [f"{cell['perplexity']:.1f} ({cell['width']})" if "perplexity" in cell else "–" for cell in row]
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
    lines += ["", f"`bench/perplexity.py`, {results['date']}, {results['versions']}, {results['machine']}.", ""]
    return "\n".join(lines)


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
    held_out = batched(windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT])

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "perplexity.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    rows, refit_rows = there.get("rows", []), there.get("refit_rows", [])
    results = {
        "model": "SmolLM2-135M-Instruct" if options.model is None else options.model,
        "full_width": model.config.hidden_size,
        "dense_perplexity": perplexity(model, held_out),
        "rows": rows,
        "refit_rows": refit_rows,
        "date": date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "machine": f"{platform.machine()}",
    }
    for _ in chain(measure(model, calibration, held_out, rows), measure_refit(model, windows, refit_rows)):
        file.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "perplexity.md").write_text(markdown(results))
    plot_trade_off(
        {
            name: [(row["stored"], row["perplexity"]) for row in rows if row["plan"] == name and "perplexity" in row]
            for name in plans(model, BUDGETS[0])
        },
        results["dense_perplexity"],
        options.out / "perplexity.png",
    )


if __name__ == "__main__":
    main()
