"""Which models slicing knows: those that transformers' own classes build from their config, unchanged.

A row of the table says what a family's decoder layer computes, and is right for that very code alone. So a model is
held against the stock one, which its class builds from its config without weights: the same modules under the same
names, of the same classes with their own code, with the same parameters and constants, and no hooks. Whatever differs
would also be lost when the sliced model is saved, since loading builds it from the config again.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from slicegpt_fast.architectures import Decoder
from slicegpt_fast.errors import InputError

TRUSTED = ("torch", "transformers")  # packages whose classes, functions and hooks are known
OURS = __name__.partition(".")[0]
REMEDY = "slice the model as from_pretrained loads it, with adapters merged and nothing wrapped, hooked or replaced"
# What a module computes in evaluation mode does not depend on these; caches find their layer by layer_idx.
FREE_CONSTANTS = ("training", "layer_idx", "gradient_checkpointing", "p", "inplace", "num_embeddings")


def check_class(model: PreTrainedModel) -> None:
    """Raise InputError unless ``model`` is of the class that AutoModelForCausalLM builds for its config."""
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    expected = mapping.get(type(model.config), None)
    if type(model) is not expected or not _is_stock(type(model)):
        raise InputError(
            f"the model is a {_name(type(model))}, and slicing knows the causal language models of transformers alone: "
            "load it with AutoModelForCausalLM.from_pretrained."
        )


def check_trusted(decoder: Decoder) -> None:
    """Hold a model against the stock model of its config.

    Raises:
        InputError: the first module that differs, with its name and class.
    """
    model = decoder.model
    check_class(model)
    stock = stock_model(type(model), model.config)
    expected, seen = dict(stock.named_modules()), dict(model.named_modules())
    for path, module in seen.items():
        if path not in expected:
            raise InputError(f"{path} is a {_name(type(module))} that a stock {type(model).__name__} lacks: {REMEDY}.")
        _check_module(path or type(model).__name__, module, expected[path])
    for path, module in expected.items():
        if path not in seen:
            raise InputError(
                f"{path}, a {_name(type(module))} in a stock {type(model).__name__}, is missing here or the same as "
                f"another module: {REMEDY}."
            )
    for cls in {type(module) for module in seen.values()}:
        _check_code(cls)
    _check_global_hooks()
    _check_accounted(decoder)
    for path, module in _stream_modules(decoder):
        _check_constants(path, module, expected[path])


def stock_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model that ``cls`` builds from the config of a dense or sliced one, on the meta device."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if isinstance(config.dtype, str):  # as save_pretrained has it, which some families cannot build from
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        return cls(config)


def _check_module(path: str, module: nn.Module, stock: nn.Module) -> None:
    cls = type(module)
    if cls is not type(stock) or not _is_stock(cls):
        wanted = "" if cls is type(stock) else f", not a {_name(type(stock))}"
        raise InputError(f"{path} is a {_name(cls)}{wanted}, and slicing does not know what it computes: {REMEDY}.")
    for slot in ("forward", "_old_forward"):
        if slot in vars(module) and _package(vars(module)[slot]) != OURS:  # patch_model's own is known
            raise InputError(f"{path} ({_name(cls)}) has a forward of its own: {REMEDY}.")
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            if not _is_trusted(hook):
                raise InputError(f"{path} ({_name(cls)}) has a forward hook ({_label(hook)}): {REMEDY}.")
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            raise InputError(
                f"{path}.{name} is a {_name(type(parameter))}, not a plain parameter: slice the model before it is "
                "quantised or distributed."
            )
    here = {name for name, parameter in module._parameters.items() if parameter is not None}
    there = {name for name, parameter in stock._parameters.items() if parameter is not None}
    for name in sorted(here ^ there):
        verb = "holds a parameter" if name in here else "lacks the parameter"
        raise InputError(f"{path} ({_name(cls)}) {verb} {name!r}, unlike the model of its config: {REMEDY}.")


def _check_code(cls: type) -> None:
    """Raise InputError where a method of a stock class was replaced."""
    for owner in cls.__mro__:
        modelling = owner.__module__.startswith(("torch.nn.modules.", "transformers.models.", "transformers.act"))
        names = list(vars(owner)) if modelling and owner is not nn.Module else []
        for name in {*names, "forward", "__call__"} & vars(owner).keys():
            value = vars(owner)[name]
            if isinstance(value, FunctionType) and not _is_trusted(value):
                raise InputError(
                    f"{_name(cls)}.{name} was replaced by {_label(value)}, and slicing does not know what it computes: "
                    "restore it before slicing."
                )


def _check_global_hooks() -> None:
    registry = torch.nn.modules.module
    for hooks in (registry._global_forward_pre_hooks, registry._global_forward_hooks):
        for hook in hooks.values():
            if not _is_trusted(hook):
                raise InputError(
                    f"a forward hook ({_label(hook)}) is registered on all modules: remove it before slicing."
                )


def _check_accounted(decoder: Decoder) -> None:
    """Raise InputError where a parameter outside the decoder layers is none of embeddings, final norm and head."""
    model = decoder.model
    accounted = (*decoder.embeddings.values(), *decoder.layers, decoder.final_norm, decoder.head)
    known = {id(parameter) for module in accounted for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            owner = type(model.get_submodule(name.rpartition(".")[0]))
            raise InputError(f"slicing does not know {name}, a parameter of a {_name(owner)}: use another checkpoint.")


def _stream_modules(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    yield decoder.sites[-1].path, decoder.final_norm
    for index, layer in enumerate(decoder.layers):
        yield from layer.named_modules(prefix=decoder.layer_path(index))


def _check_constants(path: str, module: nn.Module, stock: nn.Module) -> None:
    """Raise InputError where a number that a module computes with differs from the config's."""
    for name, value in vars(stock).items():
        if name.startswith("_") or name in FREE_CONSTANTS or "dropout" in name or not isinstance(value, int | float):
            continue
        found = vars(module).get(name)
        if found != value:
            raise InputError(
                f"{path} ({_name(type(module))}) has {name}={found}, but its config makes it {value}: set it in the "
                "config, which a saved model is built from."
            )


def _is_stock(cls: type) -> bool:
    """Whether a class is the one that torch or transformers has under its name."""
    holder: Any = sys.modules.get(cls.__module__)
    return cls.__module__.partition(".")[0] in TRUSTED and getattr(holder, cls.__qualname__, None) is cls


def _is_trusted(function: Callable[..., Any]) -> bool:
    """Whether a function and all that it wraps are code of the trusted packages or of this one."""
    step: Any = function
    while step is not None:
        if _package(step) not in (*TRUSTED, OURS):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _package(function: Any) -> str:
    """The package that a function, method, partial or callable object was written in."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return str(module).partition(".")[0]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _label(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
