"""Turns the JSON of one or several runs into tables and figures.

    python bench/report.py RUN.json [RUN.json ...] [--out build/bench]

Prints the tables; writes KIND.md, KIND.json and KIND-*.png, KIND being the kind of machine. The runs are of one
machine and of different benchmarks.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markdown_table import table
from matplotlib.figure import Figure

HEADER = """# Benchmarks on {processor}, {threads} threads

{date}; torch {torch}, transformers {transformers}, Python {python}; commit {commit}. Made by `make bench` or, on a GPU,
`make gpu-check`.

A row is one case; its first columns say which. **ms** is what one call of this package takes. **x torch** is how many
times as fast that is as torch: 2 means half the time, below 1 means slower. Everything in a row took turns, call by
call, on the same random data. Each row was measured several times over, on a CPU minutes apart, and a time is that of
the fastest measurement (the median of its turns), since whatever else the machine does makes the others slower. "±"
says how far the second fastest are behind. The baselines:

* **reference**: the op's definition in plain torch, which is also what runs where no kernel does;
* **torch**: the best that torch's own functions offer for the same result;
* **torch.compile**: that, compiled.

**of floor** is the share of the hardware's speed: the least time that reading the bytes (at the memory bandwidth) or
multiplying the FLOPs (at the rate of a large matmul) can take, whichever is longer, over the time measured. Both rates
are measured with torch in the same run; the best were {rates}.
More than 100 % is possible where a kernel does better than torch's own reduction or matmul.
"""
CAPTIONS = {
    "norm_linear": "Norm, matmul and activation in one op: M rows (tokens of a call; 1 is decoding one sequence), "
    "weight of n rows and d columns, d being the kept width of the sliced model.",
    "residual_linear": "Matmul of k inputs to the sliced width d, plus the residual through a shortcut (none, a dense "
    "matrix, or a low rank), and the sums of squares that the next norm wants; M rows.",
    "attend": "The attention of a decode step over S positions: rotary embedding, append to the cache and attention of "
    "T new tokens, H query heads over G of D numbers. **torch** appends with `torch.cat`, as a dynamic cache does.",
    "covariance": "What slicing collects from N tokens of width D, summed in fp64. Ours computes one triangle, and "
    "FLOPs are counted for one; **torch** is a full matmul with fp32 sums, which is less exact.",
    "block": "The four matmuls of a decoder block with everything around them but attention, M rows, width d.",
    "slicing": "Slicing a Llama with random weights (fp32, on a GPU bf16), and how it grows. The baseline takes the "
    "covariances in plain torch. Last come shares of the time, and the most memory held beyond the model's.",
    "end_to_end": "A whole model with random weights, sliced to 75 % of its blocks' parameters, patched (ours); the "
    "baselines are the same sliced model unpatched, and the dense one. ms: one pass over the prompt, or all steps of "
    "decoding. Tokens per second count those of the prompt, or the new ones.",
    "widths": "Decoding SmolLM2-135M with random weights, patched: with the sizes of a cut to 0.8 of its blocks, which "
    "differ from layer to layer (ours), with equal ones, with ours padded to 128 channels and all values, and dense. "
    "Stored: parameters of the blocks, read: bytes of the weights that a token takes, as shares of the dense model's.",
}
OPS = ("covariance", "norm_linear", "residual_linear", "attend", "block")
AXES = {"covariance": "D", "attend": "S"}  # what the speed of an op is drawn over where that is not the sliced width d
KERNELS = ("triton", "cuda")  # contenders that are ours, beside what `auto` chooses: compared with torch


def kind_of(results: dict[str, Any]) -> str:
    """The kind of machine of a run, as a file name."""
    machine = results["machine_info"]
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {machine['threads']} threads".lower()).strip("-")


def groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run by what they measure."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results["benchmarks"]:
        found.setdefault(row["group"], []).append(row)
    return found


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """What a row shows: its case, time, ratios, shares of the floor, and whatever else it has."""
    extra = row["extra_info"]
    seconds, (ours, *_) = extra["seconds"], extra["seconds"]
    shown = {name: "" if value is None else value for name, value in (row["params"] or {}).items()}
    shown["ms"] = 1e3 * seconds[ours]
    for name in dict.fromkeys((*extra["times as fast"], *extra.get("refused", {}))):
        value = f"{extra['times as fast'][name]:.2f} ±{extra['uncertainty'][name]:.0%}" if name in seconds else "–"
        shown[f"{name} x torch" if name in KERNELS else f"x {name}"] = value
        if name in KERNELS:
            shown[f"{name} of floor"] = f"{extra['floor'] / seconds[name]:.0%}" if name in seconds else "–"
    if "floor" in extra:
        shown["of floor"] = f"{extra['floor'] / seconds[ours]:.0%}"
    if "tokens" in extra:
        shown |= {f"{name}, tok/s": round(extra["tokens"] / time, 1) for name, time in seconds.items()}
    return shown | extra.get("shown", {})


def markdown(results: dict[str, Any]) -> str:
    """All tables of a run, with what they were measured on."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in results["benchmarks"]:
        if row["group"] in OPS:
            measured.setdefault(row["params"]["dtype"], []).append(row["extra_info"])
    rates = [
        f"{dtype} {max(e['read_bandwidth'] for e in rows) / 1e9:.0f} GB/s and "
        f"{max(e['matmul_rate'] for e in rows) / 1e9:.0f} GFLOP/s"
        for dtype, rows in sorted(measured.items())
    ]
    commit = results["commit_info"]["id"][:12]
    lines = [HEADER.format(**results["machine_info"], commit=commit, rates=", ".join(rates))]
    for group, rows in groups(results).items():
        lines += [f"## {group}", "", CAPTIONS[group], "", table([cells(row) for row in rows]), ""]
        reasons = [f"{name}: {why}" for row in rows for name, why in row["extra_info"].get("refused", {}).items()]
        lines += [f"* – {reason}" for reason in dict.fromkeys(reasons)] + [""] * bool(reasons)
    return "\n".join(lines)


def plot_rooflines(results: dict[str, Any], path: Path) -> None:
    """Draw FLOPs per second over FLOPs per byte of each op's rows, below the roof measured for each dtype."""
    found = {op: rows for op, rows in groups(results).items() if op in OPS}
    figure = Figure(figsize=(4.5 * len(found), 4.5), layout="constrained", dpi=150)
    for axes, (op, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for colour, dtype in enumerate(sorted({row["params"]["dtype"] for row in rows})):
            mine = [row for row in rows if row["params"]["dtype"] == dtype]
            intensity = [row["extra_info"]["flops"] / row["extra_info"]["bytes"] for row in mine]
            bandwidth, rate = (max(r["extra_info"][name] for r in mine) for name in ("read_bandwidth", "matmul_rate"))
            roof = sorted({min(intensity) / 2, rate / bandwidth, 2 * max(intensity), 2 * rate / bandwidth})
            axes.loglog(roof, [min(rate, bandwidth * x) / 1e9 for x in roof], color=f"C{colour}", lw=1)
            for name, marker in (("auto", "o"), ("torch", "x")):
                speeds = [row["extra_info"]["flops"] / row["extra_info"]["seconds"][name] / 1e9 for row in mine]
                label = f"{dtype}, {'ours' if name == 'auto' else name}"
                axes.loglog(intensity, speeds, marker, ls="", color=f"C{colour}", ms=5, label=label)
        axes.set_title(op)
        axes.set_xlabel("FLOPs per byte")
        axes.grid(alpha=0.3, lw=0.5)
        axes.legend(fontsize=8)
    figure.supylabel("GFLOP/s")
    figure.savefig(path)


def plot_speed_ups(results: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as torch each op is, over its width or its cache, for each number of rows."""
    found = {op: rows for op, rows in groups(results).items() if op in OPS}
    figure = Figure(figsize=(4.5 * len(found), 4.5), layout="constrained", dpi=150)
    for axes, (op, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        size, count = AXES.get(op, "d"), "T" if op == "attend" else "M"
        for case in sorted({(row["params"]["dtype"], row["params"].get(count, 0)) for row in rows}):
            mine = [row for row in rows if (row["params"]["dtype"], row["params"].get(count, 0)) == case]
            label = case[0] + (f", {count} = {case[1]}" if case[1] else "")
            points = sorted((row["params"][size], row["extra_info"]["times as fast"]["torch"]) for row in mine)
            axes.semilogy(*zip(*points, strict=True), marker="o", lw=1, ms=4, label=label)
        axes.axhline(1, color="black", lw=1, ls="--")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(op)
        axes.set_xlabel("positions" if op == "attend" else "width")
        axes.grid(alpha=0.3, lw=0.5, which="both")
        axes.legend(fontsize=8)
    figure.supylabel("times as fast as torch")
    figure.savefig(path)


def plot_end_to_end(results: dict[str, Any], path: Path) -> None:
    """Draw tokens per second of dense, sliced and patched models, prefill beside decode."""
    rows = groups(results)["end_to_end"]
    phases = list(dict.fromkeys(row["params"]["phase"] for row in rows))
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        mine = [row for row in rows if row["params"]["phase"] == phase]
        names = list(mine[0]["extra_info"]["seconds"])[::-1]
        for number, name in enumerate(names):
            speeds = [row["extra_info"]["tokens"] / row["extra_info"]["seconds"][name] for row in mine]
            places = [place + 0.8 / len(names) * (number - (len(names) - 1) / 2) for place in range(len(mine))]
            axes.bar_label(axes.bar(places, speeds, 0.72 / len(names), label=name), fmt="{:.4g}", fontsize=7)
        cases = [
            "\n".join(
                str(row["params"][key])
                for key in ("geometry", "dtype", "harness", "backend", "batch")
                if key in row["params"]
            )
            for row in mine
        ]
        axes.set_xticks(range(len(mine)), cases, fontsize=8)
        axes.set_title(phase)
        axes.set_ylabel("tokens per second")
        axes.grid(alpha=0.3, lw=0.5, axis="y")
        axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.savefig(path)


FIGURES = {  # name: drawn by, and one of the groups that it needs
    "roofline": (plot_rooflines, OPS),
    "speed-up": (plot_speed_ups, OPS),
    "end-to-end": (plot_end_to_end, ("end_to_end",)),
}


def write(results: dict[str, Any], folder: Path) -> None:
    """Write the JSON, the tables and the figures of a run into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, text = kind_of(results), markdown(results)
    for name, (draw, needed) in FIGURES.items():
        if _any(needed, groups(results)):
            draw(results, folder / f"{kind}-{name}.png")
            text += f"\n![{name}]({kind}-{name}.png)\n"
    (folder / f"{kind}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{kind}.md").write_text(text)


def _any(names: Iterable[str], among: Iterable[str]) -> bool:
    return not set(names).isdisjoint(among)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="JSON files of pytest-benchmark")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder (%(default)s)")
    options = parser.parse_args()
    results, *others = (json.loads(file.read_text()) for file in options.runs)
    results["benchmarks"] += [row for other in others for row in other["benchmarks"]]
    write(results, options.out)
    print(markdown(results))
    print(f"Figures: {options.out}/{kind_of(results)}-*.png")


if __name__ == "__main__":
    main()
