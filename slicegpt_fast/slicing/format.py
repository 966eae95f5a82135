"""How a sliced or quantised model is written down, so that plain ``AutoModelForCausalLM.from_pretrained`` reads it.

``config.json`` of such a model keeps the dense sizes and carries the plan as its ``quantization_config``, the block
that transformers lets other packages own; where weights have 8 or 4 bits, their precision too. On loading, transformers
builds the dense skeleton without memory, calls the quantizer registered here, which narrows it and puts in the modules
of quantised weights, and fills it from safetensors.
"""

import math
import re
from dataclasses import fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slicegpt_fast.architectures import Decoder, architecture_of, at
from slicegpt_fast.errors import InputError
from slicegpt_fast.quantization import STORED, Precision, name_parameters_, outline_, quantized_modules
from slicegpt_fast.slicing.bases import Bases
from slicegpt_fast.slicing.layers import narrow_
from slicegpt_fast.slicing.plan import SlicePlan, check_plan
from slicegpt_fast.slicing.trust import check_class

METHOD = "slicegpt"
DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16"}  # as safetensors calls them


@register_quantization_config(METHOD)
class SliceConfig(QuantizationConfigMixin):
    """The plan of a sliced model as its config stores it: the fields of :class:`SlicePlan`, tuples as lists.

    transformers writes the attributes into ``config.json`` and makes the object of what it finds there.

    Attributes:
        calibration_tokens: how many tokens the bases, or the roundings, were fitted to.
        precision: the fields of :class:`Precision` where weights have 8 or 4 bits; only then it is there.
        loading: a quantizer narrows the model that is being built with this config.
    """

    loading = False

    def __init__(
        self,
        calibration_tokens: int,
        quant_method: str = METHOD,
        precision: dict[str, Any] | None = None,
        **plan: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum holds its own methods only
        self.calibration_tokens = calibration_tokens
        if precision is not None:
            self.precision = vars(Precision(**precision))
        for name, value in vars(SlicePlan(**plan)).items():  # a TypeError where these are not its fields
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def get(self, name: str, default: Any = None) -> Any:
        """A field by its name: transformers reads the block of a config that it is given as a dictionary."""
        return getattr(self, name, default)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the quantization_config in config.json is not a plan that this version reads ({error}): update "
                "slicegpt-fast."
            ) from error

    @classmethod
    def from_bases(cls, bases: Bases) -> "SliceConfig":
        """The config of a model sliced with ``bases``."""
        return cls(bases.tokens, **vars(bases.plan))

    def rounding(self) -> Precision | None:
        """The bits of the weights where they have 8 or 4."""
        precision = self.get("precision")
        return None if precision is None else Precision(**precision)

    def plan(self) -> SlicePlan:
        """The plan that the model was sliced by."""
        values: dict[str, Any] = {}
        for field in fields(SlicePlan):
            value = getattr(self, field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return SlicePlan(**values)


def slice_config_of(model_or_config: Any) -> SliceConfig | None:
    """The slice config of a sliced model or its config, None for a dense one."""
    config = getattr(model_or_config, "config", model_or_config)
    block = getattr(config, "quantization_config", None)
    if isinstance(block, dict) and block.get("quant_method") == METHOD:
        return SliceConfig.from_dict(block)
    return block if isinstance(block, SliceConfig) else None


@register_quantizer(METHOD)
class SliceQuantizer(HfQuantizer):
    """Gives the skeleton of a model the shapes of a sliced or quantised one before its weights are loaded."""

    def __init__(self, quantization_config: SliceConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        quantization_config.loading = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        assert isinstance(self.quantization_config, SliceConfig)
        del self.quantization_config.loading
        check_class(model)
        shape_(model, self.quantization_config)
        name_parameters_(model, STORED)
        check_weights(model, checkpoint_files or [])
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {f"^{re.escape(name)}$" for name in guard_names(model)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # From here on it is an ordinary model: .float(), training and saving must not treat it as a quantised one.
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        name_parameters_(model, "weight")
        check_quantized_modules(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def shape_(model: PreTrainedModel, slice_config: SliceConfig) -> None:
    """Give a dense model on the meta device the modules and shapes of a sliced or quantised one."""
    plan, precision = slice_config.plan(), slice_config.rounding()
    check_plan(plan, Decoder(model))
    narrow_(model, plan)
    if precision is not None:
        outline_(Decoder(model), precision)


def guard_names(model: PreTrainedModel) -> list[str]:
    """Names of weights that a dense model has and this one, sliced or quantised, has not.

    With it an empty tensor is stored under each, which stops every loader that does not know the plan.
    """
    norm = architecture_of(model.config).final_norm
    weightless = [] if "weight" in at(model, norm)._parameters else [norm]
    return [f"{path}.weight" for path in (*weightless, *list(quantized_modules(model))[:1])]


def check_weights(model: PreTrainedModel, files: list[str]) -> None:
    """Hold the tensors of safetensors ``files`` against the parameters of ``model``, reading headers only.

    transformers stores some tensors under other names or split (experts), so what is missing is found by counting.

    Raises:
        InputError: a file is damaged, a tensor is missing or has another shape or dtype, or the weights are a dense
            model's.
    """
    stored: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    header = tensors.get_slice(name)
                    stored[name], dtypes[name] = tuple(header.get_shape()), header.get_dtype()
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}): copy or write the checkpoint again.") from error
    for name in guard_names(model):
        if 0 not in stored.get(name, (0,)):
            raise InputError(
                f"the checkpoint holds {name}, so its weights are a dense model's, but its config is a sliced or "
                "quantised one's: the files do not belong together."
            )
    tied = model.all_tied_weights_keys or {}
    state = {name: each for name, each in model.state_dict().items() if name not in tied}
    expected = {name: tuple(each.shape) for name, each in state.items()}
    quantized = {f"{path}.{name}" for path in quantized_modules(model) for name in (STORED, "scales")}
    for name in sorted(stored.keys() & expected.keys()):
        kind = str(DTYPES[state[name].dtype]) if name in quantized else dtypes[name]
        if (stored[name], dtypes[name]) != (expected[name], kind):
            of_its_kind = f" ({dtypes[name]}, not {kind})" if dtypes[name] != kind else ""
            raise InputError(
                f"the checkpoint's {name} has shape {stored[name]}, its config asks for {expected[name]}{of_its_kind}: "
                "the files do not belong together."
            )
    if files and sum(map(math.prod, stored.values())) < sum(map(math.prod, expected.values())):
        missing = sorted(expected.keys() - stored.keys())
        raise InputError(f"the checkpoint lacks weights (such as {missing[0]}): copy or write it again.")


def check_quantized_modules(model: PreTrainedModel) -> None:
    """Raise InputError unless every scale that was read is a number, and the half byte behind an odd row is zero's."""
    for path, module in quantized_modules(model).items():
        left_over = module.weight.dtype == torch.uint8 and module.width % 2
        if not module.scales.isfinite().all() or (left_over and (module.weight[:, -1] >> 4 != 8).any()):
            raise InputError(f"the checkpoint's {path} holds no {STORED} and scales: copy or write it again.")
