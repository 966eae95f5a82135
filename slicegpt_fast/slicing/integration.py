"""What a sliced model needs of transformers and transformers has no registry for: three methods are wrapped on import.

* ``PreTrainedModel.__init__`` refuses the config of a sliced model, for its dense skeleton would carry a plan that it
  does not follow. ``from_pretrained``, which narrows the skeleton, passes.
* ``PreTrainedModel.save_pretrained`` adds three things where the model is sliced or quantised: a model card; an empty
  tensor under the name of the final norm's weight, or of the first quantised one, whose shape stops every loader that
  does not know the plan; and the folder as the model's name, which adapters record as their base.
* What ``push_to_hub`` uploads has the model card in place of the template that transformers has written over it.
"""

import functools
import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from slicegpt_fast.architectures import Decoder
from slicegpt_fast.errors import InputError
from slicegpt_fast.quantization import STORED, quantized_modules
from slicegpt_fast.slicing.card import base_of, replace_template, write_card
from slicegpt_fast.slicing.format import SliceConfig, guard_names, slice_config_of

UNSAVED = "(sliced and not saved: call save_pretrained before adapting it)"

_init, _save_pretrained = PreTrainedModel.__init__, PreTrainedModel.save_pretrained
_upload = PreTrainedModel._upload_modified_files
_saving = inspect.signature(_save_pretrained)


def guard_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The empty tensors that are stored with a sliced or quantised model, by their names."""
    return {name: torch.empty(0, dtype=model.dtype) for name in guard_names(model)}


def stored_state(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of the tensors of a sliced or quantised model, by the names that they have in its files.

    The integers of quantised matrices are called by another name than a dense model's weights, once where a head and a
    table share them, and the guards are added.
    """
    quantized = quantized_modules(model)
    tied = model.all_tied_weights_keys if quantized else {}
    integers = {f"{path}.weight": f"{path}.{STORED}" for path in quantized}
    named = {integers.get(name, name): tensor for name, tensor in state.items() if name not in tied}
    return named | guard_tensors(model)


def name_sliced(model: PreTrainedModel, name: str | None) -> None:
    """Name a sliced model after the folder that it stands in; a dense one keeps its name."""
    if slice_config_of(model) is not None:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.name_or_path = name
        model.config.name_or_path = name


def name_unsaved(model: PreTrainedModel) -> None:
    """Name a sliced model that stands in no folder, so that an adapter does not take the dense model for its base."""
    name_sliced(model, f"{model.name_or_path} {UNSAVED}".strip())


def mark_sliced(sliced: PreTrainedModel, dense: PreTrainedModel, slice_config: SliceConfig) -> None:
    """Let a sliced model's config carry its plan and, where that is on the hub, the dense model's name."""
    sliced.config.quantization_config = slice_config
    if base_of(dense):
        sliced.config.sliced_from = base_of(dense)
    name_unsaved(sliced)


@functools.wraps(_init)
def _init_unless_sliced(self: PreTrainedModel, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
    slice_config = slice_config_of(config)
    if slice_config is not None and not slice_config.loading:
        raise InputError(
            f"the config of a sliced or quantised model does not build one from scratch ({type(self).__name__}): load "
            "it with from_pretrained, or delete config.quantization_config for the dense model."
        )
    _init(self, config, *inputs, **kwargs)


@functools.wraps(_save_pretrained)
def _save_pretrained_sliced(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if slice_config_of(self) is None or getattr(self, "_hf_peft_config_loaded", False):
        return _save_pretrained(self, *args, **kwargs)
    Decoder(self)  # refuses the model without its head, whose folder nothing could load
    bound = _saving.bind(self, *args, **kwargs)
    bound.apply_defaults()
    state_dict = bound.arguments["state_dict"]
    bound.arguments["state_dict"] = stored_state(self, self.state_dict() if state_dict is None else state_dict)
    result = _save_pretrained(*bound.args, **bound.kwargs)
    folder = bound.arguments["save_directory"]
    if bound.arguments["is_main_process"] and os.path.isdir(folder):
        write_card(folder, self)
    name_sliced(self, str(Path(folder).absolute()))
    return result


@functools.wraps(_upload)
def _upload_with_card(self: PreTrainedModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
    if slice_config_of(self) is not None:
        replace_template(working_dir, self)
    return _upload(self, working_dir, *args, **kwargs)


PreTrainedModel.__init__ = _init_unless_sliced  # type: ignore[method-assign]
PreTrainedModel.save_pretrained = _save_pretrained_sliced  # type: ignore[method-assign]
PreTrainedModel._upload_modified_files = _upload_with_card  # type: ignore[method-assign, assignment]
