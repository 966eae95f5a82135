"""Perplexity against stored parameters, for every basis plan at five budgets: one JSON, one table, one figure.

    python bench/perplexity.py [--model M] [--out docs/benchmarks]

The model is the quickstart's unless given. Protocol: the quickstart's documents shuffled by random.Random(0), joined
by a blank line, the first 1.2 M characters tokenised without special tokens, cut into windows of 512; calibration on
the first 24, perplexity on 12 windows from the 65th on; fp32. Rows that are already in the JSON are not measured
again.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from slicegpt_fast import InputError, load_model, load_tokenizer, perplexity
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.quickstart import smollm2, wikipedia_leads
from slicegpt_fast.report import plot_trade_off
from slicegpt_fast.search import PLANS, plan_arguments
from slicegpt_fast.slicing import apply_bases, block_parameters, fit_bases

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.7)
LENGTH, CALIBRATION, FIRST_HELD_OUT, HELD_OUT = 512, 24, 64, 12
CHARACTERS = 1_200_000


def measure(model, calibration, held_out, rows: list[dict]) -> None:
    """Add the row of every plan and budget that ``rows`` lacks."""
    known = {(row["plan"], row["budget"]) for row in rows}
    todo = [(name, budget) for name in PLANS for budget in BUDGETS if (name, budget) not in known]
    for name, budget in tqdm(todo, unit="slice"):
        row = {"plan": name, "budget": budget}
        try:
            bases = fit_bases(model, calibration, progress=False, **plan_arguments(name, model, budget))
        except InputError as error:
            rows.append(row | {"refused": str(error)})
            continue
        sliced = apply_bases(model, bases, progress=False)
        row |= {"width": bases.plan.widths[0], "stored": block_parameters(sliced) / block_parameters(model)}
        rows.append(row | {"perplexity": perplexity(sliced, held_out)})
        yield


def markdown(results: dict) -> str:
    """The rows as a table: a line per plan, a column per budget, perplexity (kept size d)."""
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
    windows = token_windows(tokenizer, text, LENGTH, count=FIRST_HELD_OUT + HELD_OUT)
    calibration = batched(windows[:CALIBRATION])
    held_out = batched(windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT])

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "perplexity.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    results = {
        "model": "SmolLM2-135M-Instruct" if options.model is None else options.model,
        "full_width": model.config.hidden_size,
        "dense_perplexity": perplexity(model, held_out),
        "rows": rows,
        "date": date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "machine": f"{platform.machine()}",
    }
    for _ in measure(model, calibration, held_out, rows):
        file.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "perplexity.md").write_text(markdown(results))
    plot_trade_off(
        {
            name: [(row["stored"], row["perplexity"]) for row in rows if row["plan"] == name and "perplexity" in row]
            for name in PLANS
        },
        results["dense_perplexity"],
        options.out / "perplexity.png",
    )


if __name__ == "__main__":
    main()
