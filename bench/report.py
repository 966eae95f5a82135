"""Turns the JSON of a run into tables and figures.

    python bench/report.py RUN.json [RUN.json ...] [--out build/bench]

Prints the tables; writes KIND.md, KIND.json and KIND-*.png, KIND being the kind of machine. Several runs on one
machine, of different benchmarks, become one report.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from timing import table

HEADER = """# Benchmarks on {processor}, {threads} threads

{date}; torch {torch}, transformers {transformers}, Python {python}; commit {commit}.

Random data. All contenders of a row took turns in one run; "x torch" is how many times as fast as torch ours was, the
median over the rounds. "reference" is the op's formulation in plain torch, "torch" the best that torch's own functions
offer, "torch.compile" the same compiled. The floor is what reading the bytes or multiplying the FLOPs takes at the
bandwidth and the matmul rate measured right before and after the row (at best {rates}).
More than 100 % means faster than torch's own matmul or reduction.
"""
OPS = ("covariance", "norm_linear", "residual_linear", "block")


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
    """What a row shows: its case, time, ratios, share of the floor, and whatever else it has under "shown"."""
    extra, median = row["extra_info"], row["stats"]["median"]
    shown = {name: "" if value is None else value for name, value in (row["params"] or {}).items()}
    shown["ms"] = 1e3 * median
    shown |= {f"x {name}": round(ratio, 2) for name, ratio in extra["times as fast"].items()}
    if "share of floor" in extra:
        shown["of floor"] = f"{extra['share of floor']:.0%}"
    return shown | extra.get("shown", {})


def markdown(results: dict[str, Any]) -> str:
    """All tables of a run, with what they were measured on."""
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in results["benchmarks"]:
        if row["group"] in OPS:
            measured.setdefault(row["params"]["dtype"], []).append(row["extra_info"])
    rates = [
        f"{dtype} {max(e['read_bandwidth'] for e in rows) / 1e9:.0f} GB/s, "
        f"{max(e['matmul_rate'] for e in rows) / 1e9:.0f} GFLOP/s"
        for dtype, rows in sorted(measured.items())
    ]
    commit = results["commit_info"]["id"][:12]
    lines = [HEADER.format(**results["machine_info"], commit=commit, rates="; ".join(rates))]
    for group, rows in groups(results).items():
        lines += [f"## {group}", "", table([cells(row) for row in rows]), ""]
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
    """Draw how many times as fast as torch each op is, over the sliced width."""
    found = {op: rows for op, rows in groups(results).items() if op in OPS}
    figure = Figure(figsize=(4.5 * len(found), 4.5), layout="constrained", dpi=150)
    for axes, (op, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        width = "D" if op == "covariance" else "d"
        for case in sorted({(row["params"]["dtype"], row["params"].get("M", 0)) for row in rows}):
            mine = [row for row in rows if (row["params"]["dtype"], row["params"].get("M", 0)) == case]
            label = case[0] + (f", M = {case[1]}" if case[1] else "")
            points = sorted((row["params"][width], row["extra_info"]["times as fast"]["torch"]) for row in mine)
            axes.semilogy(*zip(*points, strict=True), marker="o", lw=1, ms=4, label=label)
        axes.axhline(1, color="black", lw=1, ls="--")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_title(op)
        axes.set_xlabel("width")
        axes.grid(alpha=0.3, lw=0.5, which="both")
        axes.legend(fontsize=8)
    figure.supylabel("times as fast as torch")
    figure.savefig(path)


def plot_end_to_end(results: dict[str, Any], path: Path) -> None:
    """Draw tokens per second of dense, sliced and patched models, prefill beside decode."""
    rows = groups(results)["end_to_end"]
    phases = list(dict.fromkeys(row["params"]["phase"] for row in rows))
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    for axes, phase in zip(figure.subplots(1, len(phases)), phases, strict=True):
        mine = [row for row in rows if row["params"]["phase"] == phase]
        names = list(mine[0]["extra_info"]["seconds"])[::-1]
        for number, name in enumerate(names):
            speeds = [row["extra_info"]["tokens"] / row["extra_info"]["seconds"][name] for row in mine]
            places = [place + 0.8 / len(names) * (number - (len(names) - 1) / 2) for place in range(len(mine))]
            axes.bar_label(axes.bar(places, speeds, 0.72 / len(names), label=name), fmt="{:.4g}", fontsize=7)
        cases = ["\n".join(str(row["params"][key]) for key in ("geometry", "dtype", "harness")) for row in mine]
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
