"""What the documents say: their Python blocks run, their commands exist, their figures are the committed ones."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
import typer
from models import FAMILIES, ROWS, sparse_layers, tiny_model, tokens
from texts import TEXT, word_tokenizer

import slicegpt_fast as sf
from slicegpt_fast.architectures.table import ARCHITECTURES
from slicegpt_fast.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/export.md")
README = (ROOT / "README.md").read_text()
HUB_ID = "HuggingFaceTB/SmolLM2-135M"


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, its head and the line below left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    """All in one namespace. A small model stands in for the one of the hub, a list of sentences for the dataset."""
    sf.save_model(tiny_model(max_position_embeddings=512), tmp_path / "dense", word_tokenizer())
    for load in (sf.load_model, sf.load_tokenizer):

        def local(source, load=load):
            assert source == HUB_ID
            return load(tmp_path / "dense")

        monkeypatch.setattr(sf, load.__name__, local)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": [TEXT] * 1500})
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for document in DOCUMENTS:
        for number, block in enumerate(blocks(document, "python")):
            exec(compile(block, f"{document}, Python block {number}", "exec"), namespace)
        if document == "README.md":
            assert sf.patch_report(namespace["sliced"]).fused == 7
            assert namespace["reloaded"].num_parameters() == namespace["sliced"].num_parameters()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "llama 32"
    text = torch.tensor(namespace["text"])  # what the graph made of a prompt, 20 tokens long
    with torch.no_grad():
        likeliest = namespace["sliced"](text).logits.argmax(-1)
    assert torch.equal(likeliest[:, -21:-1], text[:, -20:])
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "smaller", "even", "plain", "graph"}


def commands() -> list[tuple[str, list[str]]]:
    lines = [
        shlex.split(line, comments=True)
        for document in DOCUMENTS
        for block in blocks(document, "sh")
        for line in block.replace("\\\n", "").splitlines()
    ]
    return [(words[0], words[1:]) for words in lines if words]


def test_commands_parse():
    ours = typer.main.get_command(app).commands
    used = [arguments for program, arguments in commands() if program == "slicegpt-fast"]
    assert len(used) > 5
    for name, *arguments in used:
        ours[name].make_context(name, arguments)  # raises for an option that is not there


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {arguments[0] for program, arguments in commands() if program == "make"}
    mentioned = {target for document in DOCUMENTS for target in mentions((ROOT / document).read_text())}
    assert "quickstart" in named
    assert named | mentioned <= targets


def mentions(text: str) -> list[str]:
    return re.findall(r"`make ([a-z-]+)", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text())
    assert all((ROOT / document).parent.joinpath(link).exists() for link in links if "://" not in link)


def test_speeds_are_the_committed_ones():
    """README's table of decode speeds, and the ratios of its first screen."""
    run = json.loads((ROOT / "docs/benchmarks/amd-epyc-avx512bf16-2-threads.json").read_text())
    decode = {
        each["params"]["dtype"]: each["extra_info"]
        for each in run["benchmarks"]
        if each["group"] == "end_to_end" and each["params"]["phase"] == "decode"
    }
    speed_rows = [row for row in rows(section("Running fast")) if row[0] in ("bf16", "fp32")]
    assert len(speed_rows) == 2
    for name, *speeds in speed_rows:
        info = decode[{"bf16": "bfloat16", "fp32": "float32"}[name]]
        assert speeds == [f"{info['tokens'] / info['seconds'][model]:.1f}" for model in ("dense", "sliced", "patched")]
    ratios = [f"{decode[dtype]['times as fast']['dense']:.1f}" for dtype in ("bfloat16", "float32")]
    assert re.search(r"decodes ([\d.]+)\s+times .* bf16 and ([\d.]+) times in fp32", README).groups() == tuple(ratios)


def test_speeds_beside_llama_cpp_are_the_committed_ones():
    measured = json.loads((ROOT / "docs/benchmarks/llama-cpp.json").read_text())["rows"]
    found = {(row["engine"], row["weights"]): f"{row['tokens/s']:.1f}" for row in measured}
    table = [row for row in rows(section("Running fast")) if row[0] in ("slicegpt-fast", "llama.cpp")]
    assert [row[0] for row in table] == ["slicegpt-fast", "llama.cpp"]
    for engine, *speeds in table:
        assert speeds == [found.get((engine, weights), "–") for weights in ("bf16", "f32", "q8_0", "q4_0")]


def test_perplexities_are_the_committed_ones():
    """Of every plan in the tables; a dash stands for what has not been measured."""
    measured = json.loads((ROOT / "docs/benchmarks/perplexity.json").read_text())
    found = {(row["plan"], row["budget"]): row for row in measured["rows"] if "perplexity" in row}
    columns = sorted({budget for _, budget in found}, reverse=True)

    def cell(plan: str, budget: float, name: str = "perplexity", form: str = "{:.1f}") -> str:
        row = found.get((plan, budget), {})
        narrow = name == "perplexity" and row and row["width"] < measured["full_width"]
        return form.format(row[name]) + (f" ({row['width']})" if narrow else "") if name in row else "–"

    plans = {row[0]: row[1:] for row in rows(section("Which basis?")) if len(row) == 6}
    _, head, table = section("What is cut").partition("| cut |")
    cuts = {row[0]: row[1:] for row in rows(head + table) if len(row) == 8}
    assert len(columns) == 5
    assert plans.keys() | cuts.keys() >= {plan for plan, _ in found}
    assert list(cuts) == ["channels", "channels + values", "auto", "whole layers dropped", "shared, re-fitted"]
    for plan, cells in plans.items():
        assert cells == [cell(plan, budget) for budget in columns]
    for plan, cells in cuts.items():
        beside = [cell(plan, 0.8, "total", "{:.3f}"), cell(plan, 0.8, "code")]
        assert cells == [*(cell(plan, budget) for budget in columns), *beside]
    stated = re.search(r"is ([\d.]+) at 80 % and ([\d.]+) at 95 %, where the dense model has ([\d.]+)\.", README)
    best = "auto" if ("auto", 0.8) in found else "shared, re-fitted"
    levels = (found[best, 0.8]["perplexity"], found[best, 0.95]["perplexity"], measured["dense_perplexity"])
    assert stated.groups() == tuple(f"{each:.1f}" for each in levels)


def test_what_recovery_brings_is_the_committed_figure():
    (row, *_) = json.loads((ROOT / "docs/benchmarks/recovery.json").read_text())["rows"]
    minutes, before, after = re.search(r"(\d+) minutes of training .* bring ([\d.]+) to ([\d.]+)\.", README).groups()
    assert (minutes, before, after) == (f"{row['minutes']:.0f}", *(f"{each:.1f}" for each in row["leads"]))


def models_of_the_readme():
    """The cells of each family, by its model type."""
    known = {re.sub(r"\W|_", "", name.lower()): name for name in ARCHITECTURES}
    return {
        known[re.sub(r"\W", "", family.lower())]: cells
        for families, *cells in rows(section("Models"))
        for family in re.split(", | / ", families)
        if family != "Pythia"  # GPT-NeoX under another name
    }


def test_the_table_of_models_is_the_table_of_the_code():
    found = models_of_the_readme()
    assert found.keys() == ARCHITECTURES.keys()
    for family, (model_type, _) in FAMILIES.items():
        slicing, cuts, _, _, export = found[model_type]
        row = ROWS[family]
        assert ("slice_head" in slicing) == row.keeps_width
        assert cuts == (", ".join(axis for axis in row.axes if axis != "stream") or "none")
        assert export.startswith("yes") == (row.resizable and not row.centered)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_models_says_what_is_patched(family):
    _, _, parts, steps, _ = models_of_the_readme()[FAMILIES[family][0]]
    model = sf.slice_model(tiny_model(family), [tokens(4, 32)], sparsity=0.2, basis="shared", progress=False)
    report = sf.patch_report(sf.patch_model(model))
    unfused = {row.layer.rpartition(".")[2] for row in report.rows if row.reason}
    assert (parts, unfused) in [
        ("all", set()),
        ("attention", {"feedforward"}),
        ("all but experts", {"feedforward"}),
        ("all but experts", {"block"}),
    ]
    native = "native call" in report.steps
    assert native == (steps in ("yes", "once sliced", "between experts")) or not every_layer(family)
    assert (steps == "once sliced") <= ROWS[family].centered


def every_layer(family):
    """Whether a family's tiny model has a layer without what native steps do not know: experts, query norms."""
    return family != "phi" and sparse_layers(tiny_model(family)) < 3
