"""How a sliced model is written down, so that plain ``AutoModelForCausalLM.from_pretrained`` reads it back.

``config.json`` of a sliced model keeps the dense sizes and carries the plan as its ``quantization_config``, the block
that transformers lets other packages own. On loading, transformers builds the dense skeleton without memory, calls the
quantizer registered here, which narrows it, and fills it from safetensors.
"""

import math
import re
from dataclasses import fields
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slicegpt_fast.architectures import Decoder, architecture_of
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.bases import Bases
from slicegpt_fast.slicing.layers import narrow_
from slicegpt_fast.slicing.plan import SlicePlan, check_plan
from slicegpt_fast.slicing.trust import check_class

METHOD = "slicegpt"


@register_quantization_config(METHOD)
class SliceConfig(QuantizationConfigMixin):
    """The plan of a sliced model as its config stores it: the fields of :class:`SlicePlan`, tuples as lists.

    transformers writes the attributes into ``config.json`` and makes the object of what it finds there.

    Attributes:
        calibration_tokens: how many tokens the bases were fitted to.
        loading: a quantizer narrows the model that is being built with this config.
    """

    loading = False

    def __init__(self, calibration_tokens: int, quant_method: str = METHOD, **plan: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum holds its own methods only
        self.calibration_tokens = calibration_tokens
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
    """Narrows the skeleton of a sliced model before its weights are loaded. Nothing is quantised."""

    def __init__(self, quantization_config: SliceConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        quantization_config.loading = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        assert isinstance(self.quantization_config, SliceConfig)
        del self.quantization_config.loading
        check_class(model)
        plan = self.quantization_config.plan()
        check_plan(plan, Decoder(model))
        narrow_(model, plan)
        check_weights(model, checkpoint_files or [])
        if plan.basis is not None:
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {re.escape(guard_name(model))}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # From here on it is an ordinary model: .float(), training and saving must not treat it as a quantised one.
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def guard_name(model: PreTrainedModel) -> str:
    """The name of the final norm's weight in a dense model; with a sliced one, an empty tensor is stored under it."""
    return f"{architecture_of(model.config).final_norm}.weight"


def check_weights(model: PreTrainedModel, files: list[str]) -> None:
    """Hold the tensors of safetensors ``files`` against the parameters of ``model``, reading headers only.

    transformers stores some tensors under other names or split (experts), so what is missing is found by counting.

    Raises:
        InputError: a file is damaged, a tensor is missing or has another shape, or the weights are a dense model's.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    stored[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}): copy or write the checkpoint again.") from error
    tied = model.all_tied_weights_keys or {}
    expected = {name: tuple(each.shape) for name, each in model.state_dict().items() if name not in tied}
    for name in sorted(stored.keys() & expected.keys()):
        if stored[name] != expected[name]:
            raise InputError(
                f"the checkpoint's {name} has shape {stored[name]}, its config asks for {expected[name]}: the files do "
                "not belong together."
            )
    if guard_name(model) not in expected and 0 not in stored.get(guard_name(model), (0,)):
        raise InputError(
            f"the checkpoint holds {guard_name(model)}, so its weights are a dense model's, but its config is a sliced "
            "one's: the files do not belong together."
        )
    if files and sum(map(math.prod, stored.values())) < sum(map(math.prod, expected.values())):
        missing = sorted(expected.keys() - stored.keys())
        raise InputError(f"the checkpoint lacks weights (such as {missing[0]}): copy or write it again.")
