"""A checkpoint's safetensors files, read one part of the model at a time."""

import copy
import ctypes
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from slicegpt_fast.architectures import at
from slicegpt_fast.errors import InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass
class Source:
    """The stored tensors that a parameter is made of: one, or several that transformers' converter puts together."""

    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)  # by which the converter knows each of them
    converter: WeightConverter | None = None


def empty_model(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint, its parameters on the meta device, in the checkpoint's dtype or another."""
    block = vars(config).pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or _dtype(_files(folder)[0]))
    if block is not None:
        model.config.quantization_config = block
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


class Shards:
    """The weights of a checkpoint, which fill the parts of an empty model one at a time.

    Args:
        folder: holds ``model.safetensors``, or its index and the files that the index names.
        model: from :func:`empty_model`; its buffers are moved to ``device``.
        device: where weights are loaded to.

    Attributes:
        files: the safetensors files.

    Raises:
        InputError: a file is missing or damaged, a tensor is missing or has another shape.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device, self.files = model, device, _files(folder)
        shapes = {file: _shapes(file) for file in self.files}
        self._file_of = {name: file for file in self.files for name in shapes[file]}
        self._sources = _sources(model, {name: shape for each in shapes.values() for name, shape in each.items()})
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def loaded(self, *parts: str) -> Iterator[None]:
        """Inside, the parameters of the submodules at these paths hold the checkpoint's weights."""
        _return_freed_memory()
        empty = {
            name: parameter
            for part in parts
            for name, parameter in at(self.model, part).named_parameters(prefix=part, remove_duplicate=False)
        }
        needed = {self._file_of[stored] for name in empty for stored in self._sources[name].names}
        try:
            with ExitStack() as stack:
                files = {file: stack.enter_context(safe_open(file, "pt")) for file in needed}
                for name, parameter in empty.items():
                    self._set(name, nn.Parameter(self._read(name, parameter, files), parameter.requires_grad))
            yield
        finally:
            for name, parameter in empty.items():
                self._set(name, parameter)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        path, _, last = name.rpartition(".")
        setattr(at(self.model, path), last, parameter)

    def _read(self, name: str, empty: Tensor, files: dict[Path, Any]) -> Tensor:
        source = self._sources[name]
        # A copy, since the file's pages are only mapped and may lie at any address.
        tensors = [
            files[self._file_of[stored]].get_tensor(stored).to(self.device, empty.dtype, copy=True)
            for stored in source.names
        ]
        if source.converter is None:
            return tensors[0]
        converter = copy.deepcopy(source.converter)
        for stored, pattern, tensor in zip(source.names, source.patterns, tensors, strict=True):
            converter.add_tensor(name, stored, pattern, tensor)
        del tensors
        converted = converter.convert(name, model=self.model, config=self.model.config)[name]
        return converted[0] if isinstance(converted, list) else converted


def _sources(model: PreTrainedModel, stored: dict[str, list[int]]) -> dict[str, Source]:
    """What each parameter is made of, given the shapes of the stored tensors; transformers knows their older names."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    expected = model.state_dict()
    sources: dict[str, Source] = {}
    for key in sorted(stored, key=_counting):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        source = sources.setdefault(name, Source(converter=by_pattern.get(pattern or "")))
        source.names.append(key)
        source.patterns.append(pattern or "")
    parameters = list(model.named_parameters(remove_duplicate=False))
    tied = {id(parameter): sources[name] for name, parameter in parameters if name in sources}
    for name, parameter in parameters:
        if id(parameter) not in tied:
            raise InputError(f"the checkpoint lacks weights (such as {name}): copy or write it again.")
        source = sources.setdefault(name, tied[id(parameter)])
        shape = stored[source.names[0]]
        if source.converter is None and shape != list(parameter.shape):
            raise InputError(
                f"the checkpoint's {name} has shape {shape}, its config asks for {list(parameter.shape)}: the files do "
                "not belong together."
            )
    return sources


def _return_freed_memory() -> None:
    """Give the system what the C library keeps of freed memory: scattered, it would grow with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def _counting(name: str) -> list[tuple[int, str]]:
    """The key that sorts layer 10 behind layer 9."""
    return [(int(word) if word.isdigit() else -1, word) for word in name.split(".")]


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SINGLE}
    except (ValueError, KeyError) as error:
        raise InputError(f"{index} is damaged ({error}): copy or write the checkpoint again.") from error
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"{folder} has no {name}: give a folder with a complete safetensors checkpoint.")
    return [folder / name for name in sorted(names)]


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise InputError(f"{file} is damaged ({error}): copy or write the checkpoint again.") from error


def _dtype(file: Path) -> torch.dtype:
    """The dtype of the first tensor in a file."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype
