"""Read checkpoints that the code published with the method wrote (microsoft/TransformerCompression).

It saves a sliced model as two files, ``<name>_<sparsity>.pt``, the state dict, and ``.json``, the sizes.

* The weights have the names that transformers gives them, readers folded and rotated, writers cut, LayerNorm's mean and
  bias folded in as here (so OPT's head has a bias). Norms have no entry: they are weightless, divide by the dense
  width and have an epsilon of 1e-5, whatever the model's own.
* Each decoder layer has a parameter ``attn_shortcut_Q`` [d, d'] for the residual path beside attention (beside the
  whole block where attention and MLP run in parallel) and ``mlp_shortcut_Q`` for the one beside the MLP. The stream
  multiplies them from the left: they are the transposes of the shortcuts here.
* The sizes are kept per layer and module, in dictionaries from the layer's index: what attention and MLP read
  (``*_input_dimensions``) and write (``*_output_dimensions``). Parallel layers have ``attention_input_dimensions`` and
  ``mlp_output_dimensions`` only. One ``const_dimension`` stands for all of them in files made for older checkpoints.
"""

import copy
import json as json_format
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slicegpt_fast.architectures import Architecture, architecture_of
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing import SliceConfig, SlicePlan
from slicegpt_fast.slicing.layers import narrow_, shortcut_name

EPS = 1e-5
# The families that the published code slices, and where their configs keep the epsilon (OPT's is 1e-5 without).
FAMILIES = {"llama": "rms_norm_eps", "opt": None, "phi": "layer_norm_eps", "phi3": "rms_norm_eps"}
SHORTCUTS = ("attn_shortcut_Q", "mlp_shortcut_Q")
READ_SIZES = ("attention_input_dimensions", "mlp_input_dimensions")
WRITTEN_SIZES = ("attention_output_dimensions", "mlp_output_dimensions")


def import_reference(pt: str | Path, json: str | Path, base_config: PreTrainedConfig) -> PreTrainedModel:
    """Return the sliced model in a checkpoint of microsoft/TransformerCompression.

    It is in evaluation mode, on the CPU and in the checkpoint's dtype, and generates, saves and loads like any model
    sliced here. How many tokens it was calibrated on is not recorded: its config says 0.

    Args:
        pt: the state dict that ``torch.save`` wrote. Nothing but tensors is unpickled.
        json: the file of sizes beside it.
        base_config: the config of the dense model that was sliced (``AutoConfig.from_pretrained``): Llama, OPT, Phi or
            Phi-3. It is not changed.

    Raises:
        InputError: a file is missing, damaged or something else, or the three do not belong together.
    """
    architecture = architecture_of(base_config)
    if base_config.model_type not in FAMILIES:
        raise InputError(
            f"base_config is of model type {base_config.model_type!r}: the published code slices {', '.join(FAMILIES)}."
        )
    config = copy.deepcopy(base_config)
    config.tie_word_embeddings = False
    eps = FAMILIES[config.model_type]
    if eps:
        setattr(config, eps, EPS)
    plan = _read_plan(json, architecture, config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    narrow_(skeleton, plan)
    weights = _read_weights(pt, architecture, skeleton)
    fields = vars(plan) | {"widths": list(plan.widths), "groups": list(plan.groups)}
    config.quantization_config = SliceConfig(**fields, calibration_tokens=0).to_dict()
    dtype = next(iter(weights.values())).dtype
    return type(skeleton).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _read_plan(file: str | Path, architecture: Architecture, config: PreTrainedConfig) -> SlicePlan:
    """The plan that the sizes in a JSON file stand for."""
    full, layers, sublayers = config.hidden_size, config.num_hidden_layers, len(architecture.sublayers)
    expected = (full, layers, sublayers == 1)
    try:
        sizes = json_format.loads(Path(file).read_text())
        const, head = sizes.get("const_dimension"), sizes["head_dimension"]
        stated = tuple(sizes[key] for key in ("hidden_size", "layers_num", "parallel_blocks"))
        if const is not None:
            read = [const] * (layers * sublayers) + [const if sizes["do_slice_head"] else full]
            written, embedded, stated = read[1:], {const}, expected
        elif stated == expected:
            read = [*_per_layer(sizes, READ_SIZES[:sublayers], layers), head]
            written = _per_layer(sizes, WRITTEN_SIZES[-sublayers:], layers)
            embedded = set(sizes["embedding_dimensions"].values())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is not a file of slicing dimensions ({type(error).__name__}: {error}): give the .json that was "
            "written with the .pt."
        ) from error
    if stated != expected:
        raise InputError(
            f"{file} states (hidden_size, layers_num, parallel_blocks) = {stated}, but base_config has {expected}: "
            "give the config of the model that was sliced."
        )
    consistent = written == read[1:] and embedded == {read[0]}
    if not consistent or not all(isinstance(size, int) and 0 < size <= full for size in read):
        raise InputError(f"the sizes in {file} contradict one another or the hidden size {full}: it was edited.")
    return SlicePlan("per-norm", "raw", full, tuple(read), tuple(range(len(read))))


def _per_layer(sizes: dict[str, Any], names: tuple[str, ...], layers: int) -> list[int]:
    """The entries of the dictionaries ``names``, layer by layer in the order of the names."""
    return [sizes[name][str(layer)] for layer in range(layers) for name in names]


def _read_weights(file: str | Path, architecture: Architecture, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors in a .pt file by their names in ``skeleton``, whose names and shapes they have."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}.") from error
    except Exception as error:  # whatever torch stumbles over in a damaged stream
        raise InputError(
            f"{file} is damaged or holds more than tensors: give the state dict that was saved."
        ) from error
    named = isinstance(stored, dict) and all(isinstance(name, str) for name in stored)
    if not named or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise InputError(f"{file} does not hold a state dict of tensors: give the one that was saved.")

    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    for layer in range(skeleton.config.num_hidden_layers):
        for theirs, sublayer in zip(SHORTCUTS, architecture.sublayers, strict=False):
            prefix = f"{architecture.layers}.{layer}."
            if prefix + theirs in stored:
                stored[f"{prefix}{shortcut_name(sublayer)}.weight"] = stored.pop(prefix + theirs).T.contiguous()
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    missing, foreign = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    if missing or foreign:
        raise InputError(
            f"{file} {'lacks' if missing else 'has'} {min(missing or foreign)}, unlike a sliced "
            f"{type(skeleton).__name__}: give the base_config of the model that was sliced, and merge adapters."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise InputError(
                f"{name} in {file} has shape {list(stored[name].shape)}, but the sizes ask for {list(shape)}: the .pt, "
                "the .json and base_config do not belong together."
            )
    return stored
