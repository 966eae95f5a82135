"""How much of the perplexity that a cut lost comes back by training, on two sorts of text, against the time it takes.

    python bench/recovery.py [--shares 0.8 0.7] [--steps 60 240] [--train all] [--out docs/benchmarks]

The model is the quickstart's. It is cut by the default plan on the first 24 windows of 512 tokens of the quickstart's
documents, as in perplexity.py, and learns from windows behind those of perplexity.py. Perplexity is that of
perplexity.py's 12 windows, which are neither learnt from nor choose the weights; 8 others do. Python source, of which
nothing is learnt, is the other sort of text. Minutes are those of recover_model, the teacher's predictions included.
Rows that are in the JSON already are not measured again.
"""

import argparse
import copy
import json
import platform
import time
from datetime import date
from pathlib import Path

import psutil
import torch
import transformers
from markdown_table import table
from perplexity import CALIBRATION, FIRST_HELD_OUT, HELD_OUT, LENGTH

from slicegpt_fast import load_model, load_tokenizer, perplexity, recover_model, slice_model
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.quickstart import python_source, smollm2, wikipedia_leads

FIRST_LEARNT = 200  # window, behind those that perplexity.py uses
CHOOSE = 8  # windows before these choose the weights
PER_STEP = 2  # windows


def markdown(results: dict) -> str:
    """The rows as a table."""
    shown = [
        {
            "share": f"{row['share']:g}",
            "trained": row["train"],
            "steps": str(row["steps"]),
            "tokens": f"{row['tokens'] / 1000:.0f} k",
            "minutes": f"{row['minutes']:.0f}",
            "leads": "{:.2f} → {:.2f}".format(*row["leads"]),
            "won back": f"{won_back(results, row):.0%}",
            "Python source": "{:.2f} → {:.2f}".format(*row["code"]),
            "GB": f"{row['gigabytes']:.1f}",
        }
        for row in results["rows"]
    ]
    lines = [
        "# What training wins back: SmolLM2-135M-Instruct",
        "",
        f"Perplexity of the cut model and of the recovered one. Dense: {results['leads']:.2f} on Wikipedia leads, "
        f"{results['code']:.2f} on Python source. Won back: of the difference to the dense model, on leads. GB: of "
        "the process, the dense model included.",
        "",
        table(shown),
        "",
        f"`bench/recovery.py`, {results['date']}, {results['versions']}, {results['machine']}.",
        "",
    ]
    return "\n".join(lines)


def won_back(results: dict, row: dict) -> float:
    before, after = row["leads"]
    return (before - after) / (before - results["leads"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.7], help="of the blocks' parameters, kept")
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 240], help="of 1024 tokens (%(default)s)")
    parser.add_argument("--train", choices=["all", "lora"], default="all", help="what is trained (%(default)s)")
    parser.add_argument("--learning-rate", type=float, help="the highest")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
    options = parser.parse_args()
    source = smollm2()
    dense, tokenizer = load_model(source), load_tokenizer(source)
    windows = token_windows(
        tokenizer, join_documents(wikipedia_leads(), seed=0), LENGTH, count=FIRST_LEARNT, limit=4000
    )
    code = token_windows(tokenizer, "\n\n".join(python_source()), LENGTH, count=HELD_OUT)[:HELD_OUT]
    texts = {"leads": batched(windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT]), "code": batched(code)}
    choose = batched(windows[FIRST_LEARNT - CHOOSE : FIRST_LEARNT])
    file = options.out / "recovery.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    results = {
        **{name: perplexity(dense, batches) for name, batches in texts.items()},
        "rows": rows,
        "date": date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    for share in options.shares:
        cut = slice_model(dense, batched(windows[:CALIBRATION]), target_params=share)
        before = {name: perplexity(cut, batches) for name, batches in texts.items()}
        for steps in options.steps:
            if any((row["share"], row["steps"], row["train"]) == (share, steps, options.train) for row in rows):
                continue
            model, learnt = copy.deepcopy(cut), windows[FIRST_LEARNT:][: steps * PER_STEP].split(PER_STEP)
            asked = dict(train=options.train, steps=steps, learning_rate=options.learning_rate)
            start = time.perf_counter()
            recovery = recover_model(model, dense, learnt, choose, **asked)
            minutes = (time.perf_counter() - start) / 60
            row = {"share": share, "steps": steps, "train": options.train, "minutes": minutes}
            row |= {"tokens": sum(each.numel() for each in learnt), "best": recovery.best.step}
            row |= {"gigabytes": psutil.Process().memory_info().rss / 1e9}
            row |= {name: (before[name], perplexity(model, batches)) for name, batches in texts.items()}
            rows.append(row)
            rows.sort(key=lambda row: (-row["share"], row["train"], row["steps"]))
            options.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n")
            (options.out / "recovery.md").write_text(markdown(results))
            print(row)


if __name__ == "__main__":
    main()
