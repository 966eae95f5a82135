"""Slice checkpoints that are larger than memory: one decoder layer at a time, from file to file.

The steps are those of :func:`slicegpt_fast.slice_model`, and so are the resulting weights, to the bit. A layer is read
when the calibration tokens reach it and forgotten when they have passed; the activations stay on the device, in host
memory or in files, by what fits. A run that was killed goes on from the last layer it finished.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from slicegpt_fast.architectures import Decoder, architecture_of, at
from slicegpt_fast.checkpoint import check_writable, checkpoint_folder, from_pretrained
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing import Bases, SliceArguments, SliceOptions, first_plan, fit_bases
from slicegpt_fast.slicing.batches import Batch, checked
from slicegpt_fast.slicing.card import write_card
from slicegpt_fast.slicing.integration import guard_tensors
from slicegpt_fast.slicing.memory import free_memory
from slicegpt_fast.slicing.rotation import outline, rotations
from slicegpt_fast.streaming.memory import FREE_SHARE, Activations, activations_device, estimate
from slicegpt_fast.streaming.shards import INDEX, Shards, empty_model
from slicegpt_fast.streaming.storage import FolderStorage
from slicegpt_fast.unfinished import Settings, digest_of, hold, work_folder, write_json, write_tensors


def slice_checkpoint(
    source: str | Path,
    folder: str | Path,
    calibration: Iterable[Batch],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    activations: Activations = "auto",
    progress: bool = True,
    **options: Unpack[SliceArguments],
) -> Bases:
    """Slice the checkpoint in ``source`` into ``folder`` with no more than one decoder layer in memory.

    It slices the residual stream alone: cuts take gradients of the whole model, so ``target_params`` needs a ``basis``
    here. The weights are those that ``save_model(slice_model(load_model(source), ...), folder)`` writes. Until they are
    complete they stand in a work folder beside ``folder``; the same call, after it was killed, goes on from there. To
    know that nothing has changed since, every call hashes the checkpoint's files.

    Args:
        source: a local folder with a dense model in safetensors, or a hub id, which is downloaded into the cache.
        folder: does not exist yet, or is empty.
        calibration: token batches, as for :func:`slicegpt_fast.slice_model`.
        tokenizer: saved beside the model.
        dtype: of the weights; by default the checkpoint's own.
        device: where layers are run and rotated; by default a GPU if there is one.
        activations: where they are kept between two layers: on the ``"device"``, in host ``"memory"``, on ``"disk"``;
            ``"auto"`` takes the first that they fit into.
        progress: say what will be needed, and show progress bars.
        options: as for :func:`slicegpt_fast.slice_model`, without those of a cut.

    Returns:
        The bases, with their plan and spectra but without their matrices.

    Raises:
        InputError: as :func:`slicegpt_fast.slice_model`; a damaged checkpoint, a folder in use, too little disk; or an
            unfinished run with other options, another model or other text stands in the work folder.
    """
    folder = Path(folder).expanduser().absolute()
    check_writable(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = SliceOptions(**options)
    if asked.axes:
        raise InputError(
            "target_params without a basis cuts by gradients, which slicing from file to file does not compute: give "
            "basis='shared' or another, or slice in memory with slice_model."
        )
    asked = replace(asked, basis=asked.stream_basis, round_to=asked.step(device))  # the model is on the meta device
    checkpoint = checkpoint_folder(source)
    model = _empty_model(checkpoint, dtype)
    batches = list(checked(calibration, model.config, torch.device("cpu")))
    needs = estimate(model, first_plan(model, asked), batches, asked)
    shards = Shards(checkpoint, model, device)
    kept_on = activations_device(activations, device, needs)
    work = work_folder(folder)
    if progress:
        kept = f"activations are kept on {kept_on or 'disk'}, unfinished work in {work}"
        tqdm.write(f"{source} {needs}; {kept}", file=sys.stderr)
    with hold(work, _settings(asked, shards, batches), needs.disk):
        storage = FolderStorage(work, shards, kept_on)
        bases = fit_bases(model, batches, asked, storage=storage, progress=progress)
        _write(shards, bases, tokenizer, work / "model", progress=progress)
        (work / "model").replace(folder)
    return replace(bases, matrices=(), readers=())


def fits_in_memory(
    source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device, tokens: int = 0
) -> bool:
    """Return whether there is memory to load a model and to slice it with :func:`slicegpt_fast.slice_model`.

    Loading takes the model in host memory; slicing the model, its copy and the activations on ``device``.

    Args:
        source: a hub id, which is downloaded into the cache, a local folder, or a GGUF file (never streamed).
        dtype: of the weights; by default the checkpoint's own.
        device: where the model would be sliced.
        tokens: whose activations are kept: those of the calibration text, twice with ``refit``.

    Raises:
        InputError: nothing there, or a model that cannot be sliced.
    """
    if Path(source).suffix == ".gguf":
        return True
    model = _empty_model(checkpoint_folder(source), dtype)
    size, activations = model.get_memory_footprint(), tokens * model.config.hidden_size * model.dtype.itemsize
    needed = {torch.device("cpu"): size} | {torch.device(device): 2 * size + activations}
    return all(each < FREE_SHARE * free_memory(where) for where, each in needed.items())


def _empty_model(checkpoint: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    config = from_pretrained(AutoConfig, checkpoint, {})
    architecture_of(config)  # refuses what cannot be sliced
    return empty_model(checkpoint, config, dtype=dtype)


def _write(
    shards: Shards, bases: Bases, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, progress: bool
) -> None:
    """Rotate part after part, each into a file of its own; what is there already was written by an earlier process."""
    folder.mkdir(exist_ok=True)
    dense = Decoder(shards.model)
    outlined = outline(dense, bases)
    sliced = outlined.model
    weight_map, size = {}, 0
    calls = rotations(dense, outlined, bases)
    for number, (paths, rotate) in enumerate(tqdm(calls, desc="slicing", unit="part", disable=not progress), 1):
        file = folder / f"model-{number:05}-of-{len(calls):05}.safetensors"
        if not file.exists():
            with shards.loaded(*paths):
                rotate()
            filled = (at(sliced, path).state_dict(prefix=f"{path}.") for path in paths)
            tensors = revert_weight_conversion(sliced, {name: each for part in filled for name, each in part.items()})
            tensors |= guard_tensors(sliced) if number == len(calls) else {}
            write_tensors(file, tensors, {"format": "pt"})
            for path in paths:
                at(sliced, path).to("meta")
        with safe_open(file, "pt") as stored:
            weight_map.update(dict.fromkeys(stored.keys(), file.name))
        size += file.stat().st_size
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    sliced.config.architectures = [type(sliced).__name__]
    sliced.config.save_pretrained(folder)
    write_card(folder, sliced)
    if sliced.can_generate():
        sliced.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _settings(options: SliceOptions, shards: Shards, batches: Sequence[Mapping[str, Tensor]]) -> Settings:
    """Return all that the result depends on: options, versions; the model's files and the text, by hash."""
    settings: Settings = json.loads(json.dumps(asdict(options)))  # as a record holds them: tuples are lists there
    settings |= {"dtype": str(shards.model.dtype), "device": shards.device.type}
    settings |= {name: version(name) for name in ("slicegpt-fast", "torch", "transformers")}
    for file in (shards.files[0].with_name("config.json"), *shards.files):
        with file.open("rb") as content:
            settings[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return settings | {"calibration text": digest_of(batches)}
